"""Text that a recipe or a command names, a file, a folder or a hub data set -> its documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from sys import getsizeof

from modekit.errors import TextError
from modekit.recipes.paths import locate
from modekit.sources.family import Reads
from modekit.text.document import Document, both_kinds, reads_of, text_of
from modekit.text.records import RECORDS, SEARCHED, SUFFIXES, TextRecord, read_file, read_hub
from modekit.text.splits import digest_of

MOST_TEXT = 2**28
"""Bytes in memory of the documents of one text: 60 million tokens or so, far more than any fit or evaluation reads."""


def read_documents(specs: Sequence[str], *, root: Path, where: str) -> list[Document]:
    """All documents of a domain, in an order that depends only on their text; exact duplicates once.

    Plain text (.txt, .md, .py) is cut into passages of about 2,000 characters, at blank lines or, where there are none, at
    line ends; .jsonl, .parquet, .csv and .tsv hold one document per record, text in `text`, a conversation in `messages`, a
    pair in `source` and `target` or in `translation`, or a prompt and its answer (records.py). Anything that is no path is
    taken for a hub data set (split `train`). Of more than MOST_TEXT those are kept that come first in this order: a sample by
    the hash, whatever the order of the files.

    Raises TextError when nothing is there, it is empty or binary, or some of it is pairs and some is not.
    """
    kept = _SmallestHashes(MOST_TEXT)
    kinds: dict[Reads, str] = {}
    for spec in specs:
        for record in stream_records([spec], root=root, where=where):
            kinds.setdefault(reads_of(record.document), spec)
            if len(kinds) > 1:
                found = f"pairs in {kinds['pairs']}, plain text in {kinds['text']}: {text_of(record.document)[:60]!r}"
                raise both_kinds(where=where, found=found)
            kept.add(record.document)
    documents = kept.documents()
    if not documents:
        raise TextError(
            "the text is empty",
            where=where,
            found=", ".join(str(locate(spec, root) or spec) for spec in specs),
            remedy="give text with at least one document",
        )
    return documents


class _SmallestHashes:
    """Of any number of documents, exact duplicates once, those with the smallest hashes, as many as there is room for."""

    def __init__(self, room: int) -> None:
        self._room, self._size = room, 0
        self._kept: dict[str, Document] = {}
        self._bound: str | None = None  # the smallest hash for which there was no room

    def add(self, document: Document) -> None:
        """Keep a document where there is room."""
        digest = digest_of(document)
        if digest not in self._kept and (self._bound is None or digest < self._bound):
            self._kept[digest] = document
            self._size += _bytes_of(document)
            if self._size > self._room * 5 // 4:
                self.documents()

    def documents(self) -> list[Document]:
        """By their hashes."""
        ordered, self._kept, self._size = sorted(self._kept.items()), {}, 0
        for digest, document in ordered:
            size = _bytes_of(document)
            if self._size + size > self._room and self._kept:
                self._bound = digest
                break
            self._kept[digest] = document
            self._size += size
        return list(self._kept.values())


def _bytes_of(document: Document) -> int:
    """In memory, about: pairs and conversations have more parts than plain text."""
    return getsizeof(text_of(document)) * (1 if isinstance(document, str) else 2) + 300


def stream_records(specs: Sequence[str], *, root: Path, where: str) -> Iterator[TextRecord]:
    """The documents as they come, file by file, duplicates among them, with the `id` of each: that of its record; of plain text
    its file's path below the folder that was named, without the suffix; else None. Nothing is kept of those that were read.

    Raises TextError as `read_documents`, but for a text that holds nothing.
    """
    for record in (record for spec in specs for record in _records_of(spec, root=root, where=where)):
        text = text_of(record.document).strip()
        if text:
            yield TextRecord(text, record.id) if isinstance(record.document, str) else record


def _records_of(spec: str, *, root: Path, where: str) -> Iterator[TextRecord]:
    path = _path_of(spec, root, where)
    if path is None:
        yield from read_hub(spec, where=where)
        return
    files = _files_in(path)
    if not files:
        raise TextError(
            "the folder holds no text",
            where=where,
            found=str(path),
            expected=", ".join(SEARCHED),
            remedy="put text there, or correct the path",
        )
    for file in files:
        relative = file.relative_to(path if path.is_dir() else path.parent).with_suffix("").as_posix()
        for record in read_file(file, where=where):
            yield record if file.suffix in RECORDS else TextRecord(record.document, relative)


def is_local(spec: str, root: Path) -> bool:
    """Whether a text is a file or folder, there or not, rather than a hub data set."""
    return _is_path(spec) or locate(spec, root) is not None


def _is_path(spec: str) -> bool:
    return spec.endswith(SUFFIXES) or spec.startswith((".", "/", "~"))


def find_text(specs: Sequence[str], *, root: Path, where: str) -> list[Path | str]:
    """The files of a text, and its hub data sets by name. Raises TextError for one on disk that is not there; reads nothing."""
    paths = ((spec, _path_of(spec, root, where)) for spec in specs)
    return [each for spec, path in paths for each in ([spec] if path is None else _files_in(path))]


def folders_of(texts: Iterable[Sequence[str]], root: Path) -> list[Path]:
    """The folders among texts: all that will ever lie in them is read."""
    return [path for specs in texts for spec in specs if (path := locate(spec, root)) is not None and path.is_dir()]


def _path_of(spec: str, root: Path, where: str) -> Path | None:
    """Where a text lies; None of a hub data set. Raises TextError."""
    path = locate(spec, root)
    if path is None and _is_path(spec):
        raise TextError(
            "the text does not exist",
            where=where,
            found=str(root / spec),
            remedy="correct the path; paths of a mixture's recipe begin at its folder: where that was moved, move the text, "
            "too",
        )
    return path


def _files_in(path: Path) -> list[Path]:
    """A file, or the text files of a folder."""
    if not path.is_dir():
        return [path]
    files, folders = [], [path]
    while folders:
        with suppress(OSError):  # not ours to read, or too deep for a path
            entries = list(folders.pop().iterdir())
            files += [entry for entry in entries if entry.suffix in SEARCHED and entry.is_file()]
            folders += [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]  # links may lead in circles
    return sorted(files)
