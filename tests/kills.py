"""What befalls a process before its n-th change of a file: it dies, is interrupted, or the disk takes no more."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

KILLED = 9
_PATIENCE_S = 300.0
Sizes = dict[int, int]
"""Inode -> bytes of the file that are surely on the disk."""
Fate = Literal["kill", "interrupt", "full", "stuck"]
"""SIGKILL; SIGINT; a disk with no room for a name or a byte from then on; one that lets nothing be renamed or removed, too."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OF_OTHERS = ("study.log", "tfevents")
"""Logs that other libraries append to, line by line: each line would be a moment of its own, and all alike."""
_FOLDER_AT = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 9}
"""Events that change files, and which argument is the folder that the path is relative to."""
_NEED_NO_ROOM = ("os.rename", "os.remove", "os.rmdir")


@dataclass(frozen=True)
class Ended:
    """How a command ended: whether it came to the moment, its exit code (-9: killed), and what it said of an error."""

    came: bool
    code: int
    said: str


@contextmanager
def watched(process: int) -> Iterator[None]:
    """A child that hangs ends, after it has said where its threads are, as pytest has it for SIGABRT."""
    timer = threading.Timer(_PATIENCE_S, os.kill, (process, signal.SIGABRT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # the next child must not be forked beside it


def exit_code(process: int) -> int:
    """Of a child, once it has ended; minus the signal that ended it."""
    with watched(process):
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dies(work: Callable[[], object], below: Path, count: int, *, lose: Callable[[Path, Sizes], None] | None = None) -> bool:
    """Whether `work`, done in a process of its own, came to the count-th change of a file below a folder, and died there.

    No handler runs, nothing is flushed, as with SIGKILL. With `lose` the machine dies with it: it is called with what the
    disk has of every file, and makes the folder what the disk would give back.
    """
    process = os.fork()
    if process == 0:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                _die_at(below, count, lose)
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    code = exit_code(process)
    assert code in {0, KILLED}, code
    return code == KILLED


def befallen(command: Callable[[], tuple[object, str]], below: Path, count: int, fate: Fate) -> Ended:
    """A command, which gives its exit code and what it said, in a process of its own that this befalls."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            came = _befall(below, count, fate)
            code, said = command()
            os.write(writing, json.dumps([came.is_set(), int(str(code)), said[-20_000:]]).encode())
            os._exit(0)
        except BaseException:
            os.write(writing, json.dumps([True, 99, traceback.format_exc()[-20_000:]]).encode())
            os._exit(1)
    os.close(writing)
    with watched(process), os.fdopen(reading, "rb") as stream:
        told = stream.read()
    code = exit_code(process)
    return Ended(True, -KILLED, "") if code == KILLED else Ended(*json.loads(told))


def changed_paths(command: Callable[[], object], below: Path) -> set[Path]:
    """What a command, in a process of its own, opens for writing, makes, renames or removes below a folder."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        found: set[str] = set()
        _before_each(below, 1, lambda _event, path: found.add(path))
        command()
        with os.fdopen(writing, "w") as stream:
            json.dump(sorted(found), stream)
        os._exit(0)
    os.close(writing)
    with watched(process), os.fdopen(reading) as stream:
        told = json.load(stream)
    exit_code(process)
    return {Path(path) for path in told if path.startswith(str(below))}


def _befall(below: Path, count: int, fate: Fate) -> threading.Event:
    """Let it befall this process; whether it has."""
    came = threading.Event()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def act(event: str, path: str) -> None:
        first = not came.is_set()
        came.set()
        if fate == "kill":
            os._exit(KILLED)
        if fate == "interrupt":
            if first:
                signal.raise_signal(signal.SIGINT)
            return
        if first:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # what is open already takes no more bytes
        if fate == "stuck" or event not in _NEED_NO_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    _before_each(below, count, act)
    return came


def _die_at(below: Path, count: int, lose: Callable[[Path, Sizes], None] | None) -> None:
    synced = {file.stat().st_ino: file.stat().st_size for file in below.rglob("*") if file.is_file()}
    fsync, on_the_disk = os.fsync, threading.Lock()

    def recorded(descriptor: int) -> None:
        with on_the_disk:  # a thread that waits for the disk when the power goes waits for ever
            fsync(descriptor)
            status = os.fstat(descriptor)
            synced[status.st_ino] = status.st_size

    os.fsync = recorded

    def act(_event: str, _path: str) -> None:
        if lose is not None:
            on_the_disk.acquire()
            while True:
                try:
                    lose(below, synced)
                    break
                except FileNotFoundError:  # a rename of another thread had begun; the others wait, so that it is the last
                    continue
                except BaseException:
                    os.write(2, traceback.format_exc().encode())
                    os._exit(1)  # and no later change may wait for this thread
        os._exit(KILLED)

    _before_each(below, count, act)


def _before_each(below: Path, count: int, act: Callable[[str, str], None]) -> None:
    """Call `act` before the count-th change of a file below a folder, and before each that follows; other threads' wait."""
    seen = 0
    acting = False
    one_at_a_time = threading.RLock()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, acting
        if event not in _FOLDER_AT and not (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            return
        paths = [_whole(os.fsdecode(arg), event, args) for arg in args[:2] if isinstance(arg, (str, bytes, os.PathLike))]
        found = [path for path in paths if str(below) in path and not any(name in path for name in _OF_OTHERS)]
        if not found:
            return
        with one_at_a_time:
            if acting:
                return
            seen += 1
            if seen >= count:
                acting = True
                try:
                    act(event, found[0])
                finally:
                    acting = False

    sys.addaudithook(hook)


def _whole(path: str, event: str, args: tuple[Any, ...]) -> str:
    """A path, where it is relative to an open folder or to the one that the process is in."""
    place = _FOLDER_AT.get(event, 9)
    folder = args[place] if place < len(args) else -1
    is_open = isinstance(folder, int) and folder >= 0
    return str((Path(f"/proc/self/fd/{folder}").readlink() if is_open else Path.cwd()) / path)
