"""How routers decide, as `config["modekit"]["routing"]` says it, where they stand, and the rows of their gates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from modekit.errors import UnsupportedError
from modekit.planning.mixture_config import AlwaysOnConfig, Average, Ngram, Routing
from modekit.recipes.layers import order_of
from modekit.recipes.recipe import Expert, Recipe
from modekit.recipes.strict import BASE
from modekit.sources.family import Family
from modekit.sources.names import split_layer

ATTENTION = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("cross_q", "cross_o"), "cross-attention"),
    **dict.fromkeys(("cross_k", "cross_v"), "cross-attention to the source"),
}
"""Parts that mix tokens -> those that run on the same ones: cross_k and cross_v on the source's. Others are the FFN's."""


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
        read = {"score": router.row.score, "jitter": router.jitter, "noise": router.noise, "prefix": router.prefix_tokens}
        if router.hashes and router.orders is not None:
            read["ngram"] = Ngram(order=max(router.orders), buckets=router.buckets)
            read["orders"] = [order for order in router.orders for _ in router.decays]
        if "dimensions" in router.row.settings:
            read["dimensions"] = router.dimensions or len(recipe.experts)
    read |= {} if mixture.groups is None else {"groups": mixture.groups}
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


def needs_base(recipe: Recipe, family: Family, module: str, own: Sequence[int]) -> bool:
    """Whether the base's module stays at a place where the experts `own` have their own."""
    return len(own) < len(recipe.experts) or runs_base(recipe, family, module)


def runs_base(recipe: Recipe, family: Family, module: str) -> bool:
    """Whether the base's module at a place runs for every token, whichever experts are chosen."""
    mixture = recipe.mixture
    # The router reads the base's embedding, unless it reads the tokens themselves.
    reads_it = module in family.entrances and mixture.fit is not None and not mixture.fit.reads_ids
    outside = mixture.always_on is not None and mixture.always_on.expert == BASE
    return outside or reads_it


def whole_module_unscored(expert: Expert, module: str) -> UnsupportedError:
    """The error for a fit that scores low-rank changes where an expert has a module of its own."""
    remedy = "choose a router fit that reads text (lexical or logistic)"
    if expert.adapter is not None:
        remedy += ", or train the adapter as plain LoRA (without DoRA and modules_to_save)"
    elif not expert.is_low_rank:
        remedy += ", or keep a low-rank part of the model (as: lora)"
    return UnsupportedError(
        "the expert's part is no low-rank change that this router could score",
        where=f"expert '{expert.name}': {module}",
        remedy=remedy,
    )


def first_to_run(modules: Collection[str], family: Family) -> str:
    """Of the modules of whole models or whole decoders, the one that a pass reaches first; empty where it is not known."""
    paths = ("input_layernorm", "operator_norm", family.parts.get("q", ""))
    return next((each for each in (*family.entrances, *(family.in_layer(0, path) for path in paths)) if each in modules), "")


def leaders_of(places: Iterable[str], scope: str, family: Family, *, whole: bool) -> dict[str, str]:
    """Place -> place of its router: the first of those that share it, in the order in which they run."""
    if whole:
        return dict.fromkeys(places, first_to_run([*places], family))
    ways = {place: _way(place, family) for place in places}
    leaders: dict[object, str] = {}
    for place in sorted(ways, key=lambda place: ways[place]):
        leaders.setdefault(_sharers(place, family, scope), place)
    return {place: leaders[_sharers(place, family, scope)] for place in ways}


def _way(place: str, family: Family) -> tuple[tuple[int, int], int]:
    """(layer, number of its first part in the order in which parts run) of a place."""
    layer, path = split_layer(place)
    assert layer is not None, place
    return order_of(layer), family.stack_of(layer).rank(path)


def _sharers(place: str, family: Family, scope: str) -> object:
    """What places that share a router have in common."""
    layer, path = split_layer(place)
    if scope != "layer" or layer is None:
        return scope if scope == "model" else place
    if family.derived is not None:  # what the layer calls: its attention, its FFN
        return layer, path.rpartition(".")[0].partition(".")[0]
    parts = family.stack_of(layer).parts
    return layer, next((kind for part, kind in ATTENTION.items() if parts.get(part) == path), None)
