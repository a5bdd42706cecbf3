"""Weights of the base with an adapter's change folded in, computed by rows, so that memory stays a few blocks.

Products and sums are kept in float64 and rounded once to float32: float32 products depend on the BLAS, the number of
threads and the shape of the block, and `verify` must compute again, anywhere, what `build` wrote.

Shape legend: O output, I input of a linear layer, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from modekit.sources.adapter import LowRank
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.weights.numeric import BLOCK, moved, to_float32
from modekit.weights.stored import FlatArray, Stored

Array = npt.NDArray[np.generic]
Read = Callable[[TensorRef], Array]
"""The whole of a tensor of the adapter as a flat array, in its own dtype."""
_Single = npt.NDArray[np.float32]
_Double = npt.NDArray[np.float64]


def reader(opened: OpenFiles) -> Read:
    """Read adapter tensors into memory."""
    return lambda ref: Stored(opened, ref)[:]


class _Rows:
    """Rows of a weight (O, I) that is given as a flat array, in float32."""

    def __init__(self, flat: FlatArray, shape: tuple[int, int]) -> None:
        self._flat, self.shape = flat, shape

    def __getitem__(self, rows: slice) -> _Single:
        count, columns = self.shape
        start, stop = min(rows.start, count), min(rows.stop, count)
        return to_float32(self._flat[start * columns : stop * columns]).reshape(stop - start, columns)


class Folded:
    """One changed weight as a flat float32 array that is computed where it is read: `len(folded)`, `folded[start:stop]`.

    An element never depends on the slices by which it is read, since rows are always computed in the same groups. Reading
    in order computes every row once (a DoRA embedding twice, for the norms of its columns).

    Args:
        change: what the adapter does to the weight.
        base: the base's weight, or the adapter's replacement of it, flat, in any float dtype; read by rows.
        shape: (O, I), or (V, D) of an embedding.
        read: gives the adapter's tensors; see `reader`.
    """

    def __init__(self, change: LowRank, base: FlatArray, shape: tuple[int, int], read: Read) -> None:
        self._size = len(base)
        rows = _Rows(base, shape)
        self._columns = shape[1]
        self._group = max(1, BLOCK // 4 // max(1, shape[1]))  # float64 and its temporaries fit in a block
        self._change = _LowRankRows(change, rows, self._group, read)
        self._last: tuple[int, _Single] = (-1, np.empty(0, np.float32))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> _Single:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"a folded weight is read in order, not by steps of {step}")
        size = self._group * self._columns
        result = np.empty(max(0, stop - start), np.float32)
        for place in range(start // size, -(-stop // size)) if stop > start else ():
            offset = place * size
            values = self._rows(place)[max(0, start - offset) : stop - offset]
            at = max(0, offset - start)
            result[at : at + len(values)] = values
        return result

    def _rows(self, place: int) -> _Single:
        if self._last[0] != place:
            self._last = (place, self._change(slice(place * self._group, (place + 1) * self._group)).ravel())
        return self._last[1]


class _LowRankRows:
    """Rows of W + scale * B A (LoRA, arXiv:2106.09685), and of DoRA's m * W' / ||W'|| (Eq. 5, arXiv:2402.09353)."""

    def __init__(self, change: LowRank, base: _Rows, group: int, read: Read) -> None:
        self._base, self._group, self._scale = base, group, change.scale
        a, b = read(change.a).reshape(change.a.shape), read(change.b).reshape(change.b.shape)
        # One factor is needed whole for every row and is small; of the other, rows are taken as they come.
        self._left: Array = a.T if change.transposed else _part(b, change.rows)
        right: Array = b.T if change.transposed else a
        self._right = right.astype(np.float64)
        self._by_column = change.transposed
        self._magnitude: _Double | None = None
        if change.magnitude is not None:
            self._magnitude = _part(read(change.magnitude), change.rows).astype(np.float64)
        self._factor_of_columns: _Double | None = None

    def __call__(self, rows: slice) -> _Single:
        weight = self._plain(rows)
        if self._magnitude is not None:
            if self._by_column:
                weight *= self._column_factor()
            else:
                weight *= _ratio(self._magnitude[rows], np.square(weight).sum(axis=1))[:, None]
        with np.errstate(over="ignore"):  # whoever writes the weight checks that it is finite
            return weight.astype(np.float32)

    def _plain(self, rows: slice) -> _Double:
        base, left = self._base[rows], self._left[rows].astype(np.float64)
        shift = np.zeros(base.shape, np.float64)  # of tokens that the adapter does not know, nothing
        shift[: len(left)] = self._scale * (left @ self._right)
        return moved(base, shift)

    def _column_factor(self) -> _Double:
        if self._factor_of_columns is None:
            assert self._magnitude is not None
            squares = np.zeros(self._base.shape[1], np.float64)
            for start in range(0, self._base.shape[0], self._group):
                squares += np.square(self._plain(slice(start, start + self._group))).sum(axis=0)
            self._factor_of_columns = _ratio(self._magnitude, squares)
        return self._factor_of_columns


def _part(array: Array, rows: tuple[int, int] | None) -> Array:
    return array if rows is None else array[rows[0] : rows[1]]


def _ratio(magnitude: _Double, squares: _Double) -> _Double:
    """DoRA's m / ||W'||, from sums of squares. The norm is rounded to float32 as PEFT's is, so that an untrained m gives one.

    A row of zeros gives NaN, as in PEFT; whoever writes the weight checks that it is finite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: _Double = magnitude / np.sqrt(squares).astype(np.float32)
    return ratio
