"""Every tensor of the result and the pieces of the sources it is made of, and which file holds it.

What comes and goes together lies together:

    model-backbone-00001.safetensors      what does not know which experts there are
    model-shared-00001.safetensors        what is of all experts at once: low-rank changes side by side, fused experts, and
                                          what of the backbone leads a router's evidence to the gates
    model-expert-00001-00001.safetensors  the first expert's own, and so on
    model-embedding.safetensors           the embedding where it carries a router's evidence
    model-router.safetensors              the gates

An expert that comes or goes leaves the backbone's files, and those of the experts before it, byte for byte as they are
(members/change.py).

Shape legend: R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from modekit.sources.adapter import AdapterSource, Change, LowRank, Scaling
from modekit.sources.header import ITEMSIZE
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.rows import RowsRef, is_joined, rows_of, stored_refs
from modekit.weights.factor_size import bytes_of_codes

EMBEDDING_FILE = "model-embedding.safetensors"
"""The embedding where it carries a router's evidence, which a new fit replaces."""

Role = Literal["backbone", "expert", "adapter", "router", "constant"]
Operation = Literal["copy", "cast", "scale", "fold", "factor", "bits", "columns", "merge", "zeros", "pad"]

Side = Literal["A", "B", "whole", "codes", "steps"]

CodeOf = Callable[[TensorRef], str]
"""The safetensors dtype of what is made from a tensor."""
Entry = tuple[int, int, float]
"""Row, column and value of one number in the new part of a widened tensor."""


@dataclass(frozen=True)
class MeasuredColumn:
    """A column that every row e of an embedding gets by its own size: value sqrt(mean(e^2) scale^2 + norm_eps) / scale, or,
    where no norm follows (None), value.
    """

    column: int
    value: float
    scale: float
    norm_eps: float | None


FFNKind = Literal["gate", "up", "gate_up", "down"]
CarriedKind = Literal["q", "k", "v", "o", "head", "embedding"] | FFNKind


@dataclass(frozen=True)
class CarriedPart:
    """Whose numbers stand in the new rows and columns of a tensor where a native checkpoint carries more than FFNs (carry.py).

    Attributes:
        kind: which part of a layer it is.
        layer: of the result; 0 is the one in front.
        expert: whose it is; None for what all share, and for all experts in one tensor.
    """

    kind: CarriedKind
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Pad:
    """A tensor of the base in a larger one: its own numbers first, zeros or `entries` behind them.

    Attributes:
        rows, columns: how many more there are. A tensor with one axis has columns only, one with three is widened matrix by
            matrix.
        scale: what the base's numbers are multiplied with.
        entries: in the new part of the first matrix.
        measured: a column that follows from the row, if there is one.
        free: columns that the fit of a router sets later.
        carried: what the experts' differences make of the new part.
    """

    rows: int = 0
    columns: int = 0
    scale: float = 1.0
    entries: tuple[Entry, ...] = ()
    measured: MeasuredColumn | None = None
    free: slice | None = None
    carried: CarriedPart | None = None

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for a tensor of this shape."""
        if len(shape) == 1:
            return (shape[0] + self.columns,)
        return (*shape[:-2], shape[-2] + self.rows, shape[-1] + self.columns)

    def identity(self) -> list[object]:
        """What distinguishes it from other pads, for a plan's digest."""
        entries = hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()
        measured = self.measured and [self.measured.column, self.measured.value, self.measured.scale, self.measured.norm_eps]
        carried = [] if self.carried is None else [[self.carried.kind, self.carried.layer, self.carried.expert]]
        return [self.rows, self.columns, self.scale, entries, measured, *carried]


@dataclass(frozen=True)
class Factor:
    """One side of the best rank-R approximation of a full expert's difference to the base (`as: lora`); or all of it, whole or
    as codes and steps of `rank` bits (weights/few_bits.py).
    """

    side: Side
    rank: int
    expert: TensorRef


@dataclass(frozen=True)
class Piece:
    """What one source gives to a tensor.

    Attributes:
        source: number of the model or adapter in `Plan.sources`; errors name it.
        ref: a tensor of the source; with `change` or `factor`, the base model's tensor.
        change: what an adapter does to `ref`.
        of_bias: `ref` is a bias and `change` that of its module.
        factor: a low-rank part of another tensor's difference to `ref`.
        columns: from and to which of `ref`'s columns it goes; None for all.
        expert: whose part it is, where a tensor has parts of many.
    """

    source: int
    ref: TensorRef
    change: Change | None = None
    of_bias: bool = False
    factor: Factor | None = None
    columns: tuple[int, int] | None = None
    expert: int | None = field(default=None, compare=False)

    def cut(self, rows: tuple[int, int] | None) -> Piece:
        """Some rows of what it gives; all without any."""
        change, ref = self.change, some_rows(self.ref, rows)
        if rows is not None and change is not None and not (isinstance(change, Scaling) and change.axis == "columns"):
            change = replace(change, rows=rows)
        return replace(self, ref=ref, change=change)

    @property
    def numel(self) -> int:
        """Elements that it gives."""
        if self.factor is not None and self.factor.side in ("codes", "steps"):
            rows, columns = self.ref.shape
            return rows if self.factor.side == "steps" else bytes_of_codes(rows, columns, self.factor.rank)
        if self.factor is not None and self.factor.side != "whole":
            return self.factor.rank * self.ref.shape[1 if self.factor.side == "A" else 0]
        rows = self.ref.shape[0]
        return self.ref.numel if self.columns is None else rows * (self.columns[1] - self.columns[0])

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor that is read for it."""
        changed = self.change.refs if self.change is not None else ()
        given = (self.ref, *changed, *((self.factor.expert,) if self.factor is not None else ()))
        return tuple(stored for ref in given for stored in stored_refs(ref))

    def identity(self) -> list[object]:
        """What distinguishes it from other pieces, for a plan's digest."""
        factor = None if self.factor is None else [self.factor.side, self.factor.rank]
        where = [[str(ref.file), ref.name, ref.start] for ref in self.refs]
        return [
            self.source,
            where,
            self.of_bias,
            factor,
            getattr(self.change, "scale", None),
            getattr(self.change, "rows", None),
            *([list(self.columns)] if self.columns is not None else []),
            *([[[part.count, len(part.refs)] for part in self.ref.ranges]] if isinstance(self.ref, RowsRef) else []),
        ]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    `expert`: whose it is alone; None for what others share.

    copy: the pieces' bytes, one after the other (concatenated along the first axis). cast: the same in another dtype.
    fold: the same, where adapters are folded in. factor: the same, of low-rank parts. bits: codes or steps of the piece.
    columns: the pieces concatenated along the second axis. scale: the piece times `factor`. merge: the backbone merge of the
    pieces, base first. zeros: no piece, or all `filled`. pad: another tensor, `inner`, widened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    operation: Operation
    pieces: tuple[Piece, ...] = ()
    factor: float = 1.0
    filled: float = 0.0
    inner: PlannedTensor | None = None
    pad: Pad | None = None
    expert: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * ITEMSIZE[self.dtype]


def joined(
    name: str, dtype: str, shape: tuple[int, ...], role: Role, pieces: tuple[Piece, ...], expert: int | None = None
) -> PlannedTensor:
    """A tensor made of pieces one after the other, by the cheapest operation that gives it."""
    operation: Operation = "copy" if all(is_joined(piece.ref, dtype) for piece in pieces) else "cast"
    if any(piece.change is not None for piece in pieces):
        operation = "fold"
    elif any(piece.factor is not None for piece in pieces):
        operation = "factor"
    return PlannedTensor(name, dtype, shape, role, operation, pieces, expert=expert)


def widened(tensor: PlannedTensor, pad: Pad | None) -> PlannedTensor:
    """The tensor in a larger one; itself without a pad."""
    if pad is None:
        return tensor
    inner = tensor if pad.scale == 1.0 else replace(tensor, factor=tensor.factor * pad.scale)
    if inner.operation in ("copy", "cast") and inner.factor != 1.0:
        inner = replace(inner, operation="scale")
    return replace(tensor, shape=pad.widened(tensor.shape), operation="pad", factor=1.0, inner=inner, pad=pad)


def piece_of(sources: tuple[ModelSource, ...], number: int, ref: TensorRef) -> Piece:
    """The whole tensor `ref` (of the base model, `sources[0]`) as model `number` of the sources has it.

    Raises MismatchError when its shape differs from the base model's.
    """
    source = sources[number]
    if not isinstance(source, AdapterSource):
        return Piece(number, source.matching(ref))
    given = source.replaced.get(ref.name, ref)
    change = source.changes.get(ref.name)
    if change is not None:
        return Piece(number, given, change)
    if ref.name in source.bias_changes:
        return Piece(number, given, source.bias_changes[ref.name], of_bias=True)
    return Piece(number if ref.name in source.replaced else 0, given)


def touched(source: ModelSource, name: str) -> bool:
    """Whether an adapter does anything to a tensor of the base; a full model always has its own."""
    if not isinstance(source, AdapterSource):
        return True
    return name in source.changes or name in source.replaced or name in source.bias_changes


def low_rank(source: ModelSource, weight: str) -> LowRank | None:
    """The adapter's change of a weight when it can be kept low-rank: plain LoRA on a linear layer, nothing replaced."""
    bias = weight.removesuffix("weight") + "bias"
    if not isinstance(source, AdapterSource) or weight in source.replaced or bias in source.replaced:
        return None
    change = source.changes.get(weight)
    return change if isinstance(change, LowRank) and change.magnitude is None and not change.transposed else None


def some_rows(ref: TensorRef, rows: tuple[int, int] | None) -> TensorRef:
    """Some rows of a tensor; all without any."""
    return ref if rows is None else rows_of(ref, *rows)


@dataclass(frozen=True)
class Shard:
    """One file of the result and its tensors in order."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Data bytes, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)


def cut_into_shards(tensors: Sequence[PlannedTensor], shard_size: int) -> tuple[Shard, ...]:
    """Files of at most `shard_size` bytes, but for larger tensors; in the order of the tensors."""
    groups: dict[str, list[PlannedTensor]] = {"backbone": [], "shared": []}
    for tensor in tensors:
        groups.setdefault(_group_of(tensor), []).append(tensor)
    embedding = groups.pop(EMBEDDING_FILE, [])
    shards = [
        Shard(f"model-{name}-{number:05d}.safetensors", part)
        for name, group in sorted(groups.items())
        for number, part in enumerate(_parts(group, shard_size), 1)
    ]
    return (*shards, *([Shard(EMBEDDING_FILE, tuple(embedding))] if embedding else []))


def _group_of(tensor: PlannedTensor) -> str:
    if tensor.pad is not None and tensor.pad.free is not None:
        return EMBEDDING_FILE
    if tensor.expert is not None:
        return f"expert-{tensor.expert + 1:05d}"
    changes_with_experts = tensor.role != "backbone" or (tensor.inner or tensor).operation == "merge"
    leads = tensor.pad is not None and (tensor.pad.entries or tensor.pad.carried is not None)
    return "shared" if changes_with_experts or leads else "backbone"


def _parts(tensors: Sequence[PlannedTensor], shard_size: int) -> list[tuple[PlannedTensor, ...]]:
    parts: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not parts or size + tensor.nbytes > shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return [tuple(part) for part in parts]
