"""Kept activations: what every router's gate takes of evenly spaced tokens, under each domain's own expert, in float16.

Shape legend: D width of what a gate takes, N kept tokens of all domains, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modekit.loaded.mixture import ExpertView
from modekit.routing.capture import GateInput, run_with_inputs, to_float16
from modekit.run import Run
from modekit.text.sequences import TokenSequence


@dataclass(frozen=True)
class Kept:
    """What one router's gate took: (N, D) float16, and the domain's expert (N,) of each token."""

    x_ND: torch.Tensor
    labels_N: torch.Tensor


@dataclass(frozen=True)
class Keeper:
    """Keeps a `share` of the tokens for each of `slots` gates, which read `averages` and a `prefix` of their inputs."""

    view: ExpertView
    averages: Sequence[Mapping[str, float | None]]
    prefix: int | None
    slots: int
    share: float

    def read(self, texts: Mapping[int, Sequence[TokenSequence]], stage: str, run: Run) -> list[Kept]:
        """One forward pass over text by the index of its expert; what is kept, per gate."""
        whole = sum(sequence.size for sequences in texts.values() for sequence in sequences)
        done = 0

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            run.progress(stage, done, whole)

        parts: list[list[Kept]] = [[] for _ in range(self.slots)]
        for expert, sequences in texts.items():
            domain = _Domain(sum(len(sequence.ids) for sequence in sequences), self.share)
            self.view.use_expert(expert)
            run_with_inputs(self.view, sequences, [GateInput(self.averages, self.prefix, {})], domain.consume, advance)
            for slot in range(self.slots):
                parts[slot].append(Kept(domain.kept[slot], torch.full((domain.count,), expert)))
        return [Kept(torch.cat([part.x_ND for part in each]), torch.cat([part.labels_N for part in each])) for each in parts]


class _Domain:
    """The kept tokens of one domain: `count` of them, evenly spaced; per gate (count, D) float16."""

    def __init__(self, tokens: int, share: float) -> None:
        self.count = max(1, int(tokens * share))
        self.kept: dict[int, torch.Tensor] = {}
        self._row_of = torch.full((tokens,), -1)
        self._row_of[torch.linspace(0, tokens - 1, self.count, dtype=torch.float64).round().long()] = torch.arange(self.count)

    def consume(self, _way: int, slot: int, x_TD: torch.Tensor, positions_T: torch.Tensor) -> None:
        """Take what one gate took of a batch's tokens, which stand at these positions of the domain's text."""
        rows = self._row_of[positions_T]
        wanted = rows >= 0
        if slot not in self.kept:
            self.kept[slot] = torch.zeros((self.count, x_TD.shape[1]), dtype=torch.float16)
        self.kept[slot][rows[wanted]] = to_float16(x_TD[wanted.to(x_TD.device)])
