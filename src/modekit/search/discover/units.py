"""What is counted of a document: its words, or n-grams of its tokens, hashed. Each counts once, however often it stands there.

Shape legend: N documents, H hashed units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sklearn.feature_extraction.text import HashingVectorizer

from modekit.search.discover.words import READ, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Any
"""scipy.sparse.csr_matrix (N, H) of float32: 1 where a document has a unit."""
HASHED = 2**18


class Units:
    """Documents as rows of what they have."""

    def __init__(self, units_of: Callable[[str], list[str]]) -> None:
        self._vectorizer = HashingVectorizer(
            analyzer=units_of, n_features=HASHED, binary=True, alternate_sign=False, norm=None, dtype="float32"
        )

    def rows(self, documents: Sequence[str]) -> Rows:
        """(N, H)."""
        rows = self._vectorizer.transform(documents)
        rows.sort_indices()
        return rows


def word_units() -> Units:
    """Words."""
    return Units(words_of)


def token_units(tokenizer: PreTrainedTokenizerBase) -> Units:
    """Single tokens, and pairs of neighbours."""

    def units_of(text: str) -> list[str]:
        ids = tokenizer(text[:READ], add_special_tokens=False, verbose=False)["input_ids"]
        return [*map(str, ids), *(f"{left} {right}" for left, right in pairwise(ids))]

    return Units(units_of)
