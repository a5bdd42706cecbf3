"""A weight difference in a few bits per number, row by row, as BitDelta (arXiv:2402.10193) does in one. numpy only.

    difference ~ (code - (2^b - 1) / 2) step        code 0 .. 2^b - 1 per number, step per row

With one bit these are the sign and the mean size of a row. Steps and codes are found in turns (Lloyd's algorithm with equal
distances): the nearest code of every number, then the step of least squares. Codes lie in planes of one bit, the lowest first,
eight numbers of a row in a byte.

Shape legend: X rows, I inputs, P bits, C bytes of a plane's row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

_TURNS = 8
_FIRST = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}
"""Bits -> step of a normal distribution of deviation 1 with the least squared error (Max 1960)."""


def steps_of(delta_XI: Array32, bits: int) -> Array32:
    """The step of every row (X,), float32; 0 for a row of zeros. A row's step depends on that row alone."""
    size_X1 = np.sqrt(np.mean(np.square(delta_XI, dtype=np.float64), axis=1, keepdims=True))
    step_X1 = np.asarray(_FIRST.get(bits, 8.0 / 2**bits) * size_X1)
    for _ in range(_TURNS):
        level_XI = _codes(delta_XI, step_X1.astype(np.float32), bits) - np.float32((2**bits - 1) / 2)
        both = np.sum(delta_XI * level_XI, axis=1, dtype=np.float64), np.sum(np.square(level_XI), axis=1, dtype=np.float64)
        step_X1 = np.asarray(both[0] / both[1])[:, None]
    return np.asarray(step_X1[:, 0], np.float32)


def bytes_of_codes(inputs: int) -> int:
    """C: a plane's row begins at a byte."""
    return -(-inputs // 8)


def codes_of(delta_XI: Array32, step_X: Array32, bits: int) -> Codes:
    """The codes (X, P, C) of rows by their steps."""
    codes_XI = _codes(delta_XI, step_X[:, None], bits)
    planes = [np.packbits((codes_XI >> plane) & 1, axis=1, bitorder="little") for plane in range(bits)]
    return np.stack(planes, axis=1)


def _codes(delta_XI: Array32, step_X1: Array32, bits: int) -> Codes:
    scaled_XI = np.divide(delta_XI, step_X1, out=np.zeros_like(delta_XI), where=step_X1 > 0)
    return np.asarray(np.clip(np.floor(scaled_XI) + 2 ** (bits - 1), 0, 2**bits - 1), np.uint8)
