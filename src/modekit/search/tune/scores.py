"""Losses that a search shows beside those it chose by: on the report's text, of base and experts, and of smaller mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modekit.files.write import write_json
from modekit.loaded.experts import give_rows, load_expert
from modekit.loaded.load import load_model
from modekit.planning.plan import Plan
from modekit.run import Run
from modekit.search.tune.folder import read_kept
from modekit.search.tune.results import Candidate, Losses, Reference, best_of
from modekit.search.tune.selection import Selection, losses_of
from modekit.search.tune.study import SearchJob, candidate_recipe
from modekit.search.tune.switched_model import SwitchedModel
from modekit.text.splits import HeldOutSplit


def score_all(
    job: SearchJob, shown: Sequence[Candidate], text: Selection, file: str, stage: str, run: Run
) -> dict[int, Losses]:
    """Loss per domain on all of a text, by number of the candidate; refused ones are left out, what WORK/`file` has is kept."""
    path = job.work / file
    known = read_kept(path, dict[str, Losses]) if path.exists() else {}
    weights = job.weights()
    switched = SwitchedModel(run=job.run)
    numbers = {candidate.number: candidate for candidate in shown if candidate.status != "refused"}
    for number, candidate in run.over(stage, numbers.items(), len(numbers)):
        if known.get(str(number), {}).keys() != {domain.name for domain in text.domains}:
            recipe = candidate_recipe(job.recipe, candidate.mixture)
            shared = weights.checkpoint(weights.plan(recipe))
            model = switched.put(shared, weights.gates(shared, recipe))
            known[str(number)] = losses_of(model, text.domains, f"candidate {number}")
            write_json(path, known)
    return {number: known[str(number)] for number in numbers}


def with_smaller_sizes(job: SearchJob, found: Sequence[Candidate], select: Selection, run: Run) -> list[Candidate]:
    """The candidates, where of every number of active parameters below the best's the most promising is scored in full.

    Dropping compares losses alone; whoever weighs loss against size needs a figure for the smaller ones, too.
    """
    best = best_of(found)
    if best is None:
        return list(found)
    known = {candidate.active for candidate in found if candidate.status == "scored"}
    promising: dict[int, Candidate] = {}
    for candidate in sorted(found, key=lambda each: (-each.tokens, each.mean if each.losses else 0.0)):
        if candidate.status == "dropped" and candidate.active < best.active and candidate.active not in known:
            promising.setdefault(candidate.active, candidate)
    losses = score_all(job, list(promising.values()), select, "smaller.json", "smaller mixtures", run)
    tokens = sum(domain.scored_tokens for domain in select.domains)
    return [
        each.model_copy(update={"status": "scored", "losses": losses[each.number], "tokens": tokens})
        if each.number in losses
        else each
        for each in found
    ]


def reference_losses(job: SearchJob, plan: Plan, splits: Mapping[HeldOutSplit, Selection], run: Run) -> Reference:
    """Per split and domain, the loss of the base and of the domain's own expert."""
    path = job.work / "reference.json"
    names = [domain.name for domain in splits["select"].domains]
    if path.exists():
        known = read_kept(path, Reference)
        if all(sorted(known.get(split, {}).get(of, {})) == sorted(names) for split in splits for of in ("base", "own")):
            return known
    base = plan.sources[0].folder
    model = load_model(base, run=job.run)
    give_rows(model, plan.sources[0], plan.sources[0])
    run.begin("score the base")
    found: Reference = {split: {"base": losses_of(model, text.domains, "base"), "own": {}} for split, text in splits.items()}
    for domain in run.over("score the experts", splits["select"].domains, len(names)):
        assert domain.expert is not None
        is_base = job.recipe.experts[domain.expert].is_base
        own = model if is_base else load_expert(base, plan.sources[1 + domain.expert].folder, run=job.run)
        give_rows(own, plan.sources[1 + domain.expert], plan.sources[0])
        for split, text in splits.items():
            domains = [each for each in text.domains if each.name == domain.name]
            found[split]["own"] |= losses_of(own, domains, f"expert {domain.name}")
    write_json(path, found)
    return found
