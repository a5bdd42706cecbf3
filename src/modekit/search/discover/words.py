"""The words of documents, whatever their script: hashed counts by which documents are grouped, and names of the groups."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import regex
from sklearn.feature_extraction.text import HashingVectorizer

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

READ = 16_384
"""Characters of a document that decide where it belongs; it is written whole."""
Labels = npt.NDArray[np.intp]
"""(N,): the group of each document."""
_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}]--[{_WITHOUT_SPACES}]]{{2,24}}")
_PAIR = regex.compile(rf"[{_WITHOUT_SPACES}]{{2}}")
_RARE = 0.05  # of the documents: a word in more of them shows the style of a text rather than its domain
_ENOUGH = 16  # rare words that half of the documents must have; where texts are short, less rare ones count
_WORDS = 8  # that describe a group
_NAMED = 3  # words of a name
_LETTERS = 16  # of each


def words_of(text: str) -> list[str]:
    """Runs of letters in lower case, one by one; where a script has no spaces, every two neighbouring characters."""
    beginning = text[:READ].lower()
    return [*_WORD.findall(beginning), *_PAIR.findall(beginning, overlapped=True)]


def word_rows(documents: Sequence[str]) -> csr_matrix:
    """(documents, hashed words), float32: 1 where a document has a word, however often."""
    rows = HashingVectorizer(
        analyzer=words_of, n_features=2**18, binary=True, alternate_sign=False, norm=None, dtype="float32"
    ).transform(documents)
    rows.sort_indices()
    return rows


def rare_words(rows: csr_matrix) -> npt.NDArray[np.intp]:
    """Columns that count: words in two documents or more, and in few enough to tell documents apart.

    That is one document in twenty; more, where half of the documents would keep hardly any word.
    """
    documents = rows.shape[0]
    found = np.asarray(rows.sum(axis=0)).ravel()
    most = _RARE * documents
    while True:
        kept = np.flatnonzero((found >= 2) & (found <= most))
        if most >= documents or np.median(np.asarray(rows[:, kept].sum(axis=1))) >= _ENOUGH:
            return kept
        most *= 2


def describe_groups(documents: Sequence[str], labels: Labels, groups: int) -> list[list[str]]:
    """For every group the words that tell it from the others, the best first.

    A word's score is the share of the group's documents that have it, times the logarithm of how much larger that is than
    the share of the other documents.
    """
    found: list[Counter[str]] = [Counter() for _ in range(groups)]
    for document, group in zip(documents, labels.tolist(), strict=True):
        found[group].update(set(words_of(document)))
    everywhere = sum(found, Counter())
    sizes = np.bincount(labels, minlength=groups).tolist()
    return [_most_telling(own, everywhere, size, len(documents)) for own, size in zip(found, sizes, strict=True)]


def _most_telling(own: Counter[str], everywhere: Counter[str], size: int, documents: int) -> list[str]:
    others = documents - size

    def score(word: str) -> float:
        share, elsewhere = own[word] / size, (everywhere[word] - own[word] + 0.5) / (others + 1)
        return share * math.log(share / elsewhere)

    return sorted(own, key=lambda word: (-score(word), word))[:_WORDS]


def name_of(number: int, words: Sequence[str]) -> str:
    """Such as 2-artery-fever-lesion: ASCII letters; the number alone where the words have none."""
    plain = (unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode() for word in words)
    letters = [found for word in plain if (found := re.sub("[^a-z]", "", word)[:_LETTERS])]
    return "-".join([str(number), *dict.fromkeys(letters[:_NAMED])])
