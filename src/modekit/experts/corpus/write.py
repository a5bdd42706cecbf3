"""The second reading of a domain: what is kept goes into its files, in an order that the seed gives and no file's place does.

    documents as they come -> a spool beside the files -> files, unit by unit in the order of the choice

Of a document that is kept, its id and its place in the spool are in memory, of the others nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modekit.errors import TextError
from modekit.experts.corpus.count import WHERE, CountedDomain, DomainReader, Key, key_of, key_of_id
from modekit.files.read import open_regular
from modekit.files.write import appearing, create, remove, temporary_in
from modekit.text.records import data_of

_BUFFER = 2**16
_NAMELESS = "\U0010ffff"  # sorts behind every id


@dataclass(frozen=True)
class _Line:
    """A document in the spool."""

    id: str
    start: int
    length: int


def write_domain(counted: CountedDomain, reader: DomainReader, files: Mapping[Path, Sequence[Key]]) -> list[str]:
    """Write the units of every file; returns the sha256 of each.

    Raises TextError when the text has changed since it was counted, OSError.
    """
    wanted = {unit for units in files.values() for unit in units}
    spool = temporary_in(next(iter(files)).parent)
    try:
        with io.BufferedWriter(create(spool), _BUFFER) as stream:
            lines = _spooled(counted, reader, wanted, stream)
        documents = _by_unit(counted, wanted, lines)
        with io.BufferedReader(open_regular(spool)) as stored:
            return [_written(path, units, documents, stored) for path, units in files.items()]
    finally:
        remove(spool)


def _spooled(counted: CountedDomain, reader: DomainReader, wanted: set[Key], stream: io.BufferedIOBase) -> dict[Key, _Line]:
    """Documents that are wanted, each once; of a duplicate that has several ids, the first by the alphabet."""
    lines: dict[Key, _Line] = {}
    position = 0
    for record in reader.records(counted.name, counted.spec, "write"):
        document = key_of(record.document)
        if document not in counted.tokens or counted.unit(document) not in wanted:
            continue
        if reader.common and key_of_id(record.id or "") != counted.unit(document):
            continue  # a duplicate under another id than the one that counts
        known = lines.get(document)
        if known is not None and (record.id or _NAMELESS) >= known.id:
            continue
        said = {"id": record.id or document.hex(), **data_of(record.document)}  # as text/records.py reads it
        line = f"{json.dumps(said, ensure_ascii=False)}\n".encode()
        stream.write(line)
        lines[document] = _Line(record.id or _NAMELESS, position, len(line))
        position += len(line)
    return lines


def _by_unit(counted: CountedDomain, wanted: set[Key], lines: Mapping[Key, _Line]) -> dict[Key, list[_Line]]:
    """Unit -> its documents as they came. Raises TextError when not all are there."""
    found: dict[Key, list[_Line]] = {}
    for document, line in lines.items():
        found.setdefault(counted.unit(document), []).append(line)
    documents = counted.documents_of_units()
    if any(len(found.get(unit, ())) != documents[unit] for unit in wanted):
        raise TextError(
            "the text changed while it was read",
            where=f"{WHERE} {counted.name}",
            found=counted.spec,
            remedy="run the command again when nothing writes there",
        )
    return found


def _written(path: Path, units: Sequence[Key], documents: Mapping[Key, Sequence[_Line]], stored: io.BufferedIOBase) -> str:
    digest = hashlib.sha256()
    with appearing(path, sync=False) as temporary, io.BufferedWriter(create(temporary), _BUFFER) as stream:
        for line in (line for unit in units for line in documents[unit]):
            stored.seek(line.start)
            content = stored.read(line.length)
            digest.update(content)
            stream.write(content)
    return digest.hexdigest()
