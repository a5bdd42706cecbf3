"""Edits of recipes as plain data: what has no effect under an edit is left out, since a recipe that says it is refused. And
`fit: auto`: the router of a recipe that leaves it open, by its text, its settings and the form of the result, from a table of
what was measured (benchmarks/auto.md). Nothing is run to choose; a plan, a build and a card say why.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from modekit.recipes.fits import AUTO, Fit, row_of
from modekit.recipes.mixture import CHAT_DECAY, CHOICES, READ_BY, without_effect
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
        experts = [_omit(expert, "negative_prompts") for expert in experts]
    return {**recipe, "experts": experts, "mixture": dict(mixture)}


def changed_mixture(mixture: RecipePart, changes: RecipePart) -> RecipeData:
    """A mixture under `changes` (a nested `router` is merged). What only the old mixture needed is dropped in silence; what is
    asked for now stays, and is checked like any recipe.
    """
    method = changes.get("method", mixture.get("method", "routing"))
    kept = _omit(mixture, "router", *_dead_of_mixture(mixture, changes, method))
    changed = {**kept, **_omit(changes, "router")}
    asked = changes.get("router", {})
    router = _changed_router(mixture.get("router", {}), asked)
    if method == "linear":
        router = dict(asked)
    elif changed.get("modules") in ("all", "decoder") and not _row(router).is_open and not _row(router).for_model:
        router |= {key: value for key, value in _BEFORE_THE_FIRST_LAYER.items() if key not in asked}
    return {**changed, "router": router} if router else changed


def with_following(recipe: Recipe) -> Recipe:
    """The recipe, of a base with a chat template, with a decay that follows chats where a lexical router has none."""
    fit, router = recipe.mixture.fit, recipe.mixture.router
    if fit is None or not fit.carried or router.decay is not None or router.chat is False:
        return recipe
    mixture = recipe.mixture.model_copy(update={"router": router.model_copy(update={"decay": [CHAT_DECAY]})})
    return recipe.model_copy(update={"mixture": mixture})


def _changed_router(router: RecipePart, asked: RecipePart) -> RecipeData:
    """A router's settings under others, without those that its fit does not read; those that are `asked` for stay."""
    changed = {**({} if asked.get("fit") == AUTO else router), **asked}
    dead = {key for key, _ in without_effect(changed, _row(changed))}
    dead |= {"decay"} if _row(router).fading != _row(changed).fading else set()  # other averages
    return _omit(changed, *(dead - {*asked}))


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


def _omit(mapping: RecipePart, *keys: str) -> RecipeData:
    return {key: value for key, value in mapping.items() if key not in keys}


@dataclass(frozen=True)
class Way:
    """What a recipe says of a router, which it is and why; `native`: for such architectures alone, or for modekit's alone."""

    mixture: RecipeData
    why: str
    native: bool | None = None

    def of(self, recipe: Recipe) -> RecipeData:
        """The recipe in this way; its own settings stay."""
        said = as_written(recipe)
        given = said.get("mixture", {})
        settings = {key: value for key, value in given.get("router", {}).items() if key != "fit"}
        router = {**self.mixture.get("router", {}), **settings}
        mixture = {**self.mixture, **{key: value for key, value in given.items() if key != "router"}}
        return {**said, "mixture": {**mixture, **({"router": router} if router else {})}}


_WITH_TEXT = (
    Way({"router": {"fit": "lexical"}}, "lexical, which did best of what a plain checkpoint carries", native=True),
    Way({"router": {"fit": "lexical", "orders": [1, 2]}}, "lexical, which did best in the modekit architecture", native=False),
    Way({"router": {"fit": "logistic"}}, "logistic, which did best of linear gates"),
)
_WITH_PROMPTS = (
    Way({"router": {"fit": "logistic"}}, "logistic, which did best of what is set from prompts", native=True),
    Way({"router": {"fit": "logistic", "granularity": "context"}}, "logistic, which did best of what is set from prompts"),
    _WITH_TEXT[1],
)
_WITHOUT = (
    Way({"router": {"fit": "arrow", "granularity": "context"}}, "arrow, by the adapters alone, as no expert has text"),
    Way({"method": "linear"}, "none (fixed weights), as no expert has text"),
    Way({"router": {"fit": "random"}}, "random, as no expert has text"),
)


def choices(recipe: Recipe) -> list[tuple[Recipe, Way]]:
    """What a recipe with an open router may become, the best first. Raises pydantic's error where the recipe allows nothing."""
    found: list[tuple[Recipe, Way]] = []
    for way in _ways(recipe):
        with suppress(ValidationError):
            found.append((Recipe.model_validate(way.of(recipe)), way))
    settled = [each for each in found if not each[0].mixture.is_open]  # a method that the recipe says stays
    return settled or [(Recipe.model_validate(_WITH_TEXT[0].of(recipe)), _WITH_TEXT[0])]


def why_chosen(recipe: Recipe, *, native: bool) -> str:
    """Which router `fit: auto` takes, and why, of a recipe that says this one; empty where it says another."""
    said = as_written(recipe).get("mixture", {})
    ways = (way for way in _ways(recipe) if way.native in (None, native))
    return next((way.why for way in ways if way.of(recipe)["mixture"] == said), "")


def _ways(recipe: Recipe) -> tuple[Way, ...]:
    if any(expert.text for expert in recipe.experts):
        return _WITH_TEXT
    return _WITH_PROMPTS if any(expert.prompts for expert in recipe.experts) else _WITHOUT
