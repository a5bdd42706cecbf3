"""What brings a matrix that all experts share nearest to each expert's own on what that one reads of its own text, beyond their
average: RegMean (arXiv:2212.09849) over a sample.

Shape legend: O outputs, I inputs, T rows of the sample, D hidden size, A width of what attention's output projection
reads, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from modekit.weights.bases import Stream
from modekit.weights.numeric import Singles, rounded

_RIDGE = 1e-3
"""Of the mean second moment of an input, towards the average (benchmarks/whole.md)."""


class OwnReads(NamedTuple):
    """Of what each expert reads of its own text, in 16 bits: per layer what attention reads (T, D), at size 1, and what its
    output projection reads (T, A); what the head reads (T, D), at size 1. T / E rows each (`principal_rows`).
    """

    read: tuple[Singles, ...]
    attended: tuple[Singles, ...]
    last: Singles


def own_reads(stream: Stream) -> OwnReads:
    """What is kept of the experts' stream."""
    read, attended = ([rounded(getattr(each, name), "BF16") for each in stream.layers] for name in ("read", "attended"))
    return OwnReads(tuple(read), tuple(attended), rounded(stream.last, "BF16"))


def nearest_duals(sample_TI: Singles) -> Singles:
    """S (T, I): of all matrices A + Y S is nearest, in squares, to every expert's M_e on the part X_e of the sample that it
    reads, where the columns of Y (O, T) are (M_e - A) x. With the ridge towards A,

        A + Y S = (sum_e M_e G_e + r A) (sum_e G_e + r)^-1,    G_e = X_e^T X_e,    S = (X X^T + r)^-1 X

    (RegMean, arXiv:2212.09849), and what is inverted is as large as the sample.
    """
    x_TI = sample_TI.astype(np.float64)
    ridge = _RIDGE * max(float(np.square(x_TI).sum()) / x_TI.shape[1], 1e-30)
    return np.linalg.solve(x_TI @ x_TI.T + ridge * np.eye(len(x_TI)), x_TI).astype(np.float32)
