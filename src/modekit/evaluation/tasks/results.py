"""OUT/results/tasks.json and tasks.md: scores of models on tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import MIXTURE, Cell, ResultTable
from modekit.files.typed import Count, Digest, Figure, Label
from modekit.recipes.strict import BASE


@dataclass(frozen=True)
class Estimate:
    """A score, and its standard error over the items; None where the harness has none."""

    value: Figure
    error: Figure | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True)
class TaskScores:
    """Scores of every model on a task.

    Attributes:
        form, domain: of questions; None of a task by name.
        unseen: no expert is its own.
        asked: digest of what every model was asked, and of how its answers were judged.
    """

    metric: Label
    higher_is_better: bool
    items: Count
    rows: Mapping[Label, Estimate]
    form: Label | None = None
    domain: Label | None = None
    unseen: bool = False
    asked: Digest = ""


@dataclass(frozen=True)
class TaskResults(Result):
    """tasks.json: tasks by name."""

    tasks: Mapping[Label, TaskScores]

    file = "tasks.json"
    command = "modekit eval-tasks"

    @property
    def models(self) -> list[str]:
        """Every model that has a score: base first, mixture last."""
        names = dict.fromkeys(name for scores in self.tasks.values() for name in scores.rows)
        return sorted(names, key=lambda name: (name == MIXTURE) - (name == BASE))

    def means(self) -> dict[str, TaskScores]:
        """Means over domains with an expert, per form and of all questions; of tasks by name over those of one metric."""
        groups: dict[str, list[TaskScores]] = {}
        for scores in self.tasks.values():
            # Both forms are one mean, too: accuracies of the same number of choices.
            for group in [] if scores.unseen else [scores.metric] if scores.form is None else [scores.form, "questions"]:
                groups.setdefault(group, []).append(scores)
        return {group: _mean(found) for group, found in groups.items() if len(found) > 1}

    def tables(self) -> list[ResultTable]:
        """Means; a table per domain; tasks by name: a row per model."""
        found = [self._table("Means", means, _SAID)] if (means := self.means()) else []
        for domain in dict.fromkeys(scores.domain for scores in self.tasks.values() if scores.domain is not None):
            own = {str(scores.form): scores for scores in self.tasks.values() if scores.domain == domain}
            unseen = " (unseen)" if any(scores.unseen for scores in own.values()) else ""
            found.append(self._table(f"Questions: {domain}{unseen}", own, "Four answers each: guessing scores 0.25."))
        named = {name: scores for name, scores in self.tasks.items() if scores.domain is None}
        return [*found, *([self._table("Tasks", named, _SAID)] if named else [])]

    def _table(self, title: str, columns: Mapping[str, TaskScores], said: str) -> ResultTable:
        header, body = ["model"], list[list[str | Cell]]()
        for name, scores in columns.items():
            less = "" if scores.higher_is_better else ", less is better"
            header.append(f"{name}\n({scores.metric}{less}, {scores.items})")
        for model in self.models:
            if any(model in scores.rows for scores in columns.values()):
                body.append([model, *(str(scores.rows.get(model, "-")) for scores in columns.values())])
        return ResultTable(title, header, body, said)


_SAID = "Score of each model with its standard error over the items; in brackets metric and number of items."


def _mean(several: Sequence[TaskScores]) -> TaskScores:
    """Over tasks; each weighs the same."""
    rows = {}
    for model in several[0].rows:
        found = [each.rows[model] for each in several if model in each.rows]
        errors = [each.error for each in found if each.error is not None]
        error = math.hypot(*errors) / len(found) if len(errors) == len(several) else None
        if len(found) == len(several):
            rows[model] = Estimate(sum(each.value for each in found) / len(found), error)
    metric = several[0].metric if len({each.metric for each in several}) == 1 else "accuracy"
    return replace(several[0], metric=metric, items=sum(each.items for each in several), rows=rows)
