"""Losses that a search shows beside those it chose by: on the report's text, of base and experts, and of smaller mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modekit.evaluation.loss import score_domain
from modekit.files.write import write_json
from modekit.loaded.experts import load_expert
from modekit.loaded.load import load_model
from modekit.planning.plan import Plan
from modekit.run import Run
from modekit.search.tune.folder import read_kept
from modekit.search.tune.results import Candidate, Losses, Reference, best_of
from modekit.search.tune.selection import Selection, Tally
from modekit.search.tune.study import SearchJob, candidate_recipe
from modekit.search.tune.switched_model import SwitchedModel


def score_all(
    job: SearchJob, shown: Sequence[Candidate], text: Selection, file: str, stage: str, run: Run
) -> dict[int, Losses]:
    """Loss per domain on all of a text, by number of the candidate; refused ones are left out, what WORK/`file` has is kept."""
    path = job.work / file
    known = read_kept(path, dict[str, Losses]) if path.exists() else {}
    weights = job.weights()
    switched = SwitchedModel(run=job.run)
    numbers = {candidate.number: candidate for candidate in shown if candidate.status != "refused"}
    for place, (number, candidate) in enumerate(numbers.items()):
        run.progress(stage, place, len(numbers))
        if known.get(str(number), {}).keys() != {domain.name for domain in text.domains}:
            recipe = candidate_recipe(job.recipe, candidate.mixture)
            shared = weights.checkpoint(weights.plan(recipe))
            model = switched.put(shared, weights.gates(shared, recipe))
            tally = Tally()
            tally.add(model, text.domains, f"candidate {number}")
            known[str(number)] = tally.losses
            write_json(path, known)
    run.progress(stage, len(numbers), len(numbers))
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


def reference_losses(job: SearchJob, plan: Plan, splits: Mapping[str, Selection], run: Run) -> Reference:
    """Per split and domain, the loss of the base and of the domain's own expert."""
    path = job.work / "reference.json"
    if path.exists():
        known = read_kept(path, Reference)
        if _is_whole(known, splits):
            return known
    found: Reference = {split: {"base": {}, "own": {}} for split in splits}
    base = plan.sources[0].folder
    model = load_model(base, run=job.run)
    run.begin("score the base")
    for split, selection in splits.items():
        for domain in selection.domains:
            found[split]["base"][domain.name] = score_domain(model, domain, lambda _: None).loss
    for place, domain in enumerate(splits["select"].domains):
        run.progress("score the experts", place, len(splits["select"].domains))
        assert domain.expert is not None
        own = (
            model
            if job.recipe.experts[domain.expert].is_base
            else load_expert(base, plan.sources[1 + domain.expert].folder, run=job.run)
        )
        for split, selection in splits.items():
            text = next(each for each in selection.domains if each.name == domain.name)
            found[split]["own"][domain.name] = score_domain(own, text, lambda _: None).loss
    write_json(path, found)
    return found


def _is_whole(known: Reference, splits: Mapping[str, Selection]) -> bool:
    """Whether losses are those of every split and domain, of the base and the own expert."""
    return all(
        known.get(split, {}).get(of, {}).keys() == {domain.name for domain in selection.domains}
        for split, selection in splits.items()
        for of in ("base", "own")
    )
