"""What a fit is given, what it gives, and the function of every fit: it sets the gates of a checkpoint.

What needs torch is imported only where it runs: a fit that reads no text costs no more than the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RouterRecord
from modekit.checkpoint.router_file import Gates
from modekit.recipes.mixture import Router
from modekit.recipes.recipe import Recipe
from modekit.run import QUIET, Run

_HASHED = 0.01  # logits of the first expert of a token; half of it the second's, and so on: those chosen weigh the same
_RANDOM_STD = 0.02  # the paper's noisy router: N(0, 0.02)
TextProvenance = Mapping[str, Any]
"""What is remembered of a text (text/splits.py)."""


@dataclass(frozen=True)
class Fitting:
    """A checkpoint whose gates are to be set, and the text they may be set from.

    Attributes:
        checkpoint: under the new routing: its slots are the routers that need a gate.
        recipe: what it is to be afterwards.
        root: folder that the recipe's paths are relative to.
        folder: of kept statistics.
        run: what was handed down.
        stays: experts of a mixture that is changed: what is kept of them counts, whatever their text says now.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    root: Path
    folder: Path
    run: Run = QUIET
    stays: Collection[str] = ()

    @property
    def settings(self) -> Router:
        """Of the router."""
        return self.recipe.mixture.router

    def statistics_file(self, expert: str) -> Path:
        """Where the statistics of an expert's domain are kept."""
        return self.folder / f"{expert}.safetensors"

    def fitted(self, gates: Gates, text: Sequence[TextProvenance], report: Mapping[str, object]) -> FittedRouter:
        """Gates that were set from text; `text`: what the record remembers of each expert's, in their order."""
        of_experts = dict(zip(self.recipe.names, text, strict=True)) if text else {}
        record = RouterRecord(status="fitted", settings=self.settings, sha256="", text=of_experts, report=dict(report))
        return FittedRouter(gates, record)

    def unfitted(self, gates: Gates) -> FittedRouter:
        """Gates that the recipe alone gives."""
        return FittedRouter(gates, RouterRecord.unfitted(self.recipe))


@dataclass(frozen=True)
class FittedRouter:
    """The gate of every router slot, the record for modekit.json, and, where the checkpoint's embedding carries it, the
    evidence that the gates read (checkpoint/evidence.py).
    """

    gates: Gates
    record: RouterRecord
    evidence: memoryview | None = None


def fit_router(fitting: Fitting) -> FittedRouter:
    """Set the gates as the recipe's `mixture` asks for, from text found relative to `root` where the fit reads any.

    Statistics in the folder that were made from the same text and settings are used as they are; missing ones are made and
    written there. Raises TextError.
    """
    fit = fitting.recipe.mixture.fit
    if fit is None:  # fixed weights: with top_k = E every expert of a native mixture weighs 1/E
        return fitting.unfitted([np.zeros(slot.shape, np.float32) for slot in fitting.checkpoint.slots])
    found = SETTERS[fit.name]
    setter: Callable[[Fitting], FittedRouter] = resolve_name(found) if isinstance(found, str) else found
    return setter(fitting)


def _random(fitting: Fitting) -> FittedRouter:
    """N(0, 0.02), by the temperature, from the seed."""
    settings = fitting.settings
    draw = np.random.Generator(np.random.PCG64(settings.seed)).standard_normal
    scale = np.float32(_RANDOM_STD / settings.temperature)
    gates = [draw(slot.shape, np.float32) * scale for slot in fitting.checkpoint.slots]
    return fitting.unfitted(gates)


def _hash(fitting: Fitting) -> FittedRouter:
    """Hash Layers (arXiv:2106.04426): every token id has its order of the experts, by hashes of both (SplitMix64)."""
    (slot,) = fitting.checkpoint.slots
    experts, tokens = len(slot.rows), slot.width
    with np.errstate(over="ignore"):
        x_EV = np.arange(experts * tokens, dtype=np.uint64).reshape(experts, tokens) + np.uint64(1)
        x_EV = (x_EV + np.uint64(fitting.settings.seed) * np.uint64(2**32)) * np.uint64(0x9E3779B97F4A7C15)
        x_EV = (x_EV ^ (x_EV >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_EV = (x_EV ^ (x_EV >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ranks_EV = x_EV.argsort(0).argsort(0).astype(np.float32)  # 0 is a token's first expert
    return fitting.unfitted([np.float32(_HASHED) * np.exp2(-ranks_EV)])


SETTERS: dict[str, Callable[[Fitting], FittedRouter] | str] = {
    "random": _random,
    "hash": _hash,
    **dict.fromkeys(("centroid", "logistic", "cosine", "attention"), "modekit.routing.linear:solve_gates"),
    "lexical": "modekit.routing.lexical:lexical_gates",
    "arrow": "modekit.routing.linear:low_rank_gates",
}
"""By the name of the fit (recipes/fits.py): a function, or where it needs torch its place."""
