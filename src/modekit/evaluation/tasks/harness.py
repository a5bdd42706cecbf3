"""lm-evaluation-harness: its tasks by name or from a folder, run on a loaded model, without its noise."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import ModekitError, TextError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_SEED = 1234  # of few-shot examples, as in the harness's own command
_MOST_REQUESTS = 200_000  # of one task
_DATA_REMEDY = (
    "its data set has to be on this machine or on a hub that can be reached: connect, unset HF_HUB_OFFLINE, or give tasks "
    "whose data are files"
)
_PREFERRED = ("acc_norm", "acc", "exact_match")  # of the metrics of a task that is not ours; else its first


@dataclass(frozen=True)
class Metric:
    """What is shown of a task. `chance` is None where guessing has no score."""

    name: str
    higher_is_better: bool
    chance: float | None


@dataclass(frozen=True)
class Scored:
    """One model on one task: its items as the harness scored them, and what it made of them all."""

    items: Sequence[Mapping[str, Any]]
    totals: Mapping[str, float]


@contextmanager
def quiet() -> Iterator[None]:
    """While open the harness logs, warns and draws nothing."""
    import datasets
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bars, drawn = logger.level, datasets.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = lambda iterable, **_: iterable
        try:
            yield
        finally:
            lm_eval.api.task.tqdm = drawn
            logger.setLevel(level)
            if bars:
                datasets.enable_progress_bars()


def harness_task(config: Mapping[str, object]) -> Task:
    """A task of the harness from what its file would say."""
    from lm_eval.tasks import TaskManager

    return next(iter(TaskManager(include_defaults=False).load([dict(config)])["tasks"].values()))


def named_tasks(names: Sequence[str], folders: Sequence[Path], *, trusted: bool, others: Sequence[str] = ()) -> dict[str, Task]:
    """Tasks by name (tasks, groups, tags, with * and ?) from folders and the harness's own; `others` could be meant, too.
    Raises ModekitError when a name is unknown, a folder is not there, or nobody said that what its files name may run;
    TextError when a task's data cannot be had.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ModekitError(
                "the folder of tasks does not exist", where="--include-path", found=str(folder), remedy="correct the path"
            )
    if folders and not trusted:
        raise ModekitError(
            "a folder of tasks may run code: its files name functions, metrics and data sets",
            where="--include-path",
            found=", ".join(map(str, folders)),
            remedy="read the whole folder, and give --trust-remote-code if all of it may run",
        )
    manager = _manager(names, folders)
    tasks: dict[str, Task] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise _unknown(name, [*others, *manager.all_tasks])
        for match in matching:
            with raising(f"task {match}", "the task cannot be loaded", _DATA_REMEDY):
                tasks.update(manager.load([match])["tasks"])
    return tasks


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """The tasks of folders, and the harness's own, which are thousands of files, where a name is not theirs."""
    from lm_eval.tasks import TaskManager

    include = [str(folder) for folder in folders]
    manager = TaskManager(include_path=include, include_defaults=False)
    return manager if all(manager.match_tasks([name]) for name in names) else TaskManager(include_path=include)


def _unknown(name: str, known: Sequence[str]) -> ModekitError:
    close = difflib.get_close_matches(name, known, 3)
    return ModekitError(
        "unknown task",
        where="TASKS",
        found=name,
        expected=f"perhaps {', '.join(close)}" if close else None,
        remedy="see `lm_eval ls tasks`, or give the folder of your own tasks with --include-path",
    )


@contextmanager
def raising(where: str, what: str, remedy: str) -> Iterator[None]:
    """While open, whatever goes wrong in the harness ends in TextError."""
    try:
        yield
    except ModekitError:
        raise
    except Exception as error:  # data sets, the hub, filters and metrics raise errors that share no base class
        said = " ".join(str(error).split())[:300]
        raise TextError(what, where=where, found=f"{type(error).__name__}: {said}", remedy=remedy) from error


def build_requests(name: str, task: Task, limit: int | None) -> None:
    """Make what a task asks, once for all models. Raises TextError where that is too much, or does not work."""
    with raising(f"task {name}", "the task cannot be asked", "check its text, answers and few-shot examples"):
        _check_size(name, task, limit)
        task.set_fewshot_seed(_SEED)
        task.build_all_requests(limit=limit)
        task.build_all_requests = lambda **_: None  # the harness would draw other few-shot examples for every model


def _check_size(name: str, task: Task, limit: int | None) -> None:
    """Raise TextError for requests that no memory holds, counted before one is made."""
    asked = 0
    for _, doc in task.doc_iterator(limit=limit):
        asked += (len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 1) * task.config.repeats
        if asked > _MOST_REQUESTS:
            raise TextError(
                "the task is too large",
                where=f"task {name}",
                found=f"{asked:,} requests, and more",
                expected=f"at most {_MOST_REQUESTS:,}",
                remedy="give --limit",
            )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    *,
    limit: int | None,
    trusted: bool,
    advance: Callable[[int], object],
) -> dict[str, Scored]:
    """One model on all tasks; `advance` gets the number of answered requests. Raises ModekitError naming what failed."""
    from lm_eval.evaluator import evaluate

    from modekit.evaluation.tasks.scoring import LoadedModel

    for task in tasks.values():
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
    remedy = "run the tasks one at a time to see which, and check its text and lengths"
    with raising(", ".join(tasks)[:200], "a task cannot be run on this model", remedy):
        found = evaluate(
            lm=LoadedModel(model, tokenizer, advance),
            task_dict={"tasks": dict(tasks), "groups": {}},
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=trusted,
        )
        return {name: _scored(found["samples"][name], found["results"][name]) for name in tasks}


def _scored(samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Scored:
    """Of several filters the first."""
    name = samples[0]["filter"]
    totals = {key.partition(",")[0]: value for key, value in results.items() if key.endswith(f",{name}")}
    return Scored(
        [sample for sample in samples if sample["filter"] == name],
        {key: float(value) for key, value in totals.items() if isinstance(value, (int, float))},
    )


def metrics_of(task: Task, limit: int | None, *, every: bool) -> list[Metric]:
    """What is shown of a task: one metric, or `every` one of them."""
    better = dict(task.higher_is_better())
    names = list(better) if every else [next((name for name in _PREFERRED if name in better), next(iter(better)))]
    return [Metric(name, bool(better[name]), chance_of(task, limit) if name.startswith("acc") else None) for name in names]


def chance_of(task: Task, limit: int | None) -> float | None:
    """Expected accuracy of guessing between the choices of each item; None for a task without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = []
    for _, doc in task.doc_iterator(limit=limit):
        target = task.doc_to_target(doc)
        shares.append((len(target) if isinstance(target, list) else 1) / len(task.doc_to_choice(doc)))
    return sum(shares) / len(shares)
