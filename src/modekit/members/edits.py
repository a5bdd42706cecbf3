"""Edits of a mixture's recipe: an expert is added, removed or replaced. Nothing is read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import Change
from modekit.errors import RecipeError
from modekit.planning.reuse import Origins
from modekit.recipes.edit import as_written
from modekit.recipes.paths import from_folder
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE, SELF

_OF_ITS_MODEL = ("model", "adapter", "as", "rank", "bits", "revision")  # of what a recipe says of an expert


@dataclass(frozen=True)
class NewExpert:
    """An expert that is to come: what a recipe says of one, but for its name, with paths relative to `root`; `weight` is its
    share where a linear mixture has given weights.
    """

    entry: Mapping[str, object]
    root: Path
    weight: float | None = None

    def in_folder(self, folder: Path) -> dict[str, Any]:
        """The entry in a recipe in `folder`; of what is no text, the recipe's own rules say so."""
        try:
            moved: dict[str, Any] = from_folder({"base_model": BASE, "experts": [self.entry]}, self.root, folder)["experts"][0]
        except (TypeError, AttributeError):
            return dict(self.entry)
        return moved


@dataclass(frozen=True)
class MixtureEdit:
    """A mixture as it is to be.

    Attributes:
        recipe: of it.
        origins: per expert its number in the checkpoint; None for a new one.
        change: what the history will say.
        keeps_text: new experts whose text is that of an expert of the checkpoint, by the same name.
    """

    recipe: Recipe
    origins: Origins
    change: Change
    keeps_text: Sequence[str] = ()


def add_expert(checkpoint: Checkpoint, name: str, new: NewExpert) -> MixtureEdit:
    """With one more expert, the last, which writes its text if it has none and others wrote theirs. Raises RecipeError."""
    data = as_written(checkpoint.record.recipe)
    entry = new.in_folder(checkpoint.recipe_root)
    if not {"text", "prompts"} & entry.keys() and any(each.writes_text for each in checkpoint.record.recipe.experts):
        entry["text"] = SELF
    data["experts"] = [*data["experts"], {"name": name, **entry}]
    if new.weight is not None:
        mixture = data.setdefault("mixture", {})
        mixture["weights"] = {**(mixture.get("weights") or {}), name: new.weight}
    origins = [*range(len(checkpoint.names)), None]
    return MixtureEdit(_parsed(data, checkpoint), origins, _change("add", name, source=_source(entry)))


def remove_expert(checkpoint: Checkpoint, name: str) -> MixtureEdit:
    """Without an expert. Raises RecipeError where the mixture cannot do without it."""
    number = _number(checkpoint, name)
    data = as_written(checkpoint.record.recipe)
    gone = data["experts"].pop(number)
    data["eval"] = {key: texts for key, texts in data.get("eval", {}).items() if key != name}
    if not data["eval"]:
        del data["eval"]
    mixture = data.get("mixture", {})
    for setting in ("weights", "threshold"):  # which may name every expert
        if isinstance(mixture.get(setting), dict):
            mixture[setting] = {key: value for key, value in mixture[setting].items() if key != name}
    origins = [other for other in range(len(checkpoint.names)) if other != number]
    return MixtureEdit(_parsed(data, checkpoint), origins, _change("remove", name, was=_source(gone)))


def replace_expert(checkpoint: Checkpoint, name: str, new: NewExpert) -> MixtureEdit:
    """With another model for an expert, in its place; it keeps its text unless there is other text, and its labels."""
    number = _number(checkpoint, name)
    data = as_written(checkpoint.record.recipe)
    old = data["experts"][number]
    entry = new.in_folder(checkpoint.recipe_root)
    kept = {key: value for key, value in old.items() if key not in _OF_ITS_MODEL}
    given = entry.pop("labels", None)
    labels = dict.fromkeys([*(old.get("labels") or ()), *(given if isinstance(given, list | tuple) else ())])
    data["experts"][number] = {**kept, **entry, **({"labels": list(labels)} if labels else {})}
    fit = checkpoint.record.recipe.mixture.fit
    keeps = fit is not None and fit.reads_ids and not {"text", "prompts"} & entry.keys()
    origins = [None if other == number else other for other in range(len(checkpoint.names))]
    change = _change("replace", name, was=_source(old), source=_source(entry))
    return MixtureEdit(_parsed(data, checkpoint), origins, change, [name] if keeps else [])


def _number(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint.names:
        raise RecipeError(
            "no expert of this name exists",
            where=str(checkpoint.folder),
            found=name,
            expected=", ".join(checkpoint.names),
            remedy="name one of these",
        )
    return checkpoint.names.index(name)


def _source(entry: Mapping[str, object]) -> str | None:
    """The model or adapter that a recipe's expert names."""
    source = entry.get("model") or entry.get("adapter")
    return source if isinstance(source, str) else None


def _parsed(data: dict[str, Any], checkpoint: Checkpoint) -> Recipe:
    """The new recipe, in the shape that the checkpoint has. Raises RecipeError.

    The average that several carried full models share is chosen anew: beside a single one the base stays (recipes/choices.py).
    """
    recipe = checkpoint.record.recipe
    carries = checkpoint.record.carry is not None
    if carries and recipe.mixture.backbone == "average" and sum(each.is_whole for each in recipe.experts) > 1:
        del data["mixture"]["backbone"]
    return checkpoint.shape.pinned(parse_recipe(data, where=str(checkpoint.folder)))


def _change(what: Literal["add", "remove", "replace"], name: str, **entry: str | None) -> Change:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Change(what=what, expert=name, on=today, **entry)
