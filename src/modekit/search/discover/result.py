"""The result of `modekit discover`: groups of documents, and how their number was chosen. discover.json holds the same."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

MOST_DOMAINS = 64
"""In one call: a group is an open file, and a name that somebody reads."""
RESULT_FILE = "discover.json"


class DiscoverSettings(BaseModel, frozen=True):
    """How documents are grouped. `sample`: the largest number of documents to learn the groups from; the others are assigned to
    them afterwards.
    """

    domains: int | None = Field(None, ge=2, le=MOST_DOMAINS)
    most: int = Field(12, ge=2, le=MOST_DOMAINS)
    sample: int = Field(8_192, ge=2)
    seed: int = Field(0, ge=0)


class TextRead(BaseModel, frozen=True):
    """What was read: documents without duplicates, and a hash of their digests in the order of reading."""

    documents: int
    sha256: str


class TriedNumber(BaseModel, frozen=True):
    """A number of groups: log-likelihood of held-out documents (nats per word), and what it adds to the number before."""

    domains: int
    held_out: float
    gain: float | None


class Coverage(BaseModel, frozen=True):
    """What a mixture's router makes of a group. `served`: share of the documents on which an expert, and not the base, leads
    with certainty.
    """

    documents: int
    experts: dict[str, float]
    certainty: float
    served: float
    expert: str | None


class DocumentGroup(BaseModel, frozen=True):
    """Documents that belong together; `words` tell it from the others, the best first; `file` lies in OUT."""

    name: str
    file: str
    documents: int
    characters: int
    words: list[str]
    served: Coverage | None = None

    @property
    def unserved(self) -> float:
        """About how many of its documents have no expert; all of them without a mixture."""
        return self.documents * (1.0 - (self.served.served if self.served is not None else 0.0))


class Discovery(BaseModel, frozen=True):
    """Everything that was found. `next`: name of the group with the most documents that have no expert."""

    format: Literal[1] = 1
    settings: DiscoverSettings
    text: TextRead
    domains: int
    chosen: Literal["held-out likelihood", "given"]
    worth: float
    tried: list[TriedNumber]
    mixture: str | None = None
    groups: list[DocumentGroup]
    next: str | None = None
    notes: list[str] = []
