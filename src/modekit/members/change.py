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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from modekit.building.before import Before
from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import Change
from modekit.errors import CheckpointError, RecipeError, SourceError
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.members.gone import stand_in
from modekit.planning.copied_files import copied_files
from modekit.planning.kept import Origins, taking_from
from modekit.planning.make import COPIED_FILES, plan_of
from modekit.planning.plan import Plan
from modekit.recipes.edit import as_written
from modekit.recipes.paths import locate
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Expert, Recipe
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.contents import blake3_of
from modekit.sources.model import ModelSource
from modekit.sources.open import Opener, label_of

_FEWEST = 2


@dataclass(frozen=True)
class NewExpert:
    """A model or adapter, by path or hub id, and its text; paths are relative to `root`.

    Attributes:
        as_, rank: as an expert of a recipe says them; None for what its default is, or the replaced expert's.
        weight: its share where a linear mixture has given weights.
    """

    model: str | None = None
    adapter: str | None = None
    text: Sequence[str] = ()
    as_: str | None = None
    rank: int | None = None
    revision: str | None = None
    weight: float | None = None
    root: Path = field(default_factory=Path)

    def said(self, folder: Path) -> dict[str, Any]:
        """As a recipe in `folder` says it."""
        models = {"model": self.model, "adapter": self.adapter}
        said: dict[str, Any] = {key: self._moved(spec, folder) for key, spec in models.items() if spec is not None}
        if self.text:
            said["text"] = [self._moved(spec, folder) for spec in self.text]
        plain = {"as": self.as_, "rank": self.rank, "revision": self.revision}
        return said | {key: value for key, value in plain.items() if value is not None}

    def _moved(self, spec: str, folder: Path) -> str:
        found = locate(spec, self.root)
        if spec == BASE or found is None or Path(spec).expanduser().is_absolute():
            return spec
        relative = os.path.relpath(self.root / spec, folder)
        return relative if relative.startswith("..") else f"./{relative}"


def new_expert(said: Mapping[str, Any], root: Path) -> NewExpert:
    """What a recipe in `root` says of an expert."""
    texts = said.get("text") or ()
    return NewExpert(
        said.get("model"), said.get("adapter"), (texts,) if isinstance(texts, str) else tuple(texts), said.get("as"),
        said.get("rank"), said.get("revision"), root=root,
    )  # fmt: skip


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
    said = new.said(checkpoint.recipe_root)
    data["experts"] = [*data["experts"], {"name": name, **said}]
    weights = checkpoint.record.recipe.mixture.weights
    if weights is not None:
        if new.weight is None:
            raise RecipeError(
                "the mixture's weights are given, and the new expert has none", where="mixture.weights",
                found=", ".join(f"{key} {value:g}" for key, value in weights.items()), remedy="pass --weight",
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
    _without_weight(data, name)
    origins = [other for other in range(len(checkpoint.names)) if other != number]
    return Wanted(_parsed(data, checkpoint), origins, _change("remove", name, was=_source(gone)))


def replacing(checkpoint: Checkpoint, name: str, new: NewExpert) -> Wanted:
    """With another model for an expert, in its place; it keeps its text unless there is other text."""
    number = _number(checkpoint, name)
    data = as_written(checkpoint.record.recipe)
    old = data["experts"][number]
    said = new.said(checkpoint.recipe_root)
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
    """The change, planned: nothing is written. Raises as `write_change`."""
    root, recipe = checkpoint.recipe_root, wanted.recipe
    opener = Opener(root, run)
    old_sources = _sources_of(checkpoint, opener)
    _check_tokenizer(checkpoint, old_sources[0])
    sources = (old_sources[0], *_new_sources(wanted, old_sources, opener))
    _check_is_another(checkpoint, wanted, sources)
    before, after = (
        plan_of(said, root, models, run=run) for said, models in ((checkpoint.record.recipe, old_sources), (recipe, sources))
    )
    _check_shape(checkpoint, after)
    taken = taking_from(checkpoint.folder, checkpoint.tensors, before, after, wanted.origins)
    _check_can_be_read(taken.plan)
    _check_training_stays(checkpoint, taken.names, wanted.origins, before)
    statistics = _statistics(checkpoint, wanted)
    return Before(checkpoint, taken.plan, wanted.origins, taken.names, statistics, wanted.change, wanted.refits)


def _sources_of(checkpoint: Checkpoint, opener: Opener) -> tuple[ModelSource, ...]:
    """The base, and every expert's model, or what is known of one that is gone."""
    recipe = checkpoint.record.recipe
    base = opener.base(recipe)

    def opened(number: int, expert: Expert) -> ModelSource:
        try:
            return opener.expert(number, expert, base)
        except SourceError:
            return stand_in(label_of(number, expert), expert, base, checkpoint, number)

    return (base, *(opened(number, expert) for number, expert in enumerate(recipe.experts)))


def _new_sources(wanted: Wanted, old: Sequence[ModelSource], opener: Opener) -> Sequence[ModelSource]:
    """Of the experts as they are to be: a label says the place in the recipe."""
    base, found = old[0], []
    for place, (expert, origin) in enumerate(zip(wanted.recipe.experts, wanted.origins, strict=True)):
        if origin is None:
            found.append(opener.expert(place, expert, base))
        else:
            found.append(base if expert.is_base else replace(old[1 + origin], label=label_of(place, expert)))
    return found


def _check_is_another(checkpoint: Checkpoint, wanted: Wanted, sources: Sequence[ModelSource]) -> None:
    """Raise RecipeError when the model that is to take an expert's place is the one that is there, byte for byte."""
    record = checkpoint.record
    if wanted.change.what != "replace" or wanted.recipe.digest() != record.recipe_digest:
        return
    place = wanted.origins.index(None)
    known = record.sources[record.expert_sources[place]].files
    if {file.name: blake3_of(file) for file in sources[1 + place].files} == {name: file.blake3 for name, file in known.items()}:
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


def _check_tokenizer(checkpoint: Checkpoint, base: ModelSource) -> None:
    """Raise SourceError when the base's tokenizer is no longer the one that the mixture and its statistics were made with."""
    for file in copied_files(base.folder, COPIED_FILES, where=f"base_model ({base.spec})"):
        try:
            same = read_bytes(file, LARGE) == read_bytes(checkpoint.folder / file.name, LARGE)
        except UNREADABLE:
            same = False
        if not same:
            raise SourceError(
                "the base model's tokenizer or settings are not those that the mixture was built with", where=str(file),
                found=f"another file than {checkpoint.folder / file.name}", remedy="put it back, or build the mixture anew",
            )  # fmt: skip


def _check_can_be_read(plan: Plan) -> None:
    """Raise SourceError when something is needed of an expert whose model is gone."""
    for tensor in plan.tensors:
        for piece in tensor.pieces:
            model = plan.models[piece.source]
            if any(ref.state is None and not ref.file.exists() for ref in piece.refs):
                raise SourceError(
                    "an expert's model is gone, and this change needs it", where=f"{model.label} ({model.spec}): {tensor.name}",
                    found=f"nothing at {model.folder}", remedy="put it back there: what it gave lies in one tensor with others",
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


def _statistics(checkpoint: Checkpoint, wanted: Wanted) -> dict[str, str]:
    """Expert of the new mixture -> expert of the checkpoint whose statistics are its own.

    What was read through a backbone that is merged of the experts is not of the new one.
    """
    mixture = wanted.recipe.mixture
    if mixture.merge is not None and mixture.fit is not None and mixture.fit.reads != "tokens":
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
