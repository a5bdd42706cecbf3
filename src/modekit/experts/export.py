"""Adapters of a modekit checkpoint back as ordinary PEFT folders: `modekit export OUT FOLDER`.

FOLDER/<expert>/adapter_config.json, adapter_model.safetensors    what PEFT reads
FOLDER/<expert>/export.json                                       where it comes from, and what to know of it

An adapter whose own folder is still what the mixture was built from is given back file by file, whatever its kind. Otherwise
its low-rank parts are cut out of the mixture, bit for bit; what was folded into whole modules (DoRA, IA3, biases) cannot be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import changed_settings
from modekit.errors import ModekitError, UnsupportedError
from modekit.experts.peft_folder import ModuleChange, PeftTensor, lora_config, peft_name, write_lora
from modekit.files.marker import foreign_files
from modekit.files.output import mend, replaced_by
from modekit.files.read import UNREADABLE
from modekit.files.staging import staging
from modekit.files.typed import read_as
from modekit.files.write import copy_file, write_json
from modekit.planning.mixture_config import Place
from modekit.recipes.paths import locate
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.adapter import WEIGHTS_FILE, AdapterSource, open_adapter
from modekit.sources.adapter_config import CONFIG_FILE
from modekit.sources.contents import OpenFiles, blake3_of
from modekit.sources.header import ITEMSIZE, TensorRef
from modekit.sources.names import HEAD
from modekit.sources.source import open_source
from modekit.text.splits import TRAINED_FILE
from modekit.weights.numeric import as_array

EXPORT_FILE = "export.json"
_BESIDE = (TRAINED_FILE, "README.md")
"""Files that go with an adapter: text that must never score it, and what it says of itself and its licence."""


class ExportRecord(BaseModel, frozen=True):
    """The content of export.json.

    Attributes:
        identity: of the checkpoint.
        kind: LoRA, rsLoRA, DoRA or IA3; `rank` is the largest of its modules, None for IA3.
        modules: how many the adapter changes.
        as_it_came: whether it is the adapter's own files, or cut out of the mixture.
    """

    expert: str
    identity: dict[str, str]
    kind: str
    rank: int | None
    modules: int
    as_it_came: bool
    notes: list[str]


@dataclass(frozen=True)
class ExportPlan:
    """How an expert leaves a mixture: as its own files, cut out of the mixture, or, when `reason` says why, not at all.

    Attributes:
        own: the adapter's own folder; None for an expert that never had one.
        notes: what to know of what is written.
    """

    expert: int
    name: str
    own: OwnFiles | None = None
    reason: str | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def as_it_came(self) -> bool:
        """Whether its own files are given back."""
        return self.own is not None and self.own.problem is None


def plan_exports(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> list[ExportPlan]:
    """How experts can leave: those that are named, else all in recipe order. Reads the adapters' own folders.

    Raises UnsupportedError when the checkpoint is native, or an expert that is named cannot leave.
    """
    _ = checkpoint.shape.mixture  # which says so when experts are whole
    plans = {name: _plan_export(checkpoint, expert, name) for expert, name in enumerate(checkpoint.names)}
    for name in names or ():
        reason = plans[name].reason if name in plans else "there is no such expert"
        if reason is not None:
            able = ", ".join(plan.name for plan in plans.values() if plan.reason is None)
            raise UnsupportedError(
                "the expert is no adapter that PEFT could hold",
                where=f"{checkpoint.folder}: expert '{name}'",
                found=reason,
                expected=able or "an expert that can be exported (there is none here)",
                remedy="name one of these, or see `modekit extract` for full models",
            )
    return [plans[name] for name in names or plans]


def write_export(
    checkpoint: Checkpoint, plan: ExportPlan, out: Path, *, overwrite: bool = False, run: Run = QUIET
) -> ExportRecord:
    """Write one expert as planned (`reason` is None). Raises OutputError."""
    given_back = plan.own if plan.as_it_came else None
    known = plan.own.config if plan.own is not None and plan.own.config.get("peft_type") == "LORA" else {}
    config = dict(given_back.config) if given_back is not None else adapter_config_of(checkpoint, plan.expert, known)
    rank = config.get("r")
    record = ExportRecord(
        expert=plan.name,
        identity=checkpoint.identity,
        kind=_kind(config),
        rank=rank if isinstance(rank, int) else None,
        modules=len(places_of(checkpoint, plan.expert)),
        as_it_came=plan.as_it_came,
        notes=list(plan.notes),
    )
    digest = hashlib.sha256(json.dumps([checkpoint.identity, plan.name, plan.as_it_came]).encode()).hexdigest()
    if not overwrite and _is_written(out, record):
        return record
    sources = [checkpoint.folder, *([plan.own.folder] if plan.own is not None else [])]
    with (
        OpenFiles() as opened,
        staging(out, digest, "adapter", sources=sources, replace=replaced_by(overwrite), sync=run.sync) as stage,
    ):
        if given_back is not None:
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                copy_file(given_back.folder / file, stage.folder / file)
        else:
            write_lora(stage, config, list(adapter_tensors_of(checkpoint, plan.expert, opened)))
        for path in (source / file for source in sources[1:] for file in _BESIDE):
            if path.is_file():
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


def _plan_export(checkpoint: Checkpoint, expert: int, name: str) -> ExportPlan:
    asked = checkpoint.record.recipe.experts[expert]
    if asked.is_base:
        return ExportPlan(expert, name, reason="it is the base model")
    if asked.adapter is None and asked.lora_rank is None:
        kept = "" if asked.bits is None else ", kept in a few bits: `modekit extract` makes an adapter of it"
        return ExportPlan(expert, name, reason=f"it is a full model{kept}")
    own = own_files(checkpoint, expert) if asked.adapter is not None else None
    notes = tuple(dict.fromkeys(_notes(checkpoint, expert, own)))
    if own is not None and own.problem is not None:
        places = places_of(checkpoint, expert)
        if checkpoint.record.tokens is not None and HEAD in places:
            reason = f"its head has rows for the tokens of other models, and {own.problem}"
            return ExportPlan(expert, name, own, reason)
        if not places or any(not place.ranks[expert] for place in places.values()):
            reason = f"parts of it are no low-rank changes (DoRA, IA3, biases), and {own.problem}"
            return ExportPlan(expert, name, own, reason)
    return ExportPlan(expert, name, own, notes=notes)


def _notes(checkpoint: Checkpoint, expert: int, own: OwnFiles | None) -> Iterator[str]:
    """Where the adapter is not the one that the mixture was built from, or the mixture's expert not the adapter."""
    recipe = checkpoint.record.recipe
    if own is not None and own.problem is not None:
        yield own.problem
    if recipe.output.dtype != "source":
        yield f"the mixture holds its tensors in {recipe.output.dtype} (output.dtype)"
    if is_trained(checkpoint, expert):
        yield TRAINED
    limited = isinstance(recipe.mixture.modules, list) or recipe.mixture.layers is not None
    if own is not None and own.problem is not None and not own.config and limited:
        yield "only what the mixture mixes is here (mixture.modules, mixture.layers); the rest of the adapter is not in it"
    if recipe.mixture.backbone != BASE:
        yield "the adapter changes the base model; in the mixture it stands on a merged backbone (mixture.backbone)"
    if recipe.experts[expert].lora_rank is not None:
        yield "a low-rank part of a full model's difference to the base (as: lora)"


def _kind(config: Mapping[str, object]) -> str:
    if config["peft_type"] != "LORA":
        return str(config["peft_type"])
    return "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"


TRAINED = "it was trained on in the mixture (modekit train)"


@dataclass(frozen=True)
class OwnFiles:
    """An adapter's folder and its config as they are now; `problem` says why they are not what the mixture was built from."""

    folder: Path
    config: Mapping[str, object] = field(default_factory=dict)
    problem: str | None = None


def places_of(checkpoint: Checkpoint, expert: int) -> dict[str, Place]:
    """Module -> its place, where an expert has something of its own."""
    return {module: place for module, place in checkpoint.shape.mixture.places.items() if place.has(expert)}


def is_trained(checkpoint: Checkpoint, expert: int) -> bool:
    """Whether `modekit train` moved a part of an expert since the build."""
    for module, place in places_of(checkpoint, expert).items():
        if f"{module}.expert_{expert}" in checkpoint.record.trained:
            return True
        own = f"{module}.experts.{place.own.index(expert)}." if expert in place.own else f"{module}.lora_"
        if any(name.startswith(own) for name in checkpoint.record.trained):
            return True
    return False


def own_files(checkpoint: Checkpoint, expert: int) -> OwnFiles:
    """Look at the folder of an adapter expert. Reads its weights once; raises nothing, a problem is part of the answer."""
    record = checkpoint.record.sources[checkpoint.record.expert_sources[expert]]
    folder = (checkpoint.folder / record.folder).resolve()
    try:
        for name, expected in record.files.items():
            file = folder / name
            if not file.is_file():
                return OwnFiles(folder, problem=f"its own folder is missing ({folder})")
            if file.stat().st_size != expected.size or blake3_of(file) != expected.blake3:
                return OwnFiles(folder, problem=f"{name} in its own folder has changed since the build")
        source = _opened(checkpoint, expert, folder)
        return OwnFiles(folder, source.config, _problem_of(checkpoint, expert, source))
    except ModekitError as error:
        return OwnFiles(folder, problem=f"its own folder cannot be read any more ({error.what})")


def _opened(checkpoint: Checkpoint, expert: int, folder: Path) -> AdapterSource:
    recipe, base = checkpoint.record.recipe, checkpoint.record.sources[0]
    # Headers alone are read: no code of the model's runs, whatever it brings.
    model = open_source(base.label, base.spec, (checkpoint.folder / base.folder).resolve(), run=Run(trust_remote_code=True))
    return open_adapter(f"experts[{expert}]", str(recipe.experts[expert].adapter), folder, model)


def _problem_of(checkpoint: Checkpoint, expert: int, source: AdapterSource) -> str | None:
    if is_trained(checkpoint, expert):
        return TRAINED
    places = places_of(checkpoint, expert)
    changed = {*source.changes, *source.bias_changes, *source.replaced}
    outside = [name for name in changed if not any(name.startswith(f"{module}.") for module in places)]
    if outside:
        return f"only a part of it is mixed: {len(outside)} of the {len(changed)} tensors that it changes are not"
    record = checkpoint.record.sources[checkpoint.record.expert_sources[expert]]
    if not record.config:
        return "the mixture was built by a version of modekit that did not record adapter_config.json"
    return f"{CONFIG_FILE} in its own folder has changed since the build" if changed_settings(record, source.folder) else None


def adapter_config_of(checkpoint: Checkpoint, expert: int, known: Mapping[str, object]) -> dict[str, object]:
    """adapter_config.json of what the mixture has of an expert; `known` is the config of its own folder, or empty."""
    places = places_of(checkpoint, expert)
    changes = {module: ModuleChange(place.ranks[expert], place.scales[expert]) for module, place in places.items()}
    biased = any(expert in place.biased for place in places.values())
    recipe = checkpoint.record.recipe
    folder = locate(recipe.base_model, checkpoint.recipe_root)
    base = recipe.base_model if folder is None else str(folder.resolve())  # PEFT finds it, whatever folder it is called from
    has_encoder, known = checkpoint.shape.family.reads == "pairs", {**known, "revision": recipe.revision}
    return lora_config(base, changes, has_encoder=has_encoder, lora_bias=biased, known=known)


def adapter_tensors_of(checkpoint: Checkpoint, expert: int, opened: OpenFiles) -> Iterator[PeftTensor]:
    """A (R, I), B (O, R) and, where it has one, the bias (O,) of every module."""
    for module, place in sorted(places_of(checkpoint, expert).items()):
        start, rank = sum(place.ranks[:expert]), place.ranks[expert]
        own = slice(start, start + rank)
        a, b = (checkpoint.tensors[f"{module}.lora_{side}"] for side in "AB")
        yield _tensor(peft_name(module, "lora_A.weight"), a, (own, slice(None)), (rank, a.shape[1]), opened)
        yield _tensor(peft_name(module, "lora_B.weight"), b, (slice(None), own), (b.shape[0], rank), opened)
        if expert in place.biased:
            bias = checkpoint.tensors[f"{module}.lora_bias"]
            row = (place.biased.index(expert), slice(None))
            yield _tensor(peft_name(module, "lora_B.bias"), bias, row, (bias.shape[1],), opened)


_Index = tuple[slice | int, slice]


def _tensor(name: str, ref: TensorRef, index: _Index, shape: tuple[int, ...], opened: OpenFiles) -> PeftTensor:
    nbytes = int(np.prod(shape)) * ITEMSIZE[ref.dtype]
    return PeftTensor(name, ref.dtype, shape, nbytes, partial(_read_part, ref, index, opened))


def _read_part(ref: TensorRef, index: _Index, opened: OpenFiles) -> memoryview:
    part = np.ascontiguousarray(as_array(opened.read(ref), ref.dtype).reshape(ref.shape)[index])
    view: memoryview = part.view(np.uint8).reshape(-1).data
    return view
