"""May OUT be written? What lies there, what a kill left of it, what it is made from, and whether the disk has room.

staging.py says how OUT.partial, the folder beside it in which it is made, is laid out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from modekit.errors import OutputError, some_of
from modekit.files.marker import CHANGE_LOCK, WorkFolder, foreign_files, read_marker
from modekit.files.write import files_below, remove

Replace = Literal["nothing", "modekit's own", "in place"]
"""What may be at OUT: nothing; what modekit wrote, all of it (`--overwrite`); anything, since all of it is carried over."""

JOURNAL, NEW, OLD = "journal", "new", "old"


def replaced_by(overwrite: bool) -> Replace:
    """What `--overwrite` allows."""
    return "modekit's own" if overwrite else "nothing"


def work_of(out: Path) -> WorkFolder:
    """Where an output is made. Raises OutputError for a path without a name, such as /."""
    return WorkFolder(out, "partial", last=(JOURNAL,))


def is_in_the_making(folder: Path) -> bool:
    """Whether a folder is an output's work folder, or the unfinished output in it."""
    work = folder.parent if folder.name in {NEW, OLD} else folder
    name = work.name.removesuffix(".partial")
    return name not in ("", work.name) and work_of(work.with_name(name)).is_ours


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


def failed(out: Path, error: OSError, *, finished: bool = False) -> OutputError:
    """What is said of an output that cannot be written, and of what is left of it."""
    free = disk_of(out).free
    return OutputError(
        f"the output folder cannot be written; {left_of(out, finished=finished)}",
        where=str(out),
        found=f"{error.strerror or error} ({free:,} bytes free)",
        remedy=None if finished else "free space, or choose a folder that can be written",
    )


def left_of(out: Path, *, finished: bool) -> str:
    """What a command that gave up has left: nothing, unless it was finished or the disk would not let it be removed."""
    work = work_of(out).path
    if finished:
        return f"{out.name} was finished by then"
    if os.path.lexists(work / OLD):
        return f"the old folder is {work.name}/{OLD}, and the next command that asks for {out.name} puts it back"
    return f"{work.name} could not be removed" if os.path.lexists(work) else "nothing was left behind"


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
    if foreign is None or foreign:
        raise OutputError(
            "the output path holds something else than what modekit wrote there, so it is not overwritten",
            where=str(out),
            found=some_of(foreign, 5) if foreign else "no .modekit, which every folder that modekit makes has",
            remedy="move it away, or choose another folder",
        )


def check_room(out: Path, needed: int) -> None:
    """Raise OutputError when the disk has less room than OUT needs, besides what an unfinished one has written of it."""
    new = work_of(out).path / NEW
    for name in files_below(new):
        with suppress(OSError):  # another command is at it, and will be refused or waited for
            needed -= (new / name).lstat().st_size
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
    for folder in (Path(os.path.realpath(source)) for source in sources):
        if real == folder or real in folder.parents or folder in real.parents:
            raise OutputError(
                "the output must not touch what it is made from",
                where=str(out),
                found=f"it is, holds or lies in {folder}",
                remedy="choose a folder beside it",
            )
