"""OUT/results/tasks.json and tasks.md: scores of models on tasks, kept as long as they are this checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.identity import belongs_to
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results_folder import RESULTS_FOLDER, read_results, write_results
from modekit.evaluation.tasks.intervals import Estimate
from modekit.files.read import UNREADABLE
from modekit.files.typed import Count, Label, Number, as_kind, read_as
from modekit.files.write import json_bytes

TASKS_FILE = "tasks.json"
PERCENTAGES = ("chrf", "bleu", "rougeL")  # metrics from 0 to 100
MIXTURE = "mixture"


@dataclass(frozen=True)
class TaskScores:
    """Of every model on one task, or on the mean of `tasks`.

    `differences` are the mixture's score minus each other model's. `domain` is whose questions they are, None for a task by
    name; `unseen` when no expert was made for it. `chance` is what guessing scores, None where that has no meaning.
    """

    metric: Label
    higher_is_better: bool
    chance: Number | None
    items: Count
    rows: Mapping[Label, Estimate]
    differences: Mapping[Label, Estimate]
    domain: Label | None = None
    unseen: bool = False
    tasks: Sequence[Label] = ()

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **vars(self),
            "chance": None if self.chance is None else float(f"{self.chance:.6g}"),
            "rows": {name: each.as_data() for name, each in self.rows.items()},
            "differences": {name: each.as_data() for name, each in self.differences.items()},
            "tasks": list(self.tasks),
        }


@dataclass(frozen=True)
class TaskResults:
    """Tasks by name, and means by group: the questions of one form over the domains with experts, tasks of one metric."""

    tasks: Mapping[str, TaskScores]
    macro: Mapping[str, TaskScores]
    notes: Sequence[str]

    def as_data(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "format": 1,
            "checkpoint": checkpoint.identity,
            "tasks": {name: scores.as_data() for name, scores in self.tasks.items()},
            "macro": {name: scores.as_data() for name, scores in self.macro.items()},
            "notes": list(self.notes),
        }

    @property
    def models(self) -> list[str]:
        """Every model that has a score: base first, mixture last."""
        names = dict.fromkeys(name for scores in self.tasks.values() for name in scores.rows)
        return sorted(names, key=lambda name: (name == MIXTURE) - (name == "base"))


def kept_results(checkpoint: Checkpoint, found: TaskResults) -> TaskResults:
    """New results with those of earlier runs on the same checkpoint beside them."""
    try:
        data = read_as(checkpoint.folder / RESULTS_FOLDER / TASKS_FILE, _Saved)
    except FileNotFoundError:
        return found
    except UNREADABLE:
        return replace(found, notes=[*found.notes, f"{TASKS_FILE} was damaged and is written anew"])
    if data.checkpoint != checkpoint.identity:
        dropped = f"earlier results in {TASKS_FILE} were of another state of the checkpoint and are gone"
        return replace(found, notes=[*found.notes, dropped])
    earlier = TaskResults(data.tasks, data.macro, data.notes)
    return TaskResults({**earlier.tasks, **found.tasks}, {**earlier.macro, **found.macro}, found.notes)


class _Tables(BaseModel):
    tasks: dict[Label, TaskScores]
    macro: dict[Label, TaskScores]
    notes: list[str]


class _Saved(_Tables):
    checkpoint: dict[str, str]


def results_of(data: Any) -> TaskResults:
    """Results back from `TaskResults.as_data`. Raises ValueError for anything else."""
    saved = as_kind(data, _Tables)
    return TaskResults(saved.tasks, saved.macro, saved.notes)


def save_results(checkpoint: Checkpoint, results: TaskResults) -> None:
    """Write tasks.json and tasks.md."""
    table = markdown(results, perplexities(checkpoint))
    write_results(checkpoint, {TASKS_FILE: json_bytes(results.as_data(checkpoint)), "tasks.md": table.encode()})


def perplexities(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Domain -> model -> perplexity, from eval.json when it is there and this checkpoint's."""
    try:
        results = read_results(checkpoint)
    except UNREADABLE:
        return {}
    if not belongs_to(results, checkpoint):
        return {}
    found: dict[str, dict[str, float]] = {}
    for row in results.rows:
        for domain, score in row.scores.items():
            found.setdefault(domain, {})[row.name] = score.perplexity
    return found


def markdown(results: TaskResults, perplexity: Mapping[str, Mapping[str, float]]) -> str:
    """A table of means, then one per domain with perplexity beside it, then tasks by name. Intervals are 95 %."""
    parts = ["Scores of each model, 95 % intervals in brackets (bootstrap over documents, or items).", ""]
    if results.macro:
        parts += ["## Means", "", _table(results, results.macro), ""]
        parts += [
            "Mixture minus each other model, paired over items.",
            "",
            _table(results, results.macro, differences=True),
            "",
        ]
    domains = dict.fromkeys(scores.domain for scores in results.tasks.values() if scores.domain is not None)
    for domain in domains:
        own = {name: scores for name, scores in results.tasks.items() if scores.domain == domain}
        unseen = " (unseen)" if any(scores.unseen for scores in own.values()) else ""
        short = {name.removeprefix(f"modekit_{domain}_"): scores for name, scores in own.items()}
        parts += [f"## {domain}{unseen}", "", _table(results, short, perplexity.get(domain)), ""]
    named = {name: scores for name, scores in results.tasks.items() if scores.domain is None}
    if named:
        parts += ["## Tasks", "", _table(results, named), ""]
    return "\n".join([*parts, *(f"* {note}" for note in results.notes)]).rstrip() + "\n"


def _table(
    results: TaskResults,
    columns: Mapping[str, TaskScores],
    perplexity: Mapping[str, float] | None = None,
    *,
    differences: bool = False,
) -> str:
    header, body = table_of(results.models, columns, differences=differences)
    if perplexity:
        header.insert(1, "perplexity")
        for cells in body:
            cells.insert(1, f"{perplexity[cells[0]]:.1f}" if cells[0] in perplexity else "-")
    return markdown_table(header, body)


def table_of(
    models: Sequence[str], columns: Mapping[str, TaskScores], *, differences: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row per model and one of chance."""
    header = ["model", *(f"{name} ({scores.metric}, {scores.items})" for name, scores in columns.items())]
    picked = {name: scores.differences if differences else scores.rows for name, scores in columns.items()}
    body = []
    for model in models:
        cells = [cell_of(rows.get(model), columns[name].metric, differences) for name, rows in picked.items()]
        if any(cell != "-" for cell in cells):
            body.append([model, *cells])
    chances = [scores.chance for scores in columns.values()]
    if not differences and any(chance is not None for chance in chances):
        body.insert(0, ["chance", *("-" if chance is None else f"{chance:.3f}" for chance in chances)])
    return header, body


def cell_of(estimate: Estimate | None, metric: str, signed: bool = False) -> str:
    """A score and its interval; accuracies with three digits behind the point, percentages with two."""
    if estimate is None:
        return "-"
    digits = 2 if metric in PERCENTAGES else 3
    form = f"{'+' if signed else ''}.{digits}f"
    value = format(estimate.value, form)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"
