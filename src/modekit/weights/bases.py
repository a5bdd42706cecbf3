"""Joint bases of what experts differ by, weighted by what a text's stream looks like where they read it, that stream, and the
units that pass a part of it through an FFN.

A difference M_e is applied to inputs x. What the outputs M_e x of all experts have in common is their principal subspace over a
sample X of inputs: the best R directions in the sense of squared error (reduced-rank regression). Where the differences have no
more than R directions together, the basis spans them all and nothing is lost.

A linear function of the stream goes through a gated FFN behind an RMS norm, without the norm. A hidden unit gives
silu(g . x / rho) (u . x / rho), where rho is the size of the stream. Let g read one channel that is the same constant for every
token, so that behind the norm it is 1 / rho up to a factor. With K units of one u, gates alpha_k rho0 / rho and outputs beta_k
rho0,

    sum_k beta_k rho0 silu(alpha_k rho0 / rho) (u . x) / rho = u . x    where    sum_k beta_k silu(alpha_k / t) = t,

t = rho / rho0 being near 1 for most tokens. alpha and beta are fitted on the sizes that a text shows. Outside their range the
units give too little, and never too much.

Shape legend: N outputs (of a stream: tokens, or sizes), I inputs, T sampled tokens, R directions, E experts, D hidden size, A
width of what attention's output projection reads, V vocabulary, K units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from modekit.weights.numeric import Doubles, Singles, blocks

_STARTS = {1: (-1.3,), 2: (-1.365, -4.744), 3: (-0.925, -3.044, -7.659), 4: (-0.536, -1.847, -4.896, -12.644)}
_CUT = 0.002  # of the smallest sizes
_POINTS = 257
_FAR_POINTS = 33
_FAR, _FAR_WEIGHT = 3.0, 0.1
"""Streams of first tokens may be a hundred times as large as others, few as they are: every token attends to them."""
_RIDGE = 1e-7
_ROUNDS = 60
_LEAST_STEP = 1e-4
_LEAST = 1e-14
"""Of the largest eigenvalue: directions below are rounding."""
_LEAST_SQUARE = 1e-12
"""The same where products in float32 were summed."""
ROWS = 4_096
"""Of a vocabulary, or of a matrix, that are in memory together."""
_OVERSAMPLED = 8
_PASSES = 3


class LayerStream(NamedTuple):
    """Of one layer of the base: sizes of the stream before the two norms, sqrt(mean(x^2) + eps), (N,); what attention reads,
    divided by its size, without the norm's weight, (T, D); what attention's output projection reads, (T, A).
    """

    before_attention: Singles
    before_ffn: Singles
    read: Singles
    attended: Singles


class Stream(NamedTuple):
    """Of the base, or of every expert its own: layers; what the head reads, divided by its size, without the norm's weight,
    (T, D); how often each token of the vocabulary is there, (V,). A sample has as many rows of each expert, one after another.
    """

    layers: tuple[LayerStream, ...]
    last: Singles
    counts: npt.NDArray[np.int64]


def principal_rows(sample_TI: Singles, count: int) -> Singles:
    """So many rows (count, I) whose mean second moments are nearest to those of a sample: its principal ones, turned at random,
    so that some of them are as good a sample, and none shows a token.
    """
    x_TI = sample_TI.astype(np.float64)
    if x_TI.shape[1] <= x_TI.shape[0]:
        values_R, vectors_IR = _top(x_TI.T @ x_TI, count)
        rows_RI = (vectors_IR * np.sqrt(values_R)).T
    else:
        rows_RI = _top(x_TI @ x_TI.T, count)[1].T @ x_TI
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((count, len(rows_RI))))
    found: Singles = (turn @ rows_RI * np.sqrt(count / len(x_TI))).astype(np.float32)
    return found


def output_basis(products: Sequence[Singles], rank: int) -> Singles:
    """Q (N, rank), orthonormal: directions of the outputs (N, T) of all experts; zero columns where there are fewer."""
    return _filled(_principal(products, rank)[0], rank)


def input_duals(products: Sequence[Singles], sample_TI: Singles, rank: int) -> Singles:
    """G (I, rank): the columns of O_e = M_e G, stacked over experts, are orthonormal principal directions of the outputs M_e x
    of all, and sum_e O_e^T M_e reads them: M_e ~ O_e (sum_f O_f^T M_f).

    `products`: M_e X^T (N, T) per expert, for the sample X (T, I).
    """
    vectors_TR, sizes_R = _principal([each.T for each in products], rank)
    return _filled(sample_TI.T @ (vectors_TR / sizes_R), rank)


def _principal(parts: Sequence[Singles], rank: int) -> tuple[Doubles, Doubles]:
    """Principal directions (N, R) of the columns of all parts (N, X), R at most `rank`, and their singular values (R,).

    Randomised subspace iteration (Algorithm 4.4, arXiv:0909.4061): where the parts have no more than `rank` directions, it
    spans them all.
    """
    random = np.random.default_rng(0)
    width = min(rank + _OVERSAMPLED, len(parts[0]))
    basis_NW = np.zeros((len(parts[0]), width), np.float32)
    for part in parts:
        basis_NW += part @ random.standard_normal((part.shape[1], width), np.float32)
    for _ in range(_PASSES):
        turned_NW = np.linalg.qr(basis_NW)[0]
        basis_NW = np.sum([part @ (part.T @ turned_NW) for part in parts], axis=0)
    basis_NW = np.linalg.qr(basis_NW)[0]
    gram_WW = np.zeros((width, width))
    for part in parts:
        inside_WX = (basis_NW.T @ part).astype(np.float64)
        gram_WW += inside_WX @ inside_WX.T
    values, turn_WW = np.linalg.eigh(gram_WW)
    kept = (values > _LEAST_SQUARE * max(float(values[-1]), 1e-300))[::-1][:rank]
    largest_R = values[::-1][:rank][kept]
    return signed(basis_NW @ turn_WW[:, ::-1][:, :rank][:, kept]), np.sqrt(largest_R)


def row_basis(rows: Callable[[slice], Sequence[Singles]], shares_V: Doubles, rank: int) -> Singles:
    """Z (count, rank) with Z^T diag(shares) Z = 1: what the rows of all experts' differences are combinations of.

    `rows` gives some rows (X, I) of every expert's difference, `shares_V` says how often each is used. Randomised subspace
    iteration (Algorithm 4.4, arXiv:0909.4061) that never holds a difference whole.
    """
    roots_V = np.sqrt(shares_V)[:, None]
    count = len(shares_V)
    width = min(rank + _OVERSAMPLED, count)
    first = enumerate(rows(slice(0, 1)))
    inner = [np.random.default_rng(number).standard_normal((each.shape[1], width)) for number, each in first]
    basis_VR = np.zeros((count, width))
    for _ in range(_PASSES):
        for part in blocks(count, ROWS):
            found = [each.astype(np.float64) @ right for each, right in zip(rows(part), inner, strict=True)]
            basis_VR[part] = roots_V[part] * np.sum(found, axis=0)
        basis_VR = np.linalg.qr(basis_VR)[0]
        inner = [np.zeros_like(each) for each in inner]
        for part in blocks(count, ROWS):
            weighted = (roots_V[part] * basis_VR[part]).T
            for total, each in zip(inner, rows(part), strict=True):
                total += (weighted @ each).T
    energies, turn = np.linalg.eigh(sum((each.T @ each for each in inner), np.zeros((width, width))))
    kept = (energies > _LEAST * energies.max())[::-1][:rank]
    return _filled(signed(basis_VR @ turn[:, ::-1][:, :rank][:, kept]) / np.maximum(roots_V, 1e-12), rank)


def _top(gram: Doubles, rank: int) -> tuple[Doubles, Doubles]:
    """The largest eigenvalues, what is rounding being 0, and their eigenvectors."""
    values, vectors = np.linalg.eigh(gram)
    values = values[::-1][:rank]
    vectors = signed(vectors[:, ::-1][:, :rank])
    return np.where(values > _LEAST * max(float(values[0]), 1e-300), values, 0.0), vectors


def signed(vectors_NR: Doubles) -> Doubles:
    """Vectors whose largest entry is positive: which of two signs one has is a matter of rounding."""
    largest_R = np.take_along_axis(vectors_NR, np.abs(vectors_NR).argmax(0)[None], 0)
    return np.where(largest_R < 0, -vectors_NR, vectors_NR)


def _filled(columns: Doubles, rank: int) -> Singles:
    return np.pad(columns, ((0, 0), (0, rank - columns.shape[1]))).astype(np.float32)


class PassThrough(NamedTuple):
    """Units that pass on a linear function of the stream: rho0, the median of the sizes; alphas and betas (K,); root of the
    mean squared relative error over the sizes, far ones counting more.
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
    points = np.quantile(t_N, np.linspace(_CUT, 1, _POINTS))
    weights = np.full(_POINTS, 1 / _POINTS)
    if len(far_N):
        points = np.concatenate([points, np.quantile(far_N, np.linspace(0, 1, _FAR_POINTS))])
        weights = np.concatenate([weights * (1 - _FAR_WEIGHT), np.full(_FAR_POINTS, _FAR_WEIGHT / _FAR_POINTS)])
    found = [_searched(np.array(start), points, weights) for start in _starts(terms, far_N)]
    alphas, betas, error = min(found, key=lambda each: each[2])
    return PassThrough(middle, tuple(map(float, alphas)), tuple(map(float, betas)), error)


def _starts(terms: int, far_N: Doubles) -> list[tuple[float, ...]]:
    """Where a search begins: units for sizes around the median, or some of them for the far ones."""
    starts = [_STARTS[terms]]
    for near in range(1, terms) if len(far_N) else ():
        far = [alpha * float(np.median(far_N)) for alpha in _STARTS[terms - near]]
        starts.append((*_STARTS[near], *far))
    return starts


def _searched(alphas: Doubles, points: Doubles, weights: Doubles) -> tuple[Doubles, Doubles, float]:
    """The alphas and betas (K,) that a coordinate search ends in, and their error."""
    betas, error = _solved(alphas, points, weights)
    step = 0.5
    for _ in range(_ROUNDS):
        better = False
        for place in range(len(alphas)):
            for factor in (np.exp(step), np.exp(-step)):
                tried = alphas.copy()
                tried[place] *= factor
                found, missed = _solved(tried, points, weights)
                if missed < error:
                    alphas = tried
                    betas = found
                    error = missed
                    better = True
        step = step if better else step / 2
        if step < _LEAST_STEP:
            break
    return alphas, betas, error


def _solved(alphas: Doubles, t_N: Doubles, weights_N: Doubles) -> tuple[Doubles, float]:
    """The best betas (K,), and the relative error; a little ridge keeps large ones of different signs away."""
    inside_NK = alphas / t_N[:, None]
    units_NK = inside_NK / (1 + np.exp(np.minimum(-inside_NK, 700.0))) / t_N[:, None]
    weighted_NK = units_NK * weights_N[:, None]
    gram_KK = weighted_NK.T @ units_NK
    betas = np.linalg.solve(gram_KK + _RIDGE * np.trace(gram_KK) / len(alphas) * np.eye(len(alphas)), weighted_NK.sum(0))
    return betas, float(np.sqrt(weights_N @ (units_NK @ betas - 1) ** 2))
