"""The function of every fit: it sets the gates of a checkpoint.

What needs torch is imported only where it runs: a fit that reads no text costs no more than the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pkgutil import resolve_name

import numpy as np

from modekit.planning.segments import segments_of
from modekit.processes import processes
from modekit.recipes.fits import Fit
from modekit.routing.fitting import FittedRouter, Fitting

_HASHED = 0.01  # logits of the first expert of a token; half of it the second's, and so on: those chosen weigh the same
_RANDOM_STD = 0.02  # the paper's noisy router: N(0, 0.02)


def fit_router(fitting: Fitting) -> FittedRouter:
    """Set the gates as the recipe's `mixture` asks for, from text found relative to `root` where the fit reads any.

    Statistics in the folder that were made from the same text and settings are used as they are; missing ones are made and
    written there. Under a launcher the processes share the text, and the main one solves: the others' gates are empty. Raises
    TextError.
    """
    fit = fitting.recipe.mixture.fit
    keeps = None if fit is None else fit.keeps
    if not processes().is_main and (keeps is None or not keeps.shared):
        return fitting.unfitted()
    fitted = _zero(fitting) if fit is None else _setter(fit)(fitting)
    if not fitting.checkpoint.shape.by_sigmoids:
        return fitted
    # The best of logits around 0 is at least 0: no expert is chosen whose sigmoid is next to nothing.
    return replace(fitted, gates=[gate - gate.mean(0, keepdims=True) for gate in fitted.gates])


def _setter(fit: Fit) -> Callable[[Fitting], FittedRouter]:
    """The function of a fit. Raises RecipeError where a library that it needs is not installed."""
    fit.check_library()
    found = SETTERS[fit.name]
    setter: Callable[[Fitting], FittedRouter] = resolve_name(found) if isinstance(found, str) else found
    return setter


def _zero(fitting: Fitting) -> FittedRouter:
    """For fixed weights: with top_k = E every expert of a native mixture weighs 1/E."""
    return fitting.unfitted([np.zeros(slot.shape, np.float32) for slot in fitting.checkpoint.slots])


def _random(fitting: Fitting) -> FittedRouter:
    """N(0, 0.02), by the temperature, from the seed."""
    settings = fitting.settings
    draw = np.random.Generator(np.random.PCG64(settings.seed)).standard_normal
    scale = np.float32(_RANDOM_STD / settings.temperature)
    gates = [draw(slot.shape, np.float32) * scale for slot in fitting.checkpoint.slots]
    count = segments_of(fitting.recipe).count
    return fitting.unfitted([gate[::count].repeat(count, 0) for gate in gates])  # one row for all parts of an FFN


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
    "classifier": "modekit.routing.classifier:classifier_gates",
    "arrow": "modekit.routing.linear:low_rank_gates",
}
"""By the name of the fit (recipes/fits.py): a function, or where it needs torch its place."""
