"""OUT.partial, in which OUT is made (staging.py says how it is laid out), and OUT.training: held by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from modekit.errors import OutputError
from modekit.files.lock import Lock
from modekit.files.marker import CHANGE_LOCK, MARKER, Marker, read_marker
from modekit.files.write import empty_folder, is_temporary, remove, remove_if_empty, write_file

JOURNAL = "journal"
NEW = "new"
OLD = "old"
LOCK = "lock"
_ATTEMPTS = 20


def work_of(out: Path) -> WorkFolder:
    """Where an output is made. Raises OutputError for a path without a name, such as /."""
    return WorkFolder(out, "partial", last=(JOURNAL,))


def mend_commit(work: Path, out: Path) -> None:
    """With the lock held: the old folder comes back, or goes when the new one is in its place.

    Raises OutputError when something else has taken its place.
    """
    old = work / OLD
    new = work / NEW
    if old.is_symlink() or not old.is_dir():
        remove(old)
    elif not os.path.lexists(out):
        remove(old / CHANGE_LOCK)  # of whoever was replacing it
        old.rename(out)
    elif new.exists():
        raise OutputError(
            "something else took the place of an old output that was being replaced",
            where=str(out),
            found=f"the old one is in {old}",
            remedy="move what is there away, and run the command again",
        )
    else:
        remove(old)
    if not new.exists():
        remove(work / JOURNAL)


class WorkFolder:
    """OUT.partial or OUT.training, whose marker names OUT: a copy under another name is no longer ours.

    `last`: names in it that go last when it is removed, in this order, so that a kill leaves what is still known.
    """

    def __init__(self, out: Path, kind: Literal["partial", "training"], last: Sequence[str] = ()) -> None:
        if not out.name:
            raise OutputError("the output needs a folder of its own", where=str(out), remedy="name a folder in it")
        self.path = out.with_name(f"{out.name}.{kind}")
        self.lock = Lock(self.path / LOCK)
        self._marker = Marker(kind=kind, of=out.name)
        self._last = (*last, MARKER)

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
