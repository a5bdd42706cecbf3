"""Tensors whose rows lie in several places: embedding and head of a model that has more tokens in a mixture than on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from modekit.sources.model import ITEMSIZE, TensorRef


@dataclass(frozen=True)
class RowRange:
    """`count` rows: those of one tensor, the mean of several of the same shape, or zeros where there is none."""

    count: int
    refs: tuple[TensorRef, ...] = ()


@dataclass(frozen=True)
class RowsRef(TensorRef):
    """A tensor (V, ...) that is made of ranges of rows, in order; `file` and `state` are those of the model's own tensor."""

    ranges: tuple[RowRange, ...] = ()


def rows_of(ref: TensorRef, first: int, last: int) -> TensorRef:
    """Rows [first, last) of a tensor."""
    if isinstance(ref, RowsRef):
        return joined_rows(ref, list(_ranges_within(ref, first, last)))
    row = ITEMSIZE[ref.dtype]
    for size in ref.shape[1:]:
        row *= size
    return replace(ref, shape=(last - first, *ref.shape[1:]), start=ref.start + first * row, end=ref.start + last * row)


def _ranges_within(ref: RowsRef, first: int, last: int) -> Iterator[RowRange]:
    position = 0
    for part in ref.ranges:
        start, stop = max(first - position, 0), min(last - position, part.count)
        if start < stop:
            yield RowRange(stop - start, tuple(rows_of(each, start, stop) for each in part.refs))
        position += part.count


Giver = tuple[tuple[TensorRef, int], ...]
"""Tensors and the row of each that together give one row."""


def with_rows(own: TensorRef, others: Mapping[int, Giver]) -> RowsRef:
    """A tensor with other rows in some places; those behind its own follow each other. `others` has their order."""
    ranges: list[RowRange] = []
    position = 0

    def keep(stop: int) -> None:
        if position < min(stop, own.shape[0]):
            count = min(stop, own.shape[0]) - position
            ranges.append(RowRange(count, (rows_of(own, position, position + count),)))

    # Rows that follow each other in the same tensors are one range.
    for _, run in groupby(others.items(), key=lambda item: [(id(ref), row - item[0]) for ref, row in item[1]]):
        places = [*run]
        first, giver = places[0]
        keep(first)
        ranges.append(RowRange(len(places), tuple(rows_of(ref, row, row + len(places)) for ref, row in giver)))
        position = first + len(places)
    keep(own.shape[0])
    return joined_rows(own, ranges)


def joined_rows(own: TensorRef, ranges: Sequence[RowRange]) -> RowsRef:
    """Ranges of rows as one tensor under the name and in the dtype of `own`."""
    count, row = sum(part.count for part in ranges), ITEMSIZE[own.dtype]
    for size in own.shape[1:]:
        row *= size
    shape = (count, *own.shape[1:])
    return RowsRef(own.name, own.file, own.dtype, shape, 0, count * row, own.state, tuple(ranges))


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
