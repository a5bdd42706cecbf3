"""What a user should know of a plan: what experts lose, who is one model, what the router is fitted on.

A plan reads headers only, so that of full models it says that something may be lost, not how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from modekit.errors import RecipeError, UnsupportedError
from modekit.files.figures import bytes_of
from modekit.files.read import UNREADABLE, read_json
from modekit.recipes.mixture import BackboneExpert
from modekit.recipes.recipe import Recipe, place_of_base
from modekit.recipes.strict import BASE
from modekit.sources.adapter import AdapterSource
from modekit.sources.family import Family, Stack
from modekit.sources.kept import kept_beside
from modekit.sources.model import SPECIALIST_FILE, ModelSource, TensorRef
from modekit.sources.names import is_ignored
from modekit.sources.targets import forced_by_one_side
from modekit.sources.vocabulary import Vocabulary
from modekit.weights.rounding import nearest_difference

BASE_AGAIN = "it is the base model itself: write `model: base`, which needs no tensors of its own"

_MEASURED = "`modekit verify --deep` measures what that is worth"


def notes_of(recipe: Recipe, vocabulary: Vocabulary, family: Family, way_out: str, mixed: set[str]) -> Iterator[str]:
    """Those of either shape. `way_out`: how a recipe mixes more; `mixed`: the base's tensors of which experts have their own.

    Raises UnsupportedError when an adapter changes nothing that is mixed, and RecipeError for chats without a template.
    """
    sources = vocabulary.sources
    yield from _of_packed(sources)
    yield from _of_routing(recipe, sources, family)
    yield from _lost_of_adapters(recipe, sources, way_out, mixed)
    yield from _of_chats(recipe, vocabulary)
    yield from _of_unseen(recipe)
    yield from _of_targets(recipe, sources, family)
    yield from _lost_of_models(recipe, sources, way_out, mixed)
    yield from _beside(recipe, sources)


def _of_packed(sources: Sequence[ModelSource]) -> Iterator[str]:
    """A note for each model whose weights are quantised, and how near it is to one beside it whose weights are not."""
    whole = next((source for source in sources if not source.packed and not isinstance(source, AdapterSource)), None)
    for source in dict.fromkeys(sources):
        if source.packed:
            said = f"{source.label}: its weights are read from {source.packed}; what quantising took from them stays lost"
            least = None if whole is None else nearest_difference(source, whole)
            if whole is not None and least is not None:
                said += f": at most {least:.1%} of a weight, by the tensor nearest that of {whole.label}, fine-tuning included"
            yield said


def _of_routing(recipe: Recipe, sources: Sequence[ModelSource], family: Family) -> Iterator[str]:
    if recipe.mixture.method == "routing" and recipe.top_k == 1 < len(recipe.experts):
        yield (
            "top_k 1: the chosen expert's weight is always 1, which gives the router no gradient; `modekit train` gives every "
            "token two experts while it trains one"
        )
    if recipe.mixture.method == "routing" and len(recipe.experts) == recipe.top_k and not recipe.mixture.varies:
        yield "top_k equals the number of experts: every token runs through every expert, as with method: gating"
    if recipe.mixture.fit is not None and recipe.mixture.fit.tells_texts and not family.pair:
        yield (
            "the router reads only tokens, so `modekit front` can also use it before experts on separate servers; there one "
            "expert answers a whole text, which is another model (benchmarks/front.md)"
        )
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if isinstance(source, AdapterSource):
            yield from (f"{expert.name}: {note}" for note in source.notes)


def _of_chats(recipe: Recipe, vocabulary: Vocabulary) -> Iterable[str]:
    """Whether the router is fitted on chats, too. Raises RecipeError when it is to be and the base has no chat template."""
    tokenizer = vocabulary.tokenizer
    asked = recipe.mixture.router.chat
    if not recipe.mixture.needs_text or asked is False:
        return
    if tokenizer.has_template:
        small_talk = "and small talk for the base, " if any(expert.is_base for expert in recipe.experts) else ""
        whose = "the base's" if tokenizer.number == 0 else "its"
        yield f"the router is fitted on chats, too: short questions cut from the text, {small_talk}in {whose} chat template"
        fit, decays = recipe.mixture.fit, recipe.mixture.router.decay or [1.0]
        if fit is not None and fit.carried and 0 < min(decays) < 1:
            tokens = round(math.log(0.5, min(decays)))
            yield f"in a chat half of the evidence fades after {tokens} tokens (mixture.router.decay: {decays})"
    elif asked:
        raise RecipeError(
            "the router is to know chats, and the base model has no chat template",
            where="mixture.router.chat",
            found=str(tokenizer.source.folder),
            remedy="remove 'chat', or put a chat_template.jinja into the base model's folder",
        )


def _of_unseen(recipe: Recipe) -> Iterable[str]:
    """Where text of no domain goes."""
    place, mixture = place_of_base(recipe.experts), recipe.mixture
    if mixture.unseen is None or place is None:
        return
    name = recipe.names[place]
    yield (
        f"text of no domain goes to the base model, as expert '{name}': where that leads; of held-out text of every other "
        f"domain it may lead on {mixture.router.alarms:.1%} of the tokens"
    )


def _of_targets(recipe: Recipe, sources: Sequence[ModelSource], family: Family) -> Iterable[str]:
    """Where an expert with an encoder or the base alone says with which token a target begins."""
    named = zip(recipe.names, sources[1:], strict=True)
    own = {name: each for name, each in named if each is not sources[0] and not isinstance(each, AdapterSource)}
    return forced_by_one_side(sources[0], own) if family.pair else ()


def _lost_of_models(recipe: Recipe, sources: Sequence[ModelSource], way_out: str, mixed: set[str]) -> Iterator[str]:
    """A note that names the full models of a recipe that may lose something; none on another backbone, or when all is mixed."""
    outside = [name for name in sources[0].tensors if name not in mixed and not is_ignored(name)]
    modules = recipe.mixture.modules
    mixes_every_ffn = recipe.mixture.layers is None and (not isinstance(modules, list) or "mlp" in modules)
    if recipe.mixture.backbone != BASE or not outside:
        return
    names = [
        expert.name
        for expert, source in zip(recipe.experts, sources[1:], strict=True)
        if not (expert.is_base or expert.is_low_rank or isinstance(source, AdapterSource))
        and not (mixes_every_ffn and changed_ffn_alone(source))
    ]
    if names:
        yield (
            f"{', '.join(names)}: the base model's backbone loses what a full model changed outside of the mixed modules. "
            f"{_MEASURED}; {way_out}, or merge the backbone (mixture.backbone: average)"
        )


def _lost_of_adapters(recipe: Recipe, sources: Sequence[ModelSource], way_out: str, mixed: set[str]) -> Iterator[str]:
    """A note on the adapters of which something is lost. Raises UnsupportedError when that is all of one."""
    merged, backbone, lost = recipe.mixture.merge is not None, recipe.mixture.backbone, list[str]()
    kept = backbone.expert if isinstance(backbone, BackboneExpert) else None
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if not isinstance(source, AdapterSource) or source.prefix is not None:
            continue
        changed = {*source.changes, *source.bias_changes, *source.replaced}
        outside = changed - mixed
        if outside == changed:
            raise UnsupportedError(
                "the adapter changes nothing that this recipe mixes",
                where=f"{source.label} ({source.spec})",
                found=f"it changes {_kinds(changed)}",
                remedy=f"{way_out}, or remove the expert",
            )
        if outside and not merged and kept != expert.name:
            lost.append(f"{len(outside)} of the {len(changed)} tensors that {expert.name} changes ({_kinds(outside)})")
    if lost:
        yield (
            f"not mixed, and lost on this backbone: {', '.join(lost)}. {_MEASURED}; {way_out}, or merge the "
            "backbone (mixture.backbone: average)"
        )


def _beside(recipe: Recipe, sources: Sequence[ModelSource]) -> Iterator[str]:
    """What is kept, and what stays behind, of models that wrap a language model, and of their adapters."""
    of: dict[str, list[str]] = {}
    kept = {ref.name for ref in kept_beside(sources[0]).values()} if recipe.output.keep is not None else set[str]()
    if kept:
        said = _parts_of({name: ref for name, ref in sources[0].beside.items() if name in kept})
        yield f"kept of the base model, for all experts alike: {said}; a build compares those of full models"
    for source in dict.fromkeys(sources):
        shared = kept if not isinstance(source, AdapterSource) else set[str]()
        said = _parts_of({name: ref for name, ref in source.beside.items() if name not in shared})
        of.setdefault(said, []).append(source.label)
    of.pop("", None)
    yield from (f"{', '.join(labels)}: only the language model is mixed; {said} stay behind" for said, labels in of.items())
    if not kept and kept_beside(sources[0]):
        yield "pictures are left out; output: {keep: wrapper} keeps the base model's vision tower"


def _parts_of(beside: Mapping[str, TensorRef]) -> str:
    """What lies beside a language model, part by part."""
    sizes: dict[str, list[int]] = {}
    for name, ref in beside.items():
        in_layers = name.startswith(Stack().layers)
        part = "what no layer reads" if in_layers else name.removeprefix("model.").partition(".")[0]
        sizes.setdefault(part, []).append(ref.nbytes)
    return ", ".join(f"{part} ({len(each)} tensors, {bytes_of(sum(each))})" for part, each in sorted(sizes.items()))


def _kinds(names: set[str]) -> str:
    """The distinct last parts of tensor names, for a message."""
    modules = (name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "") for name in names)
    return ", ".join(
        sorted({f"{module.rpartition('.')[2]} {leaf.removeprefix('weight')}".rstrip() for module, _, leaf in modules})
    )


def changed_ffn_alone(source: ModelSource) -> bool:
    """Whether `modekit specialize` says that it trained nothing but the FFNs."""
    try:
        record = read_json(source.folder / SPECIALIST_FILE)
    except UNREADABLE:
        return False
    return isinstance(record, dict) and record.get("specialist") == "mlp"


def one_model(names: Sequence[str]) -> str:
    """What to say of experts that are one model."""
    return f"{' and '.join(names)} are one model: no router can choose between them; keep one, or correct the paths"


def twins(recipe: Recipe, sources: Sequence[ModelSource]) -> Iterator[str]:
    """Experts that were read from one folder, and those read from the base's; `sources` begin with the base."""
    base = sources[0].folder.resolve()
    same: dict[object, list[str]] = {}
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if not expert.is_base:
            same.setdefault(source.folder.resolve(), []).append(expert.name)
    yield from (f"{name}: {BASE_AGAIN}" for name in same.pop(base, []))
    yield from (one_model(names) for names in same.values() if len(names) > 1)
