"""Tables -> records, a few rows at a time: parquet, and values separated by commas, semicolons or tabs.

A table of a few hundred bytes can say gigabytes of text: one value in every row, or a value that compresses to nothing. So what
a parquet file takes in memory is found from the headers of its pages (text/parquet_pages.py) before any is read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.text.parquet_pages import Pages, look_at_pages
from modekit.text.plain import LARGEST, lines_of, plain_text, too_large
from modekit.text.records import ANSWERED, ASKED, GIVEN, ID, MESSAGES, SOURCE, TARGET, TEXT, TRANSLATION, TURNS

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch

Row = Mapping[str, object]
SEPARATED = (".csv", ".tsv")
"""Suffixes of values that are separated; a folder is not searched for them, as many hold no text."""
_COLUMNS = (TEXT, MESSAGES)  # read alone where there are any
_PAIR_COLUMNS = (SOURCE, TARGET, TRANSLATION)  # read where it has none of those: `source` alone often says where text is from
_ROWS = 2**20  # of a table, more only as far as its file is larger: a row of nothing takes no room there, but time
_BATCH, _BATCH_BYTES = 64, 2**26  # rows in memory at once, and about how much they may take
_LARGEST_PAGES = 2**29  # bytes: one of every column is in memory at once
_EXPANDED, _TIMES = 2**28, 1_000  # bytes of text that any file may hold, and that one of its bytes may become besides
_NAME_THEM = (
    "save the documents as strings in a column named 'text', conversations in 'messages', or pairs of strings in 'source' and "
    "'target'"
)
_OBJECT = 64  # bytes that a value takes besides its text
_SEPARATORS = ",;\t"


def read_separated(stream: io.FileIO, *, where: str) -> Iterator[Row]:
    """The rows of an open file whose first line names the columns. Raises OSError, TextError."""
    lines = _Lines(stream, where)
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST))  # of the whole process; a row is limited below
    try:
        header = next(lines, "")
        separator = max(_SEPARATORS, key=header.count)
        names = next(csv.reader([header], delimiter=separator), [])
        check_columns(names, where=where, remedy="name the columns in the first line: 'text' for the one with the documents")
        for row in csv.reader(lines, delimiter=separator):
            lines.row = 0
            yield dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise TextError(
            "the table cannot be read",
            where=f"{where}:{lines.number}",
            found=error,
            remedy="correct the line, or save it again",
        ) from None


class _Lines(Iterator[str]):
    """Lines of a table as text; `row`: how many bytes of the row that is being read. Raises TextError for too many."""

    def __init__(self, stream: io.FileIO, where: str) -> None:
        self._lines, self._where = lines_of(stream, where=where), where
        self._read = self.row = self.number = 0

    def __next__(self) -> str:
        line = next(self._lines)
        text = plain_text(line, where=f"{self._where}:{self.number + 1}", start=self._read)
        self.number += 1
        self._read += len(line)
        self.row += len(line)
        if self.row > LARGEST:  # a quotation that nobody ends
            raise too_large("a row", where=f"{self._where}:{self.number}")
        return text


def read_parquet(file: Path, *, where: str) -> Iterator[Row]:
    """The rows of a parquet file, of the columns that hold text. Raises TextError."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TextError("reading .parquet needs pyarrow", where=where, remedy="pip install 'modekit[data]'") from None
    try:
        with open_regular(file) as stream, parquet.ParquetFile(stream) as table:
            columns = check_columns(table.schema_arrow.names, where=where, remedy=_NAME_THEM)
        with open_regular(file) as stream:
            pages, size = look_at_pages(stream, columns), file.stat().st_size
            _check_size(pages, size, where)
            with parquet.ParquetFile(stream, read_dictionary=pages.inner, buffer_size=2**20) as table:
                rows = max(1, min(_BATCH, _BATCH_BYTES // max(1, pages.largest)))
                batches = (batch.select(columns) for batch in table.iter_batches(rows, columns=columns))
                yield from _rows_of(batches, _EXPANDED + _TIMES * size, where)
    except TextError:
        raise
    except Exception as error:  # pyarrow's errors share no base class
        raise TextError(
            "the parquet file cannot be read",
            where=where,
            found=(str(error) or type(error).__name__)[:300],
            remedy="write it again: it is damaged, or no parquet file",
        ) from None


def _check_size(pages: Pages, size: int, where: str) -> None:
    """Raise TextError, or ValueError, where the pages say much more than their file can hold."""
    count = max(pages.rows, pages.values)
    if count > _ROWS + 8 * size:
        raise ValueError(f"{count:,} rows in {size:,} bytes")
    if pages.largest > _LARGEST_PAGES:
        raise too_large("a page of the table", where=where, found=f"{pages.largest:,} bytes", most=_LARGEST_PAGES)


def _rows_of(batches: Iterable[RecordBatch], most: int, where: str) -> Iterator[Row]:
    """Rows of batches, which may take at most so many bytes together."""
    number = total = 0
    for batch in batches:
        size = sum(map(_bytes_in, batch.columns))
        for part in [batch] if size <= LARGEST else (batch.slice(row, 1) for row in range(batch.num_rows)):
            size = sum(map(_bytes_in, part.columns))
            total += size
            if size > LARGEST:
                raise too_large("a row", where=f"{where}: row {number + 1}", found=f"{size:,} bytes")
            if total > most:
                raise too_large("the table", where=f"{where}: row {number + 1}", found=f"{total:,} bytes of text", most=most)
            yield from part.to_pylist()
            number += part.num_rows


def _bytes_in(array: Array) -> int:
    """About what the values of an array take as Python's: of one that stands for many it counts every time."""
    import pyarrow.compute as compute
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return int(compute.sum(lengths).as_py() or 0)
    if types.is_struct(kind):
        return sum(map(_bytes_in, array.flatten()))
    if types.is_nested(kind):
        values = array.flatten()
        return _bytes_in(values) + _OBJECT * len(values)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return int(compute.sum(compute.binary_length(array)).as_py() or 0)
    return int(array.nbytes)


def check_columns(names: Sequence[str], *, where: str, remedy: str) -> list[str]:
    """What is read of a table with these columns. Raises TextError where that is nothing."""
    alone = [name for name in _COLUMNS if name in names]
    pairs = [name for name in _PAIR_COLUMNS if name in names]
    whole = pairs if TRANSLATION in pairs or len(pairs) == 2 else []
    turns = [TURNS] if TURNS in names else []
    asked = [name for name in (*ASKED, *GIVEN) if name in names]
    answered = [name for name in ANSWERED if name in names]
    found = alone or whole or turns or (asked and answered and [*asked, *answered])
    if not found:
        raise TextError(
            "the table has no readable column 'text' or 'messages', no pairs, and no prompts with answers",
            where=where,
            found=f"columns {', '.join(names)}"[:300],
            remedy=remedy,
        )
    return [*found, *([ID] if ID in names else [])]
