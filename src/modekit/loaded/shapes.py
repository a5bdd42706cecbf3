"""The table of shapes, loaded: what stands behind `mixture_of` and `expert_view`. A new shape is a row here.

Routers of the modekit shape are overruled, and listened to, through what they share (`Flow`).

Shape legend: B batch, S sequence, O output features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.architecture.modekit_flow import Flow
from modekit.architecture.modekit_inside import MixedInside
from modekit.architecture.modekit_router import Router
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.load import load_model
from modekit.loaded.mixture import ExpertView, LoadedMixture, RouterTrace
from modekit.loaded.native import DenseView, NativeMixture, RoutedMixture
from modekit.loaded.passes import reads_target
from modekit.planning.mixture_config import leader_of
from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.native_shape import NativeShape
from modekit.planning.plan import Shape
from modekit.planning.routed import RoutedShape
from modekit.planning.shape import RouterSlot
from modekit.recipes.mixture import CHOICES
from modekit.run import QUIET, Run


class ModekitMixture(LoadedMixture):
    """A mixture in the modekit architecture, as transformers loads it."""

    def gates(self) -> list[nn.Parameter]:
        return [self.model.get_parameter(slot.name) for slot in self.checkpoint.slots]

    def experts(self) -> Iterator[nn.Parameter]:
        """Modules of their own, and the low-rank factors and biases of all."""
        for mixed in flow_of(self.model).mixed.values():
            yield from mixed.experts.parameters()
            yield from mixed.parameters(recurse=False)  # lora_A, lora_B, lora_bias
            yield from mixed.inside.parameters() if isinstance(mixed, MixedInside) else ()
            yield from mixed.differences.parameters() if mixed.few_bits else ()

    def ffn(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.checkpoint.shape.mixture.family.decoder.ffn)

    def set_top_k(self, top_k: int | None) -> None:
        routing = self.checkpoint.shape.routing.as_written()
        if top_k is not None:
            routing |= {"method": "routing", **dict.fromkeys(CHOICES), "top_k": top_k}
        for router in routers_at(self.model, self.checkpoint.slots):
            router.set(routing)

    def forced(self, expert: int) -> AbstractContextManager[None]:
        return flow_of(self.model).changed(forced=expert, beside=False)

    def on_own_text(self, expert: int) -> AbstractContextManager[None]:
        return flow_of(self.model).changed(forced=expert, beside=True)

    def without_common(self) -> AbstractContextManager[None]:
        return flow_of(self.model).changed(common=0.0)

    def left_out(self, expert: int) -> AbstractContextManager[None]:
        return flow_of(self.model).changed(left_out=expert)

    @contextmanager
    def traced(self) -> Iterator[RouterTrace]:
        """The routers say their logits themselves."""
        trace = RouterTrace(len(self.checkpoint.slots), None)
        numbers = {router.place: number for number, router in enumerate(routers_at(self.model, self.checkpoint.slots))}

        def said(place: str, logits: torch.Tensor) -> None:
            trace.said[numbers[place]] = logits

        with flow_of(self.model).changed(listener=said):
            yield trace


class ModekitView:
    """A modekit checkpoint whose routers are overruled."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, run: Run = QUIET) -> None:
        self.model = load_model(checkpoint.folder, dtype=dtype, run=run)
        self._slots = checkpoint.slots

    def use_expert(self, expert: int) -> None:
        self.model.use_expert(expert)

    def router_inputs(self) -> list[nn.Module]:
        """The routers themselves; where one is yet to stand, the place whose input it will read."""
        places = [self.model.get_submodule(leader_of(slot)) for slot in self._slots]
        return [place if place.router is None else place.router for place in places]

    def in_decoder(self) -> list[bool]:
        return [reads_target(leader_of(slot)) for slot in self._slots]


def flow_of(model: PreTrainedModel) -> Flow:
    """What the routers of a loaded modekit mixture share."""
    flow: Flow = model.base_model.flow
    return flow


def routers_at(model: PreTrainedModel, slots: Sequence[RouterSlot]) -> list[Router]:
    """The routers of a loaded modekit mixture, in the order of the slots."""
    return [model.get_submodule(slot.name.removesuffix(".gate")) for slot in slots]


_LOADED: Mapping[type[Shape], tuple[type[LoadedMixture], Callable[..., ExpertView]]] = {
    NativeShape: (NativeMixture, DenseView),
    RoutedShape: (RoutedMixture, DenseView),  # whose fit runs no expert
    ModekitShape: (ModekitMixture, ModekitView),
}


def mixture_of(model: PreTrainedModel, checkpoint: Checkpoint) -> LoadedMixture:
    """A model that was loaded from a checkpoint, with what its shape can do."""
    return _LOADED[type(checkpoint.shape)][0](model, checkpoint)


def expert_view(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, run: Run = QUIET) -> ExpertView:
    """A checkpoint as one expert at a time, ready for evaluation. Raises CheckpointError and SourceError."""
    return _LOADED[type(checkpoint.shape)][1](checkpoint, dtype=dtype, run=run)
