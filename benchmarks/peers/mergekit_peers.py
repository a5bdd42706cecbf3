"""Peers that mergekit makes: merges of whole models, and Mixtral mixtures whose gates are hidden states of prompts.

Settings are mergekit's defaults and those of its documentation. The scale (lambda) of a merge, and of a mixture the backbone
and whether the other domains' prompts are negative ones, are chosen on the select split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from peers.choose import choose
from peers.environment import Package
from peers.peer import ALL_KINDS, Made, Peer, Pool
from peers.pool import read_text

MERGEKIT = Package("mergekit", "0.1.5", "mergekit_driver.py")
PROMPTS, CHARACTERS = 64, 300
"""Per expert: beginnings of documents of its fit split."""
SUMS, MEANS = (0.1, 0.2, 0.3, 0.5, 1.0), (0.3, 0.5, 0.7, 1.0, 1.5)
"""Scales for merges that add all differences, and for those that take a mean of them."""
HALF = {"density": 0.5}


@dataclass(frozen=True)
class Merge:
    """One merge method of mergekit.

    Attributes:
        paper: its arXiv number, or where it is described.
        each: parameters of every model.
        scales: of the merged difference; empty: the method has none.
        based: whether it reads the base.
    """

    name: str
    method: str
    paper: str
    each: Mapping[str, float] = field(default_factory=dict)
    scales: Sequence[float] = ()
    based: bool = True
    kinds: frozenset[str] = ALL_KINDS

    @property
    def source(self) -> str:
        """Paper and package."""
        return f"{self.paper}, {MERGEKIT.source}"

    def prepare(self, environments: Path) -> None:
        """Install mergekit."""
        MERGEKIT.prepare(environments)

    def configuration(self, base: Path, models: Sequence[Path], scale: float | None = None) -> dict[str, Any]:
        """What mergekit reads."""
        each = {"weight": 1.0, **self.each}
        return {
            "merge_method": self.method,
            "models": [{"model": str(model), "parameters": each} for model in models],
            **({"base_model": str(base)} if self.based else {}),
            **({} if scale is None else {"parameters": {"lambda": scale}}),
            "dtype": "float32",
        }

    def make(self, pool: Pool, out: Path) -> Made:
        """All scales in one call, the best of them on the select split."""
        folders = {scale: out / f"scale-{scale}" for scale in self.scales or (None,)}
        models = list(pool.whole.values())
        merges = [[self.configuration(pool.base, models, scale), str(folder)] for scale, folder in folders.items()]
        MERGEKIT.run(pool.environments, {"seed": pool.seed, "merges": merges}, out)
        scale, made = choose(pool, list(folders), lambda scale: Made(folders[scale]))
        note = "" if scale is None else f"lambda {scale:g} of {', '.join(f'{each:g}' for each in self.scales)}"
        return Made(made.model, note)


@dataclass(frozen=True)
class Slerp:
    """Spherical interpolation halfway, pairs of pairs: mergekit's SLERP takes two models."""

    name: str = "mergekit SLERP, pairwise"
    source: str = f"Shoemake 1985, {MERGEKIT.source}"
    kinds: frozenset[str] = ALL_KINDS

    def prepare(self, environments: Path) -> None:
        """Install mergekit."""
        MERGEKIT.prepare(environments)

    def make(self, pool: Pool, out: Path) -> Made:
        """A tree of merges in one call."""
        merges, level = list[list[Any]](), list(pool.whole.values())
        while len(level) > 1:
            above = [out / f"merge-{len(merges) + place}" for place in range(len(level) // 2)]
            merges += [[halfway(*pair), str(to)] for pair, to in zip(pairs_of(level), above, strict=True)]
            level = [*above, *level[2 * len(above) :]]
        MERGEKIT.run(pool.environments, {"seed": pool.seed, "merges": merges}, out)
        return Made(level[0])


def pairs_of(level: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Neighbours; an odd last one is left out."""
    return list(zip(level[::2], level[1::2], strict=False))


def halfway(one: Path, other: Path) -> dict[str, Any]:
    """What mergekit reads."""
    both = {"base_model": str(one), "models": [{"model": str(one)}, {"model": str(other)}]}
    return {"merge_method": "slerp", **both, "parameters": {"t": 0.5}, "dtype": "float32"}


@dataclass(frozen=True)
class Mixture:
    """mergekit-moe with two experts per token, its default."""

    name: str
    modes: tuple[str, ...]
    reads: bool = True
    negative: tuple[bool, ...] = (False, True)
    kinds: frozenset[str] = ALL_KINDS
    source: str = MERGEKIT.source

    def prepare(self, environments: Path) -> None:
        """Install mergekit."""
        MERGEKIT.prepare(environments)

    def make(self, pool: Pool, out: Path) -> Made:
        """All variants in one call, the best of them on the select split."""
        backbones, merges = {"base": pool.base}, list[list[Any]]()
        if pool.kind != "ffn":  # experts' attention differs
            backbones["average"] = out / "average"
            average = Merge("", "linear", "", based=False).configuration(pool.base, list(pool.whole.values()))
            merges.append([average, str(out / "average")])
        variants = list(product(self.modes, backbones, self.negative if self.reads else (False,)))
        folders = {variant: out / "-".join(map(str, variant)) for variant in variants}
        moe = [
            [self.configuration(pool, backbones[where], mode, negative), str(folders[mode, where, negative])]
            for mode, where, negative in variants
        ]
        MERGEKIT.run(pool.environments, {"seed": pool.seed, "merges": merges, "moe": moe}, out)
        (mode, where, negative), made = choose(pool, variants, lambda variant: Made(folders[variant]))
        prompts = f", {'with' if negative else 'without'} negative prompts" if self.reads else ""
        return Made(made.model, f"{mode} on {where}{prompts}, of {len(variants)} variants")

    def configuration(self, pool: Pool, backbone: Path, mode: str, negative: bool) -> dict[str, Any]:
        """What mergekit-moe reads."""
        prompts = {name: [each[:CHARACTERS] for each in read_text(path)[:PROMPTS]] for name, path in pool.text.items()}
        experts = []
        for name, model in pool.whole.items():
            others = [prompt for other, every in prompts.items() if other != name for prompt in every]
            said = {"positive_prompts": prompts[name], **({"negative_prompts": others} if negative else {})}
            experts.append({"source_model": str(model), **(said if self.reads else {})})
        return {"base_model": str(backbone), "gate_mode": mode, "dtype": "float32", "experts_per_token": 2, "experts": experts}


MERGES: list[Peer] = [
    Merge("mergekit linear", "linear", "2203.05482", based=False),
    Merge("mergekit task arithmetic", "task_arithmetic", "2212.04089", scales=SUMS),
    Merge("mergekit TIES, density 0.2", "ties", "2306.01708", {"density": 0.2}, MEANS),
    Merge("mergekit DARE-TIES, density 0.5", "dare_ties", "2311.03099", HALF, SUMS),
    Merge("mergekit DARE linear, density 0.5", "dare_linear", "2311.03099", HALF, SUMS),
    Merge("mergekit DELLA, density 0.5", "della", "2406.11617", HALF, MEANS),
    Merge("mergekit breadcrumbs, density 0.9", "breadcrumbs", "2312.06795", {"density": 0.9}, SUMS),
    Merge("mergekit multi-SLERP", "multislerp", "mergekit's", based=False),
    Merge("mergekit model stock", "model_stock", "2403.19522"),
    Slerp(),
]
MIXTURES: list[Peer] = [
    Mixture("mergekit-moe hidden", ("hidden", "hidden_avg")),
    Mixture("mergekit-moe cheap_embed", ("cheap_embed",)),
    Mixture("mergekit-moe random", ("random",), reads=False),
]
