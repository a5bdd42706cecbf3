"""What a user should know of a plan: what experts lose, who is one model, what the router is fitted on.

Of full models it says that something may be lost, not how much.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from modekit.errors import RecipeError, SourceError, UnsupportedError
from modekit.files.figures import bytes_of
from modekit.planning.changes import Changed
from modekit.planning.channels import Channels
from modekit.planning.shape import AnyShape
from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.choices import why_chosen
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE, SELF, WRITTEN_FOLDER
from modekit.sources.adapter import AdapterSource
from modekit.sources.contents import OpenFiles
from modekit.sources.family import Reads
from modekit.sources.names import is_ignored
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import has_tokenizer
from modekit.sources.tokenizer_choice import TokenizerChoice
from modekit.sources.vocabulary import Vocabulary
from modekit.weights.flat import stored

_PACKED = re.compile(r"([-_.](unsloth|bnb|[48]-?bit|nf4|fp4|fp8|int[48]|awq|gptq|dynamic|quantized))+$")
_TENSORS, _NUMBERS = 8, 2**14  # that are looked at, of each, to see how far a model lies from the base


def notes_of(shape: AnyShape, vocabulary: Vocabulary, way_out: str, mixed: Collection[str], changed: Changed) -> Iterator[str]:
    """All of them. `mixed`: tensors of the base by which experts differ; `way_out`: how more are mixed."""
    recipe = shape.recipe
    sources = vocabulary.sources
    yield from (f"{each.label}: its weights are read from {each.packed}" for each in dict.fromkeys(sources) if each.packed)
    yield from _of_strangers(recipe, sources)
    yield from _of_text(recipe, shape, sources[0])
    yield from _lost(shape, sources, way_out, mixed, changed)
    yield from _of_chats(recipe, vocabulary)
    yield from _beside(sources)
    for key in ("channels", "carry", "rank") if not shape.plain else ():
        if getattr(recipe.output, key) is not None:
            yield f"output.{key} has no effect: the modekit architecture carries all of an expert; format: plain needs it"
    yield from _twins(recipe, sources)


def _of_strangers(recipe: Recipe, sources: Sequence[ModelSource]) -> Iterator[str]:
    """Experts that may be made from another base: adapters name another, or weights lie further from it than its own size."""
    base = sources[0]
    known = (base.spec, str(base.folder), str(base.config.get("_name_or_path", "")))  # what an adapter may call it
    names = {_unpacked(each) for each in known}
    others = dict[str, list[str]]()
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if isinstance(source, AdapterSource):
            said = source.config.get("base_model_name_or_path")
            if isinstance(said, str) and said and _unpacked(said) not in names:
                others.setdefault(said, []).append(expert.name)
        elif source is not base and (far := _drift(source, base)) is not None and far > 1:
            yield f"{expert.name}: its weights differ from the base's by {far:.1f}x their size; was it made from this base?"
    for said, experts in others.items():
        yield (
            f"{', '.join(experts)}: adapter_config.json names the base '{said}', and the recipe's is '{base.spec}'. An adapter "
            "of another model gives nonsense (an instruct model is not its base)"
        )


def _unpacked(name: str) -> str:
    """The last part of a model's name, without what quantised twins have behind it."""
    return _PACKED.sub("", Path(name).name.lower())


def _drift(model: ModelSource, base: ModelSource) -> float | None:
    """|model - base| / |base| of the first 16,384 numbers of up to eight matrices that both have: 1.4 of strangers.

    None where there are none, or a file cannot be read, which a build will say more of.
    """
    both = [(ref, base.tensors[name]) for name, ref in model.tensors.items() if len(ref.shape) == 2 and name in base.tensors]
    moved = size = 0.0
    with OpenFiles() as opened, suppress(SourceError):
        for pair in both[:: -(-len(both) // _TENSORS) or 1]:
            count = min(ref.numel for ref in pair)
            x, y = (stored(opened, ref)[: min(count, _NUMBERS)].astype(np.float64) for ref in pair)
            moved += float(np.square(x - y).sum())
            size += float(np.square(y).sum())
        return float(np.sqrt(moved / size)) if size and np.isfinite(moved) else None
    return None


def notes_of_channels(channels: Channels, recipe: Recipe, left: Sequence[str]) -> Iterable[str]:
    """Of a plain checkpoint that has any; `left`: what experts have of their own in a layer that is not carried."""
    yield (
        f"the {recipe.mixture.router.fit} router adds {channels.spare} channels to the hidden size {channels.hidden} "
        f"({channels.spare / channels.hidden:.1%}) and a layer in front; the rest computes the same"
    )
    if channels.carry is not None:
        yield (
            f"what experts change of {channels.carry.parts}"
            f"{' (not of ' + ', '.join(left) + ', which all share)' if left else ''} goes through "
            f"{channels.carry.channels} of these channels and {channels.carry.units} more units of every FFN"
            f"{'' if channels.carry.is_exact else ', not all of it'}"
        )
    if recipe.mixture.router.decay is None and channels.decays == (1.0,):
        yield "the router weighs old text like new: in this architecture what it has read does not fade"


def _of_text(recipe: Recipe, shape: AnyShape, base: ModelSource) -> Iterator[str]:
    """Of experts that have no text of their own."""
    names = ", ".join(each.name for each in recipe.experts if each.writes_text)
    if recipe.mixture.needs_text and names:
        yield f"text of {names}: the models write it, into {WRITTEN_FOLDER}/ beside the recipe; real text works better"
    elif not recipe.mixture.needs_text and why_chosen(recipe, plain=shape.plain) and has_tokenizer(base.folder):
        does = "`text: self` lets each write some, for" if shape.family.reads == "text" else "parallel text of each gives"
        yield f"no expert has text: {does} a far better router"


def _of_chats(recipe: Recipe, vocabulary: Vocabulary) -> Iterable[str]:
    """Whether the router is fitted on chats, too."""
    tokenizer = vocabulary.tokenizer
    mixture = recipe.mixture
    if mixture.needs_text and mixture.router.chat is not False and tokenizer.has_template:
        whose = "the base's" if tokenizer.number == 0 else "its"
        made = "questions cut from documents, or asked in conversations, of the text"
        yield f"the router is fitted on chats, too: {made}, in {whose} chat template"


def _changed(source: AdapterSource) -> set[str]:
    return {*source.changes, *source.replaced}


def check_adapters(sources: Sequence[ModelSource], way_out: str, mixed: Collection[str]) -> None:
    """Raise UnsupportedError when an adapter changes nothing that is mixed."""
    for source in (each for each in sources if isinstance(each, AdapterSource)):
        if _changed(source).isdisjoint(mixed):
            raise UnsupportedError(
                "the adapter changes nothing that this recipe mixes",
                where=source.where,
                found=f"it changes {_kinds(_changed(source))}",
                remedy=f"{way_out}, or remove the expert",
            )


def check_text(recipe: Recipe, tokenizer: TokenizerChoice, reads: Reads) -> None:
    """Raise SourceError where a fit has nothing to read text with, RecipeError where it is to read chats without a template, or
    what a model with an encoder is to write.
    """
    folder = tokenizer.source.folder
    spec = tokenizer.source.spec
    if reads == "pairs" and any(expert.writes_text for expert in recipe.experts):
        raise RecipeError(
            "a model with an encoder cannot write text of its own",
            where="experts: text",
            found=SELF,
            expected="pairs of source and target",
            remedy="give parallel text",
        )
    if not recipe.mixture.needs_text:
        return
    if not has_tokenizer(folder):
        raise SourceError(
            "the router fit reads text and the base model has no tokenizer",
            where=f"base_model ({spec})",
            expected="tokenizer.json or another of transformers' tokenizer files",
            remedy="save the tokenizer into the base model's folder, or use router: {fit: random}",
        )
    if recipe.mixture.router.chat and not tokenizer.has_template:
        raise RecipeError(
            "the router is to know chats, and the base model has no chat template",
            where="mixture.router.chat",
            found=str(folder),
            remedy="remove 'chat', or put a chat_template.jinja into the base model's folder",
        )


def _lost(
    shape: AnyShape, sources: Sequence[ModelSource], way_out: str, mixed: Collection[str], changed: Changed
) -> Iterator[str]:
    """A note on the experts of which something is lost, or may be; none on a merged backbone, or when all is mixed."""
    recipe = shape.recipe
    lost = list[str]()
    models = list[str]()
    mixture = recipe.mixture
    kept = mixture.backbone.expert if isinstance(mixture.backbone, BackboneExpert) else None
    ffns = shape.inner == 1 and mixture.layers is None and (not isinstance(mixture.modules, list) or "mlp" in mixture.modules)
    all_mixed = all(name in mixed or is_ignored(name) for name in sources[0].tensors)
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if isinstance(source, AdapterSource):
            outside = _changed(source).difference(mixed)
            if outside and mixture.merge is None and kept != expert.name:
                lost.append(
                    f"{len(outside)} of the {len(_changed(source))} tensors that {expert.name} changes ({_kinds(outside)})"
                )
        elif mixture.backbone == BASE and not (all_mixed or expert.is_base or expert.lora_rank is not None):
            models += [] if ffns and changed(source) != "more" else [expert.name]
    lost += [f"what {', '.join(models)} changed outside of the mixed modules"] if models else []
    if lost:
        yield (
            f"not mixed, and lost on this backbone: {', '.join(lost)}. `modekit verify --deep` measures after a build what "
            f"that is worth; {way_out}, or merge the backbone (mixture.backbone: average)"
        )


def _beside(sources: Sequence[ModelSource]) -> Iterator[str]:
    """What stays behind of models that wrap a language model, and of their adapters."""
    for source in dict.fromkeys(sources):
        if source.beside:
            parts = sorted({name.removeprefix("model.").partition(".")[0] for name in source.beside})
            size = bytes_of(sum(ref.nbytes for ref in source.beside.values()))
            yield f"{source.label}: only the language model is mixed; {', '.join(parts)} ({size}) stay behind"


def _kinds(names: Collection[str]) -> str:
    """The distinct last parts of tensor names, for a message."""
    modules = (name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "") for name in names)
    return ", ".join(
        sorted({f"{module.rpartition('.')[2]} {leaf.removeprefix('weight')}".rstrip() for module, _, leaf in modules})
    )


def _twins(recipe: Recipe, sources: Sequence[ModelSource]) -> Iterator[str]:
    """Experts that are one model, or one part of it, and those that are the base, by their folders."""
    models = dict[object, list[str]]()
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        folder = source.folder.resolve()
        if not expert.is_base and folder == sources[0].folder.resolve():
            yield f"{expert.name}: it is the base model itself: write `model: base`, which needs no tensors of its own"
        elif not expert.is_base:
            models.setdefault((folder, tuple(expert.layers or ())), []).append(expert.name)
    are = "are one model: no router can choose between them; keep one, or correct the paths"
    yield from (f"{' and '.join(names)} {are}" for names in models.values() if len(names) > 1)
