"""Kernels as products of smaller ones: against brute force and tensorly, and by their laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from graphopt.kernels import reading
from graphopt.kernels.lowrank import weighted_error
from graphopt.kernels.multilinear import CP, SPATIAL, TUCKER, cp, spatial, tucker

Array = NDArray[Any]
Made = Callable[[Array, Array | None], Array]
DIGITS = Path(__file__).parents[1] / "models" / "digits" / "cnn.onnx"
FORMS = ["spatial", "tucker", "cp"]


def effective(form: str, factors: Sequence[Array]) -> Array:
    """The weights [M, K] that factors amount to, by einsum alone."""
    if form != SPATIAL:
        first, middle, last = factors
        taps = middle.reshape(*middle.shape[: 1 + (form == TUCKER)], -1)
        factors = [first, taps, last]
    made = np.asarray(np.einsum(form, *factors))
    return made.reshape(len(made), -1)


def made_by(form: str, rank: int) -> Made:
    """Weights [M, C, h, w] and a Gram matrix to the weights [M, K] of a form."""

    def made(weights: Array, gram: Array | None) -> Array:
        if form == "spatial":
            return effective(SPATIAL, spatial(weights, gram, rank))
        if form == "tucker":
            return effective(TUCKER, tucker(weights, gram, (rank, rank)))
        return effective(CP, cp(weights, gram, rank).factors)

    return made


def kernel(outputs: int = 12, channels: int = 8, size: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((outputs, channels, size, size))


def planted(shape: Sequence[int], rank: int, noise: float, seed: int = 0) -> Array:
    """Rank-one terms [M, C, h, w], and a share of noise."""
    rng = np.random.default_rng(seed)
    m, c, h, w = shape
    factors = [rng.standard_normal((n, rank)) for n in (m, c, h * w)]
    terms = np.einsum("mr,cr,tr->mct", *factors).reshape(m, c, h, w)
    other = rng.standard_normal(terms.shape)
    return np.asarray(terms + noise * np.linalg.norm(terms) / np.linalg.norm(other) * other)


def patches(channels: int, rows: int = 400, seed: int = 1) -> Array:
    """Rows [rows, C 3 3] of images that are smooth, with channels that are alike."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((rows, channels, 5, 5))
    smooth = sum(noise[:, :, i : i + 3, j : j + 3] for i in range(3) for j in range(3))
    mixing = rng.standard_normal((channels, channels)) * np.logspace(0, -1, channels)
    return np.asarray(np.einsum("ncij,cd->ndij", smooth, mixing)).reshape(rows, -1)


def of_model(name: str) -> Array:
    """A kernel of the digits model."""
    model = onnx.load(str(DIGITS))
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return np.asarray(numpy_helper.to_array(found), np.float64)


def error(weights: Array, near: Array, gram: Array | None = None) -> float:
    return weighted_error(weights.reshape(len(weights), -1), near, gram)


# -- what all have in common -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 5])
def test_data_count(form: str, rank: int) -> None:
    """Weights that are fitted to data lose less of what these give, and of the rest more."""
    w, x = kernel(), patches(8)
    gram, made = x.T @ x, made_by(form, rank)
    seeing, blind = made(w, gram), made(w, None)
    assert error(w, seeing, gram) < 0.8 * error(w, blind, gram)
    assert error(w, seeing) > error(w, blind)


@pytest.mark.parametrize("form", FORMS)
def test_no_other_last_factor_loses_less(form: str) -> None:
    """Given the others it is least squares, to which the ridge on the Gram matrix adds nothing."""
    w, x = kernel(), patches(8)
    gram = x.T @ x
    ridge = gram + reading.RIDGE * np.mean(np.diag(gram)) * np.eye(len(gram))
    root = np.linalg.cholesky(ridge)
    flat = w.reshape(len(w), -1)
    if form == "spatial":
        first, last = spatial(w, gram, 5)
        inner = np.einsum("rci,jk->rjcik", first, np.eye(3)).reshape(15, -1)
        found = last.reshape(len(w), -1)
    elif form == "tucker":
        first, core, found = tucker(w, gram, (5, 4))
        inner = np.einsum("qc,pqij->pcij", first, core).reshape(5, -1)
    else:
        first, middle, found = cp(w, gram, 5).factors
        inner = np.einsum("rc,rij->rcij", first, middle).reshape(5, -1)
    best = np.linalg.lstsq((inner @ root).T, (flat @ root).T, rcond=None)[0].T
    # the terms of a sum are held by a small force, which costs a trace
    slack = 1e-4 if form == "cp" else 1e-9
    assert error(w, found @ inner, ridge) <= error(w, best @ inner, ridge) * (1 + slack)


@pytest.mark.parametrize(("form", "left"), [("spatial", 3e-3), ("tucker", 5e-4), ("cp", 9e-3)])
def test_brute_force_gains_little(form: str, left: float) -> None:
    """Least squares for each factor in turn, five times, from what was found.

    Without steps against the Gram matrix they gain 1.2 %, 0.1 % and 1.8 %.
    """
    w, x = kernel(8, 6, seed=2), patches(6, seed=7)
    gram = x.T @ x
    gram += reading.RIDGE * np.mean(np.diag(gram)) * np.eye(len(gram))
    root = np.linalg.cholesky(gram)
    if form == "spatial":
        name, factors = SPATIAL, spatial(w, x.T @ x, 4)
    elif form == "tucker":
        name, factors = TUCKER, tucker(w, x.T @ x, (4, 3))
    else:
        name, factors = CP, list(cp(w, x.T @ x, 6).factors)
    found = error(w, effective(name, factors), gram)
    target = (w.reshape(len(w), -1) @ root).ravel()
    for index in [*range(len(factors))] * 5:
        shape = factors[index].shape
        columns = []
        for unit in np.eye(factors[index].size):
            factors[index] = unit.reshape(shape)
            columns.append((effective(name, factors) @ root).ravel())
        solved = np.linalg.lstsq(np.stack(columns, 1), target, rcond=None)[0]
        factors[index] = solved.reshape(shape)
    best = error(w, effective(name, factors), gram)
    assert best <= found <= best / (1 - left)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["singular", "zero", "float32", None])
def test_at_full_rank_nothing_is_lost(form: str, which: str | None) -> None:
    w, x = kernel(6, 4), patches(4, 10 if which == "singular" else 200)
    gram: Array | None = x.T @ x
    if which == "zero":
        gram = np.zeros((36, 36))
    elif which == "float32":
        w, gram = w.astype(np.float32), (x.T @ x).astype(np.float32)
    elif which is None:
        gram = None
    made = made_by(form, {"spatial": 12, "tucker": 6, "cp": 24}[form])(w, gram)
    assert made.dtype == np.float64
    assert error(w, made, gram if which in (None, "float32") else x.T @ x) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros_and_scale_is_kept(form: str) -> None:
    made, w, x = made_by(form, 3), kernel(), patches(8)
    assert not made(0 * w, None).any()
    assert not made(0 * w, x.T @ x).any()
    base = made(w, x.T @ x)
    for scale in (2.0**-60, 2.0**40):  # powers of two: nothing is rounded otherwise
        np.testing.assert_allclose(made(scale * w, x.T @ x), scale * base, rtol=1e-9)
        np.testing.assert_allclose(made(w, scale**2 * (x.T @ x)), base, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_again(form: str) -> None:
    w, x = kernel(), patches(8)
    first, second = (made_by(form, 4)(w, x.T @ x) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_more_rank_loses_less(form: str) -> None:
    w, x = kernel(), patches(8)
    errors = [error(w, made_by(form, rank)(w, x.T @ x), x.T @ x) for rank in (1, 2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


# -- spatial ---------------------------------------------------------------------------------------


def test_a_column_and_a_row_are_the_svd() -> None:
    """Without data it is the SVD of [C h, M w]."""
    w = kernel(6, 5, 4)[:, :, :3]
    first, last = spatial(w, None, 7)
    assert (first.shape, last.shape) == ((7, 5, 3), (6, 7, 4))
    values = np.linalg.svd(w.transpose(1, 2, 0, 3).reshape(15, 24), compute_uv=False) ** 2
    expected = values[7:].sum() / values.sum()
    assert error(w, effective(SPATIAL, [first, last])) == pytest.approx(expected, rel=1e-9)


def test_planted_columns_and_rows_are_found() -> None:
    rng, x = np.random.default_rng(0), patches(8)
    first, last = rng.standard_normal((4, 8, 3)), rng.standard_normal((12, 4, 3))
    w = np.einsum(SPATIAL, first, last)
    for gram in (None, x.T @ x):
        assert error(w, effective(SPATIAL, spatial(w, gram, 4)), gram) < 1e-12


# -- Tucker ----------------------------------------------------------------------------------------


def test_tucker_has_the_ranks_asked_for() -> None:
    first, core, last = tucker(kernel(), None, (5, 3))
    assert (first.shape, core.shape, last.shape) == ((3, 8), (5, 3, 3, 3), (12, 5))
    first, core, last = tucker(kernel()[:, :, :, 0], None, (5, 3))
    assert core.shape == (5, 3, 3)


def test_planted_tucker_factors_are_found() -> None:
    rng, x = np.random.default_rng(0), patches(8)
    shapes = [(3, 8), (5, 3, 9), (12, 5)]
    w = np.einsum(TUCKER, *(rng.standard_normal(shape) for shape in shapes)).reshape(12, 8, 3, 3)
    for gram in (None, x.T @ x):
        assert error(w, effective(TUCKER, tucker(w, gram, (5, 3))), gram) < 1e-12


@pytest.mark.parametrize("name", ["2.0.weight", "7.first.0.weight"])
@pytest.mark.parametrize("ranks", [(4, 4), (10, 6)])
def test_tucker_is_as_good_as_the_best_of_ten(name: str, ranks: tuple[int, int]) -> None:
    """Within 1 % of tensorly's, from the singular vectors and from random ones."""
    from tensorly import tucker_to_tensor
    from tensorly.decomposition import tucker as theirs

    w = of_model(name)
    flat = w.reshape(*w.shape[:2], -1)
    errors = []
    for seed in range(10):
        start = "random" if seed else "svd"
        found = theirs(flat, [*ranks, flat.shape[2]], init=start, random_state=seed, tol=1e-8)
        errors.append(error(w, tucker_to_tensor(found).reshape(len(w), -1)))
    ours = error(w, effective(TUCKER, tucker(w, None, ranks)))
    assert ours <= 1.01 * min(errors)


# -- sums of rank-one terms ------------------------------------------------------------------------


def test_planted_terms_are_found() -> None:
    w, x = planted((12, 10, 3, 3), 6, 0.0), patches(10)
    for gram in (None, x.T @ x):
        assert error(w, effective(CP, cp(w, gram, 6).factors), gram) < 1e-8
    noisy = planted((30, 24, 3, 3), 16, 0.1)
    assert error(noisy, effective(CP, cp(noisy, None, 16).factors)) < 0.01  # of noise, not all


@pytest.mark.parametrize("case", ["digits 8", "digits 32", "planted 12", "noise 24"])
def test_cp_is_as_good_as_the_best_of_ten(case: str) -> None:
    """Within 1 % of tensorly's from ten random starts, by the root of the error as it counts it."""
    from tensorly import cp_to_tensor
    from tensorly.decomposition import parafac

    name, number = case.split()
    w, rank = (
        {
            "digits": of_model("2.0.weight"),
            "planted": planted((20, 16, 3, 3), 12, 0.3),
            "noise": kernel(24, 16),
        }[name],
        int(number),
    )
    flat = w.reshape(*w.shape[:2], -1)
    errors = []
    for seed in range(10):
        found = parafac(flat, rank, n_iter_max=500, init="random", random_state=seed)
        errors.append(error(w, cp_to_tensor(found).reshape(len(w), -1)))
    ours = error(w, effective(CP, cp(w, None, rank).factors))
    assert ours**0.5 <= 1.01 * min(errors) ** 0.5


def test_terms_do_not_diverge() -> None:
    """A tensor of rank three that sums of two come ever nearer to, by terms that grow for ever."""
    rng = np.random.default_rng(0)
    (a, b), (c, d), (e, f) = (np.linalg.qr(rng.standard_normal((n, 2)))[0].T for n in (8, 6, 9))
    terms = [(a, c, f), (a, d, e), (b, c, e)]
    w = sum(np.einsum("m,c,t->mct", *term) for term in terms).reshape(8, 6, 3, 3)
    two = cp(w, None, 2)
    assert error(w, effective(CP, two.factors)) < 1e-4
    assert two.degeneracy < 100
    three = cp(w, None, 3)
    assert error(w, effective(CP, three.factors)) < 1e-12
    assert three.degeneracy == pytest.approx(1, rel=0.1)
    largest = max(np.abs(factor).max() for factor in two.factors)
    assert largest < 10


def test_degeneracy_is_what_it_says() -> None:
    w, x = kernel(), patches(8)
    for gram in (None, x.T @ x):
        (first, middle, last), degeneracy = cp(w, gram, 10)
        terms = np.einsum("rc,rij,mr->rmcij", first, middle, last)
        assert degeneracy == pytest.approx(np.sum(terms**2) / np.sum(w**2))
        assert degeneracy < 100
        sizes = [np.linalg.norm(f.reshape(10, -1), axis=1) for f in (first, middle, last.T)]
        np.testing.assert_allclose(sizes[0], sizes[1])
        np.testing.assert_allclose(sizes[0], sizes[2])


def test_more_terms_than_a_sum_needs() -> None:
    first, middle, last = cp(kernel(4, 3), None, 40).factors
    assert (first.shape, middle.shape, last.shape) == ((40, 3), (40, 3, 3), (4, 40))
    assert error(kernel(4, 3), effective(CP, [first, middle, last])) < 1e-12


def test_another_seed_starts_elsewhere() -> None:
    w = kernel(24, 16)
    one, same, other = (cp(w, None, 10, seed=seed).factors[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


# -- factors against a Gram matrix -----------------------------------------------------------------


def test_steps_towards_a_better_first_factor_find_the_best() -> None:
    """Many steps of conjugate gradients are the least squares that numpy finds."""
    rng, x = np.random.default_rng(0), patches(6)
    w, core = rng.standard_normal((10, 6, 9)), rng.standard_normal((10, 4, 9))
    read = reading.reading(w, x.T @ x, ridge=0.01)
    found = read.moved(rng.standard_normal((4, 6)), core, None, 200)
    assert read.gram is not None
    root = np.linalg.cholesky(read.gram)
    columns = [
        (np.einsum("mqt,qc->mct", core, unit.reshape(4, 6)).reshape(10, -1) @ root).ravel()
        for unit in np.eye(24)
    ]
    target = (w.reshape(10, -1) @ root).ravel()
    best = np.linalg.lstsq(np.stack(columns, 1), target, rcond=None)[0].reshape(4, 6)
    np.testing.assert_allclose(found, best, atol=1e-2 * np.abs(best).max())


def test_a_gram_matrix_for_each_of_two_axes() -> None:
    """Where channels and taps are correlated each by themselves, whitening tells it all."""
    rng = np.random.default_rng(0)
    roots = [rng.standard_normal((n, n)) + 2 * np.eye(n) for n in (5, 9)]
    gram = np.kron(*(root @ root.T for root in roots))
    read = reading.reading(rng.standard_normal((7, 5, 9)), gram, ridge=0.0)
    white, inverse, tap_inverse = read.white()
    assert np.sum(white**2) == pytest.approx(read.energy)
    back = np.einsum("mat,ac,tu->mcu", white, inverse, tap_inverse)
    np.testing.assert_allclose(back, read.weights, atol=1e-9)
