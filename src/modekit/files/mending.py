"""What a kill left of an output is put right, and what is said of one that cannot be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from modekit.errors import OutputError
from modekit.files.output import (
    JOURNAL,
    NEW,
    OLD,
    Replace,
    disk_of,
    mend_commit,
    refuse_entangled,
    refuse_what_is_there,
    work_of,
)


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
