"""A linear function of the stream through a gated FFN behind an RMS norm, without the norm.

A hidden unit gives silu(g . x / rho) (u . x / rho), where rho is the size of the stream. Let g read one channel that is the
same constant for every token, so that behind the norm it is 1 / rho up to a factor. With K units of one u, gates
alpha_k rho0 / rho and outputs beta_k rho0,

    sum_k beta_k rho0 silu(alpha_k rho0 / rho) (u . x) / rho = u . x    where    sum_k beta_k silu(alpha_k / t) = t,

t = rho / rho0 being near 1. alpha and beta are fitted on the sizes that a text shows. Outside their range the units give too
little, and never too much.

Shape legend: K units, N sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Doubles = npt.NDArray[np.float64]

TERMS = 2
"""K: a relative error of 4e-3 where sizes differ by half; more units change no loss (benchmarks/whole.md)."""
_STARTS = {1: (-1.3,), 2: (-1.365, -4.744), 3: (-0.925, -3.044, -7.659), 4: (-0.536, -1.847, -4.896, -12.644)}
_CUT = 0.002  # of the sizes on either side: the first tokens of a text are many times as large as the rest
_POINTS = 257
_RIDGE = 1e-6
_ROUNDS = 40


@dataclass(frozen=True)
class PassThrough:
    """Units that pass on a linear function of the stream.

    Attributes:
        size: rho0, the median of the sizes.
        alphas, betas: (K,).
        error: root of the mean squared relative error over the sizes that it was fitted on.
    """

    size: float
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    error: float


def fit_pass_through(sizes_N: npt.NDArray[np.floating], terms: int = TERMS) -> PassThrough:
    """The K units for streams of these sizes (N,), all above 0: a coordinate search over log alpha, least squares for beta."""
    middle = float(np.median(sizes_N))
    t_N = np.quantile(sizes_N.astype(np.float64) / middle, np.linspace(_CUT, 1 - _CUT, _POINTS))
    alphas, step = np.array(_STARTS[terms]), 0.5
    betas, error = _solved(alphas, t_N)
    for _ in range(_ROUNDS):
        better = False
        for place in range(terms):
            for factor in (np.exp(step), np.exp(-step)):
                tried = alphas.copy()
                tried[place] *= factor
                found, missed = _solved(tried, t_N)
                if missed < error:
                    alphas, betas, error, better = tried, found, missed, True
        if not better:
            step /= 2
    return PassThrough(middle, tuple(map(float, alphas)), tuple(map(float, betas)), float(error))


def _solved(alphas: _Doubles, t_N: _Doubles) -> tuple[_Doubles, float]:
    """The best betas (K,), and the relative error; a little ridge keeps large ones of different signs away."""
    inside_NK = alphas / t_N[:, None]
    units_NK = inside_NK / (1 + np.exp(-inside_NK)) / t_N[:, None]
    gram_KK = units_NK.T @ units_NK / len(t_N)
    betas = np.linalg.solve(gram_KK + _RIDGE * np.trace(gram_KK) / len(alphas) * np.eye(len(alphas)), units_NK.mean(0))
    return betas, float(np.sqrt(np.mean((units_NK @ betas - 1) ** 2)))
