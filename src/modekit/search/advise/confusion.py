"""Do the domains differ in their words? An n-gram table is made as `fit: ngram` makes it, and asked about select text.

This is what an n-gram router would decide; domains that are taken for each other are nearly one text.

Shape legend: E domains, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modekit.architecture.modekit_router import causal_average, ngram_rows
from modekit.errors import TextError
from modekit.recipes.recipe import Expert
from modekit.recipes.router import Router
from modekit.routing.ngram import NgramOdds, count_domain, ngram_gate
from modekit.search.advise.texts import Text

ROUTER = Router(fit="ngram", chat=False)


@dataclass(frozen=True)
class Confusion:
    """`named[i, j]`: share of the select tokens of domain i at which the table, knowing the text so far, prefers domain j.

    `domains` are indices of experts.
    """

    domains: tuple[int, ...]
    named: npt.NDArray[np.float64]

    @property
    def told_apart(self) -> float:
        """Mean share of tokens at which a domain's own expert is preferred."""
        return float(np.diagonal(self.named).mean())

    def between(self, first: int, second: int) -> float:
        """Of tokens given to one of two domains, the share given to the wrong one: 0.5 when they are the same text."""
        i, j = self.domains.index(first), self.domains.index(second)
        pair = self.named[np.ix_([i, j], [i, j])]
        return float((pair[0, 1] + pair[1, 0]) / pair.sum()) if pair.sum() else 0.0


def measure_confusion(tokenizer: Any, experts: Sequence[Expert], texts: Mapping[int, Text]) -> Confusion | None:
    """Of the domains with text of both splits; None when fewer than two have some."""
    statistics = {}
    for index, text in texts.items():
        try:
            if text.sequences:
                statistics[index] = count_domain(tokenizer, text.fit, experts[index], ROUTER, {}, where=f"experts[{index}]")
        except TextError:  # nothing in the fit split
            continue
    if len(statistics) < 2:
        return None
    domains = tuple(statistics)
    gate_EH = ngram_gate(NgramOdds([*statistics.values()], ROUTER))
    decay = ROUTER.decays[0]
    named = np.zeros((len(domains), len(domains)))
    for row, index in enumerate(domains):
        for sequence in texts[index].sequences:
            ids = torch.tensor([sequence.ids])
            rows = ngram_rows(ids, torch.ones_like(ids), None, ROUTER.order, ROUTER.buckets)[0][0]
            scores_SE = causal_average(gate_EH[:, rows].T[None], torch.ones(ids.shape), decay, None, add_up=True)[0][0]
            named[row] += torch.bincount(scores_SE.argmax(-1), minlength=len(domains)).numpy()
    return Confusion(domains, named / named.sum(1, keepdims=True))
