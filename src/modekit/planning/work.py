"""How much a fit of the router has to do: tokens and arithmetic, from the plan alone; no time is measured here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from modekit.planning.plan import Plan
from modekit.recipes.fits import TRAINING
from modekit.sources.names import split_layer

_TRAINED = 3  # a pass forward and back costs about three forward
_EVALUATIONS = 500  # passes over the kept tokens that a logistic fit makes of a router, forward and back, at most
_FEWEST_EXPERTS = 8  # a product with fewer columns takes no less: reading the tokens is what takes time
_TRAINED_TOKENS = 100 * 4_096  # PHATGOOSE: steps per expert and tokens per step when the recipe says none


@dataclass(frozen=True)
class FitWork:
    """What a fit does at most; texts may be shorter.

    Attributes:
        reads: whether a model reads the text; an n-gram router is counted, which takes seconds.
        tokens: read by the model, of all domains together.
        flops: floating-point operations of that and of the statistics that it keeps.
        passes: how many passes forward a token costs.
        solving: floating-point operations of making gates from what was kept, as if all of them were those of a model.
    """

    reads: bool
    tokens: int
    flops: int
    passes: int = 1
    solving: int = 0

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON; `seconds` are None until somebody measures them."""
        return {**asdict(self), "seconds": None}


def fit_work(plan: Plan) -> FitWork | None:
    """The work of setting the plan's router from text; None when it is set without."""
    mixture, router = plan.recipe.mixture, plan.recipe.mixture.router
    if not mixture.needs_text:
        return None
    if router.row.reads.tokens:
        return FitWork(False, 0, 0)
    trained = router.row.reads is TRAINING
    per_domain = (router.steps or 100) * _TRAINED_TOKENS // 100 if trained else router.tokens_per_domain
    passes, tokens = _TRAINED if trained else 1, per_domain * plan.experts
    solved = router.row.reads.sample and not router.row.decides.for_model  # by a search, where others have a closed form
    statistics = 0 if trained else sum(2 * slot.shape[1] ** 2 for slot in plan.slots)
    kept = min(router.keep_tokens, per_domain) * plan.experts if solved else 0
    solving = 2 * _EVALUATIONS * kept * max(_FEWEST_EXPERTS, plan.experts) * sum(slot.shape[1] for slot in plan.slots)
    return FitWork(True, tokens, tokens * (2 * passes * _weights(plan) + statistics), passes, solving)


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
