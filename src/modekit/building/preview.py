"""`modekit plan`: what a build would do, from configs and headers alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from modekit.files.disk import disk_of
from modekit.planning.plan import Plan
from modekit.planning.room import bytes_to_carry, disk_needed, held_by_layers, statistics_bytes
from modekit.recipes.backbone import BackboneExpert
from modekit.recipes.choices import why_chosen
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.sources.config import architecture_of, whole
from modekit.weights.factorise import working_bytes
from modekit.weights.made import Delta

_BUILD_FLOOR = 200 * 2**20  # interpreter, numpy and blocks of what is computed, as measured (benchmarks/speed.md)


class Preview(BaseModel, frozen=True):
    """A plan in figures, as `modekit plan --json` prints it; `disk` is that of the recipe's folder, sizes are in bytes.

    Attributes:
        chosen: which experts take part in a token, by the setting that decides it.
        router_why: which it is, and why `fit: auto` takes it; empty where it does not.
        experts: name -> the model or adapter that it is.
        tensors: their number.
        bytes: written, and of statistics.
        parameters, memory: see `Plan.parameters`, `memory_of`.
        disk: needed and free.
    """

    architecture: str
    why: str
    also_runs_in: str
    method: str
    chosen: str
    router: str
    router_why: str
    backbone: str
    experts: dict[str, str]
    dtype: str
    tensors: int
    shards: int
    bytes: dict[str, int]
    parameters: dict[str, int]
    disk: dict[str, int]
    memory: dict[str, int]
    notes: list[str]


def backbone_label(recipe: Recipe) -> str:
    """What the backbone is, in a word or two."""
    merge = recipe.mixture.merge
    if merge is not None:
        return merge.method
    if isinstance(recipe.mixture.backbone, BackboneExpert):
        return f"expert {recipe.mixture.backbone.expert}"
    return BASE


def preview_of(plan: Plan, notes: Iterable[str] = ()) -> Preview:
    """What `modekit plan` shows of a plan, with further notes."""
    recipe, models = plan.recipe, zip(plan.recipe.experts, plan.sources[1:], strict=True)
    return Preview(
        architecture=architecture_of(plan.config),
        why=plan.why,
        also_runs_in=plan.shape.also_runs_in,
        method=recipe.mixture.method,
        chosen=recipe.chosen,
        router="none (fixed weights)" if recipe.mixture.method == "linear" else recipe.mixture.router.fit,
        router_why=why_chosen(recipe, plain=plan.shape.plain),
        backbone=backbone_label(recipe),
        experts={expert.name: expert.source if expert.is_base else model.spec for expert, model in models},
        dtype=str(plan.config["dtype"]),
        tensors=len(plan.tensors),
        shards=len(plan.shards) + 1,
        bytes={"written": plan.bytes_written, "statistics": statistics_bytes(plan)},
        parameters=plan.parameters(),
        disk={"needed": disk_needed(plan), "free": disk_of(plan.root / "OUT").free},
        memory=memory_of(plan),
        notes=[*plan.notes, *notes],
    )


def memory_of(plan: Plan) -> dict[str, int]:
    """Bytes of memory to build (resident in all), to fit the router (0 when nothing is fitted), and to load the result.

    What runs a model, a fit included, holds torch and transformers as well, 0.4 GB.
    """
    router, row, fit = plan.recipe.mixture.router, plan.recipe.mixture.fit, 0
    if row is not None and row.reads_text:
        itemsize = 4 if router.compute_dtype == "float32" else 2
        one = held_by_layers(plan) if plan.shape.plain else plan.parameters()["total"]
        width = 12 * whole(plan.config, plan.family.width) + whole(plan.config, "vocab_size")
        activations = 16 * router.sequence_length * width * 4
        runs = row.runs_models or plan.shape.channels is not None  # these run one expert over a few tokens, without logits
        fit = runs * one * itemsize + row.runs_models * activations + statistics_bytes(plan) * (1 if row.runs_models else 4)
    factored = (
        working_bytes(part.base.shape, part.rank) + 8 * tensor.numel  # one expert's; the factors of all
        for tensor in plan.tensors
        for part in tensor.made.parts
        if isinstance(part, Delta) and part.rank
    )
    return {"build": _BUILD_FLOOR + max(*factored, bytes_to_carry(plan), 0), "fit": fit, "load": plan.bytes_written}
