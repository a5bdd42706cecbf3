"""`modekit advise recipe.yaml`: everything that can be known of a recipe's models before anything is built.

files -> drift -> text -> losses, words -> findings, facts -> rules -> a recipe, planned before it is shown
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modekit.planning.channel_choice import is_carried
from modekit.planning.make import make_plan
from modekit.planning.summary import summary
from modekit.recipes.edit import with_mixture
from modekit.recipes.read import parse_recipe, read_recipe
from modekit.recipes.strict import BASE
from modekit.run import QUIET, Run
from modekit.search.advise.findings import of_confusion, of_files, of_gains, of_unmixed
from modekit.search.advise.gains import BASE_INDEX, ON_AVERAGE, Gains, has_gain
from modekit.search.advise.models import ComparedModels, compare_models
from modekit.search.advise.recipe import advised_recipe
from modekit.search.advise.result import Advice, ExpertDrift, ExpertGain, ExpertPairs, Facts, GroupDrift, PartGain, WordTable
from modekit.search.advise.rules import choose
from modekit.search.advise.text import NOTHING, TextMeasurements, measure_text
from modekit.search.advise.ways import Planned, ways_of
from modekit.text.amounts import SAMPLE_TOKENS


def advise(path: Path, *, tokens: int = SAMPLE_TOKENS, native: bool = False, run: Run = QUIET) -> Advice:
    """Read the models and the select text of a recipe and say what to build. Nothing is written.

    `tokens` per domain; `native`: the result must open in an architecture that other tools know (as `output.format: native`).
    Raises RecipeError, what is wrong with the base model, and UnsupportedError when native is asked for and cannot be had. What
    is wrong with experts and texts becomes findings.
    """
    raw, root = read_recipe(path), path.resolve().parent
    recipe = parse_recipe(with_mixture(raw, {"method": "linear"}), where=str(path))  # asks nothing of models and texts
    native = native or recipe.output.format == "native"
    compared = compare_models(recipe, root, run=run)
    findings = [*compared.findings, *of_files(recipe, compared.drift, compared.usable)]
    measured = NOTHING
    if compared.moved:
        measured, of_text = measure_text(compared, tokens=tokens, run=run)
        findings += of_text
    if measured.confusion is not None:
        findings += of_confusion(recipe, measured.confusion)
    if measured.gains is not None:
        findings += of_gains(recipe, measured.gains, compared.moved)
    found = _found(compared, measured)
    # Index of every expert of the advised recipe -> whether its own model is worth having; else the base stands for it.
    helps = measured.gains.helps if measured.gains is not None else lambda _: True
    kept = {index: index in compared.moved and helps(index) for index in compared.usable}
    if not any(kept.values()):
        return found.model_copy(update={"findings": findings})
    facts = _facts(compared, measured, kept, native)
    output = raw.get("output")
    open_output = {key: value for key, value in output.items() if key != "format"} if isinstance(output, dict) else {}

    def planned_by(known: Facts) -> Planned:
        choice = choose(known)
        data = advised_recipe({**raw, "output": open_output}, kept, measured.unread, choice, known.native)
        return choice, summary(make_plan(parse_recipe(data, where="the advised recipe"), root, run=run))

    chosen = choose(facts)
    full = [index for index, is_own in kept.items() if is_own and not compared.is_low_rank(index)]
    findings += of_unmixed(recipe, compared.drift, full, chosen.mixture, facts)
    data = advised_recipe(raw, kept, measured.unread, chosen, native)
    planned = summary(make_plan(parse_recipe(data, where="the advised recipe"), root, run=run))
    fit = planned.fit
    if fit is not None and fit.reads and measured.speed is not None:
        fit = fit.model_copy(update={"seconds": fit.flops / measured.speed})
        planned = planned.model_copy(update={"fit": fit})
    ways = ways_of(compared, measured.gains, facts, kept, planned_by)
    said = {"facts": facts, "advice": (chosen,), "recipe": data, "plan": planned, "ways": ways}
    return found.model_copy(update={"findings": findings, **said})


def _found(compared: ComparedModels, measured: TextMeasurements) -> Advice:
    """What was measured, by name."""
    recipe, drift, usable = compared.recipe, compared.drift, compared.usable
    name = {**dict(enumerate(recipe.names)), BASE_INDEX: BASE}
    gains, confusion = measured.gains, measured.confusion
    return Advice(
        base_model=recipe.base_model,
        drift={
            name[index]: ExpertDrift(
                relative=drift.total(index),
                groups={
                    group: GroupDrift(relative=drift.relative(index, group), share=drift.share(index, group))
                    for group in drift.groups
                },
            )
            for index in usable
        },
        similarity=ExpertPairs(
            experts=[name[index] for index in usable],
            cosine=[[drift.cosine(i, j) for j in usable] for i in usable],
            distance=[[drift.distance(i, j) for j in usable] for i in usable],
        ),
        text={name[index]: text for index, text in measured.texts.items()},
        losses={}
        if gains is None
        else {name[model]: {name[domain]: losses.mean for domain, losses in row.items()} for model, row in gains.whole.items()},
        gain={} if gains is None else {name[index]: _gain(gains, index) for index in usable if index in gains.parts},
        words=confusion
        and WordTable(
            domains=[name[index] for index in confusion.domains],
            named=confusion.named.tolist(),
            accuracy=confusion.accuracy,
        ),
        findings=[],
    )


def _gain(gains: Gains, index: int) -> ExpertGain:
    nats = gains.gain(index, index)
    return ExpertGain(
        nats=nats,
        parts={
            part: PartGain(loss=losses.mean, share=gains.share(index, losses) if has_gain(nats) else None)
            for part, losses in gains.parts[index].items()
        },
    )


def _facts(compared: ComparedModels, measured: TextMeasurements, kept: Mapping[int, bool], native: bool) -> Facts:
    own = [index for index, is_own in kept.items() if is_own]
    moved = frozenset().union(*(compared.drift.moved[index] for index in own))
    gains, experts = measured.gains, compared.recipe.experts
    fitted = measured.fittable & kept.keys()
    given = [index for index in kept if index not in measured.unread and (experts[index].text or experts[index].prompts)]
    known = [index for index in own if gains is not None and index in gains.parts]
    shares = backbones = None
    if gains is not None and known:
        each = [{part: gains.share(p, losses).value for part, losses in gains.parts[p].items()} for p in known]
        shares = {part: min(one[part] for one in each) for part in each[0]}
        if ON_AVERAGE in shares:
            backbones = {
                name: sum(one[part] for one in each) / len(each) for name, part in (("base", "ffn"), ("average", ON_AVERAGE))
            }
    return Facts(
        native=native,
        experts=len(kept),
        low_rank=all(compared.is_low_rank(index) for index in own),
        outside_ffn=any(compared.groups[name] != "ffn" for name in moved),
        shares=shares,
        backbones=backbones,
        text="all" if len(fitted) == len(kept) else "some" if given else "none",
        lexical_fits=is_carried(compared.family, compared.base.config, len(kept)),
    )
