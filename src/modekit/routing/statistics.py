"""What a fit keeps of a domain: a sum of the router's inputs, and a sample of them.

One file per domain, so that a domain can be added or removed later without the others' text, and so that an
interrupted fit goes on with the next domain.

Shape legend: D width of what a gate takes (its parts side by side), N kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field

from modekit.files.typed import Count, as_kind
from modekit.routing.kept import Get, Header, Provenance, checked, load_kept, save_kept


@dataclass(frozen=True)
class SlotStatistics:
    """Of one router, x = what its gate took while the domain's own expert was active.

    Attributes:
        sum_D: sum of x, float64.
        negative_D: mean x of the negative prompts, float64; zero when there are none.
        sample_ND: evenly spaced x, float16.
    """

    sum_D: torch.Tensor
    negative_D: torch.Tensor
    sample_ND: torch.Tensor


@dataclass(frozen=True)
class DomainStatistics:
    """Of one domain, for every router.

    Attributes:
        tokens: how many x were seen, of pairs on both sides; pads never count.
        slots: statistics in the order of the checkpoint's routers.
        source: what they were made from: settings and a digest of the text.
        counts: of pairs, how many x each router saw, which reads one side; empty where all saw all.
    """

    tokens: int
    slots: tuple[SlotStatistics, ...]
    source: Provenance
    counts: tuple[int, ...] = ()

    def is_of(self, widths: Sequence[int]) -> bool:
        """Whether they are of gates that take so much, one after the other."""
        return [len(slot.sum_D) for slot in self.slots] == list(widths)

    def mean_D(self, slot: int) -> torch.Tensor:
        """Mean of x, float64."""
        return self.slots[slot].sum_D / self.count(slot)

    def count(self, slot: int) -> int:
        """How many x a router saw."""
        return self.counts[slot] if self.counts else self.tokens

    def save(self, path: Path) -> None:
        """Write atomically."""
        tensors = {}
        for number, slot in enumerate(self.slots):
            tensors[f"{number}.sum"] = slot.sum_D
            tensors[f"{number}.negative"] = slot.negative_D
            tensors[f"{number}.sample"] = slot.sample_ND
        counts = {"counts": self.counts} if self.counts else {}
        save_kept(path, tensors, {"tokens": self.tokens, "slots": len(self.slots), "source": self.source, **counts})


def load_statistics(path: Path) -> DomainStatistics | None:
    """Read a domain's statistics; None when there are none, or only tokens. Raises CheckpointError when damaged."""
    return load_kept(path, _statistics)


def _statistics(get: Get, about: Header) -> DomainStatistics | None:
    if "slots" not in about:  # of a router that reads tokens
        return None
    said = as_kind(about, _SumsHeader)
    if said.counts and len(said.counts) != said.slots:
        raise ValueError("counts of other routers")
    slots = []
    for number in range(said.slots):
        sum_D = checked(get(f"{number}.sum"), (None,))
        width = len(sum_D)
        negative_D = checked(get(f"{number}.negative"), (width,))
        slots.append(SlotStatistics(sum_D, negative_D, checked(get(f"{number}.sample"), (None, width))))
    return DomainStatistics(said.tokens, tuple(slots), said.source, said.counts)


class _SumsHeader(BaseModel):
    tokens: Annotated[Count, Field(ge=1)]
    slots: Count
    source: Provenance
    counts: tuple[Annotated[Count, Field(ge=1)], ...] = ()
