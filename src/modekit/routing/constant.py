"""Gates that read no text: uniform and random. Needs no torch, so that building one costs no more than the copy.

Shape legend: L layers, D hidden, E experts.
"""

from __future__ import annotations

import numpy as np

from modekit.checkpoint import Gates
from modekit.recipe import Recipe

_RANDOM_STD = 0.02  # the paper's noisy router: N(0, 0.02)


def constant_gates(recipe: Recipe, layers: int, hidden: int) -> Gates:
    """Zero gates for linear (with top_k = E every expert weighs 1/E), N(0, 0.02) for a random router. (L, E, D) float32."""
    shape = (layers, len(recipe.experts), hidden)
    if recipe.mixture.method == "linear":
        return np.zeros(shape, np.float32)
    router = recipe.mixture.router
    gates: Gates = np.random.Generator(np.random.PCG64(router.seed)).standard_normal(shape, np.float32)
    gates *= np.float32(_RANDOM_STD / router.temperature)
    return gates
