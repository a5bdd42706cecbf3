"""Tensors whose rows lie in several places: embedding and head of a model that has more tokens in a mixture than on disk,
and what a class keeps in one tensor and files in many (class_names.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from modekit.sources.header import ITEMSIZE, TensorRef


@dataclass(frozen=True)
class RowRange:
    """`count` rows: those of one tensor, the mean of several of the same shape, or zeros where there is none. A tensor of a
    stack is one row of it, whatever its own shape.
    """

    count: int
    refs: tuple[TensorRef, ...] = ()


@dataclass(frozen=True)
class RowsRef(TensorRef):
    """A tensor (V, ...) that is made of ranges of rows, in order; `file` and `state` are those of the first of `own`, the
    tensors of the model itself.
    """

    ranges: tuple[RowRange, ...] = ()
    own: tuple[TensorRef, ...] = ()

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """Those of the model's own tensors."""
        return tuple(part for ref in self.own for part in ref.parts)

    @property
    def source_dtype(self) -> str:
        """That of the model's own."""
        return self.own[0].source_dtype


def rows_of(ref: TensorRef, first: int, last: int) -> TensorRef:
    """Rows [first, last) of a tensor."""
    if isinstance(ref, RowsRef):
        ranges, position = list[RowRange](), 0
        for part in ref.ranges:
            start, stop = max(first - position, 0), min(last - position, part.count)
            if start < stop:
                whole = stop - start == part.count
                refs = part.refs if whole else tuple(rows_of(each, start, stop) for each in part.refs)
                ranges.append(RowRange(stop - start, refs))
            position += part.count
        return joined_rows(ref, ranges)
    row = ITEMSIZE[ref.dtype] * math.prod(ref.shape[1:])
    return replace(ref, shape=(last - first, *ref.shape[1:]), start=ref.start + first * row, end=ref.start + last * row)


def member_of(ref: TensorRef, number: int) -> TensorRef:
    """One tensor of a stack: what has a further axis in front, in one place or in many."""
    one = rows_of(ref, number, number + 1)
    if isinstance(one, RowsRef) and len(one.ranges) == 1 and len(one.ranges[0].refs) == 1:
        one = one.ranges[0].refs[0]
        return one if one.shape == ref.shape[1:] else member_of(one, 0)
    return replace(one, shape=one.shape[1:])


Giver = tuple[tuple[TensorRef, int], ...]
"""Tensors and the row of each that together give one row."""


def with_rows(own: TensorRef, others: Mapping[int, Giver], rows: int) -> RowsRef:
    """A tensor with so many rows: its own, but for others in some places and behind them."""
    givers = [others.get(row) or ((own, row),) for row in range(rows)]
    ranges: list[RowRange] = []
    # Rows that follow each other in the same tensors are one range.
    for _, run in groupby(range(rows), key=lambda row: [(id(ref), number - row) for ref, number in givers[row]]):
        places = [*run]
        given = tuple(rows_of(ref, number, number + len(places)) for ref, number in givers[places[0]])
        ranges.append(RowRange(len(places), given))
    return joined_rows(own, ranges)


def joined_rows(own: TensorRef, ranges: Sequence[RowRange]) -> RowsRef:
    """Ranges of rows as one tensor under the name and in the dtype of `own`."""
    shape = (sum(part.count for part in ranges), *own.shape[1:])
    return _of_ranges(own.name, (own,), shape, ranges)


def concatenated(name: str, refs: Sequence[TensorRef]) -> RowsRef:
    """Tensors (O, ...) one below the other: their rows in order."""
    ranges = [RowRange(ref.shape[0], (ref,)) for ref in refs]
    return _of_ranges(name, refs, (sum(part.count for part in ranges), *refs[0].shape[1:]), ranges)


def stacked(name: str, refs: Sequence[TensorRef]) -> RowsRef:
    """Tensors of one shape as one with a further axis in front."""
    return _of_ranges(name, refs, (len(refs), *refs[0].shape), [RowRange(1, (ref,)) for ref in refs])


def _of_ranges(name: str, own: Sequence[TensorRef], shape: tuple[int, ...], ranges: Sequence[RowRange]) -> RowsRef:
    first = own[0]
    size = math.prod(shape) * ITEMSIZE[first.dtype]
    return RowsRef(name, first.file, first.dtype, shape, 0, size, first.state, tuple(ranges), tuple(own))


def stored_refs(ref: TensorRef) -> Iterator[TensorRef]:
    """The tensors on disk, or rows of them, that a tensor is made of."""
    if not isinstance(ref, RowsRef):
        yield ref
        return
    for part in ref.ranges:
        for each in part.refs:
            yield from stored_refs(each)


def is_joined(ref: TensorRef, dtype: str) -> bool:
    """Whether the bytes of its `stored_refs` one after the other are the tensor in this dtype."""
    if not isinstance(ref, RowsRef):
        return ref.dtype == dtype and ref.parts == (ref,)
    return all(len(part.refs) == 1 and is_joined(part.refs[0], dtype) for part in ref.ranges)
