"""Libraries that a fit needs and a plain installation of modekit does not have."""

from __future__ import annotations

from importlib.util import find_spec

from modekit.errors import RecipeError
from modekit.recipes.fits import Fit


def check_library(fit: Fit) -> None:
    """Raise RecipeError where what the fit needs is not installed. Imports nothing."""
    if fit.library and find_spec(fit.library) is None:
        raise RecipeError(
            f"fit: {fit.name} is fitted by a library that is not installed",
            where="mixture.router.fit",
            found=f"no {fit.library}",
            remedy="pip install 'modekit[classifier]', or choose fit: lexical",
        )
