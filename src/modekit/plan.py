"""Recipe and headers -> every tensor of the result and where each comes from.

Reads configs and headers, never a tensor, and does not import torch. Whatever cannot work is refused here, before a
byte is written.

Shape legend: L layers, D hidden, F expert hidden, E experts, K top_k, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from modekit.compatibility import (
    IGNORED,
    check_complete,
    check_dtypes,
    check_same_architecture,
    check_sizes,
    is_tied,
    matching,
)
from modekit.errors import SourceError, UnsupportedError
from modekit.families import LAYER, Family, choose_family, family_rows
from modekit.locate import open_recipe_sources
from modekit.recipe import BASE, BackboneExpert, Recipe
from modekit.sources import DTYPE_NAMES, ITEMSIZE, ModelSource, TensorRef
from modekit.tokenizer import TOKENIZER_FILES, check_ids_fit, check_same_tokenizer

ROUTER_FILE = "model-router.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Role = Literal["backbone", "expert", "router", "constant"]
Operation = Literal["copy", "cast", "scale", "merge", "zeros"]

_TO_SAFETENSORS = {name: code for code, name in DTYPE_NAMES.items()}
_BUILD_FLOOR = 150 * 2**20  # interpreter, numpy and one block of copies


@dataclass(frozen=True)
class Piece:
    """A source tensor: the place of its model in `Plan.sources`, and its header entry."""

    source: int
    ref: TensorRef


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result.

    copy: the pieces' bytes, one after the other (concatenated along the first axis). cast: the same in another dtype.
    scale: the piece times `factor`. merge: the backbone merge of the pieces, base first. zeros: no piece.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    operation: Operation
    pieces: tuple[Piece, ...] = ()
    factor: float = 1.0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * ITEMSIZE[self.dtype]


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
class Plan:
    """Everything that `build` needs to know. `sources[0]` is the base model, `sources[1 + e]` expert e's."""

    recipe: Recipe
    root: Path
    family: Family
    sources: tuple[ModelSource, ...]
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    router: tuple[PlannedTensor, ...]
    copied_files: tuple[Path, ...]
    notes: tuple[str, ...]
    trust_remote_code: bool = False

    @property
    def layers(self) -> int:
        """L."""
        return int(self.config["num_hidden_layers"])

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.config["hidden_size"])

    @property
    def experts(self) -> int:
        """E."""
        return len(self.recipe.experts)

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All tensors of the result, router last."""
        return (*(tensor for shard in self.shards for tensor in shard.tensors), *self.router)

    @property
    def bytes_written(self) -> int:
        """Size of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes of source tensors that the result is made from; a source used twice counts once."""
        unique = {(piece.ref.file, piece.ref.name): piece.ref.nbytes for tensor in self.tensors for piece in tensor.pieces}
        return sum(unique.values())

    def parameters(self) -> dict[str, int]:
        """total, active (per token), per expert, backbone, router."""
        by_role: dict[str, int] = {"backbone": 0, "expert": 0, "router": 0, "constant": 0}
        for tensor in self.tensors:
            by_role[tensor.role] += tensor.numel
        per_expert = by_role["expert"] // self.experts
        total = sum(by_role.values())
        return {
            "total": total,
            "active": total - per_expert * (self.experts - self.recipe.top_k),
            "per_expert": per_expert,
            "backbone": by_role["backbone"],
            "router": by_role["router"],
        }

    def memory(self) -> dict[str, int]:
        """Bytes of anonymous memory to build, to fit the router (0 when nothing is fitted), and to load the result."""
        parameters = self.parameters()
        router = self.recipe.mixture.router
        fit = 0
        if self.recipe.mixture.needs_text:
            itemsize = 4 if router.compute_dtype == "float32" else 2
            dense = (parameters["backbone"] + parameters["per_expert"]) * itemsize
            statistics = self.experts * self.layers * self.hidden * (8 * self.hidden + 2 * router.keep_tokens + 16)
            activations = 16 * router.sequence_length * (12 * self.hidden + int(self.config["vocab_size"])) * 4
            fit = dense + statistics + activations
        return {"build": _BUILD_FLOOR, "fit": fit, "load": self.bytes_written}

    def summary(self, out: Path | None = None) -> dict[str, Any]:
        """The plan as plain data: what `modekit plan --json` prints."""
        target = out if out is not None else self.root
        while not target.exists():
            target = target.parent
        statistics = 0
        if self.recipe.mixture.needs_text:
            keep = self.recipe.mixture.router.keep_tokens
            statistics = self.experts * self.layers * self.hidden * (2 * (self.hidden + 1) + 16 + 2 * keep)
        operations: dict[str, int] = {}
        for tensor in self.tensors:
            label = "router" if tensor.role == "router" else tensor.operation
            operations[label] = operations.get(label, 0) + 1
        return {
            "architecture": self.config["architectures"][0],
            "why": f"a mixture of whole FFN experts of '{self.family.model_type}' with a linear router is said exactly by "
            f"{self.family.native_type}",
            "also_runs_in": self.family.serves,
            "method": self.recipe.mixture.method,
            "top_k": self.recipe.top_k,
            "router": "none (zero gate)" if self.recipe.mixture.method == "linear" else self.recipe.mixture.router.fit,
            "backbone": _backbone_label(self.recipe),
            "experts": [
                {"name": expert.name, "model": expert.model, "text": bool(expert.text or expert.prompts)}
                for expert in self.recipe.experts
            ],
            "layers": self.layers,
            "dtype": self.config["dtype"],
            "tensors": {"total": len(self.tensors), **operations},
            "shards": len(self.shards) + 1,
            "bytes": {"read": self.bytes_read, "written": self.bytes_written, "statistics": statistics},
            "parameters": self.parameters(),
            "disk": {"needed": self.bytes_written + statistics, "free": shutil.disk_usage(target).free},
            "memory": self.memory(),
            "notes": list(self.notes),
        }

    def digest(self) -> str:
        """Identity of this build: version, recipe, every planned tensor, and size and time of every source file."""
        try:
            stats = [(file, file.stat()) for source in self.sources for file in source.files]
        except OSError as error:
            raise SourceError(
                "a source file cannot be read",
                where=str(error.filename),
                found=error.strerror,
                remedy="put it back and build again",
            ) from None
        identity = {
            "modekit": version("modekit"),
            "recipe": self.recipe.digest(),
            "config": dict(self.config),
            "tensors": [
                [t.name, t.dtype, list(t.shape), t.operation, t.factor, [[p.source, p.ref.name, p.ref.start] for p in t.pieces]]
                for t in self.tensors
            ],
            "files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def make_plan(recipe: Recipe, root: Path, *, trust_remote_code: bool = False, headers_only: bool = False) -> Plan:
    """Resolve a recipe into a plan. `root` is the folder that the recipe's paths are relative to.

    With `headers_only` models on the hub are not downloaded; such a plan can be shown but not built.

    Raises SourceError, MismatchError or UnsupportedError before anything is written.
    """
    sources = open_recipe_sources(recipe, root, trust_remote_code=trust_remote_code, headers_only=headers_only)
    base = sources[0]
    family_rows(base.config, where=f"base_model ({base.spec})")
    for source in dict.fromkeys(sources):
        check_sizes(source)
    family = choose_family(base.config, where=f"base_model ({base.spec})")
    layers = int(base.config["num_hidden_layers"])
    for source in dict.fromkeys(sources):
        check_dtypes(source)
        if source is not base:
            check_same_architecture(base, source, family)
            check_same_tokenizer(base.folder, source.folder, where=f"{source.label} ({source.spec})")
        check_complete(source, family, layers)

    if recipe.mixture.needs_text and not any((base.folder / name).exists() for name in TOKENIZER_FILES):
        raise SourceError(
            "the router fit reads text and the base model has no tokenizer", where=f"base_model ({base.spec})",
            expected="tokenizer.json or another of transformers' tokenizer files",
            remedy="save the tokenizer into the base model's folder, or use router: {fit: random}",
        )  # fmt: skip
    check_ids_fit(base.folder, int(base.config["vocab_size"]), where=f"base_model ({base.spec})")
    backbone = list(_plan_backbone(recipe, sources, family, layers))
    experts = list(_plan_experts(recipe, sources, family, layers))
    hidden = int(base.config["hidden_size"])
    expert_hidden = base.tensor(LAYER.format(layer=0) + family.mlp["gate"]).shape[0]
    router_code = _output_code(recipe, base.tensor(LAYER.format(layer=0) + family.mlp["gate"]))
    letters = {"D": hidden, "F": expert_hidden, "E": len(recipe.experts)}
    constants = [
        PlannedTensor(
            LAYER.format(layer=layer) + constant.name, router_code,
            tuple(letters.get(letter) if letter in letters else int(letter) for letter in constant.shape),  # type: ignore[misc]
            "constant", "zeros",
        )
        for layer in range(layers)
        for constant in family.constants
    ]  # fmt: skip
    router = tuple(
        PlannedTensor(LAYER.format(layer=layer) + family.router, router_code, (len(recipe.experts), hidden), "router", "zeros")
        for layer in range(layers)
    )
    config = family.native_config(
        base.config,
        experts=len(recipe.experts),
        top_k=recipe.top_k,
        expert_hidden=expert_hidden,
        dtype=DTYPE_NAMES[router_code],
    )
    copied = tuple(base.folder / name for name in (*TOKENIZER_FILES, "generation_config.json") if (base.folder / name).exists())
    body = sorted([*backbone, *experts, *constants], key=lambda tensor: _natural_key(tensor.name))
    return Plan(
        recipe, root, family, sources, config, _cut_into_shards(body, recipe.output.shard_size), router, copied,
        tuple(_notes(recipe, sources, family)), trust_remote_code,
    )  # fmt: skip


def _plan_backbone(recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, layers: int) -> Iterable[PlannedTensor]:
    """Every tensor that is not an expert's: copied from one model, or merged."""
    base = sources[0]
    in_ffn = {LAYER.format(layer=layer) + suffix for layer in range(layers) for suffix in family.mlp.values()}
    ffn_prefixes = tuple(LAYER.format(layer=layer) + family.mlp_module + "." for layer in range(layers))
    merge = recipe.mixture.merge
    giver = 0
    if isinstance(recipe.mixture.backbone, BackboneExpert):
        giver = 1 + recipe.names.index(recipe.mixture.backbone.expert)
    merged = [place for place, expert in enumerate(recipe.experts, start=1) if expert.model != BASE]
    for name, ref in base.tensors.items():
        if name in in_ffn or IGNORED.search(name) or (name == "lm_head.weight" and is_tied(base, family)):
            continue
        if name.startswith(ffn_prefixes):
            raise UnsupportedError(
                "the FFN has a tensor that the native experts do not", where=f"base_model ({base.spec}): {name}",
                expected=", ".join(family.mlp.values()), remedy="choose a base model with a plain gated FFN",
            )  # fmt: skip
        code = _output_code(recipe, ref)
        if merge is not None:
            pieces = (Piece(0, ref), *(Piece(place, matching(sources[place], name, ref)) for place in merged))
            yield PlannedTensor(name, code, ref.shape, "backbone", "merge", pieces)
        else:
            given = matching(sources[giver], name, ref)
            operation: Operation = "copy" if given.dtype == code else "cast"
            yield PlannedTensor(name, code, ref.shape, "backbone", operation, (Piece(giver, given),))


def _plan_experts(recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, layers: int) -> Iterable[PlannedTensor]:
    """The FFN of every expert in every layer, in the native layout."""
    base = sources[0]
    count = len(recipe.experts)
    factors = dict.fromkeys(recipe.names, 1.0)
    if recipe.mixture.weights is not None:
        total = sum(recipe.mixture.weights.values())
        # A zero gate weighs every expert 1/E; E w_e in front of the last projection makes it w_e.
        factors = {name: count * weight / total for name, weight in recipe.mixture.weights.items()}
    for layer in range(layers):
        prefix = LAYER.format(layer=layer)
        refs = {part: base.tensor(prefix + suffix) for part, suffix in family.mlp.items()}
        pieces: dict[str, list[Piece]] = {
            part: [Piece(place, matching(sources[place], ref.name, ref)) for place in range(1, 1 + count)]
            for part, ref in refs.items()
        }
        if family.experts is not None:
            for part, native in family.experts.items():
                code = _output_code(recipe, refs[part])
                for expert, piece in enumerate(pieces[part]):
                    factor = factors[recipe.names[expert]] if part == "down" else 1.0
                    operation: Operation = "scale" if factor != 1.0 else "copy" if piece.ref.dtype == code else "cast"
                    name = prefix + native.format(expert=expert)
                    yield PlannedTensor(name, code, piece.ref.shape, "expert", operation, (piece,), factor)
        elif family.fused is not None:
            if recipe.mixture.weights is not None and set(factors.values()) != {1.0}:
                raise UnsupportedError(
                    "given weights cannot be folded into this family's fused experts", where="mixture.weights",
                    remedy="leave weights out (all experts equal)",
                )  # fmt: skip
            gate_up = [piece for pair in zip(pieces["gate"], pieces["up"], strict=True) for piece in pair]
            rows, columns = refs["gate"].shape
            for name, parts, shape in (
                (family.fused[0], gate_up, (count, 2 * rows, columns)),
                (family.fused[1], pieces["down"], (count, columns, rows)),
            ):
                code = _output_code(recipe, refs["gate"])
                operation = "copy" if all(piece.ref.dtype == code for piece in parts) else "cast"
                yield PlannedTensor(prefix + name, code, shape, "expert", operation, tuple(parts))


def _output_code(recipe: Recipe, ref: TensorRef) -> str:
    return ref.dtype if recipe.output.dtype == "source" else _TO_SAFETENSORS[recipe.output.dtype]


def _cut_into_shards(tensors: list[PlannedTensor], shard_size: int) -> tuple[Shard, ...]:
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    return tuple(Shard(f"model-{place:05d}-of-{count:05d}.safetensors", tuple(group)) for place, group in enumerate(groups, 1))


def _natural_key(name: str) -> tuple[object, ...]:
    head = 0 if "embed" in name else 1 if ".layers." in name else 2
    return (head, *(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)))


def _backbone_label(recipe: Recipe) -> str:
    merge = recipe.mixture.merge
    if merge is not None:
        return merge.method
    if isinstance(recipe.mixture.backbone, BackboneExpert):
        return f"expert {recipe.mixture.backbone.expert}"
    return BASE


def _notes(recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> Iterable[str]:
    if sources[0].config.get("sliding_window") and family.native_type == "mixtral":
        yield "sliding window: exact in transformers; vLLM's and llama.cpp's Mixtral ignore it"
    if family.model_type == "qwen2":
        yield "llama.cpp's qwen2moe does not renormalise router weights: not for GGUF"
    if recipe.mixture.method == "routing" and recipe.top_k == 1:
        yield "top_k 1: the chosen expert's weight is always 1, so the router gets no gradient if trained later"
    if recipe.mixture.method == "routing" and len(recipe.experts) == recipe.top_k:
        yield "top_k equals the number of experts: every token runs through every expert, as with method: gating"
    cast = sum(tensor.operation == "cast" for tensor in _plan_experts(recipe, sources, family, 1))
    if cast:
        yield "some experts have another dtype than the result: their tensors are cast"
