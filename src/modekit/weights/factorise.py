"""The best low-rank factors of a weight difference; and one in a few bits per number, row by row. numpy only.

For a difference D (O, I) of two weights and a rank R the product B A with B (O, R), A (R, I) is sought that minimises
|| D - B A ||_F^2: it is U U^T D, where U (O, R) holds the top eigenvectors of C = D D^T (Eckart and Young 1936). They are
then balanced: B A = P s V^T is an SVD of the product, B = P sqrt(s), A = sqrt(s) V^T.

BitDelta (arXiv:2402.10193) has one bit per number:

    difference ~ (code - (2^b - 1) / 2) step        code 0 .. 2^b - 1 per number, step per row

With one bit these are the sign and the mean size of a row. Steps and codes are found in turns (Lloyd's algorithm with equal
distances): the nearest code of every number, then the step of least squares. Codes lie in planes of one bit, the lowest first,
eight numbers of a row in a byte.

Shape legend: O outputs, I inputs, R rank of the factors, P columns of a trial subspace (P > R) or bits, X whichever fits,
C bytes of a plane's row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from modekit.weights.numeric import BLOCK, Doubles, Singles, blocks

Codes = npt.NDArray[np.uint8]

_SMALL = 512
"""Up to this many rows or columns an exact decomposition takes less than a second."""
_OVERSAMPLING = 16  # columns beyond the rank; the more, the fewer iterations
_MOST_ITERATIONS = 24
_TOLERANCE = 2e-4  # of the squared error: an iteration that gains less is the last
_TURNS = 8  # of steps and codes
_FIRST = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}
"""Bits -> step of a normal distribution of deviation 1 with the least squared error (Max 1960)."""
_ROUNDING = 1e-10  # of the energy (1e-5 of the norm): below it float32 weights hold only rounding


class Factors(NamedTuple):
    """B A, close to a weight difference D: A (R, I) and B (O, R); || D - B A || / || D || (Frobenius), 0 when D is 0."""

    a: Singles
    b: Singles
    error: float


def factorise(delta_OI: Singles, *, rank: int) -> Factors:
    """The best factors of a weight difference (O, I). No rank exceeds min(O, I); a difference of zero has factors of zero.

    Differences with more than 512 rows and columns are decomposed by a seeded subspace iteration when the rank is below
    a quarter of them: its error exceeds the exact one by less than 1e-3 of it. The same input gives the same bytes (on one
    machine and number of threads). Raises ValueError for a rank below 1, and for a difference that is not finite.
    """
    largest = float(np.abs(delta_OI).max(initial=0.0))
    if rank < 1 or not np.isfinite(largest):
        raise ValueError("a rank must be at least 1, and a weight difference finite")
    rank = min(*delta_OI.shape, rank)
    if largest == 0:
        return Factors(np.zeros((rank, delta_OI.shape[1]), np.float32), np.zeros((delta_OI.shape[0], rank), np.float32), 0.0)
    scale = float(2.0 ** (int(np.frexp(largest)[1]) - 1))  # the power of two below it
    delta_OI = delta_OI / np.float32(scale)  # exact; squares neither overflow nor vanish
    exact = _is_exact(min(delta_OI.shape), rank)
    basis_OX = _exact(delta_OI) if exact else _subspace(delta_OI, rank)
    a_RI, b_OR = _balanced(basis_OX[:, :rank], delta_OI)
    root = np.sqrt(scale)
    return Factors((a_RI * root).astype(np.float32), (b_OR * root).astype(np.float32), _error(delta_OI, a_RI, b_OR))


def _is_exact(smaller: int, width: int) -> bool:
    """Whether a difference with so many rows or columns, whichever are fewer, is decomposed whole for factors of a width."""
    return smaller <= _SMALL or width >= smaller // 4


def working_bytes(shape: tuple[int, ...], rank: int) -> int:
    """What `factorise` holds at its peak for a difference of a shape: copies of it in float32 and float64, as measured."""
    return (52 if _is_exact(min(shape), rank) else 16) * math.prod(shape)


def _error(delta_OI: Singles, a_RI: Singles, b_OR: Singles) -> float:
    """|| D - B A || / || D ||. Products are float32, sums float64; rows are taken in blocks."""
    missed = total = 0.0
    step = max(1, BLOCK // delta_OI.shape[1])
    for rows in blocks(len(delta_OI), step):
        missed += float(np.square(delta_OI[rows] - b_OR[rows] @ a_RI, dtype=np.float64).sum())
        total += float(np.square(delta_OI[rows], dtype=np.float64).sum())
    return float(np.sqrt(missed / total)) if total > 0 else 0.0


def _exact(delta_OI: Singles) -> Doubles:
    """All eigenvectors of C = D D^T (O, min(O, I)), the largest first, in float64."""
    delta = delta_OI.astype(np.float64)
    frame_OI = None
    if delta.shape[0] > delta.shape[1]:  # C has rank I at most, so it is decomposed inside the range of D
        frame_OI, delta = np.linalg.qr(delta)
    _, basis = _eigen(delta @ delta.T)
    return basis if frame_OI is None else frame_OI @ basis


def _subspace(delta_OI: Singles, rank: int) -> Doubles:
    """Approximate top eigenvectors (O, P) of C = D D^T, the largest first.

    Randomised subspace iteration with Rayleigh-Ritz (Algorithm 4.4, arXiv:0909.4061). A QR after every product keeps
    directions whose singular value is far below the largest, which a power of C in float32 would lose. What the subspace misses
    of tr C is the squared error, and the iteration ends when that stops falling.
    """
    total = float(np.square(delta_OI, dtype=np.float64).sum())
    columns = min(rank + max(_OVERSAMPLING, rank // 4), *delta_OI.shape)
    start_IP = np.random.default_rng(0).standard_normal((delta_OI.shape[1], columns), np.float32)
    basis_OP = _orthonormal(delta_OI @ start_IP)
    kept = -np.inf
    for _ in range(_MOST_ITERATIONS):
        inputs_IP, triangle_PP = np.linalg.qr((delta_OI.T @ basis_OP).astype(np.float64))
        image_OP = delta_OI @ inputs_IP.astype(np.float32)  # C basis = image triangle
        core_PP = (basis_OP.T @ image_OP).astype(np.float64) @ triangle_PP
        before = kept
        kept = float(_eigen(core_PP)[0][:rank].sum())
        if kept - before <= max(_TOLERANCE * (total - kept), _ROUNDING * total):
            break
        basis_OP = _orthonormal(image_OP)
    # In float64, because an eigenvalue is a square: rounding in float32 would hide directions below 3e-4 of the largest.
    projected_PI = (basis_OP.T @ delta_OI).astype(np.float64)
    _, turn_PP = _eigen(projected_PI @ projected_PI.T)
    return np.asarray(basis_OP @ turn_PP, np.float64)


def _orthonormal(array_XP: Singles) -> Singles:
    """An orthonormal basis of the columns, computed in float64."""
    return np.linalg.qr(array_XP.astype(np.float64))[0].astype(np.float32)


def _eigen(core_PP: Doubles) -> tuple[Doubles, Doubles]:
    """Eigenvalues, largest first and none below zero, and eigenvectors (in columns) of a symmetric matrix."""
    values_P, vectors_PP = np.linalg.eigh((core_PP + core_PP.T) / 2)
    return np.maximum(values_P[::-1], 0.0), vectors_PP[:, ::-1]


def _balanced(basis_OR: Doubles, delta_OI: Singles) -> tuple[Singles, Singles]:
    """A (R, I) and B (O, R) with B A = U U^T D and the singular values of the product split evenly between them.

    The largest entry of every row of A is positive: an SVD leaves the signs open.
    """
    projected_RI = basis_OR.T.astype(np.float32) @ delta_OI if min(delta_OI.shape) > _SMALL else basis_OR.T @ delta_OI
    projected_RI = projected_RI.astype(np.float64)
    _, turn_RR = _eigen(projected_RI @ projected_RI.T)
    rows_RI = turn_RR.T @ projected_RI  # singular values times right singular vectors
    largest_R = rows_RI[np.arange(len(rows_RI)), np.abs(rows_RI).argmax(axis=1)]
    signs_R = np.where(largest_R < 0, -1.0, 1.0)
    roots_R = np.sqrt(np.linalg.norm(rows_RI, axis=1))
    inverse_R = np.divide(signs_R, roots_R, out=np.zeros_like(roots_R), where=roots_R > 0)
    a_RI = rows_RI * inverse_R[:, None]
    b_OR = (basis_OR @ turn_RR) * (signs_R * roots_R)
    return a_RI.astype(np.float32), b_OR.astype(np.float32)


def steps_of(delta_XI: Singles, bits: int) -> Singles:
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


def codes_of(delta_XI: Singles, step_X: Singles, bits: int) -> Codes:
    """The codes (X, P, C) of rows by their steps."""
    codes_XI = _codes(delta_XI, step_X[:, None], bits)
    planes = [np.packbits((codes_XI >> plane) & 1, axis=1, bitorder="little") for plane in range(bits)]
    return np.stack(planes, axis=1)


def _codes(delta_XI: Singles, step_X1: Singles, bits: int) -> Codes:
    scaled_XI = np.divide(delta_XI, step_X1, out=np.zeros_like(delta_XI), where=step_X1 > 0)
    return np.asarray(np.clip(np.floor(scaled_XI) + 2 ** (bits - 1), 0, 2**bits - 1), np.uint8)
