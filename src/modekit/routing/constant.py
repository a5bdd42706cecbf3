"""Gates that read no text: uniform and random. Needs no torch, so that building one costs no more than the copy.

Shape legend: L layers, D width of what is read, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modekit.checkpoint.router_file import Gates
from modekit.planning.slot import RouterSlot
from modekit.recipes.recipe import Recipe

_RANDOM_STD = 0.02  # the paper's noisy router: N(0, 0.02)


def constant_gates(recipe: Recipe, slots: Sequence[RouterSlot]) -> Gates | None:
    """Zero gates for linear (with top_k = E every expert weighs 1/E), N(0, 0.02) for a random router; None for a fitted one."""
    if recipe.mixture.method == "linear":
        return [np.zeros(slot.shape, np.float32) for slot in slots]
    router = recipe.mixture.router
    if router.fit != "random":
        return None
    draw = np.random.Generator(np.random.PCG64(router.seed)).standard_normal
    scale = np.float32(_RANDOM_STD / router.temperature)
    return [draw(slot.shape, np.float32) * scale for slot in slots]
