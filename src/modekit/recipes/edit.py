"""Edits of recipes as plain data: what has no effect under an edit is left out, since a recipe that says it is refused."""

from __future__ import annotations

from pathlib import Path

import yaml

from modekit.recipes.fits import AUTO, Fit, row_of
from modekit.recipes.mixture import CHOICES, READ_BY, Router, without_effect
from modekit.recipes.paths import from_folder
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipeData, RecipePart

RECIPE_FILE = "recipe.yaml"
"""Beside a mixture that `modekit mix` made: its recipe."""
_BEFORE_THE_FIRST_LAYER = {"granularity": "sequence", "per": "model"}
"""What a router that reads text as it runs needs where whole models are mixed."""


def as_written(recipe: Recipe) -> RecipeData:
    """The recipe as plain data, with what was set and nothing else."""
    return recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)


def as_file(recipe: Recipe, root: Path, folder: Path) -> bytes:
    """A recipe whose paths are relative to `root`, as a file that lies in a folder."""
    said = from_folder(as_written(recipe), root, folder)
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120).encode()


def with_mixture(recipe: RecipePart, mixture: RecipePart) -> RecipeData:
    """The recipe under another mixture, without negative prompts where the new one does not read them."""
    experts = recipe["experts"]
    if "negative_prompts" not in _row(mixture.get("router", {})).settings:
        experts = [omit(expert, "negative_prompts") for expert in experts]
    return {**recipe, "experts": experts, "mixture": dict(mixture)}


def changes_of(said: RecipePart) -> RecipeData:
    """Changes of a mixture, by settings of it or of its router."""
    router = {key: value for key, value in said.items() if key in Router.model_fields}
    return {**omit(said, *router), **({"router": router} if router else {})}


def changed_mixture(mixture: RecipePart, changes: RecipePart) -> RecipeData:
    """A mixture under `changes` (a nested `router` is merged). What only the old mixture needed is dropped in silence; what is
    asked for now stays, and is checked like any recipe.
    """
    method = changes.get("method", mixture.get("method", "routing"))
    kept = omit(mixture, "router", *_dead_of_mixture(mixture, changes, method))
    changed = {**kept, **omit(changes, "router")}
    asked = changes.get("router", {})
    router = _changed_router(mixture.get("router", {}), asked)
    if method == "linear":
        router = dict(asked)
    elif changed.get("modules") in ("all", "decoder") and not _row(router).is_open and not _row(router).reads_ids:
        router |= {key: value for key, value in _BEFORE_THE_FIRST_LAYER.items() if key not in asked}
    return {**changed, "router": router} if router else changed


def _changed_router(router: RecipePart, asked: RecipePart) -> RecipeData:
    """A router's settings under others, without those that its fit does not read; those that are `asked` for stay."""
    changed = {**({} if asked.get("fit") == AUTO else router), **asked}
    dead = {key for key, _ in without_effect(changed, _row(changed))}
    dead |= {"decay"} if _row(router).fading != _row(changed).fading else set()  # other averages
    return omit(changed, *(dead - {*asked}))


def _dead_of_mixture(mixture: RecipePart, changes: RecipePart, method: str) -> set[str]:
    """Keys of the old mixture without an effect under the new method and choice of experts."""
    dead = {key for key, methods in READ_BY.items() if key != "router" and method not in methods}
    dead |= {*CHOICES} if any(changes.get(key) is not None for key in CHOICES) else set()
    always_on = mixture.get("always_on") or {}
    if method == "gating" and always_on.get("weight") is None:
        dead.add("always_on")
    return dead


def _row(router: RecipePart) -> Fit:
    """The row of a router's fit; an open one when it names none, or none that there is, which the check will say."""
    fit = router.get("fit", AUTO)
    return row_of(fit if isinstance(fit, str) else AUTO)


def omit(mapping: RecipePart, *keys: str) -> RecipeData:
    """A part of a recipe without some of its keys."""
    return {key: value for key, value in mapping.items() if key not in keys}
