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
from modekit.files.copies import sweep
from modekit.files.disk import failed, left_of
from modekit.files.lock import Lock
from modekit.files.marker import CHANGE_LOCK, INTERNAL, MARKER, Kind, Marker, foreign_files
from modekit.files.output import JOURNAL, NEW, OLD, mend_commit, work_of
from modekit.files.place import Replace, refuse_entangled, refuse_what_is_there
from modekit.files.read import UNREADABLE, read_text
from modekit.files.write import (
    Entry,
    create,
    files_below,
    make_folder,
    remove,
    remove_if_empty,
    safetensors_header,
    sync_file,
    sync_folder,
    sync_tree,
    write_all,
    write_file,
)


class Staging:
    """An output folder in the making. Use `staging(...)`."""

    def __init__(self, out: Path, digest: str, kind: Kind, *, replace: Replace, sync: bool) -> None:
        self.out = out
        self._work = work_of(out)
        self.folder = self._work.path / NEW
        self.last: Callable[[], None] = lambda: None
        """Called when nobody else can change the old folder any more, before the new one is whole; what it raises ends it."""
        self.is_done = False
        """Whether OUT is what was made here."""
        self._kind = kind
        self._replace = replace
        self._sync = sync
        self._disk = ThreadPoolExecutor(1, "sync")
        self._taken: dict[Path, Future[None]] = {}
        try:
            self._work.take()
            mend_commit(self._work.path, out)
            refuse_what_is_there(out, replace)
            self._replaced = _identity(out)
            self._journal = self._begin(digest)
        except BaseException:
            if self._work.lock.is_held and not (self._work.path / JOURNAL).exists():
                self._work.clear()
            self.keep()
            remove_if_empty(self._work.path)  # a full disk has no room for a lock
            raise

    def write_shard(self, file: str, entries: list[Entry], write_tensor: Callable[[int, io.FileIO], None]) -> None:
        """Write one safetensors file, unless an earlier run of the same command has; `write_tensor(number, stream)` writes the
        bytes of an entry to the unbuffered stream. While the next file is written, the disk takes this one.
        """
        path = self.folder / file
        header = safetensors_header(entries)
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
        write_file(self._work.path / JOURNAL, "".join(f"{line}\n" for line in self._journal).encode(), sync=False)

    def commit(self) -> None:
        """Make the folder visible under its final name. Raises OutputError when something else has appeared there."""
        for done in self._taken.values():
            done.result()
        self._check_place()
        change = Lock(self.out / CHANGE_LOCK)
        if self._replaced is not None and not change.take():
            raise OutputError(
                "another command is changing the output folder", where=str(self.out), remedy="run this one again after it"
            )
        try:
            self.last()
            self._mark()
            if self._sync:
                sync_tree(self.folder, but=self._taken.keys())
            self._check_place()
            if self._replaced is not None:
                refuse_what_is_there(self.out, self._replace)
                if self._replace == "in place":
                    shutil.copymode(self.out, self.folder)
                self.out.rename(self._work.path / OLD)
            self._put()
        finally:
            change.release()
        if self._sync:
            sync_folder(self.out.parent)
        self._remove()

    def _check_place(self) -> None:
        if _identity(self.out) != self._replaced:
            raise AppearedError(self.out)

    def _mark(self) -> None:
        """Say what in the folder is modekit's: all of it, but for what was carried over and was not."""
        remove(self.folder / MARKER)
        foreign = foreign_files(self.out) if self._replace == "in place" else []
        if foreign is not None:
            marker = Marker(kind=self._kind)
            below = files_below(self.folder)
            names = [name for name in below if not (marker.owns(name) or (self.folder / name).is_symlink())]
            write_file(self.folder / MARKER, marker.with_files(self.folder, names, but=foreign).as_bytes(), sync=False)

    def _put(self) -> None:
        try:
            self.folder.rename(self.out)
        except OSError:
            if os.path.lexists(self.out):
                raise AppearedError(self.out) from None
            mend_commit(self._work.path, self.out)
            raise
        self.is_done = True

    def discard(self) -> None:
        """Remove everything written so far; an old folder that has just given way comes back first, or nothing is removed."""
        try:
            mend_commit(self._work.path, self.out)
        except (OutputError, OSError):
            self.keep()
        else:
            self._remove()

    def keep(self) -> None:
        """Leave everything for the next command with the same digest."""
        self._disk.shutdown(cancel_futures=True)
        self._work.lock.release()

    def _remove(self) -> None:
        self._disk.shutdown(cancel_futures=True)
        self._work.clear()

    def _begin(self, digest: str) -> list[str]:
        """The journal of an earlier run of the same command, whose folder stays; else a new one, and an empty folder."""
        with suppress(*UNREADABLE):
            journal = read_text(self._work.path / JOURNAL).splitlines()
            if journal[:1] == [digest] and self.folder.is_dir() and not self.folder.is_symlink():
                sweep(self.folder)
                for name in INTERNAL:  # of a change that was cut short
                    remove(self.folder / name)
                return journal
        for name in (NEW, JOURNAL):
            remove(self._work.path / name)
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
            remedy=f"move it away and run the same command again: it continues from {out.name}.partial",
        )


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
    stage = None
    try:
        refuse_entangled(out, sources)
        stage = Staging(out, digest, kind, replace=replace, sync=sync)
        yield stage
        stage.commit()
    except AppearedError:
        if stage is not None:
            stage.keep()
        raise
    except BaseException as error:
        finished = stage is not None and stage.is_done
        if stage is not None:
            stage.discard()
        if isinstance(error, OSError):
            raise failed(out, error, finished=finished) from None
        if isinstance(error, KeyboardInterrupt):
            raise InterruptError(
                f"interrupted; {left_of(out, finished=finished)}",
                where=str(out),
                remedy=None if finished else "run the command again to start over",
            ) from None
        raise
