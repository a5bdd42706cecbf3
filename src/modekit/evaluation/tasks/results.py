"""OUT/results/tasks.json and tasks.md: scores of models on tasks, kept as long as they are this checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.markdown import markdown_table
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.tasks.intervals import Estimate
from modekit.files.figures import or_dash
from modekit.files.read import UNREADABLE
from modekit.files.typed import Count, Figure, Label
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
    chance: Figure | None
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
            return replace(self, notes=[*self.notes, f"{self.file} was damaged and is written again"])
        if earlier.checkpoint != self.checkpoint:
            dropped = f"earlier results in {self.file} were of another state of the checkpoint and are dropped"
            return replace(self, notes=[*self.notes, dropped])
        return replace(self, tasks={**earlier.tasks, **self.tasks}, macro={**earlier.macro, **self.macro})

    def tables(self, between: str = " ") -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Title, header and cells: means, and what the mixture is better by; a table per domain; tasks by name."""
        if self.macro:
            yield ("Means", *self._table(self.macro, between))
            yield ("Mixture minus each other model, paired over items", *self._table(self.macro, between, differences=True))
        for domain in dict.fromkeys(scores.domain for scores in self.tasks.values() if scores.domain is not None):
            own = {name: scores for name, scores in self.tasks.items() if scores.domain == domain}
            unseen = " (unseen)" if any(scores.unseen for scores in own.values()) else ""
            short = {name.removeprefix(f"modekit_{domain}_"): scores for name, scores in own.items()}
            yield (f"{domain}{unseen}", *self._table(short, between))
        named = {name: scores for name, scores in self.tasks.items() if scores.domain is None}
        if named:
            yield ("Tasks", *self._table(named, between))

    def markdown(self) -> str:
        """For tasks.md."""
        parts = ["Scores of each model, 95 % intervals in brackets (bootstrap over documents, or items).", ""]
        for title, header, body in self.tables():
            parts += [f"## {title}", "", markdown_table(header, body), ""]
        return "\n".join([*parts, *(f"* {note}" for note in self.notes)]).rstrip() + "\n"

    def _table(
        self, columns: Mapping[str, TaskScores], between: str, *, differences: bool = False
    ) -> tuple[list[str], list[list[str]]]:
        """A row per model, and one of chance."""
        header = ["model"]
        for name, scores in columns.items():
            less = "" if scores.higher_is_better else ", less is better"
            header.append(f"{name} ({scores.metric}{less}, {scores.items})")
        picked = {name: scores.differences if differences else scores.rows for name, scores in columns.items()}
        body = []
        for model in self.models:
            cells = [cell_of(rows.get(model), columns[name].metric, between, differences) for name, rows in picked.items()]
            if any(cell != "-" for cell in cells):
                body.append([model, *cells])
        chances = [scores.chance for scores in columns.values()]
        if not differences and any(chance is not None for chance in chances):
            body.insert(0, ["chance", *(or_dash(chance, ".3f") for chance in chances)])
        return header, body


def cell_of(estimate: Estimate | None, metric: str, between: str, signed: bool) -> str:
    """A score and its interval; accuracies with three digits behind the point, percentages with two."""
    if estimate is None:
        return "-"
    digits = 2 if metric in PERCENTAGES else 3
    form = f"{'+' if signed else ''}.{digits}f"
    value = format(estimate.value, form)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value}{between}[{estimate.low:{form}}, {estimate.high:{form}}]"
