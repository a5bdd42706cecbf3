"""Gates that read no text: uniform and random. Needs no torch, so that building one costs no more than the copy."""

from __future__ import annotations

import numpy as np

from modekit.checkpoint.record import RouterRecord
from modekit.routing.fitting import FittedRouter, Fitting

_RANDOM_STD = 0.02  # the paper's noisy router: N(0, 0.02)


def zero_gates(fitting: Fitting) -> FittedRouter:
    """For fixed weights: with top_k = E every expert of a native mixture weighs 1/E."""
    gates = [np.zeros(slot.shape, np.float32) for slot in fitting.checkpoint.slots]
    return FittedRouter(gates, RouterRecord.unfitted(fitting.recipe))


def random_gates(fitting: Fitting) -> FittedRouter:
    """N(0, 0.02), by the temperature, from the seed."""
    settings = fitting.settings
    draw = np.random.Generator(np.random.PCG64(settings.seed)).standard_normal
    scale = np.float32(_RANDOM_STD / settings.temperature)
    gates = [draw(slot.shape, np.float32) * scale for slot in fitting.checkpoint.slots]
    return FittedRouter(gates, RouterRecord.unfitted(fitting.recipe))
