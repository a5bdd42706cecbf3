"""The disk that OUT will be on: its room, and what is said where it takes no more."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from modekit.errors import OutputError
from modekit.files.output import NEW, OLD, work_of
from modekit.files.write import FULL, files_below


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
    return shutil.disk_usage(_nearest(out))


def _nearest(out: Path) -> Path:
    """The innermost of the folders around OUT that is there."""
    return next(parent for parent in out.parents if parent.exists())


def failed(out: Path, error: OSError, *, finished: bool = False) -> OutputError:
    """What is said of an output that cannot be written, and of what is left of it."""
    place = _nearest(out)
    found = f"{error.strerror or error}"
    remedy = "choose a folder that can be written"
    if error.errno in FULL:
        found += f" ({disk_of(out).free:,} bytes free)"
        remedy = "free space, or choose a folder on another disk"
    elif not place.is_dir():
        found = f"{place} is a file"
    return OutputError(
        f"the output folder cannot be written; {left_of(out, finished=finished)}",
        where=str(out),
        found=found,
        remedy=None if finished else remedy,
    )


def left_of(out: Path, *, finished: bool) -> str:
    """What a command that gave up has left: nothing, unless it was finished or the disk would not let it be removed."""
    work = work_of(out).path
    if finished:
        return f"{out.name} was finished by then"
    if os.path.lexists(work / OLD):
        return f"the old folder is {work.name}/{OLD}, and the next command that asks for {out.name} puts it back"
    return f"{work.name} could not be removed" if os.path.lexists(work) else "nothing was left behind"
