"""A whole tune.json, as `modekit tune` writes one."""

from __future__ import annotations

from typing import Any


def candidate(description: str, loss: float, active: int, **said: Any) -> dict[str, Any]:
    """One of its candidates, scored on one domain."""
    return {
        "number": 0,
        "name": "",
        "mixture": {"method": "linear"},
        "status": "scored",
        "why": "",
        "losses": {"law": loss},
        "tokens": 100,
        "active": active,
        "total": 2 * active,
        "native": True,
        "seconds": 0.5,
        "description": description,
        "mean_loss": loss,
        "gap_closed": None,
        "report": None,
        "best": False,
        "pareto": False,
        **said,
    }


def reported(loss: float, gap: float | None) -> dict[str, Any]:
    """What a candidate came to on the report split."""
    return {"losses": {"law": loss}, "mean_loss": loss, "gap_closed": gap}


def search_of(recipe_digest: str, *candidates: dict[str, Any], seconds: float = 1.0) -> dict[str, Any]:
    """A search that found the mixture of a recipe."""
    losses = {split: {"base": {"law": 4.0}, "own": {"law": 3.0}} for split in ("select", "report")}
    read = {"documents": 1, "tokens": 100, "sha256": "", "sequence_length": 32}
    return {
        "format": 1,
        "checkpoint": {"recipe_digest": recipe_digest},
        "candidates": list(candidates),
        "reference": losses,
        "settings": {"trials": len(candidates), "tokens_per_domain": 100, "sequence_length": 32, "seed": 0, "processes": 1},
        "space": {},
        "text": {split: {"law": read} for split in losses},
        "seconds": seconds,
    }
