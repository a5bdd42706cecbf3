"""Experts that are one model: nothing can choose between them, and each takes the room of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modekit.recipes.recipe import Recipe
from modekit.sources.model import ModelSource

BASE_AGAIN = "it is the base model itself: write `model: base`, which needs no tensors of its own"


def one_model(names: Sequence[str]) -> str:
    """What to say of experts that are one model."""
    return f"{' and '.join(names)} are one model: no router can choose between them; keep one, or correct the paths"


def twins(recipe: Recipe, sources: Sequence[ModelSource]) -> Iterator[str]:
    """Experts that were read from one folder, and those read from the base's; `sources` begin with the base."""
    base = sources[0].folder.resolve()
    same: dict[object, list[str]] = {}
    for expert, source in zip(recipe.experts, sources[1:], strict=True):
        if not expert.is_base:
            same.setdefault(source.folder.resolve(), []).append(expert.name)
    yield from (f"{name}: {BASE_AGAIN}" for name in same.pop(base, []))
    yield from (one_model(names) for names in same.values() if len(names) > 1)
