"""A process of its own that runs chat templates and templates of tasks, and both ends of the line to it.

A template is a program that came with a model. One call of it may compute for hours inside a C function, where Python cannot
stop it, so it runs where the system can: the child has a limit of processor time for each text and a limit of memory for all,
and ends when either is passed. The next text starts a new one. It also ends when its standard input does, so that it never
outlives whoever started it.

The parent writes one line of JSON per text to the child's standard input and reads one line from its standard output. The child
calls the function of transformers that `apply_chat_template` calls, without torch: it starts in half a second, with 60 MB.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

SECONDS = 5.0
"""Processor time for one text."""
_WAIT_S = 60.0  # for the answer, however busy the machine is
_MEMORY = 2**30  # bytes more than the child has after its imports
_LARGEST = 2**26  # bytes of a line, in either direction
_SHOWN = 1_000  # characters of an error
_EXHAUSTED = 3  # exit code of a child that found no more memory
_START = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""Runs this file by itself: nothing is imported from the current folder, nor the rest of modekit."""


class RenderError(Exception):
    """A template raised an error for what it was given."""


class LimitError(RenderError):
    """A template passed a limit."""


class TemplateProcess:
    """The parent's end. Threads take turns; the child starts with the first text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def text(self, source: str, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object]) -> str:
        """What the template makes of the messages; `variables` are what it sees besides. Raises RenderError."""
        return self._rendered({"source": source, "messages": messages, "variables": variables})

    def text_of_item(self, source: str, item: Mapping[str, object]) -> str:
        """What the template of a task makes of one of its items, as lm-evaluation-harness would. Raises RenderError."""
        return self._rendered({"source": source, "item": item})

    def _rendered(self, request: Mapping[str, object]) -> str:
        asked = json.dumps({**request, "seconds": SECONDS}, ensure_ascii=False, default=str)
        line = asked.encode("utf-8", "surrogatepass") + b"\n"
        if len(line) > _LARGEST:
            raise LimitError(f"what it is given has more than {_LARGEST:,} bytes")
        with self._lock:
            try:
                answered = self._answer(line)
            except BaseException:  # an interrupted wait: the answer to this text must not be read as that of the next
                self.stop()
                raise
        answer: dict[str, str] = json.loads(answered.decode("utf-8", "surrogatepass"))
        if "text" in answer:
            return answer["text"]
        raise LimitError(answer["limit"]) if "limit" in answer else RenderError(answer["error"])

    def stop(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            _close(process)

    def forget(self) -> None:
        """Leave the child to the process that started it. For a process that was just forked from it."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None:
            _close(process)
            process.returncode = 0  # another's child cannot be waited for

    def _answer(self, line: bytes) -> bytes:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(_WAIT_S, process.kill)
        watch.daemon = True
        watch.start()
        try:
            answered = _exchange(process.stdin.fileno(), process.stdout.fileno(), line)
        finally:
            watch.cancel()
        if answered is None:
            self._process = None
            _close(process)
            raise LimitError(_why(process.wait()))
        return answered

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(Path(__file__).absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        return self._process


def _exchange(to_child: int, from_child: int, line: bytes) -> bytes | None:
    """The line that answers a line; None where the child ended before it had written all of it.

    Straight on the pipes: a buffer could be written twice by a process that is forked meanwhile.
    """
    left, answered = memoryview(line), bytearray()
    try:
        while left:
            left = left[os.write(to_child, left) :]
    except OSError:
        return None
    while not answered.endswith(b"\n"):
        read = os.read(from_child, 2**16)
        if not read:
            return None
        answered += read
    return bytes(answered)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _why(code: int) -> str:
    """Why the child ended without an answer."""
    if hasattr(signal, "SIGPROF") and code == -signal.SIGPROF:
        return f"it did not end within {SECONDS:.3g} seconds of processor time"
    if code == _EXHAUSTED:
        return f"it needs more than {_MEMORY:,} bytes of memory"
    if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL:
        return f"it did not end within {_WAIT_S:.0f} seconds, or the system was out of memory"
    return f"its process ended with exit code {code}"


TEMPLATES = TemplateProcess()
"""The one of this process."""
atexit.register(TEMPLATES.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TEMPLATES.forget)


def main() -> None:
    """The child's end: answer every line until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    output = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    tasks = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)  # as lm-evaluation-harness has it
    tasks.filters["regex_replace"] = _regex_replace
    compiled = lru_cache(maxsize=256)(tasks.from_string)
    for line in sys.stdin.buffer:
        try:
            answer = _answer(line, render_jinja_template, compiled)
            if len(answer) > _LARGEST:
                answer = _said({"limit": f"it writes more than {_LARGEST:,} bytes"})
        except MemoryError:
            raise SystemExit(_EXHAUSTED) from None
        except Exception as error:  # a template raises what it likes
            answer = _said({"error": str(error)[:_SHOWN] or type(error).__name__})
        _limit_time(0)
        left = memoryview(answer + b"\n")
        while left:
            left = left[os.write(output, left) :]


def _answer(line: bytes, render: Callable[..., tuple[list[str], object]], compiled: Callable[[str], Template]) -> bytes:
    request = json.loads(line.decode("utf-8", "surrogatepass"))
    _limit_time(request["seconds"])
    if "item" in request:
        try:
            return _said({"text": compiled(request["source"]).render(**request["item"])})
        except MemoryError:
            raise
        except Exception as error:  # a template raises what it likes
            return _said({"error": f"{type(error).__name__}: {' '.join(str(error)[:_SHOWN].split())}"})
    # `apply_chat_template` leaves out what is None, too
    messages = [{key: value for key, value in message.items() if value is not None} for message in request["messages"]]
    texts, _ = render(conversations=[messages], chat_template=request["source"], **request["variables"])
    return _said({"text": texts[0]})


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    """The filter that the harness adds to jinja's."""
    return re.sub(pattern, repl, string, count=count)


def _said(answer: Mapping[str, str]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _limit_time(seconds: float) -> None:
    """The system ends this process when it has computed for that long; 0: no longer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except (ImportError, OSError):  # not on this system
        return
    wanted = pages * resource.getpagesize() + _MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
