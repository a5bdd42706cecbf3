"""A linear function of the stream through a gated FFN behind an RMS norm, without the norm.

A hidden unit gives silu(g . x / rho) (u . x / rho), where rho is the size of the stream. Let g read one channel that is the
same constant for every token, so that behind the norm it is 1 / rho up to a factor. With K units of one u, gates
alpha_k rho0 / rho and outputs beta_k rho0,

    sum_k beta_k rho0 silu(alpha_k rho0 / rho) (u . x) / rho = u . x    where    sum_k beta_k silu(alpha_k / t) = t,

t = rho / rho0 being near 1 for most tokens. alpha and beta are fitted on the sizes that a text shows. Outside their range the
units give too little, and never too much.

Shape legend: K units, N sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Doubles = npt.NDArray[np.float64]

_STARTS = {1: (-1.3,), 2: (-1.365, -4.744), 3: (-0.925, -3.044, -7.659), 4: (-0.536, -1.847, -4.896, -12.644)}
_CUT = 0.002  # of the smallest sizes
_POINTS, _FAR_POINTS = 257, 33
_FAR, _FAR_WEIGHT = 3.0, 0.1
"""Streams of first tokens may be a hundred times as large as others, few as they are: every token attends to them."""
_RIDGE = 1e-7
_ROUNDS, _LEAST_STEP = 60, 1e-4


@dataclass(frozen=True)
class PassThrough:
    """Units that pass on a linear function of the stream.

    Attributes:
        size: rho0, the median of the sizes.
        alphas, betas: (K,).
        error: root of the mean squared relative error over the sizes, far ones counting more.
    """

    size: float
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    error: float


def fit_pass_through(sizes_N: npt.NDArray[np.floating], terms: int) -> PassThrough:
    """The K units for streams of these sizes (N,), all above 0: a coordinate search over log alpha, least squares for beta."""
    middle = float(np.median(sizes_N))
    t_N = sizes_N.astype(np.float64) / middle
    far_N = t_N[t_N > _FAR]
    points, weights = np.quantile(t_N, np.linspace(_CUT, 1, _POINTS)), np.full(_POINTS, 1 / _POINTS)
    if len(far_N):
        points = np.concatenate([points, np.quantile(far_N, np.linspace(0, 1, _FAR_POINTS))])
        weights = np.concatenate([weights * (1 - _FAR_WEIGHT), np.full(_FAR_POINTS, _FAR_WEIGHT / _FAR_POINTS)])
    found = [_searched(np.array(start), points, weights) for start in _starts(terms, far_N)]
    alphas, betas, error = min(found, key=lambda each: each[2])
    return PassThrough(middle, tuple(map(float, alphas)), tuple(map(float, betas)), error)


def _starts(terms: int, far_N: _Doubles) -> list[tuple[float, ...]]:
    """Where a search begins: units for sizes around the median, or some of them for the far ones."""
    starts = [_STARTS[terms]]
    for near in range(1, terms) if len(far_N) else ():
        far = [alpha * float(np.median(far_N)) for alpha in _STARTS[terms - near]]
        starts.append((*_STARTS[near], *far))
    return starts


def _searched(alphas: _Doubles, points: _Doubles, weights: _Doubles) -> tuple[_Doubles, _Doubles, float]:
    """The alphas and betas (K,) that a coordinate search ends in, and their error."""
    (betas, error), step = _solved(alphas, points, weights), 0.5
    for _ in range(_ROUNDS):
        better = False
        for place in range(len(alphas)):
            for factor in (np.exp(step), np.exp(-step)):
                tried = alphas.copy()
                tried[place] *= factor
                found, missed = _solved(tried, points, weights)
                if missed < error:
                    alphas, betas, error, better = tried, found, missed, True
        step = step if better else step / 2
        if step < _LEAST_STEP:
            break
    return alphas, betas, error


def _solved(alphas: _Doubles, t_N: _Doubles, weights_N: _Doubles) -> tuple[_Doubles, float]:
    """The best betas (K,), and the relative error; a little ridge keeps large ones of different signs away."""
    inside_NK = alphas / t_N[:, None]
    units_NK = inside_NK / (1 + np.exp(np.minimum(-inside_NK, 700.0))) / t_N[:, None]
    weighted_NK = units_NK * weights_N[:, None]
    gram_KK = weighted_NK.T @ units_NK
    betas = np.linalg.solve(gram_KK + _RIDGE * np.trace(gram_KK) / len(alphas) * np.eye(len(alphas)), weighted_NK.sum(0))
    return betas, float(np.sqrt(weights_N @ (units_NK @ betas - 1) ** 2))
