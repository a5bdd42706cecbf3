"""lm-evaluation-harness: its tasks by name or from a folder, run on a loaded model, without its noise."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import ModekitError, TextError
from modekit.evaluation.tasks.bounded import BoundedPatterns, render
from modekit.evaluation.tasks.folder import check_exists, leaves, read_folders

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

_SEED = 1234  # of few-shot examples, as in the harness's own command
_MOST_REQUESTS = 200_000  # of one task
_MOST_CHARACTERS = 2**28  # of one task's prompts
_LONGEST_ITEM = 2**20  # characters
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
def quiet(trusted: bool) -> Iterator[None]:
    """While open the harness logs, warns and draws nothing. Unless trusted, templates and patterns of tasks are bounded."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.filters.extraction
    import lm_eval.models.huggingface
    import lm_eval.utils

    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        stack.callback(logger.setLevel, level)
        datasets.disable_progress_bars()
        if bars:
            stack.callback(datasets.enable_progress_bars)
        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            _replace(stack, module, "tqdm", lambda *of, **settings: bar(*of, **{**settings, "disable": True}))
        if not trusted:
            patterns = BoundedPatterns()
            _replace(stack, lm_eval.utils, "apply_template", render)
            for module in (lm_eval.api.metrics, lm_eval.filters.extraction):
                _replace(stack, module, "re", patterns)
        yield


def _replace(stack: ExitStack, module: ModuleType, name: str, value: object) -> None:
    """Put something in the place of a module's own until the stack is left."""
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)


def harness_task(config: Mapping[str, object]) -> Task:
    """A task of the harness from what its file would say."""
    from lm_eval.tasks import TaskManager

    return next(iter(TaskManager(include_defaults=False).load([dict(config)])["tasks"].values()))


def named_tasks(names: Sequence[str], folders: Sequence[Path], *, trusted: bool, others: Sequence[str] = ()) -> dict[str, Task]:
    """Tasks by name (tasks, groups, tags, with * and ?) from folders and the harness's own; `others` could be meant, too.

    Raises ModekitError when a name is unknown or a folder asks for more than data without the flag, TextError when a task's
    data cannot be had.
    """
    for folder in folders:
        check_exists(folder)
    manager = _trusted_tasks(names, folders) if trusted else _checked_tasks(names, folders)
    tasks: dict[str, Task] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise _unknown(name, [*others, *manager.all_tasks])
        for match in matching:
            with raising(f"task {match}", "the task cannot be loaded", _DATA_REMEDY):
                tasks.update(manager.load([match])["tasks"])
    return tasks


def _trusted_tasks(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """The harness's own way: it reads the folders, and runs what their files name."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    if all(manager.match_tasks([name]) for name in names):
        return manager
    return TaskManager(include_path=[str(folder) for folder in folders])  # with its own: thousands of files


def _checked_tasks(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """The harness with the folders' tasks as data. Its own are read only where a name, or a group's member, is not theirs."""
    from lm_eval.tasks import TaskManager

    entries = read_folders(folders)
    matching = [match for name in names for match in fnmatch.filter(entries, name)]
    reached = leaves(matching, entries)
    whole = reached <= set(entries) and all(fnmatch.filter(entries, name) for name in names)
    manager = TaskManager(include_defaults=not whole)
    index = manager.task_index
    for name in entries if not whole else ():
        if name in index:
            raise ModekitError(
                "a task file takes the name of one of the harness's own tasks",
                where="--include-path",
                found=name,
                remedy="give it another name, or leave the folder out",
            )
    for name in sorted(reached - set(entries)):
        if name not in index:
            raise _unknown(name, [*entries, *index])
    index.update(entries)
    manager.all_tasks[:] = sorted(index)
    return manager


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
    """Raise TextError for requests that no memory holds: counted one at a time, and the text of each item first."""
    shots, asked, characters = task.config.num_fewshot or 0, 0, 0
    task.set_fewshot_seed(_SEED)
    for doc in task.sampler.df if shots else ():
        _check_item(name, doc)
    for _, doc in task.doc_iterator(limit=limit):
        _check_item(name, doc)
        prompt = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        answers = len(task.doc_to_choice(doc)) if task.OUTPUT_TYPE == "multiple_choice" else 1
        asked, characters = asked + answers * task.config.repeats, characters + len(str(prompt))
        if asked > _MOST_REQUESTS or characters > _MOST_CHARACTERS:
            raise _too_large(name, f"{asked:,} requests and {characters:,} characters, and more")


def _check_item(name: str, doc: object) -> None:
    if len(str(doc)) > _LONGEST_ITEM:
        raise _too_large(name, f"an item of more than {_LONGEST_ITEM:,} characters")


def _too_large(name: str, found: str) -> TextError:
    return TextError(
        "the task is too large",
        where=f"task {name}",
        found=found,
        expected=f"at most {_MOST_REQUESTS:,} requests and {_MOST_CHARACTERS:,} characters",
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
