"""Edits of recipes as plain data: what has no effect under an edit is left out, since a recipe that says it is refused. And
`fit: auto`: the router of a recipe that leaves it open, by its text, its settings and the form of the result, from a table of
what was measured (benchmarks/auto.md). Nothing is run to choose; a plan, a build and a card say why.

What a recipe leaves out means the same in every form, and what it says stands: with a lexical router, or one that is left open,
all that full models change is mixed, unless `modules` or `carry` says what.
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
    """What a recipe says of what it leaves open, and why this router.

    `plain`: whether it serves a plain checkpoint alone, or the modekit architecture alone; None: both. `says_form`: the recipe
    then names the form, and with `carries` that a plain checkpoint carries more than FFNs.
    """

    mixture: RecipeData
    why: str = ""
    plain: bool | None = None
    says_form: bool = False
    carries: bool = False

    def of(self, recipe: Recipe) -> RecipeData:
        """The recipe in this way; its own settings stay."""
        said = as_written(recipe)
        given, output = said.get("mixture", {}), said.get("output", {})
        decides = "router" in self.mixture or recipe.mixture.is_open
        router = {**self.mixture.get("router", {}), **_omit(given.get("router", {}), *(["fit"] if decides else []))}
        chooses = {*CHOICES} & given.keys() or given.get("method", "routing") != "routing"
        mixture = {**_omit(self.mixture, *(["top_k"] if chooses else [])), **_omit(given, "router")}
        if self.says_form:
            output = {**({"carry": "all"} if self.carries else {}), **output, "format": "plain" if self.plain else "modekit"}
        parts = {"mixture": {**mixture, **({"router": router} if router else {})}, "output": output}
        return {**said, **{key: part for key, part in parts.items() if part or key in said}}


_TOKENS, _PAIRS = {"fit": "lexical"}, {"fit": "lexical", "orders": [1, 2]}
_OF_PROMPTS = "logistic, which did best of what is set from prompts"
_OF_MODEKIT = "lexical, which did best in the modekit architecture"


def leaves_open(recipe: Recipe) -> bool:
    """Whether it leaves open its router, or has one that decides for whole models, as a plain checkpoint carries it."""
    return recipe.mixture.is_open or (recipe.mixture.fit is not None and recipe.mixture.fit.carried)


def choices(recipe: Recipe, *, whole: int = 0) -> list[tuple[Recipe, Way]]:
    """What a recipe that leaves something open may become, the best first. `whole`: full models that differ in more than FFNs.

    Raises pydantic's error where the recipe allows nothing.
    """
    shared, own = _of_whole_models(whole)
    of_one_router = (
        Way(shared, plain=True, says_form=True, carries=whole > 0),
        Way(own, plain=False, says_form=True),
        Way({}),
    )
    found: list[tuple[Recipe, Way]] = []
    for way in _of_an_open_router(recipe, whole) if recipe.mixture.is_open else of_one_router:
        if way.says_form and recipe.output.format not in ("auto", "plain" if way.plain else "modekit"):
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


def _of_whole_models(count: int) -> tuple[RecipeData, RecipeData]:
    """What a plain checkpoint of so many says, and one in the modekit architecture. Several share what their average has;
    beside one, adapters and the base stay exact on the base (benchmarks/whole.md).
    """
    return {"backbone": "average"} if count > 1 else {}, {"modules": "all"} if count else {}


def _of_an_open_router(recipe: Recipe, whole: int) -> tuple[Way, ...]:
    shared, own = _of_whole_models(whole)
    merged: RecipeData = {"backbone": "average"} if whole else {}
    arrow, context = {"fit": "arrow", "granularity": "context"}, {"fit": "logistic", "granularity": "context"}
    if any(expert.text for expert in recipe.experts):
        why = "lexical, which did best of what a plain checkpoint carries"
        return (
            Way({"top_k": 1, "router": _TOKENS, **shared}, why, plain=True, says_form=True, carries=whole > 0),
            Way({"top_k": 1, "router": _PAIRS, **own}, _OF_MODEKIT, plain=False, says_form=True),
            Way({"router": {"fit": "logistic"}, **merged}, "logistic, which did best of linear gates"),
            *((Way({"top_k": 1, "router": _PAIRS}, _OF_MODEKIT, plain=False, says_form=True),) if whole else ()),
        )
    if any(expert.prompts for expert in recipe.experts):
        return (
            Way({"router": {"fit": "logistic"}, **merged}, _OF_PROMPTS, plain=True),
            Way({"router": context, **merged}, _OF_PROMPTS),
            Way({"router": _PAIRS, **own}, _OF_MODEKIT, plain=False),
        )
    return (
        Way({"router": arrow, **merged}, "arrow, by the adapters alone, as no expert has text"),
        Way({"method": "linear", **merged}, "none (fixed weights), as no expert has text"),
        Way({"router": {"fit": "random"}, **merged}, "random, as no expert has text"),
    )
