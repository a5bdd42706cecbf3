"""The table of shapes, loaded: what stands behind `mixture_of` and `expert_view`. A new shape is a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.loaded.mixture import ExpertView, LoadedMixture
from modekit.loaded.modekit import ModekitMixture, ModekitView
from modekit.loaded.native import DenseView, NativeMixture
from modekit.loaded.routed import RoutedMixture
from modekit.planning.modekit_shape import ModekitShape
from modekit.planning.native_shape import NativeShape
from modekit.planning.plan import Shape
from modekit.planning.routed import RoutedShape
from modekit.run import QUIET, Run

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
