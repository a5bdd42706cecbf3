"""The models that a mixture was made from: what is recorded of them, and whether they are that still.

A command reads a weight file once for it; settings (config.json, adapter_config.json) are small and always read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import FileRecord, SourceRecord
from modekit.errors import SourceError
from modekit.planning.plan import Plan
from modekit.run import QUIET, Run
from modekit.sources.adapter import CONFIG_FILE, WEIGHTS_FILE, is_adapter, read_adapter_config
from modekit.sources.digests import known_blake3, settings_digest
from modekit.sources.source import ModelSource, read_config
from modekit.sources.weight_files import weight_files

Known = Mapping[ModelSource, SourceRecord]
OwnModel = Literal["base", "full model", "PEFT", "folded"]
"""How an expert's own model was made: PEFT's of base and adapter, or, where that lacks a tensor, the adapter folded in."""
_PUT_BACK = "put back what it was, take the new one in with `modekit replace`, or build the mixture again"


def source_records(plan: Plan, out: Path, hashes: Mapping[str, str], known: Known) -> list[SourceRecord]:
    """Of the models of a plan, each once; folders are relative to `out`. `known`: of those that were read before, and may be
    gone; of others, `hashes` says the files' blake3.
    """
    said = [plan.recipe.base_model, *(each.source for each in plan.recipe.experts)]
    specs = dict(zip(plan.sources[::-1], said[::-1], strict=True))  # of each the first that names it
    return [_source_record(each, specs[each], out, hashes, known.get(each)) for each in dict.fromkeys(plan.sources)]


def _source_record(
    source: ModelSource, spec: str, out: Path, hashes: Mapping[str, str], known: SourceRecord | None
) -> SourceRecord:
    read = source.files if known is None else ()
    said = next((each for each in (source.wrapper, source.on_disk) if each is not None), source.config)  # as it stands
    files = {file.name: FileRecord(size=file.stat().st_size, blake3=hashes[str(file)]) for file in read}
    return SourceRecord(
        label=source.label,
        spec=spec,
        revision=source.revision,
        folder=os.path.relpath(source.folder, out),
        files=files if known is None else known.files,
        config=settings_digest(said) if known is None else known.config,
        packed=source.packed,
    )


def why_not(checkpoint: Checkpoint, expert: int | None, *, run: Run = QUIET) -> str | None:
    """Why the model of an expert, or the base (None), cannot stand for what is in the mixture; None where it can.

    An adapter is nothing without its base, and with several vocabularies a model lacks rows of tokens that the others have.
    What is said names no path, since others read it.
    """
    record = checkpoint.record
    place = 0 if expert is None else record.expert_sources[expert]
    needed = [place, *([0] if is_adapter(checkpoint.source_folder(record.sources[place])) else [])]
    needed += range(len(record.sources)) if record.tokens is not None else ()
    for source in (record.sources[each] for each in dict.fromkeys(needed)):
        folder = checkpoint.source_folder(source)
        if not folder.is_dir():
            return "it is no longer where the recipe found it"
        try:
            changed = changed_settings(source, folder) or changed_weights(source, folder, run)
        except SourceError as error:
            changed = error.what
        except OSError as error:
            changed = str(error.strerror)
        if changed:
            return f"{source.label} ({changed}) has changed since the mixture was built: {_PUT_BACK}"
    return None


def changed_settings(record: SourceRecord, folder: Path) -> str | None:
    """The file whose settings are not those that were recorded, or cannot be read; a model's and an adapter's are one each."""
    adapter = set(record.files) == {WEIGHTS_FILE}
    file, read = (CONFIG_FILE, read_adapter_config) if adapter else ("config.json", read_config)
    try:
        same = is_adapter(folder) == adapter and settings_digest(read(folder, where=record.label)) == record.config
    except SourceError:
        same = False
    return None if same else file


def changed_weights(record: SourceRecord, folder: Path, run: Run) -> str | None:
    """The first weight file that is not what was recorded; None where all are. Raises SourceError and OSError."""
    there = [folder / WEIGHTS_FILE] if is_adapter(folder) else weight_files(folder, where=record.label)
    others = {file.name for file in there}.symmetric_difference(record.files)
    if others:
        return min(others)
    progress = partial(run.progress, f"look at {record.label}")
    for name, expected in record.files.items():
        if (folder / name).stat().st_size != expected.size or known_blake3(folder / name, progress) != expected.blake3:
            return name
    return None
