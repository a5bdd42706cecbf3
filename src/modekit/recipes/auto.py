"""`fit: auto`: the router of a recipe that leaves it open, by its text, its settings and the form of the result.

A table of what was measured (benchmarks/auto.md). Nothing is run to choose; a plan, a build and a card say why.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from modekit.recipes.edit import as_written
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipeData


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
