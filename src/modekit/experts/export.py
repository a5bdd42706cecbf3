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
from pathlib import Path

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import UnsupportedError
from modekit.experts.adapter_tensors import adapter_config_of, adapter_tensors_of
from modekit.experts.own_files import TRAINED, OwnFiles, is_trained, own_files, places_of
from modekit.experts.peft_folder import write_lora
from modekit.files.marker import foreign_files
from modekit.files.output import mend, replaced_by, settle
from modekit.files.read import UNREADABLE
from modekit.files.staging import Staging, staging
from modekit.files.typed import read_as
from modekit.files.write import copy_file, write_json
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.adapter import WEIGHTS_FILE
from modekit.sources.adapter_config import CONFIG_FILE
from modekit.sources.contents import OpenFiles
from modekit.sources.names import HEAD
from modekit.text.splits import TRAINED_FILE

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


def export_adapter(checkpoint: Checkpoint, name: str, out: Path, *, overwrite: bool = False) -> ExportRecord:
    """Write one expert as a PEFT folder that changes the base model as the expert does.

    Raises UnsupportedError when the expert is no adapter, or cannot be given back; OutputError.
    """
    return write_export(checkpoint, plan_exports(checkpoint, [name])[0], out, overwrite=overwrite)


def write_export(
    checkpoint: Checkpoint, plan: ExportPlan, out: Path, *, overwrite: bool = False, run: Run = QUIET
) -> ExportRecord:
    """Write one expert as planned (`reason` is None). Raises OutputError."""
    given_back = plan.own if plan.as_it_came else None
    config = dict(given_back.config) if given_back is not None else adapter_config_of(checkpoint, plan.expert, _known(plan))
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
        settle(out)
        return record
    opened = OpenFiles()
    try:
        with staging(
            out, digest, "adapter", sources=_read_from(checkpoint, plan), replace=replaced_by(overwrite), sync=run.sync
        ) as stage:
            if given_back is not None:
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    copy_file(given_back.folder / file, stage.folder / file)
            else:
                write_lora(stage, config, list(adapter_tensors_of(checkpoint, plan.expert, opened)))
            _write_beside(plan, stage)
            write_json(stage.folder / EXPORT_FILE, record.model_dump(mode="json"))
    finally:
        opened.close()
    return record


def _is_written(out: Path, record: ExportRecord) -> bool:
    """Whether an earlier run of the command, perhaps killed at a later expert, wrote this very adapter."""
    try:
        mend(out)
        return foreign_files(out) == [] and read_as(out / EXPORT_FILE, ExportRecord) == record
    except UNREADABLE:
        return False


def _read_from(checkpoint: Checkpoint, plan: ExportPlan) -> list[Path]:
    """Folders that the output must not touch."""
    return [checkpoint.folder, *([plan.own.folder] if plan.own is not None else [])]


def _plan_export(checkpoint: Checkpoint, expert: int, name: str) -> ExportPlan:
    asked = checkpoint.record.recipe.experts[expert]
    if asked.is_base:
        return ExportPlan(expert, name, reason="it is the base model")
    if asked.adapter is None and asked.lora_rank is None:
        kept = "" if asked.budget is None else ", kept within a budget: `modekit extract` makes an adapter of it"
        return ExportPlan(expert, name, reason=f"it is a full model{kept}")
    own = own_files(checkpoint, expert) if asked.adapter is not None else None
    notes = tuple(dict.fromkeys(_notes(checkpoint, expert, own)))
    if own is not None and own.problem is not None:
        places = places_of(checkpoint, expert)
        if checkpoint.record.tokens is not None and HEAD in places:
            reason = f"its head has rows for the tokens of other models, and {own.problem}"
            return ExportPlan(expert, name, own, reason)
        if not places or any(expert in place.own for place in places.values()):
            reason = f"parts of it were folded into whole modules (DoRA, IA3, biases), and {own.problem}"
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


def _known(plan: ExportPlan) -> Mapping[str, object]:
    config = plan.own.config if plan.own is not None else {}
    return config if config.get("peft_type") == "LORA" else {}


def _kind(config: Mapping[str, object]) -> str:
    if config["peft_type"] == "IA3":
        return "IA3"
    return "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"


def _write_beside(plan: ExportPlan, stage: Staging) -> None:
    if plan.own is None:
        return
    for file in _BESIDE:
        if (plan.own.folder / file).is_file():
            copy_file(plan.own.folder / file, stage.folder / file)
