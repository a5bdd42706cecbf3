"""A whole tune.json, as `modekit tune` writes one."""

from __future__ import annotations

from typing import Any


def candidate(name: str, loss: float, active: int, **said: Any) -> dict[str, Any]:
    """One of its variants, scored on one domain."""
    sizes = {"active": active, "total": 2 * active, "native": True}
    return {"name": name, "mixture": {"method": "linear"}, "losses": {"law": loss}, **sizes, **said}


def search_of(recipe_digest: str, *candidates: dict[str, Any], seconds: float = 1.0) -> dict[str, Any]:
    """A search that found the mixture of a recipe."""
    return {
        "format": 2,
        "recipe_digest": recipe_digest,
        "candidates": list(candidates),
        "tokens_per_domain": 100,
        "sequence_length": 32,
        "seconds": seconds,
    }
