"""The bytes of every planned tensor that is not a plain copy: cast, scaled, folded, factored, merged or zero, in blocks.

`build` writes them and `verify` computes them again, so that both say the same. What stands in a larger tensor says `Pad`
(planning/pieces.py).

Shape legend: O, I rows and columns of a matrix of the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.evidence import row_sizes
from modekit.errors import SourceError
from modekit.planning.pieces import CarriedPart, Factor, MeasuredColumn, Pad, Piece, PlannedTensor, some_rows
from modekit.planning.plan import Plan
from modekit.sources.contents import OpenFiles
from modekit.sources.header import ITEMSIZE
from modekit.sources.model import TensorRef
from modekit.weights.factorise import Factors, factorise
from modekit.weights.few_bits import codes_of, steps_of
from modekit.weights.folding import Folded, folded_bias, reader
from modekit.weights.merge import merge_blocks
from modekit.weights.numeric import BLOCK, DTYPES, as_array, blocks, is_finite, to_bytes, to_float32
from modekit.weights.stored import FlatArray, Stored

_Singles = npt.NDArray[np.float32]

_PLAIN = 8  # arrays of a plain block: read, in float32, scaled, rounded; small, so that they stay in the processor's cache
_WIDENED = 2**21  # bytes of a block of what is widened, likewise


@dataclass(frozen=True)
class Fill:
    """New numbers beside and below a matrix (O, I).

    Attributes:
        beside: rows -> their numbers in the new columns, (rows, P).
        below: the new rows, as wide as the result.
        column_scales: what the columns of the matrix are multiplied with, (I,).
    """

    beside: Callable[[slice], _Singles] | None = None
    below: _Singles | None = None
    column_scales: _Singles | None = None


Fills = Callable[[CarriedPart, int], Fill]
"""What is carried, and the number of a matrix -> its new part (carrying.py)."""


class PieceReader:
    """Reads pieces as flat arrays of numbers, computing what adapters and low-rank parts make of a tensor.

    `fills` is set where tensors carry more than FFNs.
    """

    fills: Fills | None = None

    def __init__(self, opened: OpenFiles) -> None:
        self.opened = opened
        self._read = reader(opened)
        # Of one weight of the base and every expert: what is computed for A serves for B, which comes next.
        self._factored: tuple[TensorRef | None, dict[tuple[TensorRef, int], Factors]] = (None, {})

    def values(self, piece: Piece) -> FlatArray:
        """The piece's elements in order: its own dtype when it is plain, else float32."""
        if piece.factor is not None and piece.factor.side == "whole":
            return self.difference(piece.ref, piece.factor).ravel()
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
            known[key] = factorise(self.difference(base, factor), rank=factor.rank)
        return known[key]

    def difference(self, base: TensorRef, factor: Factor, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """The whole of an expert's difference to the base, or some rows of it, (O, I)."""
        if rows is not None:
            base, expert = (some_rows(each, (rows.start, rows.stop)) for each in (base, factor.expert))
        else:
            expert = factor.expert
        moved, still = Stored(self.opened, expert), Stored(self.opened, base)
        delta = np.empty(len(still), np.float32)
        with np.errstate(over="ignore"):
            for part in blocks(len(still)):
                np.subtract(to_float32(moved[part]), to_float32(still[part]), out=delta[part])
        return delta.reshape(base.shape)


def computed_blocks(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    """The tensor's bytes in order. Raises SourceError for NaN or Inf in a source, or what does not fit the dtype."""
    if tensor.operation == "zeros":
        for part in blocks(tensor.numel):
            yield to_bytes(np.full(part.stop - part.start, tensor.filled, np.float32), tensor.dtype)
        return
    if tensor.inner is not None and tensor.pad is not None:
        given = stored_blocks(plan, tensor.inner, read)
        if tensor.pad.carried is None or read.fills is None:
            yield from padded_blocks(tensor.pad, tensor.dtype, tensor.inner.shape, given)
        else:
            fills = partial(read.fills, tensor.pad.carried)
            yield from _checked(plan, tensor, padded_blocks(tensor.pad, tensor.dtype, tensor.inner.shape, given, fills))
        return
    for ref in dict.fromkeys(ref for piece in tensor.pieces for ref in piece.refs):
        # Before computing, which can hide them: ties drops a NaN from its sum.
        for chunk in read.opened.chunks(ref):
            check_finite(plan, ref, chunk)
    if tensor.operation == "bits":
        yield from _in_few_bits(tensor, read)
    elif tensor.operation == "merge":
        yield from _merged(plan, tensor, read)
    elif tensor.operation == "columns":
        yield from _side_by_side(plan, tensor, read)
    else:
        for piece in tensor.pieces:
            yield from _converted(plan, piece, tensor, read)


def stored_blocks(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    """The same, of plain copies, too."""
    if tensor.operation != "copy":
        yield from computed_blocks(plan, tensor, read)
        return
    for piece in tensor.pieces:
        for ref in piece.refs:
            yield from read.opened.chunks(ref)


def check_finite(plan: Plan, ref: TensorRef, view: memoryview) -> None:
    """Raise SourceError that names model and tensor when a block of its bytes holds NaN or Inf."""
    if not is_finite(view, ref.dtype):
        source = next(source for source in plan.models if ref.file in source.files)
        raise SourceError(
            "the weights hold NaN or Inf",
            where=f"{source.where}: {ref.name}",
            remedy="the model is damaged: save or download it again",
        )


def _values(plan: Plan, piece: Piece, read: PieceReader) -> FlatArray:
    try:
        return read.values(piece)
    except ValueError:  # what factorise makes of an infinite difference between finite weights
        source = plan.models[piece.source]
        raise SourceError(
            "the expert's difference to the base model overflows float32",
            where=f"{source.where}: {piece.ref.name}",
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


def _in_few_bits(tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    """Codes, or steps, of a difference, some rows at a time."""
    (piece,) = tensor.pieces
    factor, (rows, columns) = piece.factor, piece.ref.shape
    assert factor is not None
    for part in blocks(rows, columns):
        delta_XI = read.difference(piece.ref, factor, part)
        steps_X = steps_of(delta_XI, factor.rank)
        made = steps_X if factor.side == "steps" else codes_of(delta_XI, steps_X, factor.rank)
        yield np.ascontiguousarray(made).view(np.uint8).data.cast("B")


def _refuse_overflow(plan: Plan, piece: Piece, tensor: PlannedTensor) -> NoReturn:
    source = plan.models[piece.source]
    raise SourceError(
        f"the weights do not fit {DTYPES[tensor.dtype]}",
        where=f"{source.where}: {piece.ref.name}",
        remedy="choose output: {dtype: bfloat16} or float32",
    )


def _merged(plan: Plan, tensor: PlannedTensor, read: PieceReader) -> Iterator[memoryview]:
    settings = plan.recipe.mixture.merge
    assert settings is not None
    base, *experts = (read.values(piece) for piece in tensor.pieces)
    for block in merge_blocks(settings, base, experts, tensor.shape):
        merged = to_bytes(block.astype(np.float32) * np.float32(tensor.factor), tensor.dtype)
        if not is_finite(merged, tensor.dtype):
            raise SourceError(
                f"the merged backbone overflows {DTYPES[tensor.dtype]}",
                where=f"mixture.backbone: {tensor.name}",
                remedy="choose output: {dtype: bfloat16} or float32, or a smaller scale",
            )
        yield merged


def _checked(plan: Plan, tensor: PlannedTensor, given: Iterable[memoryview]) -> Iterator[memoryview]:
    """Raise SourceError where what is carried does not fit the dtype."""
    for block in given:
        if not is_finite(block, tensor.dtype):
            raise SourceError(
                f"what the experts differ by does not fit {DTYPES[tensor.dtype]}",
                where=tensor.name,
                remedy="choose output: {dtype: bfloat16} or float32, or output: {carry: ffn}",
            )
        yield block


def padded_blocks(
    pad: Pad,
    dtype: str,
    shape: tuple[int, ...],
    given: Iterable[memoryview],
    fills: Callable[[int], Fill] = lambda matrix: Fill(),
) -> Iterator[memoryview]:
    """The bytes of the larger tensor, from those of the base's tensor of this shape and dtype in blocks of any size.

    `fills` gives the new part of every matrix. Each block lies in the same memory as the one before it.
    """
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
    wide, itemsize = columns + pad.columns, ITEMSIZE[dtype]
    entries = _by_row(pad, wide, rows)
    whole_rows = _whole_rows(given, columns * itemsize)
    row, count = 0, rows * math.prod(shape[:-2])
    buffer = np.zeros((max(1, _WIDENED // (wide * itemsize)), wide * itemsize), np.uint8)
    fill = fills(0)
    while row < count:
        block = next(whole_rows)
        for start in range(0, len(block), len(buffer)):
            # A block ends where a matrix does: what stands below it comes first.
            for part in _cut_at_matrices(block[start : start + len(buffer)], row, rows):
                out = buffer[: len(part)]
                out[:, : part.shape[1]] = part if fill.column_scales is None else _scaled(part, fill.column_scales, dtype)
                if fill.beside is not None:
                    out[:, part.shape[1] :] = _rows_of_bytes(fill.beside(slice(row % rows, row % rows + len(part))), dtype)
                _write_column(pad.measured, out, part, dtype, itemsize)
                _write_entries(entries, out, row, dtype, itemsize)
                yield out.data.cast("B")
                _clear_entries(entries, out, row, itemsize)
                row += len(part)
                if row % rows == 0:
                    below = None if fill.below is None else _rows_of_bytes(fill.below, dtype)
                    yield from _below(entries if row == rows else {}, rows, (pad.rows, wide), below, dtype)
                    fill = fills(row // rows) if row < count else fill


def free_part(pad: Pad, dtype: str, wide: int, block: memoryview) -> npt.NDArray[np.uint8]:
    """A block of whole rows of a widened tensor as bytes (rows, ...), the columns that a router's fit sets being zero."""
    assert pad.free is not None
    itemsize = ITEMSIZE[dtype]
    rows = np.frombuffer(block, np.uint8).reshape(-1, wide * itemsize).copy()
    rows[:, pad.free.start * itemsize : pad.free.stop * itemsize] = 0
    return np.asarray(rows)


def _whole_rows(given: Iterable[memoryview], row: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Blocks of whole rows (n, bytes of a row)."""
    rest = b""
    for block in given:
        view = block.cast("B") if block.format != "B" else block
        if rest:
            missing = row - len(rest)
            if len(view) < missing:
                rest += bytes(view)
                continue
            yield np.frombuffer(rest + bytes(view[:missing]), np.uint8).reshape(1, row)
            view, rest = view[missing:], b""
        whole = len(view) // row * row
        if whole:
            yield np.frombuffer(view[:whole], np.uint8).reshape(-1, row)
        rest = bytes(view[whole:])


def _cut_at_matrices(block: npt.NDArray[np.uint8], row: int, rows: int) -> Iterator[npt.NDArray[np.uint8]]:
    while len(block):
        here = min(len(block), rows - row % rows)
        yield block[:here]
        block, row = block[here:], row + here


_Entries = dict[int, list[tuple[int, float]]]


def _by_row(pad: Pad, wide: int, rows: int) -> _Entries:
    found: _Entries = {}
    for row, column, value in pad.entries:
        found.setdefault(row, []).append((column, value))
    return found


def _write_entries(entries: _Entries, out: npt.NDArray[np.uint8], first: int, dtype: str, itemsize: int) -> None:
    """Into the rows of the first matrix, of which `first` is the first here."""
    for row, numbers in entries.items():
        if first <= row < first + len(out):
            for column, value in numbers:
                out[row - first, column * itemsize : (column + 1) * itemsize] = _number(value, dtype)


def _clear_entries(entries: _Entries, out: npt.NDArray[np.uint8], first: int, itemsize: int) -> None:
    for row, numbers in entries.items():
        if first <= row < first + len(out):
            for column, _ in numbers:
                out[row - first, column * itemsize : (column + 1) * itemsize] = 0


def _write_column(
    measured: MeasuredColumn | None, out: npt.NDArray[np.uint8], part: npt.NDArray[np.uint8], dtype: str, itemsize: int
) -> None:
    if measured is None:
        return
    values = to_float32(as_array(np.ascontiguousarray(part).data.cast("B"), dtype)).reshape(len(part), -1)
    column = to_bytes((row_sizes(measured, values) * measured.value).astype(np.float32), dtype)
    start = measured.column * itemsize
    out[:, start : start + itemsize] = np.frombuffer(column, np.uint8).reshape(len(part), itemsize)


def _below(
    entries: _Entries, rows: int, more: tuple[int, int], filled: npt.NDArray[np.uint8] | None, dtype: str
) -> Iterator[memoryview]:
    """The rows (count, columns) under a matrix: zeros or what they are filled with, and entries there."""
    (count, wide), itemsize = more, ITEMSIZE[dtype]
    for part in blocks(count, max(1, wide)):
        block = np.zeros((part.stop - part.start, wide * itemsize), np.uint8)
        if filled is not None:
            block[:, : filled.shape[1]] = filled[part]
        _write_entries(entries, block, rows + part.start, dtype, itemsize)
        yield block.data.cast("B")


def _scaled(part: npt.NDArray[np.uint8], scales_I: _Singles, dtype: str) -> npt.NDArray[np.uint8]:
    """Rows with their columns scaled."""
    values = to_float32(as_array(np.ascontiguousarray(part).data.cast("B"), dtype)).reshape(len(part), -1)
    return _rows_of_bytes(values * scales_I, dtype)


def _rows_of_bytes(rows_OX: _Singles, dtype: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(to_bytes(rows_OX, dtype), np.uint8).reshape(len(rows_OX), -1)


def _number(value: float, dtype: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.asarray([value], np.float32).astype(DTYPES[dtype]).tobytes(), np.uint8)
