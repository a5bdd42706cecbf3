"""lm-evaluation-harness: its tasks by name or from a folder, run on a loaded model by its own HFLM, without its noise."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import ModekitError, TextError
from modekit.evaluation.loss import only_finite
from modekit.files.typed import Figure, Label

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_SEED = 1234  # of few-shot examples, as in the harness's own command
_BATCH = 16  # texts that are read side by side
_PREFERRED = ("acc_norm", "acc", "exact_match")  # of the metrics of a task that is not ours; else its first


@dataclass(frozen=True)
class Estimate:
    """A score, and its standard error over the items; None where the score is no mean of them."""

    value: Figure
    error: Figure | None = None


@dataclass(frozen=True)
class Metric:
    """What is shown of a task. `chance` is what guessing scores, None where that has no meaning."""

    metric: Label
    higher_is_better: bool
    chance: Figure | None


@contextmanager
def quiet() -> Iterator[None]:
    """While open the harness logs, warns and draws nothing."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

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
            stack.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = lambda *of, **settings: bar(*of, **{**settings, "disable": True})
        yield


def harness_task(config: Mapping[str, object]) -> Task:
    """A task of the harness from what its file would say."""
    from lm_eval.tasks import TaskManager

    return next(iter(TaskManager(include_defaults=False).load([dict(config)])["tasks"].values()))


def named_tasks(names: Sequence[str], folders: Sequence[Path], others: Sequence[str]) -> dict[str, Task]:
    """Tasks by name (tasks, groups, tags, with * and ?) from folders and the harness's own; `others` could be meant, too.

    Raises ModekitError when a name is unknown, TextError when a task's data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=paths)  # with its own: thousands of files
    tasks: dict[str, Task] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, [*others, *manager.all_tasks], 3)
            raise ModekitError(
                "unknown task",
                where="TASKS",
                found=name,
                expected=f"perhaps {', '.join(close)}" if close else None,
                remedy="see `lm_eval ls tasks`, or give the folder of your own tasks with --include-path",
            )
        for match in matching:
            with _explained(f"task {match}", "the task cannot be loaded", _DATA_REMEDY):
                tasks.update(manager.load([match])["tasks"])
    return tasks


_DATA_REMEDY = (
    "its data set has to be on this machine or on a hub that can be reached: connect, unset HF_HUB_OFFLINE, or give tasks "
    "whose data are files"
)


@contextmanager
def _explained(where: str, what: str, remedy: str) -> Iterator[None]:
    """While open, whatever goes wrong in the harness ends in TextError."""
    try:
        yield
    except ModekitError:
        raise
    except Exception as error:  # data sets, the hub, filters and metrics raise errors that share no base class
        said = " ".join(str(error).split())[:300]
        raise TextError(what, where=where, found=f"{type(error).__name__}: {said}", remedy=remedy) from error


def folders_state(folders: Sequence[str]) -> str:
    """A digest of the names, sizes and times of all files in folders; empty without any."""
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    said = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(said).encode()).hexdigest() if folders else ""


def asked_of(name: str, task: Task, limit: int | None) -> tuple[str, Metric]:
    """Make what a task asks: a digest of it, and what is shown of its answers. Raises TextError where that does not work."""
    with _explained(f"task {name}", "the task cannot be asked", "check its text, answers, metrics and few-shot examples"):
        task.set_fewshot_seed(_SEED)
        task.build_all_requests(limit=limit)
        said = hashlib.sha256(repr(task.config.to_dict().get("metric_list")).encode())
        for instance in task.instances:
            said.update(repr((instance.args, instance.doc)).encode("utf-8", "backslashreplace"))
        return said.hexdigest(), _metric_of(task, limit)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, tuple[Task, str]],
    *,
    limit: int | None,
    trusted: bool,
    advance: Callable[[int], object],
) -> dict[str, Estimate]:
    """What one model scores on tasks, by the metric beside each; `advance` gets the number of texts just read.

    A router may decide by a whole text, and HFLM masks no pads, so that a model of ours reads likelihoods one text at a time.
    Raises ModekitError naming what failed, CheckpointError where the model's output is not finite.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    batch = 1 if hasattr(model.config, "modekit") else _BATCH
    for task, _ in tasks.values():
        task.set_fewshot_seed(_SEED)  # the same examples for every model
    remedy = "run the tasks one at a time to see which, and check its text and lengths"
    with (
        _explained(", ".join(tasks)[:200], "a task cannot be run on this model", remedy),
        only_finite(model, str(model.config.name_or_path), advance),
    ):
        found = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype="float32"),
            task_dict={"tasks": {name: task for name, (task, _) in tasks.items()}, "groups": {}},
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=trusted,
        )
        return {name: _estimate(metric, found["samples"][name], found["results"][name]) for name, (_, metric) in tasks.items()}


def _estimate(metric: str, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Estimate:
    """Of several filters the first; with a standard error where the score is the mean of its items."""
    chosen = samples[0]["filter"]
    value = float(results[f"{metric},{chosen}"])
    items = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
    figures = [float(item) for item in items if isinstance(item, (int, float))]
    if len(figures) < 2 or len(figures) != len(items) or not math.isclose(fmean(figures), value, rel_tol=1e-6, abs_tol=1e-9):
        return Estimate(value)
    return Estimate(value, stdev(figures) / math.sqrt(len(figures)))


def _metric_of(task: Task, limit: int | None) -> Metric:
    better = dict(task.higher_is_better())
    name = next((name for name in _PREFERRED if name in better), next(iter(better)))
    return Metric(name, bool(better[name]), _chance_of(task, limit) if name.startswith("acc") else None)


def _chance_of(task: Task, limit: int | None) -> float | None:
    """Expected accuracy of guessing between the choices of each item; None for a task without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = []
    for _, doc in task.doc_iterator(limit=limit):
        target = task.doc_to_target(doc)
        shares.append((len(target) if isinstance(target, list) else 1) / len(task.doc_to_choice(doc)))
    return fmean(shares)
