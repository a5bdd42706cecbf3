"""lm-evaluation-harness: its tasks by name or from a folder, run on a loaded model, without its noise.

A folder of tasks is read as data: its Python, data sets that bring code, and templates that reach out of their sandbox need
the flag for remote code.
"""

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

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modekit.errors import ModekitError, TextError

_PREFERRED = ("acc_norm", "acc", "exact_match")  # of the metrics of a task that is not ours; else its first
_ALLOWS_CODE, _NO = {"trust_remote_code", "unsafe_code"}, {"false", "no", "off", "null", "~", ""}
_CODE_READERS = {"pandas", "webdataset", "spark"}  # builders of the datasets library that unpickle what they read


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


def named_tasks(names: Sequence[str], folders: Sequence[Path], *, trusted: bool) -> dict[str, Any]:
    """Tasks by name (tasks, groups, tags, with * and ?) from folders and the harness's own.

    Raises ModekitError when a name is unknown or a folder brings code without the flag, TextError when a task's data cannot
    be had.
    """
    from lm_eval.tasks import TaskManager

    for folder in folders:
        _check_folder(folder, trusted)
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    if any(not manager.match_tasks([name]) for name in names):  # its own are thousands of files, read only when asked for
        manager = TaskManager(include_path=[str(folder) for folder in folders])
    tasks: dict[str, Any] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
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


def _check_folder(folder: Path, trusted: bool) -> None:
    if not folder.is_dir():
        raise ModekitError(
            "the folder of tasks does not exist", where="--include-path", found=str(folder), remedy="correct the path"
        )
    for file in sorted(folder.rglob("*.yaml")) if not trusted else []:
        found = _code_in(file, set())
        if found:
            raise ModekitError(
                "the folder of tasks brings code of its own", where=f"--include-path: {file}", found=found,
                remedy="read it, and give --trust-remote-code if it may run",
            )  # fmt: skip


def _code_in(file: Path, visited: set[Path]) -> str | None:
    """What in a task file, or one that it includes, would run code; None when nothing does."""
    file = file.resolve()
    if file in visited:
        return None
    visited.add(file)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the harness cannot read it either, and passes over it
    nodes, reached = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in reached:
            continue
        reached.add(id(node))
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            return f"{node.tag} {node.value}" if isinstance(node.value, str) else str(node.tag)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                nodes += [key, value]
                found = _code_said(str(key.value), value, file.parent, visited)
                if found:
                    return found
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return None


def _code_said(key: str, value: yaml.Node, folder: Path, visited: set[Path]) -> str | None:
    """The same for one key and its value."""
    said = str(value.value)
    if (key in _ALLOWS_CODE and said.lower() not in _NO) or (key == "dataset_path" and said in _CODE_READERS):
        return f"{key}: {said}"
    included = [] if key != "include" else [value] if isinstance(value, yaml.ScalarNode) else value.value
    return next(filter(None, (_code_in(folder / str(other.value), visited) for other in included)), None)


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

    from modekit.tasks.scoring import LoadedModel

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
