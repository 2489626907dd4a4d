"""Masked least squares: against numpy's lstsq row by row, in both ways, and by their laws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphopt.kernels import refit
from graphopt.kernels.moments import Regression
from graphopt.kernels.refit import Fit, masked_least_squares, match_moments, squared_error

Array = NDArray[Any]
WAYS = ["direct", "conjugate gradients"]


class Problem(NamedTuple):
    x: Array
    y: Array
    mask: Array
    start: Array
    sums: Regression


def problem(
    seed: int = 0, rows: int = 200, features: int = 12, outputs: int = 5, kept: float = 0.5
) -> Problem:
    """Correlated inputs with a mean, targets of other weights than the start, and some noise."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((features, features)) / features**0.5 + np.eye(features)
    x = rng.standard_normal((rows, features)) @ mixing + rng.standard_normal(features)
    true, start = rng.standard_normal((2, outputs, features))
    y = x @ true.T + rng.standard_normal(outputs) + 0.1 * rng.standard_normal((rows, outputs))
    mask = rng.random((outputs, features)) < kept
    return given_rows(x, y, mask, start)


def given_rows(x: Array, y: Array, mask: Array, start: Array) -> Problem:
    sums = Regression(x.shape[1], y.shape[1])
    sums.add(x, y)
    return Problem(x, y, mask, start, sums)


def solve(p: Problem, ridge: float, has_bias: bool = True) -> Fit:
    return masked_least_squares(
        p.sums.matrix, p.sums.cross, p.mask, p.start, ridge=ridge, has_bias=has_bias
    )


def reference(p: Problem, ridge: float, has_bias: bool = True) -> Array:
    """Row by row: the rows of X, and below them those that pull each weight to its start."""
    root = np.sqrt(ridge * np.mean(np.sum(np.square(p.x), axis=0)))
    found = np.zeros((len(p.mask), p.x.shape[1] + has_bias))
    for row, mask in enumerate(p.mask):
        at = np.flatnonzero(mask)
        a = np.block([[p.x[:, at]], [root * np.eye(len(at))]])
        b = np.concatenate([p.y[:, row], root * p.start[row, at]])
        if has_bias:
            ones = np.concatenate([np.ones(len(p.x)), np.zeros(len(at))])
            a, at = np.column_stack([a, ones]), np.append(at, p.x.shape[1])
        found[row, at] = np.linalg.lstsq(a, b, rcond=None)[0]
    return found


def joined(fit: Fit) -> Array:
    return fit.weights if fit.bias is None else np.column_stack([fit.weights, fit.bias])


def lost(p: Problem, fit: Fit) -> Array:
    """||X w + b - y||^2 of each output, row by row."""
    bias = 0.0 if fit.bias is None else fit.bias
    return np.asarray(np.square(p.x @ fit.weights.T + bias - p.y).sum(axis=0))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force one of the ways, and see that it is taken."""
    taken: list[str] = []
    gradients, factor = refit._conjugate_gradients, refit.scipy.linalg.cho_factor

    def conjugate(*arguments: Any) -> Any:
        taken.append("conjugate gradients")
        return gradients(*arguments)

    def direct(*arguments: Any, **options: Any) -> Any:
        taken.append("direct")
        return factor(*arguments, **options)

    monkeypatch.setattr(refit, "_conjugate_gradients", conjugate)
    monkeypatch.setattr(refit.scipy.linalg, "cho_factor", direct)
    monkeypatch.setattr(refit, "_SLOWER", 0.0 if request.param == "direct" else np.inf)
    monkeypatch.setattr(refit, "_TOLERANCE", 1e-12)
    monkeypatch.setattr(refit, "_STEPS", 1000)
    yield request.param
    assert set(taken) == {request.param}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_it_is_the_least_squares_of_each_row(way: str, ridge: float, has_bias: bool) -> None:
    p = problem()
    fit = solve(p, ridge, has_bias)
    assert (fit.bias is not None) == has_bias
    np.testing.assert_allclose(joined(fit), reference(p, ridge, has_bias), rtol=0, atol=1e-6)
    assert (fit.weights[~p.mask] == 0).all()
    assert (np.count_nonzero(fit.weights, axis=1) == p.mask.sum(axis=1)).all()


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 10),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.sampled_from([1e-3, 1e-1, 10.0]),
    st.booleans(),
)
def test_of_any_size(
    seed: int,
    rows: int,
    features: int,
    outputs: int,
    kept: float,
    ridge: float,
    has_bias: bool,
) -> None:
    # The least squares of fewer rows than features too: the ridge says which of many.
    p = problem(seed, rows, features, outputs, kept)
    found, expected = joined(solve(p, ridge, has_bias)), reference(p, ridge, has_bias)
    scale = 1 + np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * scale)


def test_the_steps_that_are_taken_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(rows=2000, features=60, outputs=40)
    monkeypatch.setattr(refit, "_SLOWER", 0.0)
    exact = lost(p, solve(p, 1e-2))
    monkeypatch.setattr(refit, "_SLOWER", np.inf)
    near = lost(p, solve(p, 1e-2))
    assert (near != exact).any()
    np.testing.assert_allclose(near, exact, rtol=1e-4)


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("gradients")

    monkeypatch.setattr(refit, "_conjugate_gradients", fail)
    wide = problem(features=300, outputs=40, rows=350)
    solve(wide._replace(mask=np.repeat(wide.mask[:1], 40, axis=0)), 1e-2)  # one factor for all
    with pytest.raises(AssertionError, match="gradients"):
        solve(wide, 1e-2)  # one for each


def test_a_ridge_pulls_to_the_start(way: str) -> None:
    p = problem()
    start = np.where(p.mask, p.start, 0)
    far = [np.abs(solve(p, ridge).weights - start).max() for ridge in (1e-4, 1.0, 1e2, 1e4)]
    assert far == sorted(far, reverse=True)
    assert far[0] > 0.5
    assert far[-1] < 1e-3
    # The bias is free all the same: it takes the mean of what is left.
    fit = solve(p, 1e9)
    assert fit.bias is not None
    np.testing.assert_allclose(fit.bias, (p.y - p.x @ start.T).mean(axis=0), atol=1e-5)


def test_what_gives_the_targets_is_found_again(way: str) -> None:
    p = problem(rows=300)
    weights, bias = np.where(p.mask, p.start, 0), np.arange(5.0)
    p = given_rows(p.x, p.x @ weights.T + bias, p.mask, p.start)
    fit = solve(p, 1e-2)  # the start is the answer: no ridge moves it
    np.testing.assert_allclose(fit.weights, weights, atol=1e-7)
    np.testing.assert_allclose(fit.bias, bias, atol=1e-7)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1e-2]))
def test_nothing_on_the_mask_is_better(seed: int, ridge: float) -> None:
    p = problem(seed, rows=50, features=6, outputs=2)
    fit = solve(p, ridge)
    penalty = ridge * np.mean(np.sum(np.square(p.x), axis=0))

    def objective(weights: Array, bias: Array) -> Array:
        pulled = np.square(np.where(p.mask, weights - p.start, 0)).sum(axis=1)
        return lost(p, Fit(weights, bias)) + penalty * pulled

    assert fit.bias is not None
    best = objective(fit.weights, fit.bias)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        moved = np.where(p.mask, 1e-3 * rng.standard_normal(p.mask.shape), 0)
        other = objective(fit.weights + moved, fit.bias + 1e-3 * rng.standard_normal(2))
        assert (other >= best * (1 - 1e-9)).all()


# -- what is degenerate ----------------------------------------------------------------------------


def test_features_that_are_always_zero_stay_as_they_were(way: str) -> None:
    p = problem()
    x = p.x.copy()
    x[:, [0, 7]] = 0
    mask = p.mask.copy()
    mask[:, 0] = True
    p = given_rows(x, p.y, mask, p.start)
    fit = solve(p, 1e-2)
    assert np.isfinite(joined(fit)).all()
    np.testing.assert_allclose(fit.weights[:, 0], p.start[:, 0], rtol=1e-6)
    np.testing.assert_allclose(joined(fit), reference(p, 1e-2), rtol=0, atol=1e-6)


def test_a_row_of_which_nothing_is_left_has_the_mean(way: str) -> None:
    p = problem()
    mask = p.mask.copy()
    mask[2] = False
    p = p._replace(mask=mask)
    fit = solve(p, 1e-2)
    assert (fit.weights[2] == 0).all()
    assert fit.bias is not None
    np.testing.assert_allclose(fit.bias[2], p.y[:, 2].mean(), rtol=1e-9)


def test_nothing_is_left_at_all() -> None:
    p = problem()._replace(mask=np.zeros((5, 12), bool))
    fit = solve(p, 1e-2, has_bias=False)
    assert (fit.weights == 0).all()
    assert fit.bias is None


def test_inputs_that_are_always_zero_leave_the_mean_to_the_bias() -> None:
    p = problem()
    p = given_rows(np.zeros_like(p.x), p.y, p.mask, p.start)
    fit = solve(p, 1e-2)
    np.testing.assert_array_equal(fit.weights, np.where(p.mask, p.start, 0))
    np.testing.assert_allclose(fit.bias, p.y.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("has_bias", [True, False])
def test_no_rows_teach_nothing(has_bias: bool) -> None:
    p = problem(rows=0)
    fit = solve(p, 1e-2, has_bias)
    np.testing.assert_array_equal(fit.weights, np.where(p.mask, p.start, 0))
    assert (fit.bias is None) == (not has_bias)
    assert fit.bias is None or (fit.bias == 0).all()


def test_features_of_which_two_are_the_same(way: str) -> None:
    p = problem()
    x = p.x.copy()
    x[:, 1] = x[:, 0]
    p = given_rows(x, p.y, np.ones_like(p.mask), p.start)
    fit = solve(p, 1e-2)
    np.testing.assert_allclose(joined(fit), reference(p, 1e-2), rtol=0, atol=1e-6)


# -- errors ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.booleans())
def test_errors_are_those_of_the_rows(seed: int, rows: int, has_bias: bool) -> None:
    p = problem(seed, rows, features=4, outputs=3)
    rng = np.random.default_rng(seed)
    fit = Fit(rng.standard_normal((3, 4)), rng.standard_normal(3) if has_bias else None)
    found = squared_error(p.sums.matrix, p.sums.cross, p.sums.energy, fit)
    assert found.shape == (3,)
    np.testing.assert_allclose(found, lost(p, fit), rtol=1e-9, atol=1e-9 * p.sums.energy.max())


def test_errors_are_never_below_zero() -> None:
    """What is fitted exactly leaves the rounding of large numbers, of either sign."""
    for seed in range(20):
        p = problem(seed, outputs=8)
        p = given_rows(p.x, 1e3 * (p.x @ p.start[:8].T), p.mask, p.start)
        found = squared_error(
            p.sums.matrix, p.sums.cross, p.sums.energy, Fit(1e3 * p.start, np.zeros(8))
        )
        assert (found >= 0).all()
        assert (found <= 1e-9 * p.sums.energy).all()


# -- moments ---------------------------------------------------------------------------------------


def matched(p: Problem, fit: Fit) -> Fit:
    return match_moments(p.sums.matrix, p.sums.cross, p.sums.energy, fit)


def test_means_and_variances_come_back() -> None:
    p = problem(rows=500)
    plain = Fit(np.where(p.mask, p.start, 0), np.zeros(5))
    # Scales beyond the limit are another test: these targets vary about as much.
    y = p.y / p.y.std(axis=0) * (p.x @ plain.weights.T).std(axis=0) * np.linspace(0.5, 2, 5)
    p = given_rows(p.x, y, p.mask, p.start)
    found = matched(p, plain)
    assert found.bias is not None
    given = p.x @ found.weights.T + found.bias
    np.testing.assert_allclose(given.mean(axis=0), y.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(given.var(axis=0), y.var(axis=0), rtol=1e-9)
    ratio = found.weights[p.mask] / plain.weights[p.mask]
    assert (ratio > 0).all()  # scaled, and no more: each row by one number
    for row, mask in enumerate(p.mask):
        ratios = found.weights[row, mask] / plain.weights[row, mask]
        np.testing.assert_allclose(ratios, ratios[0])


def test_without_a_bias_the_mean_square_comes_back() -> None:
    p = problem(rows=500)
    plain = Fit(np.where(p.mask, p.start, 0), None)
    y = p.y / np.sqrt(np.square(p.y).mean(axis=0)) * np.linspace(0.5, 2, 5)
    p = given_rows(p.x, y, p.mask, p.start)
    found = matched(p, plain)
    assert found.bias is None
    given = p.x @ found.weights.T
    np.testing.assert_allclose(np.square(given).mean(axis=0), np.square(y).mean(axis=0))


def test_a_mean_is_not_scaled_away_where_nothing_puts_it_right() -> None:
    rng = np.random.default_rng(0)
    x = 20 + rng.standard_normal((500, 4))
    y = x.sum(axis=1, keepdims=True) + 6 * rng.standard_normal((500, 1))  # ten times the variance
    p = given_rows(x, y, np.ones((1, 4), bool), np.ones((1, 4)))
    np.testing.assert_allclose(matched(p, Fit(p.start, None)).weights, p.start, rtol=0.01)
    assert (matched(p, Fit(p.start, np.zeros(1))).weights > 2.5).all()


def test_no_scale_grows_without_bounds() -> None:
    p = problem(rows=500)
    weights = np.where(p.mask, p.start, 0)
    p = given_rows(p.x, 100 * (p.x @ weights.T), p.mask, p.start)
    found = matched(p, Fit(weights, np.zeros(5)))
    np.testing.assert_allclose(found.weights, refit._LARGEST_SCALE * weights)
    assert found.bias is not None
    given = p.x @ found.weights.T + found.bias
    np.testing.assert_allclose(given.mean(axis=0), p.y.mean(axis=0), rtol=1e-9, atol=1e-9)


def test_an_output_that_does_not_vary_keeps_its_scale() -> None:
    p = problem()
    weights = np.where(p.mask, p.start, 0)
    weights[1] = 0
    found = matched(p, Fit(weights, np.zeros(5)))
    assert (found.weights[1] == 0).all()
    assert found.bias is not None
    np.testing.assert_allclose(found.bias[1], p.y[:, 1].mean())
    x = np.broadcast_to(p.x[:1], p.x.shape)  # nothing varies
    still = given_rows(x, p.y, p.mask, p.start)
    found = matched(still, Fit(1e-9 * weights, np.zeros(5)))
    assert np.isfinite(joined(found)).all()
