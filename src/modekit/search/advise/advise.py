"""`modekit advise recipe.yaml`: everything that can be known of a recipe's models before anything is built.

    files -> findings, drift -> text -> losses, words -> facts -> rules -> a recipe, planned before it is shown

What a recipe says under `mixture` is not read: that is what advice is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modekit.planning.channels import is_carried
from modekit.planning.make import make_plan
from modekit.planning.summary import summary
from modekit.recipes.edit import with_mixture
from modekit.recipes.read import parse_recipe, read_recipe
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.search.advise.advice import Advice
from modekit.search.advise.examined import Examined, examine
from modekit.search.advise.groups import is_projection
from modekit.search.advise.judge import helps, of_files, of_unmixed
from modekit.search.advise.measured import NOTHING, Measured, measure_text
from modekit.search.advise.rules import Choice, Facts, choose
from modekit.text.amounts import SAMPLE_TOKENS


def advise(
    path: Path,
    *,
    tokens: int = SAMPLE_TOKENS,
    native: bool = False,
    run: Run = QUIET,
) -> Advice:
    """Read the models and the select text of a recipe and say what to build. Nothing is written.

    `tokens` per domain; `native`: the result must open in an architecture that other tools know (as `output.format: native`).

    Raises RecipeError, what is wrong with the base model, and UnsupportedError when native is asked for and cannot be had.
    What is wrong with experts and texts becomes findings.
    """
    raw, root = read_recipe(path), path.resolve().parent
    recipe = _models_of(raw, where=str(path))
    native = native or recipe.output.format == "native"
    examined = examine(recipe, root, run=run)
    drift, usable = examined.drift, examined.usable
    findings = [*examined.models.findings, *of_files(recipe, drift, usable)]
    measured = NOTHING
    if examined.moved:
        measured, of_text = measure_text(examined, tokens=tokens, run=run)
        findings += of_text
    # Index of every expert of the advised recipe -> whether its own model is worth having; else the base stands for it.
    kept = {index: index in examined.moved and helps(measured.gains, index) for index in usable}
    if not any(kept.values()):
        return Advice(recipe, root, drift, usable, measured, findings, None, (), None, None)
    facts = _facts(examined, measured, kept, native)
    choices = choose(facts)
    full = [index for index, is_own in kept.items() if is_own and not examined.is_low_rank(index)]
    findings += of_unmixed(recipe, drift, full, choices[0].mixture, facts)
    data = _advised(raw, kept, measured, choices, native)
    planned = summary(make_plan(parse_recipe(data, where="the advised recipe"), root, run=run)).model_dump(mode="json")
    if planned["fit"] is not None and planned["fit"]["reads"] and measured.speed is not None:
        planned["fit"]["seconds"] = planned["fit"]["flops"] / measured.speed
    return Advice(recipe, root, drift, usable, measured, findings, facts, choices, data, planned)


def _models_of(raw: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with a mixture that asks nothing of models and texts. Raises RecipeError."""
    return parse_recipe(with_mixture(raw, {"method": "linear"}), where=where)


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _facts(examined: Examined, measured: Measured, kept: Mapping[int, bool], native: bool) -> Facts:
    own = [index for index, is_own in kept.items() if is_own]
    moved = frozenset().union(*(examined.drift.moved[index] for index in own))
    groups, family = examined.groups, examined.models.family
    gains, confusion = measured.gains, measured.confusion
    known = [index for index in own if gains is not None and index in gains.parts]
    shares = backbones = None
    if gains is not None and known:
        each = [{part: gains.share(p, losses).value for part, losses in gains.parts[p].items()} for p in known]
        shares = {part: min(one[part] for one in each) for part in each[0]}
        if gains.on_average:
            average = [gains.share(index, gains.on_average[index]).value for index in known]
            backbones = {"base": sum(one["ffn"] for one in each) / len(known), "average": sum(average) / len(known)}
    return Facts(
        native=native,
        experts=len(kept),
        low_rank=all(examined.is_low_rank(index) for index in own),
        outside_ffn=any(groups[name] != "ffn" for name in moved),
        named_parts=all(is_projection(name, family) for name in moved if groups[name] == "attention"),
        shares=shares,
        backbones=backbones,
        fit_text=kept.keys() <= measured.fittable,
        told_apart=confusion.told_apart if confusion is not None and len(confusion.domains) == len(kept) else None,
        carried=is_carried(family, examined.models.base.config, len(kept)),
    )


def _advised(
    raw: Mapping[str, Any], kept: Mapping[int, bool], measured: Measured, choices: Sequence[Choice], native: bool
) -> dict[str, Any]:
    """The recipe as plain data: the user's words for models and texts, the rules' mixture."""
    experts = []
    for index, is_own in sorted(kept.items()):
        dropped = [*(["text"] if index in measured.unread else []), *(["as", "rank"] if native else [])]
        expert = _without(raw["experts"][index], *dropped)
        if not is_own and expert.get("model") != BASE:
            expert = {
                "name": expert["name"],
                "model": BASE,
                **_without(expert, "name", "model", "adapter", "as", "rank", "revision"),
            }
        experts.append(expert)
    mixture: dict[str, Any] = {key: value for choice in reversed(choices) for key, value in choice.mixture.items()}
    output = {**(raw.get("output") or {}), **({"format": "native"} if native else {})}
    return with_mixture(
        {
            **_without(raw, "experts", "mixture", "output", "eval"),
            "experts": experts,
            "mixture": {},
            **({"output": output} if output else {}),
            **({"eval": raw["eval"]} if raw.get("eval") else {}),
        },
        mixture,
    )
