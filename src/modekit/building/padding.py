"""A tensor of the base in a larger one, in blocks: its rows with what stands behind them (planning/pad.py).

Shape legend: O, I rows and columns of a matrix of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.evidence import row_sizes
from modekit.planning.pad import Measured, Pad
from modekit.sources.model import ITEMSIZE
from modekit.weights.numeric import DTYPES, as_array, blocks, to_bytes, to_float32

_ROWS = 2**21
"""Bytes of a block: what is widened stays in the processor's cache until it is written."""


def padded_blocks(pad: Pad, dtype: str, shape: tuple[int, ...], given: Iterable[memoryview]) -> Iterator[memoryview]:
    """The bytes of the larger tensor, from those of the base's tensor of this shape and dtype in blocks of any size.

    Each block lies in the same memory as the one before it.
    """
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
    wide, itemsize = columns + pad.columns, ITEMSIZE[dtype]
    entries = _by_row(pad, wide, rows)
    whole_rows = _whole_rows(given, columns * itemsize)
    row, count = 0, rows * math.prod(shape[:-2])
    buffer = np.zeros((max(1, _ROWS // (wide * itemsize)), wide * itemsize), np.uint8)
    while row < count:
        block = next(whole_rows)
        for start in range(0, len(block), len(buffer)):
            # A block ends where a matrix does: what stands below it comes first.
            for part in _cut_at_matrices(block[start : start + len(buffer)], row, rows):
                out = buffer[: len(part)]
                out[:, : part.shape[1]] = part
                _write_column(pad.measured, out, part, dtype, itemsize)
                _write_entries(entries, out, row, dtype, itemsize)
                yield out.data.cast("B")
                _clear_entries(entries, out, row, itemsize)
                row += len(part)
                if row % rows == 0 and pad.rows:
                    yield from _below(entries, row == rows, rows, pad.rows, wide, dtype)


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
    measured: Measured | None, out: npt.NDArray[np.uint8], part: npt.NDArray[np.uint8], dtype: str, itemsize: int
) -> None:
    if measured is None:
        return
    values = to_float32(as_array(np.ascontiguousarray(part).data.cast("B"), dtype)).reshape(len(part), -1)
    column = to_bytes((row_sizes(measured, values) * measured.value).astype(np.float32), dtype)
    start = measured.column * itemsize
    out[:, start : start + itemsize] = np.frombuffer(column, np.uint8).reshape(len(part), itemsize)


def _below(entries: _Entries, is_first: bool, rows: int, more: int, wide: int, dtype: str) -> Iterator[memoryview]:
    """The rows under a matrix: zeros, and in the first one the entries there."""
    itemsize = ITEMSIZE[dtype]
    for part in blocks(more, max(1, wide)):
        block = np.zeros((part.stop - part.start, wide * itemsize), np.uint8)
        if is_first:
            _write_entries(entries, block, rows + part.start, dtype, itemsize)
        yield block.data.cast("B")


def _number(value: float, dtype: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.asarray([value], np.float32).astype(DTYPES[dtype]).tobytes(), np.uint8)
