"""Domains of text by name, read whole: every document once, with its id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.errors import ModekitError, TextError
from modekit.files.change import refuse_existing
from modekit.files.place import Replace
from modekit.files.typed import shortened
from modekit.recipes.paths import locate
from modekit.recipes.strict import NAME_RULE, is_name
from modekit.run import Run
from modekit.text.document import text_of
from modekit.text.documents import find_text, stream_records
from modekit.text.records import TextRecord
from modekit.text.splits import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHERE = "--text"
Key = bytes
"""16 bytes of the sha256 of a document's text, or of an id."""
_KEY = 16
_TOGETHER = 64  # documents that a tokenizer takes at once


@dataclass(frozen=True)
class GivenTexts:
    """Text by domain (paths relative to `root`, or hub data sets); and a model, as it was named and its folder, whose tokenizer
    counts it or is compared with.
    """

    texts: Mapping[str, Sequence[str]]
    root: Path
    model: str | None = None
    folder: Path | None = None

    def checked(self, out: Path, replace: Replace) -> tuple[dict[str, str], list[Path]]:
        """Domain -> its text, and all that is read. Raises as `checked_texts`, and OutputError for what may not go to `out`."""
        texts = checked_texts(self.texts, self.root)
        found = [*(locate(spec, self.root) for spec in texts.values()), self.folder]
        sources = [path for path in found if path is not None]
        refuse_existing(out, replace, sources=sources)
        return texts, sources

    def tokenizer(self, run: Run) -> PreTrainedTokenizerBase | None:
        """The model's. Raises SourceError."""
        from modekit.loaded.load import load_tokenizer

        return None if self.folder is None else load_tokenizer(self.folder, run=run)


@dataclass(frozen=True)
class DomainText:
    """The documents of a domain by the hash of their text, which `duplicates` had, too."""

    name: str
    spec: str
    documents: Mapping[Key, TextRecord]
    duplicates: int


def key_of_id(identity: str) -> Key:
    """Of what a document is called."""
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()[:_KEY]


def read_domain(name: str, spec: str, root: Path, run: Run, *, by_id: bool = False) -> DomainText:
    """Read a domain. Of a duplicate's ids the first by the alphabet counts; `by_id`, that with the smallest hash.

    Raises TextError where there is no document, or `by_id` one without an id.
    """
    run.begin(f"read {name}")
    documents: dict[Key, TextRecord] = {}
    number = 0
    for number, record in enumerate(stream_records([spec], root=root, where=f"{WHERE} {name}"), 1):
        if by_id and record.id is None:
            raise TextError(
                "a document has no id, by which the same one would be known in other domains",
                where=f"{WHERE} {name}",
                found=f"document {number}: {shortened(text_of(record.document))[:60]}",
                expected="a string in 'id' of every record",
                remedy="give the records ids, or leave out common=true",
            )
        key = bytes.fromhex(digest_of(record.document)[: 2 * _KEY])
        known = documents.get(key)
        if known is None or _rank(record, by_id) < _rank(known, by_id):
            documents[key] = record
    if not documents:
        raise TextError("the text is empty", where=f"{WHERE} {name}", found=spec, remedy="give text with at least one document")
    return DomainText(name, spec, documents, number - len(documents))


def _rank(record: TextRecord, by_id: bool) -> tuple[bool, str | bytes]:
    identity = record.id or ""
    return record.id is None, key_of_id(identity) if by_id else identity


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Tokens of texts without special ones."""
    counts: list[int] = []
    left = iter(texts)
    while together := list(islice(left, _TOGETHER)):
        counts += map(len, tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"])
    return counts


def none_in_split(split: str, name: str, found: str, expected: str, remedy: str) -> TextError:
    """The error of a domain without a document in a split."""
    return TextError(
        f"no document of a domain is in the {split} split",
        where=f"{WHERE} {name}",
        found=found,
        expected=expected,
        remedy=remedy,
    )


def checked_texts(texts: Mapping[str, Sequence[str]], root: Path) -> dict[str, str]:
    """Domain -> its text. Raises ModekitError for names that cannot be files, and TextError for a text that is not there.

    A name is a file's name in what is written, and one domain has one text: two of a name are a slip of the pen.
    """
    for name, specs in texts.items():
        if not is_name(name):
            raise ModekitError("not a name of a domain", where=WHERE, found=name, expected=NAME_RULE, remedy="rename it")
        if len(specs) > 1 or [each.lower() for each in texts].count(name.lower()) > 1:
            raise ModekitError(
                "a domain is named twice",
                where=f"{WHERE} {name}",
                found=", ".join(specs),
                remedy="give it one text, a folder where there are several files, or rename one",
            )
        find_text(specs, root=root, where=f"{WHERE} {name}")
    return {name: specs[0] for name, specs in texts.items()}
