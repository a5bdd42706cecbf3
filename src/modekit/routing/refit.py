"""A finished checkpoint's router set anew: other fit, method or granularity over the same experts.

What the recipe of the checkpoint says afterwards is what a build of it would give, so that `verify` goes on to hold; a change
that would need other tensors than the gates is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pkgutil import resolve_name

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE, STATISTICS_FOLDER
from modekit.errors import MismatchError, RecipeError, SourceError
from modekit.files.write import json_bytes
from modekit.planning.make import make_plan
from modekit.recipes.choices import choices, with_following
from modekit.recipes.edit import as_written, changed_mixture, with_mixture
from modekit.recipes.mixture import CHAT_DECAY
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipePart
from modekit.routing.fit import Fitting, fit_router
from modekit.run import QUIET, Run
from modekit.sources.tokenizer_choice import chat_template
from modekit.text.written import read_written, written_file

_WRITE_TEXTS = "modekit.routing.write_text:write_texts"
"""By its path, as it needs torch and a fit without text does not."""


def refit(checkpoint: Checkpoint, changes: RecipePart, *, run: Run = QUIET) -> Checkpoint:
    """Set the router anew without touching the experts.

    `changes` updates the recipe's `mixture` (nested `router` is merged). Raises RecipeError when a change would need
    another build.
    """
    recipe = _changed_recipe(checkpoint, changes)
    if recipe.mixture.needs_text:
        _write_missing_text(checkpoint, recipe, run)
    statistics = checkpoint.folder / STATISTICS_FOLDER
    fitted = fit_router(Fitting(checkpoint.with_recipe(recipe), recipe, checkpoint.recipe_root, statistics, run))
    written, files = checkpoint.router_files(fitted.gates, fitted.record, recipe, evidence=fitted.evidence)
    checkpoint.change({**files, RECORD_FILE: json_bytes(written.model_dump(mode="json"))})
    return Checkpoint(checkpoint.folder, written)


def _write_missing_text(checkpoint: Checkpoint, recipe: Recipe, run: Run) -> None:
    """Let experts write their text anew where it is gone or of another seed; without their models what is kept must do."""
    root, seed = checkpoint.recipe_root, recipe.mixture.router.seed
    written = {each.name: read_written(written_file(each, root)) for each in recipe.experts if each.writes_text}
    missing = [name for name, known in written.items() if known is None or known.made.seed != seed]
    with suppress(SourceError, MismatchError):
        if missing:
            resolve_name(_WRITE_TEXTS)(recipe, root, make_plan(recipe, root, run=run).sources, run)


def _changed_recipe(checkpoint: Checkpoint, changes: RecipePart) -> Recipe:
    """The checkpoint's recipe with changes; of a router left open the best that its tensors allow. Raises RecipeError."""
    old = as_written(checkpoint.record.recipe)
    mixture, asked_router = dict(old.get("mixture", {})), changes.get("router", {})
    if asked_router.get("chat") is False and checkpoint.shape.channels is None:  # in which the decay is built
        router = dict(mixture.get("router", {}))
        if router.get("decay") == [CHAT_DECAY]:  # which follows a change of subject in chats
            mixture["router"] = {key: value for key, value in router.items() if key != "decay"}
    changed = with_mixture(old, changed_mixture(mixture, changes))
    # What a format cannot say is first said of the folder, whose user may build another one, and then of the recipe.
    asked = parse_recipe({**changed, "output": {}}, where=str(checkpoint.folder))
    if asked.mixture.is_open:
        asked = _first_possible(checkpoint, asked)
        changed["mixture"] = as_written(asked)["mixture"]
    _check_same_tensors(checkpoint, asked)
    is_new = not checkpoint.record.recipe.mixture.is_carried
    if is_new and asked.mixture.is_carried:
        changed["mixture"].setdefault("modules", "auto")  # what is not said would mean whole models now
    recipe = parse_recipe(changed, where=str(checkpoint.folder))
    if is_new and chat_template(checkpoint.folder):  # else what is not said is what it was
        recipe = with_following(recipe)
    return checkpoint.shape.pinned(recipe)


def _first_possible(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """Of the choices of a recipe that leaves its router open; where there is none, one that is refused."""
    ways = [settled for settled, way in choices(recipe) if way.plain in (None, checkpoint.shape.plain)]
    return next((each for each in ways if not [*checkpoint.shape.refusals(each), *_other_tensors(checkpoint, each)]), ways[-1])


def _check_same_tensors(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise RecipeError when the recipe describes other experts, another backbone or other modules of the base."""
    beyond = checkpoint.shape.refusals(recipe)
    if beyond:
        raise RecipeError(
            f"a plain checkpoint cannot have {', '.join(beyond)}",
            where="mixture",
            remedy="build again with output: {format: modekit}",
        )
    for key in _other_tensors(checkpoint, recipe):
        raise RecipeError(
            "this change needs other tensors than the gates: a refit changes no expert, backbone or place of a router",
            where=f"mixture.{key}",
            remedy="change the recipe and build again",
        )


def _other_tensors(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """Keys of the mixture by which it has other tensors than the checkpoint's, gates aside."""
    before, after = checkpoint.record.recipe.mixture, recipe.mixture
    for key in ("backbone", "modules", "layers"):
        if getattr(before, key) != getattr(after, key):
            yield key
    if checkpoint.shape.plain and before.weights != after.weights:
        yield "weights"
    if checkpoint.shape.other_tensors(recipe):
        yield (
            "always_on" if before.always_on != after.always_on else "method" if before.method != after.method else "router.fit"
        )
    if _splits_ffn(checkpoint.record.recipe) != _splits_ffn(recipe):
        yield "router.per"


def _splits_ffn(recipe: Recipe) -> bool:
    """Whether the FFN of full models lies projection by projection, for routers finer than a module."""
    ffn = recipe.mixture.modules == "auto" or "mlp" in recipe.mixture.modules
    whole = all(expert.is_whole or expert.is_base for expert in recipe.experts)
    return ffn and whole and recipe.mixture.router.scope in {"projection", "feature"}
