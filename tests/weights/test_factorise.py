"""Factors of weight differences: as good as the truncated SVD, balanced, and the same bytes every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modekit.weights.factorise import Factors, factorise
from modekit.weights.numeric import Singles


def spectrum(outputs: int, inputs: int, values: np.ndarray, seed: int = 0) -> Singles:
    """A matrix with given singular values."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.standard_normal((size, len(values))))[0] for size in (outputs, inputs))
    return ((left * values) @ right.T).astype(np.float32)


def best_error(delta: np.ndarray, rank: int) -> float:
    """The error of the truncated SVD (Eckart and Young)."""
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


def error_of(delta: Singles, factors: Factors) -> float:
    product = factors.b.astype(np.float64) @ factors.a
    return float(np.linalg.norm(delta - product) / np.linalg.norm(delta))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_small_differences_get_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    factors = factorise(delta, rank=rank)
    assert factors.a.shape == (rank, shape[1]) and factors.b.shape == (shape[0], rank)
    assert factors.a.dtype == factors.b.dtype == np.float32
    assert error_of(delta, factors) == pytest.approx(best_error(delta, rank), rel=1e-5)
    assert factors.error == pytest.approx(error_of(delta, factors), rel=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1, 601) ** -0.5,
        np.arange(1, 601) ** -0.1,
        np.where(np.arange(600) < 8, 20.0, 1.0),
        np.exp(-np.arange(600) / 9),
    ],
    ids=["power", "flat", "spikes", "exponential"],
)
@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_large_differences_are_as_good_as_the_truncated_svd(shape: tuple[int, int], values: np.ndarray) -> None:
    delta = spectrum(*shape, values)
    factors = factorise(delta, rank=16)
    best = float(np.linalg.norm(values[16:]) / np.linalg.norm(values))
    assert best * (1 - 1e-4) <= error_of(delta, factors) <= best * (1 + 1e-3)


@pytest.mark.parametrize("shape", [(48, 64), (600, 640)])
def test_a_difference_of_low_rank_is_recovered_whatever_its_spectrum(shape: tuple[int, int]) -> None:
    delta = spectrum(*shape, 10.0 ** -np.linspace(0, 4, 8))  # the last direction is a ten-thousandth of the first
    factors = factorise(delta, rank=8)
    assert error_of(delta, factors) < 1e-5
    assert factors.error < 1e-5


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_singular_values_are_split_evenly(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    factors = factorise(delta, rank=6)
    product = np.linalg.svd(factors.b @ factors.a, compute_uv=False)[:6]
    assert np.diag(factors.a @ factors.a.T) == pytest.approx(product, rel=1e-4)
    assert np.diag(factors.b.T @ factors.b) == pytest.approx(product, rel=1e-4)
    assert abs(factors.a @ factors.a.T - np.diag(product)).max() < 1e-4 * product[0]


def test_a_difference_of_zero_has_factors_of_zero() -> None:
    zero = np.zeros((6, 4), np.float32)
    for factors, rank in ((factorise(zero, rank=3), 3), (factorise(zero, rank=9), 4)):
        assert (len(factors.a), factors.error) == (rank, 0.0)
        assert not factors.a.any() and not factors.b.any()


def test_a_rank_beyond_the_shape_gives_the_difference_itself() -> None:
    delta = np.random.default_rng(1).standard_normal((6, 9)).astype(np.float32)
    factors = factorise(delta, rank=64)
    assert len(factors.a) == 6
    assert abs(factors.b @ factors.a - delta).max() < 1e-5


@pytest.mark.parametrize("shape", [(24, 40), (600, 640)])
def test_the_same_difference_gives_the_same_bytes(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    one, two = factorise(delta, rank=4), factorise(delta.copy(), rank=4)
    assert one.a.tobytes() == two.a.tobytes() and one.b.tobytes() == two.b.tobytes()
    assert (one.a[np.arange(4), abs(one.a).argmax(axis=1)] > 0).all()


def test_what_is_not_finite_is_refused() -> None:
    delta = np.ones((4, 4), np.float32)
    delta[1, 2] = np.inf
    with pytest.raises(ValueError, match="difference"):
        factorise(delta, rank=1)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    rank=st.integers(1, 14),
    exponent=st.integers(-120, 120),
    seed=st.integers(0, 99),
)
def test_every_scale_and_shape_is_optimal(outputs: int, inputs: int, rank: int, exponent: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    delta = (generator.standard_normal((outputs, inputs)) * 2.0**exponent).astype(np.float32)
    factors = factorise(delta, rank=rank)
    assert error_of(delta.astype(np.float64), factors) <= best_error(delta, rank) + 1e-5
    assert 0.0 <= factors.error <= 1.0 + 1e-6
