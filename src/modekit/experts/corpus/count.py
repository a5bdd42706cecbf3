"""Domains of text: checked, read, and counted. Of a document no more is kept than its number of tokens and a hash.

A *unit* is what goes in or out as one: a document, known by the hash of its text; or, where only common documents count, all
documents of one id, known by the hash of the id. Which documents are duplicates, and what a unit holds, depends on the texts
alone, in whatever order they come.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from modekit.errors import ModekitError, TextError
from modekit.files.typed import shortened
from modekit.recipes.paths import locate
from modekit.recipes.strict import Name
from modekit.run import Run
from modekit.text.document import Document, text_of
from modekit.text.documents import bytes_of_text, check_present, stream_records
from modekit.text.records import TextRecord
from modekit.text.splits import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHERE = "--text"
Key = bytes
"""16 bytes of a sha256."""
CountTokens = Callable[[Sequence[str]], list[int]]
_KEY = 16
_TOGETHER = 64  # documents that the tokenizer takes at once ...
_CHARACTERS = 2**20  # ... but no more text than this: a tokenizer takes hundreds of bytes per character


@dataclass
class CountedDomain:
    """A domain as it was found.

    Attributes:
        tokens: of every document, by the hash of its text.
        unit_of: the unit of every document; empty where each is its own.
        duplicates: documents that were there before, letter for letter.
        silent: documents of which the tokenizer makes no token.
    """

    name: str
    spec: str
    tokens: dict[Key, int] = field(default_factory=dict)
    unit_of: dict[Key, Key] = field(default_factory=dict)
    duplicates: int = 0
    silent: int = 0

    def units(self) -> dict[Key, int]:
        """Unit -> tokens."""
        if not self.unit_of:
            return self.tokens
        units: dict[Key, int] = {}
        for document, unit in self.unit_of.items():
            units[unit] = units.get(unit, 0) + self.tokens[document]
        return units

    def documents_of_units(self) -> dict[Key, int]:
        """Unit -> how many documents it holds."""
        return Counter(self.unit_of.values()) if self.unit_of else dict.fromkeys(self.tokens, 1)

    def unit(self, document: Key) -> Key:
        """What a document goes in or out with."""
        return self.unit_of.get(document, document)


def key_of(document: Document) -> Key:
    """Of a document, as its split is decided: surrounding white space aside."""
    return bytes.fromhex(digest_of(document)[: 2 * _KEY])


def key_of_id(identity: str) -> Key:
    """Of what a document is called."""
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:_KEY]


@dataclass(frozen=True)
class DomainReader:
    """Reads domains: where their paths begin, by which tokenizer, whether by ids, and who is told of progress."""

    root: Path
    count: CountTokens
    common: bool
    run: Run

    def records(self, name: str, spec: str, doing: str) -> Iterator[TextRecord]:
        """The documents of a domain, while something is done with them. Raises TextError where there is none, or by ids one
        without.
        """
        where, some = f"{WHERE} {name}", False
        total, done = bytes_of_text([spec], self.root), 0
        stage = f"{doing} {name}"
        self.run.progress(stage, 0, max(total, 1))
        for number, record in enumerate(stream_records([spec], root=self.root, where=where), 1):
            if self.common and record.id is None:
                raise TextError(
                    "a document has no id, by which the same one would be known in other domains",
                    where=where,
                    found=f"document {number}: {shortened(text_of(record.document))[:60]}",
                    expected="a string in 'id' of every record",
                    remedy="give the records ids, or leave out --common",
                )
            some = True
            done += len(text_of(record.document).encode())
            if number % _TOGETHER == 0:
                self.run.progress(stage, min(done, total), max(total, 1))
            yield record
        self.run.progress(stage, max(total, 1), max(total, 1))
        if not some:
            raise TextError("the text is empty", where=where, found=spec, remedy="give text with at least one document")

    def counted(self, name: str, spec: str) -> CountedDomain:
        """Read and count a domain. Raises TextError."""
        found = CountedDomain(name, spec)
        new = self._new(self.records(name, spec, "count"), found)
        while together := list(islice(new, _TOGETHER)):
            counts = self.count([text for _, text in together])
            for (key, _), tokens in zip(together, counts, strict=True):
                if tokens:
                    found.tokens[key] = tokens
                else:
                    found.silent += 1
                    found.unit_of.pop(key, None)
        if not found.tokens:
            raise TextError(
                "the tokenizer makes no token of the text",
                where=f"{WHERE} {name}",
                found=spec,
                remedy="give a tokenizer that knows its letters",
            )
        return found

    def _new(self, records: Iterable[TextRecord], found: CountedDomain) -> Iterator[tuple[Key, str]]:
        """Documents that were not there before; of a duplicate's ids the one with the smaller hash counts."""
        seen: set[Key] = set()
        for record in records:
            key = key_of(record.document)
            if self.common and record.id is not None:
                unit = key_of_id(record.id)
                if key not in seen or (key in found.unit_of and unit < found.unit_of[key]):
                    found.unit_of[key] = unit
            if key in seen:
                found.duplicates += 1
                continue
            seen.add(key)
            yield key, text_of(record.document)


def token_counter(tokenizer: PreTrainedTokenizerBase) -> CountTokens:
    """Tokens of texts without special ones. A very long text is counted in pieces that end at white space."""

    def count(texts: Sequence[str]) -> list[int]:
        totals = [0] * len(texts)
        for places, pieces in _batches(texts):
            for place, ids in zip(places, tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"], strict=True):
                totals[place] += len(ids)
        return totals

    return count


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Pieces of texts, and of which text each is, no more than fit at once."""
    places: list[int] = []
    pieces: list[str] = []
    for place, text in enumerate(texts):
        start = 0
        while start < len(text):
            end = start + _CHARACTERS
            if end < len(text):
                end = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
                end = end if end > start else start + _CHARACTERS
            if pieces and sum(map(len, pieces)) + end - start > _CHARACTERS:
                yield places, pieces
                places, pieces = [], []
            places.append(place)
            pieces.append(text[start:end])
            start = end
    if pieces:
        yield places, pieces


def check_setting(where: str, found: object, expected: str, *, right: bool) -> None:
    """Raise ModekitError for a setting that cannot be."""
    if not right:
        raise ModekitError("the setting is out of range", where=where, found=found, expected=expected, remedy="correct it")


def none_in_split(split: str, name: str, found: str, expected: str, remedy: str) -> TextError:
    """The error of a domain without a document in a split."""
    what = f"no document of a domain is in the {split} split"
    return TextError(what, where=f"{WHERE} {name}", found=found, expected=expected, remedy=remedy)


def checked_texts(texts: Mapping[str, Sequence[str]], root: Path, *, least: int = 1) -> dict[str, str]:
    """Domain -> its text. Raises ModekitError for names that cannot be files, and TextError for a text that is not there.

    A name is a file's name in what is written, and one domain has one text: two of a name are a slip of the pen.
    """
    seen: dict[str, str] = {}
    for name, specs in texts.items():
        try:
            TypeAdapter(Name).validate_python(name)
        except ValidationError:
            raise ModekitError(
                "not a name of a domain",
                where=WHERE,
                found=name,
                expected="letters, digits, '.', '_' and '-', 64 at most",
                remedy="rename it",
            ) from None
        if len(specs) > 1 or name.lower() in seen:
            both = specs if len(specs) > 1 else [seen[name.lower()], *specs]
            raise ModekitError(
                "a domain is named twice",
                where=f"{WHERE} {name}",
                found=", ".join(both),
                remedy="give it one text, a folder where there are several files, or rename one",
            )
        seen[name.lower()] = specs[0]
        check_present(specs, root=root, where=f"{WHERE} {name}")
    if len(texts) < least:
        raise ModekitError(
            "there is nothing to balance",
            where=WHERE,
            found=", ".join(texts) or "no domain",
            expected=f"{least} domains or more",
            remedy="give every domain a --text NAME=PATH",
        )
    chosen = {name: specs[0] for name, specs in texts.items()}
    _refuse_one_text_for_two(chosen, root)
    return chosen


def _refuse_one_text_for_two(texts: Mapping[str, str], root: Path) -> None:
    whose: dict[str, str] = {}
    for name, spec in texts.items():
        place = str(locate(spec, root) or spec)
        if place in whose:
            raise TextError(
                "two domains have the same text",
                where=f"{WHERE} {name}",
                found=f"{spec}: that of {whose[place]}, too",
                remedy="correct the path",
            )
        whose[place] = name
