"""Several files of a finished folder change together, all of them or none, and what a kill left of an output is put right.

    OUT/.modekit.<16 hex digits>.tmp/    where the new files are written
    OUT/.modekit.changed/                the same folder once it is whole: this rename is the moment of the change

What a kill leaves of the first is thrown away by the next change; what it leaves of the second is put into place by it, or
when the folder is opened next. Among the files is the folder's marker, which then lists them as modekit's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from modekit.errors import OutputError
from modekit.files.disk import failed
from modekit.files.lock import Lock
from modekit.files.marker import CHANGE_LOCK, CHANGED, MARKER, read_marker
from modekit.files.output import JOURNAL, NEW, OLD, mend_commit, work_of
from modekit.files.place import Replace, refuse_entangled, refuse_what_is_there
from modekit.files.write import Content, appearing, files_below, is_temporary, make_folder, remove, sync_folder, write_file

_PATIENCE = 60.0
"""Seconds: a change takes a fraction of one."""
_LAST = ("modekit.json", MARKER)
"""Records go last: what they tell of is then there."""


def change_together(
    folder: Path, files: Mapping[str, Content], *, remove_in: str | None = None, check: Callable[[], None] | None = None
) -> None:
    """Replace files in a finished output, or add them, by their path in it, with slashes; each is seen whole.

    Of the folder `remove_in`, nothing else of modekit's stays. `check` is called when nobody else can change the output, before
    anything does. Raises OutputError when another process is changing it, what `check` raises, and OSError; then nothing has
    changed.
    """
    lock = Lock(folder / CHANGE_LOCK)
    if not lock.take(patience=_PATIENCE):
        raise OutputError("another command is changing this folder", where=str(folder), remedy="run this one again after it")
    try:
        _put(folder)
        if check is not None:
            check()
        for left in folder.iterdir():
            if is_temporary(left):
                remove(left)
        for name in files:
            _refuse_in_the_way(folder, name)
        marker = read_marker(folder)
        listed = marker.files if marker is not None and remove_in else ()
        gone = [name for name in listed if name.startswith(f"{remove_in}/") and name not in files]
        with appearing(folder / CHANGED) as staged:
            make_folder(staged)
            for name, content in files.items():
                make_folder((staged / name).parent)
                write_file(staged / name, content, sync=False)
            if marker is not None:
                write_file(staged / MARKER, marker.with_files(staged, files, but=gone).as_bytes(), sync=False)
        _put(folder)
        for name in gone:
            remove(folder / name)
    finally:
        lock.release()


def finish_change(folder: Path) -> None:
    """Put into place what a killed process left of a change that was whole, unless a process is at it. Raises OSError."""
    lock = Lock(folder / CHANGE_LOCK)
    if (folder / CHANGED).is_dir() and lock.take():
        try:
            _put(folder)
        finally:
            lock.release()


def _refuse_in_the_way(folder: Path, name: str) -> None:
    """Raise OSError where a file cannot be put: a link or a file in the place of a folder above it, a folder in its own."""
    for parent in list(PurePosixPath(name).parents)[:-1]:
        path = folder / parent
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OSError(errno.ENOTDIR, "a link or file is in the way of a folder", str(path))
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        raise OSError(errno.EISDIR, "a folder is in the way of a file", str(path))


def _put(folder: Path) -> None:
    """Move what is ready, if anything is, to its place, records last; links in it are not."""
    changed = folder / CHANGED
    if changed.is_symlink():
        changed.unlink()
    elif changed.is_dir():
        names = [name for name in files_below(changed) if not (changed / name).is_symlink()]
        for name in sorted(names, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name)):
            parent = folder
            for part in PurePosixPath(name).parts[:-1]:
                parent = parent / part
                make_folder(parent)
            (changed / name).replace(folder / name)
        sync_folder(folder)
        remove(changed)


def is_in_the_making(folder: Path) -> bool:
    """Whether a folder is an output's work folder, or the unfinished output in it."""
    work = folder.parent if folder.name in {NEW, OLD} else folder
    name = work.name.removesuffix(".partial")
    return name not in ("", work.name) and work_of(work.with_name(name)).is_ours


def is_there(out: Path) -> bool:
    """Whether there is an output, once what a kill left is mended. Raises OutputError, OSError."""
    mend(out)
    return out.exists()


def mend(out: Path) -> None:
    """Put right what a kill inside a commit left, unless a process is at it. Raises OutputError, OSError."""
    if not out.name:
        return
    work = work_of(out)
    try:
        if work.is_ours and work.lock.take():
            mend_commit(work.path, out)
            if not any((work.path / name).exists() for name in (JOURNAL, NEW, OLD)):
                work.clear()
    except FileNotFoundError:  # whoever was at it has just finished
        pass
    finally:
        work.lock.release()


def refuse_existing(out: Path, replace: Replace, *, sources: Sequence[Path] = ()) -> None:
    """Raise OutputError when something is at OUT that may not be replaced, or OUT and a source lie in one another.

    What a kill left of an earlier commit is mended first. Raises OutputError, too, where OUT cannot be written.
    """
    refuse_entangled(out, sources)
    try:
        mend(out)
    except OSError as error:
        raise failed(out, error) from None
    refuse_what_is_there(out, replace)
