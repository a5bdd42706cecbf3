"""A process of its own for what is another program's work, and both ends of the line to it.

The parent starts MODULE in a new interpreter, says what is wanted as one line of JSON on its standard input, and keeps that
open. The child ends when its standard input does, so that it never outlives whoever started it, killed or not. It answers with
lines of JSON on its standard output; the parent keeps the end of its standard error for a message.

llama.cpp's threads meet after every operation. Where one of them has no core to itself, the others wait for it and by default
spin, which costs up to a hundred times the time (benchmarks/llama.md): so they sleep.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

KEY = "MODEKIT_API_KEY"
"""The environment variable with the key that clients of a server must send."""
_THREADS, _WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
ProcessSettings = dict[str, Any]
"""Settings of a process, as JSON; its module lists the keys that it reads."""
_LINES = 40  # of what the child says, for a message
_SHOWN = 2
_ERROR = re.compile(r"error|failed|assert|not supported", re.IGNORECASE)
_LONGEST = 400
_PATIENCE_S = 10.0
_START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
"""Like `python -m MODULE`, but that nothing is imported from the folder in which the command was typed."""


class Child:
    """The parent's end. Use it as a context manager: the child is gone afterwards."""

    def __init__(self, module: str, settings: ProcessSettings, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that what it starts is of its group, and ends with it
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._said: deque[str] = deque(maxlen=_LINES)
        self._listener = threading.Thread(target=self._listen, args=(_pipe(self._process.stderr),), daemon=True)
        self._listener.start()
        self._watcher = threading.Thread(target=self._end_group, daemon=True)
        self._watcher.start()
        stream = _pipe(self._process.stdin)
        with suppress(OSError):  # where it is already gone, whoever waits for its answer learns why
            stream.write(json.dumps(settings) + "\n")
            stream.flush()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def complaint(self) -> str:
        """Of the last lines that it said, those that speak of an error, or the last ones."""
        said = list(self._said)
        telling = [line for line in said if _ERROR.search(line) and line[0] != " "]
        code = self._process.poll() or 0
        ended = f" (ended by {signal.Signals(-code).name})" if code < 0 else ""
        return ("; ".join(telling[-_SHOWN:] or said[-_SHOWN:]) or "nothing") + ended

    def answer(self) -> dict[str, str] | None:
        """The next object that it writes, as a line of JSON; None when it ended without one."""
        for line in _pipe(self._process.stdout):
            with suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict):
                    return found
            self._said.append(line.rstrip()[:_LONGEST])  # a library's own word on the standard output
        self._process.wait()
        self._watcher.join(_PATIENCE_S)
        self._listener.join(_PATIENCE_S)
        return None

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End it with what it started: by the end of its standard input, and where it does not heed that, at once."""
        with suppress(OSError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._watcher.join(_PATIENCE_S)
        with suppress(OSError):
            _pipe(self._process.stdout).close()
        self._listener.join(_PATIENCE_S)
        _pipe(self._process.stderr).close()

    def _end_group(self) -> None:
        """Once the process has ended, end what it started: that would hold its end of the pipes open."""
        self._process.wait()
        with suppress(AttributeError, ProcessLookupError, PermissionError):  # Windows has no groups; nothing is left
            os.killpg(self._process.pid, signal.SIGKILL)

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip():
                self._said.append(line.rstrip()[:_LONGEST])


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def settings_of_caller(at_end: Callable[[], None] = lambda: os._exit(1)) -> ProcessSettings:
    """The child's end: what the parent wants. From now on the process ends when the parent does, by `at_end`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, whose end is this one's
    settings: ProcessSettings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_caller, args=(at_end,), daemon=True).start()
    return settings


def answer_caller(value: Mapping[str, str]) -> None:
    """The child's end: one line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _end_with_caller(at_end: Callable[[], None]) -> None:
    while os.read(0, 1024):  # not sys.stdin, whose lock an interpreter that ends by itself would miss
        pass
    at_end()


def url_of(host: str, port: int) -> str:
    """Of an address that is listened on."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set; else the cores that this process may use, by its affinity and its container's quota."""
    asked = os.environ.get(_THREADS, "").split(",")[0].strip()
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max 100000" where there is no quota
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def threads_environment(threads: int) -> Mapping[str, str]:
    """What a process finds in its environment so that it computes with so many threads, which sleep while they wait."""
    return {_THREADS: str(threads), _WAITING: os.environ.get(_WAITING, "passive")}
