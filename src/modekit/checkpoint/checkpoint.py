"""A finished checkpoint: modekit.json, the router file, and where every expert's tensors lie.

    OUT/config.json, model-*.safetensors, index, tokenizer   what plain transformers reads
    OUT/model-router.safetensors                              the gates, a file of their own: a re-fit rewrites only it
    OUT/modekit.json                                          recipe, sources with hashes, experts, router status
    OUT/router/<domain>.safetensors                           kept statistics of a fit
    OUT/results/                                              what `modekit eval` found

Shape legend: L layers, D hidden, E experts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, field_serializer, field_validator, model_validator

from modekit.checkpoint.staging import JOURNAL, safetensors_header, write_atomically, write_json
from modekit.errors import CheckpointError, RecipeError
from modekit.planning.mixture_config import problem_of
from modekit.planning.modekit import replaced_rows, routing_config, slots_of
from modekit.planning.plan import INDEX_FILE, ROUTER_FILE, Plan, RouterSlot
from modekit.recipes.recipe import Recipe, Router
from modekit.sources.families import LAYER
from modekit.sources.model import ITEMSIZE, Mappings, TensorRef, read_header
from modekit.sources.native import Native, native_of
from modekit.weights.numeric import DTYPES, as_array, is_finite, to_bytes, to_float32

RECORD_FILE = "modekit.json"
STATISTICS_FOLDER = "router"
_BUILD_AGAIN = "build the mixture again"

Gates = Sequence[npt.NDArray[np.float32]]
"""The gate of every router slot, in the order of the slots, each of its slot's shape, float32."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A source file as it was when it was read."""

    size: int
    blake3: str


class SourceRecord(_Record):
    """A model that the mixture was made from; `folder` is relative to the checkpoint."""

    label: str
    spec: str
    revision: str | None
    folder: str
    files: dict[str, FileRecord]

    @field_validator("files")
    @classmethod
    def _inside_the_folder(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        if any(Path(name).name != name for name in files):
            raise ValueError("source files must be names without a path")
        return files


class RouterRecord(_Record):
    """How the router was set."""

    status: Literal["unfitted", "fitted", "trained"]
    settings: Router | None
    sha256: str
    text: dict[str, dict[str, Any]]
    report: dict[str, Any]

    @classmethod
    def unfitted(cls, recipe: Recipe, sha256: str = "") -> RouterRecord:
        """Of a router whose gates the recipe alone gives: fixed weights have no settings."""
        settings = None if recipe.mixture.method == "linear" else recipe.mixture.router
        return cls(status="unfitted", settings=settings, sha256=sha256, text={}, report={})


class TrainingRecord(_Record):
    """One run of `modekit train`: what moved, towards what, on which text, and what it was worth on held-out text.

    Attributes:
        settings: as train/settings.py has them.
        text: domain -> how much was read, and a digest of its documents.
        parameters: how many moved.
        steps, tokens: done.
        select_loss: held-out loss (select split) per domain, before and after.
        notes: what was done in another way than asked, and why.
    """

    settings: dict[str, Any]
    text: dict[str, dict[str, Any]]
    parameters: int
    steps: int
    tokens: int
    select_loss: dict[str, dict[str, float]]
    notes: list[str]


class Record(_Record):
    """modekit.json.

    `trained` names the tensors, gates aside, that a training moved, with the blake3 of their bytes.
    """

    format: Literal[1]
    modekit_version: str
    recipe: Recipe
    recipe_digest: str
    recipe_folder: str
    dense_config: dict[str, Any]
    native_type: str | None
    dense_parameters: int
    expert_sources: list[int]
    sources: list[SourceRecord]
    router: RouterRecord
    trained: dict[str, str] = {}
    training: list[TrainingRecord] = []

    @model_validator(mode="after")
    def _experts_have_sources(self) -> Record:
        places = self.expert_sources
        if len(places) != len(self.recipe.experts) or not all(0 <= place < len(self.sources) for place in places):
            raise ValueError("expert_sources must name a source for every expert")
        return self

    @field_serializer("recipe")
    def _as_written(self, recipe: Recipe) -> dict[str, Any]:
        """Only what the user set: a default that has no effect is fine unsaid, but an error when said."""
        return recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder (or one in the making)."""

    folder: Path
    record: Record

    @cached_property
    def config(self) -> dict[str, Any]:
        """The native config.json."""
        return self._read_json("config.json", "num_hidden_layers")

    @cached_property
    def native(self) -> Native | None:
        """The row that this checkpoint was written by; None for the modekit architecture."""
        if self.record.native_type is None:
            return None
        try:
            return native_of(self.record.native_type, str(self.record.dense_config.get("model_type")))
        except StopIteration:
            raise CheckpointError(
                "modekit.json names a family that this version of modekit does not know", where=str(self.folder),
                found=self.record.native_type, remedy="build the mixture again with this version of modekit",
            ) from None  # fmt: skip

    @cached_property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers, in the order of the layers."""
        if self.native is not None:
            rows, hidden = (1,) * len(self.names), int(self.config["hidden_size"])
            return tuple(
                RouterSlot(LAYER.format(layer=layer) + self.native.router, hidden, rows) for layer in range(self.layers)
            )
        mixture = self.config.get("modekit")
        problem = problem_of(mixture)
        if mixture is None or problem is not None:
            raise CheckpointError(
                "config.json does not say what is mixed", where=f"{self.folder}: modekit", found=problem, remedy=_BUILD_AGAIN
            )
        return () if mixture["routing"]["method"] == "linear" else tuple(slots_of(mixture))

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors by name, read from the headers of the files that the index names."""
        weight_map = self._read_json(INDEX_FILE, "weight_map")["weight_map"]
        tensors: dict[str, TensorRef] = {}
        for file in sorted({str(file) for file in weight_map.values()}):
            tensors.update(read_header(self.folder / Path(file).name, where=str(self.folder)))
        for slot in self.slots:
            if slot.name not in tensors:
                raise CheckpointError("the gate is missing", where=f"{self.folder}: {slot.name}", remedy=_BUILD_AGAIN)
        for module, place in self.config.get("modekit", {}).get("places", {}).items() if self.native is None else ():
            wanted = [f"{module}.lora_A", f"{module}.lora_B"] if any(place["ranks"]) else []
            for name in wanted:
                if name not in tensors or sum(place["ranks"]) != tensors[name].shape[name.endswith("B")]:
                    raise CheckpointError(
                        "config.json and the weights disagree", where=f"{self.folder}: {name}", remedy=_BUILD_AGAIN
                    )
        return tensors

    def gates(self) -> list[npt.NDArray[np.float32]]:
        """The gate of every router slot as it is on disk."""
        mappings = Mappings()
        try:
            refs = [self.tensors[slot.name] for slot in self.slots]
            return [to_float32(as_array(mappings.view(ref), ref.dtype)).reshape(ref.shape) for ref in refs]
        finally:
            mappings.close()

    @property
    def identity(self) -> dict[str, str]:
        """What names a checkpoint as it is, so that results of another one, or of an earlier state, are recognised."""
        record = self.record
        trained = json.dumps(sorted(record.trained.items()))
        return {
            "recipe_digest": record.recipe_digest,
            "router_sha256": record.router.sha256,
            "trained": hashlib.sha256(trained.encode()).hexdigest() if record.trained else "",
        }

    @property
    def names(self) -> list[str]:
        """Experts in recipe order."""
        return self.record.recipe.names

    @property
    def layers(self) -> int:
        """L."""
        return int(self.config["num_hidden_layers"])

    @property
    def recipe_root(self) -> Path:
        """The folder that the recipe's paths are relative to."""
        return (self.folder / self.record.recipe_folder).resolve()

    def _read_json(self, file: str, key: str) -> dict[str, Any]:
        try:
            data: dict[str, Any] = json.loads((self.folder / file).read_text(encoding="utf-8"))
            data[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} is missing or damaged", where=str(self.folder), found=error, remedy=_BUILD_AGAIN
            ) from None  # fmt: skip
        return data

    def with_recipe(self, recipe: Recipe) -> Checkpoint:
        """The same experts under another recipe's routing: config and slots as they would be, nothing is written."""
        config = dict(self.config)
        if self.native is not None:
            config[self.native.top_k_key] = recipe.top_k
        else:
            config["modekit"] = rerouted(config["modekit"], recipe)
        changed = Checkpoint(self.folder, self.record)
        changed.__dict__["config"] = config
        return changed

    def with_router(self, gates: Gates, router: RouterRecord, recipe: Recipe) -> Checkpoint:
        """Write new gates, then the routing in config.json, then modekit.json; nothing else is touched."""
        changed = self.with_recipe(recipe)
        dtype = _gate_dtype(self)
        sha256 = write_router_file(self.folder / ROUTER_FILE, changed.slots, gates, dtype)
        if changed.slots != self.slots:
            old = {slot.name for slot in self.slots}
            kept = sum(ref.nbytes for name, ref in self.tensors.items() if name not in old)
            gates_size = sum(math.prod(slot.shape) * ITEMSIZE[dtype] for slot in changed.slots)
            _rewrite_index(self.folder, changed.slots, kept + gates_size)
        write_json(self.folder / "config.json", changed.config)
        record = self.record.model_copy(
            update={
                "router": router.model_copy(update={"sha256": sha256}),
                "recipe": recipe,
                "recipe_digest": recipe.digest(),
            }
        )
        write_json(self.folder / RECORD_FILE, record.model_dump(mode="json"))
        return Checkpoint(self.folder, record)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's record, config and headers.

    Raises CheckpointError when the folder is none, damaged or of another format, SourceError when a shard is damaged.
    """
    path = folder / RECORD_FILE
    if folder.name.endswith(".partial") and (not path.exists() or (folder / JOURNAL).exists()):
        raise CheckpointError(
            "an unfinished build is no checkpoint", where=str(folder), remedy="run the same `modekit build` again to finish it"
        )
    try:
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        partial = folder.with_name(folder.name + ".partial")
        remedy = (
            f"the build of it was cut short ({partial.name} is there): run the same `modekit build` again to finish it"
            if partial.exists()
            else "give the folder that `modekit build` wrote"
        )
        raise CheckpointError("not a modekit checkpoint: modekit.json is missing", where=str(folder), remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "modekit.json cannot be read", where=str(folder), found=error, remedy="give the folder that `modekit build` wrote"
        ) from None
    except ValidationError as error:
        raise CheckpointError(
            "modekit.json is damaged or of another version", where=str(folder), found=str(error).splitlines()[0],
            remedy="build the mixture again with this version of modekit",
        ) from None  # fmt: skip
    checkpoint = Checkpoint(folder, record)
    _ = checkpoint.native, checkpoint.tensors  # read now, so that damage shows before any work
    return checkpoint


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 when there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_router_file(path: Path, slots: Sequence[RouterSlot], gates: Gates, dtype: str) -> str:
    """Write the gates in a safetensors dtype; returns the file's sha256.

    Raises RecipeError when they are not finite in that dtype.
    """
    data = [to_bytes(np.ascontiguousarray(gate).ravel(), dtype) for gate in gates]
    if not all(is_finite(view, dtype) for view in data):
        raise RecipeError(
            f"the router's gates are not finite in {DTYPES[dtype]}", where="mixture.router",
            remedy="raise temperature or l2, or fit on other text",
        )  # fmt: skip
    header = safetensors_header((slot.name, dtype, slot.shape, len(view)) for slot, view in zip(slots, data, strict=True))
    content = header + b"".join(data)
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def rerouted(modekit: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """`config["modekit"]` with the routing of another recipe over the same experts."""
    return {**modekit, "routing": routing_config(recipe), "places": replaced_rows(modekit, recipe.mixture.router)}


def _gate_dtype(checkpoint: Checkpoint) -> str:
    if checkpoint.slots:
        return checkpoint.tensors[checkpoint.slots[0].name].dtype
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[checkpoint.config["dtype"]]


def write_index(plan: Plan, folder: Path) -> None:
    """Write the index that tells transformers which file holds which tensor."""
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    _write_index(folder, weight_map, plan.slots, plan.bytes_written)


def _rewrite_index(folder: Path, slots: Sequence[RouterSlot], total_size: int) -> None:
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    kept = {name: file for name, file in index["weight_map"].items() if file != ROUTER_FILE}
    _write_index(folder, kept, slots, total_size)


def _write_index(folder: Path, weight_map: Mapping[str, str], slots: Sequence[RouterSlot], total_size: int) -> None:
    gates = {slot.name: ROUTER_FILE for slot in slots}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": {**weight_map, **gates}})


def make_record(plan: Plan, out: Path, hashes: dict[str, str], router: RouterRecord) -> Record:
    """The record of a build; paths are kept relative to `out`, so that two builds side by side are the same bytes."""
    unique = list(dict.fromkeys(plan.sources))
    sources = [
        SourceRecord(
            label=source.label,
            spec=source.spec,
            revision=source.revision,
            folder=os.path.relpath(source.folder, out),
            files={
                file.name: FileRecord(size=file.stat().st_size, blake3=hashes[str(file)]) for file in source.files
            },
        )
        for source in unique
    ]  # fmt: skip
    return Record(
        format=1,
        modekit_version=version("modekit"),
        recipe=plan.recipe,
        recipe_digest=plan.recipe.digest(),
        recipe_folder=os.path.relpath(plan.root, out),
        dense_config=plan.family.dense_config(plan.sources[0].config),
        native_type=plan.native.native_type if plan.native is not None else None,
        dense_parameters=sum(ref.numel for ref in plan.sources[0].tensors.values()),
        expert_sources=[unique.index(source) for source in plan.sources[1:]],
        sources=sources,
        router=router,
    )
