"""The models that a mixture was made from, as they lie there now: what is scored under a name is what was recorded under it.

A weight file is read again only where its size, times or inode are not those that it had when this user's modekit read it last
(files/user_cache.py). Settings (config.json, adapter_config.json) are small and always read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import SourceRecord
from modekit.errors import SourceError
from modekit.run import QUIET, Run
from modekit.sources.adapter import WEIGHTS_FILE, is_adapter
from modekit.sources.adapter_config import CONFIG_FILE, read_adapter_config
from modekit.sources.config import read_config, settings_digest
from modekit.sources.contents import known_blake3
from modekit.sources.source import weight_files

GONE = "it is no longer where the recipe found it"
PUT_BACK = "put back what it was, take the new one in with `modekit replace`, or build the mixture again"


@dataclass(frozen=True)
class SourceState:
    """A recorded model now.

    Attributes:
        record: what was recorded.
        folder: where it lay.
        is_there: whether there is still such a folder.
        changed: what is no longer as it was recorded: a file, or a few words; empty: nothing.
    """

    record: SourceRecord
    folder: Path
    is_there: bool
    changed: str = ""

    @property
    def is_as_recorded(self) -> bool:
        """Whether it may stand for what is in the mixture."""
        return self.is_there and not self.changed

    @property
    def said(self) -> str:
        """Who it is, and what has changed of it; no path, since it is said where others read it."""
        return f"{self.record.label} ({self.changed})"


def source_state(checkpoint: Checkpoint, place: int, *, run: Run = QUIET) -> SourceState:
    """How the model at a place of the record's sources is now."""
    record = checkpoint.record.sources[place]
    folder = checkpoint.source_folder(record)
    if not folder.is_dir():
        return SourceState(record, folder, is_there=False)
    try:
        changed = next(iter(changed_settings(record, folder)), None) or changed_weights(record, folder, run) or ""
    except SourceError as error:
        changed = error.what
    except OSError as error:
        changed = str(error.strerror)
    return SourceState(record, folder, is_there=True, changed=changed)


def changed_settings(record: SourceRecord, folder: Path) -> list[str]:
    """The files whose settings are not those that were recorded, or cannot be read; a model's and an adapter's are one each."""
    adapter = set(record.files) == {WEIGHTS_FILE}
    if is_adapter(folder) != adapter:
        return [CONFIG_FILE]
    file, read = (CONFIG_FILE, read_adapter_config) if adapter else ("config.json", read_config)
    try:
        now = settings_digest(read(folder, where=record.label))
    except SourceError:
        return [file]
    return [file] if record.config != now else []


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


def why_not(checkpoint: Checkpoint, expert: int | None, *, run: Run = QUIET) -> str | None:
    """Why the model of an expert, or the base (None), cannot stand for what is in the mixture; None where it can.

    An adapter is nothing without its base.
    """
    place = 0 if expert is None else checkpoint.record.expert_sources[expert]
    state = source_state(checkpoint, place, run=run)
    if state.is_as_recorded and place != 0 and is_adapter(state.folder):
        state = source_state(checkpoint, 0, run=run)
    others = range(len(checkpoint.record.sources)) if checkpoint.record.tokens is not None else ()
    for each in others if state.is_as_recorded else ():  # their rows are those of tokens that it lacks
        state = source_state(checkpoint, each, run=run)
        if not state.is_as_recorded:
            break
    if not state.is_there:
        return GONE
    return f"{state.said} has changed since the mixture was built: {PUT_BACK}" if state.changed else None
