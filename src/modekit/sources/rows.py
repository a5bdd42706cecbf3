"""Tensors whose rows lie in several places: embedding and head of a model that has more tokens in a mixture than on disk,
and what a class keeps in one tensor and files in many (class_names.py); and models with rows for the tokens of all
(vocabulary.py).

Shape legend: V tokens, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from modekit.errors import MismatchError, UnsupportedError
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.family import Family
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.lora_settings import MERGE_FIRST
from modekit.sources.names import weight_of
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import Tokens


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
        ranges = list[RowRange]()
        position = 0
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
    return _of_ranges(own.name, (own,), own.shape[1:], ranges)


def concatenated(name: str, refs: Sequence[TensorRef]) -> RowsRef:
    """Tensors (O, ...) one below the other: their rows in order."""
    return _of_ranges(name, refs, refs[0].shape[1:], [RowRange(ref.shape[0], (ref,)) for ref in refs])


def stacked(name: str, refs: Sequence[TensorRef]) -> RowsRef:
    """Tensors of one shape as one with a further axis in front."""
    return _of_ranges(name, refs, refs[0].shape, [RowRange(1, (ref,)) for ref in refs])


def _of_ranges(name: str, own: Sequence[TensorRef], row: tuple[int, ...], ranges: Sequence[RowRange]) -> RowsRef:
    """`row`: the shape of one."""
    first = own[0]
    shape = (sum(part.count for part in ranges), *row)
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


@dataclass(frozen=True)
class TokenRows:
    """One model and its rows. `tokens`: of its tokenizer; None without one, when it has all its rows."""

    source: ModelSource
    base: ModelSource
    family: Family
    tokens: Tokens | None

    @cached_property
    def ids(self) -> frozenset[int]:
        """Of its tokenizer."""
        return frozenset((self.tokens or {}).values())

    @cached_property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Embedding, head and the head's bias, as far as the model has its own."""
        source = self.source
        own = source.replaced if isinstance(source, AdapterSource) else source.tensors
        names = (weight_of(self.family.embedding), weight_of(self.family.head), f"{self.family.head}.bias")
        return {name: own[name] for name in names if name in own}

    def tensor(self, name: str) -> TensorRef | None:
        """One of them; a tied head is the embedding. None where the model has the base's."""
        if name == weight_of(self.family.head) and name not in self.tensors and self.family.is_tied(self.base):
            return self.tensors.get(weight_of(self.family.embedding))
        return self.tensors.get(name)

    @property
    def rows(self) -> int:
        """V of the model; 0 of an adapter that has the base's."""
        return max((ref.shape[0] for ref in self.tensors.values()), default=0)

    def check_rows(self) -> None:
        """Raise MismatchError unless embedding and head have as many rows as each other."""
        base = self.base.tensor(weight_of(self.family.embedding)).shape[0]
        untied = self.family.head and not self.family.is_tied(self.base)
        names = [weight_of(self.family.embedding), *([weight_of(self.family.head)] if untied else [])]
        found = {name: self.tensors[name].shape[0] if name in self.tensors else base for name in names}
        if len(set(found.values())) > 1:
            both = "save both in the adapter (modules_to_save: [embed_tokens, lm_head])"
            raise MismatchError(
                "the model's embedding and head have different numbers of tokens",
                where=self.source.where,
                found=", ".join(f"{name} {rows}" for name, rows in found.items()),
                expected="as many rows in both",
                remedy=both if isinstance(self.source, AdapterSource) else "save the model again",
            )

    def has(self, ref: TensorRef) -> set[int]:
        """Ids of the tokens for which the model has a row of its own in a tensor."""
        rows = ref.shape[0]
        return set(range(rows)) if self.tokens is None else {number for number in self.ids if number < rows}


class Grown:
    """Models with rows for all tokens."""

    def __init__(self, models: Sequence[TokenRows], rows: int) -> None:
        self._models = models
        self._rows = rows
        self._base = models[0]

    def model(self, model: TokenRows) -> ModelSource:
        """The model with `rows` rows."""
        made = {name: self._tensor(model, name, ref) for name, ref in model.tensors.items()}
        source = model.source
        if not isinstance(source, AdapterSource):
            return replace(source, tensors={name: made.get(name, ref) for name, ref in source.tensors.items()})
        replaced = {name: made.get(name, ref) for name, ref in source.replaced.items()}
        changes = {name: self._change(model, name, change) for name, change in source.changes.items()}
        return replace(source, replaced=replaced, changes=changes)

    def _tensor(self, model: TokenRows, name: str, own: TensorRef) -> TensorRef:
        """A model's tensor with a row for every token; itself where it has them."""
        owners = [(each, ref, each.has(ref)) for each in self._models if (ref := each.tensor(name)) is not None]
        lacking = set().union(*(ids for _, _, ids in owners)) - model.has(own)
        if not lacking and own.shape[0] == self._rows:
            return own
        for each, _, ids in owners:
            if ids & lacking and isinstance(each.source, AdapterSource) and name in each.source.changes:
                raise UnsupportedError(  # the row that it gives is not in its file as the model has it
                    "the adapter adds tokens and has a low-rank change on their embedding or head as well",
                    where=f"{each.source.where}: {name}",
                    remedy=MERGE_FIRST,
                )

        def giver(row: int) -> Giver:
            given = [(each, ref) for each, ref, ids in owners if row in ids]
            if given and given[0][0] is self._base:
                given = given[:1]
            return tuple((ref, row) for _, ref in given) or next(((ref, row),) for _, ref, _ in owners if row < ref.shape[0])

        elsewhere = lacking.union(range(own.shape[0], self._rows))
        return with_rows(own, {row: giver(row) for row in elsewhere}, self._rows)

    def _change(self, model: TokenRows, name: str, change: LowRank) -> LowRank:
        """An adapter's change of embedding or head, which is zero for tokens that the adapter does not know."""
        count = (model.tensor(name) or self._base.tensors.get(name, change.refs[0])).shape[0]
        if name not in (weight_of(model.family.embedding), weight_of(model.family.head)) or count == self._rows:
            return change
        if change.magnitude is not None:
            raise UnsupportedError(
                "an adapter with DoRA on embedding or head cannot be given more tokens",
                where=f"{model.source.where}: {name}",
                found=f"{count} tokens",
                expected=f"{self._rows}, as the mixture has",
                remedy=MERGE_FIRST,
            )
        if change.transposed:
            return change  # folded row by row: the rows that it lacks stay (weights/folding.py)
        return replace(change, b=joined_rows(change.b, [RowRange(count, (change.b,)), RowRange(self._rows - count)]))
