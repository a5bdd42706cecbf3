"""What lies in a text file or a hub data set: plain text, one record per line, or a column of a table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.text.chat import conversation_of
from modekit.text.passages import passages

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".md", ".py")
_BATCH = 1_000  # rows in memory at once
_COLUMNS = ("text", "messages")  # of a table
_ID = "id"
_ROWS = 2**20  # of a table, more only as far as its file is larger: a row of nothing takes no room there, but time
_HUB_DOCUMENTS = 100_000  # read of a hub data set at most: far more than any fit or evaluation uses


@dataclass(frozen=True)
class Record:
    """A document, and what its maker calls it: a record's `id`, or None."""

    document: str
    id: str | None = None


def decode(data: bytes, *, where: str) -> str:
    """UTF-8 as text, without a byte order mark. Raises TextError for anything else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            "the text is not UTF-8 (binary file?)", where=where, found=f"byte {error.start}: {error.reason}",
            remedy="save it as UTF-8",
        ) from None  # fmt: skip


def read_file(file: Path, *, where: str) -> Iterator[Record]:
    """The documents of one file. Raises TextError when it is of no known kind, cannot be read, or is binary."""
    place = f"{where}: {file.name}"
    if file.suffix not in TEXT_SUFFIXES:
        raise TextError(
            "the kind of text file is not known", where=place, found=file.suffix or "no suffix",
            expected=", ".join(TEXT_SUFFIXES), remedy="rename or convert it",
        )  # fmt: skip
    if file.suffix == ".parquet":
        yield from _read_parquet(file, where=place)
        return
    try:
        if file.suffix == ".jsonl":
            yield from _read_lines(file, where=place)
            return
        with open_regular(file) as stream:
            text = _plain(stream.readall(), where=place)
    except OSError as error:
        raise TextError("the text cannot be read", where=place, found=error.strerror, remedy="make it readable") from None
    yield from map(Record, passages(text))


def _read_lines(file: Path, *, where: str) -> Iterator[Record]:
    """A record per line, of which one is in memory. Raises OSError, TextError."""
    with open_regular(file) as stream:
        for number, data in enumerate(io.BufferedReader(stream), 1):  # cut at \n alone, not at U+2028 inside a record
            line = _plain(data, where=where)
            if line.strip():
                yield _record(line, where=f"{where}:{number}")


def _plain(data: bytes, *, where: str) -> str:
    text = decode(data, where=where)
    if "\x00" in text:
        raise TextError("the text holds NUL characters (binary file?)", where=where, remedy="give plain text")
    return text


def _record(line: str, *, where: str) -> Record:
    try:
        record = _record_of(json.loads(line))
    except (ValueError, RecursionError):
        record = None
    if record is None:
        raise TextError(
            "not a JSON record with a string in 'text' or a conversation in 'messages'", where=where, found=line[:60],
            expected='{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
            remedy="correct or remove the line",
        )  # fmt: skip
    return record


def _record_of(record: object) -> Record | None:
    document = _document_of(record)
    return None if document is None or not isinstance(record, dict) else Record(document, _id_of(record.get(_ID)))


def _id_of(value: object) -> str | None:
    """Text or a whole number as text; anything else names nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _document_of(record: object) -> str | None:
    """The text of a record, or else its conversation; None when it has neither."""
    if not isinstance(record, dict):
        return None
    text = record.get("text")
    if isinstance(text, str):
        return text.encode("utf-8", "replace").decode()  # an escaped half of a surrogate pair is no character
    return conversation_of(record.get("messages"))


def _read_parquet(file: Path, *, where: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TextError("reading .parquet needs pyarrow", where=where, remedy="pip install 'modekit[data]'") from None
    try:
        with open_regular(file) as stream, parquet.ParquetFile(stream) as table:
            if table.metadata.num_rows > _ROWS + 8 * file.stat().st_size:
                raise ValueError(f"{table.metadata.num_rows:,} rows in {file.stat().st_size:,} bytes")
            columns = [name for name in (*_COLUMNS, _ID) if name in table.schema_arrow.names]
            if not set(columns) & set(_COLUMNS):
                columns = [_COLUMNS[0]]
            for batch in table.iter_batches(_BATCH, columns=columns):
                found = map(_record_of, batch.select(columns).to_pylist())
                yield from (record for record in found if record is not None)
    except Exception as error:  # pyarrow's errors share no base class
        raise TextError(
            "the parquet file has no readable column 'text' or 'messages'", where=where,
            found=(str(error) or type(error).__name__)[:300],
            remedy="save the documents as strings in a column named 'text', or conversations in 'messages'",
        ) from None  # fmt: skip


def read_hub(spec: str, *, where: str) -> Iterator[Record]:
    """The documents of a hub data set (split `train`). Raises TextError when there is none that can be reached."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(
            "no such file or folder, and hub data sets cannot be read without the library", where=where, found=spec,
            remedy="correct the path, or pip install 'modekit[data]' for hub data sets",
        ) from None  # fmt: skip
    try:
        for data in islice(load_dataset(spec, split="train", streaming=True), _HUB_DOCUMENTS):
            record = _record_of(data)
            if record is not None:
                yield record
    except Exception as error:  # network, missing data set, missing split: the library raises many kinds
        raise TextError(
            "no such file or folder, and no hub data set that can be reached", where=where,
            found=f"{spec}: {type(error).__name__}",
            remedy="correct the path, or connect to the hub",
        ) from None  # fmt: skip
