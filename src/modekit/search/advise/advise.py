"""`modekit advise recipe.yaml`: everything that can be known of a recipe's models before anything is built.

    files -> findings, drift -> text -> losses, words -> facts -> rules -> a recipe, planned before it is shown

What a recipe says under `mixture` is not read: that is what advice is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modekit.errors import SourceError
from modekit.planning.make import make_plan, summary
from modekit.progress import Progress, silent
from modekit.recipes.recipe import BASE, Recipe, parse_recipe, read_recipe
from modekit.search.advise.advice import Advice
from modekit.search.advise.checks import Models, open_models
from modekit.search.advise.drift import Drift, compare
from modekit.search.advise.groups import Group, groups_of, is_projection
from modekit.search.advise.judge import helps, of_files
from modekit.search.advise.measured import NOTHING, Measured, measure_text
from modekit.search.advise.rules import Choice, Facts, choose
from modekit.sources.adapter import AdapterSource

TOKENS = 8_192
"""Read of each domain's select text by default."""


def advise(
    path: Path, *, tokens: int = TOKENS, native: bool = False, trust_remote_code: bool = False, progress: Progress = silent
) -> Advice:
    """Read the models and the select text of a recipe and say what to build. Nothing is written.

    `tokens` per domain; `native`: the result must open in an architecture that other tools know (as `output.format: native`).

    Raises RecipeError, what is wrong with the base model, and UnsupportedError when native is asked for and cannot be had.
    What is wrong with experts and texts becomes findings.
    """
    raw, root = read_recipe(path), path.resolve().parent
    recipe = _models_of(raw, where=str(path))
    native = native or recipe.output.format == "native"
    models = open_models(recipe, root, trust_remote_code=trust_remote_code)
    groups = groups_of(models.base, models.family)
    sources = [models.experts.get(place, models.base) for place in range(len(recipe.experts))]
    drift = compare(models.base, sources, groups, progress=progress)
    if drift.base_damaged:
        raise SourceError(
            "the weights hold NaN or Inf", where=f"base_model ({models.base.spec}): {drift.base_damaged[0]}",
            remedy="the model is damaged: save or download it again",
        )  # fmt: skip
    usable = [place for place in models.experts if not drift.damaged[place]]
    findings = [*models.findings, *of_files(recipe, drift, usable)]
    measured = NOTHING
    if any(drift.moved[place] for place in usable):
        measured, of_text = measure_text(
            recipe, root, models, groups, drift, usable, tokens=tokens, trust_remote_code=trust_remote_code, progress=progress
        )
        findings += of_text
    # Place of every expert of the advised recipe -> whether its own model is worth having; else the base stands for it.
    kept = {place: bool(drift.moved[place]) and helps(measured.gains, place) for place in usable}
    if not any(kept.values()):
        return Advice(recipe, root, drift, usable, measured, findings, None, (), None, None)
    facts = _facts(recipe, models, groups, drift, measured, kept, native)
    choices = choose(facts)
    data = _advised(raw, kept, measured, choices, native)
    planned = summary(make_plan(parse_recipe(data, where="the advised recipe"), root, trust_remote_code=trust_remote_code))
    if planned["fit"] is not None and planned["fit"]["reads"] and measured.speed is not None:
        planned["fit"]["seconds"] = planned["fit"]["flops"] / measured.speed
    return Advice(recipe, root, drift, usable, measured, findings, facts, choices, data, planned)


def _models_of(raw: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with a mixture that asks nothing of models and texts. Raises RecipeError."""
    plain = {**raw, "mixture": {"method": "linear"}}
    if isinstance(raw.get("experts"), list):  # negative prompts are for a fit that is not advised
        plain["experts"] = [_without(each, "negative_prompts") if isinstance(each, dict) else each for each in raw["experts"]]
    return parse_recipe(plain, where=where)


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _facts(
    recipe: Recipe, models: Models, groups: Mapping[str, Group], drift: Drift, measured: Measured, kept: Mapping[int, bool],
    native: bool,
) -> Facts:  # fmt: skip
    own = [place for place, is_own in kept.items() if is_own]
    moved = frozenset().union(*(drift.moved[place] for place in own))
    experts = recipe.experts
    gains = measured.gains
    known = [place for place in own if gains is not None and place in gains.parts]
    shares = backbones = None
    if gains is not None and known:
        each = [{part: gains.share(p, losses).value for part, losses in gains.parts[p].items()} for p in known]
        shares = {part: min(one[part] for one in each) for part in each[0]}
        if gains.on_average:
            average = [gains.share(place, gains.on_average[place]).value for place in known]
            backbones = {"base": sum(one["ffn"] for one in each) / len(known), "average": sum(average) / len(known)}
    return Facts(
        native=native,
        experts=len(kept),
        low_rank=all(isinstance(models.experts[p], AdapterSource) or experts[p].lora_rank is not None for p in own),
        outside_ffn=any(groups[name] != "ffn" for name in moved),
        named_parts=all(is_projection(name, models.family) for name in moved if groups[name] == "attention"),
        shares=shares,
        backbones=backbones,
        fit_text=kept.keys() <= measured.fittable,
        told_apart=measured.words.told_apart
        if measured.words is not None and len(measured.words.domains) == len(kept)
        else None,
    )


def _advised(
    raw: Mapping[str, Any], kept: Mapping[int, bool], measured: Measured, choices: Sequence[Choice], native: bool
) -> dict[str, Any]:
    """The recipe as plain data: the user's words for models and texts, the rules' mixture."""
    experts = []
    for place, is_own in sorted(kept.items()):
        dropped = ["negative_prompts", *(["text"] if place in measured.unread else []), *(["as", "rank"] if native else [])]
        expert = _without(raw["experts"][place], *dropped)
        if not is_own and expert.get("model") != BASE:
            expert = {
                "name": expert["name"],
                "model": BASE,
                **_without(expert, "name", "model", "adapter", "as", "rank", "revision"),
            }
        experts.append(expert)
    mixture: dict[str, Any] = {key: value for choice in reversed(choices) for key, value in choice.mixture.items()}
    output = {**(raw.get("output") or {}), **({"format": "native"} if native else {})}
    return {
        **_without(raw, "experts", "mixture", "output", "eval"), "experts": experts, "mixture": mixture,
        **({"output": output} if output else {}), **({"eval": raw["eval"]} if raw.get("eval") else {}),
    }  # fmt: skip
