"""What a plan is made of: every tensor of the result and the pieces of the sources it comes from.

Shape legend: L layers, E experts, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from modekit.files.read import FileState
from modekit.planning.pad import Pad
from modekit.planning.shape import Shape
from modekit.planning.slot import RouterSlot
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import Change
from modekit.sources.family import Family
from modekit.sources.model import ITEMSIZE, ModelSource, TensorRef
from modekit.weights.factor_size import working_bytes

ROUTER_FILE = "model-router.safetensors"
EMBEDDING_FILE = "model-embedding.safetensors"
"""The embedding where it carries a router's evidence, which a new fit replaces."""
INDEX_FILE = "model.safetensors.index.json"

Role = Literal["backbone", "expert", "adapter", "router", "constant"]
Operation = Literal["copy", "cast", "scale", "fold", "factor", "columns", "merge", "zeros", "pad"]

_BUILD_FLOOR = 200 * 2**20  # interpreter, numpy and blocks of what is computed, as measured (benchmarks/speed.md)


@dataclass(frozen=True)
class Factor:
    """One side of the best rank-R approximation of a full expert's difference to the base (`as: lora`)."""

    side: Literal["A", "B"]
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

    @property
    def numel(self) -> int:
        """Elements that it gives."""
        if self.factor is not None:
            return self.factor.rank * self.ref.shape[1 if self.factor.side == "A" else 0]
        rows = self.ref.shape[0]
        return self.ref.numel if self.columns is None else rows * (self.columns[1] - self.columns[0])

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor that is read for it."""
        changed = self.change.refs if self.change is not None else ()
        return (self.ref, *changed, *((self.factor.expert,) if self.factor is not None else ()))

    def identity(self) -> list[Any]:
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
        ]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    `expert`: whose it is alone; None for what others share.

    copy: the pieces' bytes, one after the other (concatenated along the first axis). cast: the same in another dtype.
    fold: the same, where adapters are folded in. factor: the same, of low-rank parts. columns: the pieces concatenated
    along the second axis. scale: the piece times `factor`. merge: the backbone merge of the pieces, base first. zeros: no
    piece. pad: another tensor, `inner`, widened.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    operation: Operation
    pieces: tuple[Piece, ...] = ()
    factor: float = 1.0
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
    operation: Operation = "copy" if all(piece.ref.dtype == dtype for piece in pieces) else "cast"
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


@dataclass(frozen=True)
class Shard:
    """One file of the result and its tensors in order."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """Data bytes, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Kept:
    """A mixture whose tensors a plan takes as they are (kept.py); `files` are shards of the plan that are files of it."""

    model: ModelSource
    files: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """Everything that `build` needs to know. `sources[0]` is the base model, `sources[1 + e]` expert e's.

    `shape` is that of the result; `why` says why it was chosen. `kept` is set where the plan changes a mixture that is there.
    """

    recipe: Recipe
    root: Path
    family: Family
    shape: Shape
    why: str
    sources: tuple[ModelSource, ...]
    shards: tuple[Shard, ...]
    router_dtype: str
    copied_files: tuple[Path, ...]
    notes: tuple[str, ...]
    trust_remote_code: bool = False
    kept: Kept | None = None

    @property
    def models(self) -> tuple[ModelSource, ...]:
        """All that pieces are taken from, by `Piece.source`."""
        return self.sources if self.kept is None else (*self.sources, self.kept.model)

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the result."""
        return self.shape.config

    @cached_property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers in the order of the layers."""
        return self.shape.slots

    @property
    def layers(self) -> int:
        """L."""
        return len(self.family.layers(self.config))

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return self.family.hidden(self.config)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.recipe.experts)

    @property
    def router(self) -> tuple[PlannedTensor, ...]:
        """The gates."""
        return tuple(PlannedTensor(slot.name, self.router_dtype, slot.shape, "router", "zeros") for slot in self.slots)

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All tensors of the result, router last."""
        return (*(tensor for shard in self.shards for tensor in shard.tensors), *self.router)

    @cached_property
    def source_states(self) -> dict[Path, FileState | None]:
        """Every weight file of the sources, and its state when its header was read."""
        return {file: source.states[file] for source in self.sources for file in source.files}

    @property
    def bytes_written(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_linked(self) -> int:
        """Of those, in files that are taken as they are from a mixture that is there."""
        kept = frozenset() if self.kept is None else self.kept.files
        return sum(shard.nbytes for shard in self.shards if shard.file in kept)

    @property
    def disk_needed(self) -> int:
        """Bytes that a build writes: weights that are in no file which is there, and the statistics that it keeps."""
        statistics = self.statistics_bytes(in_memory=False) if self.recipe.mixture.keeps_statistics else 0
        return self.bytes_written - self.bytes_linked + statistics

    @property
    def bytes_read(self) -> int:
        """Bytes of source tensors that the result is made from; a source used twice counts once."""
        refs = (ref for tensor in self.tensors for piece in tensor.pieces for ref in piece.refs)
        return sum({(ref.file, ref.start): ref.nbytes for ref in refs}.values())

    def parameters(self) -> dict[str, int]:
        """total, active (per token), per expert (of its own, adapters aside), adapters, backbone, router."""
        by_role: dict[str, int] = {"backbone": 0, "expert": 0, "adapter": 0, "router": 0, "constant": 0}
        for tensor in self.tensors:
            by_role[tensor.role] += tensor.numel
        counted = self.shape.parameters({tensor.name: tensor.numel for tensor in self.tensors}, 0)
        return {
            "total": counted.total,
            "active": counted.active,
            "per_expert": counted.per_expert,
            "adapters": by_role["adapter"],
            "backbone": by_role["backbone"],
            "router": by_role["router"],
        }

    def statistics_bytes(self, *, in_memory: bool) -> int:
        """Bytes of the statistics that a fit keeps of all domains, on disk or while it solves."""
        mixture = self.recipe.mixture
        if mixture.fit is None or mixture.fit.reads.keeps is None:
            return 0
        of_domain = mixture.fit.reads.keeps.nbytes
        routers = self.slots if mixture.fit.reads.keeps.per_router else self.slots[:1]
        return sum(self.experts * of_domain(slot.shape[1], mixture.router.keep_tokens, in_memory) for slot in routers)

    def memory(self) -> dict[str, int]:
        """Bytes of memory to build (resident in all), to fit the router (0 when nothing is fitted), and to load the result.

        What runs a model, a fit included, holds torch and transformers as well, 0.4 GB.
        """
        parameters = self.parameters()
        router, row = self.recipe.mixture.router, self.recipe.mixture.fit
        fit = 0
        if row is not None and row.reads.keeps is not None:
            itemsize = 4 if router.compute_dtype == "float32" else 2
            one = parameters["backbone"] + parameters["per_expert"] if self.shape.loads_one_expert else parameters["total"]
            activations = 16 * router.sequence_length * (12 * self.hidden + int(self.config["vocab_size"])) * 4
            fit = row.reads.keeps.memory(self.statistics_bytes(in_memory=True), one * itemsize + activations)
        factored = (
            working_bytes(piece.ref.shape, piece.factor.rank) + 8 * tensor.numel  # one expert's; the factors of all
            for tensor in self.tensors
            for piece in tensor.pieces
            if piece.factor is not None
        )
        return {"build": _BUILD_FLOOR + max(factored, default=0), "fit": fit, "load": self.bytes_written}

    def digest(self) -> str:
        """Identity of this build: version, recipe, every planned tensor, and what every source file was when it was planned."""
        identity = {
            "modekit": version("modekit"),
            "recipe": self.recipe.digest(),
            "config": dict(self.config),
            "tensors": [
                [t.name, t.dtype, list(t.shape), t.operation, t.factor, [piece.identity() for piece in t.pieces], *_padding(t)]
                for t in self.tensors
            ],
            "files": [
                [str(file), state and [state.inode, state.size, state.modified_ns]]
                for file, state in {**self.source_states, **({} if self.kept is None else self.kept.model.states)}.items()
            ],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _padding(tensor: PlannedTensor) -> list[Any]:
    if tensor.inner is None or tensor.pad is None:
        return []
    return [tensor.inner.operation, tensor.inner.factor, tensor.pad.identity()]
