"""How sure a held-out figure is: standard errors over parts of the text (delete-a-group jackknife)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence

_BLOCKS = 20


def in_blocks(values: Sequence[float]) -> tuple[float, ...]:
    """Sums over at most 20 consecutive parts: the pieces of a document stand side by side, and depend on each other."""
    count = min(_BLOCKS, len(values))
    return tuple(sum(values[len(values) * i // count : len(values) * (i + 1) // count]) for i in range(count))


def mean_error(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Standard error of sum(sums) / sum(counts), from both by block."""
    return jackknife_error(operator.truediv, sums, counts)


def gap_error(base: Sequence[float], own: Sequence[float], row: Sequence[float]) -> float | None:
    """Standard error of (base - row) / (base - own), from sums of loss by block.

    All three read the same text, so that most of its spread cancels. None when blocks are missing, or when one part of the
    text decides whether there is a gap at all.
    """
    if not len(base) == len(own) == len(row) > 1:
        return None

    def share(base: float, own: float, row: float) -> float:
        return (base - row) / (base - own) if base > own else math.nan

    return jackknife_error(share, base, own, row)


def jackknife_error(figure: Callable[..., float], *blocks: Collection[float]) -> float | None:
    """Standard error of a figure of several sums, each given by block: from its values with one block left out each; None when
    one of them is not finite.

    Tukey's jackknife; Efron and Stein, Annals of Statistics 1981.
    """
    totals = [sum(each) for each in blocks]
    without = [figure(*map(operator.sub, totals, parts)) for parts in zip(*blocks, strict=True)]
    count = len(without)
    mean = sum(without) / count
    error = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))
    return error if math.isfinite(error) else None
