"""How much a search does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TuneSettings:
    """How much a search does: candidates, tokens per domain and split, and what may run at once."""

    trials: int = 48
    tokens_per_domain: int = 8_192
    sequence_length: int = 512
    seed: int = 0
    processes: int = 1
    ray: bool = False
