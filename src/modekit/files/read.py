"""Files that strangers made: only regular ones are opened, sizes are bounded before anything is allocated.

Everything here raises OSError or ValueError and nothing else, so that each caller says in its own words what is damaged.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL = 2**24
"""Bytes: configs, recipes, records."""
LARGE = 2**28
"""Bytes: tokenizers, results."""
UNREADABLE = (OSError, ValueError)
"""What reading raises: OSError where there is no regular file that can be read, ValueError for what it holds."""
YOUNG_NS = 2 * 10**9
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class FileState:
    """What a file was when it was looked at: another state is another file, or other bytes.

    `changed_ns` also changes with a new name or mode of the file, but nobody can put it back: it counts where a later
    process asks whether these are still the same bytes.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int = field(compare=False)

    @property
    def is_settled(self) -> bool:
        """Whether it changed long enough ago that another change would show: within a tick of the clock it would not."""
        return max(self.modified_ns, self.changed_ns) < time.time_ns() - YOUNG_NS

    @classmethod
    def of(cls, file: io.FileIO | Path) -> FileState:
        """The state of a file, open or not. Raises OSError."""
        found = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading, unbuffered. A pipe, a device or a folder is refused, and none is waited for.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's content. Raises OSError, and ValueError when it has more than `limit` bytes."""
    with open_regular(path) as stream:
        content = io.BufferedReader(stream).read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = SMALL) -> str:
    """A regular file's text, in UTF-8. Raises OSError and ValueError."""
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: Path, limit: int = SMALL) -> Any:
    """A regular file's JSON as plain data. Raises OSError and ValueError."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """JSON as plain data. Raises ValueError: also where it nests too deeply, or holds what no JSON and no file can.

    That is NaN and Infinity, numbers of thousands of digits, and halves of surrogate pairs, which no encoding writes.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return data


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is no number that a computer can hold")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
