"""Peers with a router before each linear map of the FFNs or one per layer, over whatever else is averaged (branch-train-mix).

mergoo and MixtureKit draw the routers at random; both then train them over frozen experts (mergoo's notebooks, `mixturekit
train`). STEPS steps on the fit split of all domains; only the packages' own classes open the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from peers.environment import Package
from peers.legacy import legacy_all
from peers.peer import ALL_KINDS, Made, Peer, Pool
from peers.pool import read_text
from peers.score import counts

LENGTH = 256
TRAIN = {"steps": 40, "rows": 16, "rate": 1e-2}
SHOWN = f"routers trained, {TRAIN['steps']} steps of {TRAIN['rows'] * LENGTH:,} tokens"
MERGOO = Package("mergoo", "0.0.10", "mergoo_driver.py", ("transformers==4.45.2", "peft==0.13.2", "numpy<2"))
MIXTUREKIT = Package("mixturekit", "1.1.1", "mixturekit_driver.py", ("accelerate",))


@dataclass(frozen=True)
class Btx:
    """Four experts, two per token.

    Attributes:
        job: what the driver reads besides.
        old: the package needs transformers 4.
    """

    name: str
    package: Package
    job: dict[str, Any]
    old: bool = False
    kinds: frozenset[str] = ALL_KINDS

    @property
    def source(self) -> str:
        """Paper and package."""
        return f"2403.07816, {self.package.source}"

    def prepare(self, environments: Path) -> None:
        """Install it."""
        self.package.prepare(environments)

    def make(self, pool: Pool, out: Path) -> Made:
        """Build, draw the routers and train them if that is asked."""
        experts = legacy_all(pool.whole, out / "experts") if self.old else [str(path) for path in pool.whole.values()]
        numpy.save(out / "blocks.npy", blocks_of(pool))
        job = {"experts": experts, "out": str(out / "model"), "blocks": str(out / "blocks.npy"), "seed": pool.seed, **self.job}
        self.package.run(pool.environments, job, out)
        total, active = counts(out / "model")
        speaker = self.package.open(pool.environments, out / "model")
        return Made(
            speaker, SHOWN if self.job["train"] else "routers drawn at random", total, active, engines="the package alone"
        )


def blocks_of(pool: Pool) -> numpy.ndarray[Any, numpy.dtype[numpy.int64]]:
    """Token ids (N, LENGTH), as many of each domain."""
    tokenizer, each = AutoTokenizer.from_pretrained(pool.base), []
    for path in pool.text.values():
        ids = [token for document in read_text(path) for token in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
        each.append(numpy.array(ids[: len(ids) // LENGTH * LENGTH], dtype=numpy.int64).reshape(-1, LENGTH))
    fewest = min(map(len, each))
    return numpy.concatenate([blocks[:fewest] for blocks in each])


BTX: list[Peer] = [
    Btx("mergoo, routers trained", MERGOO, {"train": TRAIN}, old=True),
    Btx("MixtureKit BTX, routers trained", MIXTUREKIT, {"method": "btx", "train": TRAIN}),
    Btx("MixtureKit traditional, routers trained", MIXTUREKIT, {"method": "traditional", "train": TRAIN}),
    Btx("mergoo, routers random", MERGOO, {"train": None}, old=True),
]
