"""Peers of fusion-bench that take causal language models, with the settings it ships; scales are chosen on the select split.

A SMILE model gets its rotary frequencies in the driver: they are not set before its folder is opened anew, and a folder with
linear maps that no expert changed does not open.
WUDI leaves embeddings and head alone, as its authors do (linear maps of the layers), and tensors that no expert changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.choose import choose
from peers.environment import Package
from peers.legacy import legacy, legacy_all
from peers.peer import ALL_KINDS, Made, Peer, Pool

FUSION_BENCH = Package("fusion-bench", "0.2.33", "fusion_bench_driver.py", ("torchvision", "transformers==4.52.4"))
SCALES = (0.3, 0.6, 1.0, 1.5)
SMILE = {"device": "cpu", "accelerator": "cpu", "model_save_path": None, "model_dtype": None, "num_experts_per_tok": 1}
SMILE_RANKS = [
    {"rank_of_router": 8, "rank_of_expert": 64},  # as shipped
    {"rank_of_router": 8, "rank_of_expert": -1},  # the whole difference
    {"rank_of_router": 32, "rank_of_expert": -1},
]


@dataclass(frozen=True)
class Fusion:
    """One of its algorithms.

    Attributes:
        method: its key in the driver.
        settings: of the algorithm's constructor.
        variants: further settings, of which one is chosen.
        speaks: only fusion-bench opens the result.
    """

    name: str
    method: str
    paper: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[Mapping[str, float]] = ({},)
    speaks: bool = False
    kinds: frozenset[str] = ALL_KINDS

    @property
    def source(self) -> str:
        """Paper and package."""
        return f"{self.paper}, {FUSION_BENCH.source}"

    def prepare(self, environments: Path) -> None:
        """Install fusion-bench."""
        FUSION_BENCH.prepare(environments)

    def make(self, pool: Pool, out: Path) -> Made:
        """All variants in one call, the best of them on the select split."""
        folders = [out / f"made-{place}" for place in range(len(self.variants))]
        settings = [{**self.settings, **variant} for variant in self.variants]
        runs = [[self.method, each, str(folder)] for each, folder in zip(settings, folders, strict=True)]
        models = {"base": str(legacy(pool.base, out / "base")), "experts": legacy_all(pool.whole, out / "experts")}
        FUSION_BENCH.run(pool.environments, {"seed": pool.seed, **models, "runs": runs}, out)
        place, made = choose(pool, range(len(folders)), lambda place: self.opened(pool, folders[place]))
        shown = ", ".join(f"{name} {value:g}" for name, value in self.variants[place].items())
        note = f"{shown}, of {len(folders)} variants" if shown else ""
        return Made(made.model, note, made.total, made.active, engines=made.engines)

    def opened(self, pool: Pool, folder: Path) -> Made:
        """A folder, or a model in the package's process."""
        if not self.speaks:
            return Made(folder)
        total, active = json.loads((folder / "sizes.json").read_text())
        return Made(FUSION_BENCH.open(pool.environments, folder), "", total, active, engines="the package alone")


def scaled(name: str) -> list[Mapping[str, float]]:
    """Variants of a scale."""
    return [{name: scale} for scale in SCALES]


FUSION: list[Peer] = [
    Fusion("fusion-bench SMILE", "smile", "2408.10174", SMILE, SMILE_RANKS, speaks=True),
    Fusion("fusion-bench TSV", "tsv", "2412.00081", {}, scaled("alpha")),
    Fusion("fusion-bench WUDI", "wudi", "2503.08099", {"iter_num": 400}),
    Fusion("fusion-bench Iso-C", "iso-c", "2502.04959", {}, scaled("scaling_factor")),
    Fusion("fusion-bench Iso-CTS", "iso-cts", "2502.04959", {"common_space_fraction": 0.8}, scaled("scaling_factor")),
    Fusion(
        "fusion-bench Mixtral, gates random",
        "mixtral",
        "2212.05055",
        {"num_experts": 4, "experts_per_token": 2, "save_checkpoint": None},
    ),
]
