"""Other routers over the same experts: where they stand, and how wide and high their gates are.

What a plan of another recipe would say of the places, taken from a finished checkpoint's config and headers instead of the
sources, which may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modekit.planning.modekit import ATTENTION, EMBEDDING, gate_rows, needs_base, readers, routing_config
from modekit.recipes.recipe import Recipe
from modekit.sources.families import FAMILIES, PARTS, Family

_GATE_KEYS = {"router", "width", "rows", "features"}

Shape = Callable[[str], tuple[int, ...] | None]
"""Name of a tensor -> its shape; None when there is none."""


def rerouted(config: Mapping[str, Any], recipe: Recipe, shape_of: Shape) -> dict[str, Any]:
    """`config["modekit"]` of a checkpoint's config with the routing of another recipe over the same experts."""
    modekit: dict[str, Any] = config["modekit"]
    family = next(row for row in FAMILIES if row.model_type == modekit["dense_type"])
    places, scope = modekit["places"], recipe.mixture.router.scope
    routers = _routers(places, scope, family, whole=recipe.mixture.modules == "all")
    changed = {}
    for module, entry in places.items():
        changed[module] = {key: value for key, value in entry.items() if key not in _GATE_KEYS}
        changed[module]["router"] = routers[module]
        weight = _weight_shape(module, shape_of)
        if scope == "feature" and recipe.mixture.fit is not None and weight is not None:
            changed[module]["features"] = weight[0]
        if routers[module] == module:
            ranks = [sum(each) for each in zip(*(places[n]["ranks"] for n in readers(module, family, routers)), strict=True)]
            read = int(config["hidden_size"]) if weight is None else weight[-1]
            changed[module]["width"] = recipe.mixture.router.gate_width or read
            changed[module]["rows"] = gate_rows(recipe.mixture.router, ranks)
    return {**modekit, "routing": routing_config(recipe), "places": changed}


def bases_that_differ(places: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The places where a plan of the recipe has the base's module and the checkpoint has not, or the reverse."""
    return [module for module, entry in places.items() if entry["base"] != needs_base(recipe, module, entry["own"])]


def _routers(places: Mapping[str, Any], scope: str, family: Family, *, whole: bool) -> dict[str, str]:
    """Place -> place of its router: the first of those that share it, in the order in which they run."""
    if whole:
        return dict.fromkeys(places, EMBEDDING)
    ways = {place: _way(place, family) for place in places}
    leaders: dict[object, str] = {}
    for place, (layer, part) in sorted(ways.items(), key=lambda item: item[1]):
        leaders.setdefault(_sharers(place, layer, part, scope), place)
    return {place: leaders[_sharers(place, *way, scope)] for place, way in ways.items()}


def _way(place: str, family: Family) -> tuple[int, int]:
    """(layer, number of its first part in the order in which parts run) of a place."""
    _, _, behind = place.partition(".layers.")
    layer, _, path = behind.partition(".")
    first = next((part for part in PARTS if family.parts.get(part) == path), "gate")  # a whole FFN runs where its gate would
    return int(layer), PARTS.index(first)


def _sharers(place: str, layer: int, part: int, scope: str) -> object:
    """What places that share a router have in common."""
    if scope == "layer":
        return layer, PARTS[part] in ATTENTION
    return scope if scope == "model" else place


def _weight_shape(module: str, shape_of: Shape) -> tuple[int, ...] | None:
    """Shape of the weight of a place's module, as the base or an expert has it; None for a whole FFN."""
    return shape_of(f"{module}.base.weight") or shape_of(f"{module}.experts.0.weight")
