"""`modekit mix BASE EXPERT... -o OUT`: an ordinary recipe from models alone, and its plan.

The recipe names the models and their text; what it leaves open is settled as for any other (planning/choice.py). As settled it
goes into OUT, and its paths are relative to that folder, so that a build of it makes the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from modekit.errors import MismatchError, RecipeError
from modekit.files.output import work_of
from modekit.planning.changes import are_alike
from modekit.planning.make import plan_over
from modekit.planning.plan import Plan
from modekit.recipes.paths import OF_THE_BASE, from_folder, spelled_out
from modekit.recipes.read import parse_recipe
from modekit.recipes.recipe import Format
from modekit.recipes.strict import BASE, SELF, RecipeData, did_you_mean
from modekit.run import QUIET, Run
from modekit.sources.families import family_of
from modekit.sources.open import open_recipe_sources
from modekit.sources.tokenizer import has_tokenizer
from modekit.text.held_out import check_texts


class Models(NamedTuple):
    """What to mix, as the command line says it: folders or hub ids, experts in short form (recipes/paths.py); name of an expert
    -> its text; the folder that all paths are relative to.
    """

    base: str
    experts: Sequence[str]
    texts: Mapping[str, list[str]]
    root: Path


def plan_mix(models: Models, out: Path, *, form: Format = "auto", run: Run = QUIET) -> tuple[Plan, list[str]]:
    """The plan of a mixture in `out`, which need not be there, and what a user should know besides. Nothing is written.

    Raises RecipeError (names, text for some experts alone where the others cannot write), MismatchError (another family, a
    model that is the base), SourceError, UnsupportedError, TextError.
    """
    if models.base.endswith((".yaml", ".yml")):
        raise RecipeError("this is a recipe, not a model", where=models.base, remedy=f"modekit build {models.base} OUT")
    root = work_of(out).path  # where the recipe and what experts write lie until they are in OUT; its paths are the same there
    given = _with_given_text(models)
    typed = parse_recipe({**given, "mixture": {"method": "linear"}}, where="modekit mix")
    notes = check_texts(typed, models.root)
    run.begin("compare the models")
    sources = open_recipe_sources(typed, models.root, run=run)  # whose messages name the paths that were typed
    raw = from_folder(given, models.root, out)
    if family_of(sources[0].config, where=sources[0].where).reads == "text" and has_tokenizer(sources[0].folder):  # can write
        raw["experts"] = [{**expert, "text": expert.get("text", SELF)} for expert in raw["experts"]]
    recipe = parse_recipe({**raw, **({} if form == "auto" else {"output": {"format": form}})}, where="modekit mix")
    plan = plan_over(recipe, root, sources, run=run)
    _check_all_differ(plan)
    return plan, notes


def _with_given_text(models: Models) -> RecipeData:
    """Base and experts, with text where there is some. Raises RecipeError."""
    raw = spelled_out({"base_model": models.base, "experts": list(models.experts)}, models.root)
    names = [each["name"] for each in raw["experts"]]
    bases = [each.get("model") for each in raw["experts"]].count(BASE)
    for name in (name for name in models.texts if name not in names):
        found = f"the experts {', '.join(names)}"
        remedy = did_you_mean(name, names) or "use one of these names, or give the expert this one: NAME=PATH"
        if name == OF_THE_BASE and not bases:
            found = f"the base's name; the base is left out, and the experts are {', '.join(names)}"
            remedy = "let the base join (without --without-base), or leave this text out"
        raise RecipeError("text for an expert that is not there", where=f"--text {name}", found=found, remedy=remedy)
    if len(names) < 2 or bases > 1:
        raise RecipeError(
            "a mixture needs two experts; the base may be one of them",
            where="modekit mix",
            found=", ".join(names),
            remedy="name another model, or let the base join (without --without-base)",
        )
    texts = {name: {"text": text} for name, text in models.texts.items()}
    return {**raw, "experts": [{**each, **texts.get(each["name"], {})} for each in raw["experts"]]}


def _check_all_differ(plan: Plan) -> None:
    """Raise MismatchError where an expert is the base, or an earlier expert, under another name."""
    experts = zip(plan.recipe.experts, plan.sources[1:], strict=True)
    named = [(expert.name, source) for expert, source in experts if not expert.is_base]
    for (first, one), (second, other) in combinations([("", plan.sources[0]), *named], 2):
        if are_alike(one, other):
            raise MismatchError(
                f"an expert is {f'the same as {first}' if first else 'the base model itself'}",
                where=f"{second} ({other.spec})",
                found=f"no tensor that differs from {one.spec}",
                remedy="leave it out (the base joins by itself), or correct the path",
            )
