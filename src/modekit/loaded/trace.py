"""What the routers of a loaded mixture say while a text runs through it.

Shape legend: B batch, S sequence, D width, O output features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.models import gate_parameters, native_routers


class RouterTrace:
    """Logits of the last pass, per router slot, float32, with their graph: (B, S, E), or (B, S, O, E) per feature."""

    def __init__(self, slots: int, gates: list[nn.Parameter] | None) -> None:
        self._gates = gates
        self.said: list[torch.Tensor | None] = [None] * slots

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Logits in the order of the slots, of the routers that have run."""
        for slot, said in enumerate(self.said):
            if said is not None:
                yield said if self._gates is None else nn.functional.linear(said.float(), _whole(self._gates[slot]).float())


def _whole(gate: Any) -> torch.Tensor:
    """A gate of which this process may hold a shard; its gradient is the processes' mean, as that of the sharded pass is."""
    whole: torch.Tensor = gate
    if hasattr(gate, "full_tensor"):
        from torch.distributed.tensor import Partial

        whole = gate.full_tensor(grad_placements=[Partial("avg")] * gate.device_mesh.ndim)
    return whole


@contextmanager
def router_trace(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[RouterTrace]:
    """While open, every pass leaves its routers' logits in the trace.

    What native routers return differs between versions of transformers; what they read does not: their logits are taken
    from that, outside the layer, so that a layer that is computed again for its gradient runs the same operations. Routers of
    the modekit architecture say theirs.
    """
    if checkpoint.native is None:
        trace = RouterTrace(len(checkpoint.slots), None)
        flow = model.base_model.flow
        places = {slot.name.removesuffix(".gate"): number for number, slot in enumerate(checkpoint.slots)}
        names = {module.place: places[name] for name, module in model.named_modules() if name in places}

        def said(place: str, logits: torch.Tensor) -> None:
            trace.said[names[place]] = logits

        flow.listener = said
        try:
            yield trace
        finally:
            flow.listener = None
        return
    trace = RouterTrace(len(checkpoint.slots), gate_parameters(model, checkpoint))
    handles = []
    for number, router in enumerate(native_routers(model, checkpoint)):

        def read(_module: nn.Module, args: tuple[torch.Tensor, ...], number: int = number) -> None:
            trace.said[number] = args[0]

        handles.append(router.register_forward_pre_hook(read))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
