"""An output folder appears whole or not at all, and replaces only what modekit wrote.

    OUT.partial/.modekit    says that the folder is modekit's, and of which output
    OUT.partial/lock        held by the process that writes, until OUT is in its place
    OUT.partial/journal     digest of the command, and a line for every shard that is whole on the disk
    OUT.partial/new/        the output in the making
    OUT.partial/old/        an old OUT, from the moment that it gives way until the new one is in its place
    OUT                     appears by rename

A killed process leaves OUT.partial. The same command keeps the shards that its journal names, if they have their size, and
makes everything else again. Whoever next asks for OUT mends what a kill between the two renames left: the old folder comes
back, or, when the new one is in its place, goes. A rename never replaces a folder that holds something, so that what appears
at OUT while modekit works is safe, too.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from modekit.errors import InterruptError, OutputError
from modekit.files.lock import Lock
from modekit.files.marker import (
    CHANGE_LOCK,
    INTERNAL,
    MARKER,
    Kind,
    claim_work_folder,
    foreign_files,
    is_remains,
    is_work_folder,
    marker_of,
)
from modekit.files.output import (
    JOURNAL,
    LOCK,
    NEW,
    OLD,
    PARTIAL,
    Replace,
    clear,
    disk_of,
    mend_commit,
    not_writable,
    refuse_entangled,
    refuse_what_is_there,
    work_folder,
)
from modekit.files.read import UNREADABLE, read_text
from modekit.files.tensors import Entry, safetensors_header, write_all
from modekit.files.write import (
    FULL,
    create,
    make_folder,
    remove,
    remove_if_empty,
    sweep,
    sync_file,
    sync_folder,
    sync_tree,
    write_file,
)

_ATTEMPTS = 20


class Staging:
    """An output folder in the making. Use `staging(...)`."""

    def __init__(self, out: Path, digest: str, kind: Kind, *, replace: Replace, sync: bool) -> None:
        self.out, self.work = out, work_folder(out)
        self.folder = self.work / NEW
        self.areas: tuple[str, ...] = ()
        """Folders of the output in which everything will be modekit's."""
        self.last: Callable[[], None] = lambda: None
        """Called when nobody else can change the old folder any more, before the new one is whole; what it raises ends it."""
        self.is_done = False
        """Whether OUT is what was made here."""
        self._kind, self._replace, self._sync = kind, replace, sync
        self._new_parents = [parent for parent in out.parents if not parent.exists()]
        self._disk = ThreadPoolExecutor(1, "sync")
        self._taken: dict[Path, Future[None]] = {}
        self._lock = Lock(self.work / LOCK)
        try:
            self._take()
            mend_commit(self.work, out)
            refuse_what_is_there(out, replace)
            self._replaced = _identity(out)
            self._journal = self._begin(digest)
        except BaseException:
            self._release()
            raise

    def write_shard(self, file: str, entries: list[Entry], write_tensor: Callable[[int, io.FileIO], None]) -> None:
        """Write one safetensors file, unless an earlier run of the same command has.

        `write_tensor(number, stream)` must write the bytes of entry `number` to the unbuffered stream. While the next file is
        written, the disk takes this one.
        """
        path, header = self.folder / file, safetensors_header(entries)
        size = len(header) + sum(nbytes for *_, nbytes in entries)
        if file not in self._journal[1:] or path.is_symlink() or not path.is_file() or path.stat().st_size != size:
            remove(path)
            with create(path) as stream:
                write_all(stream, memoryview(header))
                for number in range(len(entries)):
                    write_tensor(number, stream)
                assert stream.tell() == size, f"{file}: wrote {stream.tell()} bytes, planned {size}"
        if self._sync:
            self._taken[path] = self._disk.submit(self._to_disk, path)

    def _to_disk(self, path: Path) -> None:
        sync_file(path)
        if path.name not in self._journal[1:]:
            self._journal.append(path.name)
            self._write_journal()

    def _write_journal(self) -> None:
        write_file(self.work / JOURNAL, "".join(f"{line}\n" for line in self._journal).encode(), sync=False)

    def commit(self) -> None:
        """Make the folder visible under its final name. Raises OutputError when something else has appeared there."""
        for done in self._taken.values():
            done.result()
        self._disk.shutdown()
        self._check_place()
        change = Lock(self.out / CHANGE_LOCK)
        if self._replaced is not None and not change.take():
            raise OutputError(
                "another command is changing the output folder", where=str(self.out), remedy="run this one again after it"
            )
        try:
            self._take_the_place()
        finally:
            change.release()
        if self._sync:
            sync_folder(self.out.parent)
        self._remove()

    def _take_the_place(self) -> None:
        """While nobody changes a file of the old folder."""
        self.last()
        self._mark()
        if self._sync:
            sync_tree(self.folder, but=self._taken.keys())
        self._check_place()
        if self._replaced is not None:
            refuse_what_is_there(self.out, self._replace)
            if self._replace == "in place":
                shutil.copymode(self.out, self.folder)
            self.out.rename(self.work / OLD)
        self._put()

    def _check_place(self) -> None:
        if _identity(self.out) != self._replaced:
            raise AppearedError(self.out)

    def _mark(self) -> None:
        """Say what in the folder is modekit's: all of it, but for what was carried over and was not."""
        remove(self.folder / MARKER)
        foreign = foreign_files(self.out) if self._replace == "in place" else []
        if foreign is not None:
            marker = marker_of(self.folder, self._kind, areas=self.areas, but=foreign)
            write_file(self.folder / MARKER, marker.as_bytes(), sync=False)

    def _put(self) -> None:
        try:
            self.folder.rename(self.out)
        except OSError:
            if os.path.lexists(self.out):
                raise AppearedError(self.out) from None
            mend_commit(self.work, self.out)
            raise
        self.is_done = True

    def discard(self) -> None:
        """Remove everything written so far; an old folder that has just given way comes back first, or nothing is removed."""
        try:
            mend_commit(self.work, self.out)
        except (OutputError, OSError):
            self.keep()
        else:
            self._remove()

    def keep(self) -> None:
        """Leave everything for the next command with the same digest."""
        self._disk.shutdown(cancel_futures=True)
        self._lock.release()

    def _remove(self) -> None:
        self._disk.shutdown(cancel_futures=True)
        clear(self.work, self._lock)
        self._remove_parents()

    def _remove_parents(self) -> None:
        """Of folders that were made for this one, those that hold nothing."""
        for parent in self._new_parents:
            remove_if_empty(parent)

    def _release(self) -> None:
        """Give the folder free: with what an earlier command left in it, or not at all."""
        self._disk.shutdown()
        work = self.work
        ours = os.path.lexists(work) and (is_remains(work) or is_work_folder(work, PARTIAL, self.out.name))
        alone = self._lock.is_held or (ours and not os.path.lexists(self.work / LOCK))  # a full disk has no room for a lock
        if alone and not (self.work / JOURNAL).exists():
            clear(self.work, self._lock)
        self._lock.release()
        self._remove_parents()

    def _take(self) -> None:
        """Make the work folder, or find our own, and hold it against other processes; the lock dies with this one.

        Raises OutputError when another process is writing the folder, or something else bears its name.
        """
        ours = free = False
        for attempt in range(_ATTEMPTS):
            try:
                ours = claim_work_folder(self.work, PARTIAL, self.out.name)
                free = ours and self._lock.take()
                if free:
                    claim_work_folder(self.work, PARTIAL, self.out.name)  # whoever had it may have cleared it just now
                break
            except FileNotFoundError:  # another process has just finished, and removed it
                if attempt == _ATTEMPTS - 1:  # or the system takes no folder here
                    raise
        if not ours:
            raise OutputError(
                "a folder that modekit did not make is in the way",
                where=str(self.work),
                remedy="move it away, or choose another output folder",
            )
        if not free:
            raise OutputError(
                "another process is writing this output folder",
                where=str(self.out),
                remedy="wait for it, or choose another folder",
            )

    def _begin(self, digest: str) -> list[str]:
        """The journal of an earlier run of the same command, whose folder stays; else a new one, and an empty folder."""
        with suppress(*UNREADABLE):
            journal = read_text(self.work / JOURNAL).splitlines()
            if journal[:1] == [digest] and self.folder.is_dir() and not self.folder.is_symlink():
                sweep(self.folder)
                for name in INTERNAL:  # of a change that was cut short
                    remove(self.folder / name)
                return journal
        for name in (NEW, JOURNAL):
            remove(self.work / name)
        make_folder(self.folder)
        self._journal = [digest]
        self._write_journal()
        return self._journal


class AppearedError(OutputError):
    """Something came to lie at OUT while modekit worked; the work is kept."""

    def __init__(self, out: Path) -> None:
        super().__init__(
            "something else has appeared at the output path meanwhile",
            where=str(out),
            remedy=f"move it away and run the same command again: it continues from {work_folder(out).name}",
        )


def _failed(out: Path, error: OSError, *, finished: bool = False) -> OutputError:
    return OutputError(
        f"writing failed; {_left_of(out, finished=finished)}",
        where=str(out),
        found=f"{error.strerror or error} ({disk_of(out).free:,} bytes free)",
        remedy=None if finished else "free space or choose another disk",
    )


def _left_of(out: Path, *, finished: bool) -> str:
    """What a command that gave up has left: nothing, unless it was finished or the disk would not let it be removed."""
    work = work_folder(out)
    if finished:
        return f"{out.name} was finished by then"
    if os.path.lexists(work / OLD):
        return f"the old folder is {work.name}/{OLD}, and the next command that asks for {out.name} puts it back"
    return f"{work.name} could not be removed" if os.path.lexists(work) else "nothing was left behind"


def _identity(out: Path) -> tuple[int, int] | None:
    """Which folder lies there, whatever is in it; None when there is nothing."""
    try:
        status = out.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def staging(
    out: Path, digest: str, kind: Kind, *, sources: Sequence[Path] = (), replace: Replace = "nothing", sync: bool = True
) -> Iterator[Staging]:
    """A folder in the making that becomes OUT when the block ends well, and is removed when it fails.

    Only a killed process leaves it behind; the next call with the same digest then continues. `kind` says what the folder
    holds, `sources` are the folders it is made from, `replace` says what may be in its place. With `sync` it outlives a power
    loss once it is there; without, a killed process begins again.

    Raises OutputError when OUT exists and may not be replaced, when it and a source lie in one another, or when the disk is
    full or not writable.
    """
    try:
        refuse_entangled(out, sources)
        stage = Staging(out, digest, kind, replace=replace, sync=sync)
    except OSError as error:
        raise (_failed(out, error) if error.errno in FULL else not_writable(out, error)) from None
    try:
        yield stage
        stage.commit()
    except AppearedError:
        stage.keep()
        raise
    except OSError as error:
        stage.discard()
        raise _failed(out, error, finished=stage.is_done) from None
    except KeyboardInterrupt:
        stage.discard()
        left, remedy = _left_of(out, finished=stage.is_done), None if stage.is_done else "run the command again to start over"
        raise InterruptError(f"interrupted; {left}", where=str(out), remedy=remedy) from None
    except BaseException:
        stage.discard()
        raise
