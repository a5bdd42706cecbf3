"""What a group of documents is about, in words; and a name made of them, which a recipe and a file system take."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from modekit.search.discover.evidence import Labels
from modekit.search.discover.words import words_of

WORDS = 8
_NAMED = 3  # words of a name
_LETTERS = 16  # of each


def words_about(documents: Sequence[str], labels: Labels, groups: int) -> list[list[str]]:
    """For every group the words that tell it from the others most, the best first.

    That is the share of its documents that have the word, by how much larger it is (in logarithms) than that of the others.
    """
    found: list[Counter[str]] = [Counter() for _ in range(groups)]
    for document, group in zip(documents, labels.tolist(), strict=True):
        found[group].update(set(words_of(document)))
    everywhere = sum(found, Counter())
    sizes = [int((labels == group).sum()) for group in range(groups)]
    return [_most_telling(own, everywhere, size, len(documents)) for own, size in zip(found, sizes, strict=True)]


def _most_telling(own: Counter[str], everywhere: Counter[str], size: int, documents: int) -> list[str]:
    others = documents - size

    def telling(word: str) -> float:
        share, elsewhere = own[word] / size, (everywhere[word] - own[word] + 0.5) / (others + 1)
        return share * math.log(share / elsewhere)

    return sorted(own, key=lambda word: (-telling(word), word))[:WORDS]


def name_of(number: int, words: Sequence[str]) -> str:
    """Such as 2-artery-fever-lesion: letters of ASCII; the number alone where the words have none."""
    plain = (unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode() for word in words)
    letters = [found for word in plain if (found := re.sub("[^a-z]", "", word)[:_LETTERS])]
    return "-".join([str(number), *dict.fromkeys(letters[:_NAMED])])
