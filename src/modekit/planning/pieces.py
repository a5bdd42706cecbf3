"""What each expert has of a tensor of the base model: its own, the base's, or the base's changed by its adapter."""

from __future__ import annotations

import dataclasses
import math

from modekit.planning.plan import Piece
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.compatibility import matching
from modekit.sources.model import ITEMSIZE, ModelSource, TensorRef


def piece_of(sources: tuple[ModelSource, ...], number: int, ref: TensorRef) -> Piece:
    """The whole tensor `ref` (of the base model, `sources[0]`) as model `number` of the sources has it.

    Raises MismatchError when its shape differs from the base model's.
    """
    source = sources[number]
    if not isinstance(source, AdapterSource):
        return Piece(number, matching(source, ref.name, ref))
    given = source.replaced.get(ref.name, ref)
    change = source.changes.get(ref.name)
    if change is not None:
        return Piece(number, given, change)
    if ref.name in source.bias_changes:
        return Piece(number, given, source.bias_changes[ref.name], of_bias=True)
    return Piece(number if ref.name in source.replaced else 0, given)


def touched(source: ModelSource, name: str) -> bool:
    """Whether an adapter does anything to a tensor of the base; a full model always has its own."""
    if not isinstance(source, AdapterSource):
        return True
    return name in source.changes or name in source.replaced or name in source.bias_changes


def low_rank(source: ModelSource, weight: str) -> LowRank | None:
    """The adapter's change of a weight when it can be kept low-rank: plain LoRA on a linear layer, nothing replaced."""
    if not isinstance(source, AdapterSource) or weight in source.replaced or _bias(weight) in source.replaced:
        return None
    change = source.changes.get(weight)
    if isinstance(change, LowRank) and change.magnitude is None and not change.transposed:
        return change
    return None


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def rows_of(ref: TensorRef, rows: tuple[int, int] | None) -> TensorRef:
    """Some rows of a tensor, which lie together in its file."""
    if rows is None:
        return ref
    row = math.prod(ref.shape[1:]) * ITEMSIZE[ref.dtype]
    first, last = rows
    return dataclasses.replace(
        ref, shape=(last - first, *ref.shape[1:]), start=ref.start + first * row, end=ref.start + last * row
    )
