"""Pairs of parallel text as documents: what a model with an encoder reads, and what it is to say of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from modekit.errors import TextError
from modekit.sources.family import Reads

SOURCE, TARGET, TRANSLATION = "source", "target", "translation"
"""Keys of records."""


class Pair(str):
    """A source and its target as one document.

    As a string it is both, which decides its split and what it is compared by; `encode` keeps them apart.
    """

    source: str
    target: str

    def __new__(cls, source: str, target: str) -> Pair:
        """Of sides that are not empty."""
        made = super().__new__(cls, f"{source}\n{target}")
        made.source, made.target = source, target
        return made

    @property
    def said(self) -> str:
        """Both sides, told apart, as one text."""
        return json.dumps({SOURCE: self.source, TARGET: self.target}, ensure_ascii=False, sort_keys=True)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.source, self.target)


def pair_of(record: object, *, where: str = "text") -> Pair | None:
    """The pair of a record: its `source` and `target`, or the two languages of its `translation`, of which the first is the
    source; None when it has neither.

    Raises TextError when a side is empty; `where` says which record it is.
    """
    sides = _sides(record)
    return None if sides is None else whole_pair(*sides, where=where)


def _sides(record: object) -> tuple[str, str] | None:
    """Both sides; one that is null, as tables have it where nothing was said, is empty."""
    if not isinstance(record, Mapping):
        return None
    said: list[object] = [record[SOURCE], record[TARGET]] if SOURCE in record and TARGET in record else []
    translation = record.get(TRANSLATION)
    if isinstance(translation, Mapping) and not (said and all(isinstance(side, str) for side in said)):
        said = list(translation.values())
        if len(said) > 2:  # of several languages, the two that are there
            said = [side for side in said if side is not None]
    texts = ["" if side is None else side.encode("utf-8", "replace").decode() for side in said if isinstance(side, str | None)]
    return (texts[0], texts[1]) if len(texts) == len(said) == 2 else None


def whole_pair(source: str, target: str, *, where: str) -> Pair:
    """The pair of two sides without the space around them. Raises TextError when one is empty."""
    sides = {SOURCE: source.strip(), TARGET: target.strip()}
    empty = [name for name, side in sides.items() if not side]
    if empty:
        raise TextError(
            f"a pair has an empty {' and an empty '.join(empty)}",
            where=where,
            found=f"{sides[SOURCE][:30]!r} and {sides[TARGET][:30]!r}",
            expected="text on both sides",
            remedy="fill in what is missing, or remove the pair",
        )
    return Pair(*sides.values())


def of_one_kind(documents: Iterable[str]) -> Iterator[str]:
    """The documents as they come. Raises TextError where pairs and other text come together: no model reads both."""
    first: bool | None = None
    for document in documents:
        first = isinstance(document, Pair) if first is None else first
        if isinstance(document, Pair) != first:
            raise both_kinds(found=f"{document[:60]!r} among the others")
        yield document


def both_kinds(*, where: str | None = None, found: str | None = None) -> TextError:
    """The error of pairs and other text that would be read together."""
    return TextError(
        "the text of one domain has pairs and plain text",
        where=where,
        found=found,
        expected="pairs alone, for models with an encoder, or plain text alone, for the others",
        remedy="leave out one kind: text files, records and prompts alike",
    )


def check_kind(documents: Iterable[str], reads: Reads, *, where: str) -> None:
    """Raise TextError where a model that reads pairs is given plain text, or another one pairs."""
    odd = next((document for document in documents if isinstance(document, Pair) != (reads == "pairs")), None)
    if odd is not None:
        raise other_kind(reads, where=where, found=repr(odd[:60]))


def other_kind(reads: Reads, *, where: str | None = None, found: str | None = None) -> TextError:
    """The error of text that is not of the kind that a model reads."""
    if reads == "pairs":
        return TextError(
            "a model with an encoder needs pairs of source and target, and this is plain text",
            where=where,
            found=found,
            expected='{"source": "...", "target": "..."} or {"translation": {"en": "...", "fr": "..."}} per line of a .jsonl, '
            "or two files with a line for a line: news.en+news.fr",
            remedy="give parallel text; a record that has a 'text', too, is read as that alone: take it out",
        )
    return TextError(
        "a model without an encoder reads plain text, and these are pairs of source and target",
        where=where,
        found=found,
        remedy="give plain text, or write source and target of each pair into one text",
    )
