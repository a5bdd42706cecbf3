"""A finished checkpoint: modekit.json, the router file, and where every expert's tensors lie.

    OUT/config.json, model-*.safetensors, index, tokenizer   what plain transformers reads
    OUT/model-router.safetensors                              the gates, a file of their own: a re-fit rewrites only it
    OUT/modekit.json                                          recipe, sources with hashes, experts, router status
    OUT/router/<domain>.safetensors                           kept statistics of a fit
    OUT/results/                                              what `modekit eval` found

Shape legend: L layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from modekit.checkpoint.evidence_file import changed_blake3, embedding_writer
from modekit.checkpoint.record import RECORD_FILE, MixtureRecord, RouterRecord, SourceRecord
from modekit.checkpoint.router_file import Gates, changed_index, read_index, router_bytes, sha256_of
from modekit.errors import CheckpointError
from modekit.files.change import change_together
from modekit.files.marker import foreign_files
from modekit.files.read import LARGE, UNREADABLE, content_of, read_json
from modekit.files.typed import Count, as_kind, shortened
from modekit.files.write import Content, digest_of_data, json_bytes
from modekit.planning.channels import Channels
from modekit.planning.modekit_shape import without_names
from modekit.planning.plan import ROUTER_FILE, Shape, open_shape
from modekit.planning.shape import BUILD_AGAIN, Parameters, RouterSlot
from modekit.planning.tensors import EMBEDDING_FILE
from modekit.recipes.edit import RECIPE_FILE, as_file
from modekit.recipes.recipe import Recipe
from modekit.sources.config import Config, whole
from modekit.sources.contents import OpenFiles, read_header
from modekit.sources.digests import known_blake3
from modekit.sources.header import DTYPE_NAMES, ITEMSIZE, TensorRef
from modekit.sources.names import weight_of
from modekit.sources.tokenizer import COPIED_FILES
from modekit.sources.weight_files import INDEX_FILE
from modekit.weights.flat import read_float32
from modekit.weights.numeric import Singles


class _Config(BaseModel):
    """What every config.json of a mixture says."""

    architectures: list[str] = Field(min_length=1)
    dtype: Literal["float32", "bfloat16", "float16"]
    model_type: str
    hidden_size: Annotated[Count, Field(ge=1)] | None = None
    num_hidden_layers: Annotated[Count, Field(ge=1)] | None = None
    vocab_size: Annotated[Count, Field(ge=1)]

    @model_validator(mode="after")
    def _sized(self) -> _Config:
        """Of the modekit architecture, whose families have other names for it, its own shape asks."""
        if self.model_type != "modekit" and (self.hidden_size is None or self.num_hidden_layers is None):
            raise ValueError("hidden_size and num_hidden_layers must be given")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; `known` is its shape where none is read: of one in the making, or under other routing.

    `notes` are of the build that has just made it.
    """

    folder: Path
    record: MixtureRecord
    known: Shape | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def shape(self) -> Shape:
        """What its headers say. Raises CheckpointError when config.json or modekit.json are damaged."""
        if self.known is not None:
            return self.known
        record = self.record
        try:
            config = read_json(self.folder / "config.json")
            as_kind(config, _Config)
        except UNREADABLE as error:
            raise self._damaged("config.json", error) from None
        return open_shape(config, record.recipe, str(self.folder), record.native_type, record.dense_config, record.carry)

    @property
    def config(self) -> Config:
        """config.json."""
        return self.shape.config

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding."""
        return whole(self.config, "vocab_size")

    @cached_property
    def slots(self) -> tuple[RouterSlot, ...]:
        """The routers, in the order of the layers."""
        return self.shape.slots

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors by name, read from the headers of the files that the index names."""
        try:
            files = sorted(set(read_index(self.folder).values()))
        except UNREADABLE as error:
            raise self._damaged(INDEX_FILE, error) from None
        tensors: dict[str, TensorRef] = {}
        for file in files:
            tensors.update(read_header(self.folder / file, where=str(self.folder)))
        if self.known is None:  # else it was checked, or planned, and other routers' gates are yet to be written
            self.shape.check(tensors)
            for slot in self.slots:
                if slot.name not in tensors:
                    raise CheckpointError("the gate is missing", where=f"{self.folder}: {slot.name}", remedy=BUILD_AGAIN)
        return tensors

    @property
    def parameters(self) -> Parameters:
        """How many it has."""
        sizes = {name: ref.numel for name, ref in self.tensors.items()}
        return self.shape.parameters(sizes, self.record.dense_parameters)

    def gates(self) -> list[Singles]:
        """The gate of every router slot as it is on disk."""
        with OpenFiles() as opened:
            return [read_float32(opened, self.tensors[slot.name]) for slot in self.slots]

    @cached_property
    def identity(self) -> dict[str, str]:
        """What names it as it is, in digests: everything that is kept beside it is of this very mixture, or made anew.

        Weights (but for the two files that a router is written into), tokenizer and config are those that lie there now.
        Raises SourceError.
        """
        files = {ref.file for ref in self.tensors.values()}
        record = self.record
        digests = {file.name: known_blake3(file) for file in sorted(files) if file.name != ROUTER_FILE}
        made_from = [[source.digests for source in record.sources], record.expert_sources]
        return {
            "recipe_digest": record.recipe_digest,
            "sources": digest_of_data(made_from),
            "trained": digest_of_data(sorted(record.trained.items())) if record.trained else "",
            "router_sha256": record.router.sha256,
            "evidence_sha256": record.router.evidence,
            "embedding": digests.pop(EMBEDDING_FILE, ""),
            "weights": digest_of_data(digests),
            "tokenizer": digest_of_data([sha256_of(content_of(self.folder / name, LARGE)) for name in sorted(COPIED_FILES)]),
            "config": digest_of_data(without_names(self.config)),
        }

    @property
    def names(self) -> list[str]:
        """Experts in recipe order."""
        return self.record.recipe.names

    @property
    def layers(self) -> int:
        """L."""
        return sum(self.shape.family.sizes(self.config).values())

    @property
    def recipe_root(self) -> Path:
        """The folder that the recipe's paths are relative to."""
        return Path(os.path.realpath(self.folder / self.record.recipe_folder))  # Path.resolve raises where links go round

    def source_folder(self, source: SourceRecord) -> Path:
        """Where a model that it was made from lay."""
        return Path(os.path.realpath(self.folder / source.folder))

    def _damaged(self, file: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{file} is missing or damaged",
            where=str(self.folder),
            found=shortened(error),
            remedy=BUILD_AGAIN,
        )

    def with_recipe(self, recipe: Recipe) -> Checkpoint:
        """The same experts under another recipe's routing: config and slots as they would be, nothing is written."""
        return replace(self, known=self.shape.rerouted(recipe, self.tensors))

    def router_files(
        self, gates: Gates, router: RouterRecord, recipe: Recipe, *, evidence: memoryview | None = None
    ) -> tuple[MixtureRecord, dict[str, Content]]:
        """What becomes of the record, and of the files beside it, with another router.

        `evidence`: the columns of the embedding that carry it, where the router reads it there (evidence_file.py).
        """
        changed = self.with_recipe(recipe)
        dtype = next(code for code, name in DTYPE_NAMES.items() if name == self.config["dtype"])
        if self.slots and (found := self.tensors[self.slots[0].name].dtype) in DTYPE_NAMES:
            dtype = found
        gate_file = router_bytes(changed.slots, gates, dtype)
        files: dict[str, Content] = {ROUTER_FILE: gate_file}
        fitted = router.model_copy(update={"sha256": sha256_of(gate_file)})
        trained = self.record.trained
        if evidence is not None:
            channels, embedding = self.carrier
            files[EMBEDDING_FILE] = embedding_writer(channels, embedding, evidence)
            fitted = fitted.model_copy(update={"report": {**fitted.report, "evidence_sha256": sha256_of(evidence)}})
            if embedding.name in trained:
                trained = {**trained, embedding.name: changed_blake3(channels, embedding, evidence)}
        if changed.slots != self.slots:
            old = {slot.name for slot in self.slots}
            kept = sum(ref.nbytes for name, ref in self.tensors.items() if name not in old)
            gates_size = sum(math.prod(slot.shape) * ITEMSIZE[dtype] for slot in changed.slots)
            files[INDEX_FILE] = changed_index(self.folder, changed.slots, kept + gates_size)
        files["config.json"] = json_bytes(changed.shape.config)
        update = {"router": fitted, "recipe": recipe, "recipe_digest": recipe.digest(), "trained": trained}
        return self.record.model_copy(update=update), files

    def recipe_file(self, recipe: Recipe, folder: Path) -> dict[str, Content]:
        """The file of a changed recipe, for the mixture in a folder, where modekit wrote one beside this one."""
        foreign = foreign_files(self.folder)
        if not (self.folder / RECIPE_FILE).is_file() or foreign is None or RECIPE_FILE in foreign:
            return {}
        return {RECIPE_FILE: as_file(recipe, self.recipe_root, folder)}

    @property
    def carrier(self) -> tuple[Channels, TensorRef]:
        """What carries a router's evidence: the channels, and the embedding that they begin in."""
        assert self.shape.channels is not None
        return self.shape.channels, self.tensors[weight_of(self.shape.family.embedding)]

    def change(self, files: Mapping[str, Content]) -> None:
        """Replace or add files, by their path in the folder, all together.

        Raises CheckpointError when another command has changed the checkpoint since this one opened it, and OSError.
        """
        change_together(self.folder, files, check=self.check_unchanged)

    def check_unchanged(self) -> None:
        """Raise CheckpointError when another command has changed the checkpoint since this one opened it."""
        try:
            now = as_kind(read_json(self.folder / RECORD_FILE), MixtureRecord)
        except FileNotFoundError:  # in the making, for the first time
            return
        except UNREADABLE:
            now = None
        if now != self.record:
            raise CheckpointError(
                "another command has changed the checkpoint meanwhile", where=str(self.folder), remedy="run the command again"
            )
