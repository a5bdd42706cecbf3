"""`.modekit`: what in a folder is modekit's own. Nothing else is ever replaced or removed.

An output's marker lists the files that were written into it, with the digest of those that people edit; what is not listed, or
was changed since, is the user's. A work folder's (OUT.partial, OUT.training) names the output that it belongs to:
a copy under another name is no longer ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from modekit.errors import OutputError
from modekit.files.read import LARGE, UNREADABLE, read_bytes, read_text
from modekit.files.write import empty_folder, files_below, is_temporary, json_bytes, remove, remove_if_empty, write_file

MARKER = ".modekit"
CHANGE_LOCK = ".modekit.lock"
CHANGED = ".modekit.changed"
INTERNAL = (MARKER, CHANGE_LOCK, CHANGED)
"""What modekit keeps in an output for itself."""
LOCK = "lock"
_ATTEMPTS = 20
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


def marker_of(folder: Path, kind: Kind, *, but: Collection[str] = ()) -> Marker:
    """The marker of an output all of whose files, but for some, modekit wrote. Raises OSError."""
    marker = Marker(kind=kind)
    names = [name for name in files_below(folder) if not (marker.owns(name) or (folder / name).is_symlink())]
    return marker.with_files(folder, names, but=but)


def foreign_files(folder: Path) -> list[str] | None:
    """Files of an output that are not modekit's: put there, or changed, by others. None for a folder without a marker."""
    marker = read_marker(folder)
    if marker is None:
        return None
    changed = {name for name, digest in marker.files.items() if _is_another(folder / name, digest)}
    return [name for name in files_below(folder) if name in changed or not (marker.owns(name) or name in marker.files)]


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


class Lock:
    """Held from `take` to `release`.

    The file is removed while the lock is held; who had it open by then gets a lock on no file, which `FileLock` sees, and
    asks again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path)

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    def take(self, *, patience: float = 0.0) -> bool:
        """Take it if it becomes free within some seconds; whether it did.

        Raises OSError where its folder is not there, or a link has its name.
        """
        try:
            self._lock.acquire(timeout=patience, poll_interval=0.01)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Give it free, if it is held, and remove its file."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._lock.release()


class WorkFolder:
    """OUT.partial or OUT.training, whose marker names OUT: a copy under another name is no longer ours.

    `last`: names in it that go last when it is removed, in this order, so that a kill leaves what is still known.
    """

    def __init__(self, out: Path, kind: Literal["partial", "training"], last: Sequence[str] = ()) -> None:
        if not out.name:
            raise OutputError("the output needs a folder of its own", where=str(out), remedy="name a folder in it")
        self.path = out.with_name(f"{out.name}.{kind}")
        self.lock = Lock(self.path / LOCK)
        self._marker, self._last = Marker(kind=kind, of=out.name), (*last, MARKER)

    @property
    def is_ours(self) -> bool:
        """Whether modekit made it for this output; also where a kill left no mark yet, or no longer: but for an empty lock."""
        if self.path.is_symlink() or not self.path.is_dir():
            return False
        marker = read_marker(self.path)
        if marker is not None:
            return marker == self._marker
        return all(is_temporary(each) or (each.name == LOCK and not each.lstat().st_size) for each in self.path.iterdir())

    def take(self) -> None:
        """Make it, or find our own, and hold it. Raises OutputError where it is somebody else's or held, and OSError."""
        for attempt in range(_ATTEMPTS):
            try:
                with suppress(FileExistsError):
                    self.path.mkdir(parents=True)
                if not self.is_ours:
                    remedy = "move it away, or choose another output folder"
                    raise OutputError("a folder that modekit did not make is in the way", where=str(self.path), remedy=remedy)
                if not self.lock.take():
                    remedy = "wait for it, or choose another folder"
                    raise OutputError("another process is writing this output folder", where=str(self.path), remedy=remedy)
                write_file(self.path / MARKER, self._marker.as_bytes())
                return
            except FileNotFoundError:  # another process has just finished, and removed it
                self.lock.release()
                if attempt == _ATTEMPTS - 1:  # or the system takes no folder here
                    raise

    def clear(self) -> None:
        """Remove it while it is held.

        Another process that comes just then finds the folder empty, or with its own lock in it, and it stays.
        """
        empty_folder(self.path, but=(*self._last, LOCK))
        for name in self._last:
            remove(self.path / name)
        self.lock.release()
        remove_if_empty(self.path)
