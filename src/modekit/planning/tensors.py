"""The tensors of a result, and which file holds each.

What comes and goes together lies together:

    model-backbone-00001.safetensors      what does not know which experts there are
    model-shared-00001.safetensors        what is of all experts at once: low-rank changes side by side, fused experts, and
                                          what of the backbone leads a router's evidence to the gates
    model-expert-00001-00001.safetensors  the first expert's own, and so on
    model-embedding.safetensors           the embedding where it carries a router's evidence
    model-router.safetensors              the gates

An expert that comes or goes leaves the backbone's files, and those of the experts before it, as they are (members/change.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from modekit.errors import SourceError
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.rows import is_joined
from modekit.weights.flat import FlatArray
from modekit.weights.made import Copy, Join, Made, Merged, Padded
from modekit.weights.numeric import BLOCK, DTYPES, blocks, is_finite, to_bytes, to_float32
from modekit.weights.padding import Pad
from modekit.weights.reading import WeightReader, where_of

EMBEDDING_FILE = "model-embedding.safetensors"
"""The embedding where it carries a router's evidence, which a new fit replaces."""

Role = Literal["backbone", "expert", "adapter", "router", "constant"]
CodeOf = Callable[[TensorRef], str]
"""The safetensors dtype of what is made from a tensor."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the result, and how it is made. `expert`: whose it is alone; None for what others share."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    made: Made
    expert: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def copied(self) -> tuple[TensorRef, ...] | None:
        """The stored tensors whose bytes one after the other it is; None where numbers are computed."""
        parts = self.made.of if isinstance(self.made, Join) and self.made.axis == 0 else (self.made,)
        if all(isinstance(part, Copy) and is_joined(part.ref, self.dtype) for part in parts):
            return self.made.refs
        return None

    @property
    def pad(self) -> Pad | None:
        """What is new in it, where it is a larger one than the base's."""
        return self.made.pad if isinstance(self.made, Padded) else None

    @property
    def inner(self) -> Made:
        """How it is made but for channels and the scale that they need."""
        return self.made.of if isinstance(self.made, Padded) else self.made

    def blocks(self, reading: WeightReader) -> Iterator[memoryview]:
        """Its bytes in order, each block perhaps in the memory of the one before it.

        Raises SourceError for NaN or Inf in what is computed from, and for numbers that do not fit the dtype.
        """
        if self.copied is not None:
            for ref in self.copied:
                yield from reading.opened.chunks(ref)
            return
        reading.check_all_finite(self.made.computed)
        values = self.made.numbers(reading)
        width = getattr(values, "width", 1)
        step = max(1, BLOCK // self.made.arrays // width) * width
        for part in blocks(len(values), step):
            block = values[part]
            if self.dtype == "U8":
                yield np.ascontiguousarray(block).view(np.uint8).data.cast("B")
                continue
            found = to_bytes(block if block.dtype == DTYPES[self.dtype] else to_float32(block), self.dtype)
            if not is_finite(found, self.dtype):
                raise self._misfit(reading)
            yield found

    def _misfit(self, reading: WeightReader) -> SourceError:
        """What to raise for numbers that are not finite: a source's, or too large for the dtype."""
        reading.check_all_finite(self.made.refs)
        parts = self.made.of if isinstance(self.made, Join) else (self.made,)
        culprit = next((part for part in parts if not _fits(part.numbers(reading), self.dtype)), self.made)
        what = "the weights do not fit"
        where = where_of(reading.models, culprit.refs)
        remedy = ""
        if isinstance(self.inner, Merged):
            what = "the merged backbone overflows"
            where = f"mixture.backbone: {self.name}"
            remedy = ", or a smaller scale"
        elif isinstance(culprit, Padded):
            what = "what the experts differ by does not fit"
            where = self.name
            remedy = ", or output: {carry: ffn}"
        remedy = f"choose output: {{dtype: bfloat16}} or float32{remedy}"
        return SourceError(f"{what} {DTYPES[self.dtype]}", where=where, remedy=remedy)


def _fits(values: FlatArray, dtype: str) -> bool:
    return all(is_finite(to_bytes(to_float32(values[part]), dtype), dtype) for part in blocks(len(values)))


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
    pad = tensor.pad
    if pad is not None and pad.free is not None:
        return EMBEDDING_FILE
    if tensor.expert is not None:
        return f"expert-{tensor.expert + 1:05d}"
    leads = pad is not None and (pad.entries or pad.carried is not None)
    return "shared" if tensor.role != "backbone" or isinstance(tensor.inner, Merged) or leads else "backbone"


def _parts(tensors: Sequence[PlannedTensor], shard_size: int) -> list[tuple[PlannedTensor, ...]]:
    parts = list[list[PlannedTensor]]()
    size = 0
    for tensor in tensors:
        if not parts or size + tensor.nbytes > shard_size:
            parts = [*parts, []]
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return [tuple(part) for part in parts]
