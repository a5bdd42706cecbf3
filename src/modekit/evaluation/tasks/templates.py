"""Templates of tasks run in a process of their own, with limits of processor time, memory and length.

A template is a program that a stranger may have written. jinja's sandbox keeps it from the machine, but not from looping for
ever, and one call of it cannot be interrupted: the process can be ended.
"""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from modekit.errors import TextError
from modekit.evaluation.tasks import template_process
from modekit.evaluation.tasks.template_process import HEADER, LONGEST, SECONDS

_PATIENCE_S = 20 * SECONDS  # of the clock, where the system limits no processor time or the machine is busy
_START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    f"from {template_process.__name__} import main; main()"
)  # not from a file in the folder in which the command was typed


class Templates:
    """The parent's end. Use it as a context manager: the process starts with the first template and is gone afterwards."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = float("inf")
        self._closed = threading.Event()

    def __enter__(self) -> Templates:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._process is not None:
            self._end(self._process)

    def render(self, template: str, doc: Mapping[str, Any]) -> str:
        """As the harness's `apply_template`. Raises TextError when the template fails, or does not end."""
        if self._process is None:
            self._process = self._started()
        self._deadline = time.monotonic() + _PATIENCE_S
        reply = self._asked(self._process, pickle.dumps((template, dict(doc))))
        self._deadline = float("inf")
        if reply is None:
            self._end(self._process)
            self._process = None
            problem = f"it takes more than {SECONDS} seconds of processor time, or too much memory"
        else:
            said = json.loads(reply)
            if "text" in said:
                return str(said["text"])
            problem = str(said["error"])
        raise TextError(
            "a task's template cannot be used",
            where="--tasks",
            found=f"{problem[:300]} ({' '.join(template.split())[:200]})",
            remedy=f"correct the template, which may give at most {LONGEST:,} characters",
        )

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        threading.Thread(target=self._watch, args=(process,), daemon=True).start()
        return process

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while not self._closed.wait(1.0) and process.poll() is None:
            if time.monotonic() > self._deadline:
                process.kill()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    @staticmethod
    def _asked(process: subprocess.Popen[bytes], message: bytes) -> bytes | None:
        """The reply; None when the process ended, or says more than it may."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(struct.pack(HEADER, len(message)) + message)
            process.stdin.flush()
        except OSError:
            return None
        header = process.stdout.read(struct.calcsize(HEADER))
        length = struct.unpack(HEADER, header)[0] if len(header) == struct.calcsize(HEADER) else -1
        reply = process.stdout.read(length) if 0 <= length <= 8 * LONGEST else b""
        return reply if reply and len(reply) == length else None
