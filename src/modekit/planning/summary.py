"""A plan in a few numbers and words: what `modekit plan` shows before anything is written."""

from __future__ import annotations

import shutil
from typing import Any

from modekit.planning.plan import Plan
from modekit.planning.work import fit_work
from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE


def backbone_label(recipe: Recipe) -> str:
    """What the backbone is, in a word or two."""
    merge = recipe.mixture.merge
    if merge is not None:
        return merge.method
    if isinstance(recipe.mixture.backbone, BackboneExpert):
        return f"expert {recipe.mixture.backbone.expert}"
    return BASE


def summary(plan: Plan) -> dict[str, Any]:
    """A plan as plain data: what `modekit plan --json` prints. The disk is that of the recipe's folder."""
    recipe = plan.recipe
    statistics = plan.statistics_bytes(in_memory=False) if recipe.mixture.keeps_statistics else 0
    work = fit_work(plan)
    operations: dict[str, int] = {}
    for tensor in plan.tensors:
        label = "router" if tensor.role == "router" else tensor.operation
        operations[label] = operations.get(label, 0) + 1
    return {
        "architecture": plan.config["architectures"][0],
        "why": plan.why,
        "also_runs_in": plan.shape.also_runs_in,
        "method": recipe.mixture.method,
        "top_k": recipe.top_k,
        "router": "none (fixed weights)" if recipe.mixture.method == "linear" else recipe.mixture.router.said,
        "backbone": backbone_label(recipe),
        "experts": [
            {"name": expert.name, "model": expert.source, "text": bool(expert.text or expert.prompts)}
            for expert in recipe.experts
        ],
        "mixed": plan.shape.mixed,
        "layers": plan.layers,
        "dtype": plan.config["dtype"],
        "tensors": {"total": len(plan.tensors), **operations},
        "shards": len(plan.shards) + 1,
        "bytes": {"read": plan.bytes_read, "written": plan.bytes_written, "statistics": statistics},
        "parameters": plan.parameters(),
        "disk": {"needed": plan.disk_needed, "free": shutil.disk_usage(plan.root).free},
        "memory": plan.memory(),
        "fit": work.as_data() if work is not None else None,
        "notes": list(plan.notes),
    }
