"""Set a checkpoint's gates by the function that the fit's row names (recipes/fits.py).

Needs no torch itself: a fit that reads no text costs no more than the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from modekit.checkpoint.record import RouterRecord
from modekit.processes import processes
from modekit.routing.constant import zero_gates
from modekit.routing.fitting import FittedRouter, Fitting


def fit_router(fitting: Fitting) -> FittedRouter:
    """Set the gates as the recipe's `mixture` asks for, from text found relative to `root` where the fit reads any.

    Statistics in the folder that were made from the same text and settings are used as they are; missing ones are made and
    written there. Under a launcher the processes share the text, and the main one solves: the others' gates are empty. Raises
    TextError.
    """
    recipe = fitting.recipe
    fit = recipe.mixture.fit
    if not processes().is_main and (fit is None or fit.keeps is None or not fit.keeps.shared):
        return FittedRouter([], RouterRecord.unfitted(recipe))
    if fit is None:
        return zero_gates(fitting)
    set_gates: Callable[[Fitting], FittedRouter] = resolve_name(fit.function)
    return set_gates(fitting)
