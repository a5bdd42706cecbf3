"""How a tensor of the result is made: what it reads, and its numbers. A build writes them, verify computes them again.

    Copy        a stored tensor                     Fold        with an adapter's change
    Delta       of an expert from the base          Factor      a side of its best low-rank part
    Bits        its codes or steps                  Columns     some columns of a stored tensor
    Join        parts below or beside each other    Scale       times a number
    Merged      a rule over base and experts        Filled      one number everywhere
    Padded      in a larger tensor (padded.py)

Shape legend: O, I rows and columns of a weight, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from modekit.recipes.mixture import BackboneMerge
from modekit.sources.adapter import LowRank
from modekit.sources.header import TensorRef
from modekit.sources.rows import rows_of, stored_refs
from modekit.weights.few_bits import bytes_of_codes, codes_of, steps_of
from modekit.weights.folding import Folded
from modekit.weights.merge import merged
from modekit.weights.numeric import to_float32
from modekit.weights.padded import Pad, PaddedRows
from modekit.weights.reading import WeightReader
from modekit.weights.stored import Below, ByRows, FlatArray, Stored

Array = npt.NDArray[np.generic]
Singles = npt.NDArray[np.float32]
Rows = tuple[int, int]

_PLAIN = 8  # arrays of a plain block: read, in float32, scaled, rounded; small, so that they stay in the processor's cache


class _Making:
    """What all ways have: of others, unless they say so themselves."""

    hides: ClassVar[bool] = False
    """Whether computing may hide a NaN that is read."""

    @property
    def parts(self) -> tuple[Made, ...]:
        """What it is made of."""
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.parts[0].shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Tensors on disk, or rows of them, that are read."""
        return tuple(ref for part in self.parts for ref in part.refs)

    @property
    def computed(self) -> tuple[TensorRef, ...]:
        """Those in which a NaN must be found before."""
        return self.refs if self.hides else tuple(ref for part in self.parts for ref in part.computed)

    @property
    def arrays(self) -> int:
        """How many arrays of a block's size lie side by side in memory."""
        return max((part.arrays for part in self.parts), default=1)


@dataclass(frozen=True)
class _Stored(_Making):
    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(stored_refs(self.ref))

    @property
    def arrays(self) -> int:
        return _PLAIN


@dataclass(frozen=True)
class Copy(_Stored):
    """A stored tensor."""

    def cut(self, rows: Rows) -> Copy:
        """Some of its rows."""
        return Copy(rows_of(self.ref, *rows))

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In order, as a flat array of its own dtype."""
        return Stored(reading.opened, self.ref)


@dataclass(frozen=True)
class Columns(_Stored):
    """Columns [first, last) of a stored tensor."""

    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.ref.shape[0], self.last - self.first)

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In the tensor's own dtype."""
        whole = Stored(reading.opened, self.ref)[:].reshape(self.ref.shape)
        return whole[:, self.first : self.last].ravel()


@dataclass(frozen=True)
class Fold(_Making):
    """A weight of the base with an adapter's change; `refs` are the weight's, then the adapter's."""

    ref: TensorRef
    change: LowRank
    hides = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(each for ref in (self.ref, *self.change.refs) for each in stored_refs(ref))

    def cut(self, rows: Rows) -> Fold:
        """Some of its rows."""
        return replace(self, ref=rows_of(self.ref, *rows), change=replace(self.change, rows=rows))

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float32."""
        rows, columns = self.ref.shape
        return Folded(self.change, Stored(reading.opened, self.ref), (rows, columns), reading.small)


@dataclass(frozen=True)
class Delta(_Making):
    """Expert - base; `refs` are the base's, then the expert's."""

    expert: TensorRef
    base: TensorRef
    hides = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(each for ref in (self.base, self.expert) for each in stored_refs(ref))

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float32."""
        return reading.difference(self.expert, self.base).ravel()


@dataclass(frozen=True)
class Factor(Delta):
    """A (R, I) or B (O, R) of the best rank-R part of a difference."""

    side: Literal["A", "B"]
    rank: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.base.shape
        return (self.rank, columns) if self.side == "A" else (rows, self.rank)

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float32. Raises SourceError."""
        factors = reading.factors(self.expert, self.base, self.rank)
        return (factors.a if self.side == "A" else factors.b).ravel()


@dataclass(frozen=True)
class Bits(Delta):
    """Codes (O, bits, bytes) or steps (O,) of a difference in a few bits (few_bits.py)."""

    side: Literal["codes", "steps"]
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.base.shape
        return (rows, self.bits, bytes_of_codes(columns)) if self.side == "codes" else (rows,)

    @property
    def arrays(self) -> int:
        return 16 if self.side == "codes" else self.base.shape[1]  # a row of either is made of a whole row

    def numbers(self, reading: WeightReader) -> FlatArray:
        """Bytes, or steps in float32."""

        def rows(first: int, last: int) -> Array:
            delta_XI = reading.difference(rows_of(self.expert, first, last), rows_of(self.base, first, last))
            steps_X = steps_of(delta_XI, self.bits)
            return steps_X if self.side == "steps" else codes_of(delta_XI, steps_X, self.bits)

        return ByRows(self.shape[0], math.prod(self.shape[1:]), rows)


@dataclass(frozen=True)
class Join(_Making):
    """Parts one below the other, or side by side with `axis` 1; `experts`: whose each part is, where they are of many."""

    of: tuple[Made, ...]
    axis: Literal[0, 1] = 0
    experts: tuple[int | None, ...] = field(default=(), compare=False)

    @property
    def parts(self) -> tuple[Made, ...]:
        return self.of

    @property
    def shape(self) -> tuple[int, ...]:
        first, both = self.of[0].shape, sum(part.shape[self.axis] for part in self.of)
        return (*first[: self.axis], both, *first[self.axis + 1 :])

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float32."""
        found = [part.numbers(reading) for part in self.of]
        if self.axis == 0:
            return Below(found)
        rows = self.of[0].shape[0]
        widths = [len(each) // rows for each in found]

        def beside(first: int, last: int) -> Array:
            pairs = zip(found, widths, strict=True)
            taken = [to_float32(each[first * width : last * width]).reshape(last - first, width) for each, width in pairs]
            return np.concatenate(taken, axis=1)

        return ByRows(rows, sum(widths), beside)


@dataclass(frozen=True)
class Scale(_Making):
    """Something times a number."""

    of: Made
    factor: float

    @property
    def parts(self) -> tuple[Made, ...]:
        return (self.of,)

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float32."""
        given, factor = self.of.numbers(reading), np.float32(self.factor)
        return ByRows(len(given), 1, lambda first, last: to_float32(given[first:last]) * factor)


@dataclass(frozen=True)
class Merged(_Making):
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

    def cut(self, rows: Rows) -> Merged:
        """Some rows, of each."""
        return replace(self, base=self.base.cut(rows), experts=tuple(each.cut(rows) for each in self.experts))

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float64."""
        return merged(self.rule, self.base.numbers(reading), [each.numbers(reading) for each in self.experts], self.shape)


@dataclass(frozen=True)
class Filled(_Making):
    """One number everywhere."""

    size: tuple[int, ...]
    value: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In float32."""
        return ByRows(math.prod(self.size), 1, lambda first, last: np.full(last - first, self.value, np.float32))


@dataclass(frozen=True)
class Padded(_Making):
    """Something of the base, in a dtype and of a size, in a larger tensor."""

    of: Made
    pad: Pad
    dtype: str
    size: tuple[int, ...]

    @property
    def parts(self) -> tuple[Made, ...]:
        return (self.of,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pad.widened(self.size)

    @property
    def arrays(self) -> int:
        return 4  # rows that stay in the processor's cache

    def numbers(self, reading: WeightReader) -> FlatArray:
        """In its dtype."""
        return PaddedRows(self.pad, self.dtype, self.size, self.of.numbers(reading), reading.fills).flat


Made = Copy | Columns | Fold | Delta | Factor | Bits | Join | Scale | Merged | Filled | Padded


def scaled(made: Made, factor: float) -> Made:
    """Times a number."""
    if isinstance(made, Scale):
        return Scale(made.of, made.factor * factor)
    return made if factor == 1.0 or isinstance(made, Filled) else Scale(made, factor)


def padded(made: Made, pad: Pad | None, dtype: str, shape: tuple[int, ...]) -> Made:
    """Something of a shape in a larger tensor; itself without a pad."""
    return made if pad is None else Padded(scaled(made, pad.scale), pad, dtype, shape)
