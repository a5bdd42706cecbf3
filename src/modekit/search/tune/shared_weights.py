"""Shared weights: everything of a mixture but what its routers say, written once for all candidates that have it in common.

    WORK/tensors/<digest>.safetensors   the experts, or the backbone, of one layer
    WORK/weights/<digest>/              a modekit checkpoint whose shards are links to those, its gates zero
    WORK/statistics/<digest>/           what routers read on one backbone

Two candidates with the same backbone share all of it; two with different backbones share their experts' bytes.

Shape legend: E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from modekit.architecture.modekit_router import Router as RouterModule
from modekit.building.build import write_tensor
from modekit.building.tensors import PieceReader
from modekit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, RouterRecord, make_record
from modekit.checkpoint.router_file import Gates, write_index, write_router_file
from modekit.files.lock import waiting
from modekit.files.tensors import safetensors_header, write_all
from modekit.files.write import appearing, create, link_file, make_folder, remove, write_file, write_json
from modekit.loaded.load import load_model
from modekit.loaded.modekit import routers_at
from modekit.planning.make import make_plan
from modekit.planning.mixture_config import MixtureConfig
from modekit.planning.pieces import PlannedTensor, Shard
from modekit.planning.plan import ROUTER_FILE, Plan
from modekit.recipes.edit import as_written, changed_mixture, with_mixture
from modekit.recipes.fits import RECIPE
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Output, Recipe
from modekit.recipes.router import Router
from modekit.routing.fit import fit_router
from modekit.routing.fitting import Fitting
from modekit.routing.read import read_statistics
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.model import TensorRef
from modekit.sources.names import split_layer
from modekit.sources.tokenizer import copied_content
from modekit.weights.numeric import as_array, to_bytes, to_float32


class SharedWeights:
    """The weights and statistics in a work folder. Processes may use it at once."""

    def __init__(self, work: Path, root: Path, *, averages: Sequence[float | None] = (), run: Run = QUIET) -> None:
        self._work, self._root, self._run = work, root, run
        self._averages = averages
        self._gates: dict[str, Gates] = {}

    def plan(self, recipe: Recipe) -> Plan:
        """Of a candidate: in the modekit architecture, which says all of them."""
        output = Output(format="modekit", dtype=recipe.output.dtype)
        return make_plan(recipe.model_copy(update={"output": output}), self._root, run=self._run)

    def checkpoint(self, plan: Plan) -> Checkpoint:
        """The weights of a plan, written if need be, under the plan's routing; the gates are zero."""
        recipe = plan.recipe
        if recipe.mixture.method == "linear":  # the weights have routers, whether its candidate asks them or not
            raw = as_written(recipe)
            routed = changed_mixture(raw["mixture"], {"method": "routing", "router": {"fit": "random"}})
            plan = self.plan(parse_recipe(with_mixture(raw, routed)))
        plan = replace(plan, shards=tuple(_by_layer(plan)))
        folder = (
            self._work
            / "weights"
            / _digest([structure(plan.shape.mixture), [_identities(plan, shard) for shard in plan.shards]])
        )
        make_folder(folder.parent)
        with waiting(folder.with_suffix(".lock")):
            if not (folder / RECORD_FILE).exists():
                with appearing(folder, sync=False) as partial:
                    make_folder(partial)
                    self._write(plan, folder, partial)
        return open_checkpoint(folder).with_recipe(recipe)

    def gates(self, shared: Checkpoint, recipe: Recipe) -> Gates:
        """What a candidate's routers say over shared weights: fitted on statistics that are read once for a backbone and a
        granularity. Raises TextError, RecipeError.
        """
        mixture, router = recipe.mixture, recipe.mixture.router
        if mixture.fit is None or mixture.fit.reads is RECIPE:
            return fit_router(Fitting(shared, recipe, self._root, self._work)).gates
        # Logits are divided by the temperature, so that one fit serves all.
        plain = router.model_copy(update={"temperature": 1.0})
        folder = self.statistics_of(recipe, router)
        key = _digest([str(folder), plain.model_dump(mode="json"), shared.folder.name if mixture.fit.reads.low_rank else ""])
        if key not in self._gates:
            make_folder(folder.parent)
            unscaled = recipe.model_copy(update={"mixture": mixture.model_copy(update={"router": plain})})
            together = self._read_with(recipe, router)
            with waiting(next(iter(together)).with_suffix(".lock")):
                if mixture.fit.reads.hidden:
                    read_statistics(shared, unscaled, self._root, together, run=self._run)
                fitted = fit_router(Fitting(shared, unscaled, self._root, folder, self._run))
            self._gates[key] = fitted.gates
        experts = slice(None, -mixture.fit.score.besides or None)  # how rare terms are has no temperature
        gates = [gate.copy() for gate in self._gates[key]]
        for gate in gates:
            gate[experts] /= np.float32(router.temperature)
        return gates

    def statistics_of(self, recipe: Recipe, router: Router) -> Path:
        """Where the statistics lie that a router is fitted on."""
        reads: dict[str, Any] = {"ngram": [router.order, router.buckets]}
        if not router.row.reads.tokens:
            says = recipe.mixture.model_dump(mode="json", include={"backbone", "modules", "layers"})
            reads = {**says, "averages": router.averages, "prefix": router.prefix_tokens, "scope": router.scope}
            reads["negatives"] = [expert.negative_prompts for expert in recipe.experts]  # of a centroid fit alone
        return self._work / "statistics" / _digest(reads)

    def _read_with(self, recipe: Recipe, router: Router) -> dict[Path, Router]:
        """Folder -> settings of every router of the search that reads the same text through the same models."""
        if router.prefix_tokens is not None or not router.row.reads.hidden or len(router.averages) > 1:
            return {self.statistics_of(recipe, router): router}
        update = {"fit": "ridge", "temperature": 1.0}
        routers = [
            router.model_copy(
                update={**update, "granularity": "token", "decay": None}
                if decay is None
                else {**update, "granularity": "context", "decay": [decay]}
            )
            for decay in dict.fromkeys([*self._averages, router.averages[0]["decay"]])
        ]
        return {self.statistics_of(recipe, each): each for each in routers}

    def remove(self) -> None:
        """Remove the weights; statistics stay, for a search that goes on."""
        for name in ("weights", "tensors"):
            remove(self._work / name)

    def _write(self, plan: Plan, folder: Path, partial: Path) -> None:
        """Write everything into `partial`, which will be `folder`."""
        pool = self._work / "tensors"
        make_folder(pool)
        with OpenFiles() as opened:
            read = PieceReader(opened)
            for shard in plan.shards:
                kept = pool / (_digest(_identities(plan, shard)) + ".safetensors")
                with waiting(kept.with_suffix(".lock")):
                    if not kept.exists():
                        _write_shard(plan, shard, kept, read)
                link_file(kept, partial / shard.file)
        write_index(plan, partial)
        write_json(partial / "config.json", dict(plan.shape.written))
        for file in (*plan.copied_files, *plan.shape.code_files):
            write_file(partial / file.name, copied_content(file), sync=False)
        for name, content in plan.written_files.items():
            write_file(partial / name, content, sync=False)
        zeros = [np.zeros(slot.shape, np.float32) for slot in plan.slots]
        sha256 = write_router_file(partial / ROUTER_FILE, plan.slots, zeros, plan.router_dtype)
        # Sources are hashed by the build of what the search finds; nothing here is shown.
        hashes = {str(file): "" for source in plan.sources for file in source.files}
        record = make_record(plan, folder, hashes, RouterRecord.unfitted(plan.recipe, sha256))
        write_json(partial / RECORD_FILE, record.model_dump(mode="json"), sync=False)


def _by_layer(plan: Plan) -> list[Shard]:
    """Shards such that what candidates may share is a file: a layer's experts, a layer's backbone, the rest."""
    groups: dict[tuple[str, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.role != "router":
            layer, _ = split_layer(tensor.name)
            groups.setdefault(("rest" if layer is None else str(layer), tensor.role), []).append(tensor)
    return [Shard(f"model-{layer}-{role}.safetensors", tuple(tensors)) for (layer, role), tensors in groups.items()]


def _write_shard(plan: Plan, shard: Shard, path: Path, read: PieceReader) -> None:
    with appearing(path, sync=False) as partial, create(partial) as stream:
        entries = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors]
        write_all(stream, memoryview(safetensors_header(entries)))
        for tensor in shard.tensors:
            write_tensor(plan, tensor, read, stream)


def _identities(plan: Plan, shard: Shard) -> list[Any]:
    """What distinguishes a shard's bytes from those of others."""
    merge = plan.recipe.mixture.merge
    return [
        [
            tensor.name,
            tensor.dtype,
            list(tensor.shape),
            tensor.operation,
            tensor.factor,
            [piece.identity() for piece in tensor.pieces],
            merge.model_dump(mode="json") if tensor.operation == "merge" and merge is not None else None,
        ]
        for tensor in shard.tensors
    ]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


_Bytes = tuple[int, int, int]


class SwitchedModel:
    """One loaded model that becomes one candidate after the other: only what differs is read."""

    def __init__(self, *, run: Run = QUIET) -> None:
        self._run = run
        self._places: dict[str, dict[str, object]] | None = None
        self._bytes: dict[str, _Bytes] = {}
        self._model: PreTrainedModel | None = None
        self.loads = 0

    def clear(self) -> None:
        """Give the memory back."""
        self._model, self._places, self._bytes = None, None, {}

    def put(self, shared: Checkpoint, gates: Gates) -> PreTrainedModel:
        """The mixture of shared weights under their routing and these gates."""
        places = structure(shared.shape.mixture)
        refs = {name: ref for name, ref in shared.tensors.items() if not name.endswith(".router.gate")}
        if self._model is None or places != self._places:
            self.clear()
            self._model = load_model(shared.folder, run=self._run)
            self.loads += 1
        else:
            self._read(self._model, {name: ref for name, ref in refs.items() if self._bytes[name] != _bytes_of(ref)})
        self._places, self._bytes = places, {name: _bytes_of(ref) for name, ref in refs.items()}
        _route(self._model, shared, gates)
        return self._model

    def _read(self, model: PreTrainedModel, refs: dict[str, TensorRef]) -> None:
        """Put tensors of other weights into the model."""
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        by_file: dict[Path, list[str]] = {}
        for name, ref in refs.items():
            by_file.setdefault(ref.file, []).append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    state[name].data.copy_(tensors.get_tensor(name))


def structure(mixture: MixtureConfig) -> dict[str, dict[str, object]]:
    """Where routers stand and what they read; a gate's rows are set with the gate."""
    return {name: place.model_dump(exclude_unset=True, exclude={"rows"}) for name, place in mixture.places.items()}


def _route(model: PreTrainedModel, shared: Checkpoint, gates: Gates) -> None:
    """Let every router of the model decide as the routing of the weights says."""
    routing = shared.shape.routing.as_written()
    for module in model.modules():  # also those that a routing of fixed weights has no gates for
        if isinstance(module, RouterModule):
            module.set(routing)
    for router, slot, gate in zip(routers_at(model, shared.slots), shared.slots, gates, strict=True):
        code = shared.tensors[slot.name].dtype  # in which a build would write it
        rounded = to_float32(as_array(to_bytes(gate.ravel(), code), code)).reshape(gate.shape)
        held = torch.nn.Parameter(torch.from_numpy(rounded.copy()).to(model.device), requires_grad=False)
        router.set(routing, slot.rows, held)


def _bytes_of(ref: TensorRef) -> _Bytes:
    """Where a tensor's bytes lie, whatever the file is called here."""
    stat = ref.file.stat()
    return stat.st_dev, stat.st_ino, ref.start
