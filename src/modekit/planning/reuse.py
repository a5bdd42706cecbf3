"""What a mixture that is there already has of a plan: those tensors are taken from it, not made again.

Two plans are compared, of the mixture as it is and as it is to be, over the same sources: a tensor of the second that the
first makes in the same way of the same experts is in the checkpoint. Where many experts lie in one tensor, that holds of each
one's part of it. So what comes out is what a build of the second plan gives, and nobody has to say which tensors depend on
what. What a training has moved stays moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from modekit.planning.pieces import Piece, PlannedTensor, Shard, joined
from modekit.planning.plan import Plan, Reused
from modekit.sources.header import ITEMSIZE
from modekit.sources.model import ModelSource, TensorRef

Origins = Sequence[int | None]
"""Per expert of the new mixture its number in the old one; None for one that is new."""
_NUMBER = re.compile(r"\.(experts|differences)\.\d+\.|\.expert_\d+$")
_JOINED = {"copy", "cast", "fold", "factor", "columns"}


def reusing(folder: Path, tensors: Mapping[str, TensorRef], before: Plan, after: Plan, origins: Origins) -> Plan:
    """The plan `after` that takes what `before` has made, which are the tensors of a checkpoint in `folder`."""
    model = ModelSource("the mixture", str(folder), folder, None, {}, tensors)
    finder = _Finder(model, before, after, origins)
    names: dict[str, str] = {}
    shards = []
    for shard in after.shards:
        found = [finder.taken(tensor) for tensor in shard.tensors]
        names |= {tensor.name: was for tensor, was in found if was is not None}
        shards.append(replace(shard, tensors=tuple(tensor for tensor, _ in found)))
    files: dict[Path, list[TensorRef]] = {}
    for ref in sorted(tensors.values(), key=lambda ref: ref.start):
        files.setdefault(ref.file, []).append(ref)
    there = frozenset(shard.file for shard in shards if _is_there(shard, files.get(folder / shard.file, [])))
    return replace(after, shards=tuple(shards), reused=Reused(model, there, names, after.shards))


def _is_there(shard: Shard, there: Sequence[TensorRef]) -> bool:
    """Whether the tensors of a file are just a shard's, all taken from it, under their names and in their order."""
    taken = [tensor.pieces[0].ref if tensor.operation == "copy" else None for tensor in shard.tensors]
    return taken == there and [tensor.name for tensor in shard.tensors] == [ref.name for ref in there]


def _key(tensor: PlannedTensor, origins: Origins) -> tuple[int | None, str]:
    """What a tensor is, whatever number its expert has."""
    if tensor.expert is None:
        return None, tensor.name
    return origins[tensor.expert], _NUMBER.sub(r".\1.*.", tensor.name)


class _Finder:
    """Finds in the checkpoint what a new plan asks for; the checkpoint is the last of the plan's models."""

    def __init__(self, model: ModelSource, before: Plan, after: Plan, origins: Origins) -> None:
        self._model, self._origins, self._number = model, origins, len(after.sources)
        experts = zip(after.sources[1:], origins, strict=True)
        self._new = {file for source, origin in experts if origin is None for file in source.files} - {*after.sources[0].files}
        same = range(before.experts)
        self._old = {_key(tensor, same): tensor for shard in before.shards for tensor in shard.tensors}
        self._same, self._unchanged = same, [*origins] == [*same]

    def taken(self, tensor: PlannedTensor) -> tuple[PlannedTensor, str | None]:
        """The tensor with the checkpoint in place of its sources where that has it, and its name there."""
        was = self._old.get(_key(tensor, self._origins))
        ref = None if was is None else self._model.tensors.get(was.name)
        if was is None or ref is None or (ref.dtype, ref.shape) != (was.dtype, was.shape):
            return tensor, None
        if tensor.pad is not None and tensor.pad.carried is not None and not self._unchanged:  # bases are of all experts
            return tensor, None
        rows_of_new = any(ref.file in self._new for piece in (tensor.inner or tensor).pieces for ref in piece.refs)
        if not rows_of_new and _made(tensor, _sources_of(self._origins)) == _made(was, _sources_of(self._same)):
            plain = PlannedTensor(tensor.name, tensor.dtype, tensor.shape, tensor.role, "copy", expert=tensor.expert)
            return replace(plain, pieces=(Piece(self._number, ref),)), was.name
        if not (tensor.pieces and _is_plain(tensor) and _is_plain(was)):
            return tensor, None
        return self._in_parts(tensor, was, ref)

    def _in_parts(self, tensor: PlannedTensor, was: PlannedTensor, ref: TensorRef) -> tuple[PlannedTensor, str | None]:
        """Many experts in one tensor: the parts of those that were there."""
        spans = {key: span for key, span in zip(_parts(was, self._same), _spans(was), strict=True) if key is not None}
        found = [None if key is None else spans.get(key) for key in _parts(tensor, self._origins)]
        columns = tensor.operation == "columns"
        pieces = tuple(
            piece if span is None else _part(self._number, ref, span, columns=columns)
            for piece, span in zip(tensor.pieces, found, strict=True)
        )
        name = was.name if any(span is not None for span in found) else None
        if columns:
            return replace(tensor, pieces=pieces), name
        return joined(tensor.name, tensor.dtype, tensor.shape, tensor.role, pieces, tensor.expert), name


def _sources_of(origins: Origins) -> list[int | None]:
    """Per source of a plan, the base first, its number in the old one."""
    return [0, *(None if origin is None else 1 + origin for origin in origins)]


def _parts(tensor: PlannedTensor, origins: Origins) -> list[tuple[object, ...] | None]:
    """Per piece whose part it is, by that one's number in the old mixture, which of its parts, and how it is made."""
    sources = _sources_of(origins)
    counts: dict[int | None, int] = {}
    keys: list[tuple[object, ...] | None] = []
    for piece in tensor.pieces:
        number = counts[piece.expert] = counts.get(piece.expert, -1) + 1
        origin = None if piece.expert is None else origins[piece.expert]
        keys.append(None if origin is None else (origin, number, *_made_piece(piece, sources[piece.source])))
    return keys


def _is_plain(tensor: PlannedTensor) -> bool:
    """Whether it is its pieces, in one order or another, and no more."""
    return tensor.operation in _JOINED and tensor.factor == 1.0 and tensor.inner is None


def _made(tensor: PlannedTensor, sources: Sequence[int | None]) -> list[object]:
    """How it is made, by the sources' numbers in the old mixture."""
    inner = None if tensor.inner is None else _made(tensor.inner, sources)
    pieces = [_made_piece(piece, sources[piece.source]) for piece in tensor.pieces]
    pad = None if tensor.pad is None else [tensor.pad.identity(), tensor.pad.free]
    return [tensor.dtype, tensor.shape, tensor.operation, tensor.factor, pieces, inner, pad]


def _made_piece(piece: Piece, source: int | None) -> tuple[object, str]:
    """A piece by its source's number in the old mixture; that of a new source equals nothing."""
    _, *rest = piece.identity()
    return (object() if source is None else source), repr(rest)


def _spans(tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
    """Where every piece lies: from and to which element, or, of columns, from and to which column."""
    per_row = tensor.shape[0] if tensor.operation == "columns" else 1
    position = 0
    for piece in tensor.pieces:
        stop = position + piece.numel // per_row
        yield position, stop
        position = stop


def _part(source: int, ref: TensorRef, span: tuple[int, int], *, columns: bool) -> Piece:
    if columns:
        return Piece(source, ref, columns=span)
    size = ITEMSIZE[ref.dtype]
    start, stop = span
    return Piece(source, replace(ref, shape=(stop - start,), start=ref.start + start * size, end=ref.start + stop * size))
