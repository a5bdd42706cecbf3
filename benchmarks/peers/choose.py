"""One knob, chosen on the select split: the same for every peer that has one, and for ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from peers.peer import Made, Pool
from peers.score import scores, texts_of

SELECT_TOKENS = 1_024
"""Per domain."""
Value = TypeVar("Value")


def choose(pool: Pool, values: Sequence[Value], make: Callable[[Value], Made]) -> tuple[Value, Made]:
    """The value whose model has the lowest loss on the select split, mean over domains, and that model."""
    texts = texts_of(pool.base, pool.select, SELECT_TOKENS)
    made = {value: make(value) for value in values}
    best = min(values, key=lambda value: sum(nats for nats, _ in scores(made[value].model, texts, pool.base).values()))
    return best, made[best]
