"""Joint bases of what experts differ by, weighted by what a text's stream looks like where they read it, and that stream.

A difference M_e is applied to inputs x. What the outputs M_e x of all experts have in common is their principal subspace over a
sample X of inputs: the best R directions in the sense of squared error (reduced-rank regression). Where the differences have no
more than R directions together, the basis spans them all and nothing is lost.

Shape legend: N outputs (of a stream: tokens), I inputs, T sampled tokens, R directions, E experts, D hidden size, A width of
what attention's output projection reads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]

_LEAST = 1e-14
"""Of the largest eigenvalue: directions below are rounding."""


@dataclass(frozen=True)
class LayerStream:
    """Of one layer of the base.

    Attributes:
        before_attention, before_ffn: sizes of the stream before the two norms, sqrt(mean(x^2) + eps), (N,).
        read: what attention reads, divided by its size, without the norm's weight, (T, D).
        attended: what attention's output projection reads, (T, A).
    """

    before_attention: Singles
    before_ffn: Singles
    read: Singles
    attended: Singles


@dataclass(frozen=True)
class Stream:
    """Of a model.

    Attributes:
        layers: of every layer.
        last: what the head reads, divided by its size, without the norm's weight, (T, D).
        counts: how often each token of the vocabulary is there, (V,).
    """

    layers: tuple[LayerStream, ...]
    last: Singles
    counts: npt.NDArray[np.int64]


def output_basis(products: Sequence[Singles], rank: int) -> Singles:
    """Q (N, rank), orthonormal: directions of the outputs (N, T) of all experts; zero columns where there are fewer."""
    both_NX = np.concatenate(products, axis=1).astype(np.float64)
    if both_NX.shape[0] <= both_NX.shape[1]:
        values_R, vectors_NR = _top(both_NX @ both_NX.T, rank)
        return _filled(vectors_NR[:, values_R > 0], rank)
    values_R, vectors_XR = _top(both_NX.T @ both_NX, rank)
    return _filled(both_NX @ (vectors_XR[:, values_R > 0] / np.sqrt(values_R[values_R > 0])), rank)


def input_duals(products: Iterable[Singles], sample_TI: Singles, rank: int) -> Singles:
    """G (I, rank): the columns of O_e = M_e G, stacked over experts, are orthonormal principal directions of the outputs M_e x
    of all, and sum_e O_e^T M_e reads them: M_e ~ O_e (sum_f O_f^T M_f).

    `products`: M_e X^T (N, T) per expert, for the sample X (T, I).
    """
    gram_TT = sum((each.astype(np.float64).T @ each.astype(np.float64) for each in products), np.zeros((len(sample_TI),) * 2))
    values_R, vectors_TR = _top(gram_TT, rank)
    kept = values_R > 0
    return _filled(sample_TI.astype(np.float64).T @ (vectors_TR[:, kept] / np.sqrt(values_R[kept])), rank)


def row_basis(
    rows: Callable[[int, int], Sequence[Singles]], count: int, shares_V: _Doubles, rank: int, *, step: int = 4_096
) -> Singles:
    """Z (count, rank) with Z^T diag(shares) Z = 1: what the rows of all experts' differences are combinations of.

    `rows(start, stop)` gives the differences (stop - start, I) of every expert, `shares_V` how often a row is used. Randomised
    subspace iteration (Algorithm 4.4, arXiv:0909.4061) that never holds a difference whole.
    """
    roots_V, width = np.sqrt(shares_V)[:, None], min(rank + 8, count)
    inner = [np.random.default_rng(number).standard_normal((each.shape[1], width)) for number, each in enumerate(rows(0, 1))]
    basis_VR = np.zeros((count, width))
    for _ in range(3):
        for start in range(0, count, step):
            stop = min(count, start + step)
            found = [each.astype(np.float64) @ right for each, right in zip(rows(start, stop), inner, strict=True)]
            basis_VR[start:stop] = roots_V[start:stop] * np.sum(found, axis=0)
        basis_VR = np.linalg.qr(basis_VR)[0]
        inner = [np.zeros_like(each) for each in inner]
        for start in range(0, count, step):
            stop = min(count, start + step)
            weighted = (roots_V[start:stop] * basis_VR[start:stop]).T
            for total, each in zip(inner, rows(start, stop), strict=True):
                total += (weighted @ each).T
    energies, turn = np.linalg.eigh(sum((each.T @ each for each in inner), np.zeros((width, width))))
    kept = (energies > _LEAST * energies.max())[::-1][:rank]
    return _filled((basis_VR @ turn[:, ::-1][:, :rank][:, kept]) / np.maximum(roots_V, 1e-12), rank)


def _top(gram: _Doubles, rank: int) -> tuple[_Doubles, _Doubles]:
    """The largest eigenvalues, what is rounding being 0, and their eigenvectors."""
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    return np.where(values > _LEAST * max(float(values[0]), 1e-300), values, 0.0), vectors


def _filled(columns: _Doubles, rank: int) -> Singles:
    return np.pad(columns, ((0, 0), (0, rank - columns.shape[1]))).astype(np.float32)
