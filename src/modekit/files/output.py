"""May this be written? What lies at an output path, what a kill left of it, what it is made from, and what is surely written.

Where an output is made, `OUT.partial`, is laid out in staging.py. Its journal is lines of JSON, each a key and what is surely
written under it; the first has the digest and the boot. After a power loss it is believed only as far as the disk had the
bytes: of shards that were written whole.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from modekit.errors import FinishedError, OutputError
from modekit.files.lock import Lock
from modekit.files.marker import CHANGE_LOCK, JUST_MADE, MARKER, foreign_files, is_remains, is_work_folder, read_marker
from modekit.files.read import UNREADABLE, read_text
from modekit.files.tensors import write_all
from modekit.files.write import empty_folder, files_below, go_on_writing, remove, remove_if_empty, write_file

Replace = Literal["nothing", "modekit's own", "in place"]
"""What may be at OUT: nothing; what modekit wrote, all of it (`--overwrite`); anything, since all of it is carried over."""

PARTIAL: Literal["partial"] = "partial"
LOCK, JOURNAL, NEW, OLD = "lock", "journal", "new", "old"
_SHOWN = 5


def replaced_by(overwrite: bool) -> Replace:
    """What `--overwrite` allows."""
    return "modekit's own" if overwrite else "nothing"


def work_folder(out: Path) -> Path:
    """Where an output is made."""
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
    if replace != "nothing" or not os.path.lexists(out / JUST_MADE):  # else who makes it asks who has
        refuse_what_is_there(out, replace)


def not_writable(out: Path, error: OSError) -> OutputError:
    """What is said of an output that cannot even be begun."""
    return OutputError(
        "the output folder cannot be written",
        where=str(out),
        found=error.strerror,
        remedy="choose a folder that can be written",
    )


def was_made_by(out: Path, digest: str) -> bool:
    """Whether OUT is what a run of the same command made that was killed while it tidied up."""
    try:
        return read_marker(out) is not None and read_text(out / JUST_MADE) == digest
    except UNREADABLE:
        return False


def check_not_made_by(out: Path, made_by: str) -> None:
    """Raise FinishedError, with all tidied up, where the same command made OUT and was killed while it tidied up."""
    if was_made_by(out, made_by):
        mend(out)
        settle(out)
        raise FinishedError(out)


def is_there(out: Path) -> bool:
    """Whether there is an output, tidied up after whatever a kill left beside it. Raises OutputError, OSError."""
    mend(out)
    settle(out)
    return out.exists()


def settle(out: Path) -> None:
    """The command that made OUT has tidied up: from now on nobody finds its own work there."""
    remove(out / JUST_MADE)


def mend(out: Path) -> None:
    """Put right what a kill inside a commit left, unless a process is at it. Raises OutputError, OSError."""
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
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise OutputError(
            "the output folder holds files that modekit did not write, or that were changed since",
            where=str(out),
            found=", ".join(foreign[:_SHOWN]) + more,
            remedy="move them away, or choose another folder",
        )


def check_room(out: Path, needed: int) -> None:
    """Raise OutputError when the disk has less room than OUT needs, besides what an unfinished one has written of it."""
    new = work_folder(out) / NEW
    needed -= sum(_size_of(new / name) for name in files_below(new))
    disk = disk_of(out)
    free = disk.free
    if disk.total and needed > free:  # some file systems do not say how large they are
        raise OutputError(
            "the disk has too little free space",
            where=str(out),
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            remedy=f"free {needed - free:,} bytes, or choose a folder on another disk",
        )


def disk_of(out: Path) -> shutil._ntuple_diskusage:
    """Size and free bytes of the disk that OUT will be on."""
    return shutil.disk_usage(next(parent for parent in out.parents if parent.exists()))


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 where another command has just taken it away."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def refuse_entangled(out: Path, sources: Sequence[Path]) -> None:
    """Raise OutputError when OUT is, holds, or lies in a folder that the command reads, whatever links lead there."""
    real = out.resolve()
    for source in sources:
        folder = source.resolve()
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


_LARGEST = 2**28


class Journal:
    """A journal that is written anew with what is known, and then line by line, by any thread. Raises OSError."""

    def __init__(self, path: Path, digest: str, known: Mapping[str, JsonValue] = {}) -> None:
        self._known, self._appending = dict(known), threading.Lock()
        lines = [_line(digest, _this_boot()), *(_line(key, value) for key, value in known.items())]
        write_file(path, b"".join(lines), sync=False)
        self._stream = go_on_writing(path, append=True)

    def recall(self, key: str) -> JsonValue:
        """What was recorded under a key; None when nothing."""
        return self._known.get(key)

    def record(self, key: str, value: JsonValue) -> None:
        """Append a line. Call only when what it claims is already written."""
        with self._appending:
            write_all(self._stream, memoryview(_line(key, value)))
            self._known[key] = value

    def close(self) -> None:
        """Release the file."""
        self._stream.close()


def read_journal(path: Path, digest: str) -> dict[str, JsonValue]:
    """What a run of the same digest that was cut short has recorded. Raises OSError or ValueError where there was none."""
    (known, boot), *rest = _whole_lines(read_text(path, _LARGEST))
    if known != digest:
        raise ValueError("it is of another command")
    done = dict(rest)
    if boot and boot == _this_boot():
        return done
    return {key: value for key, value in done.items() if not key.startswith("shard ") or done.get(f"synced {key[6:]}")}


def _this_boot() -> str:
    """Changes whenever the machine starts; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _line(key: str, value: JsonValue) -> bytes:
    return (json.dumps([key, value]) + "\n").encode()


def _whole_lines(text: str) -> Iterator[tuple[str, JsonValue]]:
    """The entries, up to the one that a kill cut short."""
    for each in text.splitlines():
        try:
            key, value = json.loads(each)
        except (ValueError, TypeError, RecursionError):  # it is cut short
            return
        yield str(key), value
