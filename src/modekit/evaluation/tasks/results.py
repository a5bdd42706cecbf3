"""OUT/results/tasks.json and tasks.md: scores of models on tasks, kept as long as they are this checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results_folder import CheckpointResult
from modekit.evaluation.tables import MIXTURE, Cell, ResultTable
from modekit.evaluation.tasks.harness import Estimate, Metric, folders_state
from modekit.files.figures import or_dash
from modekit.files.read import UNREADABLE
from modekit.files.typed import Count, Label
from modekit.recipes.strict import BASE


@dataclass(frozen=True, kw_only=True)
class TaskScores(Metric):
    """Of every model on a task.

    Attributes:
        groups: what it is averaged with, if its domain has an expert, separated by commas.
        domain: whose questions they are; None for a task by name.
        asked: digest of all that was asked: scores of other models stay beside these only where it is the same.
        folders: where task files of the user's own lay, and `state`, a digest of their names, sizes and times.
    """

    items: Count
    rows: Mapping[Label, Estimate]
    groups: Label
    asked: str
    domain: Label | None = None
    unseen: bool = False
    folders: Sequence[str] = ()
    state: str = ""


@dataclass(frozen=True)
class TaskResults(CheckpointResult):
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
        """Groups of several tasks -> their mean, of the models that have all of them."""
        groups: dict[str, list[TaskScores]] = {}
        for scores in self.tasks.values():
            for group in [] if scores.unseen else scores.groups.split(","):
                groups.setdefault(group, []).append(scores)
        return {group: _mean(found) for group, found in groups.items() if len(found) > 1}

    def as_data(self) -> dict[str, JsonValue]:
        """Plain data for JSON, with the means that the table shows."""
        data: dict[str, Any] = super().as_data()
        data["means"] = {group: {name: vars(each) for name, each in mean.rows.items()} for group, mean in self.means().items()}
        return data

    def with_earlier(self, checkpoint: Checkpoint) -> TaskResults:
        """The same with those of earlier runs on the same checkpoint beside them, as far as the same was asked."""
        try:
            earlier = TaskResults.read(checkpoint)
        except FileNotFoundError:
            return self
        except UNREADABLE:
            return replace(self, notes=[*self.notes, f"{self.file} was damaged and is written again"])
        if earlier.checkpoint != self.checkpoint:
            dropped = f"earlier results in {self.file} were of another state of the checkpoint and are dropped"
            return replace(self, notes=[*self.notes, dropped])
        kept = {
            name: scores
            for name, scores in earlier.tasks.items()
            if (self.tasks[name].asked == scores.asked if name in self.tasks else folders_state(scores.folders) == scores.state)
        }
        gone = [name for name in earlier.tasks if name not in kept]
        notes = [f"earlier scores are dropped, since what is asked has changed: {', '.join(gone)}"] if gone else []
        both = {
            name: replace(scores, rows={**kept[name].rows, **scores.rows}) if name in kept else scores
            for name, scores in self.tasks.items()
        }
        return replace(self, tasks={**kept, **both}, notes=[*self.notes, *notes])

    def tables(self) -> list[ResultTable]:
        """Means; a table per domain; tasks by name: a row per model, and one of chance."""
        found = [ResultTable("Means", *self._table(means), _SAID)] if (means := self.means()) else []
        for domain in dict.fromkeys(scores.domain for scores in self.tasks.values() if scores.domain is not None):
            own = {name: scores for name, scores in self.tasks.items() if scores.domain == domain}
            unseen = " (unseen)" if any(scores.unseen for scores in own.values()) else ""
            short = {name.removeprefix(f"modekit_{domain}_"): scores for name, scores in own.items()}
            found.append(ResultTable(f"Questions: {domain}{unseen}", *self._table(short)))
        named = {name: scores for name, scores in self.tasks.items() if scores.domain is None}
        return [*found, *([ResultTable("Tasks", *self._table(named), _SAID)] if named else [])]

    def _table(self, columns: Mapping[str, TaskScores]) -> tuple[list[str], list[list[str | Cell]]]:
        header, body = ["model"], list[list[str | Cell]]()
        for name, scores in columns.items():
            less = "" if scores.higher_is_better else ", less is better"
            header.append(f"{name}\n({scores.metric}{less}, {scores.items})")
        for model in self.models:
            if any(model in scores.rows for scores in columns.values()):
                body.append([model, *(_cell(scores.rows.get(model)) for scores in columns.values())])
        chances = [scores.chance for scores in columns.values()]
        if any(chance is not None for chance in chances):
            body.insert(0, ["chance", *(or_dash(chance, ".3f") for chance in chances)])
        return header, body


_SAID = "Score of each model with its standard error over the items; in brackets metric and number of items."


def _mean(several: Sequence[TaskScores]) -> TaskScores:
    """Over tasks; each weighs the same."""
    metrics, chances = {each.metric for each in several}, [each.chance for each in several if each.chance is not None]
    rows = {}
    for model in several[0].rows:
        if all(model in each.rows for each in several):
            found = [each.rows[model] for each in several]
            errors = [each.error for each in found if each.error is not None]
            error = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
            rows[model] = Estimate(sum(each.value for each in found) / len(found), error)
    return replace(
        several[0],
        metric=metrics.pop() if len(metrics) == 1 else "accuracy",
        chance=sum(chances) / len(chances) if len(chances) == len(several) else None,
        items=sum(each.items for each in several),
        rows=rows,
    )


def _cell(estimate: Estimate | None) -> str:
    """A score and its error."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.3f}" + ("" if estimate.error is None else f" ± {estimate.error:.3f}")
