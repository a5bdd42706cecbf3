"""Edits of a mixture's recipe: an expert is added, removed or replaced. Nothing is read."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import Change
from modekit.errors import RecipeError
from modekit.planning.reuse import Origins
from modekit.recipes.edit import as_written
from modekit.recipes.paths import locate, may_be_hub_id
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE, SELF

_FEWEST = 2
_OF_ITS_MODEL = ("model", "adapter", "as", "rank", "bits", "revision")  # of what a recipe says of an expert


@dataclass(frozen=True)
class NewExpert:
    """An expert that is to come.

    Attributes:
        entry: what a recipe says of one, but for its name: `model` or `adapter`, `text`, `prompts`, `as`, `rank`, ...
        root: the folder that its paths are relative to.
        weight: its share where a linear mixture has given weights.
    """

    entry: Mapping[str, object]
    root: Path = field(default_factory=Path)
    weight: float | None = None

    def in_folder(self, folder: Path) -> dict[str, object]:
        """The entry in a recipe in `folder`."""
        entry = dict(self.entry)
        for key in ("model", "adapter"):
            if isinstance(value := entry.get(key), str) and value:
                entry[key] = self._moved(value, folder)
        text = entry.get("text")
        if isinstance(text, str) and text:
            entry["text"] = self._moved(text, folder)
        elif isinstance(text, list | tuple):
            entry["text"] = [self._moved(spec, folder) if isinstance(spec, str) else spec for spec in text]
        return entry

    def _moved(self, spec: str, folder: Path) -> str:
        """A path from elsewhere; a hub id, which is none here, as it is."""
        elsewhere = may_be_hub_id(spec) and locate(spec, self.root) is None
        if elsewhere or spec in (BASE, SELF) or Path(spec).is_absolute():
            return spec
        relative = os.path.relpath(self.root / Path(spec).expanduser(), folder)
        return relative if relative.startswith("..") else f"./{relative}"


@dataclass(frozen=True)
class MixtureEdit:
    """A mixture as it is to be.

    Attributes:
        recipe: of it.
        origins: per expert its number in the checkpoint; None for a new one.
        change: what the history will say.
        keeps_text: new experts whose text is that of an expert of the checkpoint, by the same name.
        refits: the router is set anew even where it was trained.
    """

    recipe: Recipe
    origins: Origins
    change: Change
    keeps_text: Sequence[str] = ()
    refits: bool = False


def add_expert(checkpoint: Checkpoint, name: str, new: NewExpert) -> MixtureEdit:
    """With one more expert, the last, which writes its text if it has none and others wrote theirs. Raises RecipeError."""
    data = as_written(checkpoint.record.recipe)
    if name in checkpoint.names:
        raise RecipeError(
            "an expert of this name exists already",
            where=str(checkpoint.folder),
            found=f"{name}, one of {_list(checkpoint)}",
            remedy="choose another name, or give it a new model with `modekit replace`",
        )
    entry = new.in_folder(checkpoint.recipe_root)
    if not {"text", "prompts"} & entry.keys() and any(each.writes_text for each in checkpoint.record.recipe.experts):
        entry["text"] = SELF
    data["experts"] = [*data["experts"], {"name": name, **entry}]
    weights = checkpoint.record.recipe.mixture.weights
    if weights is None and new.weight is not None:
        raise RecipeError("the mixture has no given weights", where="weight", found=new.weight, remedy="leave it out")
    if weights is not None:
        if new.weight is None:
            raise RecipeError(
                "the mixture's weights are given, and the new expert has none",
                where="mixture.weights",
                found=", ".join(f"{key} {value:g}" for key, value in weights.items()),
                remedy="give it a weight (weight=1)",
            )
        data["mixture"] = {**data["mixture"], "weights": {**weights, name: new.weight}}
    origins = [*range(len(checkpoint.names)), None]
    return MixtureEdit(_parsed(data, checkpoint), origins, _change("add", name, source=_source(entry)))


def remove_expert(checkpoint: Checkpoint, name: str) -> MixtureEdit:
    """Without an expert. Raises RecipeError where the mixture cannot do without it."""
    number = _number(checkpoint, name)
    _check_unused(checkpoint, name)
    if len(checkpoint.names) <= _FEWEST:
        raise RecipeError(
            "a mixture of one expert is none",
            where=str(checkpoint.folder),
            found=f"it has {_list(checkpoint)}",
            remedy="use that model by itself, or add another expert first",
        )
    data = as_written(checkpoint.record.recipe)
    gone = data["experts"].pop(number)
    data["eval"] = {key: texts for key, texts in data.get("eval", {}).items() if key != name}
    if not data["eval"]:
        del data["eval"]
    mixture = data.get("mixture", {})
    for setting in _by_name(mixture):
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
            expected=_list(checkpoint),
            remedy="name one of these",
        )
    return checkpoint.names.index(name)


def _check_unused(checkpoint: Checkpoint, name: str) -> None:
    mixture = checkpoint.record.recipe.mixture
    always_on, backbone = mixture.always_on, mixture.backbone
    user = "always_on" if always_on is not None and always_on.expert == name else ""
    user = "backbone" if getattr(backbone, "expert", None) == name else user
    if user:
        raise RecipeError(
            "the mixture needs this expert",
            where=f"mixture.{user}",
            found=name,
            remedy=f"build a recipe without it, or change mixture.{user} first",
        )


def _by_name(mixture: Mapping[str, object]) -> list[str]:
    """Settings of a mixture that name every expert."""
    return [key for key in ("weights", "threshold") if isinstance(mixture.get(key), dict)]


def _source(entry: Mapping[str, object]) -> str | None:
    """The model or adapter that a recipe's expert names."""
    source = entry.get("model") or entry.get("adapter")
    return source if isinstance(source, str) else None


def _list(checkpoint: Checkpoint) -> str:
    return ", ".join(checkpoint.names)


def _parsed(data: dict[str, Any], checkpoint: Checkpoint) -> Recipe:
    """The new recipe, in the shape that the checkpoint has. Raises RecipeError."""
    return checkpoint.shape.pinned(parse_recipe(data, where=str(checkpoint.folder)))


def _change(what: Literal["add", "remove", "replace"], name: str, **entry: str | None) -> Change:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Change(what=what, expert=name, on=today, was=entry.get("was"), source=entry.get("source"))
