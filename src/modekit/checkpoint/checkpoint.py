"""A finished checkpoint: modekit.json, the router file, and where every expert's tensors lie.

    OUT/config.json, model-*.safetensors, index, tokenizer   what plain transformers reads
    OUT/model-router.safetensors                              the gates, a file of their own: a re-fit rewrites only it
    OUT/modekit.json                                          recipe, sources with hashes, experts, router status
    OUT/router/<domain>.safetensors                           kept statistics of a fit
    OUT/results/                                              what `modekit eval` found

Shape legend: L layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from modekit.checkpoint.record import RECORD_FILE, Record, RouterRecord
from modekit.checkpoint.router_file import Gates, changed_index, read_gates, router_bytes, sha256_of
from modekit.errors import CheckpointError
from modekit.files.change import change_together, finish_change
from modekit.files.output import is_in_the_making, mend, work_folder
from modekit.files.read import LARGE, UNREADABLE, read_text
from modekit.files.write import json_bytes
from modekit.planning.plan import INDEX_FILE, ROUTER_FILE
from modekit.planning.shape import BUILD_AGAIN, Parameters, Shape
from modekit.planning.shapes import open_shape
from modekit.planning.slot import RouterSlot
from modekit.recipes.recipe import Recipe
from modekit.sources.model import ITEMSIZE, TensorRef, read_header


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder (or one in the making); `routed` is given where its routing is not that on disk."""

    folder: Path
    record: Record
    routed: Shape | None = field(default=None, compare=False)

    @cached_property
    def shape(self) -> Shape:
        """What its headers say. Raises CheckpointError when config.json or modekit.json are damaged."""
        if self.routed is not None:
            return self.routed
        record, config = self.record, self._read_json("config.json", "num_hidden_layers")
        dense_type = str(record.dense_config.get("model_type"))
        return open_shape(config, record.recipe, str(self.folder), record.native_type, dense_type)

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self.shape.config

    @cached_property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers, in the order of the layers."""
        return self.shape.slots

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors by name, read from the headers of the files that the index names."""
        weight_map = self._read_json(INDEX_FILE, "weight_map")["weight_map"]
        tensors: dict[str, TensorRef] = {}
        for file in sorted({str(file) for file in weight_map.values()}):
            tensors.update(read_header(self.folder / Path(file).name, where=str(self.folder)))
        for slot in self.slots if self.routed is None else ():  # other routers' gates are yet to be written
            if slot.name not in tensors:
                raise CheckpointError("the gate is missing", where=f"{self.folder}: {slot.name}", remedy=BUILD_AGAIN)
        self.shape.check(tensors)
        return tensors

    @property
    def parameters(self) -> Parameters:
        """How many it has."""
        return self.shape.parameters(self.tensors, self.record.dense_parameters)

    def gates(self) -> list[npt.NDArray[np.float32]]:
        """The gate of every router slot as it is on disk."""
        return read_gates(self.slots, self.tensors)

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
                f"{file} is missing or damaged", where=str(self.folder), found=error, remedy=BUILD_AGAIN
            ) from None  # fmt: skip
        return data

    def with_recipe(self, recipe: Recipe) -> Checkpoint:
        """The same experts under another recipe's routing: config and slots as they would be, nothing is written."""
        return replace(self, routed=self.shape.rerouted(recipe, self.tensors))

    def with_router(self, gates: Gates, router: RouterRecord, recipe: Recipe) -> Checkpoint:
        """Write new gates, the routing in config.json and modekit.json, all together; nothing else is touched."""
        changed = self.with_recipe(recipe)
        dtype = self._gate_dtype
        files = {ROUTER_FILE: router_bytes(changed.slots, gates, dtype)}
        if changed.slots != self.slots:
            old = {slot.name for slot in self.slots}
            kept = sum(ref.nbytes for name, ref in self.tensors.items() if name not in old)
            gates_size = sum(math.prod(slot.shape) * ITEMSIZE[dtype] for slot in changed.slots)
            files[INDEX_FILE] = changed_index(self.folder, changed.slots, kept + gates_size)
        files["config.json"] = json_bytes(changed.config)
        fitted = router.model_copy(update={"sha256": sha256_of(files[ROUTER_FILE])})
        update = {"router": fitted, "recipe": recipe, "recipe_digest": recipe.digest()}
        record = self.record.model_copy(update=update)
        self.change({**files, RECORD_FILE: json_bytes(record.model_dump(mode="json"))})
        return Checkpoint(self.folder, record)

    def change(self, files: Mapping[str, bytes]) -> None:
        """Replace or add files, by their path in the folder, all together.

        Raises CheckpointError when another command has changed the checkpoint since this one opened it, and OSError.
        """
        change_together(self.folder, files, check=self._check_unchanged)

    def _check_unchanged(self) -> None:
        try:
            now = Record.model_validate_json(read_text(self.folder / RECORD_FILE, LARGE))
        except FileNotFoundError:  # in the making, for the first time
            return
        except (*UNREADABLE, ValidationError):
            now = None
        if now != self.record:
            raise CheckpointError(
                "another command has changed the checkpoint meanwhile", where=str(self.folder), remedy="run the command again"
            )

    @property
    def _gate_dtype(self) -> str:
        if self.slots:
            return self.tensors[self.slots[0].name].dtype
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[self.config["dtype"]]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's record, config and headers.

    Raises CheckpointError when the folder is none, damaged or of another format, SourceError when a shard is damaged.
    """
    path = folder / RECORD_FILE
    if is_in_the_making(folder):
        raise CheckpointError(
            "an unfinished build is no checkpoint", where=str(folder), remedy="run the same `modekit build` again to finish it"
        )
    try:
        mend(folder)
        finish_change(folder)
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        partial = work_folder(folder)
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
    _ = checkpoint.tensors  # read now, so that damage shows before any work
    return checkpoint


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 when there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
