"""The result of a search: every variant with its loss, and the front of loss against active parameters.

OUT/results/tune.json holds the same; the report reads it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, JsonValue

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.results_folder import Result
from modekit.evaluation.tables import Cell, ResultTable
from modekit.files.figures import count_of, or_dash
from modekit.files.typed import Count, Number


class Candidate(BaseModel, frozen=True):
    """A variant that was tried.

    Attributes:
        mixture: as a recipe writes it.
        why: the reason why it cannot be built; empty where it was scored.
        losses: domain -> nats per token on the select split.
        active, total: parameters that a token passes, and all.
        native: whether its checkpoint runs without modekit.
        best, pareto: whether it has the lowest loss, and whether none with as few active parameters has a lower one.
    """

    name: str
    mixture: dict[str, JsonValue]
    why: str = ""
    losses: dict[str, Number] = {}
    active: Count = 0
    total: Count = 0
    native: bool = False
    best: bool = False
    pareto: bool = False

    @property
    def mean_loss(self) -> float | None:
        """Over the domains, each counting equally; None where it was not scored."""
        return sum(self.losses.values()) / len(self.losses) if self.losses else None


@dataclass(frozen=True, kw_only=True)
class TuneResults(Result):
    """tune.json. `candidates`: by loss, refused ones last; `recipe_digest`: of the best one's recipe."""

    format: Literal[2] = 2
    recipe_digest: str
    candidates: Sequence[Candidate]
    tokens_per_domain: Count
    sequence_length: Count
    seconds: Number

    file = "tune.json"
    command = "modekit tune"

    def belongs_to(self, checkpoint: Checkpoint) -> bool:
        """Whether the best is still that recipe, of the same experts."""
        record = checkpoint.record
        replaced = any(change.what == "replace" for change in record.history)
        return self.recipe_digest == record.recipe_digest and not replaced

    @property
    def best(self) -> Candidate:
        """What is built."""
        return next(each for each in self.candidates if each.best)

    def tables(self) -> list[ResultTable]:
        """All variants, best first."""
        body: list[list[str | Cell]] = [
            [
                f"{'best: ' if each.best else 'front: ' if each.pareto else ''}{each.name}",
                or_dash(each.mean_loss, ".4f"),
                count_of(each.active) if each.active else "-",
                "-" if each.why else "native" if each.native else "modekit",
            ]
            for each in self.candidates
        ]
        said = "Mean held-out loss, nats per token (select split); front: none with as few active parameters is better."
        return [ResultTable("Variants", ["variant", "select loss", "active", "runs as"], body, said)]


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """By loss, with what is best and on the front."""
    by_loss = sorted(found, key=lambda each: float("inf") if each.mean_loss is None else each.mean_loss)
    rows: list[Candidate] = []
    fewest = float("inf")
    for each in by_loss:
        pareto = bool(each.losses) and each.active < fewest
        fewest = each.active if pareto else fewest
        rows.append(each.model_copy(update={"best": not rows and bool(each.losses), "pareto": pareto}))
    return rows
