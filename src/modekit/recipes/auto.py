"""`fit: auto`: the router of a recipe that leaves it open, by its text, its settings and the form of the result.

A table of what was measured (benchmarks/auto.md). Nothing is run to choose; a plan, a build and a card say why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from modekit.recipes.edit import as_written
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipeData


@dataclass(frozen=True)
class Way:
    """A router that may be chosen.

    Attributes:
        mixture: what a recipe says of it.
        why: it is chosen.
        native: whether for native architectures alone, or for modekit's own alone; None: for both.
    """

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

    def is_of(self, recipe: Recipe, *, native: bool) -> bool:
        """Whether a recipe, and the form of its result, are as this way says."""
        mixture = recipe.mixture
        method, router = self.mixture.get("method"), self.mixture.get("router", {})
        same = all(getattr(mixture.router, key) == value for key, value in {"orders": None, **router}.items())
        if mixture.method == "linear":
            return method == "linear" and mixture.weights is None
        return method is None and same and self.native in (None, native)


_WITH_TEXT = (
    Way({"router": {"fit": "lexical"}}, "of what a plain checkpoint carries it closes most of the gap", native=True),
    Way(
        {"router": {"fit": "lexical", "orders": [1, 2]}},
        "of what the modekit architecture has, tokens and pairs of them close most of the gap",
        native=False,
    ),
    Way({"router": {"fit": "logistic"}}, "of the fits of a linear gate it closes most of the gap"),
)
_WITHOUT = (
    Way(
        {"router": {"fit": "arrow", "granularity": "context"}},
        "no expert has text, so the adapters alone decide",
    ),
    Way({"method": "linear"}, "no expert has text, so each counts as much as the others"),
    Way({"router": {"fit": "random"}}, "no expert has text, so chance decides"),
)


def choices(recipe: Recipe) -> Iterator[tuple[Recipe, Way]]:
    """What a recipe that leaves its router open may become, the best first; whether its models allow it, a plan says.

    Raises what pydantic says of the best way with text, where the recipe allows none.
    """
    found = False
    for way in _ways(recipe):
        try:
            settled = Recipe.model_validate(way.of(recipe))
        except ValidationError:
            continue
        if not settled.mixture.is_open:  # it says its method, which such a way cannot change
            found = True
            yield settled, way
    if not found:
        Recipe.model_validate(_WITH_TEXT[0].of(recipe))


def _ways(recipe: Recipe) -> tuple[Way, ...]:
    return _WITH_TEXT if any(expert.text or expert.prompts for expert in recipe.experts) else _WITHOUT


def why_chosen(recipe: Recipe, *, native: bool) -> str:
    """Why `fit: auto` takes the router that a recipe says; empty where it does not."""
    return next((way.why for way in _ways(recipe) if way.is_of(recipe, native=native)), "")
