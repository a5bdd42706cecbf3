"""How a tensor of the result is made: what it reads, and its numbers. A build writes them, verify computes them again.

    Copy        a stored tensor                     Fold        with an adapter's change
    Delta       of an expert from the base, or what is kept of it: low-rank factors, a few bits per number
    Join        parts below or beside each other    Columns     some columns of a stored tensor
    Merged      a rule over base and experts        Scale       times a number
    Padded      in a larger tensor                  Zeros       of a size

Shape legend: O, I rows and columns of a weight, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from modekit.recipes.backbone import BackboneMerge
from modekit.sources.adapter import AdapterSource, LowRank
from modekit.sources.header import TensorRef
from modekit.sources.rows import rows_of
from modekit.sources.source import ModelSource
from modekit.weights.factorise import bytes_of_codes, codes_of, steps_of
from modekit.weights.flat import FlatArray, Rows, below, stored
from modekit.weights.folding import folded, reader
from modekit.weights.making import Changed, Making, Stored
from modekit.weights.merge import merged
from modekit.weights.numeric import Array, to_float32
from modekit.weights.padding import Pad, padded_rows
from modekit.weights.reading import WeightReader


@dataclass(frozen=True)
class Copy(Stored):
    """A stored tensor, in its own dtype."""

    def numbers(self, reading: WeightReader) -> FlatArray:
        return stored(reading.opened, self.ref)


@dataclass(frozen=True)
class Columns(Stored):
    """Columns [first, last) of a stored tensor, in its own dtype."""

    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.ref.shape[0], self.last - self.first)

    def numbers(self, reading: WeightReader) -> FlatArray:
        whole = stored(reading.opened, self.ref)[:].reshape(self.ref.shape)
        return whole[:, self.first : self.last].ravel()


@dataclass(frozen=True)
class Fold(Stored):
    """A weight of the base with an adapter's change, in float32."""

    change: LowRank
    hides = True
    arrays = 1

    @property
    def read(self) -> tuple[TensorRef, ...]:
        return (self.ref, *self.change.refs)

    def numbers(self, reading: WeightReader) -> FlatArray:
        return folded(self.change, stored(reading.opened, self.ref), self.ref.shape, reader(reading.opened))


@dataclass(frozen=True)
class Delta(Making):
    """Expert - base in float32: itself; A (R, I) or B (O, R) of its best part of a rank; its codes (O, bits, bytes) or steps
    (O,) in a few bits (factorise.py). `size` is the rank, or the bits.
    """

    expert: TensorRef
    base: TensorRef
    part: Literal["all", "A", "B", "codes", "steps"] = "all"
    size: int = 0
    hides = True

    @property
    def read(self) -> tuple[TensorRef, ...]:
        return (self.base, self.expert)

    @property
    def rank(self) -> int:
        return self.size if self.part in ("A", "B") else 0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.part == "all":
            return self.base.shape
        rows, columns = self.base.shape
        codes = (rows, self.size, bytes_of_codes(columns))
        return {"A": (self.size, columns), "B": (rows, self.size), "codes": codes}.get(self.part, (rows,))

    @property
    def arrays(self) -> int:
        return {"codes": 16, "steps": self.base.shape[-1]}.get(self.part, 1)

    def numbers(self, reading: WeightReader) -> FlatArray:
        if self.part == "all":
            return reading.difference(self.expert, self.base).ravel()
        if self.rank:
            factors = reading.factors(self.expert, self.base, self.rank)
            return (factors.a if self.part == "A" else factors.b).ravel()

        def rows(first: int, last: int) -> Array:
            delta_XI = reading.difference(rows_of(self.expert, first, last), rows_of(self.base, first, last))
            steps_X = steps_of(delta_XI, self.size)
            return steps_X if self.part == "steps" else codes_of(delta_XI, steps_X, self.size)

        return Rows(self.shape[0], math.prod(self.shape[1:]), rows)


@dataclass(frozen=True)
class Join(Making):
    """Parts one below the other, or side by side with `axis` 1; `experts`: whose each part is, where they are of many."""

    of: tuple[Made, ...]
    axis: Literal[0, 1] = 0
    experts: tuple[int | None, ...] = field(default=(), compare=False)

    @property
    def parts(self) -> tuple[Made, ...]:
        return self.of

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.of[0].shape
        both = sum(part.shape[self.axis] for part in self.of)
        return (*first[: self.axis], both, *first[self.axis + 1 :])

    def numbers(self, reading: WeightReader) -> FlatArray:
        found = [part.numbers(reading) for part in self.of]
        if self.axis == 0:
            return below(found)
        rows = self.of[0].shape[0]
        widths = [len(each) // rows for each in found]

        def beside(first: int, last: int) -> Array:
            pairs = zip(found, widths, strict=True)
            taken = [to_float32(each[first * width : last * width]).reshape(last - first, width) for each, width in pairs]
            return np.concatenate(taken, axis=1)

        return Rows(rows, sum(widths), beside)


@dataclass(frozen=True)
class Scale(Changed):
    """Something times a number, in float32."""

    factor: float

    def numbers(self, reading: WeightReader) -> FlatArray:
        given = self.of.numbers(reading)
        factor = np.float32(self.factor)
        return Rows(len(given), 1, lambda first, last: to_float32(given[first:last]) * factor)


@dataclass(frozen=True)
class Merged(Making):
    """A backbone rule over the base's tensor and every expert's."""

    rule: BackboneMerge
    base: Copy
    experts: tuple[Copy | Fold, ...]
    hides = True

    @property
    def parts(self) -> tuple[Made, ...]:
        return (self.base, *self.experts)

    @property
    def arrays(self) -> int:
        return 2 * len(self.parts)  # every model's block, in float64

    def numbers(self, reading: WeightReader) -> FlatArray:
        return merged(self.rule, self.base.numbers(reading), [each.numbers(reading) for each in self.experts])


@dataclass(frozen=True)
class Zeros(Making):
    """Of a size."""

    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def numbers(self, reading: WeightReader) -> FlatArray:
        return Rows(math.prod(self.size), 1, lambda first, last: np.zeros(last - first, np.float32))


@dataclass(frozen=True)
class Padded(Changed):
    """Something of the base, in a dtype and of a size, in a larger tensor."""

    pad: Pad
    dtype: str
    size: tuple[int, ...]
    arrays = 4  # rows that stay in the processor's cache

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pad.widened(self.size)

    def numbers(self, reading: WeightReader) -> FlatArray:
        return padded_rows(self.pad, self.dtype, self.size, scaled(self.of, self.pad.scale).numbers(reading), reading.fills)


Made = Copy | Columns | Fold | Delta | Join | Scale | Merged | Zeros | Padded


def scaled(made: Made, factor: float) -> Made:
    """Times a number."""
    return made if factor == 1.0 or isinstance(made, Zeros) else Scale(made, factor)


def as_in(source: ModelSource, ref: TensorRef) -> Copy | Fold:
    """The tensor `ref` of the base model as a model or adapter has it. Raises MismatchError when it has another shape."""
    if not isinstance(source, AdapterSource):
        return Copy(source.matching(ref))
    given = source.replaced.get(ref.name, ref)
    return Fold(given, source.changes[ref.name]) if ref.name in source.changes else Copy(given)
