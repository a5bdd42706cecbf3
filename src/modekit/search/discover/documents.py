"""Unlabelled documents, read twice: once for a bounded sample, once to be assigned to groups. Never all in memory.

Of every document 16 bytes of its digest are kept, to find duplicates.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import regex
from sklearn.feature_extraction.text import HashingVectorizer

from modekit.errors import TextError
from modekit.text.document import Document, text_of
from modekit.text.documents import stream_documents
from modekit.text.splits import digest_of

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

WHERE = "--text"
_KEPT_DIGITS = 32  # of a digest


@dataclass(frozen=True)
class DocumentSample:
    """What the first reading found. `sha256`: of all their digests in the order of reading."""

    beginnings: Sequence[str]
    documents: int
    sha256: str


class UnlabelledDocuments:
    """The documents of texts, as often as they are asked for."""

    def __init__(self, texts: Sequence[str], root: Path) -> None:
        self._texts, self._root = list(texts), root
        self.sha256 = ""
        """Of the digests that the last reading came upon, once it has ended."""

    def read(self) -> Iterator[tuple[str, Document]]:
        """Digest and document of each, duplicates once. Raises TextError where the text cannot be read."""
        seen: set[bytes] = set()
        together = hashlib.sha256()
        for document in stream_documents(self._texts, root=self._root, where=WHERE):
            digest = digest_of(document)
            key = bytes.fromhex(digest[:_KEPT_DIGITS])
            if key not in seen:
                seen.add(key)
                together.update(key)
                yield digest, document
        self.sha256 = together.hexdigest()

    def sample(self, most: int, seed: int) -> DocumentSample:
        """Read all and keep the beginnings of `most` documents that a hash chooses: the same ones in whatever order they come.
        Raises TextError where there is nothing, or a single document.
        """
        kept: list[tuple[int, str]] = []  # a heap: the largest hash, which is the first to go, stands in front
        count = 0
        for digest, document in self.read():
            count += 1
            rank = -int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest(), 16)
            if len(kept) < most:
                heapq.heappush(kept, (rank, text_of(document)[:READ]))
            elif rank > kept[0][0]:
                heapq.heapreplace(kept, (rank, text_of(document)[:READ]))
        if count < 2:
            raise TextError(
                "there is nothing to group" if count else "the text is empty",
                where=WHERE,
                found=f"{', '.join(self._texts)}: {count} document{'' if count == 1 else 's'}",
                expected="two documents or more",
                remedy="give more text: separate documents by blank lines, or write one record per document into a .jsonl",
            )
        return DocumentSample([beginning for _, beginning in sorted(kept, reverse=True)], count, self.sha256)

    def check_same(self, sample: DocumentSample) -> None:
        """Raise TextError when the reading that has just ended came upon other documents than the first."""
        if self.sha256 != sample.sha256:
            raise TextError(
                "the text changed while it was read",
                where=WHERE,
                found=", ".join(self._texts),
                remedy="run the command again when nothing writes there",
            )


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
