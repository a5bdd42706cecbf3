"""`.modekit`: what in a folder is modekit's own. Nothing else is ever replaced or removed.

An output's marker lists the files that were written into it, with the digest of those that people edit; what is not listed, or
was changed since, is the user's. A work folder's (OUT.partial, OUT.training) names the output that it belongs to:
a copy under another name is no longer ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modekit.files.read import LARGE, UNREADABLE, read_bytes, read_text
from modekit.files.write import files_below, is_temporary, json_bytes

MARKER = ".modekit"
CHANGE_LOCK = ".modekit.lock"
CHANGED = ".modekit.changed"
INTERNAL = (MARKER, CHANGE_LOCK, CHANGED)
"""What modekit keeps in an output for itself."""
STATISTICS = "router"
"""A folder in which everything is modekit's."""
_WEIGHTS = (".safetensors", ".gguf")
_SMALL = 2**20
"""Bytes of a weight file that has its digest in the marker; of other files LARGE."""

Kind = Literal["checkpoint", "adapter", "model", "gguf", "texts", "tokenizer", "partial", "training"]


class Marker(BaseModel):
    """What `.modekit` says: for a work folder, the name of the output that it is `of`; for an output, its files by their path
    with slashes, with their sha256, which is empty for a large one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    of: str = ""
    files: dict[str, str] = {}

    def as_bytes(self) -> bytes:
        """The file."""
        return json_bytes(self.model_dump(mode="json"))

    def with_files(self, folder: Path, names: Iterable[str], *, but: Collection[str] = ()) -> Marker:
        """With files as they lie in a folder now, and without those in `but`. Raises OSError."""
        files = {**self.files, **{name: _digest_of(folder / name) for name in names}}
        return self.model_copy(update={"files": {name: files[name] for name in sorted(files) if name not in but}})

    def owns(self, name: str) -> bool:
        """Whether a path lies where everything is modekit's, or is what modekit keeps for itself."""
        parts = name.split("/")
        return parts[0] in INTERNAL or (parts[0] == STATISTICS and len(parts) > 1) or any(map(is_temporary, map(Path, parts)))


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None when it has none that can be read, or is reached through a link."""
    path = folder / MARKER
    if folder.is_symlink() or path.is_symlink():
        return None
    try:
        return Marker.model_validate_json(read_text(path))
    except (*UNREADABLE, ValidationError):
        return None


def foreign_files(folder: Path) -> list[str] | None:
    """Files of an output that are not modekit's: put there, or changed, by others. None for a folder without a marker."""
    marker = read_marker(folder)
    if marker is None:
        return None
    changed = _changed(folder, marker)
    return [name for name in files_below(folder) if name in changed or not (marker.owns(name) or name in marker.files)]


def changed_files(folder: Path) -> list[str]:
    """Files that modekit wrote into an output and others changed since, as far as the marker has their digests."""
    marker = read_marker(folder)
    return [] if marker is None else _changed(folder, marker)


def _changed(folder: Path, marker: Marker) -> list[str]:
    return [name for name, digest in marker.files.items() if _is_another(folder / name, digest)]


def _is_another(path: Path, digest: str) -> bool:
    try:
        return path.is_symlink() or (digest != "" and digest != _digest_of(path))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, _SMALL if path.name.endswith(_WEIGHTS) else LARGE)).hexdigest()
    except ValueError:  # larger
        return ""
