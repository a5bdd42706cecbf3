"""Flat arrays of numbers that are read, or computed, where they are asked for: memory is what is asked for at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from modekit.sources.contents import CHUNK, OpenFiles
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.rows import RowRange, RowsRef
from modekit.weights.numeric import DTYPES, as_array, is_finite, to_float32

Array = npt.NDArray[np.generic]


class FlatArray(Protocol):
    """A flat array, or something that is read like one, in slices with a step of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.generic]: ...


class Stored:
    """A tensor on disk as a flat array of its own dtype: `len(stored)`, `stored[start:stop]`. Reading raises SourceError."""

    def __init__(self, opened: OpenFiles, ref: TensorRef) -> None:
        self._opened, self._ref = opened, ref
        self._itemsize = ITEMSIZE[ref.dtype]

    def __len__(self) -> int:
        return self._ref.numel

    def __getitem__(self, part: slice) -> npt.NDArray[np.generic]:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a stored tensor is read in order, not by steps of {step}")
        if isinstance(self._ref, RowsRef):
            return self._of_ranges(self._ref, start, max(start, stop))
        read = self._opened.read(self._ref, start * self._itemsize, max(start, stop) * self._itemsize)
        return as_array(read, self._ref.dtype)

    def _of_ranges(self, ref: RowsRef, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Elements of a tensor whose rows come from several, in its dtype."""
        values, position = np.empty(stop - start, DTYPES[ref.dtype]), 0
        row = ref.numel // max(1, ref.shape[0])
        for part in ref.ranges:
            first, last = max(start, position), min(stop, position + part.count * row)
            if first < last:
                values[first - start : last - start] = self._of_range(part, slice(first - position, last - position))
            position += part.count * row
        return values

    def _of_range(self, part: RowRange, elements: slice) -> npt.NDArray[np.generic]:
        """Of one tensor its elements, of several their mean, summed in float64; of none zeros."""
        found = [Stored(self._opened, each)[elements] for each in part.refs]
        if len(found) == 1:
            return found[0]
        total = np.zeros(elements.stop - elements.start, np.float64)
        for each in found:
            total += each.astype(np.float64)
        return (total / max(1, len(found))).astype(np.float32)


class ByRows:
    """A flat array of rows (count, width) that are computed where they are read: `rows(first, last)` gives some of them."""

    def __init__(self, count: int, width: int, rows: Callable[[int, int], Array]) -> None:
        self._count, self.width, self._rows = count, width, rows

    def __len__(self) -> int:
        return self._count * self.width

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(len(self))
        if stop <= start:
            return self._rows(0, 0).reshape(-1)
        first, last = start // self.width, -(-stop // self.width)
        return self._rows(first, last).reshape(-1)[start - first * self.width : stop - first * self.width]


class Below:
    """Flat arrays one after the other, in float32."""

    def __init__(self, parts: Sequence[FlatArray]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(len(self))
        found, position = [np.empty(0, np.float32)], 0
        for each in self._parts:
            first, last = max(start, position), min(stop, position + len(each))
            if first < last:
                found.append(to_float32(each[first - position : last - position]))
            position += len(each)
        return found[1] if len(found) == 2 else np.concatenate(found)


def read_float32(opened: OpenFiles, ref: TensorRef) -> npt.NDArray[np.float32]:
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


def _chunks(opened: OpenFiles, ref: TensorRef) -> Iterator[memoryview]:
    """A tensor's bytes in order, wherever its rows come from."""
    if not isinstance(ref, RowsRef):
        yield from opened.chunks(ref)
        return
    stored, step = Stored(opened, ref), CHUNK // ITEMSIZE[ref.dtype]
    for start in range(0, len(stored), step):
        yield stored[start : start + step].view(np.uint8).data
