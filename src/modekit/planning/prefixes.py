"""Prefixes and prompts of experts in a plan: a place before each layer's attention (architecture/modekit_prefix.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modekit.errors import UnsupportedError
from modekit.planning.parts import PlannedPlace
from modekit.planning.tensors import CodeOf, PlannedTensor
from modekit.recipes.fits import CHANGES
from modekit.recipes.layers import Layer
from modekit.recipes.recipe import Recipe
from modekit.sources.adapter import AdapterSource
from modekit.sources.family import Family
from modekit.sources.names import SOFT_PREFIX, split_layer
from modekit.sources.prefix import SoftPrefix
from modekit.sources.source import ModelSource
from modekit.weights.made import Columns


def prefixes_of(sources: Sequence[ModelSource]) -> tuple[SoftPrefix | None, ...]:
    """Per expert what it puts before the text; `sources` begin with the base."""
    return tuple(source.prefix if isinstance(source, AdapterSource) else None for source in sources[1:])


def check_prefixes(recipe: Recipe, sources: Sequence[ModelSource]) -> None:
    """Raise UnsupportedError for what no mixture with prefixes can be."""
    named = zip(recipe.names, prefixes_of(sources), strict=True)
    first, mixture = next((name for name, prefix in named if prefix is not None), None), recipe.mixture
    fit = mixture.fit
    problems = {
        "a native architecture has no place for a prefix": recipe.output.format == "native",
        "experts with prefixes share the base's other parts: modules cannot be all or decoder": mixture.is_whole,
        "a prefix is read by a layer's attention as a whole: per cannot be feature": mixture.router.scope == "feature",
        "a prefix runs through all layers: experts[].layers is for others": any(
            expert.layers and prefix for expert, prefix in zip(recipe.experts, prefixes_of(sources), strict=True)
        ),
        "this router fit scores low-rank changes, and a prefix is none": fit is not None and fit.reads is CHANGES,
    }
    for what in (what for what, holds in problems.items() if first is not None and holds):
        raise UnsupportedError(what, where=f"expert '{first}'", remedy="leave that setting out, or use a LoRA adapter")


def place_of_prefixes(sources: Sequence[ModelSource], family: Family, layer: Layer) -> PlannedPlace | None:
    """The place of a layer; None where no expert has a prefix."""
    kinds = prefixes_of(sources)
    return PlannedPlace(family.in_layer(layer, SOFT_PREFIX), (), kinds) if any(kinds) else None


def _columns(place: PlannedPlace, expert: int, *, first: bool) -> tuple[int, int]:
    """Of an expert's tensor, those that are stored at a place, of a prompt once, at the first; (0, 0) for none."""
    kind = place.kinds[expert]
    if not isinstance(kind, SoftPrefix) or not (kind.layers or first):
        return 0, 0
    return kind.columns(int(str(split_layer(place.module)[0])))


def entry_of(place: PlannedPlace, *, first: bool) -> dict[str, object]:
    """What config.json says of a place besides the rest; nothing of places that are no prefixes'."""
    prefixes = {expert: kind for expert, kind in enumerate(place.kinds) if isinstance(kind, SoftPrefix)}
    prompted = [expert for expert, prefix in prefixes.items() if not prefix.layers]
    columns = [_columns(place, expert, first=first) for expert in range(len(place.kinds))]
    said: dict[str, object] = {
        "prefixes": [prefixes[expert].tokens if expert in prefixes else 0 for expert in range(len(place.kinds))],
        "widths": [stop - start for start, stop in columns],
        **({"prompted": prompted} if prompted else {}),
    }
    return said if prefixes else {}


def prefix_tensors(place: PlannedPlace, code_of: CodeOf, *, first: bool) -> Iterator[PlannedTensor]:
    """Every expert's part of its own."""
    for expert, kind in enumerate(place.kinds):
        start, stop = columns = _columns(place, expert, first=first)
        if isinstance(kind, SoftPrefix) and stop:
            name, shape = f"{place.module}.expert_{expert}", (kind.tokens, stop - start)
            yield PlannedTensor(name, code_of(kind.ref), shape, "adapter", Columns(kind.ref, *columns), expert)
