"""What every row of the scoreboard is made from and gives: `Pool`, `Peer`, `Made`.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch


class Unsuitable(Exception):  # noqa: N818  an answer, no fault
    """A peer cannot take this pool, or does not run here. The table shows the reason."""


@dataclass(frozen=True)
class Pool:
    """Fine-tunes of one base and their text.

    Attributes:
        kind: what was trained: ffn, adapters or full; of a pool that is hard to route `adapters-twice` and so on.
        seed: of base and experts.
        base: a folder that opens in transformers.
        experts: name -> a whole model or a PEFT adapter.
        whole: name -> a whole model, adapters merged in, for peers that read no adapters.
        text: name -> JSON Lines {"text": ...}: the fit split, all that a peer may read.
        select: name -> the same of the select split, for the choice of one knob (choose.py) and nothing else.
        environments: a folder for environments of packages, kept between rows.
    """

    kind: str
    seed: int
    base: Path
    experts: Mapping[str, Path]
    whole: Mapping[str, Path]
    text: Mapping[str, Path]
    select: Mapping[str, Path]
    environments: Path

    @property
    def trained(self) -> str:
        """ffn, adapters or full."""
        return self.kind.partition("-")[0]


class Speaker(Protocol):
    """A model that is no single checkpoint. Reads one document, without pads: B = 1."""

    def logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Scores (B, S, V) of the next token at every place; at a place nothing behind it may be read."""
        ...


@dataclass(frozen=True)
class Made:
    """What a peer made of a pool.

    Attributes:
        model: a folder that AutoModelForCausalLM opens (no remote code), or a speaker; of an oracle a folder per text (the
            base reads unseen text).
        note: the knob that was chosen and among which values; what differs from the paper.
        total: parameters that are kept; 0: counted in the folder.
        active: parameters that a token passes; 0: counted in the folder (`experts` by top_k, everything else whole).
        nbytes: of what is kept; 0: two bytes per parameter.
        engines: where it runs; empty: by the architecture's name.
        load: largest share of an expert, mean over tokens of all domains and routers; 0: not looked at.
    """

    model: Path | Speaker | Mapping[str, Path]
    note: str = ""
    total: int = 0
    active: int = 0
    nbytes: int = 0
    engines: str = ""
    load: float = 0.0


class Peer(Protocol):
    """A way to put fine-tunes together.

    Attributes:
        name: as it stands in the table.
        source: paper (arXiv number), and the package with its version, or "formula".
        kinds: of experts that it takes.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def kinds(self) -> frozenset[str]: ...

    def prepare(self, environments: Path) -> None:
        """Make the environment of its package, if it has one and it is not there; not timed. Raises Unsuitable."""
        ...

    def make(self, pool: Pool, out: Path) -> Made:
        """Write below `out`, an empty folder; timed. Raises Unsuitable with the reason."""
        ...


ALL_KINDS = frozenset({"ffn", "adapters", "full"})


@dataclass(frozen=True)
class Formula:
    """A peer that runs in this process."""

    name: str
    function: Callable[[Pool, Path], Made]
    source: str
    kinds: frozenset[str] = ALL_KINDS

    def prepare(self, environments: Path) -> None:
        """There is nothing to prepare."""

    def make(self, pool: Pool, out: Path) -> Made:
        """Call the function."""
        return self.function(pool, out)
