"""What lies in a text file or a hub data set: plain text, one record per line, or columns of a table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.text.chat import Conversation, conversation_of
from modekit.text.exchanges import Exchange, exchange_of, turns_of
from modekit.text.pairs import SOURCE, TARGET, Pair, pair_of
from modekit.text.passages import passages
from modekit.text.plain import lines_of, plain_text, text_pieces
from modekit.text.tables import ID, MESSAGES, SEPARATED, TEXT, Row, read_parquet, read_separated

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".md", ".py")
"""Of files that a folder is searched for."""
_REMEDY = (
    "save it as .txt (plain text) or .jsonl (a record per line); a side of parallel text is named with the other: FILE+OTHER"
)
_REMEDIES = {
    ".gz": "unpack it: `gunzip -k FILE`",
    ".bz2": "unpack it: `bunzip2 -k FILE`",
    ".xz": "unpack it: `unxz -k FILE`",
    ".zst": "unpack it: `unzstd FILE`",
    ".zip": "unpack it: `unzip FILE`",
    ".json": "write a record per line into a .jsonl: `jq -c '.[]' FILE > NEW.jsonl`",
}
"""Suffix of files that are no text yet -> what makes text of them."""
_ROW = 64  # bytes that a row counts as besides its text
_HUB_DOCUMENTS = 100_000  # read of a hub data set at most: far more than any fit or evaluation uses


@dataclass(frozen=True)
class Record:
    """A document, and what its maker calls it: a record's `id`, or None."""

    document: str
    id: str | None = None


def data_of(document: str) -> dict[str, Any]:
    """A document as the data of a record that gives it back."""
    if isinstance(document, Exchange):
        return document.record
    if isinstance(document, Conversation):
        return {MESSAGES: list(document.messages)}
    return {SOURCE: document.source, TARGET: document.target} if isinstance(document, Pair) else {TEXT: document}


def read_file(file: Path, *, where: str, most: int | None = None) -> Iterator[Record]:
    """The documents of one file; with `most` reading ends after about so many bytes.

    Raises TextError when it is of no known kind, cannot be read, is binary, or holds a document larger than any should be.
    """
    place = f"{where}: {file.name}"
    if file.suffix not in (*TEXT_SUFFIXES, *SEPARATED):
        raise _unknown_kind(file, place)
    if file.suffix == ".parquet":
        yield from _records_of(read_parquet(file, where=place), where=place, most=most)
        return
    try:
        with open_regular(file) as stream:
            if file.suffix in SEPARATED:
                yield from _records_of(read_separated(stream, where=place), where=place, most=most)
            elif file.suffix == ".jsonl":
                yield from _read_lines(stream, where=place, most=most)
            else:
                yield from map(Record, passages(lambda: text_pieces(stream, where=place, most=most)))
    except OSError as error:
        raise TextError("the text cannot be read", where=place, found=error.strerror, remedy="make it readable") from None


def _unknown_kind(file: Path, where: str) -> TextError:
    remedy = next((said for suffix, said in _REMEDIES.items() if file.suffix.lower() == suffix), _REMEDY)
    return TextError(
        "the kind of text file is not known",
        where=where,
        found=file.suffix or "no suffix",
        expected=", ".join((*TEXT_SUFFIXES, *SEPARATED)),
        remedy=remedy.replace("FILE", file.name),
    )


def _read_lines(stream: io.FileIO, *, where: str, most: int | None) -> Iterator[Record]:
    """A record per line. Raises OSError, TextError."""
    read = 0
    for number, data in enumerate(lines_of(stream, where=where), 1):
        line = plain_text(data, where=where, start=read)
        if line.strip():
            yield _record(line, where=f"{where}:{number}")
        read += len(data)
        if most is not None and read >= most:
            return


def _record(line: str, *, where: str) -> Record:
    try:
        record = _record_of(json.loads(line), where=where)
    except (ValueError, RecursionError):
        record = None
    if record is None:
        raise TextError(
            "not a JSON record with 'text', 'messages', a pair of texts, or a prompt and its answer",
            where=where,
            found=line.strip()[:60],
            expected='{"text": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]}, {"source": "...", "target": '
            '"..."}, {"translation": {"en": "...", "fr": "..."}} or {"prompt": "...", "completion": "..."}',
            remedy="correct or remove the line",
        )
    return record


def _record_of(record: object, *, where: str) -> Record | None:
    """None for what is no record of any kind. Raises TextError for a pair of which a side is empty."""
    document = _document_of(record, where)
    return None if document is None or not isinstance(record, dict) else Record(document, _id_of(record.get(ID)))


def _id_of(value: object) -> str | None:
    """Text or a whole number as text; anything else names nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) and value else None


def _document_of(record: object, where: str) -> str | None:
    """The text of a record, or else its conversation, its pair, or its prompt and answer; None when it has none of them."""
    if not isinstance(record, dict):
        return None
    text = record.get(TEXT)
    if isinstance(text, str):
        return text.encode("utf-8", "replace").decode()  # an escaped half of a surrogate pair is no character
    kinds = (_chat_of, partial(pair_of, where=where), turns_of, exchange_of)
    return next((found for kind in kinds if (found := kind(record)) is not None), None)


def _chat_of(record: Mapping[object, object]) -> Conversation | None:
    return conversation_of(record.get(MESSAGES))


def _records_of(rows: Iterable[Row], *, where: str, most: int | None) -> Iterator[Record]:
    """Of the rows of a table those that hold a document."""
    read = 0
    for number, row in enumerate(rows, 1):
        record = _record_of(row, where=f"{where}: row {number}")
        if record is not None:
            yield record
        read += _ROW if record is None else len(record.document) + _ROW
        if most is not None and read >= most:
            return


def read_hub(spec: str, *, where: str) -> Iterator[Record]:
    """The documents of a hub data set (split `train`). Raises TextError when there is none that can be reached."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(
            "no such file or folder, and hub data sets cannot be read without the library",
            where=where,
            found=spec,
            remedy="correct the path, or pip install 'modekit[data]' for hub data sets",
        ) from None
    try:
        for row, data in enumerate(islice(load_dataset(spec, split="train", streaming=True), _HUB_DOCUMENTS), 1):
            record = _record_of(data, where=f"{where}: {spec}: row {row}")
            if record is not None:
                yield record
    except TextError:
        raise
    except Exception as error:  # network, missing data set, missing split: the library raises many kinds
        raise TextError(
            "no such file or folder, and no hub data set that can be reached",
            where=where,
            found=f"{spec}: {type(error).__name__}",
            remedy="correct the path, or connect to the hub",
        ) from None
