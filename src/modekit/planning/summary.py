"""What a plan comes to, in numbers and words: what `modekit plan` shows before anything is written. No time is measured."""

from __future__ import annotations

import shutil

from pydantic import BaseModel

from modekit.planning.carry import STREAM_TOKENS
from modekit.planning.channels import MEASURED_TOKENS
from modekit.planning.plan import Plan
from modekit.recipes.auto import why_chosen
from modekit.recipes.mixture import BackboneExpert
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.sources.names import split_layer

_EVALUATIONS = 500  # passes over the kept tokens that a logistic fit makes of a router, forward and back, at most
_FEWEST_EXPERTS = 8  # a product with fewer columns takes no less: reading the tokens is what takes time


class FitWork(BaseModel, frozen=True):
    """What a fit does at most; texts may be shorter.

    Attributes:
        reads: whether a model reads the text; a table is made from token ids, which takes seconds.
        tokens: read by the model, of all domains together.
        flops: floating-point operations of that and of the statistics that it keeps.
        passes: how many passes forward a token costs.
        solving: floating-point operations of making gates from what was kept, as if all of them were those of a model.
        seconds: that it takes, where somebody measured that.
    """

    reads: bool
    tokens: int
    flops: int
    passes: int = 1
    solving: int = 0
    seconds: float | None = None


class ExpertSummary(BaseModel, frozen=True):
    """An expert, the model or adapter that it is, and whether it has text."""

    name: str
    model: str
    text: bool


class PlanSummary(BaseModel, frozen=True):
    """A plan; `disk` is that of the recipe's folder, sizes are in bytes.

    Attributes:
        router_why: which it is, and why `fit: auto` takes it; empty where it does not.
        tensors: their number in all, and by the operation that makes them.
        bytes: read, written, and of statistics.
        parameters, memory: as `Plan` has them.
        disk: needed and free.
        fit: None where the router is set without text.
    """

    architecture: str
    why: str
    also_runs_in: str
    method: str
    top_k: int
    router: str
    router_why: str
    backbone: str
    experts: list[ExpertSummary]
    mixed: list[str]
    layers: int
    dtype: str
    tensors: dict[str, int]
    shards: int
    bytes: dict[str, int]
    parameters: dict[str, int]
    disk: dict[str, int]
    memory: dict[str, int]
    fit: FitWork | None
    notes: list[str]


def backbone_label(recipe: Recipe) -> str:
    """What the backbone is, in a word or two."""
    merge = recipe.mixture.merge
    if merge is not None:
        return merge.method
    if isinstance(recipe.mixture.backbone, BackboneExpert):
        return f"expert {recipe.mixture.backbone.expert}"
    return BASE


def summary(plan: Plan) -> PlanSummary:
    """What `modekit plan` shows of a plan."""
    recipe, operations = plan.recipe, dict[str, int]()
    for tensor in plan.tensors:
        label = "router" if tensor.role == "router" else tensor.operation
        operations[label] = operations.get(label, 0) + 1
    return PlanSummary(
        architecture=plan.architecture,
        why=plan.why,
        also_runs_in=plan.shape.also_runs_in,
        method=recipe.mixture.method,
        top_k=recipe.top_k,
        router="none (fixed weights)" if recipe.mixture.method == "linear" else recipe.mixture.router.said,
        router_why=why_chosen(recipe, native=plan.shape.plain),
        backbone=backbone_label(recipe),
        experts=[ExpertSummary(name=e.name, model=e.source, text=bool(e.text or e.prompts)) for e in recipe.experts],
        mixed=plan.shape.mixed,
        layers=plan.layers,
        dtype=str(plan.config["dtype"]),
        tensors={"total": len(plan.tensors), **operations},
        shards=len(plan.shards) + 1,
        bytes={"read": plan.bytes_read, "written": plan.bytes_written, "statistics": plan.bytes_of_statistics},
        parameters=plan.parameters(),
        disk={"needed": plan.disk_needed, "free": shutil.disk_usage(plan.root).free},
        memory=plan.memory(),
        fit=fit_work(plan),
        notes=list(plan.notes),
    )


def fit_work(plan: Plan) -> FitWork | None:
    """The work of setting the plan's router from text; None when it is set without."""
    mixture, router = plan.recipe.mixture, plan.recipe.mixture.router
    if not mixture.needs_text:
        return None
    if router.row.reads_ids:
        tokens = _measured_tokens(plan)
        return FitWork(reads=tokens > 0, tokens=tokens, flops=2 * tokens * _weights(plan))
    tokens = router.tokens_per_domain * plan.experts
    solved = router.row.sample  # by a search, where others have a closed form
    kept = min(router.keep_tokens, router.tokens_per_domain) * plan.experts if solved else 0
    solving = 2 * _EVALUATIONS * kept * max(_FEWEST_EXPERTS, plan.experts) * sum(slot.shape[1] for slot in plan.slots)
    return FitWork(reads=True, tokens=tokens, flops=2 * tokens * _weights(plan), solving=solving)


def _measured_tokens(plan: Plan) -> int:
    """That a model reads so that a plain checkpoint carries a router, and whole experts: their stream's size is measured."""
    channels = plan.shape.channels
    if channels is None:
        return 0
    return MEASURED_TOKENS + (0 if channels.carry is None else STREAM_TOKENS)


def _weights(plan: Plan) -> int:
    """Weights of the layers that a token passes with one expert active, which stands for the base where that is one."""
    parameters = plan.parameters()
    own = {tensor.name.partition(".experts.")[0] for tensor in plan.tensors if tensor.role == "expert"}
    backbone = sum(
        tensor.numel
        for tensor in plan.tensors
        if tensor.role == "backbone"
        and split_layer(tensor.name)[0] is not None
        and tensor.name.partition(".base.")[0] not in own
    )
    return backbone + parameters["per_expert"] + parameters["adapters"] // plan.experts
