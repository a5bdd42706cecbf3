"""Recipe and headers -> every tensor of the result and where each comes from.

Reads configs and headers, never a tensor, and does not import torch. Whatever cannot work is refused here, before a
byte is written. How the experts lie in a native architecture says native.py, in the modekit architecture modekit.py; what
both share is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from modekit.errors import SourceError, UnsupportedError
from modekit.planning.modekit import ModekitLayout
from modekit.planning.native import NativeLayout
from modekit.planning.notes import notes_of, twins
from modekit.planning.plan import Plan
from modekit.planning.prefixes import check_prefixes
from modekit.planning.tensors import CodeOf, PlannedTensor, as_in, cut_into_shards
from modekit.recipes.auto import choices
from modekit.recipes.edit import with_following
from modekit.recipes.mixture import BackboneExpert
from modekit.recipes.recipe import Recipe
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.compatibility import check_mixable, own_names
from modekit.sources.families import family_of
from modekit.sources.family import Family
from modekit.sources.kept import check_kept, kept_beside, processor_files
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef
from modekit.sources.names import natural_key
from modekit.sources.native import choose_native
from modekit.sources.open import open_recipe_sources
from modekit.sources.tokenizer import TOKENIZER_FILES
from modekit.sources.vocabulary import one_vocabulary
from modekit.weights.made import Copy, Made, Merge

_TO_SAFETENSORS = {name: code for code, name in DTYPE_NAMES.items()}
Layout = NativeLayout | ModekitLayout
"""How the experts of one recipe lie in one shape of result."""


def make_plan(recipe: Recipe, root: Path, *, run: Run = QUIET, headers_only: bool = False) -> Plan:
    """Resolve a recipe into a plan. `root` is the folder that the recipe's paths are relative to.

    The plan's recipe says the decay where its default depends on the base (`following_chats`). Of models on the hub those
    weight files are downloaded that a build reads; with `headers_only` none: such a plan can be shown but not built.

    Raises SourceError, MismatchError or UnsupportedError before anything is written.
    """
    plan = following_chats(plan_of(recipe, root, open_recipe_sources(recipe, root, run=run, headers_only=True), run=run), run)
    return plan if headers_only else _downloaded(plan, run)


def make_plan_again(recipe: Recipe, root: Path, *, run: Run = QUIET) -> Plan:
    """The same for the recipe of a mixture that is there: what that does not say is what it was in older versions."""
    return _downloaded(plan_of(recipe, root, open_recipe_sources(recipe, root, run=run, headers_only=True), run=run), run)


def following_chats(plan: Plan, run: Run) -> Plan:
    """The plan with a decay that follows a change of subject, where its router is fitted on chats and its recipe says none.

    What cannot say that older tokens fade keeps its mean.
    """
    known, channels = plan.vocabulary, plan.shape.channels
    if known is None or not known.tokenizer.has_template or (channels is not None and channels.decays == (1.0,)):
        return plan
    recipe = with_following(plan.recipe)
    return plan if recipe == plan.recipe else plan_of(recipe, plan.root, known.given, run=run)


def _downloaded(plan: Plan, run: Run) -> Plan:
    """The plan over models on the hub whose files that a build reads are on this disk."""
    on_hub = [source for source in dict.fromkeys(plan.sources) if source.revision is not None]
    if not on_hub:
        return plan
    from modekit.sources.hub import fetch  # its import takes longer than a whole local plan

    for source in on_hub:
        fetch(source, plan.read_files.intersection(source.files), run=run)
    pinned = plan.recipe.at(*(source.revision for source in plan.sources))
    return plan_of(plan.recipe, plan.root, open_recipe_sources(pinned, plan.root, run=run, headers_only=True), run=run)


def plan_of(recipe: Recipe, root: Path, sources: tuple[ModelSource, ...], *, run: Run = QUIET) -> Plan:
    """The same over models that are open: the base's, then each expert's. A router left open becomes the best they allow."""
    if recipe.mixture.is_open:
        return _plan_of_open(recipe, root, sources, run)
    base = sources[0]
    family = family_of(base.config, where=f"base_model ({base.spec})")
    sources = _with_sizes(sources, family)
    check_mixable(sources, family)
    check_prefixes(recipe, sources)
    vocabulary = one_vocabulary(sources, family, recipe.mixture.tokens or "mean")
    _check_text(recipe, vocabulary.tokenizer.source)
    sources = vocabulary.sources
    code_of = partial(_code_of, recipe.output.dtype)
    native, why = _native_layout(recipe, sources, family, code_of)
    layout: Layout = native or ModekitLayout(recipe, sources, family, code_of)
    mixed, shape = layout.mixed_names(), layout.shape(str(root))
    tensors = [*_backbone(recipe, sources, family, layout, mixed, code_of), *layout.tensors()]
    tensors += _kept(sources, code_of) if recipe.output.keep is not None else ()
    notes = notes_of(recipe, vocabulary, family, layout.mixes_more, mixed | layout.carried_names())
    return Plan(
        recipe,
        root,
        family,
        shape,
        why,
        sources,
        cut_into_shards(sorted(tensors, key=lambda tensor: natural_key(tensor.name)), recipe.output.shard_size),
        layout.router_dtype,
        (*vocabulary.tokenizer.copied_files, *(processor_files(base, run) if recipe.output.keep is not None else ())),
        (*vocabulary.notes, *notes, *layout.notes(), *twins(recipe, sources)),
        run.trust_remote_code,
        vocabulary=vocabulary,
    )


def _plan_of_open(recipe: Recipe, root: Path, sources: tuple[ModelSource, ...], run: Run) -> Plan:
    """Of the first of the choices that the models allow. Raises what the last one raises."""
    for settled, way in (ways := choices(recipe))[:-1]:
        with suppress(UnsupportedError):
            plan = plan_of(settled, root, sources, run=run)
            if way.native in (None, plan.shape.plain):
                return plan
    return plan_of(ways[-1][0], root, sources, run=run)


def _with_sizes(sources: tuple[ModelSource, ...], family: Family) -> tuple[ModelSource, ...]:
    """Models of a family without a row with their sizes under the usual names, too; what was one stays one."""
    if family.derived is None:
        return sources
    full = {id(each): each if isinstance(each, AdapterSource) else _with_own_sizes(each) for each in sources}
    return tuple(full[id(each)] for each in sources)


def _with_own_sizes(source: ModelSource) -> ModelSource:
    family = family_of(source.config, where=f"{source.label} ({source.spec})")
    return replace(source, config=family.with_sizes(source.config), on_disk=source.on_disk or source.config)


def _code_of(dtype: str, ref: TensorRef) -> str:
    return ref.source_dtype if dtype == "source" else _TO_SAFETENSORS[dtype]


def _backbone(
    recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, layout: Layout, mixed: set[str], code_of: CodeOf
) -> Iterable[PlannedTensor]:
    """What the layout keeps of the base, in its order.

    Where experts have their own, the base's module is one of them: the expert 'base', and what adapters change.
    """
    base, giver = sources[0], BackboneGiver(recipe, sources)
    refs = {name: base.tensors[name] for name in own_names(base, family)}
    for name, original in layout.unties.items():
        refs[name] = base.tensor(original)
    for name, ref in refs.items():
        renamed = layout.backbone_name(name)
        if renamed is not None:
            make = giver.of_base if name in mixed else giver.tensor
            yield from map(layout.widened, layout.apart(make(renamed, code_of(ref), ref)))


def _kept(sources: tuple[ModelSource, ...], code_of: CodeOf) -> Iterable[PlannedTensor]:
    """What lies beside the language model in the base's class, whatever becomes of that. Raises as `check_kept`."""
    check_kept(sources)
    for name, ref in kept_beside(sources[0]).items():
        yield PlannedTensor(name, code_of(ref), ref.shape, "backbone", Copy(ref))


def _native_layout(
    recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, code_of: CodeOf
) -> tuple[NativeLayout | None, str]:
    """The layout in a native architecture, or None, and why. Raises UnsupportedError when the recipe asks for one in vain."""
    base, asked = sources[0], "native" if any(expert.segment for expert in recipe.experts) else recipe.output.format
    beyond = recipe.beyond_native()
    adapters = [expert.name for expert in recipe.experts if expert.adapter is not None or expert.is_low_rank]
    if recipe.output.keep is not None:
        return None, "only the modekit architecture keeps what wraps a language model (output.keep)"
    if asked == "modekit":
        return None, "the recipe asks for the modekit architecture"
    if asked == "auto" and beyond:
        return None, f"only the modekit architecture has {', '.join(beyond)}"
    if asked == "auto" and adapters:
        return None, _stay_low_rank(recipe, adapters)
    native, tried = choose_native(family, base.config, recipe)
    if native is None and asked == "native":
        is_routing = choose_native(family, base.config)[0] is not None
        change = "set mixture.top_k: 1" if is_routing else "choose a base model without these features"
        raise UnsupportedError(
            f"no native architecture holds a mixture of this '{family.model_type}' model exactly",
            where=f"base_model ({base.spec})",
            found=" | ".join(tried),
            remedy=f"use output: {{format: modekit}}, or {change}",
        )
    if native is None:
        return None, " | ".join(tried)
    try:
        layout = NativeLayout(recipe, sources, native, code_of)
    except UnsupportedError as error:  # it cannot carry the router
        if asked == "native" or recipe.output.channels is not None:
            raise
        return None, error.what
    if layout.carried_names():
        return (
            layout,
            f"a {native.native_type} holds experts of '{family.model_type}' with their attention, in the router's channels",
        )
    return layout, (
        f"whole FFN experts of '{family.model_type}' with a linear router have an exact native form: {native.native_type}"
    )


def _stay_low_rank(recipe: Recipe, adapters: Sequence[str]) -> str:
    carried = recipe.mixture.fit is not None and recipe.mixture.fit.carried
    does = "carries them in a plain checkpoint" if carried else "folds their FFNs into whole experts"
    return f"adapters stay low-rank ({', '.join(adapters)}); output: {{format: native}} {does}"


def _check_text(recipe: Recipe, reader: ModelSource) -> None:
    """Raise SourceError where a fit has nothing to read text with; `reader` is the model whose tokenizer the result has."""
    if recipe.mixture.fit is not None:
        recipe.mixture.fit.check_library()
    if recipe.mixture.needs_text and not any((reader.folder / name).exists() for name in TOKENIZER_FILES):
        raise SourceError(
            "the router fit reads text and the base model has no tokenizer",
            where=f"base_model ({reader.spec})",
            expected="tokenizer.json or another of transformers' tokenizer files",
            remedy="save the tokenizer into the base model's folder, or use router: {fit: random}",
        )


class BackboneGiver:
    """Where the tensors of the backbone come from: copied from one model, or merged."""

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...]) -> None:
        self._sources = sources
        self._merged = [number for number, expert in enumerate(recipe.experts, start=1) if not expert.is_base]
        self._rule = recipe.mixture.merge if self._merged else None
        backbone = recipe.mixture.backbone
        self._one = 1 + recipe.names.index(backbone.expert) if isinstance(backbone, BackboneExpert) else 0

    def tensor(self, name: str, code: str, ref: TensorRef) -> PlannedTensor:
        """The backbone's tensor for a tensor of the base model. Raises MismatchError."""
        made: Made = as_in(self._sources[self._one], ref)
        if self._rule is not None:
            made = Merge(self._rule, Copy(ref), tuple(as_in(self._sources[number], ref) for number in self._merged))
        return PlannedTensor(name, code, ref.shape, "backbone", made)

    def of_base(self, name: str, code: str, ref: TensorRef) -> PlannedTensor:
        """The base model's tensor itself."""
        return PlannedTensor(name, code, ref.shape, "backbone", Copy(ref))
