"""A process that dies before its n-th operation on files: no handler runs, nothing is flushed, as with SIGKILL."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

KILLED = 9
Sizes = dict[int, int]
"""Inode -> bytes of the file that are surely on the disk."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OF_OTHERS = ("study.log", "tfevents")
"""Logs that other libraries append to, line by line: each line would be a moment of its own, and all alike."""
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


def dies(work: Callable[[], object], below: Path, count: int, *, lose: Callable[[Path, Sizes], None] | None = None) -> bool:
    """Whether `work`, done in a process of its own, came to the count-th change of a file below a folder, and died there.

    With `lose` the machine dies with it: it is called with what the disk has of every file, and makes the folder what the
    disk would give back.
    """
    process = os.fork()
    if process == 0:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                _die_at(below, count, lose)
                work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in {0, KILLED}, code
    return code == KILLED


def _die_at(below: Path, count: int, lose: Callable[[Path, Sizes], None] | None) -> None:
    seen = 0
    dying = False
    synced = {file.stat().st_ino: file.stat().st_size for file in below.rglob("*") if file.is_file()}
    fsync, on_the_disk = os.fsync, threading.Lock()

    def recorded(descriptor: int) -> None:
        with on_the_disk:  # a thread that waits for the disk when the power goes waits for ever
            fsync(descriptor)
            status = os.fstat(descriptor)
            synced[status.st_ino] = status.st_size

    os.fsync = recorded

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, dying
        changes = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES)
        paths = [os.fsdecode(arg) for arg in args[:2] if isinstance(arg, (str, bytes, os.PathLike))] if changes else []
        if any(str(below) in path and not any(name in path for name in _OF_OTHERS) for path in paths):
            seen += 1
            if seen == count and not dying:
                dying = True
                if lose is not None:
                    on_the_disk.acquire()
                    lose(below, synced)
                os._exit(KILLED)

    sys.addaudithook(hook)
