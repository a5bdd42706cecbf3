"""The best low-rank factors of a weight difference, plain or weighted by what the layer reads. numpy only.

A linear layer computes y = W x with W (O, I). For a difference D of two such weights and a rank R, the product B A
with B (O, R), A (R, I) is sought that minimises

    plain       || D - B A ||_F^2
    weighted    E || (D - B A) x ||^2  =  tr( (D - B A) M (D - B A)^T ),   M = E[x x^T] of the layer's inputs

Both are one problem: with any S such that S S^T = M (the symmetric square root, say; plain is S = 1) the error is
|| D S - B A S ||_F^2, whose minimum over rank R is reached when B A S = U U^T D S, where U (O, R) holds the top left
singular vectors of D S (Eckart and Young 1936). When M is regular that is

    B A = U U^T D,   U = top eigenvectors of C = D M D^T,   error^2 = tr C - (sum of the top R eigenvalues of C)

so neither S nor its inverse is ever formed: M need not be well conditioned, and D M is the only product with it.
The factors are then balanced: B A = P s V^T is an SVD of the product, B = P sqrt(s), A = sqrt(s) V^T.

Shape legend: O outputs, I inputs, R rank of the factors, P columns of a trial subspace (P > R), X whichever fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modekit.weights.factor_size import SMALL, is_exact
from modekit.weights.numeric import BLOCK

Array32 = npt.NDArray[np.float32]
Array64 = npt.NDArray[np.float64]

_SHRINKAGE = 0.01  # share of the mean eigenvalue in M: directions that a short text never showed still count a little
_OVERSAMPLING = 16  # columns beyond the rank; the more, the fewer iterations
_MOST_ITERATIONS = 24
_TOLERANCE = 2e-4  # of the squared error: an iteration that gains less is the last
_ROUNDING = 1e-10  # of the energy (1e-5 of the norm): below it float32 weights hold only rounding
_FIRST_WIDTH = 32  # first guess of a rank that is sought by energy


@dataclass(frozen=True)
class Factors:
    """B A, close to a weight difference D.

    Attributes:
        a: (R, I) float32, the weight of lora_A.
        b: (O, R) float32, the weight of lora_B.
        error: || D - B A || / || D || (Frobenius); with a moment, the root of E||(D - B A) x||^2 / E||D x||^2. 0 when D is 0.
    """

    a: Array32
    b: Array32
    error: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a)


def factorise(
    delta_OI: Array32,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    moment_II: npt.NDArray[np.floating] | None = None,
    seed: int = 0,
) -> Factors:
    """The best factors of a weight difference (O, I): of a fixed rank, or of the smallest that keeps enough energy.

    `energy` in (0, 1] is the share of the squared (weighted) norm to keep, at most at `max_rank`; 1 means up to 1e-10,
    the rounding of float32. No rank exceeds min(O, I). A difference of zero has factors of zero: of the rank asked for,
    or 1. `moment_II` is E[x x^T] of the inputs, on any scale; it is shrunk by 1 % towards its mean eigenvalue.

    Differences with more than 512 rows and columns are decomposed by a seeded subspace iteration when the rank is below
    a quarter of them: its error exceeds the exact one by less than 1e-3 of it, and a rank by energy may come out a few
    above the smallest where the spectrum is flat. The same input gives the same bytes (on one machine and number of threads).

    Raises ValueError unless exactly one of `rank` and `energy` is given and in range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either rank or energy")
    if (rank is not None and rank < 1) or (max_rank is not None and max_rank < 1):
        raise ValueError("a rank must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError("energy must be in (0, 1]")
    most = min(*delta_OI.shape, max_rank or rank or min(delta_OI.shape))
    scale = _power_of_two(float(np.abs(delta_OI).max(initial=0.0)))
    if scale == 0:
        width = most if rank is not None else 1
        return Factors(np.zeros((width, delta_OI.shape[1]), np.float32), np.zeros((delta_OI.shape[0], width), np.float32), 0.0)
    delta_OI = delta_OI / np.float32(scale)  # exact; squares neither overflow nor vanish
    shrunk_II = None if moment_II is None else _shrunk(moment_II)
    weighted_OI = delta_OI if shrunk_II is None else delta_OI @ shrunk_II
    basis_OR = _basis(delta_OI, weighted_OI, shrunk_II, most, energy, seed)
    a_RI, b_OR = _balanced(basis_OR, delta_OI)
    error = _error(delta_OI, weighted_OI, a_RI, a_RI if shrunk_II is None else a_RI @ shrunk_II, b_OR)
    root = np.sqrt(scale)
    return Factors((a_RI * root).astype(np.float32), (b_OR * root).astype(np.float32), error)


def relative_error(delta_OI: Array32, a_RI: Array32, b_OR: Array32) -> float:
    """|| D - B A || / || D || (Frobenius), 0 when D is 0. Products are float32, sums float64."""
    return _error(delta_OI, delta_OI, a_RI, a_RI, b_OR)


def _error(delta_OI: Array32, weighted_OI: Array32, a_RI: Array32, weighted_RI: Array32, b_OR: Array32) -> float:
    """The root of tr(E M E^T) / tr(D M D^T), E = D - B A, from D, D M, A, A M and B; rows are taken in blocks."""
    missed = total = 0.0
    step = max(1, BLOCK // delta_OI.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(delta_OI), step)):
        rest_XI = delta_OI[rows] - b_OR[rows] @ a_RI
        missed += float(np.multiply(rest_XI, weighted_OI[rows] - b_OR[rows] @ weighted_RI, dtype=np.float64).sum())
        total += float(np.multiply(delta_OI[rows], weighted_OI[rows], dtype=np.float64).sum())
    return float(np.sqrt(max(missed, 0.0) / total)) if total > 0 else 0.0


def _power_of_two(largest: float) -> float:
    """The power of two below a number, 0 for 0. Raises ValueError when the number is not finite."""
    if not np.isfinite(largest):
        raise ValueError("the weight difference is not finite")
    return float(2.0 ** (int(np.frexp(largest)[1]) - 1)) if largest > 0 else 0.0


def _shrunk(moment_II: npt.NDArray[np.floating]) -> Array32 | None:
    """M with mean eigenvalue 1, shrunk towards the identity; None when no input was ever other than zero."""
    size = len(moment_II)
    mean = float(np.trace(moment_II, dtype=np.float64)) / size
    if not np.isfinite(mean):
        raise ValueError("the moment of the inputs is not finite")
    if mean <= 0:
        return None
    shrunk_II = (moment_II * ((1 - _SHRINKAGE) / mean)).astype(np.float32)
    shrunk_II[np.diag_indices(size)] += np.float32(_SHRINKAGE)
    return shrunk_II


def _basis(
    delta_OI: Array32, weighted_OI: Array32, moment_II: Array32 | None, most: int, energy: float | None, seed: int
) -> Array64:
    """U (O, R) with orthonormal columns: `most` of them, or as few as keep the energy and at most `most`."""
    smaller = min(delta_OI.shape)
    width = most if energy is None else min(_FIRST_WIDTH, most)
    if not is_exact(smaller, width):
        total = float(np.multiply(delta_OI, weighted_OI, dtype=np.float64).sum())
        while not is_exact(smaller, width):
            basis_OP, energies_P = _subspace(delta_OI, weighted_OI, moment_II, width, total, seed)
            keep = width if energy is None else _smallest_rank(energies_P[:width], energy * total)
            if keep is not None or width == most:
                return basis_OP[:, : keep or most]
            width = min(2 * width, most)
    basis_OX, energies_X = _exact(delta_OI, moment_II)
    found = None if energy is None else _smallest_rank(energies_X, energy * float(energies_X.sum()))
    return basis_OX[:, : min(found or most, most)]


def _smallest_rank(energies_X: Array64, wanted: float) -> int | None:
    """How many of the descending energies add up to `wanted`; None when all of them do not."""
    place = int(np.searchsorted(np.cumsum(energies_X), wanted * (1 - _ROUNDING)))
    return place + 1 if place < len(energies_X) else None


def _exact(delta_OI: Array32, moment_II: Array32 | None) -> tuple[Array64, Array64]:
    """All eigenvectors of C = D M D^T (O, min(O, I)) and its eigenvalues, largest first, in float64."""
    delta = delta_OI.astype(np.float64)
    frame_OI = None
    if delta.shape[0] > delta.shape[1]:  # C has rank I at most, so it is decomposed inside the range of D
        frame_OI, delta = np.linalg.qr(delta)
    weighted = delta if moment_II is None else delta @ moment_II
    energies_X, basis = _eigen(weighted @ delta.T)
    return (basis if frame_OI is None else frame_OI @ basis), energies_X


def _subspace(
    delta_OI: Array32, weighted_OI: Array32, moment_II: Array32 | None, rank: int, total: float, seed: int
) -> tuple[Array64, Array64]:
    """Approximate top eigenvectors (O, P) of C = (D M) D^T and their eigenvalues, largest first.

    Randomised subspace iteration with Rayleigh-Ritz (Algorithm 4.4, arXiv:0909.4061). A QR after every product keeps
    directions whose singular value is far below the largest, which a power of C in float32 would lose. `total` is tr C:
    what the subspace misses of it is the squared error, and the iteration ends when that stops falling.
    """
    columns = min(rank + max(_OVERSAMPLING, rank // 4), *delta_OI.shape)
    start_IP = np.random.default_rng(seed).standard_normal((delta_OI.shape[1], columns), np.float32)
    basis_OP = _orthonormal(weighted_OI @ start_IP)
    kept = -np.inf
    for _ in range(_MOST_ITERATIONS):
        inputs_IP, triangle_PP = np.linalg.qr((delta_OI.T @ basis_OP).astype(np.float64))
        image_OP = weighted_OI @ inputs_IP.astype(np.float32)  # C basis = image triangle
        core_PP = (basis_OP.T @ image_OP).astype(np.float64) @ triangle_PP
        before, kept = kept, float(_eigen(core_PP)[0][:rank].sum())
        if kept - before <= max(_TOLERANCE * (total - kept), _ROUNDING * total):
            break
        basis_OP = _orthonormal(image_OP)
    # In float64, because an eigenvalue is a square: rounding in float32 would hide directions below 3e-4 of the largest.
    projected_PI = (basis_OP.T @ delta_OI).astype(np.float64)
    weighted_PI = projected_PI if moment_II is None else projected_PI @ moment_II
    energies_P, turn_PP = _eigen(weighted_PI @ projected_PI.T)
    return np.asarray(basis_OP @ turn_PP, np.float64), energies_P


def _orthonormal(array_XP: Array32) -> Array32:
    """An orthonormal basis of the columns, computed in float64."""
    return np.linalg.qr(array_XP.astype(np.float64))[0].astype(np.float32)


def _eigen(core_PP: Array64) -> tuple[Array64, Array64]:
    """Eigenvalues, largest first and none below zero, and eigenvectors (in columns) of a symmetric matrix."""
    values_P, vectors_PP = np.linalg.eigh((core_PP + core_PP.T) / 2)
    return np.maximum(values_P[::-1], 0.0), vectors_PP[:, ::-1]


def _balanced(basis_OR: Array64, delta_OI: Array32) -> tuple[Array32, Array32]:
    """A (R, I) and B (O, R) with B A = U U^T D and the singular values of the product split evenly between them.

    The largest entry of every row of A is positive: an SVD leaves the signs open.
    """
    projected_RI = basis_OR.T.astype(np.float32) @ delta_OI if min(delta_OI.shape) > SMALL else basis_OR.T @ delta_OI
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
