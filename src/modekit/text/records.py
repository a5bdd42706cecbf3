"""What lies in a text file or a hub data set: plain text, one record per line, or columns of a table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.text.chat import Conversation, conversation_of
from modekit.text.pairs import SOURCE, TARGET, TRANSLATION, Pair, pair_of
from modekit.text.passages import passages

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".md", ".py")
_BATCH = 1_000  # rows in memory at once
_COLUMNS = ("text", "messages")  # of a table
_PAIR_COLUMNS = (SOURCE, TARGET, TRANSLATION)  # read where it has none of those: `source` alone often says where text is from
_ID = "id"
_ROWS = 2**20  # of a table, more only as far as its file is larger: a row of nothing takes no room there, but time
_HUB_DOCUMENTS = 100_000  # read of a hub data set at most: far more than any fit or evaluation uses


@dataclass(frozen=True)
class Record:
    """A document, and what its maker calls it: a record's `id`, or None."""

    document: str
    id: str | None = None


def data_of(document: str) -> dict[str, Any]:
    """A document as the data of a record that gives it back."""
    if isinstance(document, Conversation):
        return {"messages": list(document.messages)}
    return {SOURCE: document.source, TARGET: document.target} if isinstance(document, Pair) else {"text": document}


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
            expected=", ".join(TEXT_SUFFIXES),
            remedy=f"rename or convert it; one side of parallel text is named with the other: {file.name}+OTHER",
        )  # fmt: skip
    if file.suffix == ".parquet":
        yield from _read_parquet(file, where=place)
        return
    try:
        if file.suffix == ".jsonl":
            yield from _read_lines(file, where=place)
            return
        with open_regular(file) as stream:
            text = plain_text(stream.readall(), where=place)
    except OSError as error:
        raise TextError("the text cannot be read", where=place, found=error.strerror, remedy="make it readable") from None
    yield from map(Record, passages(text))


def _read_lines(file: Path, *, where: str) -> Iterator[Record]:
    """A record per line, of which one is in memory. Raises OSError, TextError."""
    with open_regular(file) as stream:
        for number, data in enumerate(io.BufferedReader(stream), 1):  # cut at \n alone, not at U+2028 inside a record
            line = plain_text(data, where=where)
            if line.strip():
                yield _record(line, where=f"{where}:{number}")


def plain_text(data: bytes, *, where: str) -> str:
    """UTF-8 as text. Raises TextError for anything else, and for NUL characters, which no text has."""
    text = decode(data, where=where)
    if "\x00" in text:
        raise TextError("the text holds NUL characters (binary file?)", where=where, remedy="give plain text")
    return text


def _record(line: str, *, where: str) -> Record:
    try:
        record = _record_of(json.loads(line), where=where)
    except (ValueError, RecursionError):
        record = None
    if record is None:
        raise TextError(
            "not a JSON record with a string in 'text', a conversation in 'messages' or a pair of texts", where=where,
            found=line.strip()[:60],
            expected='{"text": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]}, {"source": "...", "target": '
            '"..."} or {"translation": {"en": "...", "fr": "..."}}',
            remedy="correct or remove the line",
        )  # fmt: skip
    return record


def _record_of(record: object, *, where: str) -> Record | None:
    """None for what is no record of any kind. Raises TextError for a pair of which a side is empty."""
    document = _document_of(record, where)
    return None if document is None or not isinstance(record, dict) else Record(document, _id_of(record.get(_ID)))


def _id_of(value: object) -> str | None:
    """Text or a whole number as text; anything else names nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _document_of(record: object, where: str) -> str | None:
    """The text of a record, or else its conversation, or else its pair; None when it has none of them."""
    if not isinstance(record, dict):
        return None
    text = record.get("text")
    if isinstance(text, str):
        return text.encode("utf-8", "replace").decode()  # an escaped half of a surrogate pair is no character
    conversation = conversation_of(record.get("messages"))
    return pair_of(record, where=where) if conversation is None else conversation


def _read_parquet(file: Path, *, where: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TextError("reading .parquet needs pyarrow", where=where, remedy="pip install 'modekit[data]'") from None
    try:
        with open_regular(file) as stream, parquet.ParquetFile(stream) as table:
            if table.metadata.num_rows > _ROWS + 8 * file.stat().st_size:
                raise ValueError(f"{table.metadata.num_rows:,} rows in {file.stat().st_size:,} bytes")
            names = table.schema_arrow.names
            columns = _columns_of(names)
            if not set(columns) <= set(names):
                raise _no_column(names, where)
            batches = table.iter_batches(_BATCH, columns=columns)
            rows = (data for batch in batches for data in batch.select(columns).to_pylist())
            for number, data in enumerate(rows, 1):
                record = _record_of(data, where=f"{where}: row {number}")
                if record is not None:
                    yield record
    except TextError:
        raise
    except Exception as error:  # pyarrow's errors share no base class
        raise TextError(
            "the parquet file cannot be read", where=where, found=(str(error) or type(error).__name__)[:300],
            remedy="write it again: it is damaged, or no parquet file",
        ) from None  # fmt: skip


def _no_column(names: Sequence[str], where: str) -> TextError:
    return TextError(
        "the parquet file has no readable column 'text' or 'messages', nor pairs", where=where,
        found=f"columns {', '.join(names)}"[:300],
        remedy="save the documents as strings in a column named 'text', conversations in 'messages', or pairs of strings "
        "in 'source' and 'target'",
    )  # fmt: skip


def _columns_of(names: Sequence[str]) -> list[str]:
    """What is read of a table with these columns."""
    alone = [name for name in _COLUMNS if name in names]
    pairs = [name for name in _PAIR_COLUMNS if name in names]
    whole = pairs if TRANSLATION in pairs or len(pairs) == 2 else []
    return [*(alone or whole or _COLUMNS[:1]), *([_ID] if _ID in names else [])]


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
        for row, data in enumerate(islice(load_dataset(spec, split="train", streaming=True), _HUB_DOCUMENTS), 1):
            record = _record_of(data, where=f"{where}: {spec}: row {row}")
            if record is not None:
                yield record
    except TextError:
        raise
    except Exception as error:  # network, missing data set, missing split: the library raises many kinds
        raise TextError(
            "no such file or folder, and no hub data set that can be reached", where=where,
            found=f"{spec}: {type(error).__name__}",
            remedy="correct the path, or connect to the hub",
        ) from None  # fmt: skip
