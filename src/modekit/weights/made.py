"""How a tensor of the result is made: what it reads, and its numbers. A build writes them, verify computes them again.

    Copy        a stored tensor                     Fold        with an adapter's change
    Delta       of an expert from the base, or what is kept of it: low-rank factors, a few bits per number
    Join        parts below or beside each other    Columns     some columns of a stored tensor
    Merged      a rule over base and experts        Scale       times a number
    Padded      in a larger tensor                  Zeros       of a size

A larger tensor has the base's own numbers first, behind them channels that carry what a router reads.
Shape legend: O, I rows and columns of a weight, R rank, P columns besides, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from modekit.recipes.mixture import BackboneMerge
from modekit.sources.adapter import LowRank
from modekit.sources.header import TensorRef
from modekit.sources.rows import rows_of, stored_refs
from modekit.weights.few_bits import bytes_of_codes, codes_of, steps_of
from modekit.weights.folding import folded, reader
from modekit.weights.merge import merged
from modekit.weights.numeric import DTYPES, Array, FlatArray, Rows, Singles, below, stored, to_float32
from modekit.weights.reading import WeightReader

_PLAIN = 8  # arrays of a plain block: read, in float32, scaled, rounded; small, so that they stay in the processor's cache
Entry = tuple[int, int, float]  # row, column and value of one number in the new part of a larger tensor
FFNKind = Literal["gate", "up", "gate_up", "down"]
CarriedKind = Literal["q", "k", "v", "o", "head", "embedding"] | FFNKind


class MeasuredColumn(NamedTuple):
    """Of every row e of an embedding: value sqrt(mean(e^2) scale^2 + norm_eps) / scale."""

    column: int
    value: float
    scale: float
    norm_eps: float

    def sizes(self, rows_VD: Singles) -> npt.NDArray[np.float64]:
        """By what a row's new numbers are multiplied, so that they are themselves behind the first norm: (V,)."""
        squares = np.square(rows_VD.astype(np.float64) * self.scale).mean(axis=1)
        return np.asarray(np.sqrt(squares + self.norm_eps) / self.scale)


class CarriedPart(NamedTuple):
    """Whose numbers a native checkpoint carries there (planning/channels.py): part and layer of the result, 0 being the one in
    front; expert, None for what all share, and for all in one tensor.
    """

    kind: CarriedKind
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Pad:
    """What is new in a larger tensor: zeros, unless said otherwise.

    `rows`, `columns`: how many more (a tensor with one axis has columns only, one with three is widened matrix by matrix);
    `scale`: of the base's numbers; `entries` in the new part of the first matrix; `measured`: a column that follows from the
    row; `free`: columns that the fit of a router sets later; `carried`: what the experts' differences make of the new part.
    """

    rows: int = 0
    columns: int = 0
    scale: float = 1.0
    entries: tuple[Entry, ...] = ()
    measured: MeasuredColumn | None = None
    free: slice | None = None
    carried: CarriedPart | None = None

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result for a tensor of this shape."""
        if len(shape) == 1:
            return (shape[0] + self.columns,)
        return (*shape[:-2], shape[-2] + self.rows, shape[-1] + self.columns)


class Fill(NamedTuple):
    """New numbers of a matrix (O, I): by rows those beside it, (rows, P); rows below it; factors of its columns, (I,)."""

    beside: Callable[[slice], Singles] | None = None
    below: Singles | None = None
    column_scales: Singles | None = None


Fills = Callable[[CarriedPart, int], Fill]  # what is carried, and the number of a matrix (building/carrying.py)


class _Making:
    """What all ways have: of their parts, unless they say so themselves."""

    hides: ClassVar[bool] = False  # whether computing may hide a NaN that is read

    @property
    def parts(self) -> tuple[Made, ...]:
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def read(self) -> tuple[TensorRef, ...]:
        """Tensors that it reads itself."""
        return ()

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Tensors on disk, or rows of them, that are read."""
        own = tuple(each for ref in self.read for each in stored_refs(ref))
        return own + tuple(ref for part in self.parts for ref in part.refs)

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
    arrays = _PLAIN

    @property
    def read(self) -> tuple[TensorRef, ...]:
        return (self.ref,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape


@dataclass(frozen=True)
class Copy(_Stored):
    """A stored tensor, in its own dtype."""

    def cut(self, rows: tuple[int, int]) -> Copy:
        return Copy(rows_of(self.ref, *rows))

    def numbers(self, reading: WeightReader) -> FlatArray:
        return stored(reading.opened, self.ref)


@dataclass(frozen=True)
class Columns(_Stored):
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
class Fold(_Stored):
    """A weight of the base with an adapter's change, in float32."""

    change: LowRank
    hides = True
    arrays = 1

    @property
    def read(self) -> tuple[TensorRef, ...]:
        return (self.ref, *self.change.refs)

    def cut(self, rows: tuple[int, int]) -> Fold:
        return replace(self, ref=rows_of(self.ref, *rows), change=replace(self.change, rows=rows))

    def numbers(self, reading: WeightReader) -> FlatArray:
        return folded(self.change, stored(reading.opened, self.ref), self.ref.shape, reader(reading.opened))


@dataclass(frozen=True)
class Delta(_Making):
    """Expert - base in float32: itself; A (R, I) or B (O, R) of its best part of a rank; its codes (O, bits, bytes) or steps
    (O,) in a few bits (few_bits.py). `size` is the rank, or the bits.
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
class _Changed(_Making):
    of: Made

    @property
    def parts(self) -> tuple[Made, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Scale(_Changed):
    """Something times a number, in float32."""

    factor: float

    def numbers(self, reading: WeightReader) -> FlatArray:
        given, factor = self.of.numbers(reading), np.float32(self.factor)
        return Rows(len(given), 1, lambda first, last: to_float32(given[first:last]) * factor)


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

    def cut(self, rows: tuple[int, int]) -> Merged:
        return replace(self, base=self.base.cut(rows), experts=tuple(each.cut(rows) for each in self.experts))

    def numbers(self, reading: WeightReader) -> FlatArray:
        return merged(self.rule, self.base.numbers(reading), [each.numbers(reading) for each in self.experts])


@dataclass(frozen=True)
class Zeros(_Making):
    """Of a size."""

    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def numbers(self, reading: WeightReader) -> FlatArray:
        return Rows(math.prod(self.size), 1, lambda first, last: np.zeros(last - first, np.float32))


@dataclass(frozen=True)
class Padded(_Changed):
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
    if isinstance(made, Scale):
        return Scale(made.of, made.factor * factor)
    return made if factor == 1.0 or isinstance(made, Zeros) else Scale(made, factor)


def padded_rows(pad: Pad, dtype: str, shape: tuple[int, ...], given: FlatArray, fills: Fills | None) -> Rows:
    """The rows of a larger tensor, matrix by matrix, from the numbers of the base's tensor of this shape."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
    tall, code = rows + pad.rows, DTYPES[dtype]

    @lru_cache(maxsize=1)
    def fill_of(matrix: int) -> Fill:
        return fills(pad.carried, matrix) if fills and pad.carried else Fill()

    def of_matrix(out: Array, matrix: int, at: int) -> None:
        """Fill rows of one matrix, of which `at` is the first here."""
        fill, own = fill_of(matrix), max(0, min(len(out), rows - at))
        if own:
            first = (matrix * rows + at) * columns
            numbers = given[first : first + own * columns].reshape(own, columns)
            numbers = numbers if numbers.dtype == code else to_float32(numbers).astype(code)
            out[:own, :columns] = numbers if fill.column_scales is None else to_float32(numbers) * fill.column_scales
            if fill.beside is not None:
                out[:own, columns:] = fill.beside(slice(at, at + own))
            if pad.measured is not None:
                sizes = pad.measured.sizes(to_float32(numbers)) * pad.measured.value
                out[:own, pad.measured.column] = sizes.astype(np.float32)
        if fill.below is not None and own < len(out):
            start = at + own - rows
            out[own:, : fill.below.shape[1]] = fill.below[start : start + len(out) - own]
        for row, column, value in pad.entries if matrix == 0 else ():
            if at <= row < at + len(out):
                out[row - at, column] = np.float32(value)

    def of_matrices(first: int, last: int) -> Array:
        out, row = np.zeros((last - first, columns + pad.columns), code), first
        while row < last:  # what does not fit the dtype is infinite, which whoever writes it finds
            matrix, at = divmod(row, tall)
            stop = min(last, (matrix + 1) * tall)
            with np.errstate(over="ignore"):
                of_matrix(out[row - first : stop - first], matrix, at)
            row = stop
        return out

    return Rows(len(given) // (rows * columns) * tall, columns + pad.columns, of_matrices)
