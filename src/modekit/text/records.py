"""Files of text and hub data sets -> documents: plain text, or records with text, messages, a pair, or a prompt and answer."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from modekit.errors import TextError
from modekit.files.read import open_regular
from modekit.text.document import Conversation, Document, Pair, message_of, whole_pair
from modekit.text.plain import LARGEST, lines_of, passages, whole

SEARCHED = (".txt", ".jsonl", ".parquet", ".md", ".py")
"""Suffixes of the files that a folder is searched for; many a .csv holds no text."""
_SEPARATED = (".csv", ".tsv")
SUFFIXES = (*SEARCHED, *_SEPARATED)
RECORDS = (".jsonl", ".parquet", *_SEPARATED)
"""Suffixes of files whose documents have ids of their own."""
_ROWS = 64  # of a parquet file in memory at once
_HUB_DOCUMENTS = 100_000  # read of a hub data set at most: far more than any fit or evaluation uses
TEXT, MESSAGES, ID = "text", "messages", "id"
_SOURCE, _TARGET, _TRANSLATION = "source", "target", "translation"
_TURNS = "conversations"  # turns of `from` and `value`, as ShareGPT has them
_ASKED = ("prompt", "instruction", "question", "query")
_GIVEN = ("input", "context")
_ANSWERED = ("completion", "output", "response", "answer")  # of several keys the first that holds text counts
KEYS = (TEXT, MESSAGES, _SOURCE, _TARGET, _TRANSLATION, _TURNS, *_ASKED, *_GIVEN, *_ANSWERED, ID)
"""All that is read of a record."""
_ROLES: dict[object, str] = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_Data = Mapping[object, object]


@dataclass(frozen=True)
class TextRecord:
    """A document, and the `id` that its record gives it, or None."""

    document: Document
    id: str | None = None


def data_of(document: Document) -> dict[str, object]:
    """A document as the data of a record that gives it back."""
    match document:
        case str():
            return {TEXT: document}
        case Pair(source, target):
            return {_SOURCE: source, _TARGET: target}
        case Conversation(messages, False):
            return {MESSAGES: list(messages)}
        case Conversation(messages):
            contents = {message["role"]: message["content"] for message in messages}
            return {_ASKED[0]: contents["user"], _ANSWERED[0]: contents.get("assistant", "")}


def record_of(data: object, *, where: str) -> TextRecord | None:
    """The text of a record, or else its conversation, its pair, or its prompt and answer; None where these are null or empty.

    Raises TextError for what is no record of any kind, and for a pair of which a side is empty.
    """
    if isinstance(data, Mapping):
        document = _document_of(data, where)
        if document is not None:
            return TextRecord(document, _id_of(data.get(ID)))
        if _is_empty(data):
            return None
    raise no_record(where=where, found=f"the keys {', '.join(map(str, data))}" if isinstance(data, Mapping) else repr(data))


def no_record(*, where: str, found: str) -> TextError:
    """The error of what is no record, or a table without any."""
    return TextError(
        "no 'text', no 'messages', no pair of texts, and no prompt with its answer",
        where=where,
        found=found[:300],
        expected='{"text": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]}, {"source": "...", "target": '
        '"..."}, {"translation": {"en": "...", "fr": "..."}} or {"prompt": "...", "completion": "..."}; or such columns',
        remedy="correct or remove it; the first line of a .csv or .tsv names the columns",
    )


def _document_of(data: _Data, where: str) -> Document | None:
    text = data.get(TEXT)
    if isinstance(text, str) and text.strip():
        return whole(text)
    turns = data.get(_TURNS)
    if isinstance(turns, list):
        turns = [_turn(turn) for turn in turns]
    return conversation_of(data.get(MESSAGES)) or _pair_of(data, where=where) or conversation_of(turns) or _exchange_of(data)


def _is_empty(data: _Data) -> bool:
    """Whether what a document would be made of is there, and null or empty, as tables have it."""
    if any(key in data and not data[key] for key in (MESSAGES, _TURNS)) or (TEXT in data and not str(data[TEXT] or "").strip()):
        return True
    said = [data[key] for key in (*_ASKED, *_GIVEN, *_ANSWERED) if key in data]
    return bool(said) and not any(said)


def _id_of(value: object) -> str | None:
    """Text or a whole number as text; anything else names nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return whole(value) if isinstance(value, str) and value else None


def _pair_of(data: _Data, *, where: str) -> Pair | None:
    """`source` and `target`, or the two languages of `translation`, of which the first is the source. A null side is empty."""
    sides: list[object] = [data[_SOURCE], data[_TARGET]] if _SOURCE in data and _TARGET in data else []
    translation = data.get(_TRANSLATION)
    if isinstance(translation, Mapping) and not (sides and all(isinstance(side, str) for side in sides)):
        sides = list(translation.values())
        if len(sides) > 2:  # of several languages, the two that are there
            sides = [side for side in sides if side is not None]
    texts = ["" if side is None else whole(side) for side in sides if isinstance(side, str | None)]
    return whole_pair(texts[0], texts[1], where=where) if len(texts) == len(sides) == 2 else None


def conversation_of(value: object) -> Conversation | None:
    """The conversation of a list of roles with text; None of anything else. A null content, as of a tool call, is empty."""
    messages = []
    for each in value if isinstance(value, list) else ():
        role, content = (each.get("role"), _content_of(each.get("content"))) if isinstance(each, Mapping) else (None, None)
        if not isinstance(role, str) or not role or content is None:
            return None
        messages.append(message_of(role, whole(content)))
    return Conversation(messages) if messages else None


def _content_of(content: object) -> str | None:
    """Text, or the text of parts that are all text."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        known = [text for text in texts if isinstance(text, str)]
        return "".join(known) if known and len(known) == len(content) else None
    return "" if content is None else content if isinstance(content, str) else None


def _turn(turn: object) -> object:
    """A turn of `from` and `value` by the keys and roles of a chat template; anything else stays as it is."""
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    if isinstance(turn, Mapping) and isinstance(speaker, str):
        return {"role": _ROLES.get(speaker, speaker), "content": turn.get("value")}
    return turn


def _exchange_of(data: _Data) -> Document | None:
    """The prompt and answer of a record; the messages of both where it has lists of them; None when it has no such keys."""
    asked, answered = data.get(_ASKED[0]), data.get(_ANSWERED[0])
    if isinstance(asked, list) and isinstance(answered, list):
        return conversation_of([*asked, *answered])
    prompts, answers = [*_first(data, _ASKED), *_first(data, _GIVEN)], [*_first(data, _ANSWERED)]
    if not prompts or not answers:
        return None
    contents = {"user": "\n\n".join(text for text in prompts if text.strip()), "assistant": answers[0]}
    if not contents["user"]:
        return answers[0]
    return Conversation([message_of(role, text) for role, text in contents.items() if text.strip()], is_exchange=True)


def _first(data: _Data, keys: Sequence[str]) -> list[str]:
    """The text of the first of the keys that holds any; an empty one where none does."""
    texts = [whole(text) for text in map(data.get, keys) if isinstance(text, str)]
    return [text for text in texts if text.strip()][:1] or texts[:1]


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
        stream: io.BufferedReader = io.BufferedReader(open_regular(file))
        with stream:
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
        rows = csv.reader(chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = next(rows, [])
        for row in filter(None, rows):  # blank lines are no rows
            yield {**dict.fromkeys(names), **dict(zip(names, row, strict=False))}
    except csv.Error as error:
        raise TextError(
            "the table cannot be read",
            where=f"{where}:{rows.line_num}",
            found=error,
            remedy="correct the line, or save it again",
        ) from None


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
