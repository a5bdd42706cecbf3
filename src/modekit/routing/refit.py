"""A finished checkpoint's router set anew: other fit, method or granularity over the same experts.

What the recipe of the checkpoint says afterwards is what a build of it would give, so that `verify` goes on to hold; a change
that would need other tensors than the gates is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import STATISTICS_FOLDER, RouterRecord
from modekit.errors import RecipeError
from modekit.processes import processes
from modekit.progress import Progress, silent
from modekit.recipes.recipe import BASE, READ_AT, READ_BY, Recipe, parse_recipe
from modekit.routing.constant import constant_gates
from modekit.routing.fit import fit_router


def refit(
    checkpoint: Checkpoint, changes: Mapping[str, Any], *, trust_remote_code: bool = False, progress: Progress = silent
) -> Checkpoint:
    """Set the router anew without touching the experts.

    `changes` updates the recipe's `mixture` (nested `router` is merged). Raises RecipeError when a change would need
    another build. Under a launcher only the main process writes.
    """
    recipe = _changed_recipe(checkpoint, changes)
    changed = checkpoint.with_recipe(recipe)
    gates = constant_gates(recipe, changed.slots)
    if gates is None:
        fitted = fit_router(
            changed, recipe, checkpoint.recipe_root, checkpoint.folder / STATISTICS_FOLDER,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
        return checkpoint.with_router(fitted.gates, fitted.record, recipe) if processes().is_main else checkpoint
    if not processes().is_main:
        return checkpoint
    return checkpoint.with_router(gates, RouterRecord.unfitted(recipe), recipe)


def _changed_recipe(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> Recipe:
    """The checkpoint's recipe with changes. What only the old router needed is dropped in silence; what is asked for now is
    checked like any recipe.
    """
    old = checkpoint.record.recipe
    mixture = old.mixture.model_dump(mode="json", exclude_unset=True)
    router = {**mixture.pop("router", {}), **changes.get("router", {})}
    method = changes.get("method", mixture.get("method", "routing"))
    dead = {key for key, group in _SELECTION.items() if method not in group}
    dead |= {"top_p"} if changes.get("top_k") is not None else {"top_k"} if changes.get("top_p") is not None else set()
    mixture = {key: value for key, value in mixture.items() if key not in dead}
    mixture.update({key: value for key, value in changes.items() if key != "router"})
    dead = {key for key, granularity in READ_AT.items() if router.get("granularity") != granularity}
    dead -= {"decay"} if router.get("fit") == "ngram" else set()
    dead |= {key for key, fits in READ_BY.items() if router.get("fit", "logistic") not in fits}
    router = {key: value for key, value in router.items() if key not in dead or key in changes.get("router", {})}
    if router and (method != "linear" or changes.get("router")):
        mixture["router"] = router
    whole = old.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if router.get("fit") != "centroid":
        for expert in whole["experts"]:
            expert.pop("negative_prompts", None)
    recipe = parse_recipe({**whole, "mixture": mixture}, where=str(checkpoint.folder))
    _check_same_tensors(checkpoint, recipe)
    return checkpoint.shape.pinned(recipe)


_SELECTION = {"top_k": {"routing"}, "top_p": {"routing"}, "always_on": {"routing", "gating"}, "weights": {"linear"}}
"""Settings of a mixture -> methods that read them."""


def _check_same_tensors(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise RecipeError when the recipe describes other experts, another backbone or other places for routers."""
    beyond = checkpoint.shape.refusals(recipe)
    if beyond:
        raise RecipeError(
            f"a native checkpoint cannot say {', '.join(beyond)}", where="mixture",
            remedy="build again with output: {format: modekit}",
        )  # fmt: skip
    old = checkpoint.record.recipe
    for place, (before, after) in enumerate(zip(_tensors(old, checkpoint), _tensors(recipe, checkpoint), strict=True)):
        if before != after:
            raise RecipeError(
                "this change is in the experts, the backbone or the places of routers, not in what routers say",
                where=_TENSORS[place], remedy="change the recipe and build again",
            )  # fmt: skip


_TENSORS = (
    "mixture.backbone", "mixture.weights", "mixture.modules", "mixture.layers", "mixture.always_on", "mixture.method",
    "mixture.router.per", "mixture.router.fit",
)  # fmt: skip


def _tensors(recipe: Recipe, checkpoint: Checkpoint) -> tuple[object, ...]:
    """What of a mixture decides which tensors it has, in the order of _TENSORS."""
    mixture = recipe.mixture
    linear = mixture.method == "linear"
    weights = mixture.weights if checkpoint.shape.weights_in_experts else None
    kept_base = mixture.always_on is not None and mixture.always_on.expert == BASE
    reads_embedding = mixture.modules == "all" and not linear  # whose base is kept for the router
    return (
        mixture.backbone, weights, mixture.modules, mixture.layers, kept_base, reads_embedding,
        "layer" if linear else mixture.router.scope, not linear and mixture.router.fit == "ngram" and mixture.router.buckets,
    )  # fmt: skip
