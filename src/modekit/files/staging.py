"""The result folder appears whole or not at all.

    OUT.partial/            everything is written here, with a journal line after each tensor
    OUT.partial/journal     what is surely written (after a kill; not after a power loss); the same build goes on from there
    OUT.partial/lock        held by the process that writes here, and released when it ends, however it does
    OUT                     appears by rename; an old OUT is set aside as OUT.replaced first and removed last

A killed process leaves OUT.partial, which never looks like a checkpoint: its record file is written last.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modekit.errors import InterruptError, OutputError

JOURNAL = "journal"
_LOCK = "lock"

Entry = tuple[str, str, tuple[int, ...], int]
"""name, safetensors dtype, shape, bytes: one tensor of a file's header."""


def safetensors_header(entries: Iterable[Entry]) -> bytes:
    """Header of a safetensors file with the tensors in the given order; data starts on an 8-byte boundary."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is seen whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def link(file: Path, target: Path) -> None:
    """The same bytes under another name, without copying them where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def json_bytes(value: object) -> bytes:
    """Data as indented JSON with a fixed key order."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    """Write data as JSON, atomically."""
    write_atomically(path, json_bytes(value))


class Staging:
    """An output folder in the making. Use `staging(...)`."""

    def __init__(self, out: Path, digest: str, marker: str) -> None:
        self.out = out
        self._marker = marker
        self.folder = out.with_name(out.name + ".partial")
        self._new_parents = [parent for parent in out.parents if not parent.exists()]
        self._journal_path = self.folder / JOURNAL
        self._appending = threading.Lock()
        self._alone = FileLock(self.folder / _LOCK)
        self._take()
        try:
            self._done = self._open(digest)
            self._journal = self._journal_path.open("a", encoding="utf-8", buffering=1)
        except OSError:
            self._remove()
            raise

    def recall(self, key: str) -> Any:
        """What an earlier, interrupted run recorded under a key; None when nothing."""
        return self._done.get(key)

    def record(self, key: str, value: object) -> None:
        """Append to the journal. Call only when what it claims is already written."""
        with self._appending:
            self._journal.write(json.dumps([key, value]) + "\n")
            self._done[key] = value

    def write_shard(self, file: str, entries: list[Entry], write_tensor: Callable[[int, io.FileIO], None]) -> None:
        """Write one safetensors file, going on after the last tensor that the journal knows.

        `write_tensor(number, stream)` must write the bytes of entry `number` to the unbuffered stream.
        """
        header = safetensors_header(entries)
        ends = [len(header)]
        for entry in entries:
            ends.append(ends[-1] + entry[3])
        path = self.folder / file
        done = int(self.recall(f"shard {file}") or 0)
        if not path.exists() or path.stat().st_size < ends[done]:
            done = 0
        with path.open("r+b" if done else "wb", buffering=0) as stream:
            if done:
                stream.truncate(ends[done])
                stream.seek(ends[done])
            else:
                write_all(stream, memoryview(header))
            for number in range(done, len(entries)):
                write_tensor(number, stream)
                position = stream.tell()
                assert position == ends[number + 1], f"{entries[number][0]}: wrote to {position}, planned {ends[number + 1]}"
                self.record(f"shard {file}", number + 1)

    def commit(self) -> None:
        """Make the folder visible under its final name."""
        self.close()
        self._release()  # no system renames a folder in which a file is held
        self._journal_path.unlink()
        replaced = _set_aside(self.out)
        try:
            if self.out.exists():
                self.out.rename(replaced)
            self.folder.rename(self.out)
        except BaseException:
            if replaced.exists() and not self.out.exists():
                replaced.rename(self.out)
            raise
        _remove_folder(replaced, last=self._marker)

    def discard(self) -> None:
        """Remove everything written so far."""
        with suppress(OSError):  # a full disk: what the journal still holds cannot be written, and need not be
            self.close()
        self._remove()

    def _remove(self) -> None:
        self._release()
        _remove_folder(self.folder, last=JOURNAL)
        for parent in self._new_parents:
            with suppress(OSError):  # someone else has put something there meanwhile
                parent.rmdir()

    def close(self) -> None:
        """Release the journal; what was written stays for a resume."""
        self._journal.close()

    def _take(self) -> None:
        """Hold the folder against other processes; the lock dies with this one.

        Raises OutputError when another process is writing the folder, or something else bears its name.
        """
        ours = self._journal_path.exists() or (self.folder / self._marker).exists()
        if self.folder.exists() and not ours and any(path.name != _LOCK for path in self.folder.iterdir()):
            raise OutputError(
                "a folder that modekit did not make is in the way", where=str(self.folder),
                remedy="move it away, or choose another output folder",
            )  # fmt: skip
        is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._alone.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                "another process is writing this output folder", where=str(self.out),
                remedy="wait for it, or choose another folder",
            ) from None  # fmt: skip
        except OSError:
            if is_new:
                self._remove()
            raise

    def _release(self) -> None:
        """Give the folder free; a lock file outlives its lock."""
        if self._alone.is_locked:
            self._alone.release()
            (self.folder / _LOCK).unlink(missing_ok=True)

    def _open(self, digest: str) -> dict[str, Any]:
        if self._journal_path.exists():
            lines = self._journal_path.read_text(encoding="utf-8", errors="replace").splitlines()
            if lines and lines[0] == digest:
                return dict(_whole_lines(lines[1:]))
        _empty_folder(self.folder, {JOURNAL, _LOCK})
        self._journal_path.write_text(digest + "\n", encoding="utf-8")
        return {}


def _remove_folder(folder: Path, *, last: str) -> None:
    """Remove a folder, the file `last` at the end: a kill in between leaves what is still known to be ours."""
    _empty_folder(folder, {last})
    shutil.rmtree(folder, ignore_errors=True)


def _empty_folder(folder: Path, but: Collection[str]) -> None:
    """Remove what lies in a folder, but for the files of some names."""
    with suppress(OSError):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in but:
                path.unlink(missing_ok=True)


def _set_aside(out: Path) -> Path:
    return out.with_name(out.name + ".replaced")


def _whole_lines(lines: list[str]) -> Iterator[tuple[str, Any]]:
    for line in lines:
        try:
            key, value = json.loads(line)
        except (ValueError, TypeError):  # the line that a kill cut short
            return
        yield str(key), value


def write_all(stream: io.FileIO, view: memoryview) -> None:
    """Write all of a view to an unbuffered stream, however little each call takes."""
    while len(view):
        view = view[stream.write(view) or 0 :]


def _finish_commit(out: Path, marker: str) -> None:
    """Mend what a kill inside `commit` left: between its two renames the old folder comes back, after them it goes."""
    replaced = _set_aside(out)
    if (replaced / marker).exists() and not out.exists():
        replaced.rename(out)
    elif (replaced / marker).exists() or (replaced.is_dir() and not any(replaced.iterdir())):
        _remove_folder(replaced, last=marker)


def refuse_existing(out: Path, *, overwrite: bool, marker: str) -> None:
    """Raise OutputError when OUT exists and may not be replaced; first mend what a killed commit left of it."""
    _finish_commit(out, marker)
    if out.exists() and not overwrite:
        raise OutputError("the output folder exists", where=str(out), remedy="choose another folder or pass --overwrite")
    if out.exists() and not (out / marker).exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise OutputError(
            "the output path exists and holds something else, so it is not overwritten", where=str(out),
            remedy="choose another folder, or remove it yourself",
        )  # fmt: skip


@contextmanager
def staging(out: Path, digest: str, *, overwrite: bool, marker: str) -> Iterator[Staging]:
    """A staging folder that is committed when the block ends well, and removed when it fails.

    Only a killed process leaves it behind; the next call with the same digest then continues. An existing folder is
    only ever replaced when it holds the file `marker`, which says that modekit wrote it.

    Raises OutputError when OUT exists and `overwrite` is False, or when the disk is full or not writable.
    """
    try:
        refuse_existing(out, overwrite=overwrite, marker=marker)
        stage = Staging(out, digest, marker)
    except OSError as error:
        raise OutputError(
            "the output folder cannot be written",
            where=str(out),
            found=error.strerror,
            remedy="choose a folder that can be written",
        ) from None
    try:
        yield stage
        stage.commit()
    except OSError as error:
        stage.discard()
        free = shutil.disk_usage(next(parent for parent in out.parents if parent.exists())).free
        raise OutputError(
            "writing failed; nothing was left behind", where=str(out), found=f"{error.strerror or error} ({free:,} bytes free)",
            remedy="free space or choose another disk; `modekit plan` tells how much is needed",
        ) from None  # fmt: skip
    except KeyboardInterrupt:
        stage.discard()
        raise InterruptError(
            "interrupted; nothing was left behind", where=str(out), remedy="run the command again to start over"
        ) from None
    except BaseException:
        stage.discard()
        raise
