"""What a mixture's router that reads tokens says after each token of a text, without any model.

Of the last token alone last_token.py says the same in less time.

Shape legend: B batch, S sequence, E experts, J averages, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modekit.architecture.modekit_flow import Flow
from modekit.architecture.modekit_router import Router
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.evidence import read_table


class RunningLogits:
    """What a mixture's router that reads tokens says after each token of a text."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._flow = Flow()
        self._router = _router_of(checkpoint, self._flow)

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits (S, E), float32."""
        self._flow.ids_BS = torch.tensor([ids])
        return self._router.logits(torch.zeros(1, len(ids), 1))[0]


def _router_of(checkpoint: Checkpoint, flow: Flow) -> Router:
    """The router as a module of its own, with its gate."""
    experts = len(checkpoint.names)
    if checkpoint.shape.channels is None:
        routing: Mapping[str, Any] = checkpoint.shape.routing.model_dump(mode="json")
        gate_GD = torch.from_numpy(checkpoint.gates()[0])
    else:
        channels, embedding = checkpoint.carrier
        averages = [{"decay": decay} for decay in channels.decays]
        routing = {"method": "gating", "score": "lexical", "averages": averages}
        tables = torch.split(torch.from_numpy(read_table(channels, embedding)), experts, dim=1)
        gate_GD = torch.cat([table_VE.T for table_VE in tables], dim=1)
    router = Router("text", flow, gate_GD.shape[1] // len(routing["averages"]), experts, routing, [1] * experts, 0)
    router.gate = torch.nn.Parameter(gate_GD.contiguous(), requires_grad=False)
    return router.eval()
