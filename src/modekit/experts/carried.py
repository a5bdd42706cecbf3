"""What to say of an extraction that keeps little of what a model learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LITTLE = 0.5
"""Share of the squared difference below which an adapter is more lost than kept."""


def notes_of(record: Mapping[str, Any]) -> list[str]:
    """Warnings about what extract.json says, with the reason; none when most is kept."""
    totals = record["totals"]
    carried: float = totals["carried"]
    if carried >= LITTLE:
        return []
    kept = 1 - float(totals["weight_error"]) ** 2
    notes = [f"the adapter keeps {carried:.0%} of the model's squared difference: more is lost than kept"]
    if kept < LITTLE:
        rank = totals["largest_rank"]
        notes.append(f"rank {rank} is too small for its matrices ({kept:.0%} of them kept): raise it, or give --energy 0.9")
    outside = list(record["not_carried"])
    if outside and carried < LITTLE * kept:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        notes.append(
            f"much of the difference is in tensors that it does not hold ({', '.join(outside[:3])}{more}): use the full model"
        )
    return notes
