"""`modekit tune`: the best mixture of a recipe's experts by held-out text, with everything that was tried.

    OUT/                     the best mixture, built as its recipe says
    OUT/recipe.yaml          that recipe; its paths work from OUT
    OUT/results/tune.json    every candidate; tune.md the same as a table
    OUT.tuning/              the search: it goes on from there after a kill, or when more trials are asked for

Candidates are compared on the `select` split of the domains' text. What is reported of the best, of the fixed variants and of
the Pareto front is of the text that `modekit eval OUT` scores, which chose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from modekit.building.build import build
from modekit.checkpoint.checkpoint import open_checkpoint
from modekit.errors import TuneError
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.files.output import refuse_existing, replaced_by
from modekit.files.write import json_bytes, write_json
from modekit.loaded.experts import give_rows, load_expert
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan, plan_of
from modekit.planning.plan import Plan
from modekit.recipes.edit import RECIPE_FILE, as_file
from modekit.recipes.recipe import Recipe
from modekit.run import QUIET, Run
from modekit.search.tune.folder import alone, announce, claim, close, folder_of, identity_of, is_built, read_kept
from modekit.search.tune.launch import check_ray, launch
from modekit.search.tune.results import Candidate, Losses, Reference, TuneResults, TuneSettings, best_of, pareto, rank
from modekit.search.tune.selection import Selection, losses_of, read_selections
from modekit.search.tune.shared_weights import SwitchedModel
from modekit.search.tune.space import Space, default_space, plain_recipe, read_space
from modekit.search.tune.study import SearchJob, candidate_recipe, candidates, prepare
from modekit.sources.open import open_recipe_sources
from modekit.text.splits import SELECTED_FILE, HeldOutSplit


def tune(
    recipe: Recipe,
    root: Path,
    out: Path,
    *,
    space: Space | Path | None = None,
    settings: TuneSettings | None = None,
    native: bool = False,
    overwrite: bool = False,
    run: Run = QUIET,
) -> TuneResults:
    """Search, build the best at `out` and write what was found.

    `space`: a file changes axes of the default one. `native`: only what a native architecture can express, which OUT is built
    in. Raises what `make_plan` and `build` raise, RecipeError, TextError and TuneError.
    """
    settings = settings or TuneSettings()
    if settings.ray:  # before anything is read
        check_ray()
    built = is_built(out)
    if not built:
        refuse_existing(out, replaced_by(overwrite))
    plain = plain_recipe(recipe)
    plan = plan_of(plain, root, open_recipe_sources(plain, root, run=run), run=run)  # whole: they are run, too
    if native:  # a candidate that is not, whatever the space says, is then refused with the reason
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": "native"})})
    recipe = plan_of(recipe, root, plan.sources, run=run).recipe if recipe.mixture.is_open else recipe
    native = recipe.output.format == "native"
    if native and not plan.shape.plain:
        raise _not_native(recipe, plan)
    if not isinstance(space, Space):
        default = default_space(recipe, root, plan, native=native)
        space = default if space is None else read_space(space, default)
    folder = folder_of(out)
    built_native = plan.shape.plain and recipe.output.format != "modekit"
    job = SearchJob(recipe, root, folder, space, built_native, settings.trials, settings.seed, run.trust_remote_code)
    folders = list(dict.fromkeys(source.folder for source in plan.sources))
    sizes = {"tokens_per_domain": settings.tokens_per_domain, "sequence_length": settings.sequence_length}
    texts = read_selections(recipe, root, folders, **sizes, run=job.run)
    claim(folder, identity_of(job, settings, native, plan, texts["select"].read))
    with alone(folder):
        results = _search(job, plan, settings, texts, run)
        best = make_plan(candidate_recipe(recipe, results.best.mixture), root, run=run)
        if not (built and open_checkpoint(out).record.recipe_digest == best.recipe.digest()):
            refuse_existing(out, replaced_by(overwrite))
            beside = _beside(best, out, results, texts["select"])
            announce(out, beside)
            build(best, out, overwrite=overwrite, beside=beside, run=run)
        job.weights().remove()
        close(out)
        return results


def _not_native(recipe: Recipe, plan: Plan) -> TuneError:
    low = [expert.name for expert in recipe.experts if expert.adapter is not None or expert.is_low_rank]
    return TuneError(
        "native mixtures of these experts cannot be searched",
        found=f"{', '.join(low)}: candidates keep adapters low-rank" if low else plan.why,
        remedy="leave --native and output: {format: native} out" + (", or give full models" if low else ""),
    )


def _search(
    job: SearchJob, plan: Plan, settings: TuneSettings, texts: Mapping[HeldOutSplit, Selection], run: Run
) -> TuneResults:
    """Try candidates, and score in full what is to be shown. Raises TuneError when none has a loss."""
    started = time.perf_counter()
    select, report = texts["select"], texts["report"]
    prepare(job)
    launch(job, select, settings.processes, settings.ray, run)
    found = candidates(job)
    searched = time.perf_counter() - started
    found = with_smaller_sizes(job, found, select, run)
    best = best_of(found)
    if best is None:
        raise TuneError(
            "no candidate could be scored",
            where=str(job.work),
            found=next((each.why for each in found), None),
            remedy="widen the space of the search",
        )
    shown = [best, *(each for each in found if each.name), *pareto(found)]
    reported = score_all(job, shown, report, "reported.json", "report", run)
    reference = reference_losses(job, plan, texts, run)
    return TuneResults(
        checkpoint={"recipe_digest": candidate_recipe(job.recipe, best.mixture).digest()},
        candidates=rank(found, reported, reference),
        reference=reference,
        settings=settings,
        space=job.space.model_dump(mode="json"),
        text={split: {domain.name: domain.record for domain in text.domains} for split, text in texts.items()},
        seconds=searched,
    )


def _beside(best: Plan, out: Path, results: TuneResults, select: Selection) -> dict[str, bytes]:
    """Files beside the best mixture, there from its first moment on: its recipe, what chose it, and what else was tried."""
    return {
        SELECTED_FILE: "".join(f"{digest}\n" for digest in sorted(select.digests)).encode(),
        RECIPE_FILE: as_file(best.recipe, best.root, out),
        f"{RESULTS_FOLDER}/tune.json": json_bytes(results.model_dump(mode="json")),
        f"{RESULTS_FOLDER}/tune.md": results.markdown().encode(),
    }


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
    """The candidates, where of every number of active parameters below the best's the most promising is scored in full."""
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
