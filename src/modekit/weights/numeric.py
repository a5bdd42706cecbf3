"""Raw tensor bytes as numbers: casts between the three float formats (ml_dtypes supplies bfloat16), a fast exact test for NaN
and Inf, and flat arrays that are read or computed where they are asked for, so that memory is what is asked for at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from modekit.sources.contents import CHUNK, OpenFiles
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.rows import RowRange, RowsRef

Array = npt.NDArray[np.generic]
Singles = npt.NDArray[np.float32]
DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BLOCK = 2**21
"""Elements per block: 8 MiB in float32."""

# An IEEE float is NaN or Inf when all exponent bits are set. Seen as integers, those patterns are the largest of each
# sign, so two maxima (signed for positive values, unsigned for negative ones) decide it without a temporary array.
_BITS: dict[str, tuple[str, str, int, int]] = {
    "F32": ("int32", "uint32", 0x7F800000, 0xFF800000),
    "F16": ("int16", "uint16", 0x7C00, 0xFC00),
    "BF16": ("int16", "uint16", 0x7F80, 0xFF80),
}


def is_finite(view: memoryview, dtype: str) -> bool:
    """Whether every value of a block of F32, F16 or BF16 bytes is finite."""
    if len(view) == 0:
        return True
    signed, unsigned, positive, negative = _BITS[dtype]
    return int(np.frombuffer(view, signed).max()) < positive and int(np.frombuffer(view, unsigned).max()) < negative


def blocks(count: int, arrays: int = 1) -> Iterator[slice]:
    """Slices that cover `count` elements: of at most BLOCK, or of as many as make a block where `arrays` lie side by side."""
    step = max(1, BLOCK // arrays)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def as_array(view: memoryview, dtype: str) -> Array:
    """The bytes as a flat array of their own dtype, without a copy."""
    return np.frombuffer(view, np.uint8 if dtype == "U8" else DTYPES[dtype])


def to_float32(array: Array) -> Singles:
    """Values in float32 (exact from all three formats)."""
    return array.astype(np.float32)


def moved(origin: npt.NDArray[np.floating], shift: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum of both, where a shift of zero keeps even the sign of a zero."""
    return np.asarray(np.where(shift == 0, origin, origin + shift))


def to_bytes(array: Array, dtype: str) -> memoryview:
    """Values rounded (to nearest, ties to even) to the named dtype, as bytes."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(DTYPES[dtype], copy=False))
    view: memoryview = converted.view(np.uint8).data
    return view.cast("B")


class Rows:
    """A flat array of rows (count, width) that are computed where they are read: `rows(first, last)` gives some of them.

    With a `group`, rows are always computed so many at a time, so that none depends on how it is read; the last ones stay.
    """

    def __init__(self, count: int, width: int, rows: Callable[[int, int], Array], group: int = 0) -> None:
        self._count, self.width, self._rows, self._group = count, width, rows, group
        self._last: tuple[int, Array] = (-1, np.empty(0, np.float32))

    def __len__(self) -> int:
        return self._count * self.width

    def __getitem__(self, part: slice) -> Array:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"numbers that are computed are read in order, not by steps of {step}")
        if stop <= start:
            return self._rows(0, 0).reshape(-1)
        if self._group:
            return self._of_groups(start, stop)
        first, last = start // self.width, -(-stop // self.width)
        return self._rows(first, last).reshape(-1)[start - first * self.width : stop - first * self.width]

    def _of_groups(self, start: int, stop: int) -> Singles:
        size, found = self._group * self.width, np.empty(stop - start, np.float32)
        for place in range(start // size, -(-stop // size)):
            if self._last[0] != place:
                rows = self._rows(place * self._group, min(self._count, (place + 1) * self._group))
                self._last = (place, rows.reshape(-1))
            offset = place * size
            values, at = self._last[1][max(0, start - offset) : stop - offset], max(0, offset - start)
            found[at : at + len(values)] = values
        return found


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
        found, position = np.empty(last - first, dtype), 0
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


def _chunks(opened: OpenFiles, ref: TensorRef) -> Iterator[memoryview]:
    """A tensor's bytes in order, wherever its rows come from."""
    if not isinstance(ref, RowsRef):
        yield from opened.chunks(ref)
        return
    values, step = stored(opened, ref), CHUNK // ITEMSIZE[ref.dtype]
    for start in range(0, len(values), step):
        yield values[start : start + step].view(np.uint8).data
