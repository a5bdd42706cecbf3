"""`modekit mix BASE EXPERT... -o OUT`: an ordinary recipe from models alone, and its plan.

What was measured decides what experts have of their own (`ways`; benchmarks/whole.md); the router is that of `fit: auto`. The
recipe goes into OUT, and its paths are relative to that folder, so that a build of it makes the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from modekit.errors import MismatchError, RecipeError
from modekit.files.output import check_room, refuse_entangled, work_of
from modekit.planning.make import plan_first
from modekit.planning.notes import changed_ffn_alone
from modekit.planning.plan import Plan
from modekit.recipes.paths import from_folder, spelled_out
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE, SELF, RecipeData, did_you_mean
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.compatible import check_same_architecture
from modekit.sources.contents import OpenFiles
from modekit.sources.families import family_of
from modekit.sources.names import natural_key
from modekit.sources.open import open_recipe_sources
from modekit.sources.source import ModelSource
from modekit.sources.tokenizer import TOKENIZER_FILES
from modekit.text.held_out import check_texts
from modekit.weights.flat import same_bytes

_ONE_EXPERT = {"method": "routing", "top_k": 1}


class Models(NamedTuple):
    """What to mix, as the command line says it: folders or hub ids, experts in short form (recipes/paths.py); name of an expert
    -> its text; the folder that all paths are relative to.
    """

    base: str
    experts: Sequence[str]
    texts: Mapping[str, list[str]]
    root: Path


def ways(*, whole: bool, native: bool, text: bool) -> Iterator[RecipeData]:
    """What a recipe says, the best first; ways that the models do not allow are passed over. `whole`: an expert differs from
    the base in more than its FFNs.
    """
    merged: RecipeData = {"backbone": "average"} if whole else {}
    if not text:
        yield {"mixture": merged, **({"output": {"format": "native"}} if native else {})}
        return
    if merged and not native:
        yield {"mixture": {**_ONE_EXPERT, "modules": "all"}, "output": {"format": "modekit"}}
    yield {"mixture": {**_ONE_EXPERT, **merged}, "output": {"format": "native", **({"carry": "all"} if merged else {})}}
    if not native:
        yield {"mixture": _ONE_EXPERT, "output": {"format": "modekit"}}


def plan_mix(models: Models, out: Path, *, native: bool = False, run: Run = QUIET) -> tuple[Plan, list[str]]:
    """The plan of a mixture in `out`, which need not be there, and what a user should know besides. Nothing is written.

    Raises RecipeError (names, text for some experts alone where the others cannot write), MismatchError (another family, a
    model that is the base), SourceError, UnsupportedError, TextError, OutputError (too little room).
    """
    if models.base.endswith((".yaml", ".yml")):
        raise RecipeError("this is a recipe, not a model", where=models.base, remedy=f"modekit build {models.base} OUT")
    root = work_of(out).path  # where the recipe and what experts write lie until they are in OUT; its paths are the same there
    given = _with_given_text(models)
    typed = parse_recipe({**given, "mixture": {"method": "linear"}}, where="modekit mix")
    check_texts(typed, models.root, "text")
    run.begin("compare the models")
    as_typed = open_recipe_sources(typed, models.root, run=run)  # so that messages name the paths that were typed
    whole = _differs_whole(typed, as_typed)
    raw = from_folder(given, models.root, out)
    if _can_write(as_typed[0]):
        raw["experts"] = [{**expert, "text": expert.get("text", SELF)} for expert in raw["experts"]]
    text = any("text" in expert for expert in raw["experts"])
    possible = [
        partial(parse_recipe, {**raw, **way}, where="modekit mix") for way in ways(whole=whole, native=native, text=text)
    ]
    sources = open_recipe_sources(parse_recipe({**raw, "mixture": {"method": "linear"}}, where="modekit mix"), root, run=run)
    plan = plan_first(possible, root, sources, suits=lambda recipe: recipe.mixture.router.row.reads_ids, run=run)
    notes = [] if text else ["none has text or can write it; --text NAME=FILE for each gives a far better router"]
    refuse_entangled(out, [model.folder for model in plan.models])
    check_room(out, plan.disk_needed)
    return plan, [*notes, *check_texts(plan.recipe, root, plan.family.reads)]


def _with_given_text(models: Models) -> RecipeData:
    """Base and experts, with text where there is some. Raises RecipeError."""
    raw = spelled_out({"base_model": models.base, "experts": list(models.experts)}, models.root)
    names = [each["name"] for each in raw["experts"]]
    for name in (name for name in models.texts if name not in names):
        raise RecipeError(
            "text for an expert that is not there",
            where=f"--text {name}",
            found=f"the experts {', '.join(names)}",
            remedy=did_you_mean(name, names) or "use one of these names, or give the expert this one: NAME=PATH",
        )
    if len(names) < 2 or [each.get("model") for each in raw["experts"]].count(BASE) > 1:
        raise RecipeError(
            "a mixture needs two experts; the base may be one of them",
            where="modekit mix",
            found=", ".join(names),
            remedy="name another model, or let the base join (without --without-base)",
        )
    texts = {name: {"text": text} for name, text in models.texts.items()}
    return {**raw, "experts": [{**each, **texts.get(each["name"], {})} for each in raw["experts"]]}


def _can_write(base: ModelSource) -> bool:
    """Whether what descends from it can write text: not a model with an encoder, nor one without a tokenizer."""
    reads = family_of(base.config, where=f"base_model ({base.spec})").reads
    return reads == "text" and any((base.folder / name).is_file() for name in TOKENIZER_FILES)


def _differs_whole(recipe: Recipe, sources: Sequence[ModelSource]) -> bool:
    """Whether an expert is a full model that differs from the base in more than its FFNs; `sources` begin with the base.

    Raises MismatchError where one is the base under another name.
    """
    named = [(expert.name, each) for expert, each in zip(recipe.experts, sources[1:], strict=True) if not expert.is_base]
    with OpenFiles() as opened:
        whole = [_is_whole(opened, sources[0], name, source) for name, source in named]  # all are looked at
    return any(whole)


def _is_whole(opened: OpenFiles, base: ModelSource, name: str, source: ModelSource) -> bool:
    """The same of one."""
    if isinstance(source, AdapterSource):
        return False
    family = family_of(base.config, where=base.where)
    if source.config.get("model_type") != base.config.get("model_type"):
        check_same_architecture(base, source, family)
        return True
    if source.folder.resolve() != base.folder.resolve():
        ffn = f".{family.mlp_module}."
        if not changed_ffn_alone(source) and _differ(opened, base, source, lambda tensor: ffn not in tensor):
            return True
        if _differ(opened, base, source, lambda tensor: ffn in tensor):
            return False
    raise MismatchError(
        "an expert is the base model itself",
        where=f"{name} ({source.spec})",
        found=f"no tensor that differs from {base.spec}",
        remedy="leave it out (the base joins by itself), or correct the path",
    )


def _differ(opened: OpenFiles, first: ModelSource, second: ModelSource, among: Callable[[str], bool]) -> bool:
    """Whether a tensor differs, of those that both have and that are asked for: layers first, where models differ soon."""
    names = [name for name in first.tensors.keys() & second.tensors.keys() if among(name)]
    for name in sorted(names, key=lambda name: (".layers." not in name, natural_key(name))):
        one, other = first.tensors[name], second.tensors[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not same_bytes(opened, one, other):
            return True
    return False
