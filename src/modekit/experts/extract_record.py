"""What extract.json says of an adapter that was extracted: what was kept per tensor, and what it cannot carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modekit.experts.differences import Pair
from modekit.weights.factorise import Factors


@dataclass(frozen=True)
class Adapted:
    """A module's factors, and the plain error || delta - B A || / || delta || whatever they were weighted by."""

    pair: Pair
    factors: Factors
    plain_error: float


def account(adapted: Sequence[Adapted], linears: Sequence[Pair], pairs: Sequence[Pair]) -> dict[str, Any]:
    """What extract.json says of the tensors.

    tensors      per adapted weight: rank; error = what was minimised (relative; of the outputs when there was text);
                 energy = 1 - error^2; weight_error = || delta - B A || / || delta ||; drift = || delta || / || W ||
    kinds        the same over all layers: ranks from-to, root mean squares weighted by || delta ||^2
    unchanged    linear weights that are equal in both models: no factors
    not_carried  everything else that differs, with its drift (null where the base is zero)
    totals       over the adapter; carried = share of the squared difference of all tensors that the adapter holds
    """
    carried = {entry.pair.name for entry in adapted}
    parameters = sum(entry.factors.a.size + entry.factors.b.size for entry in adapted)
    kept = sum(entry.pair.squared_delta * (1 - entry.plain_error**2) for entry in adapted)
    kinds = dict.fromkeys(pair.kind for pair in linears)
    groups = {kind: [entry for entry in adapted if entry.pair.kind == kind] for kind in kinds}
    return {
        "tensors": {
            entry.pair.name: {
                "rank": entry.factors.rank,
                "error": entry.factors.error,
                "energy": 1 - entry.factors.error**2,
                "weight_error": entry.plain_error,
                "drift": entry.pair.drift,
            }
            for entry in adapted
        },
        "kinds": {kind: _together(group) for kind, group in groups.items() if group},
        "totals": {
            **_together(adapted),
            "parameters": parameters,
            "bytes": 4 * parameters,
            "carried": kept / sum(pair.squared_delta for pair in pairs),
        },
        "unchanged": [pair.name for pair in linears if not pair.squared_delta],
        "not_carried": {pair.name: pair.drift for pair in pairs if pair.squared_delta and pair.name not in carried},
    }


def _together(adapted: Sequence[Adapted]) -> dict[str, Any]:
    """Ranks and errors of several weights as one."""
    ranks = [entry.factors.rank for entry in adapted]
    squares = np.array([entry.pair.squared_delta for entry in adapted])
    error = np.array([entry.factors.error for entry in adapted])
    weight_error = np.array([entry.plain_error for entry in adapted])
    base = sum(entry.pair.squared_base for entry in adapted)
    mean_square = float(np.average(error**2, weights=squares))
    return {
        "modules": len(adapted),
        "smallest_rank": min(ranks),
        "largest_rank": max(ranks),
        "error": math.sqrt(mean_square),
        "energy": 1 - mean_square,
        "weight_error": math.sqrt(float(np.average(weight_error**2, weights=squares))),
        "drift": math.sqrt(float(squares.sum()) / base) if base else None,
    }
