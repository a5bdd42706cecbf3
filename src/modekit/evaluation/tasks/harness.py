"""lm-evaluation-harness: its tasks by name or from a folder, run on a loaded model, without its noise."""

from __future__ import annotations

import difflib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import ModekitError, TextError
from modekit.evaluation.tasks.trust import check_folder

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


def require_harness() -> None:
    """Raise ModekitError when the extra is not installed."""
    try:
        for name in ("lm_eval.models.huggingface", "rouge_score.rouge_scorer", "sacrebleu"):
            importlib.import_module(name)
    except ImportError as error:
        raise ModekitError(
            "tasks need lm-evaluation-harness, which is not installed", where="modekit eval --tasks", found=error,
            remedy="pip install 'modekit[eval]'",
        ) from None  # fmt: skip


@contextmanager
def quiet(trusted: bool) -> Iterator[None]:
    """While open the harness logs, warns and draws nothing, and templates of tasks run in a sandbox unless trusted."""
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2.sandbox import SandboxedEnvironment

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    own = lm_eval.utils.env
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        stack.callback(logger.setLevel, level)
        datasets.disable_progress_bars()
        if bars:
            stack.callback(datasets.enable_progress_bars)
        stack.enter_context(_replaced(lm_eval.api.task, "tqdm", lambda iterable, **_: iterable))
        if not trusted:
            sandbox = SandboxedEnvironment(loader=own.loader, undefined=own.undefined)
            sandbox.filters.update(own.filters)
            stack.enter_context(_replaced(lm_eval.utils, "env", sandbox))
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def harness_task(config: Mapping[str, Any]) -> Any:
    """A task of the harness from what its file would say."""
    from lm_eval.tasks import TaskManager

    return next(iter(TaskManager(include_defaults=False).load([dict(config)])["tasks"].values()))


def named_tasks(names: Sequence[str], folders: Sequence[Path], *, trusted: bool, others: Sequence[str] = ()) -> dict[str, Any]:
    """Tasks by name (tasks, groups, tags, with * and ?) from folders and the harness's own; `others` could be meant, too.

    Raises ModekitError when a name is unknown or a folder brings code without the flag, TextError when a task's data cannot
    be had.
    """
    from lm_eval.tasks import TaskManager

    for folder in folders:
        check_folder(folder, trusted=trusted)
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    if any(not manager.match_tasks([name]) for name in names):  # its own are thousands of files, read only when asked for
        manager = TaskManager(include_path=[str(folder) for folder in folders])
    tasks: dict[str, Any] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, [*others, *manager.all_tasks], 3)
            raise ModekitError(
                "unknown task", where="--tasks", found=name, expected=f"perhaps {', '.join(close)}" if close else None,
                remedy="see `lm_eval ls tasks`, or give the folder of your own tasks with --include-path",
            )  # fmt: skip
        for match in matching:
            tasks.update(_load(manager, match))
    return tasks


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # data sets, the hub and templates raise errors that share no base class
        said = " ".join(str(error).split())[:300]
        raise TextError(
            "the task cannot be loaded", where=f"--tasks {name}", found=f"{type(error).__name__}: {said}",
            remedy="its data set has to be on this machine or on a hub that can be reached: connect, unset HF_HUB_OFFLINE, "
            "or give tasks whose data are files",
        ) from None  # fmt: skip


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    limit: int | None,
    trusted: bool,
    advance: Callable[[int], object],
) -> dict[str, Scored]:
    """One model on all tasks; `advance` is told of answered requests. Raises ModekitError naming what a task tripped over."""
    from lm_eval.evaluator import evaluate

    from modekit.evaluation.tasks.scoring import LoadedModel

    try:
        found = evaluate(
            lm=LoadedModel(model, tokenizer, advance), task_dict={"tasks": dict(tasks), "groups": {}}, limit=limit,
            bootstrap_iters=0, confirm_run_unsafe_code=trusted,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, TypeError, RuntimeError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ModekitError(
            "a task cannot be run on this model", where=", ".join(tasks)[:200], found=f"{type(error).__name__}: {said}",
            remedy="run the tasks one at a time to see which, and check its text and lengths",
        ) from error  # fmt: skip
    return {name: _scored(found["samples"][name], found["results"][name]) for name in tasks}


def _scored(samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Scored:
    """Of several filters the first."""
    name = samples[0]["filter"]
    totals = {key.partition(",")[0]: value for key, value in results.items() if key.endswith(f",{name}")}
    return Scored(
        [sample for sample in samples if sample["filter"] == name],
        {key: float(value) for key, value in totals.items() if isinstance(value, (int, float))},
    )


def metrics_of(task: Any, limit: int | None, *, every: bool) -> list[Metric]:
    """What is shown of a task: one metric, or `every` one of them."""
    better = dict(task.higher_is_better())
    names = list(better) if every else [next((name for name in _PREFERRED if name in better), next(iter(better)))]
    return [Metric(name, bool(better[name]), chance_of(task, limit) if name.startswith("acc") else None) for name in names]


def chance_of(task: Any, limit: int | None) -> float | None:
    """Expected accuracy of guessing between the choices of each item; None for a task without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = []
    for _, doc in task.doc_iterator(limit=limit):
        target = task.doc_to_target(doc)
        shares.append((len(target) if isinstance(target, list) else 1) / len(task.doc_to_choice(doc)))
    return sum(shares) / len(shares)
