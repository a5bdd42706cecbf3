"""A tensor of the base in a larger one: its own numbers first, behind them channels that carry what a router reads.

Shape legend: O, I rows and columns of a matrix of the base, P columns besides, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from modekit.weights.numeric import DTYPES, to_float32
from modekit.weights.stored import ByRows, FlatArray

Array = npt.NDArray[np.generic]
Singles = npt.NDArray[np.float32]
Entry = tuple[int, int, float]
"""Row, column and value of one number in the new part."""
FFNKind = Literal["gate", "up", "gate_up", "down"]
CarriedKind = Literal["q", "k", "v", "o", "head", "embedding"] | FFNKind


@dataclass(frozen=True)
class MeasuredColumn:
    """A column that every row e of an embedding gets by its own size: value sqrt(mean(e^2) scale^2 + norm_eps) / scale, or,
    where no norm follows (None), value.
    """

    column: int
    value: float
    scale: float
    norm_eps: float | None

    def sizes(self, rows_VD: Singles) -> npt.NDArray[np.float64]:
        """By what a row's new numbers are multiplied, so that they are themselves behind the first norm: (V,)."""
        if self.norm_eps is None:
            return np.ones(len(rows_VD))
        squares = np.square(rows_VD.astype(np.float64) * self.scale).mean(axis=1)
        return np.asarray(np.sqrt(squares + self.norm_eps) / self.scale)


@dataclass(frozen=True)
class CarriedPart:
    """Whose numbers stand in the new rows and columns where a native checkpoint carries more than FFNs (planning/carry.py).

    Attributes:
        kind: which part of a layer it is.
        layer: of the result; 0 is the one in front.
        expert: whose it is; None for what all share, and for all experts in one tensor.
    """

    kind: CarriedKind
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Pad:
    """What is new in a larger tensor: zeros, unless said otherwise.

    Attributes:
        rows, columns: how many more there are. A tensor with one axis has columns only, one with three is widened matrix by
            matrix.
        scale: what the base's numbers are multiplied with.
        entries: in the new part of the first matrix.
        measured: a column that follows from the row, if there is one.
        free: columns that the fit of a router sets later.
        carried: what the experts' differences make of the new part.
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


@dataclass(frozen=True)
class Fill:
    """New numbers beside and below a matrix (O, I).

    Attributes:
        beside: rows -> their numbers in the new columns, (rows, P).
        below: the new rows, as wide as the result or less.
        column_scales: what the columns of the matrix are multiplied with, (I,).
    """

    beside: Callable[[slice], Singles] | None = None
    below: Singles | None = None
    column_scales: Singles | None = None


Fills = Callable[[CarriedPart, int], Fill]
"""What is carried, and the number of a matrix -> its new part (building/carrying.py)."""


class PaddedRows:
    """The rows of a larger tensor, matrix by matrix, from the numbers of the base's tensor of this shape."""

    def __init__(self, pad: Pad, dtype: str, shape: tuple[int, ...], given: FlatArray, fills: Fills | None) -> None:
        self._pad, self._dtype, self._given = pad, DTYPES[dtype], given
        self._rows, self._columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
        self._fill = lru_cache(maxsize=1)(lambda matrix: fills(pad.carried, matrix) if fills and pad.carried else Fill())
        count = len(given) // (self._rows * self._columns)
        self._tall = self._rows + pad.rows
        self.flat = ByRows(count * self._tall, self._columns + pad.columns, self._of_matrices)

    def _of_matrices(self, first: int, last: int) -> Array:
        out, row = np.zeros((last - first, self._columns + self._pad.columns), self._dtype), first
        while row < last:  # what does not fit the dtype is infinite, which whoever writes it finds
            matrix, at = divmod(row, self._tall)
            stop = min(last, (matrix + 1) * self._tall)
            with np.errstate(over="ignore"):
                self._of_matrix(out[row - first : stop - first], matrix, at)
            row = stop
        return out

    def _of_matrix(self, out: Array, matrix: int, at: int) -> None:
        """Fill rows of one matrix, of which `at` is the first here."""
        fill, own, columns = self._fill(matrix), max(0, min(len(out), self._rows - at)), self._columns
        if own:
            numbers = self._numbers(matrix * self._rows + at, own)
            out[:own, :columns] = numbers if fill.column_scales is None else to_float32(numbers) * fill.column_scales
            if fill.beside is not None:
                out[:own, columns:] = fill.beside(slice(at, at + own))
            measured = self._pad.measured
            if measured is not None:
                sizes = measured.sizes(to_float32(numbers)) * measured.value
                out[:own, measured.column] = sizes.astype(np.float32)
        if fill.below is not None and own < len(out):
            start = at + own - self._rows
            out[own:, : fill.below.shape[1]] = fill.below[start : start + len(out) - own]
        for row, column, value in self._pad.entries if matrix == 0 else ():
            if at <= row < at + len(out):
                out[row - at, column] = np.float32(value)

    def _numbers(self, first: int, count: int) -> Array:
        """Rows of the base's tensor, in the dtype of the result."""
        values = self._given[first * self._columns : (first + count) * self._columns].reshape(count, self._columns)
        return values if values.dtype == self._dtype else to_float32(values).astype(self._dtype)
