"""The bytes of every planned tensor that is not a plain copy: cast, scaled, merged or zero, block by block.

`build` writes them and `verify` computes them again, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from modekit.errors import SourceError
from modekit.merge import merge_blocks
from modekit.numeric import DTYPES, as_array, blocks, is_finite, to_bytes, to_float32
from modekit.plan import Piece, Plan, PlannedTensor
from modekit.sources import Mappings


def computed_blocks(plan: Plan, tensor: PlannedTensor, mappings: Mappings) -> Iterator[memoryview]:
    """The tensor's bytes in order. Raises SourceError for NaN or Inf in a source, or what does not fit the dtype."""
    if tensor.operation == "zeros":
        for part in blocks(tensor.nbytes):
            yield memoryview(bytes(part.stop - part.start))
    elif tensor.operation == "merge":
        yield from _merged(plan, tensor, mappings)
    else:
        for piece in tensor.pieces:
            yield from _converted(plan, piece, tensor, mappings)


def check_finite(plan: Plan, piece: Piece, view: memoryview, dtype: str) -> None:
    """Raise SourceError that names expert and tensor when a block of its bytes holds NaN or Inf."""
    if not is_finite(view, dtype):
        source = plan.sources[piece.source]
        raise SourceError(
            "the weights hold NaN or Inf", where=f"{source.label} ({source.spec}): {piece.ref.name}",
            remedy="the model is damaged: save or download it again",
        )  # fmt: skip


def _converted(plan: Plan, piece: Piece, tensor: PlannedTensor, mappings: Mappings) -> Iterator[memoryview]:
    view = mappings.view(piece.ref)
    check_finite(plan, piece, view, piece.ref.dtype)
    values = as_array(view, piece.ref.dtype)
    for part in blocks(len(values)):
        block = to_float32(values[part])
        if tensor.factor != 1.0:
            block *= np.float32(tensor.factor)
        converted = to_bytes(block, tensor.dtype)
        if not is_finite(converted, tensor.dtype):
            source = plan.sources[piece.source]
            raise SourceError(
                f"the weights do not fit {DTYPES[tensor.dtype]}", where=f"{source.label} ({source.spec}): {piece.ref.name}",
                remedy="choose output: {dtype: bfloat16} or float32",
            )  # fmt: skip
        yield converted


def _merged(plan: Plan, tensor: PlannedTensor, mappings: Mappings) -> Iterator[memoryview]:
    settings = plan.recipe.mixture.merge
    assert settings is not None
    for piece in tensor.pieces:  # before merging, which can hide them: ties drops a NaN from its sum
        check_finite(plan, piece, mappings.view(piece.ref), piece.ref.dtype)
    base, *experts = (as_array(mappings.view(piece.ref), piece.ref.dtype) for piece in tensor.pieces)
    for block in merge_blocks(settings, base, experts):
        merged = to_bytes(block.astype(np.float32), tensor.dtype)
        if not is_finite(merged, tensor.dtype):
            raise SourceError(
                f"the merged backbone overflows {DTYPES[tensor.dtype]}", where=f"mixture.backbone: {tensor.name}",
                remedy="choose output: {dtype: bfloat16} or float32, or a smaller scale",
            )  # fmt: skip
        yield merged
