"""Where an expert's gain sits: held-out loss of the base with only some groups of the expert's tensors put into it.

    share of a part = (loss of base - loss of base with the part) / (loss of base - loss of the whole expert)

Losses are kept for a few blocks of the text; leaving out one block at a time says how far a figure can be trusted (jackknife).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.evaluation.uncertainty import jackknife_error
from modekit.search.advise.result import Figure, Group

PARTS: dict[str, frozenset[Group]] = {
    "ffn": frozenset({"ffn"}),
    "attention": frozenset({"attention"}),
    "norms": frozenset({"norms"}),
    "embeddings + head": frozenset({"embeddings", "head"}),
    "ffn + attention": frozenset({"ffn", "attention"}),
    "ffn + attention + norms": frozenset({"ffn", "attention", "norms"}),
    "all but embeddings": frozenset({"ffn", "attention", "norms", "head"}),
    "all": frozenset({"ffn", "attention", "norms", "embeddings", "head"}),
}
"""What is put into the base, by the name it has in tables."""
ON_AVERAGE = "ffn on the average"
"""One more part: the FFN, where the rest is the average of all experts."""
BASE_INDEX = -1
SMALLEST_GAIN = 1e-3
"""Nats per token; below it `modekit eval` sees no gap to close either."""


@dataclass(frozen=True)
class BlockLosses:
    """Summed loss (nats) and scored tokens of each block of a domain's text."""

    sums: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Gains:
    """What was scored: `whole[model][domain]` with BASE_INDEX for the base, `parts[expert][part]` on the expert's own text."""

    whole: Mapping[int, Mapping[int, BlockLosses]]
    parts: dict[int, dict[str, BlockLosses]]

    @property
    def tokens(self) -> int:
        """Scored in all; what is known from elsewhere counts once."""
        scored = {id(losses): losses for row in self.whole.values() for losses in row.values()}
        scored |= {id(losses): losses for row in self.parts.values() for losses in row.values()}
        return int(sum(losses.tokens.sum() for losses in scored.values()))

    def gain(self, model: int, domain: int) -> Figure:
        """Loss of the base less that of a whole expert on a domain."""
        return figure_of(lambda base, own: base - own, self.whole[BASE_INDEX][domain], self.whole[model][domain])

    def helps(self, index: int) -> bool:
        """Whether an expert is better than the base on its own text, as far as that is known."""
        return index not in self.parts or has_gain(self.gain(index, index))

    def better(self, first: int, second: int, domain: int) -> Figure:
        """Loss of the second less that of the first on a domain."""
        return figure_of(lambda one, other: other - one, self.whole[first][domain], self.whole[second][domain])

    def share(self, expert: int, losses: BlockLosses) -> Figure:
        """Of the gain of an expert on its own text."""
        return figure_of(
            lambda base, own, part: (base - part) / (base - own),
            self.whole[BASE_INDEX][expert],
            self.whole[expert][expert],
            losses,
        )


def has_gain(gain: Figure) -> bool:
    """Whether an expert is better than the base at all."""
    return gain.value > SMALLEST_GAIN


def figure_of(figure: Callable[..., float], *losses: BlockLosses) -> Figure:
    """A function of mean losses on the same text, and its jackknife standard error over the blocks."""

    def of_sums(*sums: float) -> float:
        return figure(*map(operator.truediv, sums[::2], sums[1::2]))

    value, blocks = figure(*(each.mean for each in losses)), [part for each in losses for part in (each.sums, each.tokens)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return Figure(value, jackknife_error(of_sums, *blocks) if len(blocks[0]) > 1 else None)
