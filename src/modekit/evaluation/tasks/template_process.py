"""The process in which templates of tasks run: a template and an item come in, a text or an error goes out.

It is started by `templates.py` and ends with its standard input.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

HEADER = ">Q"
"""Before each message its length in bytes."""
SECONDS = 5
"""Of processor time for one text."""
LONGEST = 2**20
"""Characters of one text."""
_MEMORY = 2**29  # bytes more than there are at the start


def main() -> None:
    """Answer until standard input ends."""
    more_time = _limited()
    env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    env.filters["regex_replace"] = _regex_replace
    compiled = lru_cache(maxsize=256)(env.from_string)
    read, write = sys.stdin.buffer, sys.stdout.buffer
    while header := read.read(struct.calcsize(HEADER)):
        template, doc = pickle.loads(read.read(struct.unpack(HEADER, header)[0]))  # what the parent itself wrote
        more_time()
        reply = json.dumps(_answer(compiled, template, doc)).encode()
        write.write(struct.pack(HEADER, len(reply)) + reply)
        write.flush()


def _answer(compiled: Callable[[str], Template], template: str, doc: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = compiled(template).render(**doc)
    except Exception as error:  # a template raises what it likes
        return {"error": f"{type(error).__name__}: {' '.join(str(error)[:2_000].split())}"}
    return {"text": text} if len(text) <= LONGEST else {"error": f"it gives {len(text):,} characters"}


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    """The filter that the harness adds to jinja's."""
    return re.sub(pattern, repl, string, count=count)


def _limited() -> Callable[[], None]:
    """Bound memory, where the system can; what is given back grants the time for one more text."""
    try:
        import resource
    except ImportError:  # not on this system, where the parent's clock alone ends a template
        return lambda: None
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def more_time() -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS + 1, hard))

    return more_time
