"""A process that dies before its n-th operation on files: no handler runs, nothing is flushed, as with SIGKILL."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

KILLED = 9
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


def dies(work: Callable[[], object], below: Path, count: int) -> bool:
    """Whether `work`, done in a process of its own, came to the count-th change of a file below a folder, and died there."""
    process = os.fork()
    if process == 0:
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                _die_at(str(below), count)
                work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in {0, KILLED}, code
    return code == KILLED


def _die_at(below: str, count: int) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES)
        if changes and any(below in os.fsdecode(arg) for arg in args[:2] if isinstance(arg, (str, bytes, os.PathLike))):
            seen += 1
            if seen == count:
                os._exit(KILLED)

    sys.addaudithook(hook)
