"""Backbone merges, tensor by tensor and block by block: average, task arithmetic, TIES.

Sources are read as float32; sums are kept in float64 and rounded once, so that merging copies of one model gives that
model back bit for bit. Memory is a few blocks, whatever the tensor's size and however many models there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from modekit.recipes.backbone import BackboneMerge
from modekit.weights.flat import FlatArray, Rows
from modekit.weights.numeric import BLOCK, Doubles, blocks, moved

_STEP = BLOCK // 4  # two copies of every model's block, in float64 where a block of numeric.py is float32
_HALVES = 2**16  # of what 32 bits may say
_Rule = Callable[[Doubles, list[Doubles]], Doubles]


def merged(settings: BackboneMerge, base: FlatArray, experts: Sequence[FlatArray]) -> Rows:
    """The merged tensor as a flat array in float64, computed where it is read.

    `base` and `experts` are flat arrays of equal length in any float format.
    """
    rule = _elementwise(settings, base, experts)

    def rows(first: int, last: int) -> Doubles:
        part = slice(first, last)
        return rule(_read(base, part), [_read(expert, part) for expert in experts])

    return Rows(len(base), 1, rows)


def _read(array: FlatArray, part: slice) -> Doubles:
    return array[part].astype(np.float32).astype(np.float64)


def _elementwise(settings: BackboneMerge, base: FlatArray, experts: Sequence[FlatArray]) -> _Rule:
    if settings.method == "average":
        return lambda _, values: _sum(values) / len(values)
    if settings.method == "task_arithmetic":  # Eq. 2, arXiv:2212.04089: base + scale * sum of task vectors
        return lambda origin, values: moved(origin, settings.scale * _sum([value - origin for value in values]))
    thresholds = [_magnitude_threshold(base, expert, settings.density) for expert in experts]
    return lambda origin, values: _ties(origin, values, thresholds, settings.scale)


def _sum(values: Sequence[Doubles]) -> Doubles:
    """The sum in order; unlike numpy's it starts with the first value, not with zero, so that -0.0 stays -0.0."""
    return functools.reduce(np.add, values)


def _ties(base: Doubles, values: list[Doubles], thresholds: list[np.float32], scale: float) -> Doubles:
    """Trim, elect sign, disjoint mean (Algorithm 1, arXiv:2306.01708)."""
    deltas = [value - base for value in values]
    trimmed = np.stack(
        [
            np.where(np.abs(delta).astype(np.float32) >= least, delta, 0.0)
            for delta, least in zip(deltas, thresholds, strict=True)
        ]
    )
    elected = np.sign(trimmed.sum(axis=0))
    agrees = (np.sign(trimmed) == elected) & (elected != 0)
    count = agrees.sum(axis=0)
    mean: Doubles = np.where(agrees, trimmed, 0.0).sum(axis=0) / np.maximum(count, 1)
    return moved(base, scale * mean)


def _magnitude_threshold(base: FlatArray, expert: FlatArray, density: float) -> np.float32:
    """The k-th largest |expert - base| in float32, k = ceil(density * n), exactly and in bounded memory.

    Non-negative floats sort like their bit patterns, so two counting passes over 16 bits each find the value.
    """
    keep = max(1, int(np.ceil(density * len(base))))
    found = 0  # the bits so far, from the highest
    for shift in (16, 0):
        counts = np.zeros(_HALVES, np.int64)
        for part in blocks(len(base), _STEP):
            bits = np.abs(_read(expert, part) - _read(base, part)).astype(np.float32).view(np.uint32) >> shift
            counts += np.bincount(bits[bits >> 16 == found] % _HALVES, minlength=_HALVES)
        largest_first = counts[::-1]
        place = int(np.searchsorted(np.cumsum(largest_first), keep))
        keep -= int(largest_first[:place].sum())
        found = found * _HALVES + _HALVES - 1 - place
    threshold: np.float32 = np.uint32(found).view(np.float32)
    return threshold
