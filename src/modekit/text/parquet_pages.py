"""The headers of a parquet file's pages: how much memory its values take, before any of them is read.

The file's own metadata may say anything; readers believe the headers of the pages, which are in Thrift's compact protocol.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData, FileMetaData

_FIRST, _MOST = 2**12, 2**24  # bytes of a header: those that are read at first, and at most
_DEEPEST = 8  # structures and lists within each other
_PAGES = 2**17  # of a file: they have a megabyte each, or 20,000 rows
_SIZE, _STORED, _DATA, _DATA_2 = 2, 3, 5, 8  # fields of a page's header
_VALUES, _ENCODING, _ENCODING_2 = 1, 2, 4  # fields of the header of a page of data
_TEXT = "BYTE_ARRAY"
_SHARED_BEGINNINGS = 7  # the encoding DELTA_BYTE_ARRAY: every value may be as long as all that the page stores
_BYTE, _BINARY, _STRUCT = 3, 8, 12  # kinds of values
_BOOLEANS, _INTEGERS, _LISTS = (1, 2), (4, 5, 6), (9, 10)
_FIXED = {_BYTE: 1, 7: 8}

Fields = dict[int, "int | Fields"]
"""Number of a field -> its number or structure; text and lists are left out."""


@dataclass(frozen=True)
class Pages:
    """What the columns that are read are stored in.

    Attributes:
        largest: bytes in memory of the largest page of every column together; no value is larger.
        values: how many values a column has, lists within rows included.
        lists: paths of columns whose rows are lists of text, in which one value may stand many times.
    """

    largest: int
    values: int
    lists: Sequence[str]


def look_at_pages(stream: io.FileIO, metadata: FileMetaData, columns: Sequence[str]) -> Pages:
    """Read the headers of the pages of some columns. Raises OSError, and ValueError where they are none."""
    largest: dict[str, int] = {}
    values: dict[str, int] = {}
    kinds = [metadata.schema.column(place) for place in range(metadata.num_columns)]
    read = [place for place, kind in enumerate(kinds) if kind.path.partition(".")[0] in columns]
    chunks = ((place, metadata.row_group(group).column(place)) for group in range(metadata.num_row_groups) for place in read)
    pages = ((place, page) for place, chunk in chunks for page in _pages_of(stream, chunk))
    for number, (place, page) in enumerate(pages):
        if number >= _PAGES:
            raise ValueError(f"more than {_PAGES:,} pages")
        path, in_lists = kinds[place].path, kinds[place].max_repetition_level > 0
        largest[path] = max(largest.get(path, 0), page.most_in_lists if in_lists else page.size)
        values[path] = values.get(path, 0) + page.values
    lists = [kinds[place].path for place in read if kinds[place].max_repetition_level and kinds[place].physical_type == _TEXT]
    return Pages(sum(largest.values()), max(values.values(), default=0), lists)


@dataclass(frozen=True)
class _Page:
    size: int
    values: int
    shares_beginnings: bool

    @property
    def most_in_lists(self) -> int:
        """Bytes of its values, where one row may have all of them."""
        return self.size * max(1, self.values) if self.shares_beginnings else self.size


def _pages_of(stream: io.FileIO, chunk: ColumnChunkMetaData) -> Iterator[_Page]:
    starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
    place = min(start for start in starts if start)
    end = place + chunk.total_compressed_size
    while place < end:
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
        self.place = 0

    def structure(self, depth: int = 0) -> Fields:
        """The fields of a structure that begins here."""
        fields: Fields = {}
        name = 0
        while kind := (byte := self._byte()) & 15:
            name = name + (byte >> 4) if byte >> 4 else self._signed()
            value = self._value(kind, depth)
            if value is not None:
                fields[name] = value
        return fields

    def _value(self, kind: int, depth: int) -> int | Fields | None:
        if depth > _DEEPEST:
            raise ValueError("a page's header that nests too deeply")
        if kind in _INTEGERS:
            return self._signed()
        if kind == _STRUCT:
            return self.structure(depth + 1)
        if kind in _LISTS:
            size = self._byte()
            inner = _BYTE if size & 15 in _BOOLEANS else size & 15
            for _ in range(size >> 4 if size >> 4 < 15 else self._unsigned()):
                self._value(inner, depth + 1)
        elif kind not in _BOOLEANS:
            self._skip(self._unsigned() if kind == _BINARY else self._fixed(kind))
        return None

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
