"""The variants of a recipe's mixture: its own, the fixed ones, and what one or two axes give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from modekit.errors import TuneError
from modekit.recipes.edit import as_written, changed_mixture, with_mixture
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.router import Router
from modekit.recipes.strict import RecipePart

OWN = "the recipe's own"
_FIXED: dict[str, dict[str, Any]] = {
    "lexical": {"method": "routing", "router": {"fit": "lexical"}},
    "logistic, context": {"method": "routing", "router": {"fit": "logistic", "granularity": "context"}},
    "logistic": {"method": "routing", "router": {"fit": "logistic", "granularity": "token"}},
    "centroid": {"method": "routing", "router": {"fit": "centroid", "granularity": "token"}},
    "arrow": {"method": "routing", "router": {"fit": "arrow", "granularity": "token"}},
    "linear (no gate)": {"method": "linear"},
    "noisy": {"method": "routing", "router": {"fit": "random"}},
}
"""Name -> changes of the recipe's mixture."""
_FROM_ROUTER = {*Router.model_fields}

Axes = Mapping[str, Sequence[object]]
"""Key of `mixture` or of `mixture.router` -> the values to try."""


def variants_of(recipe: Recipe, axes: Axes) -> dict[str, RecipePart]:
    """Name -> mixture: the recipe's own first, then the fixed ones, or with axes every combination of their values.

    Raises TuneError for an axis without values.
    """
    own = as_written(recipe).get("mixture", {})
    if bare := [key for key, values in axes.items() if not values]:
        raise TuneError("there is no value to try", where=f"{bare[0]}=", remedy="type for example top_k=1,2")
    if axes:
        found = {}
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            router = {key: value for key, value in chosen.items() if key in _FROM_ROUTER}
            changes = {key: value for key, value in chosen.items() if key not in router}
            name = ", ".join(f"{key} {value}" for key, value in chosen.items())
            found[name] = changed_mixture(own, {**changes, **({"router": router} if router else {})})
    else:
        found = {name: changed_mixture(own, changes) for name, changes in _FIXED.items()}
    return {OWN: own, **{name: mixture for name, mixture in found.items() if mixture != own}}


def recipe_of(recipe: Recipe, mixture: RecipePart) -> Recipe:
    """The recipe with another mixture. Raises RecipeError."""
    return parse_recipe(with_mixture(as_written(recipe), mixture), where="variant")
