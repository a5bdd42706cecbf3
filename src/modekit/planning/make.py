"""Recipe and headers -> every tensor of the result and where each comes from.

Reads configs and headers, never a tensor, and does not import torch. Whatever cannot work is refused here, before a
byte is written. How the experts lie in a native architecture says native.py, in the modekit architecture modekit.py; what
both share is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from modekit.errors import RecipeError, SourceError, UnsupportedError
from modekit.planning.channels import channels_of
from modekit.planning.copied_files import COPIED_FILES, copied_files
from modekit.planning.layout import CodeOf, Layout
from modekit.planning.lost_changes import lost_changes, lost_of_adapters
from modekit.planning.modekit import ModekitLayout
from modekit.planning.native import NativeLayout
from modekit.planning.pieces import piece_of
from modekit.planning.plan import Piece, Plan, PlannedTensor, joined
from modekit.planning.shards import cut_into_shards
from modekit.planning.twins import twins
from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.recipe import Recipe, place_of_base
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.compatibility import (
    check_complete,
    check_dtypes,
    check_same_architecture,
    check_same_target,
    check_sizes,
    forced_by_one_side,
    own_names,
)
from modekit.sources.families import family_of, own_family
from modekit.sources.family import Family
from modekit.sources.model import DTYPE_NAMES, ModelSource, TensorRef
from modekit.sources.names import HEAD, natural_key, weight_of
from modekit.sources.native import choose_native
from modekit.sources.native_row import Native
from modekit.sources.open import open_recipe_sources
from modekit.sources.tokenizer import TOKENIZER_FILES, chat_template, check_ids_fit, check_same_tokenizer

_TO_SAFETENSORS = {name: code for code, name in DTYPE_NAMES.items()}


def make_plan(recipe: Recipe, root: Path, *, run: Run = QUIET, headers_only: bool = False) -> Plan:
    """Resolve a recipe into a plan. `root` is the folder that the recipe's paths are relative to.

    With `headers_only` models on the hub are not downloaded; such a plan can be shown but not built.

    Raises SourceError, MismatchError or UnsupportedError before anything is written.
    """
    return plan_of(recipe, root, open_recipe_sources(recipe, root, run=run, headers_only=headers_only), run=run)


def plan_of(recipe: Recipe, root: Path, sources: tuple[ModelSource, ...], *, run: Run = QUIET) -> Plan:
    """The same over models that are open: the base's, then each expert's in recipe order."""
    base = sources[0]
    family = family_of(base.config, where=f"base_model ({base.spec})")
    for source in dict.fromkeys(sources):
        if not isinstance(source, AdapterSource):
            check_sizes(source, own_family(source.config, family))
    native, why = _choose_architecture(recipe, base, family)
    _check(recipe, sources, family)

    def code_of(ref: TensorRef) -> str:
        return ref.dtype if recipe.output.dtype == "source" else _TO_SAFETENSORS[recipe.output.dtype]

    layout: Layout = (
        NativeLayout(recipe, sources, family, native, code_of)
        if native is not None
        else ModekitLayout(recipe, sources, family, code_of)
    )
    mixed = layout.mixed_names()
    backbone = _backbone(recipe, sources, family, layout, mixed, code_of)
    body = sorted([*backbone, *layout.tensors()], key=lambda tensor: natural_key(tensor.name))
    copied = copied_files(base.folder, COPIED_FILES, where=f"base_model ({base.spec})")
    notes = [
        *_notes(recipe, sources, family),
        *lost_of_adapters(recipe, sources, layout.mixes_more, mixed),
        *_notes_of_chats(recipe, base),
        *_notes_of_unseen(recipe, native),
        *_notes_of_targets(recipe, sources, family),
        *lost_changes(recipe, sources, layout.mixes_more, mixed),
        *layout.notes(),
        *twins(recipe, sources),
    ]
    return Plan(
        recipe,
        root,
        family,
        layout.shape(str(root)),
        why,
        sources,
        cut_into_shards(body, recipe.output.shard_size),
        layout.router_dtype,
        copied,
        tuple(notes),
        run.trust_remote_code,
    )


def _backbone(
    recipe: Recipe, sources: tuple[ModelSource, ...], family: Family, layout: Layout, mixed: set[str], code_of: CodeOf
) -> Iterable[PlannedTensor]:
    """What the layout keeps of the base, in its order.

    Where experts have their own, the base's module is one of them: the expert 'base', and what adapters change.
    """
    base, giver = sources[0], _Giver(recipe, sources)
    refs = {name: base.tensors[name] for name in own_names(base, family)}
    if layout.unties:
        refs[weight_of(HEAD)] = base.tensor(weight_of(family.embedding))
    for name, ref in refs.items():
        renamed = layout.backbone_name(name)
        if renamed is not None:
            make = giver.of_base if name in mixed else giver.tensor
            yield layout.widened(make(renamed, code_of(ref), ref))


def _choose_architecture(recipe: Recipe, base: ModelSource, family: Family) -> tuple[Native | None, str]:
    """The native row or None, and why. Raises UnsupportedError when the recipe wants native and there is no exact one."""
    beyond = recipe.mixture.beyond_native()
    adapters = [expert.name for expert in recipe.experts if expert.adapter is not None or expert.lora_rank is not None]
    wanted = recipe.output.format
    if wanted == "modekit":
        return None, "the recipe asks for the modekit architecture"
    if wanted == "auto" and beyond:
        return None, f"only the modekit architecture says {', '.join(beyond)}"
    if wanted == "auto" and adapters:
        return None, f"adapters stay low-rank ({', '.join(adapters)}); output: {{format: native}} folds them into whole experts"
    native, tried = choose_native(family, base.config)
    if native is None and wanted == "native":
        raise UnsupportedError(
            f"no native architecture says a mixture of this '{family.model_type}' model exactly",
            where=f"base_model ({base.spec})",
            found=" | ".join(tried),
            remedy="use output: {format: modekit}, or choose a base model without these features",
        )
    if native is None:
        return None, " | ".join(tried)
    try:
        channels_of(recipe, native, family.dense_config(base.config))
    except UnsupportedError as error:
        if wanted == "native" or recipe.output.channels is not None:
            raise
        return None, error.what
    return native, (
        f"a mixture of whole FFN experts of '{family.model_type}' with a linear router is said exactly by {native.native_type}"
    )


def _check(recipe: Recipe, sources: Sequence[ModelSource], family: Family) -> None:
    base = sources[0]
    where = f"base_model ({base.spec})"
    models = [source for source in dict.fromkeys(sources) if not isinstance(source, AdapterSource)]
    for source in models:
        check_dtypes(source)
        if source is not base:
            check_same_architecture(base, source, family)
        check_complete(source, family, family.layers(base.config))
    for source in dict.fromkeys(sources[1:]):
        if source is not base:
            check_same_tokenizer(base.folder, source.folder, where=f"{source.label} ({source.spec})")
    if family.pair:
        check_same_target(sources)
    if recipe.mixture.fit is not None:
        recipe.mixture.fit.check_library()
    if recipe.mixture.needs_text and not any((base.folder / name).exists() for name in TOKENIZER_FILES):
        raise SourceError(
            "the router fit reads text and the base model has no tokenizer",
            where=where,
            expected="tokenizer.json or another of transformers' tokenizer files",
            remedy="save the tokenizer into the base model's folder, or use router: {fit: random}",
        )
    check_ids_fit(base.folder, int(base.config["vocab_size"]), where=where)


class _Giver:
    """Where the tensors of the backbone come from: copied from one model, or merged."""

    def __init__(self, recipe: Recipe, sources: tuple[ModelSource, ...]) -> None:
        self._sources = sources
        self._merges = recipe.mixture.merge is not None
        self._merged = [number for number, expert in enumerate(recipe.experts, start=1) if not expert.is_base]
        backbone = recipe.mixture.backbone
        self._one = 1 + recipe.names.index(backbone.expert) if isinstance(backbone, BackboneExpert) else 0

    def tensor(self, name: str, code: str, ref: TensorRef) -> PlannedTensor:
        """The backbone's tensor for a tensor of the base model. Raises MismatchError."""
        if self._merges:
            pieces = (Piece(0, ref), *(piece_of(self._sources, number, ref) for number in self._merged))
            return PlannedTensor(name, code, ref.shape, "backbone", "merge", pieces)
        return joined(name, code, ref.shape, "backbone", (piece_of(self._sources, self._one, ref),))

    def of_base(self, name: str, code: str, ref: TensorRef) -> PlannedTensor:
        """The base model's tensor itself."""
        return joined(name, code, ref.shape, "backbone", (Piece(0, ref),))


def _notes(recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> Iterable[str]:
    if recipe.mixture.method == "routing" and recipe.top_k == 1 < len(recipe.experts):
        yield (
            "top_k 1: the chosen expert's weight is always 1, which gives the router no gradient; `modekit train` gives every "
            "token two experts while it trains one"
        )
    if recipe.mixture.method == "routing" and len(recipe.experts) == recipe.top_k and recipe.mixture.top_p is None:
        yield "top_k equals the number of experts: every token runs through every expert, as with method: gating"
    if recipe.mixture.fit is not None and recipe.mixture.fit.reads.tokens and not family.pair:
        yield (
            "the router reads tokens alone, so it can also stand before experts that are served apart (modekit front): that is "
            "another model, with one expert for a whole text in place of one per token (docs/serve.md has what that costs)"
        )
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if isinstance(source, AdapterSource):
            yield from (f"{expert.name}: {note}" for note in source.notes)


def _notes_of_chats(recipe: Recipe, base: ModelSource) -> Iterable[str]:
    """Whether the router is fitted on chats, too. Raises RecipeError when it is to be and the base has no chat template."""
    asked = recipe.mixture.router.chat
    if not recipe.mixture.needs_text or asked is False:
        return
    if chat_template(base.folder):
        small_talk = "and small talk for the base, " if any(expert.is_base for expert in recipe.experts) else ""
        yield f"the router is fitted on chats, too: short questions cut from the text, {small_talk}in the base's chat template"
    elif asked:
        raise RecipeError(
            "the router is to know chats, and the base model has no chat template",
            where="mixture.router.chat",
            found=str(base.folder),
            remedy="remove 'chat', or put a chat_template.jinja into the base model's folder",
        )


def _notes_of_unseen(recipe: Recipe, native: Native | None) -> Iterable[str]:
    """Where text of no domain goes."""
    place, mixture = place_of_base(recipe.experts), recipe.mixture
    if mixture.unseen is None or place is None:
        return
    name = recipe.names[place]
    yield (
        f"text of no domain goes to the base model, as expert '{name}': where that leads; of held-out text of every other "
        f"domain it may lead on {mixture.router.alarms:.1%} of the tokens"
    )
    if native is not None and recipe.top_k > 1:
        yield f"{native.native_type} weighs the next expert in, too, where '{name}' leads: top_k: 1 leaves it out"


def _notes_of_targets(recipe: Recipe, sources: tuple[ModelSource, ...], family: Family) -> Iterable[str]:
    """Where an expert with an encoder or the base alone says with which token a target begins."""
    named = zip(recipe.names, sources[1:], strict=True)
    own = {name: each for name, each in named if each is not sources[0] and not isinstance(each, AdapterSource)}
    return forced_by_one_side(sources[0], own) if family.pair else ()
