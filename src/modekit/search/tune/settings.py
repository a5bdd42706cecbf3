"""How much a search does."""

from __future__ import annotations

from dataclasses import dataclass

from modekit.text.amounts import SAMPLE_TOKENS


@dataclass(frozen=True)
class TuneSettings:
    """How much a search does: candidates, tokens per domain and split, and what may run at once."""

    trials: int = 48
    tokens_per_domain: int = SAMPLE_TOKENS
    sequence_length: int = 512
    seed: int = 0
    processes: int = 1
    ray: bool = False
