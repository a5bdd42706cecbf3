"""Which place has the router that decides at another, and whether the base's own module stays there.

By the recipe's `per`: the first place that a router serves, in the order in which they run, is its leader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from modekit.recipes.layers import order_of
from modekit.recipes.recipe import Recipe
from modekit.recipes.strict import BASE
from modekit.sources.family import Family
from modekit.sources.names import module_of, split_layer

ATTENTION = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    **dict.fromkeys(("cross_q", "cross_o"), "cross-attention"),
    **dict.fromkeys(("cross_k", "cross_v"), "cross-attention to the source"),
}
"""Parts that mix tokens -> those that run on the same ones: cross_k and cross_v on the source's. Others are the FFN's."""


def needs_base(recipe: Recipe, family: Family, module: str, own: Sequence[int]) -> bool:
    """Whether the base's module stays at a place where the experts `own` have their own."""
    return len(own) < len(recipe.experts) or runs_base(recipe, family, module)


def runs_base(recipe: Recipe, family: Family, module: str) -> bool:
    """Whether the base's module at a place runs for every token, whichever experts are chosen."""
    mixture = recipe.mixture
    # The router reads the base's embedding, unless it reads the tokens themselves.
    reads_it = module in entrances(family) and mixture.fit is not None and not mixture.fit.reads_ids
    return reads_it or (mixture.always_on is not None and mixture.always_on.expert == BASE)


def entrances(family: Family) -> tuple[str, ...]:
    """Modules that may be the first to run: an encoder's own embedding where it has one, else the one that all share."""
    return (*(module_of(name) for name in family.copies[:1]), family.embedding)


def first_to_run(modules: Collection[str], family: Family) -> str:
    """Of the modules of whole models or whole decoders, the one that a pass reaches first; empty where it is not known."""
    paths = ("input_layernorm", "operator_norm", family.decoder.parts.get("q", ""))
    return next((each for each in (*entrances(family), *(family.in_layer(0, path) for path in paths)) if each in modules), "")


def leaders_of(places: Iterable[str], recipe: Recipe, family: Family) -> dict[str, str]:
    """Place -> place of its router: the first of those that share it, in the order in which they run."""
    modules = [*places]
    if recipe.mixture.is_whole:
        return dict.fromkeys(modules, first_to_run(modules, family))
    sharers = {module: _sharers(module, family, recipe.mixture.router.scope) for module in modules}
    leaders: dict[object, str] = {}

    def when(module: str) -> tuple[tuple[int, int], int]:
        layer, path = split_layer(module)
        assert layer is not None, module
        return order_of(layer), family.stack_of(layer).rank(path)

    for module in sorted(modules, key=when):
        leaders.setdefault(sharers[module], module)
    return {module: leaders[sharers[module]] for module in modules}


def _sharers(place: str, family: Family, scope: str) -> object:
    """What places that share a router have in common."""
    layer, path = split_layer(place)
    if scope != "layer" or layer is None:
        return scope if scope == "model" else place
    if family.derived is not None:  # what the layer calls: its attention, its FFN
        return layer, path.rpartition(".")[0].partition(".")[0]
    parts = family.stack_of(layer).parts
    return layer, next((kind for part, kind in ATTENTION.items() if parts.get(part) == path), None)
