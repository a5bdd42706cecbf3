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
from modekit.files.write import files_below, is_temporary, json_bytes, write_file

MARKER = ".modekit"
CHANGE_LOCK = ".modekit.lock"
CHANGED = ".modekit.changed"
INTERNAL = (MARKER, CHANGE_LOCK, CHANGED)
"""What modekit keeps in an output for itself."""
_WEIGHTS = (".safetensors", ".gguf")
_SMALL = 2**20
"""Bytes of a weight file that has its digest in the marker; of other files LARGE."""

Kind = Literal["checkpoint", "adapter", "model", "gguf", "texts", "tokenizer", "partial", "training"]


class Marker(BaseModel):
    """What `.modekit` says.

    Attributes:
        kind: what the folder is; partial and training are work folders.
        of: the name of the output that a work folder belongs to; empty for an output.
        files: path with slashes -> sha256; empty for a large file.
        areas: folders in which everything is modekit's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Kind
    of: str = ""
    files: dict[str, str] = {}
    areas: tuple[str, ...] = ()

    def as_bytes(self) -> bytes:
        """The file."""
        return json_bytes(self.model_dump(mode="json"))

    def with_files(self, folder: Path, names: Iterable[str], *, but: Collection[str] = ()) -> Marker:
        """With files as they lie in a folder now, and without those in `but`. Raises OSError."""
        files = {**self.files, **{name: _digest_of(folder / name) for name in names}}
        return self.model_copy(update={"files": {name: files[name] for name in sorted(files) if name not in but}})

    def owns(self, name: str) -> bool:
        """Whether a path lies where everything is modekit's, or is what modekit keeps for itself."""
        first, *rest = name.split("/")
        return (
            first in INTERNAL
            or (first in self.areas and bool(rest))
            or any(is_temporary(Path(part)) for part in (first, *rest))
        )


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None when it has none that can be read, or is reached through a link."""
    path = folder / MARKER
    if folder.is_symlink() or path.is_symlink():
        return None
    try:
        return Marker.model_validate_json(read_text(path))
    except (*UNREADABLE, ValidationError):
        return None


def marker_of(folder: Path, kind: Kind, *, areas: tuple[str, ...] = (), but: Collection[str] = ()) -> Marker:
    """The marker of an output all of whose files, but for some, modekit wrote. Raises OSError."""
    marker = Marker(kind=kind, areas=areas)
    names = [name for name in files_below(folder) if not (marker.owns(name) or (folder / name).is_symlink())]
    return marker.with_files(folder, names, but=but)


def foreign_files(folder: Path) -> list[str] | None:
    """Files of an output that are not modekit's: put there, or changed, by others. None for a folder without a marker."""
    marker = read_marker(folder)
    if marker is None:
        return None
    changed = changed_files(folder)
    return [name for name in files_below(folder) if name in changed or not (marker.owns(name) or name in marker.files)]


def changed_files(folder: Path) -> list[str]:
    """Files that modekit wrote into an output and others changed since, as far as the marker has their digests."""
    marker = read_marker(folder)
    return [name for name, digest in marker.files.items() if _is_another(folder / name, digest)] if marker is not None else []


def _is_another(path: Path, digest: str) -> bool:
    try:
        return path.is_symlink() or (digest != "" and digest != _digest_of(path))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def claim_work_folder(folder: Path, kind: Kind, of: str) -> bool:
    """Make a work folder, or recognise the one that is there as that of the same output; whether it is ours.

    What a kill leaves between making a folder and marking it counts as ours: no more than an empty lock. Raises OSError.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not is_remains(folder):
            return is_work_folder(folder, kind, of)
    write_file(folder / MARKER, Marker(kind=kind, of=of).as_bytes())
    return True


def is_remains(folder: Path) -> bool:
    """Whether a folder is no more than a kill leaves of a work folder that is not marked yet, or no longer: empty locks."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(is_temporary(path) or (path.name.endswith("lock") and not path.lstat().st_size) for path in folder.iterdir())


def is_work_folder(folder: Path, kind: Kind, of: str) -> bool:
    """Whether a folder is modekit's own, of that kind and output."""
    marker = read_marker(folder)
    return marker is not None and marker.kind == kind and marker.of == of


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, _SMALL if path.name.endswith(_WEIGHTS) else LARGE)).hexdigest()
    except ValueError:  # larger
        return ""
