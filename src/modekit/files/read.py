"""Files that strangers made: only regular ones are opened, sizes are bounded before anything is allocated.

Everything here raises OSError or ValueError and nothing else, so that each caller says in its own words what is damaged.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import Any

from modekit.files.json import parse_json

SMALL = 2**24
"""Bytes: configs, recipes, records."""
LARGE = 2**28
"""Bytes: tokenizers, results."""
UNREADABLE = (OSError, ValueError)
"""What reading raises: OSError where there is no regular file that can be read, ValueError for what it holds."""


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


def content_of(path: Path, limit: int = 2**32) -> bytes:
    """As `read_bytes`; nothing where the file cannot be read."""
    try:
        return read_bytes(path, limit)
    except UNREADABLE:
        return b""


def read_text(path: Path, limit: int = SMALL) -> str:
    """A regular file's text, in UTF-8. Raises OSError and ValueError."""
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: Path, limit: int = SMALL) -> Any:
    """A regular file's JSON as plain data. Raises OSError and ValueError."""
    return parse_json(read_text(path, limit))
