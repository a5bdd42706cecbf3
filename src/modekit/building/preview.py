"""What a build would do, told before it: `modekit plan`. Configs and headers alone, unless its time is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modekit.building.needed_time import needed_time
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.planning.summary import summary
from modekit.planning.work import fit_work
from modekit.recipes.read import load_recipe
from modekit.run import QUIET, Run
from modekit.text.glance import check_texts


def preview(recipe: Path, *, measure: bool = False, run: Run = QUIET) -> dict[str, Any]:
    """The plan of a recipe file as plain data; what `modekit plan --json` prints.

    With `measure` a layer is run for a second or two to say how long the fit will take on this machine (`fit.seconds`); that
    alone imports torch. Raises what a build would raise for models, and TextError for a text as far as it is read here.
    """
    root, parsed = recipe.resolve().parent, load_recipe(recipe)
    plan = make_plan(parsed, root, run=run, headers_only=True)
    notes = check_texts(parsed, root, plan.family.reads)
    found = {**summary(plan), "time": needed_time(plan).as_data()}
    found["notes"] += notes
    if measure and found["fit"] is not None:
        found["fit"]["seconds"] = fit_seconds(plan)
    return found


def fit_seconds(plan: Plan) -> float | None:
    """Seconds that the fit of a plan's router takes on this machine at most, measured on one layer; None when no model is run.

    Reading the models and solving for the gates come on top: seconds.
    """
    work = fit_work(plan)
    if work is None or not work.reads:
        return None
    import torch

    from modekit.loaded.speed import layer_seconds, moment_seconds

    router = plan.recipe.mixture.router
    config = plan.family.dense_config(plan.sources[0].config)
    dtype = torch.float32 if router.compute_dtype == "float32" else torch.bfloat16
    per_token = work.passes * plan.layers * layer_seconds(config, sequence_length=router.sequence_length, dtype=dtype)
    widest = max(slot.shape[1] for slot in plan.slots)
    if plan.recipe.mixture.keeps_statistics:  # their cost grows with the square of the width
        per_token += moment_seconds(widest) * sum((slot.shape[1] / widest) ** 2 for slot in plan.slots)
    return work.tokens * per_token
