"""Weights of the base with an adapter's change folded in, computed by rows, so that memory stays a few blocks.

Products and sums are kept in float64 and rounded once to float32: float32 products depend on the BLAS, the number of
threads and the shape of the block, and `verify` must compute again, anywhere, what `build` wrote.

Shape legend: E experts, O output, I input of a linear layer, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from modekit.sources.adapter import LowRank
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.weights.flat import FlatArray, Rows, stored
from modekit.weights.numeric import BLOCK, Array, Doubles, Singles, moved, to_float32

Read = Callable[[TensorRef], Array]
"""The whole of a tensor of the adapter as a flat array, in its own dtype."""
_Given = Callable[[int, int], Singles]
"""Rows of a weight (O, I)."""


def reader(opened: OpenFiles) -> Read:
    """Read adapter tensors into memory."""
    return lambda ref: stored(opened, ref)[:]


def folded(change: LowRank, base: FlatArray, shape: tuple[int, ...], read: Read) -> Rows:
    """A changed weight (O, I), (V, D) of an embedding, or (E, O, I) of fused experts, as a flat float32 array.

    Of fused experts, expert e is its e-th part of O I numbers; `as_in` (made.py) says which tensors are folded.
    `base` is the base's weight, or the adapter's replacement of it, flat, in any float dtype. An element never depends on the
    slices by which it is read. Reading in order computes every row once (a DoRA embedding twice, for the norms of its columns).
    """
    count = math.prod(shape[:-1])
    columns = shape[-1]
    group = max(1, BLOCK // 4 // max(1, columns))  # float64 and its temporaries fit in a block

    def given(first: int, last: int) -> Singles:
        return to_float32(base[first * columns : last * columns]).reshape(last - first, columns)

    rows = _per_expert(change, given, shape[-2], read) if change.experts else _low_rank(change, given, shape, group, read)
    return Rows(count, columns, rows, group)


def _per_expert(change: LowRank, given: _Given, size: int, read: Read) -> Callable[[int, int], Singles]:
    """Rows of W_e + scale * B_e A_e, or of its transpose, `size` of them per expert."""
    a_ERI = read(change.a).reshape(change.experts, -1, change.a.shape[1])
    b_ORE = read(change.b).reshape(change.b.shape[0], -1, change.experts)
    if change.member is not None:
        b_ORE = b_ORE[slice(*change.rows) if change.rows else slice(None), :, change.member : change.member + 1]
        a_ERI = a_ERI[change.member : change.member + 1]

    def rows(first: int, last: int) -> Singles:
        origin = given(first, last)
        shift = np.empty(origin.shape, np.float64)
        for expert in range(first // size, -(-last // size)):
            start, stop = max(first, expert * size), min(last, (expert + 1) * size)
            a_RI = a_ERI[expert].astype(np.float64)
            b_OR = b_ORE[:, :, expert].astype(np.float64)
            left, right = (a_RI.T, b_OR.T) if change.transposed else (b_OR, a_RI)
            shift[start - first : stop - first] = left[start - expert * size : stop - expert * size] @ right
        with np.errstate(over="ignore"):  # whoever writes the weight checks that it is finite
            return moved(origin, change.scale * shift).astype(np.float32)

    return rows


def _low_rank(change: LowRank, given: _Given, shape: tuple[int, ...], group: int, read: Read) -> Callable[[int, int], Singles]:
    """Rows of W + scale * B A (LoRA, arXiv:2106.09685), and of DoRA's m * W' / ||W'|| (Eq. 5, arXiv:2402.09353)."""
    a, b = read(change.a).reshape(change.a.shape), read(change.b).reshape(change.b.shape)
    # One factor is needed whole for every row and is small; of the other, rows are taken as they come.
    left = a.T if change.transposed else b
    right = (b.T if change.transposed else a).astype(np.float64)
    magnitude = None if change.magnitude is None else read(change.magnitude).astype(np.float64)

    def plain(first: int, last: int) -> Doubles:
        origin = given(first, last)
        some = left[first:last].astype(np.float64)
        shift = np.zeros(origin.shape, np.float64)  # of tokens that the adapter does not know, nothing
        shift[: len(some)] = change.scale * (some @ right)
        return moved(origin, shift)

    @cache
    def of_columns() -> Doubles:
        assert magnitude is not None
        squares = np.zeros(shape[1], np.float64)
        for first in range(0, shape[0], group):
            squares += np.square(plain(first, min(shape[0], first + group))).sum(axis=0)
        return _ratio(magnitude, squares)

    def rows(first: int, last: int) -> Singles:
        weight = plain(first, last)
        if magnitude is not None and change.transposed:
            weight *= of_columns()
        elif magnitude is not None:
            weight *= _ratio(magnitude[first:last], np.square(weight).sum(axis=1))[:, None]
        with np.errstate(over="ignore"):  # whoever writes the weight checks that it is finite
            return weight.astype(np.float32)

    return rows


def _ratio(magnitude: Doubles, squares: Doubles) -> Doubles:
    """DoRA's m / ||W'||, from sums of squares. The norm is rounded to float32 as PEFT's is, so that an untrained m gives one.

    A row of zeros gives NaN, as in PEFT; whoever writes the weight checks that it is finite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Doubles = magnitude / np.sqrt(squares).astype(np.float32)
    return ratio
