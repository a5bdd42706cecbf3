"""What was found: groups of documents, and how their number was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modekit.search.discover.choice import WORTH, Tried, gains
from modekit.search.discover.serves import Served
from modekit.search.discover.settings import DiscoverSettings

FORMAT = 1
RECORD = "discover.json"


@dataclass
class Group:
    """Documents that belong together.

    Attributes:
        name: a number and what it is about; also that of its file and, if you like, of a domain.
        words: that tell it from the others most.
        documents, characters: how many came to it.
        served: what the mixture makes of it, where there is one.
    """

    name: str
    words: Sequence[str]
    served: Served | None = None
    documents: int = 0
    characters: int = 0

    @property
    def file(self) -> str:
        """Where its documents lie in OUT."""
        return f"{self.name}.jsonl"

    @property
    def unserved(self) -> float:
        """About how many of its documents no expert is there for; all of them where there is no mixture."""
        return self.documents * (1.0 - (self.served.served if self.served is not None else 0.0))


@dataclass(frozen=True)
class Discovery:
    """Everything that was found; `tried` is empty where the number of domains was given, `mixture` None without one."""

    settings: DiscoverSettings
    groups: Sequence[Group]
    tried: Sequence[Tried]
    text: Mapping[str, Any]
    mixture: str | None = None
    notes: Sequence[str] = field(default=())

    @property
    def next(self) -> Group | None:
        """The group of which most documents have no expert; None without a mixture."""
        return None if self.mixture is None else max(self.groups, key=lambda group: group.unserved)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON: what discover.json says. Held-out likelihoods are in nats per word."""
        steps = gains(self.tried)
        return {
            "format": FORMAT,
            "settings": self.settings.as_data(),
            "text": dict(self.text),
            "domains": len(self.groups),
            "chosen": "held-out likelihood" if self.tried else "given",
            "worth": WORTH,
            "tried": [
                {"domains": each.domains, "held_out": round(each.held_out, 6), "gain": None if gain is None else round(gain, 6)}
                for each, gain in zip(self.tried, steps, strict=True)
            ],
            "mixture": self.mixture,
            "groups": [_group_data(group) for group in self.groups],
            "next": None if self.next is None else self.next.name,
            "notes": list(self.notes),
        }


def _group_data(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "file": group.file,
        "documents": group.documents,
        "characters": group.characters,
        "words": list(group.words),
        "served": None if group.served is None else group.served.as_data(),
    }
