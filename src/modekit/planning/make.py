"""Recipe and headers -> every tensor of the result and where each comes from.

Reads configs and headers, and does not import torch. Whatever cannot work is refused here, before a byte is written. First the
models are made alike (one vocabulary), then what the recipe leaves open is settled by what the models allow (choice.py), then
all tensors are planned. How the experts lie in a plain checkpoint says native.py, in the modekit architecture modekit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from modekit.errors import UnsupportedError
from modekit.planning.changes import Changed, changes
from modekit.planning.choice import choose_form, whole_models, why_modekit
from modekit.planning.modekit import ModekitForm
from modekit.planning.native import NativeForm
from modekit.planning.notes import check_adapters, check_text, notes_of
from modekit.planning.plan import Plan
from modekit.planning.recency import fades
from modekit.planning.routed import RoutedForm
from modekit.planning.tensors import CodeOf, PlannedTensor, cut_into_shards
from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.choices import Way, choices, with_following
from modekit.recipes.recipe import Recipe
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.compatible import check_mixable
from modekit.sources.families import family_of
from modekit.sources.family import Family
from modekit.sources.header import DTYPE_NAMES, TensorRef
from modekit.sources.names import natural_key
from modekit.sources.natives import choose_native
from modekit.sources.open import open_recipe_sources
from modekit.sources.source import ModelSource
from modekit.sources.vocabulary import Vocabulary, one_vocabulary
from modekit.weights.made import Copy, Made, Merged, as_in

_TO_SAFETENSORS = {name: code for code, name in DTYPE_NAMES.items()}
Form = NativeForm | ModekitForm
_Laid = tuple[Form, str]
"""How the experts of a recipe that leaves nothing open lie, and why so."""


def make_plan(recipe: Recipe, root: Path, *, run: Run = QUIET) -> Plan:
    """Resolve a recipe into a plan. `root` is the folder that the recipe's paths are relative to.

    The plan's recipe says the router and the decay that a recipe leaves open. Models on the hub are downloaded. Raises
    SourceError, MismatchError or UnsupportedError before anything is written.
    """
    return plan_over(recipe, root, open_recipe_sources(recipe, root, run=run), run=run)


def plan_over(recipe: Recipe, root: Path, sources: tuple[ModelSource, ...], *, run: Run = QUIET) -> Plan:
    """The same over models that are open."""
    family, vocabulary = _one_vocabulary(sources)
    changed = cache(lambda model: changes(vocabulary.sources[0], model, family))  # each is looked at once
    laid = _settled(recipe, family, vocabulary, changed)
    plans = list[Plan]()
    for each in laid:
        with suppress(UnsupportedError) if each is not laid[-1] else nullcontext():
            plans.append(_planned(each, vocabulary, root, changed, run))
    return choose_form(*plans) if len(plans) > 1 else plans[0]


def _one_vocabulary(sources: tuple[ModelSource, ...]) -> tuple[Family, Vocabulary]:
    family = family_of(sources[0].config, where=sources[0].where)
    if family.derived is not None:  # their sizes under the usual names, too; what was one model stays one
        sized = cache(_with_own_sizes)
        sources = tuple(map(sized, sources))
    check_mixable(sources, family)
    return family, one_vocabulary(sources, family)


def _with_own_sizes(source: ModelSource) -> ModelSource:
    if isinstance(source, AdapterSource):
        return source
    family = family_of(source.config, where=source.where)
    return replace(source, config=family.with_sizes(source.config), on_disk=source.on_disk or source.config)


def _settled(recipe: Recipe, family: Family, vocabulary: Vocabulary, changed: Changed) -> list[_Laid]:
    """With what the recipe leaves open: the router, its decay, the form. A plain result first, then one in the modekit
    architecture, where both hold all of the experts. Raises what the first choice raises where none is left.
    """
    is_open = recipe.mixture.is_open or recipe.mixture.is_carried
    whole = whole_models(recipe, vocabulary.sources, changed) if is_open else 0
    refused = list[UnsupportedError]()
    not_plain = why_modekit(recipe) if recipe.beyond_plain() else None
    same_size = not whole and all(expert.is_whole or expert.is_base for expert in recipe.experts)  # in either form
    ways = choices(recipe, whole=whole) if is_open else [(recipe, Way({}))]
    found = list[_Laid]()
    for settled, way in ways:
        if found and not (way.plain is False and (not whole or "modules" in way.mixture)):  # it does not hold all
            continue
        try:
            form, why = _laid(settled, family, vocabulary)
        except UnsupportedError as error:
            refused.append(error)
            if not found and way is ways[-1][1]:
                raise refused[0] from None  # of what would be best
            not_plain = f"{error.what} ({error.found})" if way.plain and error.found else error.what
            continue
        if way.plain in (None, form.shape.plain) or (not found and way is ways[-1][1]):
            found.append((form, not_plain or why))
            if len(found) == 2 or same_size or not (way.output and way.plain):
                break
    return found


def _laid(recipe: Recipe, family: Family, vocabulary: Vocabulary) -> _Laid:
    """In an architecture that other tools know, where one holds it. Raises UnsupportedError when the recipe asks for one in
    vain, or nothing of an adapter is mixed. The decay that a recipe leaves open follows chats where the tokenizer knows them.
    """
    sources = vocabulary.sources
    code_of = partial(_code_of, recipe.output.dtype)
    following = with_following(recipe) if vocabulary.tokenizer.has_template else recipe
    native, why = _native_form(recipe, following, sources, family, code_of)
    form: Form = native or ModekitForm(following, sources, family, code_of)
    check_adapters(sources, form.mixes_more, form.mixed | form.carried)
    check_text(form.shape.recipe, vocabulary.tokenizer, family.reads)
    return form, why


def _planned(laid: _Laid, vocabulary: Vocabulary, root: Path, changed: Changed, run: Run) -> Plan:
    form, why = laid
    sources = vocabulary.sources
    recipe = form.shape.recipe
    tensors = [*_backbone(sources, form), *form.experts()]
    notes = partial(notes_of, form.shape, vocabulary, form.mixes_more, form.mixed | form.carried, changed)
    return Plan(
        recipe=recipe,
        root=root,
        family=form.shape.family,
        shape=form.shape,
        why=why,
        sources=sources,
        shards=cut_into_shards(sorted(tensors, key=lambda tensor: natural_key(tensor.name)), recipe.output.shard_size),
        router_dtype=form.router_dtype,
        copied_files=vocabulary.tokenizer.copied_files,
        tell=lambda: (*vocabulary.notes, *notes(), *form.notes()),
        vocabulary=vocabulary,
        trust_remote_code=run.trust_remote_code,
    )


def _code_of(dtype: str, ref: TensorRef) -> str:
    return ref.source_dtype if dtype == "source" else _TO_SAFETENSORS[dtype]


def _backbone(sources: tuple[ModelSource, ...], form: Form) -> Iterable[PlannedTensor]:
    """What the result has of the base, in its order.

    Where experts have their own, the base's module is one of them: the expert 'base', and what adapters change.
    """
    base = sources[0]
    merged = backbone_of(form.shape.recipe, sources)
    refs = {name: base.tensors[name] for name in form.shape.family.own_names(base)}
    refs |= {name: base.tensor(original) for name, original in form.unties.items()}
    for name, ref in refs.items():
        made = Copy(ref) if name in form.mixed else merged(ref)
        yield from form.backbone(PlannedTensor(name, form.code_of(ref), ref.shape, "backbone", made))


def backbone_of(recipe: Recipe, sources: tuple[ModelSource, ...]) -> Callable[[TensorRef], Made]:
    """A tensor of the base -> how the backbone's is made: copied from one model, or merged. Raises MismatchError."""
    mixture = recipe.mixture
    experts = [source for expert, source in zip(recipe.experts, sources[1:], strict=True) if not expert.is_base]
    rule = mixture.merge if experts else None
    if rule is not None:
        return lambda ref: Merged(rule, Copy(ref), tuple(as_in(source, ref) for source in experts))
    one = recipe.names.index(mixture.backbone.expert) + 1 if isinstance(mixture.backbone, BackboneExpert) else 0
    return lambda ref: as_in(sources[one], ref)


def _native_form(
    recipe: Recipe, following: Recipe, sources: tuple[ModelSource, ...], family: Family, code_of: CodeOf
) -> tuple[NativeForm | None, str]:
    """In a native architecture, or None, and why: as the recipe that is `following` where its attention can fade so. Raises
    UnsupportedError when the recipe asks for one in vain.
    """
    base = sources[0]
    is_asked = recipe.output.format == "plain"
    if (why_not := why_modekit(recipe)) is not None:
        return None, why_not
    native, tried = choose_native(family, base.config)
    if native is None and is_asked:
        raise UnsupportedError(
            f"no plain checkpoint holds a mixture of this '{family.model_type}' model exactly",
            where=base.where,
            found=" | ".join(tried),
            remedy="use output: {format: modekit}, or choose a base model without these features",
        )
    if native is None:
        return None, " | ".join(tried)
    follows = following is not recipe and fades(native, family.dense_config(base.config))
    try:
        form = (RoutedForm if native.routed else NativeForm)(following if follows else recipe, sources, native, code_of)
    except UnsupportedError as error:  # it cannot carry the router
        if is_asked or recipe.output.channels is not None:
            raise
        return None, error.what
    kind = f"'{family.model_type}'"
    name = native.native_type
    if native.routed is not None:
        return form, f"fine-tunes of one {kind} fit into one with the experts of all"
    if form.carried:
        return form, f"a {name} holds FFN and attention of experts of {kind}"
    return form, f"a {name} holds whole FFN experts of {kind} exactly"
