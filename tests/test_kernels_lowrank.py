"""Matrices of low rank: against brute force, by their laws, and on what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from graphopt.kernels import lowrank
from graphopt.kernels.lowrank import (
    energy_rank,
    evbmf_rank,
    randomised_svd,
    refit_left,
    regression,
    spectrum,
    truncated_svd,
    weighted_error,
)

Array = NDArray[Any]
SHAPES = [(8, 20), (20, 8), (12, 12)]


def inputs(features: int, rows: int, seed: int = 0) -> Array:
    """Rows that are correlated, and of very different size."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((features, features)) * np.logspace(0, -2, features)[:, None]
    return rng.standard_normal((rows, features)) @ mixing


def weights(outputs: int, features: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((outputs, features))


def best_error(w: Array, x: Array, rank: int) -> float:
    """Of any approximation with this rank, of what rows give: the tail of their spectrum."""
    values = np.linalg.svd(x @ w.T, compute_uv=False) ** 2
    return float(values[rank:].sum() / values.sum())


# -- spectra -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [100, 6])  # of 6 the Gram matrix is singular
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_factors_lose_less(shape: tuple[int, int], rows: int, rank: int) -> None:
    w, x = weights(*shape), inputs(shape[1], rows)
    found = spectrum(w, x.T @ x)
    left, right = found.factors(rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    lost = np.sum(np.square(x @ (w - left @ right).T)) / np.sum(np.square(x @ w.T))
    assert lost == pytest.approx(best_error(w, x, rank), rel=1e-6, abs=1e-10)
    assert found.error(rank) == pytest.approx(lost, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gram_matrix_it_is_the_svd(shape: tuple[int, int]) -> None:
    w = weights(*shape)
    found = spectrum(w)
    np.testing.assert_allclose(found.values, np.linalg.svd(w, compute_uv=False) ** 2)
    np.testing.assert_allclose(spectrum(w, np.zeros((shape[1],) * 2)).values, found.values)
    u, s, vt = truncated_svd(w, 3)
    left, right = found.factors(3)
    np.testing.assert_allclose(left @ right, u * s @ vt, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [100, 5])
def test_all_of_the_rank_loses_nothing(shape: tuple[int, int], rows: int) -> None:
    w, x = weights(*shape), inputs(shape[1], rows)
    found = spectrum(w, x.T @ x)
    left, right = found.factors(1000)
    assert left.shape[1] == len(right) == min(shape)
    np.testing.assert_allclose(x @ (left @ right).T, x @ w.T, atol=1e-8 * np.abs(x @ w.T).max())
    assert found.error(1000) == 0
    assert found.errors([0, min(shape)]) == [1, 0]


def test_data_count() -> None:
    w, x = weights(16, 24), inputs(24, 200)
    gram = x.T @ x
    blind, seeing = spectrum(w).factors(4), spectrum(w, gram).factors(4)
    assert weighted_error(w, seeing[0] @ seeing[1], gram) < 0.5 * weighted_error(
        w, blind[0] @ blind[1], gram
    )


def test_small_values_are_not_lost_in_large_ones() -> None:
    """Singular values over six decades: their squares over twelve."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 7)))[0] for n in (30, 10))
    sizes = np.logspace(0, -6, 7)
    found = spectrum((u * sizes) @ v.T, np.eye(10) * 4.0)
    np.testing.assert_allclose(np.sqrt(found.values[:7]), 2 * sizes, rtol=1e-6)


def test_a_ridge_sees_what_data_do_not() -> None:
    """Two of three inputs are always 0: without a ridge their weights may become anything."""
    w, gram = np.eye(3), np.diag([3.0, 0.0, 0.0])
    found = spectrum(w, gram, ridge=1e-3)
    np.testing.assert_allclose(found.values, [3.001, 1e-3, 1e-3])


def test_both_factors_are_of_like_size() -> None:
    for shape in SHAPES:
        x = inputs(shape[1], 50)
        left, right = spectrum(weights(*shape), x.T @ x).factors(4)
        np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1))


def test_nothing_and_float32() -> None:
    left, right = spectrum(np.zeros((4, 6)), np.eye(6)).factors(2)
    assert not (left @ right).any()
    assert spectrum(np.zeros((4, 6)), np.eye(6)).error(1) == 0
    assert weighted_error(np.zeros((4, 6)), np.ones((4, 6)), np.eye(6)) == 0
    left, right = spectrum(weights(5, 6).astype(np.float32), np.eye(6, dtype=np.float32)).factors(2)
    assert left.dtype == right.dtype == np.float64


def test_the_error_is_that_of_outputs() -> None:
    w, near, x = weights(5, 7), weights(5, 7, 2), inputs(7, 40)
    lost = np.sum(np.square(x @ (w - near).T)) / np.sum(np.square(x @ w.T))
    assert weighted_error(w, near, x.T @ x) == pytest.approx(lost)
    plain = np.sum(np.square(w - near)) / np.sum(np.square(w))
    assert weighted_error(w, near, None) == pytest.approx(plain)


def test_a_random_range_finds_the_leading_vectors() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 150))
    w += 1e-3 * rng.standard_normal(w.shape)
    for matrix in (w, w.T):
        u, s, vt = randomised_svd(matrix, 8, seed=3)
        exact = truncated_svd(matrix, 8)
        np.testing.assert_allclose(s, exact[1], rtol=1e-6)
        np.testing.assert_allclose(u * s @ vt, exact[0] * exact[1] @ exact[2], atol=1e-4)
        np.testing.assert_array_equal(u, randomised_svd(matrix, 8, seed=3)[0])
    assert randomised_svd(w[:5], 9)[1].shape == (5,)


# -- left factors --------------------------------------------------------------------------------


def test_a_left_factor_is_least_squares() -> None:
    w, p, x = weights(6, 9), weights(3, 9, 2), inputs(9, 50)
    exact = np.linalg.lstsq(x @ p.T, x @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(refit_left(p, x.T @ x, w), exact, rtol=1e-6, atol=1e-9)
    exact = np.linalg.lstsq(p.T, w.T, rcond=None)[0].T
    np.testing.assert_allclose(refit_left(p, None, w), exact, rtol=1e-9, atol=1e-12)


def test_what_a_left_factor_does_not_see_is_zero() -> None:
    """One feature twice, and one that is nothing: no factor is large."""
    w, x = weights(6, 9), inputs(9, 50)
    p = weights(4, 9, 2)
    p[1], p[3] = p[0], 0
    found = refit_left(p, x.T @ x, w)
    least = refit_left(p[[0, 2]], x.T @ x, w)
    np.testing.assert_allclose(found @ p, least @ p[[0, 2]], atol=1e-6)
    assert not found[:, 3].any()
    np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=1e-5)


def test_a_ridge_keeps_a_regression_small() -> None:
    z, y = inputs(5, 40), inputs(3, 40, 2)
    gram, ridge = z.T @ z, 0.1
    force = ridge * np.mean(np.diag(gram))
    exact = np.linalg.solve(gram + force * np.eye(5), z.T @ y).T
    np.testing.assert_allclose(regression(gram, z.T @ y, ridge), exact, rtol=1e-8)


# -- ranks ---------------------------------------------------------------------------------------


def test_the_least_rank_that_keeps_a_share() -> None:
    values = [4.0, 3.0, 2.0, 1.0]
    shares = {0.0: 0, 0.3: 1, 0.4: 1, 0.41: 2, 0.7: 2, 0.95: 4, 1.0: 4}
    assert {share: energy_rank(values, share) for share in shares} == shares
    assert energy_rank([2.0, 0.0], 1.0) == 1
    assert energy_rank([], 0.9) == 0


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (100, 100)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_a_planted_rank_is_found(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(rank)
    signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    for noise in (0.01, 0.3):
        assert evbmf_rank(signal + noise * rng.standard_normal(shape)) == rank
    assert evbmf_rank(signal) == rank


def test_noise_has_no_rank() -> None:
    rng = np.random.default_rng(0)
    assert [evbmf_rank(rng.standard_normal((50, n))) for n in (50, 80, 300)] == [0, 0, 0]
    assert evbmf_rank(np.zeros((4, 5))) == 0
    assert evbmf_rank(np.zeros((0, 5))) == 0


def test_a_rank_does_not_depend_on_scale_or_side() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 90)) + rng.standard_normal((40, 90))
    assert {evbmf_rank(a), evbmf_rank(a.T), evbmf_rank(1e-9 * a), evbmf_rank(1e9 * a)} == {6}


def test_roots_of_a_singular_matrix() -> None:
    x = inputs(6, 3)
    root, inverse = lowrank.roots(x.T @ x)
    np.testing.assert_allclose(root @ root.T, x.T @ x, atol=1e-9 * np.trace(x.T @ x))
    np.testing.assert_allclose(inverse @ root, np.eye(6), atol=1e-9)
