"""What the routers of a loaded mixture say while a text runs through it.

Shape legend: B batch, S sequence, O output features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.checkpoint import Checkpoint
from modekit.models import gate_parameters, native_routers


class RouterTrace:
    """Logits of the last pass, per router slot, float32, with their graph: (B, S, E), or (B, S, O, E) per feature."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor | None] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Logits in the order of the slots, of the routers that have run."""
        return (logits for logits in self.logits if logits is not None)


@contextmanager
def router_trace(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[RouterTrace]:
    """While open, every pass leaves its routers' logits in the trace.

    What native routers return differs between versions of transformers; what they read does not: their logits are taken
    from that. Routers of the modekit architecture say theirs.
    """
    trace = RouterTrace()
    trace.logits = [None] * len(checkpoint.slots)
    if checkpoint.native is None:
        flow = model.base_model.flow
        places = {slot.name.removesuffix(".gate"): number for number, slot in enumerate(checkpoint.slots)}
        names = {module.place: places[name] for name, module in model.named_modules() if name in places}

        def said(place: str, logits: torch.Tensor) -> None:
            trace.logits[names[place]] = logits

        flow.listener = said
        try:
            yield trace
        finally:
            flow.listener = None
        return
    gates = {id(gate) for gate in gate_parameters(model, checkpoint)}
    handles = []
    for number, router in enumerate(native_routers(model, checkpoint)):
        # Asked for by name in every pass: FSDP puts whole gates in the place of sharded ones while a layer runs.
        name = next(name for name, parameter in router.named_parameters() if id(parameter) in gates)

        def read(module: nn.Module, args: tuple[torch.Tensor, ...], number: int = number, name: str = name) -> None:
            trace.logits[number] = nn.functional.linear(args[0].float(), module.get_parameter(name).float())

        handles.append(router.register_forward_pre_hook(read))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
