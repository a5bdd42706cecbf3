"""OUT/results/tasks.json and tasks.md: scores of models on tasks, kept as long as they are this checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.tasks.intervals import Estimate, SixDigits
from modekit.files.read import UNREADABLE
from modekit.files.typed import Count, Label
from modekit.recipes.strict import BASE

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
    chance: SixDigits | None
    items: Count
    rows: Mapping[Label, Estimate]
    differences: Mapping[Label, Estimate]
    domain: Label | None = None
    unseen: bool = False
    tasks: Sequence[Label] = ()


@dataclass(frozen=True)
class TaskResults(CheckpointResult):
    """tasks.json: tasks by name, and means by group: of one form of questions over the domains with experts, of one metric."""

    tasks: Mapping[Label, TaskScores]
    macro: Mapping[Label, TaskScores]
    notes: Sequence[str]

    file = "tasks.json"
    command = "modekit eval-tasks"

    @property
    def models(self) -> list[str]:
        """Every model that has a score: base first, mixture last."""
        names = dict.fromkeys(name for scores in self.tasks.values() for name in scores.rows)
        return sorted(names, key=lambda name: (name == MIXTURE) - (name == BASE))

    def cells(self) -> int:
        """Of a row per model and a column per task."""
        return len(self.models) * len(self.tasks)

    def with_earlier(self, checkpoint: Checkpoint) -> TaskResults:
        """The same with those of earlier runs on the same checkpoint beside them."""
        try:
            earlier = TaskResults.read(checkpoint)
        except FileNotFoundError:
            return self
        except UNREADABLE:
            return replace(self, notes=[*self.notes, f"{self.file} was damaged and is written anew"])
        if earlier.checkpoint != self.checkpoint:
            dropped = f"earlier results in {self.file} were of another state of the checkpoint and are dropped"
            return replace(self, notes=[*self.notes, dropped])
        return replace(self, tasks={**earlier.tasks, **self.tasks}, macro={**earlier.macro, **self.macro})

    def markdown(self) -> str:
        """Means, then a table per domain, then tasks by name. Intervals are 95 %."""
        parts = ["Scores of each model, 95 % intervals in brackets (bootstrap over documents, or items).", ""]
        if self.macro:
            parts += ["## Means", "", self._table(self.macro), "", "Mixture minus each other model, paired over items.", ""]
            parts += [self._table(self.macro, differences=True), ""]
        for domain in dict.fromkeys(scores.domain for scores in self.tasks.values() if scores.domain is not None):
            own = {name: scores for name, scores in self.tasks.items() if scores.domain == domain}
            unseen = " (unseen)" if any(scores.unseen for scores in own.values()) else ""
            short = {name.removeprefix(f"modekit_{domain}_"): scores for name, scores in own.items()}
            parts += [f"## {domain}{unseen}", "", self._table(short), ""]
        named = {name: scores for name, scores in self.tasks.items() if scores.domain is None}
        if named:
            parts += ["## Tasks", "", self._table(named), ""]
        return "\n".join([*parts, *(f"* {note}" for note in self.notes)]).rstrip() + "\n"

    def _table(self, columns: Mapping[str, TaskScores], *, differences: bool = False) -> str:
        """A row per model, and one of chance."""
        header = ["model", *(f"{name} ({scores.metric}, {scores.items})" for name, scores in columns.items())]
        picked = {name: scores.differences if differences else scores.rows for name, scores in columns.items()}
        body = []
        for model in self.models:
            cells = [cell_of(rows.get(model), columns[name].metric, differences) for name, rows in picked.items()]
            if any(cell != "-" for cell in cells):
                body.append([model, *cells])
        chances = [scores.chance for scores in columns.values()]
        if not differences and any(chance is not None for chance in chances):
            body.insert(0, ["chance", *("-" if chance is None else f"{chance:.3f}" for chance in chances)])
        return markdown_table(header, body)


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
