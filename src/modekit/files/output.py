"""May OUT be written? What lies there, what a kill left of it, what it is made from, and whether the disk has room.

staging.py says how OUT.partial, the folder beside it in which it is made, is laid out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from modekit.errors import OutputError, some_of
from modekit.files.lock import Lock
from modekit.files.marker import CHANGE_LOCK, MARKER, foreign_files, is_remains, is_work_folder, read_marker
from modekit.files.write import empty_folder, files_below, remove, remove_if_empty

Replace = Literal["nothing", "modekit's own", "in place"]
"""What may be at OUT: nothing; what modekit wrote, all of it (`--overwrite`); anything, since all of it is carried over."""

PARTIAL: Literal["partial"] = "partial"
LOCK, JOURNAL, NEW, OLD = "lock", "journal", "new", "old"


def replaced_by(overwrite: bool) -> Replace:
    """What `--overwrite` allows."""
    return "modekit's own" if overwrite else "nothing"


def work_folder(out: Path) -> Path:
    """Where an output is made. Raises OutputError for a path without a name, such as /."""
    if not out.name:
        raise OutputError("the output needs a folder of its own", where=str(out), remedy="name a folder in it")
    return out.with_name(f"{out.name}.{PARTIAL}")


def is_in_the_making(folder: Path) -> bool:
    """Whether a folder is an output's work folder, or the unfinished output in it."""
    work = folder.parent if folder.name in {NEW, OLD} else folder
    name = work.name.removesuffix(f".{PARTIAL}")
    return name != work.name and is_work_folder(work, PARTIAL, name)


def refuse_existing(out: Path, replace: Replace, *, sources: Sequence[Path] = ()) -> None:
    """Raise OutputError when something is at OUT that may not be replaced, or OUT and a source lie in one another.

    What a kill left of an earlier commit is mended first. Raises OutputError, too, where OUT cannot be written.
    """
    refuse_entangled(out, sources)
    try:
        mend(out)
    except OSError as error:
        raise not_writable(out, error) from None
    refuse_what_is_there(out, replace)


def not_writable(out: Path, error: OSError) -> OutputError:
    """What is said of an output that cannot even be begun."""
    return OutputError(
        "the output folder cannot be written",
        where=str(out),
        found=error.strerror,
        remedy="choose a folder that can be written",
    )


def is_there(out: Path) -> bool:
    """Whether there is an output, once what a kill left is mended. Raises OutputError, OSError."""
    mend(out)
    return out.exists()


def mend(out: Path) -> None:
    """Put right what a kill inside a commit left, unless a process is at it. Raises OutputError, OSError."""
    if not out.name:
        return
    work = work_folder(out)
    if not (is_work_folder(work, PARTIAL, out.name) or is_remains(work)):
        return
    lock = Lock(work / LOCK)
    try:
        if not lock.take():
            return
    except FileNotFoundError:  # whoever was at it has just finished
        return
    try:
        mend_commit(work, out)
        if not any((work / name).exists() for name in (JOURNAL, NEW, OLD)):
            clear(work, lock)
    finally:
        lock.release()


def mend_commit(work: Path, out: Path) -> None:
    """With the lock held: the old folder comes back, or goes when the new one is in its place.

    Raises OutputError when something else has taken its place.
    """
    old, new = work / OLD, work / NEW
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


def clear(work: Path, lock: Lock) -> None:
    """Remove a work folder whose lock is held. A kill in between leaves what is still known to be ours.

    Another process that comes just then finds the folder empty, or with its own lock in it, and it stays.
    """
    empty_folder(work, but=(JOURNAL, MARKER, LOCK))
    for name in (JOURNAL, MARKER):
        remove(work / name)
    lock.release()
    remove_if_empty(work)


def refuse_what_is_there(out: Path, replace: Replace) -> None:
    """Raise OutputError when something is at OUT that may not be replaced."""
    if not os.path.lexists(out) or replace == "in place":
        return
    if replace == "nothing":
        remedy = "choose another folder" + (" or pass --overwrite" if read_marker(out) is not None else "")
        raise OutputError("the output folder exists", where=str(out), remedy=remedy)
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    foreign = foreign_files(out) if out.is_dir() else None
    if foreign is None:
        raise OutputError(
            "the output path exists and holds something else, so it is not overwritten",
            where=str(out),
            found="no mark of modekit's (the file .modekit, which every folder that it makes has)",
            remedy="choose another folder, or remove it yourself",
        )
    if foreign:
        raise OutputError(
            "the output folder holds files that modekit did not write, or that were changed since",
            where=str(out),
            found=some_of(foreign, 5),
            remedy="move them away, or choose another folder",
        )


def check_room(out: Path, needed: int) -> None:
    """Raise OutputError when the disk has less room than OUT needs, besides what an unfinished one has written of it."""
    new = work_folder(out) / NEW
    needed -= sum((new / name).lstat().st_size for name in files_below(new))
    disk = disk_of(out)
    if disk.total and needed > disk.free:  # some file systems do not say how large they are
        raise OutputError(
            "the disk has too little free space",
            where=str(out),
            found=f"{disk.free:,} bytes free",
            expected=f"{needed:,} bytes",
            remedy=f"free {needed - disk.free:,} bytes, or choose a folder on another disk",
        )


def disk_of(out: Path) -> shutil._ntuple_diskusage:
    """Size and free bytes of the disk that OUT will be on."""
    return shutil.disk_usage(next(parent for parent in out.parents if parent.exists()))


def refuse_entangled(out: Path, sources: Sequence[Path]) -> None:
    """Raise OutputError when OUT is, holds, or lies in a folder that the command reads, whatever links lead there."""
    real = Path(os.path.realpath(out))  # Path.resolve raises where links go round
    for source in sources:
        folder = Path(os.path.realpath(source))
        relation = (
            "is" if real == folder else "holds" if real in folder.parents else "lies in" if folder in real.parents else ""
        )
        if relation:
            raise OutputError(
                "the output must not touch what it is made from",
                where=str(out),
                found=f"it {relation} {source}",
                remedy="choose a folder beside it",
            )
