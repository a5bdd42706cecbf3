"""Flat arrays that are read or computed where they are asked for, so that memory is what is asked for at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from modekit.sources.contents import CHUNK, OpenFiles
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.rows import RowRange, RowsRef
from modekit.weights.numeric import DTYPES, Array, Singles, as_array, is_finite, to_float32


class Rows:
    """A flat array of rows (count, width) that are computed where they are read: `rows(first, last)` gives some of them.

    With a `group`, rows are always computed so many at a time, so that none depends on how it is read; the last ones stay.
    """

    def __init__(self, count: int, width: int, rows: Callable[[int, int], Array], group: int = 0) -> None:
        self._count = count
        self.width = width
        self._rows = rows
        self._group = group
        self._last: tuple[int, Array] = (-1, np.empty(0, np.float32))

    def __len__(self) -> int:
        return self._count * self.width

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(len(self))
        if stop <= start:
            return self._rows(0, 0).reshape(-1)
        if self._group:
            return self._of_groups(start, stop)
        first, last = start // self.width, -(-stop // self.width)
        return self._rows(first, last).reshape(-1)[start - first * self.width : stop - first * self.width]

    def _of_groups(self, start: int, stop: int) -> Singles:
        size = self._group * self.width
        found = np.empty(stop - start, np.float32)
        for place in range(start // size, -(-stop // size)):
            if self._last[0] != place:
                rows = self._rows(place * self._group, min(self._count, (place + 1) * self._group))
                self._last = (place, rows.reshape(-1))
            offset = place * size
            values = self._last[1][max(0, start - offset) : stop - offset]
            at = max(0, offset - start)
            found[at : at + len(values)] = values
        return found


_PIECES, _NUMBERS = 64, 2**13  # that are looked at to see whether two differ: all of one that is no larger
FlatArray: TypeAlias = Rows | Array
"""Of numbers: all of them, or computed where they are asked for."""


def stored(opened: OpenFiles, ref: TensorRef) -> FlatArray:
    """A tensor on disk as a flat array of its own dtype. Reading raises SourceError."""
    if isinstance(ref, RowsRef):
        width = ref.numel // max(1, ref.shape[0])
        return below([_of_range(opened, part, width) for part in ref.ranges], DTYPES[ref.dtype])
    size = ITEMSIZE[ref.dtype]
    return Rows(ref.numel, 1, lambda first, last: as_array(opened.read(ref, first * size, last * size), ref.dtype))


def _of_range(opened: OpenFiles, part: RowRange, width: int) -> FlatArray:
    """Of one tensor its elements, of several their mean, summed in float64; of none zeros."""
    found = [stored(opened, each) for each in part.refs]

    def mean(first: int, last: int) -> Array:
        total = np.zeros(last - first, np.float64)
        for each in found:
            total += each[first:last].astype(np.float64)
        return (total / max(1, len(found))).astype(np.float32)

    return found[0] if len(found) == 1 else Rows(part.count * width, 1, mean)


def below(parts: Sequence[FlatArray], dtype: np.dtype[np.generic] = DTYPES["F32"]) -> Rows:
    """Flat arrays one after the other, in a dtype."""

    def rows(first: int, last: int) -> Array:
        found = np.empty(last - first, dtype)
        position = 0
        for each in parts:
            start, stop = max(first, position), min(last, position + len(each))
            if start < stop:
                found[start - first : stop - first] = each[start - position : stop - position]
            position += len(each)
        return found

    return Rows(sum(map(len, parts)), 1, rows)


def read_float32(opened: OpenFiles, ref: TensorRef) -> Singles:
    """A whole tensor, in its shape. Raises SourceError when it cannot be read."""
    return to_float32(as_array(opened.read(ref), ref.dtype)).reshape(ref.shape)


def holds_only_finite(opened: OpenFiles, ref: TensorRef) -> bool:
    """Whether a tensor on disk has neither NaN nor Inf. Raises SourceError when it cannot be read."""
    return all(is_finite(chunk, ref.dtype) for chunk in _chunks(opened, ref))


def same_bytes(opened: OpenFiles, first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors on disk, of whatever dtype and shape, are the same bytes. Raises SourceError as above."""
    if first.nbytes != second.nbytes:
        return False
    pairs = zip(_chunks(opened, first), _chunks(opened, second), strict=True)
    return all(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)) for one, other in pairs)


def pieces_differ(opened: OpenFiles, one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors of one dtype and shape differ, by a sample of each. Raises SourceError as above."""
    first, second = (stored(opened, each) for each in (one, other))
    step = max(_NUMBERS, -(-len(first) // _PIECES))
    parts = (slice(start, min(len(first), start + _NUMBERS)) for start in range(0, len(first), step))
    return any(first[part].tobytes() != second[part].tobytes() for part in parts)


def _chunks(opened: OpenFiles, ref: TensorRef) -> Iterator[memoryview]:
    """A tensor's bytes in order, wherever its rows come from."""
    if not isinstance(ref, RowsRef):
        yield from opened.chunks(ref)
        return
    values = stored(opened, ref)
    step = CHUNK // ITEMSIZE[ref.dtype]
    for start in range(0, len(values), step):
        yield values[start : start + step].view(np.uint8).data
