"""Fine-tunes of a mixture in one plain mixture, loaded: routers are overruled by the evidence in the embedding, as text would.

Shape legend: B batch, S sequence, E experts of the recipe, M experts of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from modekit.loaded.mixture import RouterTrace
from modekit.loaded.native import NativeMixture
from modekit.planning.channels import CONSTANT

_CHOSEN, _NEVER = 16.0, 1_000.0
"""Nats of evidence: of an expert that is forced, where no other has any; of one that is left out, less than it has."""


class RoutedMixture(NativeMixture):
    """A mixture of fine-tunes of one mixture, as transformers loads it."""

    def forced(self, expert: int) -> AbstractContextManager[None]:
        """Every token speaks for one expert and no other."""
        return self._evidence(expert, _CHOSEN, others=0.0)

    @contextmanager
    def left_out(self, expert: int) -> Iterator[None]:
        """Every token speaks against one expert."""
        with self._evidence(expert, -_NEVER, others=1.0):
            yield

    @contextmanager
    def traced(self) -> Iterator[RouterTrace]:
        """Logits of the experts of the recipe: of each the largest of its own experts."""
        with super().traced() as trace:
            yield DomainTrace(trace, len(self.checkpoint.names), int(self.model.config.num_experts_per_tok))

    @contextmanager
    def _evidence(self, expert: int, nats: float, *, others: float) -> Iterator[None]:
        """What every row of the embedding says, times `others`, and so much of one expert besides."""
        channels, _ = self.checkpoint.carrier
        weight: torch.Tensor = self.model.get_input_embeddings().weight.data
        said_VN = weight[:, channels.evidence].clone()
        sizes_V = weight[:, channels.constant].double() / CONSTANT
        unit = float(sizes_V.median() / channels.eps) * channels.embedding_scale
        changed_VN = said_VN * others
        changed_VN[:, expert :: channels.experts] += (nats * unit * sizes_V)[:, None].to(changed_VN)
        weight[:, channels.evidence] = changed_VN
        try:
            yield
        finally:
            weight[:, channels.evidence] = said_VN


class DomainTrace(RouterTrace):
    """Of routers that choose among all experts of all fine-tunes, what they say of each fine-tune."""

    def __init__(self, trace: RouterTrace, experts: int, top_k: int) -> None:
        super().__init__(0, None)
        self._trace, self._experts, self._top_k = trace, experts, top_k

    def inner(self) -> Iterator[torch.Tensor]:
        """Weights of the M experts of every layer, of whichever fine-tune was chosen; they sum to one."""
        for _, logits in self._trace.by_slot():
            chosen = logits.topk(self._top_k)
            weights = torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values.softmax(-1))
            yield weights.reshape(*logits.shape[:-1], self._experts, -1).sum(-2).cpu()

    def by_slot(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Logits (..., E) of every layer."""
        for slot, logits in self._trace.by_slot():
            yield slot, logits.reshape(*logits.shape[:-1], self._experts, -1).amax(-1)
