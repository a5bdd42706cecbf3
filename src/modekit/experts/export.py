"""Adapters of a modekit checkpoint back as ordinary PEFT folders: `modekit export OUT FOLDER`.

FOLDER/<expert>/adapter_config.json, adapter_model.safetensors    what PEFT reads
FOLDER/<expert>/export.json                                       where it comes from, and what to know of it

Low-rank parts are cut out of the mixture, bit for bit. What was folded into whole modules (DoRA, biases) cannot be: the
adapter's own folder still has it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import UnsupportedError
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name, write_lora
from modekit.files.change import mend
from modekit.files.copies import copy_file
from modekit.files.marker import foreign_files
from modekit.files.place import replaced_by
from modekit.files.read import UNREADABLE
from modekit.files.staging import staging
from modekit.files.typed import read_as
from modekit.files.write import write_json
from modekit.planning.mixture_config import Place
from modekit.recipes.paths import locate
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.names import HEAD, module_of
from modekit.text.splits import TRAINED_FILE
from modekit.weights.numeric import as_array

EXPORT_FILE = "export.json"
_BESIDE = (TRAINED_FILE, "README.md")
"""Files that go with an adapter: text that must never score it, and what it says of itself and its licence."""


class ExportRecord(BaseModel, frozen=True):
    """The content of export.json: the checkpoint's `identity`, the largest `rank`, how many `modules` the adapter changes."""

    expert: str
    identity: dict[str, str]
    rank: int
    modules: int
    notes: list[str]


def why_not(checkpoint: Checkpoint, expert: int) -> str | None:
    """Why an expert cannot leave the mixture as an adapter; None where it can."""
    asked, places = checkpoint.record.recipe.experts[expert], places_of(checkpoint, expert)
    if asked.is_base:
        return "it is the base model"
    if asked.adapter is None and asked.lora_rank is None:
        return "it is a full model: `modekit extract` makes an adapter of it"
    if checkpoint.record.tokens is not None and HEAD in places:
        return "its head has rows for the tokens of other models"
    if not places or any(not place.is_low_rank(expert) for place in places.values()):
        return f"parts of it are no low-rank changes (DoRA, biases): {asked.adapter} has them"
    return None


def exportable(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[int]:
    """Experts that can leave: all of those that are named, else those that can, in recipe order.

    Raises UnsupportedError when the checkpoint is native, or an expert that is named cannot leave, or none can.
    """
    _ = checkpoint.shape.mixture  # which says so when experts are whole
    reasons = {name: why_not(checkpoint, expert) for expert, name in enumerate(checkpoint.names)}
    able = [name for name, reason in reasons.items() if reason is None]
    for name in (names or ()) if able else checkpoint.names:
        reason = reasons.get(name, "there is no such expert")
        if reason is not None:
            raise UnsupportedError(
                "the expert is no adapter that PEFT could hold",
                where=f"{checkpoint.folder}: expert '{name}'",
                found=reason,
                expected=", ".join(able) or "an expert that can be exported (there is none here)",
                remedy="name one of these, or see `modekit extract` for full models",
            )
    return [checkpoint.names.index(name) for name in names or able]


def write_export(checkpoint: Checkpoint, expert: int, out: Path, *, overwrite: bool = False, run: Run = QUIET) -> ExportRecord:
    """Write one expert that can leave. Raises OutputError."""
    config, name = adapter_config_of(checkpoint, expert), checkpoint.names[expert]
    record = ExportRecord(
        expert=name,
        identity=checkpoint.identity,
        rank=int(str(config["r"])),
        modules=sum(map(len, _changes_of(checkpoint, expert))),
        notes=list(_notes(checkpoint, expert)),
    )
    if not overwrite and _is_written(out, record):
        return record
    digest = hashlib.sha256(json.dumps([checkpoint.identity, name]).encode()).hexdigest()
    origin = checkpoint.record.sources[checkpoint.record.expert_sources[expert]]
    own, replace = (checkpoint.folder / origin.folder).resolve(), replaced_by(overwrite)
    with (
        OpenFiles() as opened,
        staging(out, digest, "adapter", sources=[checkpoint.folder, own], replace=replace, sync=run.sync) as stage,
    ):
        write_lora(stage, config, list(adapter_tensors_of(checkpoint, expert, opened)))
        for path in (own / file for file in _BESIDE):
            if path.is_file() and checkpoint.record.recipe.experts[expert].adapter is not None:
                copy_file(path, stage.folder / path.name)
        write_json(stage.folder / EXPORT_FILE, record.model_dump(mode="json"))
    return record


def _is_written(out: Path, record: ExportRecord) -> bool:
    """Whether an earlier run of the command, perhaps killed at a later expert, wrote this very adapter."""
    try:
        mend(out)
        return foreign_files(out) == [] and read_as(out / EXPORT_FILE, ExportRecord) == record
    except UNREADABLE:
        return False


def _notes(checkpoint: Checkpoint, expert: int) -> Iterator[str]:
    """Where the mixture's expert is not the adapter that it was built from."""
    recipe = checkpoint.record.recipe
    if recipe.output.dtype != "source":
        yield f"the mixture holds its tensors in {recipe.output.dtype} (output.dtype)"
    parts = tuple(f"{module}.{part}" for module in places_of(checkpoint, expert) for part in ("lora_", "inside."))
    if any(name.startswith(parts) for name in checkpoint.record.trained):
        yield "it was trained on in the mixture (modekit train)"
    if isinstance(recipe.mixture.modules, list) or recipe.mixture.layers is not None:
        yield "only what the mixture mixes is here (mixture.modules, mixture.layers)"
    if recipe.mixture.backbone != BASE:
        yield "the adapter changes the base model; in the mixture it stands on a merged backbone (mixture.backbone)"
    own = tuple(f"{module}.{part}" for module in checkpoint.shape.mixture.places for part in ("lora_", "inside.", "experts."))
    if not all(name.startswith(own) for name in checkpoint.record.trained):
        yield "the adapter changes the base model; in the mixture it stands on a trained backbone (modekit train)"
    if recipe.experts[expert].lora_rank is not None:
        yield "a low-rank part of a full model's difference to the base (as: lora)"


def places_of(checkpoint: Checkpoint, expert: int) -> dict[str, Place]:
    """Module -> its place, where an expert has something of its own."""
    return {module: place for module, place in checkpoint.shape.mixture.places.items() if place.has(expert)}


def adapter_config_of(checkpoint: Checkpoint, expert: int) -> dict[str, object]:
    """adapter_config.json of what the mixture has of an expert."""
    changes, inside = _changes_of(checkpoint, expert)
    recipe = checkpoint.record.recipe
    folder = locate(recipe.base_model, checkpoint.recipe_root)
    base = recipe.base_model if folder is None else str(folder.resolve())  # PEFT finds it, whatever folder it is called from
    config = lora_config(base, changes, inside, has_encoder=checkpoint.shape.family.reads == "pairs")
    return {**config, "revision": recipe.revision}


def _changes_of(checkpoint: Checkpoint, expert: int) -> tuple[dict[str, ModuleChange], dict[str, ModuleChange]]:
    """What an expert changes: modules, and parameters of places that are themselves mixtures."""
    changes, inside = dict[str, ModuleChange](), dict[str, ModuleChange]()
    for module, place in places_of(checkpoint, expert).items():
        if place.ranks[expert]:
            changes[module] = ModuleChange(place.ranks[expert], place.scales[expert])
        for each in place.inside:
            if each.ranks[expert]:
                inside[f"{module}.{each.tensor}"] = ModuleChange(each.ranks[expert], each.scales[expert])
    return changes, inside


def adapter_tensors_of(checkpoint: Checkpoint, expert: int, opened: OpenFiles) -> Iterator[PeftTensor]:
    """A (R, I) and B (O, R) of every module, A (E R, I) and B (O, R E) of fused experts."""
    for module, place in sorted(places_of(checkpoint, expert).items()):
        held = [(module, module, place.ranks)] if place.ranks[expert] else []
        changed = [each for each in place.inside if each.ranks[expert]]
        for number, each in enumerate(changed):
            owner = module_of(f"{module}.{each.tensor}")
            around = sum(module_of(f"{module}.{other.tensor}") == owner for other in changed[number + 1 :])
            held.append((f"{module}.{each.name}", owner + ".base_layer" * around, each.ranks))  # the class's last is outermost
        for name, called, ranks in held:
            for axis, side in enumerate("AB"):
                ref = checkpoint.tensors[f"{name}.lora_{side}"]
                times = ref.shape[axis] // sum(ranks)
                own = slice(times * sum(ranks[:expert]), times * sum(ranks[: expert + 1]))
                yield _cut(peft_name(called, f"lora_{side}.weight"), ref, axis, own, opened)


def _cut(name: str, ref: TensorRef, axis: int, own: slice, opened: OpenFiles) -> PeftTensor:
    """A part of a tensor's rows (axis 0) or columns, read when it is asked for."""

    def read() -> memoryview:
        whole = as_array(opened.read(ref), ref.dtype).reshape(ref.shape)
        view: memoryview = np.ascontiguousarray(whole[own] if axis == 0 else whole[:, own]).view(np.uint8).reshape(-1).data
        return view

    shape = tuple(own.stop - own.start if at == axis else size for at, size in enumerate(ref.shape))
    return PeftTensor(name, ref.dtype, shape, math.prod(shape) * ITEMSIZE[ref.dtype], read)
