"""The headers of a parquet file's pages: how much memory its values take, before any of them is read.

The file's own metadata may say anything; readers believe the headers of the pages. Both are in Thrift's compact protocol, which
is read here: what pyarrow offers for it ends the process on some damaged files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

_MAGIC = b"PAR1"
_FIRST, _MOST = 2**12, 2**24  # bytes of a header: those that are read at first, and at most
_DEEPEST = 12  # structures and lists within each other
_PAGES = 2**17  # of a file: they have a megabyte each, or 20,000 rows
_MOST_VALUES = 2**22  # of a structure with all that stands in it
_ROWS, _GROUPS, _CHUNKS, _ABOUT = 3, 4, 1, 3  # fields of a file, of a group of rows, and of a column in it
_TYPE, _PATH, _CHUNK_SIZE, _DATA_START, _DICTIONARY_START = 1, 3, 7, 9, 11  # fields of what a file says about a column
_SIZE, _STORED, _DATA, _DATA_2 = 2, 3, 5, 8  # fields of a page's header
_VALUES, _ENCODING, _ENCODING_2 = 1, 2, 4  # fields of the header of a page of data
_TEXT = 6  # the type BYTE_ARRAY
_SHARED_BEGINNINGS = 7  # the encoding DELTA_BYTE_ARRAY: every value may be as long as all that the page stores
_BYTE, _BINARY, _STRUCT = 3, 8, 12  # kinds of values
_BOOLEANS, _INTEGERS, _LISTS = (1, 2), (4, 5, 6), (9, 10)
_FIXED = {_BYTE: 1, 7: 8}

Value: TypeAlias = "int | bytes | list[Value] | Fields | None"
Fields: TypeAlias = "dict[int, Value]"
"""Number of a field -> its value; None where that is of a kind that nobody asks for."""


@dataclass(frozen=True)
class Pages:
    """What the columns that are read are stored in.

    Attributes:
        rows: as the file says.
        largest: bytes in memory of the largest page of every column together; no value is larger.
        values: how many values a column has, lists within rows included.
        inner: paths of text within lists and structures, where one value may stand many times in a row.
    """

    rows: int
    largest: int
    values: int
    inner: Sequence[str]


def look_at_pages(stream: io.FileIO, columns: Sequence[str]) -> Pages:
    """Read the headers of the pages of some columns. Raises OSError, and ValueError where they are none."""
    about = _about(stream)
    chunks = [chunk for chunk in _chunks(about) if chunk.path[0] in columns]
    largest: dict[tuple[str, ...], int] = {}
    values: dict[tuple[str, ...], int] = {}
    pages = ((chunk.path, page) for chunk in chunks for page in _pages_of(stream, chunk))
    for number, (path, page) in enumerate(pages):
        if number >= _PAGES:
            raise ValueError(f"more than {_PAGES:,} pages")
        size = page.size * max(1, page.values) if page.shares_beginnings and len(path) > 1 else page.size
        largest[path] = max(largest.get(path, 0), size)
        values[path] = values.get(path, 0) + page.values
    inner = dict.fromkeys(".".join(chunk.path) for chunk in chunks if len(chunk.path) > 1 and chunk.is_text)
    return Pages(_number(about, _ROWS), sum(largest.values()), max(values.values(), default=0), list(inner))


@dataclass(frozen=True)
class _Chunk:
    """Where the pages of a column stand, of one group of rows."""

    path: tuple[str, ...]
    is_text: bool
    start: int
    end: int


@dataclass(frozen=True)
class _Page:
    size: int
    values: int
    shares_beginnings: bool


def _about(stream: io.FileIO) -> Fields:
    """What a file says of itself at its end."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - 8))
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < length <= end - 8:
        raise ValueError("no end of a parquet file")
    stream.seek(end - 8 - length)
    try:
        return _Header(stream.read(length)).structure()
    except IndexError:
        raise ValueError("an end of a parquet file that is cut off") from None


def _chunks(about: Fields) -> Iterator[_Chunk]:
    for group in _structures(about.get(_GROUPS)):
        for chunk in _structures(group.get(_CHUNKS)):
            for said in _structures([chunk.get(_ABOUT)]):
                path = said.get(_PATH)
                parts = path if isinstance(path, list) else []
                names = tuple(part.decode("utf-8", "replace") for part in parts if isinstance(part, bytes))
                starts = [start for start in (_number(said, _DATA_START), _number(said, _DICTIONARY_START)) if start > 0]
                if not names or not starts:
                    raise ValueError("a column without a place")
                yield _Chunk(names, _number(said, _TYPE) == _TEXT, min(starts), min(starts) + _number(said, _CHUNK_SIZE))


def _structures(value: Value) -> Iterator[Fields]:
    return (each for each in value if isinstance(each, dict)) if isinstance(value, list) else iter(())


def _pages_of(stream: io.FileIO, chunk: _Chunk) -> Iterator[_Page]:
    place = chunk.start
    while place < chunk.end:
        header, length = _header_at(stream, place)
        size, stored = _number(header, _SIZE), _number(header, _STORED)
        if min(size, stored) < 0:
            raise ValueError("a page of less than no bytes")
        data, data_2 = header.get(_DATA), header.get(_DATA_2)
        said = data if isinstance(data, dict) else data_2 if isinstance(data_2, dict) else {}
        encoding = _number(said, _ENCODING if said is data else _ENCODING_2)
        yield _Page(size, _number(said, _VALUES), encoding == _SHARED_BEGINNINGS)
        place += length + stored


def _number(fields: Fields, name: int) -> int:
    found = fields.get(name, 0)
    return found if isinstance(found, int) else 0


def _header_at(stream: io.FileIO, place: int) -> tuple[Fields, int]:
    """A page's header and its length. Raises ValueError where there is none."""
    room = _FIRST
    while True:
        stream.seek(place)
        content = stream.read(room)
        header = _Header(content)
        try:
            return header.structure(), header.place
        except IndexError:
            if len(content) < room or room >= _MOST:
                raise ValueError("a page without a whole header") from None
            room *= 16


class _Header:
    """Bytes of Thrift's compact protocol. Everything raises IndexError where they end, ValueError where they are none."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.place = self._values = 0

    def structure(self, depth: int = 0) -> Fields:
        """The fields of a structure that begins here."""
        fields: Fields = {}
        name = 0
        while kind := (byte := self._byte()) & 15:
            name = name + (byte >> 4) if byte >> 4 else self._signed()
            fields[name] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Value:
        self._values += 1
        if depth > _DEEPEST or self._values > _MOST_VALUES:
            raise ValueError("a header that nests too deeply, or has too many values")
        if kind in _INTEGERS:
            return self._signed()
        if kind == _STRUCT:
            return self.structure(depth + 1)
        if kind in _LISTS:
            size = self._byte()
            inner = _BYTE if size & 15 in _BOOLEANS else size & 15
            return [self._value(inner, depth + 1) for _ in range(size >> 4 if size >> 4 < 15 else self._unsigned())]
        if kind in _BOOLEANS:
            return None
        length = self._unsigned() if kind == _BINARY else self._fixed(kind)
        self._skip(length)
        return self._content[self.place - length : self.place]

    @staticmethod
    def _fixed(kind: int) -> int:
        if kind not in _FIXED:
            raise ValueError("a page's header with a value of no known kind")
        return _FIXED[kind]

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self._content):
            raise IndexError

    def _byte(self) -> int:
        self._skip(1)
        return self._content[self.place - 1]

    def _unsigned(self) -> int:
        number = shift = 0
        while (byte := self._byte()) & 128:
            number |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return number | byte << shift

    def _signed(self) -> int:
        number = self._unsigned()
        return number >> 1 ^ -(number & 1)
