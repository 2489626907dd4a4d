"""Scores against their definitions and brute force, masks by counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphopt.kernels import elimination as eliminating
from graphopt.kernels import saliency
from graphopt.kernels.elimination import Reader, elimination
from graphopt.kernels.masks import block_means, largest, n_of_m, spread_blocks
from graphopt.kernels.saliency import lamp, magnitude, obs, wanda

Array = NDArray[Any]
SEEDS = st.integers(0, 2**32 - 1)


def inputs(seed: int = 0, rows: int = 80, features: int = 6) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, features)) @ rng.standard_normal((features, features))


def weights(seed: int = 1, outputs: int = 4, features: int = 6) -> Array:
    return np.random.default_rng(seed).standard_normal((outputs, features)).astype(np.float32)


# -- scores ----------------------------------------------------------------------------------------


def test_magnitudes_are_of_64_bits() -> None:
    found = magnitude(np.array([[-2.0, 0.0], [3.0, -0.0]], np.float32))
    assert found.dtype == np.float64
    assert found.tolist() == [[2.0, 0.0], [3.0, 0.0]]


def test_wanda_is_what_a_weight_alone_gives() -> None:
    x, w = inputs(), weights()
    found = wanda(w, x.T @ x)
    for row in range(4):
        for column in range(6):
            alone = np.linalg.norm(x[:, column] * float(w[row, column]))
            assert found[row, column] == pytest.approx(alone)


@given(SEEDS)
def test_obs_is_what_is_lost_when_the_others_make_up_for_a_weight(seed: int) -> None:
    """Each weight is taken out in turn, and the row fitted again with lstsq without it."""
    x, w = inputs(seed), weights(seed)
    gram = x.T @ x
    found = obs(w, gram)
    root = np.sqrt(saliency._DAMPING * np.mean(np.diag(gram)))
    damped = np.vstack([x, root * np.eye(6)])  # whose Gram matrix is the damped one
    for row in range(4):
        target = damped @ w[row].astype(np.float64)
        for column in range(6):
            others = np.delete(damped, column, axis=1)
            best = np.linalg.lstsq(others, target, rcond=None)[0]
            lost = np.linalg.norm(others @ best - target)
            assert found[row, column] == pytest.approx(lost, rel=1e-6, abs=1e-9)


def test_obs_of_independent_inputs_is_wanda() -> None:
    w, gram = weights(), np.diag(np.arange(1.0, 7.0))
    damped = gram + saliency._DAMPING * 3.5 * np.eye(6)
    np.testing.assert_allclose(obs(w, gram), wanda(w, damped))


def test_a_weight_whose_neighbour_reads_the_same_can_go() -> None:
    x = np.random.default_rng(0).standard_normal((200, 6))
    x[:, 1] = x[:, 0]
    w = np.ones((1, 6), np.float32)
    scores = obs(w, x.T @ x)[0]
    assert max(scores[:2]) < 0.5 * min(scores[2:])
    assert wanda(w, x.T @ x)[0, 0] > 0.5 * min(scores[2:])  # who does not see it


def test_what_is_never_read_scores_nothing() -> None:
    assert not obs(weights(), np.zeros((6, 6))).any()
    x = inputs()
    x[:, 3] = 0
    for score in (wanda, obs):
        found = score(weights(), x.T @ x)
        assert np.isfinite(found).all()
        assert found[:, 3].max() < found[:, [0, 1, 2, 4, 5]].max()
    assert not wanda(weights(), x.T @ x)[:, 3].any()


@given(SEEDS, st.integers(1, 30))
def test_lamp_is_its_definition(seed: int, size: int) -> None:
    scores = np.abs(np.random.default_rng(seed).standard_normal(size))  # no two the same
    expected = [s**2 / sum(other**2 for other in scores if other >= s) for s in scores]
    np.testing.assert_allclose(lamp(scores), expected)


def test_lamp_keeps_order_and_shape_and_the_best_of_each_layer() -> None:
    scores = magnitude(weights())
    found = lamp(scores)
    assert found.shape == scores.shape
    assert found.max() == 1.0
    assert found.argmax() == scores.argmax()
    np.testing.assert_array_equal(np.argsort(found.ravel()), np.argsort(scores.ravel()))
    np.testing.assert_allclose(lamp(1000 * scores), found)  # the scale of a layer is nothing
    assert lamp(np.zeros((2, 3))).tolist() == [[0.0] * 3] * 2
    assert (lamp(np.array([0.0, 0.0, 2.0])) == [0, 0, 1]).all()


# -- the order in which units go -------------------------------------------------------------------


def energy_lost(w: Array, x: Array, gone: list[int]) -> float:
    """What a layer loses without these columns, fitted again by lstsq on damped rows."""
    target = x @ w.T.astype(np.float64)
    others = np.delete(x, gone, axis=1)
    best = np.linalg.lstsq(others, target, rcond=None)[0]
    return float(np.square(others @ best - target).sum())


@given(SEEDS, st.sampled_from([1, 2]))
def test_always_the_unit_goes_without_which_least_is_lost(seed: int, taps: int) -> None:
    """Brute force: all units that are left are tried, the whole layer fitted again for each."""
    features = 5 * taps
    x, w = inputs(seed, 60, features), weights(seed, 3, features)
    gram = x.T @ x
    root = np.sqrt(eliminating._DAMPING * np.mean(np.diag(gram)))
    damped = np.vstack([x, root * np.eye(features)])
    columns = np.random.default_rng(seed).permutation(features).reshape(5, taps)
    order, costs = elimination([Reader(w, gram, np.arange(5), columns)], 5)
    assert sorted(order) == list(range(5))
    whole = float(np.square(x @ w.T.astype(np.float64)).sum())
    before, gone = 0.0, list[int]()
    for unit, cost in zip(order[:-1], costs[:-1], strict=True):
        left = [u for u in range(5) if not set(columns[u]) <= set(gone)]
        lost = {u: energy_lost(w, damped, [*gone, *columns[u]]) - before for u in left}
        assert cost * whole == pytest.approx(lost[unit], rel=1e-5, abs=1e-7 * whole)
        assert lost[unit] <= min(lost.values()) + 1e-6 * whole
        gone += [int(c) for c in columns[unit]]
        before = energy_lost(w, damped, gone)


def test_of_several_readers_the_one_that_loses_most_counts() -> None:
    def reader(*squares: float) -> Reader:
        return Reader(np.sqrt([squares]), np.eye(3), np.arange(3), np.arange(3)[:, None])

    # The second unit costs less in sum, the first less where it costs most.
    order, costs = elimination([reader(0.5, 0.6, 2.9), reader(0.5, 0.0, 3.5)], 3)
    assert order == (0, 1, 2)
    np.testing.assert_allclose(costs[:2], np.array([0.5, 0.6]) / 4 * 1.01)  # damped


def test_units_that_nobody_reads_go_first_and_several_at_once() -> None:
    x = np.random.default_rng(0).standard_normal((100, 2))
    some = Reader(np.array([[1.0, 2.0]]), x.T @ x, np.array([1, 3]), np.array([[0], [1]]))
    order, costs = elimination([some], 4)
    assert order == (0, 2, 1, 3)
    assert (costs[:2] == 0).all()
    dead = Reader(np.ones((1, 2)), np.zeros((2, 2)), np.arange(2), np.arange(2)[:, None])
    assert elimination([dead], 2)[0] == (0, 1)
    x, w = inputs(features=6), weights()
    one = elimination([Reader(w, x.T @ x, np.arange(6), np.arange(6)[:, None])], 6, 4)
    assert sorted(one[0]) == list(range(6))


# -- masks -----------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4),
    st.floats(0, 0.999),
    st.booleans(),
)
def test_exactly_the_share_goes(
    seed: int, shapes: list[tuple[int, int]], share: float, has_ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 3, s) if has_ties else rng.random(s) for s in shapes]
    kept = largest(scores, share)
    assert [mask.shape for mask in kept] == shapes
    every = np.concatenate([mask.ravel() for mask in kept])
    assert np.count_nonzero(~every) == int(share * every.size + 1e-9)
    values = np.concatenate([score.ravel() for score in scores])
    if every.any() and not every.all():
        assert values[~every].max() <= values[every].min()


def test_shares_that_floats_do_not_hold() -> None:
    for tenth in range(10):
        (mask,) = largest([np.arange(10.0)], tenth / 10)
        assert np.flatnonzero(mask).tolist() == list(range(tenth, 10))
    (mask,) = largest([np.arange(100.0)], 0.29)  # 0.29 * 100 is 28.999...
    assert mask.sum() == 71


def test_the_first_of_equal_scores_go() -> None:
    first, second = largest([np.ones((2, 2)), np.ones(2)], 0.5)
    assert first.tolist() == [[False, False], [False, True]]
    assert second.tolist() == [True, True]


@given(SEEDS, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]), st.integers(1, 20))
def test_n_of_m_are_the_largest_of_each_group(
    seed: int, pattern: tuple[int, int], size: int
) -> None:
    n, m = pattern
    scores = np.random.default_rng(seed).random((2, 3, size))
    keep = n_of_m(scores, n, m)
    for at in np.ndindex(2, 3):
        for start in range(0, size - size % m, m):
            group = scores[at][start : start + m]
            chosen = np.flatnonzero(keep[at][start : start + m])
            assert chosen.tolist() == sorted(np.argsort(group)[-n:].tolist())
        assert keep[at][size - size % m :].all()


def test_equal_scores_keep_n_of_m_too() -> None:
    assert n_of_m(np.zeros((1, 8)), 2, 4).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_all_or_nothing_is_no_pattern(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"{n}:{m}: it is some, but not all"):
        n_of_m(np.zeros((1, 8)), n, m)


@given(
    SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1, 1), (4, 1), (2, 3), (16, 16)])
)
def test_blocks_at_the_end_count_what_they_have(
    seed: int, m: int, k: int, block: tuple[int, int]
) -> None:
    rows, columns = block
    scores = np.random.default_rng(seed).standard_normal((m, k))
    found = block_means(scores, rows, columns)
    assert found.shape == (-(-m // rows), -(-k // columns))
    for i, j in np.ndindex(found.shape):
        part = scores[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert found[i, j] == pytest.approx(np.sqrt(np.mean(np.square(part))))
    keep = np.random.default_rng(seed).random(found.shape) < 0.5
    wide = spread_blocks(keep, (m, k), rows, columns)
    assert wide.shape == (m, k)
    for i, j in np.ndindex(m, k):
        assert wide[i, j] == keep[i // rows, j // columns]
