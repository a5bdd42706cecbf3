"""`.modekit`: what in a folder is modekit's own. Nothing else is ever replaced or removed.

An output's marker lists the files that were written into it, small ones with their digest; what is not listed, or was changed
by hand since, is the user's. A work folder's (OUT.partial, OUT.training, OUT.tuning) names the output that it belongs to: a
copy that somebody made under another name is no longer ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modekit.files.read import UNREADABLE, read_bytes, read_text
from modekit.files.write import files_below, is_temporary, json_bytes, write_file

MARKER = ".modekit"
CHANGE_LOCK = ".modekit.lock"
CHANGED = ".modekit.changed"
JUST_MADE = ".modekit.made"
"""Digest of what made an output, until its command has tidied up."""
INTERNAL = (MARKER, CHANGE_LOCK, CHANGED, JUST_MADE)
"""What modekit keeps in an output for itself."""
_SMALL = 2**20
"""Bytes of a file that has its digest in the marker: what people edit is smaller."""

Kind = Literal["checkpoint", "adapter", "model", "gguf", "texts", "tokenizer", "partial", "training", "tuning"]


class Marker(BaseModel):
    """What `.modekit` says.

    Attributes:
        kind: what the folder is; partial, training and tuning are work folders.
        of: the name of the output that a work folder belongs to; empty for an output.
        files: path with slashes -> sha256 of a small file, empty for a large one.
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

    def with_files(self, folder: Path, names: Iterable[str]) -> Marker:
        """With files written since, as they lie in a folder. Raises OSError."""
        digests = {name: _digest_of(folder / name) for name in names}
        return self.model_copy(update={"files": dict(sorted({**self.files, **digests}.items()))})

    def without(self, names: Collection[str]) -> Marker:
        """Without files that are about to go."""
        return self.model_copy(update={"files": {name: digest for name, digest in self.files.items() if name not in names}})

    def owns(self, name: str) -> bool:
        """Whether a path lies where everything is modekit's."""
        return name.partition("/")[0] in self.areas and "/" in name


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None when it has none that can be read, or is reached through a link."""
    path = folder / MARKER
    if folder.is_symlink() or path.is_symlink():
        return None
    try:
        return Marker.model_validate_json(read_text(path))
    except (*UNREADABLE, ValidationError):
        return None


def marker_of(folder: Path, kind: Kind, *, areas: tuple[str, ...] = ()) -> Marker:
    """The marker of an output all of whose files modekit wrote. Raises OSError."""
    marker = Marker(kind=kind, areas=areas)
    paths = {name: folder / name for name in files_below(folder) if not (_is_internal(name) or marker.owns(name))}
    files = {name: _digest_of(path) for name, path in paths.items() if not path.is_symlink()}
    return marker.model_copy(update={"files": files})


def foreign_files(folder: Path) -> list[str] | None:
    """Files of an output that are not modekit's: put there, or changed, by others. None for a folder without a marker."""
    marker = read_marker(folder)
    if marker is None:
        return None
    return [name for name in files_below(folder) if not (_is_internal(name) or _is_ours(folder, name, marker))]


def claim_work_folder(folder: Path, kind: Kind, of: str) -> bool:
    """Make a work folder, or recognise the one that is there as that of the same output; whether it is ours.

    What a kill leaves between making a folder and marking it counts as ours: no more than an empty lock. Raises OSError.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not is_remains(folder):
            return is_work_folder(folder, kind, of)
    mark_work_folder(folder, kind, of)
    return True


def mark_work_folder(folder: Path, kind: Kind, of: str) -> None:
    """Say whose a work folder is. Raises OSError."""
    write_file(folder / MARKER, Marker(kind=kind, of=of).as_bytes())


def is_remains(folder: Path) -> bool:
    """Whether a folder is no more than a kill leaves of a work folder that is not marked yet, or no longer: empty locks."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(is_temporary(path) or (path.name.endswith("lock") and not path.lstat().st_size) for path in folder.iterdir())


def is_work_folder(folder: Path, kind: Kind, of: str) -> bool:
    """Whether a folder is modekit's own, of that kind and output."""
    marker = read_marker(folder)
    return marker is not None and marker.kind == kind and marker.of == of


def _is_ours(folder: Path, name: str, marker: Marker) -> bool:
    path = folder / name
    if path.is_symlink():
        return False
    if marker.owns(name):
        return True
    said = marker.files.get(name)
    try:
        return said is not None and (said == "" or said == _digest_of(path))
    except OSError:
        return False


def _is_internal(name: str) -> bool:
    first = name.partition("/")[0]
    return first in INTERNAL or any(is_temporary(Path(part)) for part in name.split("/"))


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, _SMALL)).hexdigest()
    except ValueError:  # larger
        return ""
