"""What a fit is given, what it gives, and the function of every fit: it sets the gates of a checkpoint.

What needs torch is imported only where it runs: a fit that reads no text costs no more than the copy. A finished checkpoint's
router is set anew, too: what its recipe says afterwards is what a build of it would give, so that `verify` goes on to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE, STATISTICS_FOLDER, RouterRecord
from modekit.checkpoint.router_file import Gates
from modekit.errors import MismatchError, RecipeError, SourceError
from modekit.files.write import json_bytes
from modekit.planning.make import make_plan
from modekit.recipes.choices import choices, with_following
from modekit.recipes.edit import as_written, changed_mixture, omit, with_mixture
from modekit.recipes.mixture import CHAT_DECAY, Router
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipePart
from modekit.run import QUIET, Run
from modekit.sources.tokenizer_choice import chat_template
from modekit.text.written import read_written, written_file

_RANDOM_STD = 0.02  # the paper's noisy router: N(0, 0.02)
_WRITE_TEXTS = "modekit.routing.write_text:write_texts"
"""By its path, as it needs torch and a fit without text does not."""
TextProvenance = Mapping[str, Any]
"""What is remembered of a text (text/splits.py)."""


@dataclass(frozen=True)
class Fitting:
    """A checkpoint whose gates are to be set, and the text they may be set from.

    Attributes:
        checkpoint: under the new routing: its slots are the routers that need a gate.
        recipe: what it is to be afterwards.
        root: folder that the recipe's paths are relative to.
        folder: of kept statistics.
        run: what was handed down.
        stays: experts of a mixture that is changed: what is kept of them counts, whatever their text says now.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    root: Path
    folder: Path
    run: Run = QUIET
    stays: Collection[str] = ()

    @property
    def settings(self) -> Router:
        """Of the router."""
        return self.recipe.mixture.router

    def statistics_file(self, expert: str) -> Path:
        """Where the statistics of an expert's domain are kept."""
        return self.folder / f"{expert}.safetensors"

    def fitted(self, gates: Gates, text: Sequence[TextProvenance], report: Mapping[str, object]) -> FittedRouter:
        """Gates that were set from text; `text`: what the record remembers of each expert's, in their order."""
        of_experts = dict(zip(self.recipe.names, text, strict=True)) if text else {}
        record = RouterRecord(status="fitted", settings=self.settings, sha256="", text=of_experts, report=dict(report))
        return FittedRouter(gates, record)

    def unfitted(self, gates: Gates) -> FittedRouter:
        """Gates that the recipe alone gives."""
        return FittedRouter(gates, RouterRecord.unfitted(self.recipe))


@dataclass(frozen=True)
class FittedRouter:
    """The gate of every router slot, the record for modekit.json, and, where the checkpoint's embedding carries it, the
    evidence that the gates read (checkpoint/evidence.py).
    """

    gates: Gates
    record: RouterRecord
    evidence: memoryview | None = None


def fit_router(fitting: Fitting) -> FittedRouter:
    """Set the gates as the recipe's `mixture` asks for, from text found relative to `root` where the fit reads any.

    Statistics in the folder that were made from the same text and settings are used as they are; missing ones are made and
    written there. Raises TextError.
    """
    fit = fitting.recipe.mixture.fit
    if fit is None:  # fixed weights: with top_k = E every expert of a native mixture weighs 1/E
        return fitting.unfitted([np.zeros(slot.shape, np.float32) for slot in fitting.checkpoint.slots])
    found = SETTERS[fit.name]
    setter: Callable[[Fitting], FittedRouter] = resolve_name(found) if isinstance(found, str) else found
    return setter(fitting)


def _random(fitting: Fitting) -> FittedRouter:
    """N(0, 0.02), by the temperature, from the seed."""
    settings = fitting.settings
    draw = np.random.Generator(np.random.PCG64(settings.seed)).standard_normal
    scale = np.float32(_RANDOM_STD / settings.temperature)
    gates = [draw(slot.shape, np.float32) * scale for slot in fitting.checkpoint.slots]
    return fitting.unfitted(gates)


SETTERS: dict[str, Callable[[Fitting], FittedRouter] | str] = {
    "random": _random,
    **dict.fromkeys(("centroid", "logistic", "cosine"), "modekit.routing.linear:solve_gates"),
    "lexical": "modekit.routing.lexical:lexical_gates",
    "arrow": "modekit.routing.linear:low_rank_gates",
}
"""By the name of the fit (recipes/fits.py): a function, or where it needs torch its place."""


def refit(checkpoint: Checkpoint, changes: RecipePart, *, run: Run = QUIET) -> Checkpoint:
    """Set the router anew (fit, method or granularity) without touching the experts.

    `changes` updates the recipe's `mixture` (nested `router` is merged). Raises RecipeError when a change would need
    another build.
    """
    recipe = _changed_recipe(checkpoint, changes)
    if recipe.mixture.needs_text:
        _write_missing_text(checkpoint, recipe, run)
    statistics = checkpoint.folder / STATISTICS_FOLDER
    fitted = fit_router(Fitting(checkpoint.with_recipe(recipe), recipe, checkpoint.recipe_root, statistics, run))
    written, files = checkpoint.router_files(fitted.gates, fitted.record, recipe, evidence=fitted.evidence)
    files |= checkpoint.recipe_file(recipe, checkpoint.folder)
    checkpoint.change({**files, RECORD_FILE: json_bytes(written.model_dump(mode="json"))})
    return Checkpoint(checkpoint.folder, written)


def _write_missing_text(checkpoint: Checkpoint, recipe: Recipe, run: Run) -> None:
    """Let experts write their text anew where it is gone or of another seed; without their models what is kept must do."""
    root = checkpoint.recipe_root
    written = {each.name: read_written(written_file(each, root)) for each in recipe.experts if each.writes_text}
    missing = [name for name, known in written.items() if known is None or known.made.seed != recipe.mixture.router.seed]
    with suppress(SourceError, MismatchError):
        if missing:
            resolve_name(_WRITE_TEXTS)(recipe, root, make_plan(recipe, root, run=run).sources, run)


def _changed_recipe(checkpoint: Checkpoint, changes: RecipePart) -> Recipe:
    """The checkpoint's recipe with changes; of a router left open the best that its tensors allow. Raises RecipeError."""
    old = as_written(checkpoint.record.recipe)
    mixture = dict(old.get("mixture", {}))
    follows = _decay_follows(checkpoint, mixture.get("router", {}), changes.get("router", {}))
    if follows:
        mixture["router"] = omit(mixture["router"], "decay")
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
    if follows or (is_new and chat_template(checkpoint.folder)):  # else what is not said is what it was
        recipe = with_following(recipe)
    return checkpoint.shape.pinned(recipe)


def _decay_follows(checkpoint: Checkpoint, router: RecipePart, asked: RecipePart) -> bool:
    """Whether the decay is the one that chats give, or would give, and chats come or go by what is `asked` for.

    Raises RecipeError where the decay is in the attention of a plain checkpoint.
    """
    knew, knows = (each.get("chat") is not False for each in (router, {**router, **asked}))
    default = [CHAT_DECAY] if knew else None
    if knew == knows or "decay" in asked or router.get("decay") != default or not chat_template(checkpoint.folder):
        return False
    channels = checkpoint.shape.channels
    if channels is not None and channels.decays != (1.0,):  # where attention cannot fade, chats change nothing
        raise RecipeError(
            "without 'decay' it changes with 'chat', and in a plain checkpoint it is part of the attention",
            where="mixture.router.chat",
            found=f"built with decay: {[*channels.decays]}",
            remedy=f"change 'chat' in the recipe and build again, or keep what is there: decay={[*channels.decays]}",
        )
    return channels is None


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
    keeps_lexical = checkpoint.shape.plain and checkpoint.record.recipe.mixture.is_carried
    for key in _other_tensors(checkpoint, recipe):
        raise RecipeError(
            "this change needs other tensors than the gates: a refit changes no expert, backbone or place of a router",
            where=f"mixture.{key}",
            remedy=f"{'set fit=lexical, the only router of this plain mixture, or ' * keeps_lexical}change the recipe and "
            "build again",
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
    whole = all(expert.adapter is None and not expert.is_low_rank for expert in recipe.experts)
    return ffn and whole and recipe.mixture.router.scope in {"projection", "feature"}
