"""Experts come and go: add, remove or replace one of a finished mixture.

    OUT + change -> recipe as it is to be -> two plans over the same models -> what OUT has is taken from it -> build

What comes out is what a build of the new recipe gives, byte for byte, but for what a training made of OUT, which stays. Files
that do not change are linked, not copied; of the experts' models only the new one's is read. The router is set anew from the
kept statistics, so that the text of the experts that stay is not needed.

OUT gives way to the new mixture by one rename, or stays beside it. Experts' models may be gone: a full model has names and
shapes of its base, and what an adapter changes, the mixture's own tensors say, but for the ranks that a plain mixture carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from modekit.building.build import build
from modekit.building.update import CheckpointUpdate
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.sources import changed_settings, changed_weights
from modekit.errors import CheckpointError, ModekitError, RecipeError, SourceError, some_of
from modekit.files.read import UNREADABLE
from modekit.members.edits import MixtureEdit
from modekit.planning.make import plan_over
from modekit.planning.plan import Plan
from modekit.planning.reuse import Origins, reusing
from modekit.planning.shape import unread
from modekit.recipes.recipe import Expert, label_of
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.open import Opener
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import copied_content, copied_files, gone_pair_files


def write_change(checkpoint: Checkpoint, edit: MixtureEdit, out: Path, *, run: Run = QUIET) -> Checkpoint:
    """Write the mixture that the edit gives: in the checkpoint's place when `out` is its folder, else beside it.

    Raises SourceError (the base is gone, or what is needed of an expert that is; a model that changed), MismatchError or
    UnsupportedError for a new expert that does not fit, TextError where statistics and text are gone, OutputError,
    CheckpointError when another command changed the mixture meanwhile. Then nothing has changed.
    """
    before = before_change(checkpoint, edit, run=run)
    return build(before.plan, out, update=before, run=run)


def before_change(checkpoint: Checkpoint, edit: MixtureEdit, *, refits: bool = False, run: Run = QUIET) -> CheckpointUpdate:
    """The change, planned: nothing is written. `refits`: the router is set anew even where it was trained. Raises as above."""
    record = checkpoint.record
    opener = Opener(checkpoint.recipe_root, run)
    base = opener.base(record.recipe)
    _check_base(checkpoint, base, run)
    new = {
        place: opener.expert(place, expert, base)
        for place, (expert, origin) in enumerate(zip(edit.recipe.experts, edit.origins, strict=True))
        if origin is None
    }
    _check_is_another(checkpoint, edit, new, run)
    experts = list(enumerate(record.recipe.experts))
    recorded = [recorded_model(label_of(number, expert), expert, base, checkpoint, number) for number, expert in experts]
    opened = [opened_expert(checkpoint, opener, number, base) for number, _ in experts]
    known = [own or said for own, said in zip(opened, recorded, strict=True)]
    for old in (known, recorded):  # where a model is another under the same settings, the mixture may say enough of it
        before = _plan_of_what_is_there(checkpoint, (base, *old), run)
        planned = None if before is None else _planned(checkpoint, edit, before, new, run)
        merges = record.recipe.mixture.backbone != BASE and any(isinstance(each, AdapterSource) for each in old)
        lacks = planned is None or _reads_recorded_model(planned.plan) or (merges and (None in opened or old is recorded))
        if planned is not None and not lacks:
            return replace(planned, refits=refits)
    raise _lacking(checkpoint, [number for number, own in enumerate(opened) if own is None])


def opened_expert(checkpoint: Checkpoint, opener: Opener, number: int, base: ModelSource) -> ModelSource | None:
    """The model of an expert, if it is where it was with the settings that it had; its weights are looked at where they are
    read (building/build.py).
    """
    record = checkpoint.record
    source = record.sources[record.expert_sources[number]]
    expert = record.pinned_recipe.experts[number]
    folder = checkpoint.source_folder(source)
    with suppress(ModekitError, OSError):
        if folder.is_dir() and not changed_settings(source, folder):
            return opener.expert(number, expert, base)
    return None


def _plan_of_what_is_there(checkpoint: Checkpoint, sources: tuple[ModelSource, ...], run: Run) -> Plan | None:
    """The plan of the mixture that is there over models; None where they give other tensors, or another config."""
    try:
        plan = plan_over(checkpoint.record.recipe, checkpoint.recipe_root, sources, run=run)
    except ModekitError:
        return None
    there = {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    differs = (each for each in there.keys() | planned.keys() if there.get(each) != planned.get(each))
    same = set(checkpoint.shape.left_out).issuperset(differs) and dict(plan.shape.config) == dict(checkpoint.config)
    return plan if same else None


def _planned(
    checkpoint: Checkpoint, edit: MixtureEdit, before: Plan, new: Mapping[int, ModelSource], run: Run
) -> CheckpointUpdate:
    """The change over the models of the mixture that is there, and the new ones."""
    base, *old = before.vocabulary.given if before.vocabulary is not None else before.sources
    sources = [base]
    for place, (expert, origin) in enumerate(zip(edit.recipe.experts, edit.origins, strict=True)):
        stays = base if origin is None or expert.is_base else replace(old[origin], label=label_of(place, expert))
        sources.append(new.get(place, stays))
    after = plan_over(edit.recipe, checkpoint.recipe_root, tuple(sources), run=run)
    if after.shape.native_type != checkpoint.shape.native_type:
        raise RecipeError(
            "with this expert the mixture would need another architecture",
            where=str(checkpoint.folder),
            found=f"{checkpoint.config['model_type']} now, {after.config['model_type']} then: {after.why}",
            remedy="give the expert in the form of the others (as: full or lora), or build the new recipe",
        )
    planned = reusing(checkpoint.folder, checkpoint.tensors, before, after, edit.origins)
    names = {} if planned.reused is None else planned.reused.names
    _check_training_stays(checkpoint, names, edit.origins, before)
    return CheckpointUpdate(checkpoint, planned, edit.origins, _statistics(edit, planned, names), edit.change)


def _reads_recorded_model(plan: Plan) -> bool:
    """Whether something is needed of a model that is only known by what the mixture says of it."""
    kept = () if plan.reused is None else plan.reused.model.files
    refs = (ref for tensor in plan.tensors for ref in tensor.made.refs)
    return any(ref.state is None and ref.file not in kept for ref in refs)


def _lacking(checkpoint: Checkpoint, numbers: Sequence[int]) -> SourceError | CheckpointError:
    """Why the mixture that is there, and what of it goes over, cannot be planned; `numbers` of experts without their model."""
    record = checkpoint.record
    given = checkpoint.with_recipe(record.recipe).config
    differs = sorted(key for key in {*given, *checkpoint.config} if given.get(key) != checkpoint.config.get(key))
    if differs:
        return CheckpointError(
            "config.json is not what the recipe in modekit.json gives",
            where=str(checkpoint.folder),
            found=f"another {some_of(differs)}",
            remedy="put it back, or set the router again with `modekit fit`",
        )
    labels = [label_of(number, record.recipe.experts[number]) for number in numbers]
    return SourceError(
        "an expert's model is missing or has changed since the mixture was built, and this change needs it",
        where=some_of(labels) or str(checkpoint.folder),
        found=some_of([checkpoint.source_folder(record.sources[record.expert_sources[number]]) for number in numbers]) or None,
        remedy="put back what it was, or build the mixture again (docs/experts.md)",
    )


def _check_is_another(checkpoint: Checkpoint, edit: MixtureEdit, new: Mapping[int, ModelSource], run: Run) -> None:
    """Raise RecipeError when the model that is to take an expert's place is the one that is there, byte for byte."""
    record = checkpoint.record
    if edit.change.what != "replace" or edit.recipe.digest() != record.recipe_digest:
        return
    ((place, source),) = new.items()
    if changed_weights(record.sources[record.expert_sources[place]], source.folder, run) is None:
        raise RecipeError(
            "this very model exists in its place already",
            where=str(checkpoint.folder),
            found=f"{edit.change.expert}: {edit.change.source}",
            remedy="name another model or text",
        )


def _check_base(checkpoint: Checkpoint, base: ModelSource, run: Run) -> None:
    """Raise SourceError when the base is no longer the one that the mixture and its statistics were made with."""
    record = checkpoint.record
    file = changed_settings(record.sources[0], base.folder) or changed_weights(record.sources[0], base.folder, run)
    if file := file or _changed_tokenizer(checkpoint, base):
        raise SourceError(
            "the base model is not the one that the mixture was built with",
            where=str(base.folder),
            found=f"{file} is another, or gone",
            remedy="put it back, or build the mixture again",
        )


def _changed_tokenizer(checkpoint: Checkpoint, base: ModelSource) -> str | None:
    """The first file that the mixture has of its base's tokenizer, and that is another there now."""
    tokens = checkpoint.record.tokens
    if tokens is not None and tokens.tokenizer != 0:
        return None
    copied = copied_files(base.folder, where=base.where)
    for file in copied:
        same = tokens is not None and file.name in tokens.written
        with suppress(*UNREADABLE):
            same = same or copied_content(file) == copied_content(checkpoint.folder / file.name)
        if not same:
            return file.name
    return next(iter(gone_pair_files(checkpoint.folder, copied)), None)


def _check_training_stays(checkpoint: Checkpoint, names: Mapping[str, str], origins: Origins, before: Plan) -> None:
    """Raise CheckpointError when a tensor that a training moved would be made anew from the sources."""
    gone = set(range(before.shape.experts)) - set(origins)
    of_gone = {tensor.name for shard in before.shards for tensor in shard.tensors if tensor.expert in gone}
    lost = sorted(checkpoint.record.trained.keys() - set(names.values()) - of_gone)
    if lost:
        raise CheckpointError(
            "the mixture was trained, and this change would undo that",
            where=str(checkpoint.folder),
            found=f"{len(lost)} tensors depend on who is in the mixture, first {lost[0]}",
            remedy="build the new recipe, and train it",
        )


def _statistics(edit: MixtureEdit, plan: Plan, names: Mapping[str, str]) -> frozenset[str]:
    """Experts of the new mixture whose kept statistics are still their own.

    What was read through another backbone is not of this one.
    """
    fit = edit.recipe.mixture.fit
    backbone = {tensor.name for tensor in plan.tensors if tensor.role == "backbone"}
    if fit is not None and not fit.reads_ids and not backbone <= names.keys():
        return frozenset()
    pairs = zip(edit.recipe.names, edit.origins, strict=True)
    return frozenset(edit.keeps_text).union(name for name, origin in pairs if origin is not None)


def recorded_model(label: str, expert: Expert, base: ModelSource, checkpoint: Checkpoint, number: int) -> ModelSource:
    """What is known of expert `number` of a checkpoint; reading a tensor of it raises SourceError."""
    record = checkpoint.record
    recorded = record.sources[record.expert_sources[number]]
    folder = checkpoint.source_folder(recorded)
    file = folder / next(iter(recorded.files), "model.safetensors")
    if expert.is_base:
        return base
    if expert.adapter is None:
        tensors = {name: unread(name, file, ref.dtype, ref.shape) for name, ref in base.tensors.items()}
        return ModelSource(label, recorded.spec, folder, recorded.revision, base.config, tensors)
    replaced, changes = checkpoint.shape.recorded(number, base, checkpoint.tensors, file)
    nothing = {"": unread("", file, "U8", (0,))}  # so that its file is known
    return AdapterSource(label, recorded.spec, folder, recorded.revision, {}, nothing, changes, replaced)
