"""Other routers over the same experts: where they stand, and how wide and high their gates are.

What a plan of another recipe would say of the places, taken from a finished checkpoint's config and headers instead of the
sources, which may be gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modekit.planning.mixture_config import MixtureConfig, Place, readers
from modekit.planning.places import ATTENTION, first_to_run
from modekit.planning.routing_config import gate_rows, needs_base, routing_config
from modekit.recipes.layers import order_of
from modekit.recipes.recipe import Recipe
from modekit.sources.family import PARTS, Family
from modekit.sources.model import TensorRef
from modekit.sources.names import split_layer

_GATE_KEYS = {"router", "width", "rows", "features"}

Tensors = Mapping[str, TensorRef]


def rerouted(mixture: MixtureConfig, recipe: Recipe, config: Mapping[str, Any], tensors: Tensors) -> MixtureConfig:
    """The same experts under the routing of another recipe; `config` is the checkpoint's."""
    router, family, scope = recipe.mixture.router, mixture.family, recipe.mixture.router.scope
    hidden, vocabulary = family.hidden(config), int(config["vocab_size"])
    leaders = _leaders(mixture.places, scope, family, whole=recipe.mixture.is_whole)
    changed = {}
    for module, place in mixture.places.items():
        said: dict[str, Any] = {key: value for key, value in place.as_written().items() if key not in _GATE_KEYS}
        said["router"] = leaders[module]
        weight = _weight_shape(module, tensors)
        if scope == "feature" and recipe.mixture.fit is not None and weight is not None:
            said["features"] = weight[0]
        if leaders[module] == module:
            read = [mixture.places[name].ranks for name in readers(module, family, leaders)]
            said["width"] = router.gate_width(vocabulary) or (hidden if weight is None else weight[-1])
            said["rows"] = gate_rows(router, [sum(ranks) for ranks in zip(*read, strict=True)])
        changed[module] = Place(**said)
    return mixture.model_copy(update={"routing": routing_config(recipe), "places": changed})


def bases_that_differ(mixture: MixtureConfig, recipe: Recipe) -> list[str]:
    """The places where a plan of the recipe has the base's module and the checkpoint has not, or the reverse."""
    return [
        module
        for module, place in mixture.places.items()
        if place.base != needs_base(recipe, mixture.family, module, place.own)
    ]


def _leaders(places: Iterable[str], scope: str, family: Family, *, whole: bool) -> dict[str, str]:
    """Place -> place of its router: the first of those that share it, in the order in which they run."""
    if whole:
        return dict.fromkeys(places, first_to_run([*places], family))
    ways = {place: _way(place, family) for place in places}
    leaders: dict[object, str] = {}
    for place, (layer, part) in sorted(ways.items(), key=lambda item: item[1]):
        leaders.setdefault(_sharers(place, layer, part, scope), place)
    return {place: leaders[_sharers(place, *way, scope)] for place, way in ways.items()}


def _way(place: str, family: Family) -> tuple[tuple[int, int], int]:
    """(layer, number of its first part in the order in which parts run) of a place."""
    layer, path = split_layer(place)
    assert layer is not None, place
    parts = family.stack_of(layer).parts
    first = next((part for part in PARTS if parts.get(part) == path), "gate")  # a whole FFN runs where its gate would
    return order_of(layer), PARTS.index(first)


def _sharers(place: str, layer: tuple[int, int], part: int, scope: str) -> object:
    """What places that share a router have in common."""
    if scope == "layer":
        return layer, ATTENTION.get(PARTS[part])
    return scope if scope == "model" else place


def _weight_shape(module: str, tensors: Tensors) -> tuple[int, ...] | None:
    """Shape of the weight of a place's module, as the base or an expert has it; None for a whole FFN."""
    held = tensors.get(f"{module}.base.weight") or tensors.get(f"{module}.experts.0.weight")
    return held.shape if held is not None else None
