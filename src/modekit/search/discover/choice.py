"""How many domains? As many as make documents that were held out clearly likelier.

The documents are cut into five parts; groups of four parts say how likely the units of the fifth are. With more groups that
goes on rising, ever more slowly, since every domain has parts of its own: a group is worth having while it makes held-out text
likelier by WORTH. benchmarks/discover.md says what that rests on.

Shape legend: N documents, V units that count, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from modekit.search.discover.evidence import background, evidence_of
from modekit.search.discover.grouping import group
from modekit.search.discover.space import Points
from modekit.search.discover.units import Rows

WORTH = 0.06
"""Nats per word of held-out text that another group must be worth, on the mean of those that come with it."""
_PARTS = 5


@dataclass(frozen=True)
class Tried:
    """A number of domains, and the mean log-likelihood of held-out words, in nats."""

    domains: int
    held_out: float


def try_numbers(points: Points, rows: Rows, most: int, seed: int, advance: Callable[[int], None]) -> list[Tried]:
    """Held-out likelihood for one domain, two, and so on; it ends where documents cannot be told into more.

    `advance` is told how many numbers are done.
    """
    tried: list[Tried] = []
    for domains in range(1, most + 1):
        found = _held_out(points, rows, domains, seed)
        if found is None:
            break
        tried.append(Tried(domains, found))
        advance(domains)
    return tried


def choose(tried: Sequence[Tried]) -> int:
    """The number whose gain over a single domain is furthest above what its groups must be worth; of equals the smallest."""
    return max(tried, key=lambda each: (each.held_out - WORTH * each.domains, -each.domains)).domains if tried else 1


def gains(tried: Sequence[Tried]) -> list[float | None]:
    """What each number adds to the one before it; None for the first."""
    return [None, *(later.held_out - earlier.held_out for earlier, later in pairwise(tried))][: len(tried)]


def _held_out(points: Points, rows: Rows, domains: int, seed: int) -> float | None:
    parts = np.arange(len(points)) % _PARTS
    everywhere, total = background(rows), 0.0
    for part in range(min(_PARTS, len(points))):
        kept, out = np.flatnonzero(parts != part), np.flatnonzero(parts == part)
        found = group(points[kept], rows[kept], domains, everywhere, seed) if len(kept) >= domains else None
        if found is None:
            return None
        total += evidence_of(rows[kept], found.labels, domains, everywhere).held_out(rows[out])
    return total / float(rows.sum())
