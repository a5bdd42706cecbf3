"""Files of text and hub data sets -> records: plain text, a record per line, tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.text.plain import LARGEST, lines_of, passages
from modekit.text.records import KEYS, TextRecord, no_record, record_of

SEARCHED = (".txt", ".jsonl", ".parquet", ".md", ".py")
"""Suffixes of the files that a folder is searched for; many a .csv holds no text."""
_SEPARATED = (".csv", ".tsv")
SUFFIXES = (*SEARCHED, *_SEPARATED)
RECORDS = (".jsonl", ".parquet", *_SEPARATED)
"""Suffixes of files whose documents have ids of their own."""
_ROWS = 64  # of a parquet file in memory at once
_HUB_DOCUMENTS = 100_000  # read of a hub data set at most: far more than any fit or evaluation uses


def read_file(file: Path, *, where: str) -> Iterator[TextRecord]:
    """The documents of one file. Raises TextError when it is of no known kind, cannot be read, or is no text."""
    place = f"{where}: {file.name}"
    if file.suffix not in SUFFIXES:
        raise TextError(
            "the kind of text file is not known",
            where=place,
            found=file.suffix or "no suffix",
            expected=", ".join(SUFFIXES),
            remedy="unpack it, or save it as .txt or .jsonl; parallel text as .tsv with the columns source and target",
        )
    try:
        with io.BufferedReader(open_regular(file)) as stream:
            if file.suffix == ".parquet":
                yield from _records_of(_read_parquet(stream, where=place), where=place)
            elif file.suffix in _SEPARATED:
                yield from _records_of(_read_separated(stream, file.suffix, where=place), where=place)
            elif file.suffix == ".jsonl":
                yield from _read_lines(stream, where=place)
            else:
                yield from map(TextRecord, passages(lambda: lines_of(stream, where=place)))
    except OSError as error:
        raise TextError("the text cannot be read", where=place, found=error.strerror, remedy="make it readable") from None


def _read_lines(stream: io.BufferedReader, *, where: str) -> Iterator[TextRecord]:
    """A record per line."""
    for number, line in enumerate(lines_of(stream, where=where), 1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(
                "the line is not JSON",
                where=place,
                found=f"{error}: {line.strip()[:60]}",
                expected='a record per line: {"text": "..."}',
                remedy="correct or remove the line",
            ) from None
        record = record_of(data, where=place)
        if record is not None:
            yield record


def _records_of(rows: Iterable[object], *, where: str) -> Iterator[TextRecord]:
    """Of the rows of a table those that hold a document."""
    for number, row in enumerate(rows, 1):
        record = record_of(row, where=f"{where}: row {number}")
        if record is not None:
            yield record


def _read_separated(stream: io.BufferedReader, suffix: str, *, where: str) -> Iterator[Mapping[str, str | None]]:
    """The rows of a table whose first line names the columns: values between tabs as they stand, or as CSV quotes them."""
    lines = lines_of(stream, where=where)
    header = next(lines, "")
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST))  # of the whole process
    if suffix == ".tsv":
        rows = csv.reader(chain([header], lines), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(chain([header], lines), delimiter=max(",;\t", key=header.count))
    try:
        names = next(rows, [])
        for row in rows:
            yield {**dict.fromkeys(names), **dict(zip(names, row, strict=False))}
    except csv.Error as error:
        remedy = "correct the line, or save it again"
        raise TextError("the table cannot be read", where=f"{where}:{rows.line_num}", found=error, remedy=remedy) from None


def _read_parquet(stream: io.BufferedReader, *, where: str) -> Iterator[Mapping[str, object]]:
    """The rows of a parquet file, of the columns that a record may have."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise TextError("reading .parquet needs pyarrow", where=where, remedy="pip install 'modekit[data]'") from None
    try:
        with ParquetFile(stream) as table:
            names = table.schema_arrow.names
            columns = [name for name in KEYS if name in names]
            if not columns:
                raise no_record(where=where, found=f"the columns {', '.join(names)}")
            for batch in table.iter_batches(_ROWS, columns=columns):
                yield from batch.to_pylist()
    except TextError:
        raise
    except Exception as error:  # pyarrow's errors share no base class
        raise TextError(
            "the parquet file cannot be read",
            where=where,
            found=(str(error) or type(error).__name__)[:300],
            remedy="write it again: it is damaged, or no parquet file",
        ) from None


def read_hub(spec: str, *, where: str) -> Iterator[TextRecord]:
    """The documents of a hub data set (split `train`). Raises TextError when there is none that can be reached."""
    try:
        from datasets import load_dataset

        rows = islice(load_dataset(spec, split="train", streaming=True), _HUB_DOCUMENTS)
        yield from _records_of(rows, where=f"{where}: {spec}")
    except TextError:
        raise
    except Exception as error:  # no library, no network, no data set, no such split: many kinds are raised
        said = " ".join(str(error).split())[:300]
        raise TextError(
            "no such file or folder, and no hub data set that can be read",
            where=where,
            found=f"{spec}: {type(error).__name__}: {said}",
            remedy="correct the path, or pip install 'modekit[data]' and connect to the hub; save a data set without a split "
            "'train' as a file first",
        ) from None
