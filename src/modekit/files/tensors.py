"""The header of a safetensors file, and bytes to an unbuffered stream."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable
from typing import Any

Entry = tuple[str, str, tuple[int, ...], int]
"""name, safetensors dtype, shape, bytes: one tensor of a file's header."""
_LENGTH, _BOUNDARY = 8, 64
"""Bytes of the header's length in front of it, and what all of it is a multiple of."""


def safetensors_header(entries: Iterable[Entry]) -> bytes:
    """Header of a safetensors file with the tensors in the given order.

    Data starts on a boundary of 64 bytes, so that a tensor which is read in place lies in memory as one that is copied does:
    on some processors the last bits of a product depend on that.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % _BOUNDARY)
    return struct.pack("<Q", len(text)) + text


def write_all(stream: io.FileIO, view: memoryview) -> None:
    """Write all of a view to an unbuffered stream, however little each call takes."""
    while len(view):
        view = view[stream.write(view) or 0 :]
