"""The bytes of every planned tensor that is not a plain copy: cast, scaled, folded, factored, merged or zero, in blocks.

`build` writes them and `verify` computes them again, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from modekit.building.padding import padded_blocks
from modekit.errors import SourceError
from modekit.planning.plan import Factor, Piece, Plan, PlannedTensor
from modekit.sources.contents import OpenFiles
from modekit.sources.model import TensorRef
from modekit.weights.factorise import Factors, factorise
from modekit.weights.folding import Folded, folded_bias, reader
from modekit.weights.merge import merge_blocks
from modekit.weights.numeric import BLOCK, DTYPES, blocks, is_finite, to_bytes, to_float32
from modekit.weights.stored import FlatArray, Stored

_PLAIN = 8  # arrays of a plain block: read, in float32, scaled, rounded; small, so that they stay in the processor's cache


class PieceReader:
    """Reads pieces as flat arrays of numbers, computing what adapters and low-rank parts make of a tensor."""

    def __init__(self, opened: OpenFiles) -> None:
        self.opened = opened
        self._read = reader(opened)
        # Of one weight of the base and every expert: what is computed for A serves for B, which comes next.
        self._factored: tuple[TensorRef | None, dict[tuple[TensorRef, int], Factors]] = (None, {})

    def values(self, piece: Piece) -> FlatArray:
        """The piece's elements in order: its own dtype when it is plain, else float32."""
        if piece.factor is not None:
            factors = self._factors(piece.ref, piece.factor)
            return (factors.a if piece.factor.side == "A" else factors.b).ravel()
        if piece.of_bias and piece.change is not None:
            return folded_bias(piece.change, self._read(piece.ref), self._read)
        plain = Stored(self.opened, piece.ref)
        if piece.columns is not None:
            return plain[:].reshape(piece.ref.shape)[:, slice(*piece.columns)].ravel()
        if piece.change is None:
            return plain
        rows, columns = piece.ref.shape
        return Folded(piece.change, plain, (rows, columns), self._read)

    def _factors(self, base: TensorRef, factor: Factor) -> Factors:
        if self._factored[0] != base:
            self._factored = (base, {})
        known, key = self._factored[1], (factor.expert, factor.rank)
        if key not in known:
            known[key] = factorise(self._difference(factor.expert, base), rank=factor.rank)
        return known[key]

    def _difference(self, expert: TensorRef, base: TensorRef) -> npt.NDArray[np.float32]:
        """The whole of an expert's difference to the base, (O, I)."""
        moved, still = Stored(self.opened, expert), Stored(self.opened, base)
        delta = np.empty(len(still), np.float32)
        with np.errstate(over="ignore"):
            for part in blocks(len(still)):
                np.subtract(to_float32(moved[part]), to_float32(still[part]), out=delta[part])
        return delta.reshape(base.shape)


def computed_blocks(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    """The tensor's bytes in order. Raises SourceError for NaN or Inf in a source, or what does not fit the dtype."""
    if tensor.operation == "zeros":
        for part in blocks(tensor.nbytes):
            yield memoryview(bytes(part.stop - part.start))
        return
    if tensor.inner is not None and tensor.pad is not None:
        yield from padded_blocks(tensor.pad, tensor.dtype, tensor.inner.shape, _bytes_of(plan, tensor.inner, read))
        return
    for ref in dict.fromkeys(ref for piece in tensor.pieces for ref in piece.refs):
        # Before computing, which can hide them: ties drops a NaN from its sum.
        for chunk in read.opened.chunks(ref):
            check_finite(plan, ref, chunk)
    if tensor.operation == "merge":
        yield from _merged(plan, tensor, read)
    elif tensor.operation == "columns":
        yield from _side_by_side(plan, tensor, read)
    else:
        for piece in tensor.pieces:
            yield from _converted(plan, piece, tensor, read)


def _bytes_of(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    """The same, of plain copies, too."""
    if tensor.operation != "copy":
        yield from computed_blocks(plan, tensor, read)
        return
    for piece in tensor.pieces:
        yield from read.opened.chunks(piece.ref)


def check_finite(plan: Plan, ref: TensorRef, view: memoryview) -> None:
    """Raise SourceError that names model and tensor when a block of its bytes holds NaN or Inf."""
    if not is_finite(view, ref.dtype):
        source = next(source for source in plan.models if ref.file in source.files)
        raise SourceError(
            "the weights hold NaN or Inf",
            where=f"{source.label} ({source.spec}): {ref.name}",
            remedy="the model is damaged: save or download it again",
        )


def _values(plan: Plan, piece: Piece, read: PieceReader) -> FlatArray:
    try:
        return read.values(piece)
    except ValueError:  # what factorise makes of an infinite difference between finite weights
        source = plan.models[piece.source]
        raise SourceError(
            "the expert's difference to the base model overflows float32",
            where=f"{source.label} ({source.spec}): {piece.ref.name}",
            remedy="the model is damaged: save or download it again",
        ) from None


def _converted(plan: Plan, piece: Piece, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    values = _values(plan, piece, read)
    for part in blocks(len(values), _PLAIN if piece.change is None else 1):
        block = to_float32(values[part])
        if tensor.factor != 1.0:
            block *= np.float32(tensor.factor)
        converted = to_bytes(block, tensor.dtype)
        if not is_finite(converted, tensor.dtype):
            _refuse_overflow(plan, piece, tensor)
        yield converted


def _side_by_side(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    """Pieces (O, R_e) as the columns of one (O, R) tensor."""
    rows = tensor.shape[0]
    parts = [_values(plan, piece, read) for piece in tensor.pieces]
    ranks = [len(part) // rows for part in parts]
    group = max(1, BLOCK // tensor.shape[1])
    for start in range(0, rows, group):
        stop = min(start + group, rows)
        taken = [
            to_float32(part[start * rank : stop * rank]).reshape(stop - start, rank)
            for part, rank in zip(parts, ranks, strict=True)
        ]
        converted = to_bytes(np.concatenate(taken, axis=1).ravel(), tensor.dtype)
        if not is_finite(converted, tensor.dtype):
            finite = (is_finite(to_bytes(part.ravel(), tensor.dtype), tensor.dtype) for part in taken)
            _refuse_overflow(plan, next(piece for piece, fits in zip(tensor.pieces, finite, strict=True) if not fits), tensor)
        yield converted


def _refuse_overflow(plan: Plan, piece: Piece, tensor: PlannedTensor) -> NoReturn:
    source = plan.models[piece.source]
    raise SourceError(
        f"the weights do not fit {DTYPES[tensor.dtype]}",
        where=f"{source.label} ({source.spec}): {piece.ref.name}",
        remedy="choose output: {dtype: bfloat16} or float32",
    )


def _merged(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    settings = plan.recipe.mixture.merge
    assert settings is not None
    base, *experts = (read.values(piece) for piece in tensor.pieces)
    for block in merge_blocks(settings, base, experts):
        merged = to_bytes(block.astype(np.float32) * np.float32(tensor.factor), tensor.dtype)
        if not is_finite(merged, tensor.dtype):
            raise SourceError(
                f"the merged backbone overflows {DTYPES[tensor.dtype]}",
                where=f"mixture.backbone: {tensor.name}",
                remedy="choose output: {dtype: bfloat16} or float32, or a smaller scale",
            )
        yield merged
