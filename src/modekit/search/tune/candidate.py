"""A candidate: one variant that a search tried, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One variant that was tried.

    Attributes:
        number: in the order of the search.
        name: of a fixed variant; "" otherwise.
        mixture: as a recipe says it.
        status: scored on all of the text, dropped early, or refused with `why`.
        losses: nats per token on the select split, per domain, of the tokens that were scored.
        active, total: parameters.
        native: whether a native architecture says it.
    """

    number: int
    name: str
    mixture: dict[str, Any]
    status: str
    why: str
    losses: dict[str, float]
    tokens: int
    active: int
    total: int
    native: bool
    seconds: float

    @property
    def mean(self) -> float:
        """Mean loss over the domains."""
        return sum(self.losses.values()) / len(self.losses)


def pareto(found: Sequence[Candidate]) -> list[Candidate]:
    """Of the fully scored: those that no other beats in loss with as few active parameters, from few to many."""
    front: list[Candidate] = []
    scored = [candidate for candidate in found if candidate.status == "scored"]
    for candidate in sorted(scored, key=lambda each: (each.active, each.mean)):
        if not front or candidate.mean < front[-1].mean:
            front.append(candidate)
    return front
