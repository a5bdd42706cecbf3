"""How alike the experts are: the cosine between what each changed of the base model, over all mixed tensors.

    cos(i, j) = <d_i, d_j> / (|d_i| |d_j|),   d_e = expert e's tensors - the base's, all in one long vector

Inner products add up tensor by tensor, block by block. A low-rank change s B A is never multiplied out:

    <s B A, t D C> = s t <B'D, A C'>        <D, s B A> = s <B'D, A>        (' transposes; A (R, I), B (O, R), D full)

Shape legend: E experts, O and I rows and columns of a tensor, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import SourceError
from modekit.progress import Progress, silent
from modekit.sources.families import LAYER
from modekit.sources.model import Mappings, TensorRef, open_source
from modekit.weights.numeric import as_array, to_float32

Array64 = npt.NDArray[np.float64]

_BLOCK = 2**18  # elements of one expert's tensor at a time: 2 MiB in float64
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class _Part:
    """Elements of a tensor from `start` on, divided by a factor that the checkpoint has folded in."""

    ref: TensorRef
    start: int = 0
    factor: float = 1.0


@dataclass
class _Mixed:
    """One tensor (O, I) of the base of which experts have their own.

    Attributes:
        shape: O, I; of a vector its length and 1.
        base: None when `own` holds changes already, or the base model is gone.
        own: expert -> its whole tensor.
        low_rank: expert -> (scale, rows of A, columns of B).
    """

    shape: tuple[int, int]
    base: _Part | None
    own: dict[int, _Part] = field(default_factory=dict)
    low_rank: dict[int, tuple[float, TensorRef, TensorRef, slice]] = field(default_factory=dict)
    gone: bool = False


@dataclass(frozen=True)
class Similarity:
    """Cosines (E, E), what was compared, and what a reader has to know about it."""

    experts: Array64
    of: str
    notes: list[str]


def similarity(checkpoint: Checkpoint, progress: Progress = silent) -> Similarity:
    """Compare the experts of a checkpoint; memory does not grow with the model.

    Two experts that changed nothing are alike (1); one that changed something and one that did not have 0. Where the base
    model's folder is gone and the checkpoint does not hold the base's tensors, the experts' tensors are compared as they are.
    """
    base = _base_tensors(checkpoint)
    mixed = list(_native_tensors(checkpoint, base) if checkpoint.native is not None else _modekit_tensors(checkpoint, base))
    count = len(checkpoint.names)
    gram = np.zeros((count, count))
    mappings = Mappings()
    try:
        for done, tensor in enumerate(mixed, 1):
            gram += _products(tensor, count, mappings)
            progress("compare experts", done, len(mixed))
    finally:
        mappings.close()
    whole = sum(tensor.gone for tensor in mixed)
    notes = []
    of = f"what the experts changed of the base model in {len(mixed)} tensors"
    if whole:
        of = f"the experts' own tensors ({whole} of {len(mixed)}) and what they changed of the base model in the others"
        of = of if whole < len(mixed) else f"the experts' own tensors ({len(mixed)})"
        notes.append(
            "the base model is no longer where the recipe found it: experts were compared whole, so that even unrelated "
            "changes look alike"
        )
    return Similarity(_cosines(gram), of, notes)


def _cosines(gram: Array64) -> Array64:
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scale = np.outer(norms, norms)
    cosines: Array64 = np.clip(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0), -1.0, 1.0)
    unchanged = norms == 0
    cosines[np.outer(unchanged, unchanged)] = 1.0
    np.fill_diagonal(cosines, 1.0)
    return cosines


def _products(tensor: _Mixed, count: int, mappings: Mappings) -> Array64:
    """Inner products of the experts' changes of one tensor, (E, E)."""

    def read(part: _Part, start: int, stop: int) -> Array64:
        values = as_array(mappings.view(part.ref), part.ref.dtype)[part.start + start : part.start + stop]
        return to_float32(values).astype(np.float64) / part.factor

    def whole(ref: TensorRef) -> Array64:
        return to_float32(as_array(mappings.view(ref), ref.dtype)).astype(np.float64).reshape(ref.shape)

    gram = np.zeros((count, count))
    rows, columns = tensor.shape
    factors: dict[int, tuple[Array64, Array64]] = {}
    sides: dict[str, Array64] = {}
    for expert, (scale, a, b, ranks) in tensor.low_rank.items():
        sides = sides or {"a": whole(a), "b": whole(b)}
        factors[expert] = (scale * sides["a"][ranks], sides["b"][:, ranks])
    for one, (a_one, b_one) in factors.items():
        for other, (a_other, b_other) in factors.items():
            gram[one, other] = np.sum((b_one.T @ b_other) * (a_one @ a_other.T))
    step = max(1, _BLOCK // columns)
    own = list(tensor.own)
    for first in range(0, rows if own else 0, step):
        last = min(rows, first + step)
        start, stop = first * columns, last * columns
        base = read(tensor.base, start, stop) if tensor.base is not None else 0.0
        changes = np.stack([read(tensor.own[expert], start, stop) - base for expert in own])
        gram[np.ix_(own, own)] += changes @ changes.T
        for other, (a_other, b_other) in factors.items():
            for place, expert in enumerate(own):
                block = changes[place].reshape(last - first, columns)
                product = np.sum((b_other[first:last].T @ block) * a_other)
                gram[expert, other] += product
                gram[other, expert] += product
    return gram


def _base_tensors(checkpoint: Checkpoint) -> Callable[[str, Sequence[int]], _Part | None]:
    """Finds a tensor of the base model by name and shape; nothing when its folder is gone."""
    folder: Path = (checkpoint.folder / checkpoint.record.sources[0].folder).resolve()
    try:
        tensors = dict(open_source("base_model", str(folder), folder, trust_remote_code=True).tensors)  # no code is run
    except SourceError:
        tensors = {}

    def find(name: str, shape: Sequence[int]) -> _Part | None:
        tied = name.replace(_HEAD, _EMBEDDING, 1) if name.startswith(_HEAD) else name
        ref = tensors.get(name, tensors.get(tied))
        return _Part(ref) if ref is not None and ref.shape == tuple(shape) else None

    return find


def _native_tensors(checkpoint: Checkpoint, base: Callable[[str, Sequence[int]], _Part | None]) -> Iterator[_Mixed]:
    """gate, up and down of every layer."""
    native, experts = checkpoint.native, range(len(checkpoint.names))
    assert native is not None
    weights = checkpoint.record.recipe.mixture.weights
    total = sum(weights.values()) if weights is not None else 1.0
    for layer in range(checkpoint.layers):
        prefix = LAYER.format(layer=layer)
        for part, dense in native.family.mlp.items():
            parts: dict[int, _Part] = {}
            if native.experts is not None:
                for expert in experts:
                    ref = checkpoint.tensors[prefix + native.experts[part].format(expert=expert)]
                    shape = ref.shape
                    share = 1.0 if weights is None else len(experts) * weights[checkpoint.names[expert]] / total
                    parts[expert] = _Part(ref, factor=share if part == "down" else 1.0)
            else:
                assert native.fused is not None
                ref = checkpoint.tensors[prefix + native.fused[part == "down"]]
                shape = (ref.shape[1] // (1 if part == "down" else 2), ref.shape[2])
                size = ref.numel // len(experts)
                up = size // 2 if part == "up" else 0
                parts = {expert: _Part(ref, expert * size + up) for expert in experts}
            # Of an expert with weight 0 the last projection is zero: nothing is left of it to compare.
            own = {expert: each for expert, each in parts.items() if each.factor > 0}
            found = base(prefix + dense, shape)
            yield _Mixed((shape[0], shape[1]), found, own, gone=found is None)


def _modekit_tensors(checkpoint: Checkpoint, base: Callable[[str, Sequence[int]], _Part | None]) -> Iterator[_Mixed]:
    """Every tensor of every place: the experts' own modules, their low-rank changes, and the biases these add."""
    places: dict[str, Any] = checkpoint.config["modekit"]["places"]
    for module, place in places.items():
        prefix = f"{module}.experts.0."
        leaves = [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)]
        if any(place["ranks"]) and "weight" not in leaves:
            leaves.append("weight")
        for leaf in leaves:
            own = {expert: checkpoint.tensors[f"{module}.experts.{n}.{leaf}"] for n, expert in enumerate(place["own"])}
            low = _low_rank(checkpoint, module, place) if leaf == "weight" else {}
            kept = checkpoint.tensors.get(f"{module}.base.{leaf}")
            shape = next(iter(own.values())).shape if kept is None else kept.shape
            found = _Part(kept) if kept is not None else base(f"{module}.{leaf}", shape)
            size = (shape[0], int(np.prod(shape[1:])))
            yield _Mixed(
                size, found, {expert: _Part(ref) for expert, ref in own.items()}, low, gone=bool(own) and found is None
            )
        biased = [expert for expert in place.get("biased", []) if place["scales"][expert]]
        if biased:
            ref = checkpoint.tensors[f"{module}.lora_bias"]
            width, rows = ref.shape[1], {expert: row for row, expert in enumerate(place["biased"])}
            added = {expert: _Part(ref, rows[expert] * width, 1.0 / place["scales"][expert]) for expert in biased}
            yield _Mixed((width, 1), None, added)


def _low_rank(
    checkpoint: Checkpoint, module: str, place: dict[str, Any]
) -> dict[int, tuple[float, TensorRef, TensorRef, slice]]:
    found = {}
    if any(place["ranks"]):
        a, b = (checkpoint.tensors[f"{module}.lora_{side}"] for side in "AB")
        start = 0
        for expert, rank in enumerate(place["ranks"]):
            if rank:
                found[expert] = (float(place["scales"][expert]), a, b, slice(start, start + rank))
            start += rank
    return found
