"""A larger tensor: the base's own numbers first, behind them channels that carry what a router reads.

Shape legend: O, I rows and columns of a weight, P columns besides, V vocabulary, D hidden size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from modekit.weights.flat import FlatArray, Rows
from modekit.weights.numeric import DTYPES, Array, Doubles, Singles, to_float32

Entry = tuple[int, int, float]  # row, column and value of one number in the new part of a larger tensor

FFNKind = Literal["gate", "up", "gate_up", "down"]
CarriedKind = Literal["q", "k", "v", "o", "head", "embedding", "router"] | FFNKind


class MeasuredColumn(NamedTuple):
    """Of every row e of an embedding: value sqrt(mean(e^2) scale^2 + norm_eps) / scale."""

    column: int
    value: float
    scale: float
    norm_eps: float

    def sizes(self, rows_VD: Singles) -> Doubles:
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
    `scale`: of the base's numbers; `entries` in the new part, by their row in the larger matrices below one another;
    `measured`: a column that follows from the row; `free`: columns that the fit of a router sets later; `carried`: what the
    experts' differences make of the new part.
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
    """New numbers of a matrix (O, I): by rows those beside it, (rows, P); rows below it; factors of its columns, (I,); by rows
    what is added to it, (rows, I).
    """

    beside: Callable[[slice], Singles] | None = None
    below: Singles | None = None
    column_scales: Singles | None = None
    more: Callable[[slice], Singles] | None = None


Fills = Callable[[CarriedPart, int], Fill]  # what is carried, and the number of a matrix (building/carrying.py)


def padded_rows(pad: Pad, dtype: str, shape: tuple[int, ...], given: FlatArray, fills: Fills | None) -> Rows:
    """The rows of a larger tensor, matrix by matrix, from the numbers of the base's tensor of this shape."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
    tall = rows + pad.rows
    code = DTYPES[dtype]
    entries = sorted(pad.entries)

    @lru_cache(maxsize=1)
    def fill_of(matrix: int) -> Fill:
        return fills(pad.carried, matrix) if fills and pad.carried else Fill()

    def of_matrix(out: Array, matrix: int, at: int) -> None:
        """Fill rows of one matrix, of which `at` is the first here."""
        fill = fill_of(matrix)
        own = max(0, min(len(out), rows - at))
        if own:
            first = (matrix * rows + at) * columns
            numbers = given[first : first + own * columns].reshape(own, columns)
            if fill.more is not None:
                numbers = to_float32(numbers) + fill.more(slice(at, at + own))
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
        start = matrix * tall + at
        for row, column, value in entries[bisect_left(entries, (start,)) : bisect_left(entries, (start + len(out),))]:
            out[row - start, column] = np.float32(value)

    def of_matrices(first: int, last: int) -> Array:
        out = np.zeros((last - first, columns + pad.columns), code)
        row = first
        while row < last:  # what does not fit the dtype is infinite, which whoever writes it finds
            matrix, at = divmod(row, tall)
            stop = min(last, (matrix + 1) * tall)
            with np.errstate(over="ignore"):
                of_matrix(out[row - first : stop - first], matrix, at)
            row = stop
        return out

    return Rows(len(given) // (rows * columns) * tall, columns + pad.columns, of_matrices)
