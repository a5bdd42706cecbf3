"""Who taught an expert, as the model's own folder says (`modekit specialize --teacher`); a folder that is gone says nothing."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.files.read import UNREADABLE, read_json
from modekit.files.typed import Label, as_kind
from modekit.sources.model import SPECIALIST_FILE


class _Teacher(BaseModel):
    name: Label


class _Specialist(BaseModel):
    teacher: _Teacher | None = None


def taught_by(folder: Path) -> str | None:
    """Name of the teacher of the model in a folder; None without one, or where nothing can be read."""
    try:
        said = as_kind(read_json(folder / SPECIALIST_FILE), _Specialist)
    except (*UNREADABLE, ValueError):
        return None
    return said.teacher.name if said.teacher is not None else None


def teachers_of(checkpoint: Checkpoint) -> list[str | None]:
    """Per expert in recipe order the name of its teacher."""
    record = checkpoint.record
    return [taught_by(checkpoint.source_folder(record.sources[place])) for place in record.expert_sources]
