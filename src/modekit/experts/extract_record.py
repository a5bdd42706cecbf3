"""What extract.json says of an adapter that was extracted: what was kept per tensor, and what it cannot carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel

from modekit.errors import some_of
from modekit.experts.differences import TensorDifference
from modekit.weights.factorise import Factors

RECORD_FILE = "extract.json"
_LITTLE = 0.5  # share of the squared difference below which an adapter is more lost than kept


@dataclass(frozen=True)
class AdaptedWeight:
    """A module's factors, and the plain error || delta - B A || / || delta || whatever they were weighted by."""

    difference: TensorDifference
    factors: Factors
    plain_error: float


class RankSettings(BaseModel, frozen=True):
    """What decided the ranks, and the modules that were adapted; see `ExtractSettings`."""

    rank: int | None
    energy: float | None
    max_rank: int | None
    modules: list[str] | None


class WeightErrors(BaseModel, frozen=True):
    """Of one weight.

    Attributes:
        error: what was minimised (relative; of the outputs when there was text).
        energy: 1 - error^2.
        weight_error: || delta - B A || / || delta ||.
        drift: || delta || / || W ||; None where the base is zero.
    """

    rank: int
    error: float
    energy: float
    weight_error: float
    drift: float | None


class KindErrors(BaseModel, frozen=True):
    """The same of several weights: ranks from-to, and root mean squares weighted by || delta ||^2."""

    modules: int
    smallest_rank: int
    largest_rank: int
    error: float
    energy: float
    weight_error: float
    drift: float | None


class AdapterTotals(KindErrors, frozen=True):
    """Of the whole adapter; `carried`: share of the squared difference of all tensors that it holds."""

    parameters: int
    bytes: int
    carried: float


class Extraction(BaseModel, frozen=True):
    """The content of extract.json.

    Attributes:
        text: documents, tokens and digest of the text that errors were weighted by, if any.
        tensors: by the name of each adapted weight.
        kinds: by kind of module, over all layers.
        unchanged: linear weights that are equal in both models: no factors.
        not_carried: everything else that differs, with its drift (None where the base is zero).
    """

    model: str
    base_model: str
    settings: RankSettings
    text: dict[str, int | str] | None
    tensors: dict[str, WeightErrors]
    kinds: dict[str, KindErrors]
    totals: AdapterTotals
    unchanged: list[str]
    not_carried: dict[str, float | None]

    def notes(self) -> list[str]:
        """Warnings about an adapter that keeps little, with the reason; none when most is kept."""
        carried, kept = self.totals.carried, 1 - self.totals.weight_error**2
        if carried >= _LITTLE:
            return []
        notes = [f"the adapter keeps {carried:.0%} of the model's squared difference: more is lost than kept"]
        if kept < _LITTLE:
            small = f"rank {self.totals.largest_rank} is too small for its matrices ({kept:.0%} of them kept)"
            notes.append(f"{small}: raise --rank (with --energy: --max-rank)")
        outside = list(self.not_carried)
        if outside and carried < _LITTLE * kept:
            held = f"much of the difference is in tensors that it does not hold ({some_of(outside)})"
            notes.append(f"{held}: use the full model")
        return notes


def weight_errors(entry: AdaptedWeight) -> WeightErrors:
    """Of one weight."""
    error = entry.factors.error
    return WeightErrors(
        rank=entry.factors.rank,
        error=error,
        energy=1 - error**2,
        weight_error=entry.plain_error,
        drift=entry.difference.drift,
    )


def errors_by_kind(adapted: Sequence[AdaptedWeight], kinds: Sequence[str]) -> dict[str, KindErrors]:
    """Of the kinds of module that have adapted weights, in the order of `kinds`."""
    groups = {kind: [entry for entry in adapted if entry.difference.kind == kind] for kind in dict.fromkeys(kinds)}
    return {kind: _together(group) for kind, group in groups.items() if group}


def totals_of(adapted: Sequence[AdaptedWeight], differences: Sequence[TensorDifference]) -> AdapterTotals:
    """Of an adapter, and of all tensors that might differ."""
    parameters = sum(entry.factors.a.size + entry.factors.b.size for entry in adapted)
    kept = sum(entry.difference.squared_delta * (1 - entry.plain_error**2) for entry in adapted)
    return AdapterTotals(
        **dict(_together(adapted)),
        parameters=parameters,
        bytes=4 * parameters,
        carried=kept / sum(each.squared_delta for each in differences),
    )


def _together(adapted: Sequence[AdaptedWeight]) -> KindErrors:
    ranks = [entry.factors.rank for entry in adapted]
    squares = np.array([entry.difference.squared_delta for entry in adapted])
    error = np.array([entry.factors.error for entry in adapted])
    weight_error = np.array([entry.plain_error for entry in adapted])
    base = sum(entry.difference.squared_base for entry in adapted)
    mean_square = float(np.average(error**2, weights=squares))
    return KindErrors(
        modules=len(adapted),
        smallest_rank=min(ranks),
        largest_rank=max(ranks),
        error=math.sqrt(mean_square),
        energy=1 - mean_square,
        weight_error=math.sqrt(float(np.average(weight_error**2, weights=squares))),
        drift=math.sqrt(float(squares.sum()) / base) if base else None,
    )
