"""Hostile variants of good files for hypothesis, and the limits under which whoever reads them must stay.

A variant begins with good data. Any value anywhere in it is replaced, removed or given twice, and some of the bytes are changed
or cut off; what JSON cannot say otherwise (NaN, 1e999, numbers of thousands of digits, -0) is written as `Raw`.
"""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS = 5
"""Of processor time for one input, whatever it is; of the clock, which others share, twelve times as much."""
ROOM = 2**30
"""Bytes that one input may make the process larger by."""


@dataclass(frozen=True)
class Raw:
    """Text that stands in a file as it is."""

    text: str


HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    2**31,
    2**63,
    2**64,
    10**10,
    10**17,
    -(10**30),
    10**400,
    0.5,
    -0.5,
    1e-300,
    1e300,
    3.0,
    1e10,
    "",
    "x",
    "3",
    "10000000000",
    "nan",
    "../../x",
    "/dev/zero",
    "evil/kernel",
    "a\0b",
    "\x1b]0;x\x07",
    "x" * 10_000,
    "é\u2028²",
    [],
    [1],
    ["x"],
    [None],
    [[]],
    [[[[1]]]],
    [0, 10**10],
    ["x"] * 2_000,
    {},
    {"x": 1},
    {"": None},
    {"rope_type": ["x"]},
    {"content": "x", "id": True},
    {"type": {}},
    {"rope_type": {}},
    {"full_attention": {"rope_type": "yarn", "factor": 2.0}},
    "(a|a)*$",
    "(a+)+b",
    "((((a?){99}){99}){99}){99}",
    "(?:",
    "[[:alpha:]]",
    "(?x)#)",
    ".*{2",
    "0-99999999999",
    "model.layers.0",
]
RAW = [
    *map(
        Raw,
        ["NaN", "Infinity", "1e999", "-0", "9" * 5_000, "[" * 60 + "]" * 60, "[" * 5_000 + "]" * 5_000, "1.0", "tru", '"\t"'],
    ),
    *map(Raw, ['{"a":' * 200 + "1" + "}" * 200, r'"\ud83d"']),
]
"""One in twelve: most of these make a whole file unreadable, and what reads the rest of it is not asked."""
VALUES = st.integers(1, 12).flatmap(lambda number: st.sampled_from(RAW if number == 5 else HOSTILE))


def written(data: Any, *, twice: tuple[Any, ...] | None = None) -> str:
    """JSON of data that may hold `Raw`; the mapping at the path `twice` says its first key again."""
    if isinstance(data, Raw):
        return data.text
    inner = None if not twice else twice[1:]
    if isinstance(data, dict):
        entries = [
            f"{json.dumps(key)}: {written(each, twice=inner if twice and twice[0] == key else None)}"
            for key, each in data.items()
        ]
        return "{" + ", ".join([*entries, *(entries[:1] if twice == () else [])]) + "}"
    if isinstance(data, list):
        parts = [written(each, twice=inner if twice and twice[0] == place else None) for place, each in enumerate(data)]
        return "[" + ", ".join(parts) + "]"
    return json.dumps(data)


def paths_in(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in data, its own first."""
    yield path
    for key, each in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from paths_in(each, (*path, key))


def changed(data: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of data where `change(container, key)` was done at a path, which is not the empty one."""
    copied = deepcopy(data)
    container = copied
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return copied


@st.composite
def hostile_json(draw: st.DrawFn, good: Any, *, most: int = 3) -> str:
    """JSON text of `good` with up to `most` values changed and, at times, a key given twice."""
    data, twice = good, None
    for _ in range(draw(st.integers(1, most))):
        paths = list(paths_in(data))[1:]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        kind = draw(st.sampled_from(["replace"] * 6 + ["remove", "rename", "twice", "add"]))
        value = draw(VALUES)
        if kind == "replace":
            data = changed(data, path, lambda container, key, value=value: container.__setitem__(key, value))
        elif kind == "remove":
            data = changed(data, path, lambda container, key: container.__delitem__(key))
        elif kind == "rename" and isinstance(path[-1], str):
            name = draw(st.sampled_from(["", "x", "\ud800", "model.layers.0.²5²", "__metadata__", "x" * 300, "a.b\n"]))
            data = changed(data, path, lambda container, key, name=name: container.__setitem__(name, container.pop(key)))
        elif kind == "add" and isinstance(path[-1], str):
            data = changed(data, path, lambda container, key, value=value: container.__setitem__(f"{key}x", value))
        elif kind == "twice":
            twice = path[:-1]
    return written(data, twice=twice)


@st.composite
def hostile_bytes(draw: st.DrawFn, text: st.SearchStrategy[str]) -> bytes:
    """A text as bytes, at times with some of them changed, cut off, repeated, or in another encoding."""
    content = draw(text).encode("utf-8", "surrogatepass")
    kind = {5: "flip", 11: "cut", 17: "again", 23: "utf-16", 29: "more"}.get(draw(st.integers(1, 40)))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "flip":
        return content[:place] + draw(st.binary(min_size=1, max_size=3)) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "again":
        return content[:place] + content[max(0, place - 40) :]
    if kind == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    return content + draw(st.binary(min_size=1, max_size=9)) if kind == "more" else content


def inputs(count: int) -> settings:
    """Settings of a test that sees `count` inputs, the same ones every time, however slow the machine is."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def limited() -> Iterator[None]:
    """Fails what takes longer than SECONDS, or more memory than ROOM. Where the system cannot limit these, does nothing."""
    statm = Path("/proc/self/statm")
    if not statm.exists() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise AssertionError(f"longer than {SECONDS} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    kept = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)}
    resource.setrlimit(resource.RLIMIT_AS, (int(statm.read_text().split()[0]) * resource.getpagesize() + ROOM, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
