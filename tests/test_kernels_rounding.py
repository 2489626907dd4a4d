"""GPTQ and bias correction: against the textbook recursion, brute force and rounding to nearest."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphopt.kernels.affine import (
    Affine,
    asymmetric,
    channel_affine,
    dequantize,
    quantize,
    quantize_blocks,
    symmetric,
)
from graphopt.kernels.rounding import bias_correction, gptq, gptq_blocks

Array = NDArray[Any]


def correlated(seed: int, n: int, features: int, rank: int) -> Array:
    """Inputs as after a Relu behind a layer: few directions have most of the energy."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, features))
    return np.maximum(x + 0.3 * rng.standard_normal((n, features)), 0.0)


def problem(seed: int = 0, out: int = 16, features: int = 300, n: int = 900) -> tuple[Array, Array]:
    x = correlated(seed, n, features, max(1, features // 6))
    w = np.random.default_rng(seed + 1).standard_normal((out, features)).astype(np.float32)
    return w, x.T @ x


def errors(w: Array, back: Array, gram: Array) -> Array:
    lost = w.astype(np.float64) - back
    return np.einsum("oi,ij,oj->o", lost, gram, lost, optimize=True)


def textbook(w: Array, gram: Array, affine: Affine, damping: float) -> Array:
    """Optimal brain quantization in the given order, the inverse downdated after every column.

    Frantar et al., equations 2 and 3; no Cholesky factor, no blocks.
    """
    scale, zero = affine.along(2)
    scale, zero = np.broadcast_to(scale, w.shape), np.broadcast_to(zero, w.shape)
    order = np.argsort(-np.diag(gram), kind="stable")
    left = w.astype(np.float64)
    q = np.zeros(w.shape)
    damped = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    for at, column in enumerate(order):
        rest = order[at:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        step, shift = scale[:, column], zero[:, column]
        q[:, column] = np.clip(np.rint(left[:, column] / step) + shift, *affine.limits)
        lost = (left[:, column] - (q[:, column] - shift) * step) / inverse[0, 0]
        left[:, rest] -= np.outer(lost, inverse[0])
    return q


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_the_recursion_of_the_paper(bits: int) -> None:
    w, gram = problem(features=150)  # more than a block of columns
    dtype = {4: ml_dtypes.int4, 8: np.int8}[bits]
    affine = channel_affine(w, 0, dtype=dtype, method="mse")
    q = gptq(w, gram, affine)
    assert q.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(q.astype(np.float64), textbook(w, gram, affine, 0.01))


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_gptq_loses_less_than_half_of_what_nearest_does_on_correlated_inputs(bits: int) -> None:
    w, gram = problem(out=32)
    affine = channel_affine(w, 0, bits=bits)
    found, nearest = gptq(w, gram, affine), quantize(w, affine)
    assert found.min() >= affine.limits[0]
    assert found.max() <= affine.limits[1]
    lost = [errors(w, dequantize(q, affine), gram) for q in (found, nearest)]
    assert (lost[0] <= lost[1]).all()
    assert lost[0].sum() < 0.5 * lost[1].sum()


@given(
    st.integers(0, 2**32 - 2),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_gptq_is_never_worse_than_nearest(
    seed: int, out: int, features: int, n: int, damping: float
) -> None:
    w, gram = problem(seed, out, features, n)  # singular where n < features, zero where n = 0
    affine = channel_affine(w, 0, dtype=ml_dtypes.int4)
    found = gptq(w, gram, affine, damping=damping)
    # The definition's own scales, in float64: float32 weights round once more.
    scale = affine.along(2)[0].astype(np.float64)
    lost = [errors(w, q.astype(np.float64) * scale, gram) for q in (found, quantize(w, affine))]
    assert (lost[0] <= lost[1] + 1e-9 * lost[1].max()).all()


def test_gptq_against_all_roundings() -> None:
    # Two to the six choices of up or down: GPTQ is greedy, yet closes most of the gap to the best.
    w, gram = problem(3, out=40, features=6, n=50)
    affine = symmetric(np.abs(w).max(axis=1), ml_dtypes.int4, axis=0)
    scale = affine.along(2)[0]
    down = np.floor(w / scale)
    best = np.full(len(w), np.inf)
    for ups in itertools.product((0, 1), repeat=6):
        q = np.clip(down + np.array(ups), -8, 7)
        best = np.minimum(best, errors(w, q * scale, gram))
    found = errors(w, dequantize(gptq(w, gram, affine), affine), gram)
    nearest = errors(w, dequantize(quantize(w, affine), affine), gram)
    assert found.sum() - best.sum() < 0.5 * (nearest.sum() - best.sum())


def test_independent_inputs_are_rounded_to_nearest() -> None:
    w, _ = problem(features=40)
    affine = channel_affine(w, 0)
    gram = np.diag(np.arange(1.0, 41.0))
    np.testing.assert_array_equal(gptq(w, gram, affine), quantize(w, affine))
    np.testing.assert_array_equal(gptq(w, np.zeros((40, 40)), affine), quantize(w, affine))


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    w, gram = problem(features=60)
    dead = [0, 7, 59]
    gram[dead] = gram[:, dead] = 0.0
    affine = channel_affine(w, 0, bits=7)
    q = gptq(w, gram, affine)
    np.testing.assert_array_equal(q[:, dead], quantize(w, affine)[:, dead])
    alive = [i for i in range(60) if i not in dead]
    np.testing.assert_array_equal(
        q[:, alive], gptq(w[:, alive], gram[np.ix_(alive, alive)], affine)
    )


@pytest.mark.parametrize(
    "affine", [asymmetric(-3.0, 4.0), symmetric(3.5), symmetric(3.5, np.uint8)]
)
def test_gptq_of_whole_tensors_and_zero_points(affine: Affine) -> None:
    w, gram = problem(features=64)
    lost = [
        errors(w, dequantize(q, affine), gram).sum()
        for q in (gptq(w, gram, affine), quantize(w, affine))
    ]
    assert lost[0] < 0.5 * lost[1]


def test_what_is_not_finite_is_refused() -> None:
    w, gram = problem(features=8)
    affine = channel_affine(w, 0)
    bad = gram.copy()
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq(w, bad, affine)
    w[0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        gptq(w, gram, affine)


def test_a_matrix_that_rounding_made_indefinite() -> None:
    w, gram = problem(features=20)
    values, vectors = np.linalg.eigh(gram)
    values[:5] = -1e-6 * values[-1]
    affine = channel_affine(w, 0)
    q = gptq(w, (vectors * values) @ vectors.T, affine, damping=0.0)
    assert q.shape == w.shape


@pytest.mark.parametrize("symmetric_", [True, False])
@pytest.mark.parametrize("rows", [96, 70])
def test_gptq_of_blocks(symmetric_: bool, rows: int) -> None:
    w, gram = problem(features=rows)
    w = np.ascontiguousarray(w.T)
    nearest, scales, zeros = quantize_blocks(w, 32, 4, symmetric_, "mse")
    found = gptq_blocks(w, gram, scales, zeros, 32)
    assert found.dtype == nearest.dtype
    assert found.shape == w.shape

    def lost(q: Array) -> Array:
        scale, zero = (np.repeat(v.astype(np.float64), 32, axis=0)[:rows] for v in (scales, zeros))
        return errors(w.T, ((q.astype(np.float64) - zero) * scale).T, gram)

    assert (lost(found) <= lost(nearest) * (1 + 1e-9)).all()
    assert lost(found).sum() < 0.6 * lost(nearest).sum()


def test_one_block_is_a_channel() -> None:
    w, gram = problem(features=32)
    _, scales, zeros = quantize_blocks(w.T, 32, 8)
    affine = Affine(scales[0], zeros[0], zeros.dtype, axis=0)
    np.testing.assert_array_equal(
        gptq_blocks(w.T, gram, scales, zeros, 32).T, gptq(w, gram, affine)
    )


def test_a_corrected_bias_keeps_the_mean_of_the_output() -> None:
    x = correlated(0, 500, 30, 5)
    w, _ = problem(features=30)
    affine = channel_affine(w, 0, dtype=ml_dtypes.int4)
    back = dequantize(quantize(w, affine), affine)
    correction = bias_correction(w, back, x.mean(axis=0))
    assert correction.dtype == np.float32
    before = (x @ w.T.astype(np.float64)).mean(axis=0)
    after = (x @ back.T.astype(np.float64)).mean(axis=0)
    assert np.abs(before - after).max() > 0.01
    np.testing.assert_allclose(after + correction, before, rtol=0, atol=1e-5)
