"""How the routers of a recipe decide, as `config["modekit"]["routing"]` says it, and the rows that their gates have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modekit.errors import UnsupportedError
from modekit.planning.mixture_config import AlwaysOnConfig, Average, Ngram, Routing
from modekit.recipes.recipe import Expert, Recipe, place_of_base
from modekit.recipes.router import Router
from modekit.recipes.strict import BASE
from modekit.sources.family import Family


def routing_config(recipe: Recipe) -> Routing:
    """`modekit.routing` of config.json; see architecture/modekit_router.py."""
    mixture, router = recipe.mixture, recipe.mixture.router
    always_on = None
    if mixture.always_on is not None:
        index = recipe.names.index(mixture.always_on.expert) if mixture.always_on.expert in recipe.names else None
        apart = {"apart": True} if mixture.always_on.apart else {}
        always_on = AlwaysOnConfig(expert=index, weight=mixture.always_on.weight, **apart)
    weights = None
    if mixture.method == "linear":
        given = mixture.weights or dict.fromkeys(recipe.names, 1.0)
        total = sum(given.values())
        weights = [given[name] / total for name in recipe.names]
    read: dict[str, Any] = {}
    if mixture.method != "linear":
        read = {"score": router.row.score.kind, "jitter": router.jitter, "noise": router.noise, "prefix": router.prefix_tokens}
        if mixture.unseen is not None:
            read["unseen"] = place_of_base(recipe.experts)
        if "order" in router.row.settings:
            read["ngram"] = Ngram(order=router.order, buckets=router.buckets)
        if router.hashes and router.orders is not None:
            read["ngram"] = Ngram(order=max(router.orders), buckets=router.buckets)
            read["orders"] = [order for order in router.orders for _ in router.decays]
        if "dimensions" in router.row.settings:
            read["dimensions"] = router.dimensions or len(recipe.experts)
    read |= {key: said for key in ("groups", "combine") if (said := getattr(mixture, key)) is not None}
    if mixture.threshold is not None:
        by_name = mixture.threshold
        read["threshold"] = [by_name[name] if isinstance(by_name, dict) else by_name for name in recipe.names]
    return Routing(
        method=mixture.method,
        top_k=recipe.top_k if mixture.method == "routing" and not mixture.varies else None,
        top_p=mixture.top_p,
        weights=weights,
        always_on=always_on,
        **read,
        averages=[Average.model_validate(average) for average in router.averages],
    )


def gate_rows(router: Router, ranks: list[int]) -> list[int]:
    """Rows of a gate per expert, for adapters of these ranks."""
    return [router.row.score.rows(rank) for rank in ranks]


def needs_base(recipe: Recipe, family: Family, module: str, own: Sequence[int]) -> bool:
    """Whether the base's module stays at a place where the experts `own` have their own."""
    return len(own) < len(recipe.experts) or runs_base(recipe, family, module)


def runs_base(recipe: Recipe, family: Family, module: str) -> bool:
    """Whether the base's module at a place runs for every token, whichever experts are chosen."""
    mixture = recipe.mixture
    # The router reads the base's embedding, unless it reads the tokens themselves.
    reads_it = module in family.entrances and mixture.fit is not None and not mixture.fit.reads.tokens
    outside = mixture.always_on is not None and mixture.always_on.expert == BASE
    return outside or reads_it


def whole_module_unscored(expert: Expert, module: str) -> UnsupportedError:
    """The error for a fit that scores low-rank changes where an expert has a module of its own."""
    remedy = "choose a router fit that reads text (lexical or logistic)"
    if expert.adapter is not None:
        remedy += ", or train the adapter as plain LoRA (without DoRA, IA3 and modules_to_save)"
    elif not expert.is_low_rank:
        remedy += ", or keep a low-rank part of the model (as: lora)"
    return UnsupportedError(
        "the expert's part is no low-rank change that this router could score",
        where=f"expert '{expert.name}': {module}",
        remedy=remedy,
    )
