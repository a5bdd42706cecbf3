"""The header of a safetensors file, on this disk or elsewhere: what it claims is checked before anything is made of it.

8 bytes of its length (little endian), JSON with dtype, shape and data_offsets per tensor, then the data.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from modekit.errors import SourceError
from modekit.files.read import parse_json

ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
_BITS = {
    **{name: 8 * size for name, size in ITEMSIZE.items()},
    **{"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Of every dtype that safetensors knows; those that cannot be mixed are refused by the plan, by name of the tensor."""
LARGEST_HEADER = 2**25  # bytes: a quarter of a million tensors
_KEYS = {"dtype", "shape", "data_offsets"}
AGAIN = "download or save the file again"
_DISAGREE = "safetensors header and data disagree"


@dataclass(frozen=True)
class Entry:
    """A tensor: safetensors dtype, shape, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def entries_in(stream: BinaryIO, size: int, *, where: str) -> dict[str, Entry]:
    """Tensors of a stream that begins as a file of `size` bytes does; of it no more than the header is read.

    Raises SourceError for a header that is none or lies about sizes, and OSError of the stream.
    """
    header, data_start = _parsed_header(stream, size, where)
    try:
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata must be text")
        entries = {name: _entry(name, said, data_start, size, where) for name, said in header.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged("safetensors header is malformed", where) from None
    _check_gapless(entries, data_start, size, where)
    return entries


def _parsed_header(stream: BinaryIO, size: int, where: str) -> tuple[dict[str, Any], int]:
    """The header as data, and where the tensors' bytes start. Raises SourceError, and OSError of the stream."""
    raw_length = stream.read(8)
    if len(raw_length) < 8:
        raise _damaged("safetensors file is truncated", where, f"{size} bytes")
    (length,) = struct.unpack("<Q", raw_length)
    if length > min(size - 8, LARGEST_HEADER):
        found = f"a header of {length} bytes in a file of {size}"
        raise _damaged("not a safetensors file, or its header is truncated", where, found)
    try:
        header = parse_json(stream.read(length).decode("utf-8"), once=True)
    except ValueError:
        raise _damaged("safetensors header is not JSON", where) from None
    if not isinstance(header, dict):
        raise _damaged("safetensors header is malformed", where)
    return header, 8 + length


def _entry(name: str, said: Mapping[str, Any], data_start: int, size: int, where: str) -> Entry:
    """A header's entry, checked against where data starts and ends.

    Raises SourceError, and ValueError and its like for what is no entry.
    """
    begin, end = said["data_offsets"]
    entry = Entry(said["dtype"], tuple(said["shape"]), data_start + begin, data_start + end)
    if said.keys() != _KEYS or not all(type(number) is int and number >= 0 for number in (begin, end, *entry.shape)):
        raise ValueError("sizes must be whole numbers")  # and true is none, which would count as 1
    bits = _BITS[entry.dtype]
    if math.prod(max(each, 1) for each in entry.shape) * bits >= 2**63:
        raise ValueError("more elements than can be counted")
    if begin > end or entry.end > size or 8 * (end - begin) != math.prod(entry.shape) * bits:
        found = f"{entry.dtype} {list(entry.shape)} at bytes {begin}..{end}, file has {size - data_start} bytes of data"
        raise _damaged(f"{_DISAGREE} (truncated or damaged file)", f"{where}: {name}", found)
    return entry


def _check_gapless(entries: Mapping[str, Entry], position: int, size: int, where: str) -> None:
    """Raise SourceError unless the tensors lie one after the other from `position` to the end of the file."""
    for name, ref in sorted(entries.items(), key=lambda each: (each[1].start, each[1].end)):
        if ref.start != position:
            found, expected = f"it starts at byte {ref.start}", f"byte {position}, where the tensor before it ends"
            raise _damaged(f"{_DISAGREE} (tensors overlap or leave a hole)", f"{where}: {name}", found, expected)
        position = ref.end
    if position != size:
        expected = f"{position}, where the last tensor ends"
        raise _damaged(f"{_DISAGREE} (bytes after the last tensor)", where, f"{size} bytes", expected)


def _damaged(what: str, where: str, found: str | None = None, expected: str | None = None) -> SourceError:
    return SourceError(what, where=where, found=found, expected=expected, remedy=AGAIN)
