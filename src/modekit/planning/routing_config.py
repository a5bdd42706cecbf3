"""How the routers of a recipe decide, as `config["modekit"]["routing"]` says it, and the rows that their gates have."""

from __future__ import annotations

from functools import partial
from typing import Any

from modekit.errors import UnsupportedError
from modekit.planning.mixture_config import Average, MixtureConfig, Ngram, Routing
from modekit.recipes.recipe import Recipe, Router

_SCORES = {"arrow": "norm", "spectr": "norm", "seqr": "norm", "phatgoose": "standardised", "ngram": "ngram"}
"""Fit -> how a router scores what it reads, where that is not w x."""


def routing_config(recipe: Recipe) -> Routing:
    """`modekit.routing` of config.json; see architecture/modekit_router.py."""
    mixture, router = recipe.mixture, recipe.mixture.router
    always_on = None
    if mixture.always_on is not None:
        index = recipe.names.index(mixture.always_on.expert) if mixture.always_on.expert in recipe.names else None
        always_on = {"expert": index, "weight": mixture.always_on.weight}
    weights = None
    if mixture.method == "linear":
        given = mixture.weights or dict.fromkeys(recipe.names, 1.0)
        total = sum(given.values())
        weights = [given[name] / total for name in recipe.names]
    read: dict[str, Any] = {}
    if mixture.method != "linear":
        read = {"score": _SCORES.get(router.fit, "linear"), "jitter": router.jitter, "noise": router.noise}
        read["prefix"] = router.prefix_tokens
        if router.fit == "ngram":
            read["ngram"] = Ngram(order=router.order, buckets=router.buckets)
    return Routing(
        method=mixture.method, top_k=recipe.top_k if mixture.method == "routing" and mixture.top_p is None else None,
        top_p=mixture.top_p, weights=weights, always_on=always_on, **read,
        averages=[Average(**average) for average in router.averages],
    )  # fmt: skip


def gate_rows(router: Router, ranks: list[int]) -> list[int]:
    """Rows of a gate per expert, for adapters of these ranks: SpectR takes all of B A, the others one direction."""
    return [max(1, rank) for rank in ranks] if router.fit in {"spectr", "seqr"} else [1] * len(ranks)


def rerouted(mixture: MixtureConfig, recipe: Recipe) -> MixtureConfig:
    """The same experts under the routing of another recipe, with the rows that its gates have."""
    return mixture.rerouted(routing_config(recipe), partial(gate_rows, recipe.mixture.router))


def whole_module_unscored(expert: str, module: str) -> UnsupportedError:
    """The error for a fit that scores low-rank changes where an expert has a module of its own."""
    return UnsupportedError(
        "the expert's part is no low-rank change that this router could score", where=f"expert '{expert}': {module}",
        remedy="choose a fit that reads text (logistic), or take the expert as lora",
    )  # fmt: skip
