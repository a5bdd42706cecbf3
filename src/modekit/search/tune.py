"""`modekit tune`: the best variant of a recipe's mixture by held-out text, built, with all that was tried beside it.

    OUT/                     the best mixture, built as its recipe says
    OUT/recipe.yaml          that recipe; its paths work from OUT
    OUT/results/tune.json    every variant; tune.md the same as a table
    OUT.tuning/              a variant at a time, while it is tried

A variant that differs in its router alone is a refit of one that is built. Variants are compared on the `select` split of the
domains' text; OUT/selected-by.txt lists its documents, so that `modekit eval OUT` scores text that chose nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from modekit.building.build import build
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import (
    MismatchError,
    ModekitError,
    OutputError,
    RecipeError,
    TextError,
    TuneError,
    UnsupportedError,
    check_packages,
)
from modekit.evaluation.domains import held_out_domains
from modekit.evaluation.loss import score_domain
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.files.lock import Lock
from modekit.files.marker import MARKER, claim_work_folder
from modekit.files.output import LOCK, clear, refuse_existing, replaced_by
from modekit.files.typed import shortened
from modekit.files.write import empty_folder, remove
from modekit.loaded.load import load_model
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.recipes.edit import RECIPE_FILE, as_file
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import RecipePart
from modekit.routing.refit import refit_as
from modekit.run import QUIET, Run
from modekit.search.results import Candidate, TuneResults, ranked
from modekit.search.variants import Axes, recipe_of, variants_of
from modekit.text.amounts import SAMPLE_TOKENS
from modekit.text.held_out import RecipeTexts
from modekit.text.splits import SELECTED_FILE, mark_of

_REFUSED = (RecipeError, UnsupportedError, MismatchError, TextError)


@dataclass(frozen=True)
class Trial:
    """What variants are tried on: the recipe and the folder of its paths, a work folder, and how much text is read."""

    recipe: Recipe
    root: Path
    work: Path
    tokens_per_domain: int = SAMPLE_TOKENS
    sequence_length: int = 512

    def try_one(
        self, name: str, mixture: RecipePart, built: Checkpoint | None = None, run: Run = QUIET
    ) -> tuple[Candidate, Checkpoint | None]:
        """A variant, scored, and where it is built: `built` with another router, where no more differs.

        Raises what `build` raises for other reasons than that a variant cannot be built.
        """
        try:
            plan = make_plan(recipe_of(self.recipe, mixture), self.root, run=run)
            checkpoint = self._built(plan, name, built, run)
        except _REFUSED as error:
            return Candidate(name=name, mixture=dict(mixture), why=str(error)), built
        sizes = plan.parameters()
        candidate = Candidate(
            name=name,
            mixture=dict(mixture),
            losses=self._losses(checkpoint, name, run),
            active=sizes["active"],
            total=sizes["total"],
            native=plan.shape.plain,
        )
        return candidate, checkpoint

    def _built(self, plan: Plan, name: str, built: Checkpoint | None, run: Run) -> Checkpoint:
        if built is not None and built.shape.plain == plan.shape.plain:
            with suppress(RecipeError):
                return refit_as(built, plan.recipe, run=run)
        empty_folder(self.work, but=(MARKER, LOCK))
        return build(plan, self.work / "variant", run=run)

    def _losses(self, checkpoint: Checkpoint, name: str, run: Run) -> dict[str, float]:
        """Domain -> nats per token on the select split. Raises TuneError when that is not a number."""
        every = held_out_domains(
            checkpoint,
            split="select",
            tokens_per_domain=self.tokens_per_domain,
            sequence_length=self.sequence_length,
            run=run,
        )
        domains = [domain for domain in every if domain.expert is not None]
        model = load_model(checkpoint.folder, run=run)
        found = {}
        for domain in run.over(f"score {name}", domains, len(domains)):
            found[domain.name] = loss = score_domain(model, domain, lambda _: None).loss
            if loss != loss:
                raise TuneError(
                    "the loss is not a number",
                    where=f"{name}, domain {domain.name}",
                    remedy="look for NaN in the models with `modekit build`, which checks every tensor",
                )
        return found


def tune(
    recipe: Recipe,
    root: Path,
    out: Path,
    *,
    axes: Axes | None = None,
    tokens_per_domain: int = SAMPLE_TOKENS,
    sequence_length: int = 512,
    ray: bool = False,
    overwrite: bool = False,
    run: Run = QUIET,
) -> TuneResults:
    """Try every variant, build the best at `out` and write what was found.

    `ray`: every variant is a task of Ray, on as many machines as it has. Raises what `make_plan` and `build` raise, TextError
    and TuneError.
    """
    started = time.perf_counter()
    refuse_existing(out, replaced_by(overwrite))
    run.begin("read the models")
    chosen_by = _select_marks(make_plan(recipe, root, run=run))
    variants = variants_of(recipe, axes or {})
    with _work_folder(out) as work:
        trial = Trial(recipe, root, work, tokens_per_domain, sequence_length)
        found = ranked(_on_ray(trial, variants, run) if ray else _here(trial, variants, run))
        best = found[0]
        if not best.best:
            raise TuneError("no variant could be scored", where=str(out), found=best.why, remedy="mend what is named")
        plan = make_plan(recipe_of(recipe, best.mixture), root, run=run)
        results = TuneResults(
            recipe_digest=plan.recipe.digest(),
            candidates=found,
            tokens_per_domain=tokens_per_domain,
            sequence_length=sequence_length,
            seconds=time.perf_counter() - started,
            notes=[f"{each.name} left out: {' '.join(each.why.split())}" for each in found if each.why],
        )
        build(plan, out, overwrite=overwrite, beside=_beside(plan, out, results, chosen_by), run=run)
        return results


def _select_marks(plan: Plan) -> list[str]:
    """Marks of the documents that choose. Raises TextError where there are none."""
    texts = RecipeTexts(plan.recipe, plan.root, models=[source.folder for source in plan.sources]).select()
    if not any(held.documents for held in texts):
        raise TextError("there is no text to choose by", where="experts[].text, eval", remedy="give text per expert")
    return sorted({mark_of(document) for held in texts for document in held.documents})


def _beside(plan: Plan, out: Path, results: TuneResults, chosen_by: Sequence[str]) -> dict[str, bytes]:
    """Files beside the best mixture, there from its first moment on: its recipe, what chose it, and what else was tried."""
    return {
        SELECTED_FILE: "".join(f"{mark}\n" for mark in chosen_by).encode(),
        RECIPE_FILE: as_file(plan.recipe, plan.root, out),
        f"{RESULTS_FOLDER}/{results.file}": results.as_json(),
        f"{RESULTS_FOLDER}/tune.md": results.markdown().encode(),
    }


def _here(trial: Trial, variants: Mapping[str, RecipePart], run: Run) -> list[Candidate]:
    """One variant after the other; the next is a refit of the last, where it can be."""
    found: list[Candidate] = []
    built: Checkpoint | None = None
    for name, mixture in variants.items():
        run.begin(f"variant {name}")
        candidate, built = trial.try_one(name, mixture, built, replace(run, sync=False))
        found.append(candidate)
    return found


def _on_ray(trial: Trial, variants: Mapping[str, RecipePart], run: Run) -> list[Candidate]:
    """Every variant as a task, on the cluster of RAY_ADDRESS, else on this machine. All of it sees the same folders."""
    check_packages(("ray",), "pip install 'modekit[ray]', or leave --ray out")
    ray: Any = import_module("ray")
    try:
        ray.init(logging_level="error", log_to_driver=False)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = min(max(1, int(node.get("CPU", 1)) * len(nodes) // len(variants)) for node in nodes)
        share = {"num_cpus": cores, "num_gpus": int(any(node.get("GPU") for node in nodes)), "max_retries": 0}
        task = ray.remote(**share)(_try_there)
        quiet = Run(run.trust_remote_code, sync=False)
        waiting = [task.remote(trial, name, mixture, quiet) for name, mixture in variants.items()]
        return [ray.get(each) for each in run.over("variants", waiting, len(waiting))]
    except (ray.exceptions.RayError, ConnectionError, ValueError) as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, ModekitError):
            raise cause from None
        raise TuneError("Ray has stopped", found=shortened(cause), remedy="see `ray status`, or leave --ray out") from None
    finally:
        ray.shutdown()


def _try_there(trial: Trial, name: str, mixture: RecipePart, run: Run) -> Candidate:
    """What Ray runs, on whichever machine: in a folder of its own."""
    work = trial.work / hashlib.sha256(name.encode()).hexdigest()[:16]
    try:
        return replace(trial, work=work).try_one(name, mixture, run=run)[0]
    finally:
        remove(work)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """OUT.tuning, empty and held by this command; gone afterwards. Raises OutputError, TuneError."""
    folder = out.with_name(f"{out.name}.tuning")
    if not claim_work_folder(folder, "tuning", out.name):
        raise OutputError(
            "a folder that modekit did not make is in the way", where=str(folder), remedy="move it away, or choose another OUT"
        )
    lock = Lock(folder / LOCK)
    if not lock.take():
        raise TuneError("another command is at this search", where=str(folder), remedy="wait for it, or choose another OUT")
    try:
        empty_folder(folder, but=(MARKER, LOCK))
        yield folder
    finally:
        clear(folder, lock)
