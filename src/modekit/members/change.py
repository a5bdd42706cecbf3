"""Experts come and go: add, remove or replace one of a finished mixture.

    OUT + change -> recipe as it is to be -> two plans over the same models -> what OUT has is taken from it -> build

What comes out is what a build of the new recipe gives, byte for byte, but for what a training made of OUT, which stays. Files
that do not change are linked, not copied; of the experts' models only the new one's is read. The router is set anew from the
kept statistics, so that the text of the experts that stay is not needed.

OUT gives way to the new mixture by one rename, or stays beside it. Experts' models may be gone: a full model has names and
shapes of its base, and what an adapter changes, the mixture's own tensors say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from modekit.building.build import build
from modekit.building.update import CheckpointUpdate
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import MixtureRecord
from modekit.checkpoint.sources import changed_settings, changed_weights
from modekit.errors import CheckpointError, ModekitError, RecipeError, SourceError
from modekit.files.read import UNREADABLE
from modekit.members.edits import MixtureEdit
from modekit.planning.make import plan_of
from modekit.planning.modekit_shape import KEYS
from modekit.planning.plan import Plan
from modekit.planning.reuse import Origins, reusing
from modekit.planning.shape import LowRankPart, MixedTensor
from modekit.recipes.recipe import Expert
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource, Change, LowRank
from modekit.sources.contents import blake3_of
from modekit.sources.families import family_of
from modekit.sources.model import ModelSource, TensorRef
from modekit.sources.names import SOFT_PREFIX, module_of
from modekit.sources.open import Opener, label_of
from modekit.sources.prefix import TENSOR, SoftPrefix
from modekit.sources.tokenizer import PAIR_FILES, copied_content, copied_files, gone_pair_files


def write_change(checkpoint: Checkpoint, edit: MixtureEdit, out: Path, *, run: Run = QUIET) -> Checkpoint:
    """Write the mixture that the edit gives: in the checkpoint's place when `out` is its folder, else beside it.

    Raises SourceError (the base is gone, or what is needed of an expert that is; a model that changed), MismatchError or
    UnsupportedError for a new expert that does not fit, TextError where statistics and text are gone, OutputError,
    CheckpointError when another command changed the mixture meanwhile. Then nothing has changed.
    """
    before = before_change(checkpoint, edit, run=run)
    return build(before.plan, out, update=before, run=run)


def before_change(checkpoint: Checkpoint, edit: MixtureEdit, *, run: Run = QUIET) -> CheckpointUpdate:
    """The change, planned: nothing is written. Raises as `write_change`.

    Of experts that stay the mixture says what there is to know; their models are opened only where something is made of them
    again.
    """
    opener = Opener(checkpoint.recipe_root, run)
    base = opener.base(checkpoint.record.recipe)
    _check_base(checkpoint, base, run)
    new = {
        place: opener.expert(place, expert, base)
        for place, (expert, origin) in enumerate(zip(edit.recipe.experts, edit.origins, strict=True))
        if origin is None
    }
    _check_is_another(checkpoint, edit, new)
    experts = list(enumerate(checkpoint.record.recipe.experts))
    said = [base, *(recorded_model(label_of(number, expert), expert, base, checkpoint, number) for number, expert in experts)]

    def opened() -> list[ModelSource]:
        stay = [number in edit.origins for number, _ in experts]
        return [
            base,
            *(
                _opened(checkpoint, opener, n, e, base) if stay[n] else _leaving(checkpoint, opener, n, said)
                for n, e in experts
            ),
        ]

    if not records_dtypes(checkpoint):  # of adapters: their models do, where they are there
        with suppress(SourceError):
            before = _planned(checkpoint, edit, opened(), new, run)
            if before is not None:
                return before
    before = _planned(checkpoint, edit, said, new, run)
    if before is not None and not (_merges_adapters(checkpoint, edit) or _reads_recorded_model(before.plan)):
        return before
    before = _planned(checkpoint, edit, opened(), new, run)
    if before is None:
        _check_routes_as_said(checkpoint)
        raise SourceError(
            "the models are not those that the mixture was built from",
            where=str(checkpoint.folder),
            found="other settings, ranks or scales than the mixture has",
            remedy="put back what they were, or build the mixture again",
        )
    return before


def _opened(checkpoint: Checkpoint, opener: Opener, number: int, expert: Expert, base: ModelSource) -> ModelSource:
    """The model of an expert that stays, of which something is needed. Raises SourceError that says so.

    Its settings are looked at here, its weights where they are read (building/inspector.py).
    """
    try:
        source = opener.expert(number, expert, base)
    except SourceError as error:
        raise SourceError(
            "an expert's model is missing, and this change needs it",
            where=label_of(number, expert),
            found=error.found,
            remedy="put it back: with this change something that it gave takes another form (docs/experts.md)",
        ) from None
    changed = changed_settings(checkpoint.record.sources[checkpoint.record.expert_sources[number]], source.folder)
    if changed:
        raise SourceError(
            "a model has changed since the mixture was built, and something of it is needed again",
            where=f"{label_of(number, expert)}: {source.folder / changed[0]}",
            remedy="put back what it was, or build the mixture again",
        )
    return source


def _leaving(checkpoint: Checkpoint, opener: Opener, number: int, said: Sequence[ModelSource]) -> ModelSource:
    """The model of an expert that goes: what the mixture says of it, unless it gave rows, which its own files alone tell."""
    if checkpoint.record.tokens is not None:
        with suppress(SourceError):
            return _opened(checkpoint, opener, number, checkpoint.record.recipe.experts[number], said[0])
    return said[1 + number]


def _planned(
    checkpoint: Checkpoint, edit: MixtureEdit, old: Sequence[ModelSource], new: Mapping[int, ModelSource], run: Run
) -> CheckpointUpdate | None:
    """The change over these models of the experts that were there; None where they do not give the mixture that is there."""
    root, recipe = checkpoint.recipe_root, edit.recipe
    base, sources = old[0], [old[0]]
    for place, (expert, origin) in enumerate(zip(recipe.experts, edit.origins, strict=True)):
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
    planned = reusing(checkpoint.folder, checkpoint.tensors, before, after, edit.origins)
    names = {} if planned.reused is None else planned.reused.names
    _check_training_stays(checkpoint, names, edit.origins, before)
    statistics = _statistics(edit, planned, names)
    return CheckpointUpdate(checkpoint, planned, edit.origins, statistics, edit.change, edit.refits)


def _is_what_is_there(checkpoint: Checkpoint, before: Plan) -> bool:
    """Whether a plan gives the mixture that is there: its tensors and its config."""
    there = {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in before.tensors}
    left_out = set(checkpoint.shape.left_out)
    differs = (each for each in there.keys() | planned.keys() if there.get(each) != planned.get(each))
    return left_out.issuperset(differs) and dict(before.config) == dict(checkpoint.config)


def _reads_recorded_model(plan: Plan) -> bool:
    """Whether something is needed of a model that is only known by what the mixture says of it."""
    kept = () if plan.reused is None else plan.reused.model.files
    refs = (ref for tensor in plan.tensors for ref in tensor.made.refs)
    return any(ref.state is None and ref.file not in kept for ref in refs)


def _merges_adapters(checkpoint: Checkpoint, edit: MixtureEdit) -> bool:
    """Whether a backbone is merged anew to which adapters give what no tensor of the mixture tells."""
    recipe = checkpoint.record.recipe
    adapters = any(expert.adapter is not None for expert in recipe.experts)
    return adapters and recipe.mixture.backbone != BASE


def _check_is_another(checkpoint: Checkpoint, edit: MixtureEdit, new: Mapping[int, ModelSource]) -> None:
    """Raise RecipeError when the model that is to take an expert's place is the one that is there, byte for byte."""
    record = checkpoint.record
    if edit.change.what != "replace" or edit.recipe.digest() != record.recipe_digest:
        return
    ((place, source),) = new.items()
    known = record.sources[record.expert_sources[place]].files
    if {file.name: blake3_of(file) for file in source.files} == {name: file.blake3 for name, file in known.items()}:
        raise RecipeError(
            "this very model exists in its place already",
            where=str(checkpoint.folder),
            found=f"{edit.change.expert}: {edit.change.source}",
            remedy="name another model or text",
        )


def _check_shape(checkpoint: Checkpoint, after: Plan) -> None:
    """Raise RecipeError when the new mixture would lie in another architecture."""
    if after.shape.native_type != checkpoint.shape.native_type:
        raise RecipeError(
            "with this expert the mixture would need another architecture",
            where=str(checkpoint.folder),
            found=f"{checkpoint.config['model_type']} now, {after.config['model_type']} then: {after.why}",
            remedy="give the expert in the form of the others (as: full or lora), or build the new recipe",
        )


def _check_routes_as_said(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when an older version wrote another way of routing for this recipe than this one does."""
    if checkpoint.with_recipe(checkpoint.record.recipe).config != checkpoint.config:
        raise CheckpointError(
            "config.json routes in another way than the recipe in modekit.json",
            where=str(checkpoint.folder),
            found="another way, as older versions of modekit wrote it",
            remedy="set the router again with modekit fit OUT",
        )


def _check_base(checkpoint: Checkpoint, base: ModelSource, run: Run) -> None:
    """Raise SourceError when the base is no longer the one that the mixture and its statistics were made with."""
    folder, record = checkpoint.folder, checkpoint.record
    dense = family_of(base.config, where=f"base_model ({base.spec})").dense_config(base.config)
    is_other = bool(changed_settings(record.sources[0], base.folder)) if record.tokens else dense != record.dense_config
    differs = "config.json is another" if is_other else ""
    if not differs and changed_weights(record.sources[0], base.folder, run):
        differs = "its weights are others"
    copied = copied_files(base.folder, where=f"base_model ({base.spec})") if not differs and _has_its_tokens(record) else ()
    gone = gone_pair_files(folder, copied) if not differs and _has_its_tokens(record) else []
    differs = f"{gone[0]} is gone" if gone else differs
    for file in copied:
        if record.tokens is not None and file.name in record.tokens.written:
            continue
        if file.name in PAIR_FILES and not (folder / file.name).exists():  # of an older version: it gets them now
            continue
        try:
            same = copied_content(file) == copied_content(folder / file.name)
        except UNREADABLE:
            same = False
        differs = differs if same else f"{file.name} is another"
    if differs:
        raise SourceError(
            "the base model is not the one that the mixture was built with",
            where=str(base.folder),
            found=differs,
            remedy="put it back, or build the mixture again",
        )


def _has_its_tokens(record: MixtureRecord) -> bool:
    """Whether the mixture's tokenizer is the base model's."""
    return record.tokens is None or record.tokens.tokenizer == 0


def _check_training_stays(checkpoint: Checkpoint, names: Mapping[str, str], origins: Origins, before: Plan) -> None:
    """Raise CheckpointError when a tensor that a training moved would be made anew from the sources."""
    gone = set(range(before.experts)) - set(origins)
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
    if fit is not None and not fit.reads.tokens and not backbone <= names.keys():
        return frozenset()
    pairs = zip(edit.recipe.names, edit.origins, strict=True)
    return frozenset(edit.keeps_text).union(name for name, origin in pairs if origin is not None)


def recorded_model(label: str, expert: Expert, base: ModelSource, checkpoint: Checkpoint, number: int) -> ModelSource:
    """What is known of expert `number` of a checkpoint; reading a tensor of it raises SourceError."""
    record = checkpoint.record
    recorded = record.sources[record.expert_sources[number]]
    folder = checkpoint.source_folder(recorded)
    file = folder / next(iter(recorded.files), "model.safetensors")
    if expert.adapter is None:
        tensors = {name: _ref(name, file, ref.dtype, ref.shape) for name, ref in base.tensors.items()}
        return ModelSource(label, recorded.spec, folder, recorded.revision, base.config, tensors)
    mixed = list(checkpoint.shape.mixed_tensors(checkpoint.tensors))
    replaced = {
        each.name: _ref(each.name, file, base.tensor(each.name).dtype, each.shape)
        for each in mixed
        if number in each.own and not each.holds_changes
    }
    before = [each for each in mixed if number in each.own and module_of(each.name).endswith(f".{SOFT_PREFIX}")]
    added = {module_of(each.name): each for each in mixed if number in each.own and each.holds_changes and each not in before}
    changes: dict[str, Change] = {
        each.name: _low_rank(each.name, each.low_rank[number], added.get(module_of(each.name)), file)
        for each in mixed
        if number in each.low_rank
    }
    nothing = {"": _ref("", file, "U8", (0,))}  # so that its file is known
    prefix = _prefix(before, file) if before else None
    return AdapterSource(label, recorded.spec, folder, recorded.revision, {}, nothing, changes, {}, replaced, prefix=prefix)


def _prefix(kept: Sequence[MixedTensor], file: Path) -> SoftPrefix:
    """Of what the checkpoint has of it in every layer, or of a prompt in one."""
    layers = len(kept) if kept[0].name.endswith(KEYS) else 0
    tokens, width = kept[0].shape
    dtype = next(iter(kept[0].own.values())).ref.dtype
    return SoftPrefix(_ref(TENSOR, file, dtype, (tokens, width * max(layers, 1))), layers)


def records_dtypes(checkpoint: Checkpoint) -> bool:
    """Whether the mixture tells in which dtype its adapters were: where they had several, all of them lie in float32."""
    mixed = checkpoint.shape.mixed_tensors(checkpoint.tensors)
    wide = any(part.a.dtype == "F32" for each in mixed for part in each.low_rank.values())
    return not wide or checkpoint.config["dtype"] == "float32"


def _low_rank(name: str, part: LowRankPart, added: MixedTensor | None, file: Path) -> LowRank:
    rank = part.ranks.stop - part.ranks.start
    bias = None if added is None else _ref(f"{name} bias", file, next(iter(added.own.values())).ref.dtype, added.shape)
    return LowRank(
        _ref(f"{name} A", file, part.a.dtype, (rank, part.a.shape[1])),
        _ref(f"{name} B", file, part.b.dtype, (part.b.shape[0], rank)),
        part.scale,
        bias=bias,
    )


def _ref(name: str, file: Path, dtype: str, shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(name, file, dtype, shape, 0, 0)
