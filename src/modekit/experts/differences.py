"""What a fine-tune changed: every tensor of MODEL - BASE, read in blocks, and the linear weights an adapter can reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modekit.errors import MismatchError, SourceError, UnsupportedError, some_of
from modekit.recipes.layers import order_of, stack_of
from modekit.sources.compatible import check_same_architecture, check_sizes
from modekit.sources.config import is_mixture
from modekit.sources.contents import OpenFiles
from modekit.sources.families import row_of
from modekit.sources.family import Family
from modekit.sources.header import TensorRef, check_floats
from modekit.sources.names import is_ignored, module_of, split_layer
from modekit.sources.source import ModelSource
from modekit.weights.flat import holds_only_finite, stored
from modekit.weights.numeric import blocks, to_float32


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in both models. `squared_delta` and `squared_base` are sums over its elements."""

    name: str
    tuned: TensorRef
    base: TensorRef
    squared_delta: float
    squared_base: float

    @property
    def module(self) -> str:
        """Name without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """Name under the layer: self_attn.q_proj; of a model with an encoder with the stack before it: encoder.fc1."""
        layer, path = split_layer(self.module)
        stack = "" if layer is None else stack_of(layer)[0]
        return f"{stack}.{path}" if stack else path

    @property
    def drift(self) -> float | None:
        """|| delta || / || W ||; None when W is zero and the difference is not."""
        if self.squared_base == 0:
            return None if self.squared_delta else 0.0
        return math.sqrt(self.squared_delta / self.squared_base)


def shared_names(tuned: ModelSource, origin: ModelSource) -> list[str]:
    """Tensors of both models in the base's order.

    Raises SourceError, MismatchError or UnsupportedError unless both are unquantised models of one architecture.
    """
    # Without a row: compared with the defaults of most families.
    family = row_of(origin.config) or Family(model_type=str(origin.config["model_type"]))
    for source in (tuned, origin):
        check_floats((ref for name, ref in source.tensors.items() if not is_ignored(name)), where=source.where)
        check_sizes(source, row_of(source.config) or family)
    check_same_architecture(origin, tuned, family)
    names = family.own_names(origin)
    for name in names:
        tuned.matching(origin.tensors[name])
        if ".experts." in name or (is_mixture(origin.config) and len(origin.tensors[name].shape) == 3):
            raise UnsupportedError(
                "the experts of a mixture are no linear layers in memory, so an adapter cannot reach them",
                where=f"{origin.where}: {name}",
                remedy="extract from dense models",
            )
    return names


def compare(tuned: ModelSource, origin: ModelSource, name: str, opened: OpenFiles) -> TensorDifference:
    """How far a tensor has moved: read in blocks, summed in float64. Raises SourceError for NaN or Inf."""
    refs = (tuned.tensors[name], origin.tensors[name])
    for source, ref in zip((tuned, origin), refs, strict=True):
        if not holds_only_finite(opened, ref):
            raise SourceError(
                "the weights hold NaN or Inf",
                where=f"{source.where}: {name}",
                remedy="the model is damaged: save or download it again",
            )
    moved, still = (stored(opened, ref) for ref in refs)
    squared_delta = squared_base = 0.0
    for part in blocks(len(still)):
        base_block = to_float32(still[part])
        squared_delta += float(np.square(to_float32(moved[part]) - base_block, dtype=np.float64).sum())
        squared_base += float(np.square(base_block, dtype=np.float64).sum())
    return TensorDifference(name, *refs, squared_delta, squared_base)


def linears_of(differences: Sequence[TensorDifference]) -> list[TensorDifference]:
    """The linear weights of the decoder layers, by layer and name."""
    found = []
    for each in differences:
        layer, path = split_layer(each.name)
        if layer is not None and path.endswith(".weight") and len(each.base.shape) == 2 and "norm" not in path:
            found.append((layer, module_of(path), each))
    return [each for _, _, each in sorted(found, key=lambda entry: (order_of(entry[0]), entry[1]))]


def check_differs(chosen: Sequence[TensorDifference], differences: Sequence[TensorDifference]) -> None:
    """Raise MismatchError when an adapter would be empty."""
    if not chosen:
        moved = [each.name for each in differences if each.squared_delta]
        raise MismatchError(
            "no linear weight that could be adapted differs" if moved else "the model is its base: no tensor differs",
            where="MODEL, BASE",
            found=f"only {some_of(moved)}" if moved else None,
            remedy="use the full model: an adapter would be empty" if moved else "give the fine-tuned model as MODEL",
        )
