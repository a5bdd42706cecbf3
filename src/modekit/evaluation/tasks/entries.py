"""Dictionary entries in running text: `Term, synonym: gloss. Term: gloss.`"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_INITIAL = r"(?<=\b\w)\.|(?<=\b[A-Z]\w)\."  # T.B., L. H. Down, St. Lawrence: these stops end no gloss
_HEAD = re.compile(rf"(?:\A|(?<=\. ))([^\W_](?:[^:;.\"()\n]|{_INITIAL}){{0,119}}): (?=\S)")
_FEWEST = 3  # entries of a document that reads like a dictionary


@dataclass(frozen=True)
class Entry:
    """One entry. `head` is what stands before the colon, `terms` its synonyms as written, `gloss` without its full stop."""

    head: str
    terms: tuple[str, ...]
    gloss: str

    @property
    def keys(self) -> frozenset[str]:
        """The terms as they are compared: case-folded."""
        return frozenset(map(key_of, self.terms))


def key_of(term: str) -> str:
    """A term as it is compared."""
    return " ".join(term.casefold().split())


def entries_of(document: str) -> list[Entry]:
    """The entries of a document that consists of them; none of any other.

    Such a document begins with a head, has three at least, and a capital or digit begins each.
    """
    heads = [match for match in _HEAD.finditer(document) if not match[1][0].islower()]
    if len(heads) < _FEWEST or heads[0].start() != 0:
        return []
    ends = [*(match.start() for match in heads[1:]), len(document)]
    entries = []
    for match, end in zip(heads, ends, strict=True):
        terms = tuple(term.strip() for term in match[1].split(", ") if term.strip())
        entries.append(Entry(match[1], terms, document[match.end() : end].strip().removesuffix(".")))
    return entries


def head_words(documents: Iterable[str]) -> set[str]:
    """Every term, as it is compared, that is a head word in any of the documents."""
    return {key for document in documents for entry in entries_of(document) for key in entry.keys}
