"""What a recipe leaves open, and what it may become. `fit: auto`: the router by its text, its settings and the form of the
result, from a table of what was measured (benchmarks/auto.md). Nothing is run to choose; a plan and a card say why.

What a recipe leaves out means the same in every form, and what it says stands: with a lexical router, or one that is left open,
all that full models change is mixed, unless `modules` or `carry` says what.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from pydantic import ValidationError

from modekit.recipes.edit import as_written, omit
from modekit.recipes.mixture import CHAT_DECAY, CHOICES
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipeData


@dataclass(frozen=True)
class Way:
    """What a recipe says of what it leaves open, and why this router.

    `plain`: whether it serves a plain checkpoint alone, or the modekit architecture alone; None: both. `output`: the form that
    the recipe then names, if any, and that it carries more than FFNs.
    """

    mixture: RecipeData
    why: str = ""
    plain: bool | None = None
    output: RecipeData = field(default_factory=dict)

    def of(self, recipe: Recipe) -> RecipeData:
        """The recipe in this way; its own settings stay."""
        said = as_written(recipe)
        given = said.get("mixture", {})
        output = omit(said.get("output", {}), *(["format"] if self.output else []))
        decides = "router" in self.mixture or recipe.mixture.is_open
        router = {**self.mixture.get("router", {}), **omit(given.get("router", {}), *(["fit"] if decides else []))}
        chooses = {*CHOICES} & given.keys() or given.get("method", "routing") != "routing"
        mixture = {**omit(self.mixture, *(["top_k"] if chooses else [])), **omit(given, "router")}
        parts = {"mixture": {**mixture, **({"router": router} if router else {})}, "output": {**self.output, **output}}
        return {**said, **{key: part for key, part in parts.items() if part or key in said}}


_TOKENS = {"fit": "lexical"}
_PAIRS = {"fit": "lexical", "orders": [1, 2]}
_MODEKIT = {"format": "modekit"}
_OF_PROMPTS = "logistic, the best measured with prompts alone"
_OF_MODEKIT = "lexical, the best measured in the modekit architecture"


def choices(recipe: Recipe, *, whole: int = 0) -> list[tuple[Recipe, Way]]:
    """What a recipe that leaves something open may become, the best first. `whole`: full models that differ in more than FFNs.

    Raises pydantic's error where the recipe allows nothing.
    """
    shared, plain, own = _of_whole_models(whole)
    of_one_router = Way(shared, plain=True, output=plain), Way(own, plain=False, output=_MODEKIT), Way({})
    found: list[tuple[Recipe, Way]] = []
    for way in _of_an_open_router(recipe, whole) if recipe.mixture.is_open else of_one_router:
        if way.output and recipe.output.format not in ("auto", way.output["format"]):
            continue
        with suppress(ValidationError):
            found.append((Recipe.model_validate(way.of(recipe)), way))
    settled = [each for each in found if not each[0].mixture.is_open]  # a method that the recipe says stays
    return settled or [(Recipe.model_validate((last := Way({"router": _TOKENS})).of(recipe)), last)]


def why_chosen(recipe: Recipe, *, plain: bool) -> str:
    """Which router `fit: auto` takes, and why, of a recipe that says this one; empty where it says another."""
    said = as_written(recipe).get("mixture", {})
    ways = (way for way in _of_an_open_router(recipe, 0) if way.plain in (None, plain))
    return next((way.why for way in ways if way.of(recipe)["mixture"] == said), "")


def _of_whole_models(count: int) -> tuple[RecipeData, RecipeData, RecipeData]:
    """What a plain checkpoint of so many says of mixture and output, and one in the modekit architecture. Several share what
    their average has; beside one, adapters and the base stay exact on the base (benchmarks/whole.md).
    """
    plain = {"format": "plain", **({"carry": "all"} if count else {})}
    return {"backbone": "average"} if count > 1 else {}, plain, {"modules": "all"} if count else {}


def _of_an_open_router(recipe: Recipe, whole: int) -> tuple[Way, ...]:
    shared, plain, own = _of_whole_models(whole)
    merged: RecipeData = {"backbone": "average"} if whole else {}
    if any(expert.text for expert in recipe.experts):
        why = "lexical, the best measured in a plain checkpoint"
        return (
            Way({"top_k": 1, "router": _TOKENS, **shared}, why, plain=True, output=plain),
            Way({"top_k": 1, "router": _PAIRS, **own}, _OF_MODEKIT, plain=False, output=_MODEKIT),
            Way({"router": {"fit": "logistic"}, **merged}, "logistic, the best measured of linear gates"),
            *((Way({"top_k": 1, "router": _PAIRS}, _OF_MODEKIT, plain=False, output=_MODEKIT),) if whole else ()),
        )
    if any(expert.prompts for expert in recipe.experts):
        return (
            Way({"router": {"fit": "logistic"}, **merged}, _OF_PROMPTS, plain=True),
            Way({"router": {"fit": "logistic", "granularity": "context"}, **merged}, _OF_PROMPTS),
            Way({"router": _PAIRS, **own}, _OF_MODEKIT, plain=False),
        )
    return (
        Way(
            {"router": {"fit": "arrow", "granularity": "context"}, **merged},
            "arrow, from the adapters alone, as no expert has text",
        ),
        Way({"method": "linear", **merged}, "none (fixed weights), as no expert has text"),
        Way({"router": {"fit": "random"}, **merged}, "random, as no expert has text"),
    )


def with_following(recipe: Recipe) -> Recipe:
    """The recipe, of a base with a chat template, with a decay that follows chats where a lexical router has none."""
    router = recipe.mixture.router
    if not recipe.mixture.is_carried or router.decay is not None or router.chat is False:
        return recipe
    mixture = recipe.mixture.model_copy(update={"router": router.model_copy(update={"decay": [CHAT_DECAY]})})
    return recipe.model_copy(update={"mixture": mixture})
