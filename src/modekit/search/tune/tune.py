"""`modekit tune`: the best mixture of a recipe's experts by held-out text, with everything that was tried.

    OUT/                     the best mixture, built as its recipe says
    OUT/recipe.yaml          that recipe; its paths work from OUT
    OUT/results/tune.json    every candidate; tune.md the same as a table
    OUT.tuning/              the search: it goes on from there after a kill, or when more trials are asked for

Candidates are compared on the `select` split of the domains' text. What is reported of the best, of the fixed variants and of
the Pareto front comes from the `report` split, which chose nothing.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import yaml

from modekit.building.build import build
from modekit.checkpoint.checkpoint import RECORD_FILE, Checkpoint
from modekit.checkpoint.staging import refuse_existing, write_atomically, write_json
from modekit.errors import TuneError
from modekit.evaluation.evaluate import RESULTS_FOLDER
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.progress import Progress, silent
from modekit.recipes.paths import from_folder
from modekit.recipes.recipe import BASE, Recipe
from modekit.search.tune.folder import alone, claim, stamp
from modekit.search.tune.launch import launch
from modekit.search.tune.results import TuneResults
from modekit.search.tune.scores import reference_losses, score_all, with_smaller_sizes
from modekit.search.tune.selection import Selection, read_selection
from modekit.search.tune.settings import TuneSettings
from modekit.search.tune.space import Space, default_space, read_space
from modekit.search.tune.study import Job, candidate_recipe, candidates, pareto, prepare
from modekit.sources.model import Mappings, TensorRef
from modekit.text.documents import SELECTED_FILE


def tune(
    recipe: Recipe, root: Path, out: Path, *, space: Space | None = None, settings: TuneSettings | None = None,
    native: bool = False, overwrite: bool = False, trust_remote_code: bool = False, progress: Progress = silent,
) -> TuneResults:  # fmt: skip
    """Search, build the best at `out` and write what was found.

    `native`: only what a native architecture says, which is what OUT is then built in. Raises what `make_plan` and `build`
    raise, TextError and TuneError.
    """
    settings = settings or TuneSettings()
    refuse_existing(out, overwrite=overwrite, marker=RECORD_FILE)
    plan = make_plan(plain_recipe(recipe), root, trust_remote_code=trust_remote_code)
    if native:  # a candidate that is not, whatever the space says, is then refused with the reason
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"format": "native"})})
    native = recipe.output.format == "native"
    if native and plan.native is None:
        low = [expert.name for expert in recipe.experts if expert.adapter is not None or expert.lora_rank is not None]
        raise TuneError(
            "native mixtures of these experts cannot be searched",
            found=f"{', '.join(low)}: candidates keep adapters low-rank" if low else plan.why,
            remedy="leave --native and output: {format: native} out" + (", or give full models" if low else ""),
        )
    space = space or space_of(recipe, root, plan, native=native)
    folder = out.with_name(out.name + ".tuning")
    built_native = plan.native is not None and recipe.output.format != "modekit"
    job = Job(recipe, root, folder, space, built_native, settings.trials, settings.seed, trust_remote_code)
    select, report = (
        read_selection(
            recipe, root, _folders(plan), split=split, tokens_per_domain=settings.tokens_per_domain,
            sequence_length=settings.sequence_length, trust_remote_code=trust_remote_code,
        )
        for split in ("select", "report")
    )  # fmt: skip
    claim(job, settings, native, {"models": stamp(plan), "text": select.read})
    with alone(folder):
        started = time.perf_counter()
        prepare(job)
        launch(job, select, settings.processes, settings.ray, progress)
        found = candidates(job)
        best = min((each for each in found if each.status == "scored"), key=lambda each: each.mean, default=None)
        if best is None:
            raise TuneError(
                "no candidate could be scored", where=str(folder), found=next((each.why for each in found), None),
                remedy="widen the space of the search",
            )  # fmt: skip
        searched = time.perf_counter() - started
        found = with_smaller_sizes(job, found, select, progress)
        shown = [best, *(each for each in found if each.name), *pareto(found)]
        results = TuneResults(
            found, best, pareto(found), score_all(job, shown, report, "reported.json", "report", progress),
            reference_losses(job, plan, {"select": select, "report": report}, progress), dataclasses.asdict(settings),
            space.model_dump(mode="json"), {"select": _texts(select), "report": _texts(report)}, searched,
        )  # fmt: skip
        built = make_plan(candidate_recipe(recipe, best.mixture), root, trust_remote_code=trust_remote_code)
        _write(build(built, out, overwrite=overwrite, progress=progress), root, results, select)
        job.bodies().remove()
        return results


def _write(checkpoint: Checkpoint, root: Path, results: TuneResults, select: Selection) -> None:
    """Beside the best mixture: its recipe, what chose it, and what else was tried."""
    out, recipe = checkpoint.folder, checkpoint.record.recipe
    write_atomically(out / SELECTED_FILE, "".join(f"{digest}\n" for digest in sorted(select.digests)).encode())
    said = from_folder(recipe.model_dump(mode="json", exclude_unset=True, by_alias=True), root, out)
    write_atomically(out / "recipe.yaml", yaml.safe_dump(said, sort_keys=False, allow_unicode=True).encode())
    (out / RESULTS_FOLDER).mkdir(exist_ok=True)
    made = {"checkpoint": {"recipe_digest": checkpoint.record.recipe_digest}}
    write_json(out / RESULTS_FOLDER / "tune.json", {**made, **results.as_data()})
    write_atomically(out / RESULTS_FOLDER / "tune.md", results.markdown().encode())


def asked_space(
    file: Path | None, recipe: Recipe, root: Path, *, native: bool, trust_remote_code: bool = False
) -> Space | None:
    """The space that a file narrows the default one to; None without a file. Raises TuneError."""
    if file is None:
        return None
    plan = make_plan(plain_recipe(recipe), root, trust_remote_code=trust_remote_code)
    return read_space(file, space_of(recipe, root, plan, native=native))


def space_of(recipe: Recipe, root: Path, plan: Plan, *, native: bool = False) -> Space:
    """The default space of a recipe."""
    only_adapters = all(
        expert.adapter is not None or expert.lora_rank is not None or expert.is_base for expert in recipe.experts
    )
    differ = not only_adapters and backbones_differ(recipe, root, trust_remote_code=plan.trust_remote_code)
    return default_space(
        recipe, layers=plan.layers, backbones_differ=differ,
        only_adapters=only_adapters, native=native or recipe.output.format == "native",
    )  # fmt: skip


def backbones_differ(recipe: Recipe, root: Path, *, trust_remote_code: bool = False) -> bool:
    """Whether an expert differs from the base outside of what is mixed: whether merging backbones can change anything.

    Reads until the first difference.
    """
    if all(expert.is_base for expert in recipe.experts):
        return False
    merged = make_plan(plain_recipe(recipe, backbone="average"), root, trust_remote_code=trust_remote_code)
    mappings = Mappings()
    try:
        for tensor in merged.tensors:
            if tensor.operation == "merge":
                base, *others = (piece.ref for piece in tensor.pieces)
                if any(not _same(base, other, mappings) for other in others) or any(p.change for p in tensor.pieces):
                    return True
                for piece in tensor.pieces:
                    mappings.forget(piece.ref)
        return False
    finally:
        mappings.close()


def _same(base: TensorRef, other: TensorRef, mappings: Mappings) -> bool:
    return base.dtype == other.dtype and mappings.view(base) == mappings.view(other)


def plain_recipe(recipe: Recipe, backbone: str = BASE) -> Recipe:
    """The recipe's experts in the plainest mixture, in whatever architecture suits them."""
    raw = recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)
    mixture = {"method": "linear", **({"backbone": backbone} if backbone != BASE else {})}
    for expert in raw["experts"]:
        expert.pop("negative_prompts", None)
    return Recipe.model_validate({**raw, "mixture": mixture, "output": {}})


def _texts(selection: Selection) -> dict[str, Any]:
    return {domain.name: dict(domain.record) for domain in selection.domains}


def _folders(plan: Plan) -> list[Path]:
    return list(dict.fromkeys(source.folder for source in plan.sources))
