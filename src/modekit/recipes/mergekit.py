"""Recipes of mergekit -> the recipe of modekit that they become, ready to paste."""

from __future__ import annotations

from collections.abc import Callable

import yaml

from modekit.errors import RecipeError
from modekit.recipes.short import OF_THE_BASE, ExpertNames
from modekit.recipes.strict import BASE, RecipeData

_KEYS = ("merge_method", "gate_mode", "experts_per_token")
_EXPERT_KEYS = ("source_model", "positive_prompts")
_FITS = {"hidden": "centroid", "cheap_embed": "lexical"}  # mode of a gate -> the nearest fit; all others are random
_BACKBONES = ("task_arithmetic", "ties", "slerp")
_DTYPES = ("float32", "bfloat16", "float16")
_MOST = 64  # experts of a recipe that is shown


def check_not_mergekit(raw: RecipeData, check: Callable[[RecipeData], object], where: str) -> None:
    """Raise RecipeError where the keys are mergekit's; it shows the recipe that they become, if that passes the `check`."""
    experts = _mappings(raw.get("experts"))
    if not (any(key in raw for key in _KEYS) or any(key in expert for expert in experts for key in _EXPERT_KEYS)):
        return
    recipe = _of_moe(raw, experts) if experts else _of_merge(raw)
    if raw.get("dtype") in _DTYPES:
        recipe["output"] = {"dtype": raw["dtype"]}
    try:
        check(recipe)
        typed = f", or type `{_mix_of(recipe)}`" if experts else ""
        remedy = f"save this as the recipe{typed}:\n\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)}"
    except RecipeError:
        remedy = "write it as docs/recipe.md shows"
    raise RecipeError("this is a recipe of mergekit", where=where, found=", ".join(map(str, raw))[:200], remedy=remedy)


def _of_moe(raw: RecipeData, experts: list[RecipeData]) -> RecipeData:
    """A mixture whose router is set from prompts."""
    fit = _FITS.get(str(raw.get("gate_mode", "hidden")), "random")
    read = {"centroid": ("prompts", "negative_prompts"), "lexical": ("prompts",)}.get(fit, ())
    base, names = raw.get("base_model"), ExpertNames()
    found = []
    for expert in experts:
        prompts = {"prompts": expert.get("positive_prompts"), "negative_prompts": expert.get("negative_prompts")}
        kept = {key: prompts[key] for key in read if prompts[key]}
        found.append({**_expert(expert.get("source_model"), base, names), **kept})
    top_k = {"top_k": raw["experts_per_token"]} if "experts_per_token" in raw else {}
    return {"base_model": base, "experts": found, "mixture": {**top_k, "router": {"fit": fit}}}


def _mix_of(recipe: RecipeData) -> str:
    """The command that mixes the same models."""
    experts = (f"{expert['name']}={expert['model']}" for expert in recipe["experts"] if expert["model"] != BASE)
    alone = "" if any(expert["model"] == BASE for expert in recipe["experts"]) else " --without-base"
    return f"modekit mix {recipe['base_model']} {' '.join(experts)}{alone} -o OUT"


def _of_merge(raw: RecipeData) -> RecipeData:
    """Of a merge of weights: fixed weights of experts are what is nearest."""
    models = _mappings(raw.get("models"))
    base, names = raw.get("base_model") or next((model.get("model") for model in models), None), ExpertNames()
    models = [model for model in models if model.get("model") != base]
    experts = [_expert(model.get("model"), base, names) for model in models]
    weights = [parameters.get("weight") for model in models for parameters in _mappings([model.get("parameters")])]
    mixture: RecipeData = {"method": "linear"}
    if len(weights) == len(models) and all(isinstance(weight, int | float) for weight in weights):
        mixture["weights"] = {expert["name"]: weight for expert, weight in zip(experts, weights, strict=True)}
    if raw.get("merge_method") in _BACKBONES:
        mixture["backbone"] = raw["merge_method"]
    return {"base_model": base, "experts": experts, "mixture": mixture}


def _expert(model: object, base: object, names: ExpertNames) -> RecipeData:
    """Name and model of an expert."""
    return {"name": names.of(OF_THE_BASE if model == base else model), "model": BASE if model == base else model}


def _mappings(value: object) -> list[RecipeData]:
    return [each for each in value[:_MOST] if isinstance(each, dict)] if isinstance(value, list) else []
