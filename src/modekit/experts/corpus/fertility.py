"""How many tokens a tokenizer makes of each domain's text, beside another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fertility:
    """Of one domain, on held-out documents.

    Attributes:
        documents, text_bytes, words: how much was read; a word is what stands between white space.
        tokens: that the new tokenizer makes of it.
        against: that the other one makes of it; None without another.
    """

    name: str
    documents: int = 0
    text_bytes: int = 0
    words: int = 0
    tokens: int = 0
    against: int | None = None

    @property
    def per_1000_bytes(self) -> float:
        """Tokens of the new tokenizer."""
        return 1000 * self.tokens / max(1, self.text_bytes)

    @property
    def per_word(self) -> float:
        """Tokens of the new tokenizer."""
        return self.tokens / max(1, self.words)

    @property
    def against_per_1000_bytes(self) -> float | None:
        """Tokens of the other one."""
        return None if self.against is None else 1000 * self.against / max(1, self.text_bytes)

    @property
    def change(self) -> float | None:
        """(new - other) / other: below zero the new one makes fewer tokens."""
        return None if not self.against else self.tokens / self.against - 1

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        other = self.against_per_1000_bytes
        return {
            "name": self.name,
            "documents": self.documents,
            "bytes": self.text_bytes,
            "words": self.words,
            "tokens": self.tokens,
            "per_1000_bytes": round(self.per_1000_bytes, 4),
            "per_word": round(self.per_word, 4),
            "against_tokens": self.against,
            "against_per_1000_bytes": None if other is None else round(other, 4),
            "change": None if self.change is None else round(self.change, 6),
        }


@dataclass(frozen=True)
class Trained:
    """A tokenizer that was made: its size, what it was trained on, and its fertility per domain."""

    vocabulary: int
    asked: int
    against: str | None
    domains: Sequence[Fertility]
    trained_bytes: int = 0
    notes: Sequence[str] = field(default=())

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON: what fertility.json says."""
        return {
            "format": 1,
            "vocabulary": self.vocabulary,
            "asked": self.asked,
            "against": self.against,
            "bytes_per_domain": self.trained_bytes,
            "domains": [each.as_data() for each in self.domains],
            "notes": list(self.notes),
        }
