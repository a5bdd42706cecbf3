"""Experts come and go: add, remove, replace or rename one of a finished mixture.

    OUT + change -> recipe as it is to be -> two plans over the same models -> what OUT has is taken from it -> build

What comes out is what a build of the new recipe gives, byte for byte, but for what a training made of OUT, which stays. Files
that do not change are linked, not copied; of the experts' models only the new one's is read. The router is set anew from the
kept statistics, so that the text of the experts that stay is not needed.

OUT gives way to the new mixture by one rename, or stays beside it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from modekit.building.before import Before
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import Change
from modekit.errors import CheckpointError, ModekitError, RecipeError, SourceError
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.members.gone import stand_in, tells_dtypes
from modekit.planning.copied_files import copied_files
from modekit.planning.kept import Origins, Taken, taking_from
from modekit.planning.make import COPIED_FILES, plan_of
from modekit.planning.plan import Plan
from modekit.recipes.edit import as_written
from modekit.recipes.paths import locate
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Expert, Recipe
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.contents import blake3_of
from modekit.sources.families import family_of
from modekit.sources.model import ModelSource
from modekit.sources.open import Opener, label_of

_FEWEST = 2


@dataclass(frozen=True)
class NewExpert:
    """An expert that is to come.

    Attributes:
        said: what a recipe says of one, but for its name: `model` or `adapter`, `text`, `prompts`, `as`, `rank`, ...
        root: the folder that its paths are relative to.
        weight: its share where a linear mixture has given weights.
    """

    said: Mapping[str, Any]
    root: Path = field(default_factory=Path)
    weight: float | None = None

    def in_folder(self, folder: Path) -> dict[str, Any]:
        """What a recipe in `folder` says of it."""
        said = dict(self.said)
        for key in ("model", "adapter"):
            if isinstance(said.get(key), str):
                said[key] = self._moved(said[key], folder)
        if said.get("text"):
            texts = [said["text"]] if isinstance(said["text"], str) else said["text"]
            said["text"] = [self._moved(spec, folder) for spec in texts]
        return said

    def _moved(self, spec: str, folder: Path) -> str:
        """A path from elsewhere; a hub id, which is none here, as it is."""
        is_path = spec.startswith((".", "~")) or spec.count("/") != 1
        if spec == BASE or Path(spec).is_absolute() or not (is_path or locate(spec, self.root)):
            return spec
        relative = os.path.relpath(self.root / Path(spec).expanduser(), folder)
        return relative if relative.startswith("..") else f"./{relative}"


@dataclass(frozen=True)
class Wanted:
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


def adding(checkpoint: Checkpoint, name: str, new: NewExpert) -> Wanted:
    """With one more expert, the last. Raises RecipeError."""
    data = as_written(checkpoint.record.recipe)
    if name in checkpoint.names:
        raise RecipeError(
            "an expert of this name exists already", where=str(checkpoint.folder), found=f"{name}, one of {_list(checkpoint)}",
            remedy="choose another name, or give it a new model with `modekit replace`",
        )  # fmt: skip
    said = new.in_folder(checkpoint.recipe_root)
    data["experts"] = [*data["experts"], {"name": name, **said}]
    weights = checkpoint.record.recipe.mixture.weights
    if weights is None and new.weight is not None:
        raise RecipeError("the mixture has no given weights", where="weight", found=new.weight, remedy="leave it out")
    if weights is not None:
        if new.weight is None:
            raise RecipeError(
                "the mixture's weights are given, and the new expert has none", where="mixture.weights",
                found=", ".join(f"{key} {value:g}" for key, value in weights.items()), remedy="give it a weight (--weight)",
            )  # fmt: skip
        data["mixture"] = {**data["mixture"], "weights": {**weights, name: new.weight}}
    origins = [*range(len(checkpoint.names)), None]
    return Wanted(_parsed(data, checkpoint), origins, _change("add", name, source=_source(said)))


def removing(checkpoint: Checkpoint, name: str) -> Wanted:
    """Without an expert. Raises RecipeError where the mixture cannot do without it."""
    number = _number(checkpoint, name)
    _check_unused(checkpoint, name)
    if len(checkpoint.names) <= _FEWEST:
        raise RecipeError(
            "a mixture of one expert is none", where=str(checkpoint.folder), found=f"it has {_list(checkpoint)}",
            remedy="use that model by itself, or add another expert first",
        )  # fmt: skip
    data = as_written(checkpoint.record.recipe)
    gone = data["experts"].pop(number)
    data["eval"] = {key: texts for key, texts in data.get("eval", {}).items() if key != name}
    if not data["eval"]:
        del data["eval"]
    _without_weight(data, name)
    origins = [other for other in range(len(checkpoint.names)) if other != number]
    return Wanted(_parsed(data, checkpoint), origins, _change("remove", name, was=_source(gone)))


def replacing(checkpoint: Checkpoint, name: str, new: NewExpert) -> Wanted:
    """With another model for an expert, in its place; it keeps its text unless there is other text."""
    number = _number(checkpoint, name)
    data = as_written(checkpoint.record.recipe)
    old = data["experts"][number]
    said = new.in_folder(checkpoint.recipe_root)
    kept = {key: value for key, value in old.items() if key not in {"model", "adapter", "as", "rank", "revision"}}
    data["experts"][number] = {**kept, **said}
    fit = checkpoint.record.recipe.mixture.fit
    keeps_text = [name] if fit is not None and fit.reads == "tokens" and "text" not in said else []
    origins = [None if other == number else other for other in range(len(checkpoint.names))]
    change = _change("replace", name, was=_source(old), source=_source(said))
    return Wanted(_parsed(data, checkpoint), origins, change, keeps_text)


def renaming(checkpoint: Checkpoint, name: str, new_name: str) -> Wanted:
    """With another name for an expert and its domain."""
    number = _number(checkpoint, name)
    if new_name in checkpoint.names:
        raise RecipeError(
            "an expert of this name exists already", where=str(checkpoint.folder), found=new_name, remedy="choose another name"
        )
    data = as_written(checkpoint.record.recipe)
    if new_name in data.get("eval", {}):
        raise RecipeError("the recipe's eval has a domain of this name", where=f"eval.{new_name}", remedy="choose another name")
    data["experts"][number]["name"] = new_name
    mixture = data.get("mixture", {})
    if mixture.get("weights"):
        mixture["weights"] = {new_name if key == name else key: value for key, value in mixture["weights"].items()}
    for user in ("always_on", "backbone"):
        if isinstance(mixture.get(user), dict) and mixture[user].get("expert") == name:
            mixture[user] = {**mixture[user], "expert": new_name}
    if data.get("eval"):
        data["eval"] = {new_name if key == name else key: texts for key, texts in data["eval"].items()}
    change = _change("rename", new_name, was=name)
    return Wanted(_parsed(data, checkpoint), list(range(len(checkpoint.names))), change)


def write_change(checkpoint: Checkpoint, wanted: Wanted, out: Path, *, run: Run = QUIET) -> Checkpoint:
    """Write the mixture that is wanted: in the checkpoint's place when `out` is its folder, else beside it.

    Raises SourceError (the base is gone, or what is needed of an expert that is; a model that changed), MismatchError or
    UnsupportedError for a new expert that does not fit, TextError where statistics and text are gone, OutputError,
    CheckpointError when another command changed the mixture meanwhile. Then nothing has changed.
    """
    before = before_change(checkpoint, wanted, run=run)
    return build(before.plan, out, before=before, run=run)


def before_change(checkpoint: Checkpoint, wanted: Wanted, *, run: Run = QUIET) -> Before:
    """The change, planned: nothing is written. Raises as `write_change`.

    Of experts that stay the mixture says what there is to know; their models are opened only where something is made of them
    again.
    """
    opener = Opener(checkpoint.recipe_root, run)
    base = opener.base(checkpoint.record.recipe)
    _check_base(checkpoint, base)
    new = {
        place: opener.expert(place, expert, base)
        for place, (expert, origin) in enumerate(zip(wanted.recipe.experts, wanted.origins, strict=True))
        if origin is None
    }
    _check_is_another(checkpoint, wanted, new)
    experts = list(enumerate(checkpoint.record.recipe.experts))
    said = [base, *(stand_in(label_of(number, expert), expert, base, checkpoint, number) for number, expert in experts)]

    def opened() -> list[ModelSource]:
        stay = [number in wanted.origins for number, _ in experts]
        return [base, *(_opened(opener, n, e, base) if stay[n] else said[1 + n] for n, e in experts)]

    if not tells_dtypes(checkpoint):  # of adapters: their models do, where they are there
        with suppress(SourceError):
            before = _planned(checkpoint, wanted, opened(), new, run)
            if before is not None:
                return before
    before = _planned(checkpoint, wanted, said, new, run)
    if before is not None and not _reads_what_is_said(before.plan):
        return before
    before = _planned(checkpoint, wanted, opened(), new, run)
    if before is None:
        raise SourceError(
            "the models are not those that the mixture was built from", where=str(checkpoint.folder),
            found="other settings, ranks or scales than the mixture has",
            remedy="put back what they were, or build the mixture anew",
        )  # fmt: skip
    return before


def _opened(opener: Opener, number: int, expert: Expert, base: ModelSource) -> ModelSource:
    """The model of an expert that stays, of which something is needed. Raises SourceError that says so."""
    try:
        return opener.expert(number, expert, base)
    except SourceError as error:
        raise SourceError(
            "an expert's model is gone, and this change needs it", where=label_of(number, expert), found=error.found,
            remedy="put it back: with this change something that it gave takes another form (docs/experts.md)",
        ) from None  # fmt: skip


def _planned(
    checkpoint: Checkpoint, wanted: Wanted, old: Sequence[ModelSource], new: Mapping[int, ModelSource], run: Run
) -> Before | None:
    """The change over these models of the experts that were there; None where they do not give the mixture that is there."""
    root, recipe = checkpoint.recipe_root, wanted.recipe
    base, sources = old[0], [old[0]]
    for place, (expert, origin) in enumerate(zip(recipe.experts, wanted.origins, strict=True)):
        stays = base if origin is None or expert.is_base else replace(old[1 + origin], label=label_of(place, expert))
        sources.append(new.get(place, stays))
    try:
        before = plan_of(checkpoint.record.recipe, root, tuple(old), run=run)
    except ModekitError:
        return None
    if not _is_what_is_there(checkpoint, before):
        return None
    after = plan_of(recipe, root, tuple(sources), run=run)
    _check_shape(checkpoint, after)
    taken = taking_from(checkpoint.folder, checkpoint.tensors, before, after, wanted.origins)
    _check_training_stays(checkpoint, taken.names, wanted.origins, before)
    statistics = _statistics(checkpoint, wanted, taken)
    return Before(checkpoint, taken.plan, wanted.origins, taken.names, statistics, wanted.change, wanted.refits)


def _is_what_is_there(checkpoint: Checkpoint, before: Plan) -> bool:
    """Whether a plan gives the mixture that is there: its tensors and its config."""
    there = {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in before.tensors}
    left_out = checkpoint.shape.left_out
    return _without(planned, left_out) == _without(there, left_out) and dict(before.config) == dict(checkpoint.config)


def _without(tensors: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name not in names}


def _reads_what_is_said(plan: Plan) -> bool:
    """Whether something is needed of a model that is only known by what the mixture says of it."""
    kept = () if plan.kept is None else plan.kept.model.files
    refs = (ref for tensor in plan.tensors for piece in tensor.pieces for ref in piece.refs)
    return any(ref.state is None and ref.file not in kept for ref in refs)


def _check_is_another(checkpoint: Checkpoint, wanted: Wanted, new: Mapping[int, ModelSource]) -> None:
    """Raise RecipeError when the model that is to take an expert's place is the one that is there, byte for byte."""
    record = checkpoint.record
    if wanted.change.what != "replace" or wanted.recipe.digest() != record.recipe_digest:
        return
    ((place, source),) = new.items()
    known = record.sources[record.expert_sources[place]].files
    if {file.name: blake3_of(file) for file in source.files} == {name: file.blake3 for name, file in known.items()}:
        raise RecipeError(
            "this very model exists in its place already", where=str(checkpoint.folder),
            found=f"{wanted.change.expert}: {wanted.change.source}", remedy="name another model or text",
        )  # fmt: skip


def _check_shape(checkpoint: Checkpoint, after: Plan) -> None:
    """Raise RecipeError when the new mixture would lie in another architecture."""
    if after.shape.native_type != checkpoint.shape.native_type:
        raise RecipeError(
            "with this expert the mixture would need another architecture", where=str(checkpoint.folder),
            found=f"{checkpoint.config['model_type']} now, {after.config['model_type']} then: {after.why}",
            remedy="give the expert in the form of the others (as: full or lora), or build the new recipe",
        )  # fmt: skip


def _check_base(checkpoint: Checkpoint, base: ModelSource) -> None:
    """Raise SourceError when the base is no longer the one that the mixture and its statistics were made with."""
    folder, record = checkpoint.folder, checkpoint.record
    dense = family_of(base.config, where=f"base_model ({base.spec})").dense_config(base.config)
    sizes = {file.name: file.stat().st_size for file in base.files}
    differs = "config.json" if dense != record.dense_config else ""
    if not differs and sizes != {name: file.size for name, file in record.sources[0].files.items()}:
        differs = "its weights"
    for file in copied_files(base.folder, COPIED_FILES, where=f"base_model ({base.spec})") if not differs else ():
        try:
            same = read_bytes(file, LARGE) == read_bytes(folder / file.name, LARGE)
        except UNREADABLE:
            same = False
        differs = differs if same else file.name
    if differs:
        raise SourceError(
            "the base model is not the one that the mixture was built with", where=str(base.folder),
            found=f"{differs} is another", remedy="put it back, or build the mixture anew",
        )  # fmt: skip


def _check_training_stays(checkpoint: Checkpoint, names: Mapping[str, str], origins: Origins, before: Plan) -> None:
    """Raise CheckpointError when a tensor that a training moved would be made anew from the sources."""
    gone = set(range(before.experts)) - set(origins)
    of_gone = {tensor.name for shard in before.shards for tensor in shard.tensors if tensor.expert in gone}
    lost = sorted(checkpoint.record.trained.keys() - set(names.values()) - of_gone)
    if lost:
        raise CheckpointError(
            "the mixture was trained, and this change would undo that", where=str(checkpoint.folder),
            found=f"{len(lost)} tensors depend on who is in the mixture, first {lost[0]}",
            remedy="build the new recipe, and train it",
        )  # fmt: skip


def _statistics(checkpoint: Checkpoint, wanted: Wanted, taken: Taken) -> dict[str, str]:
    """Expert of the new mixture -> expert of the checkpoint whose statistics are its own.

    What was read through another backbone is not of this one.
    """
    fit = wanted.recipe.mixture.fit
    backbone = {tensor.name for tensor in taken.plan.tensors if tensor.role == "backbone"}
    if fit is not None and fit.reads != "tokens" and not backbone <= taken.names.keys():
        return {}
    pairs = zip(wanted.recipe.names, wanted.origins, strict=True)
    kept = {name: checkpoint.names[origin] for name, origin in pairs if origin is not None}
    return kept | {name: name for name in wanted.keeps_text}


def _number(checkpoint: Checkpoint, name: str) -> int:
    if name not in checkpoint.names:
        raise RecipeError(
            "no expert of this name exists", where=str(checkpoint.folder), found=name, expected=_list(checkpoint),
            remedy="name one of these",
        )  # fmt: skip
    return checkpoint.names.index(name)


def _check_unused(checkpoint: Checkpoint, name: str) -> None:
    mixture = checkpoint.record.recipe.mixture
    always_on, backbone = mixture.always_on, mixture.backbone
    user = "always_on" if always_on is not None and always_on.expert == name else ""
    user = "backbone" if getattr(backbone, "expert", None) == name else user
    if user:
        raise RecipeError(
            "the mixture stands on this expert", where=f"mixture.{user}", found=name,
            remedy=f"build a recipe without it, or change mixture.{user} first",
        )  # fmt: skip


def _without_weight(data: dict[str, Any], name: str) -> None:
    weights = data.get("mixture", {}).get("weights")
    if weights:
        data["mixture"] = {**data["mixture"], "weights": {key: value for key, value in weights.items() if key != name}}


def _source(said: Mapping[str, Any]) -> str | None:
    """The model or adapter that a recipe's expert names."""
    return said.get("model") or said.get("adapter")


def _list(checkpoint: Checkpoint) -> str:
    return ", ".join(checkpoint.names)


def _parsed(data: dict[str, Any], checkpoint: Checkpoint) -> Recipe:
    """The new recipe, in the shape that the checkpoint has. Raises RecipeError."""
    return checkpoint.shape.pinned(parse_recipe(data, where=str(checkpoint.folder)))


def _change(what: Literal["add", "remove", "replace", "rename"], name: str, **said: str | None) -> Change:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Change(what=what, expert=name, on=today, was=said.get("was"), source=said.get("source"))
