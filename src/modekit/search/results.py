"""The result of a search: every variant with its loss, and the front of loss against active parameters.

OUT/results/tune.json holds the same; the report reads it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue

from modekit.evaluation.markdown import markdown_table
from modekit.files.figures import count_of, or_dash
from modekit.files.typed import Count, Number

SEARCH_FILE = "tune.json"


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


class TuneResults(BaseModel, frozen=True):
    """Of a search. `candidates`: by loss, refused ones last; `recipe_digest`: of the best one's recipe."""

    format: Literal[2] = 2
    recipe_digest: str
    candidates: Annotated[list[Candidate], Field(max_length=2**14)]
    tokens_per_domain: Count
    sequence_length: Count
    seconds: Number

    @property
    def best(self) -> Candidate:
        """What is built."""
        return next(each for each in self.candidates if each.best)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells, best first."""
        return ["", "variant", "select loss", "active", "runs as"], [
            [
                "best" if each.best else "front" if each.pareto else "",
                each.name,
                or_dash(each.mean_loss, ".4f"),
                count_of(each.active) if each.active else "-",
                "-" if each.why else "native" if each.native else "modekit",
            ]
            for each in self.candidates
        ]

    def markdown(self) -> str:
        """All variants, and why some were refused."""
        about = "Mean loss over the domains in nats per token (select split). `modekit eval` reads text that chose nothing."
        refused = [f"* {each.name}: {' '.join(each.why.split())}" for each in self.candidates if each.why]
        return "\n".join([about, "", markdown_table(*self.table()), *(["", "Refused:", *refused] if refused else []), ""])


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
