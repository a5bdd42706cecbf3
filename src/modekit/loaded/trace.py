"""What the routers of a loaded mixture say while a text runs through it.

Shape legend: B batch, S sequence, D width, O output features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class RouterTrace:
    """Logits of the last pass, per router slot, float32, with their graph: (B, S, E), or (B, S, O, E) per feature.

    In the decoder of a model with an encoder S is the target's; where a router decides once for a whole source it is 1.
    """

    def __init__(self, slots: int, gates: list[nn.Parameter] | None) -> None:
        self._gates = gates
        self.said: list[torch.Tensor | None] = [None] * slots

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Logits in the order of the slots, of the routers that have run."""
        return (logits for _, logits in self.by_slot())

    def by_slot(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The same with the number of each slot."""
        for slot, said in enumerate(self.said):
            if said is not None:
                gate = None if self._gates is None else self._gates[slot]
                yield slot, said if gate is None else nn.functional.linear(said.float(), _whole(gate).float())


def _whole(gate: Any) -> torch.Tensor:
    """A gate of which this process may hold a shard; its gradient is the processes' mean, as that of the sharded pass is."""
    whole: torch.Tensor = gate
    if hasattr(gate, "full_tensor"):
        from torch.distributed.tensor import Partial

        whole = gate.full_tensor(grad_placements=[Partial("avg")] * gate.device_mesh.ndim)
    return whole
