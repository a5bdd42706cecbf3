"""Files of text and hub data sets -> records: plain text, a record per line, tables, two files with a pair per line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.recipes.paths import locate, sides_of
from modekit.text.document import Pair, text_of, whole_pair
from modekit.text.plain import lines_of, passages, plain_text, text_pieces
from modekit.text.records import TextRecord, record_of
from modekit.text.tables import SEPARATED, read_parquet, read_separated

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


def read_file(file: Path, *, where: str, most: int | None = None) -> Iterator[TextRecord]:
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
                yield from map(TextRecord, passages(lambda: text_pieces(stream, where=place, most=most)))
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


def _read_lines(stream: io.FileIO, *, where: str, most: int | None) -> Iterator[TextRecord]:
    """A record per line. Raises OSError, TextError."""
    read = 0
    for number, data in enumerate(lines_of(stream, where=where), 1):
        line = plain_text(data, where=where, start=read)
        if line.strip():
            yield _record(line, where=f"{where}:{number}")
        read += len(data)
        if most is not None and read >= most:
            return


def _record(line: str, *, where: str) -> TextRecord:
    try:
        record = record_of(json.loads(line), where=where)
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


def _records_of(rows: Iterable[Mapping[str, object]], *, where: str, most: int | None = None) -> Iterator[TextRecord]:
    """Of the rows of a table those that hold a document."""
    read = 0
    for number, row in enumerate(rows, 1):
        record = record_of(row, where=f"{where}: row {number}")
        if record is not None:
            yield record
        read += _ROW if record is None else len(text_of(record.document)) + _ROW
        if most is not None and read >= most:
            return


def aligned_files(spec: str, root: Path) -> tuple[Path, Path] | None:
    """The two files that `news.en+news.fr` names, source and target; None where it names something itself, or no two files."""
    sides = sides_of(spec, root)
    if sides is None:
        return None
    source, target = (locate(side, root) for side in sides)
    return None if source is None or target is None else (source, target)


def read_aligned(source: Path, target: Path, *, where: str) -> Iterator[Pair]:
    """A pair per line of two files; a line that is empty in both is none.

    Raises TextError when one has more lines than the other, a line is empty in one alone, or they cannot be read.
    """
    counts = [0, 0]
    try:
        with open_regular(source) as first, open_regular(target) as second:
            streams = (lines_of(first, where=f"{where}: {source.name}"), lines_of(second, where=f"{where}: {target.name}"))
            for number, both in enumerate(zip_longest(*streams), 1):
                counts = [counts[side] + (line is not None) for side, line in enumerate(both)]
                if counts[0] == counts[1]:
                    places = (f"{where}: {file.name}:{number}" for file in (source, target))
                    sides = [plain_text(line, where=place) for line, place in zip(both, places, strict=True)]
                    if any(side.strip() for side in sides):
                        yield whole_pair(sides[0], sides[1], where=f"{where}: line {number} of {source.name} and {target.name}")
    except OSError as error:
        raise TextError("the text cannot be read", where=where, found=error.strerror, remedy="make it readable") from None
    if counts[0] != counts[1]:
        raise TextError(
            "two files of parallel text have different numbers of lines",
            where=where,
            found=f"{source.name}: {counts[0]:,} lines, {target.name}: {counts[1]:,} lines",
            expected="a line for a line",
            remedy="align the files: line 1 of one is the translation of line 1 of the other",
        )


def read_hub(spec: str, *, where: str) -> Iterator[TextRecord]:
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
        rows = islice(load_dataset(spec, split="train", streaming=True), _HUB_DOCUMENTS)
        yield from _records_of(rows, where=f"{where}: {spec}")
    except TextError:
        raise
    except Exception as error:  # network, missing data set, missing split: the library raises many kinds
        raise TextError(
            "no such file or folder, and no hub data set that can be reached",
            where=where,
            found=f"{spec}: {type(error).__name__}",
            remedy="correct the path, or connect to the hub",
        ) from None
