"""What was measured of each peer on one kind of experts: gaps, and the yardsticks of others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp

from modekit.demo.text import UNSEEN
from peers.row import Row

BASE, OWN, OURS = "base", "own expert (oracle)", "modekit, plain checkpoint"
OTHER = "best other expert (oracle)"


@dataclass(frozen=True)
class Measured:
    """One peer on one kind of experts, by seed; `base` and `own` are the rows of the same seeds."""

    rows: Sequence[Row]
    base: Sequence[Row]
    own: Sequence[Row]

    @property
    def first(self) -> Row:
        """Of the smallest seed."""
        return self.rows[0]

    def gaps(self) -> list[float]:
        """Gap closed by seed, mean over domains."""
        return [statistics.fmean(of.values()) for of in self.gaps_by_domain()]

    def gaps_by_domain(self) -> list[dict[str, float]]:
        """By seed."""
        return [
            {name: (base.losses[name] - row.losses[name]) / (base.losses[name] - own.losses[name]) for name in domains_of(row)}
            for row, base, own in zip(self.rows, self.base, self.own, strict=True)
        ]

    def gain(self) -> float:
        """Nats per token below the base."""
        pairs = zip(self.rows, self.base, strict=True)
        return statistics.fmean(base.losses[name] - row.losses[name] for row, base in pairs for name in domains_of(row))

    def share(self) -> float:
        """Perplexity of the own expert over that of this model: what DUME's paper calls retained."""
        pairs = zip(self.rows, self.own, strict=True)
        return statistics.fmean(exp(own.losses[name] - row.losses[name]) for row, own in pairs for name in domains_of(row))

    def normalised_accuracy(self) -> float:
        """Right guesses over those of the own expert, as fusion_bench has it for classes."""
        pairs = zip(self.rows, self.own, strict=True)
        return statistics.fmean(row.accuracy[name] / own.accuracy[name] for row, own in pairs for name in domains_of(row))

    def unseen(self) -> float:
        """Loss on unseen text over the base's."""
        pairs = zip(self.rows, self.base, strict=True)
        return statistics.fmean(row.losses[UNSEEN] / base.losses[UNSEEN] for row, base in pairs)

    def mean(self, of: str) -> float:
        """Over seeds."""
        return statistics.fmean(getattr(row, of) for row in self.rows)


def domains_of(row: Row) -> list[str]:
    """Texts that have an expert."""
    return [name for name in row.losses if name != UNSEEN]


def measured(rows: Iterable[Row], kind: str) -> dict[str, Measured]:
    """Peer -> what was measured of experts of a kind."""
    found = [row for row in rows if row.kind == kind and not row.failure]
    by_seed = {name: {row.seed: row for row in found if row.peer == name} for name in (BASE, OWN)}
    peers: dict[str, list[Row]] = {}
    for row in sorted(found, key=lambda row: row.seed):
        if all(row.seed in of for of in by_seed.values()):
            peers.setdefault(row.peer, []).append(row)
    return {
        name: Measured(of, *([by_seed[which][row.seed] for row in of] for which in (BASE, OWN))) for name, of in peers.items()
    }


def over_ours(peers: Mapping[str, Measured], name: str) -> float | None:
    """Gap closed above our plain checkpoint's, mean over the seeds that both have."""
    if OURS not in peers:
        return None
    ours = dict(zip((row.seed for row in peers[OURS].rows), peers[OURS].gaps(), strict=True))
    pairs = [(gap, ours.get(row.seed)) for row, gap in zip(peers[name].rows, peers[name].gaps(), strict=True)]
    differences = [gap - mine for gap, mine in pairs if mine is not None]
    return statistics.fmean(differences) if differences else None
