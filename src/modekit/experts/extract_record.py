"""What extract.json says of an adapter that was extracted: what was kept per tensor, and what it cannot carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from modekit.errors import some_of
from modekit.experts.differences import TensorDifference
from modekit.weights.factorise import Factors

RECORD_FILE = "extract.json"
_LITTLE = 0.5  # share of the squared difference below which an adapter is more lost than kept


@dataclass(frozen=True)
class AdaptedWeight:
    """A module's difference and its factors."""

    difference: TensorDifference
    factors: Factors

    @property
    def row(self) -> AdaptedRow:
        """What the record says of it."""
        return AdaptedRow(rank=len(self.factors.a), error=self.factors.error, drift=self.difference.drift)


class AdaptedRow(BaseModel, frozen=True):
    """Of one or several weights.

    Attributes:
        modules: how many.
        rank: the largest.
        error: || delta - B A || / || delta ||, of several weights together.
        drift: || delta || / || W ||; None where the base is zero.
    """

    modules: int = 1
    rank: int
    error: float
    drift: float | None

    @classmethod
    def of(cls, adapted: Sequence[AdaptedWeight]) -> AdaptedRow:
        """Several weights together."""
        delta = sum(entry.difference.squared_delta for entry in adapted)
        base = sum(entry.difference.squared_base for entry in adapted)
        missed = sum(entry.difference.squared_delta * entry.factors.error**2 for entry in adapted)
        return cls(
            modules=len(adapted),
            rank=max(len(entry.factors.a) for entry in adapted),
            error=math.sqrt(missed / delta),
            drift=math.sqrt(delta / base) if base else None,
        )


class Extraction(BaseModel, frozen=True):
    """The content of extract.json.

    Attributes:
        tensors: by the name of each adapted weight.
        kinds: by kind of module, over all layers.
        all: of the whole adapter; `parameters` and `bytes` are its size.
        carried: share of the squared difference of all tensors that the adapter holds.
        unchanged: linear weights that are equal in both models: no factors.
        not_carried: everything else that differs, with its drift (None where the base is zero).
    """

    model: str
    base_model: str
    tensors: dict[str, AdaptedRow]
    kinds: dict[str, AdaptedRow]
    all: AdaptedRow
    parameters: int
    bytes: int
    carried: float
    unchanged: list[str]
    not_carried: dict[str, float | None]

    def notes(self) -> list[str]:
        """Warnings about an adapter that keeps little, with the reason; none when most is kept."""
        kept = 1 - self.all.error**2
        if self.carried >= _LITTLE:
            return []
        notes = [f"the adapter keeps {self.carried:.0%} of the model's squared difference: more is lost than kept"]
        if kept < _LITTLE:
            notes.append(f"rank {self.all.rank} is too small for its matrices ({kept:.0%} of them kept): raise --rank")
        if self.not_carried and self.carried < _LITTLE * kept:
            held = f"much of the difference is in tensors that it does not hold ({some_of(list(self.not_carried))})"
            notes.append(f"{held}: use the full model")
        return notes


def extraction_of(
    model: str, base: str, adapted: Sequence[AdaptedWeight], differences: Sequence[TensorDifference], linears: Sequence[str]
) -> Extraction:
    """The record of an adapter of some of the differences; `linears` are the names of those that one may have."""
    by_kind: dict[str, list[AdaptedWeight]] = {}
    for entry in adapted:
        by_kind.setdefault(entry.difference.kind, []).append(entry)
    together = AdaptedRow.of(adapted)
    moved = sum(each.squared_delta for each in differences)
    names = {entry.difference.name for entry in adapted}
    parameters = sum(entry.factors.a.size + entry.factors.b.size for entry in adapted)
    return Extraction(
        model=model,
        base_model=base,
        tensors={entry.difference.name: entry.row for entry in adapted},
        kinds={kind: AdaptedRow.of(entries) for kind, entries in by_kind.items()},
        all=together,
        parameters=parameters,
        bytes=4 * parameters,
        carried=(1 - together.error**2) * sum(entry.difference.squared_delta for entry in adapted) / moved,
        unchanged=[each.name for each in differences if each.name in set(linears) and not each.squared_delta],
        not_carried={each.name: each.drift for each in differences if each.squared_delta and each.name not in names},
    )
