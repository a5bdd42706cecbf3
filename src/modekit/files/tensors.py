"""The header of a safetensors file, and bytes to an unbuffered stream."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable
from typing import Any

Entry = tuple[str, str, tuple[int, ...], int]
"""name, safetensors dtype, shape, bytes: one tensor of a file's header."""


def safetensors_header(entries: Iterable[Entry]) -> bytes:
    """Header of a safetensors file with the tensors in the given order; data starts on an 8-byte boundary."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_all(stream: io.FileIO, view: memoryview) -> None:
    """Write all of a view to an unbuffered stream, however little each call takes."""
    while len(view):
        view = view[stream.write(view) or 0 :]
