"""Equalization: ranges come out equal, outputs stay, dead channels are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.kernels.affine import channel_affine, fake
from graphopt.kernels.equalization import LARGEST, cross_layer_scales, smooth_scales

ranges = arrays(np.float32, 5, elements=st.floats(2.0**-8, 2.0**8, width=32))


@given(ranges, ranges)
def test_both_ranges_become_their_geometric_mean(r1: np.ndarray, r2: np.ndarray) -> None:
    s = cross_layer_scales(r1, r2)
    assert s.dtype == np.float32
    np.testing.assert_allclose(r1 / s, np.sqrt(r1 * r2), rtol=1e-5)
    np.testing.assert_allclose(r2 * s, np.sqrt(r1 * r2), rtol=1e-5)


def test_layers_around_a_relu_compute_the_same_and_round_better() -> None:
    rng = np.random.default_rng(0)
    spread = np.geomspace(0.01, 100.0, 16)
    w1 = rng.standard_normal((16, 8)) * spread[:, None]
    b1, w2 = rng.standard_normal(16) * spread, rng.standard_normal((4, 16)) / spread
    x = rng.standard_normal((100, 8))

    def run(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(x @ w1.T + b1, 0.0) @ w2.T)

    def rounded(w1: np.ndarray, b1: np.ndarray, w2: np.ndarray) -> float:
        kept = (fake(w, channel_affine(w, None)) for w in (w1, w2))
        first, second = kept
        return float(np.square(run(first, b1, second) - run(w1, b1, w2)).mean())

    s = cross_layer_scales(np.abs(w1).max(axis=1), np.abs(w2).max(axis=0)).astype(np.float64)
    equal = w1 / s[:, None], b1 / s, w2 * s
    np.testing.assert_allclose(run(*equal), run(w1, b1, w2), rtol=1e-9, atol=1e-9)
    assert rounded(*equal) < 0.01 * rounded(w1, b1, w2)


@pytest.mark.parametrize("scales", [cross_layer_scales, smooth_scales])
def test_dead_channels_are_left_alone(scales: object) -> None:
    assert callable(scales)
    one = np.float32([0.0, 1.0, 0.0, np.inf, 1.0, np.nan, 1e-45, 3e38, 4.0])
    other = np.float32([1.0, 0.0, 0.0, 1.0, np.inf, 1.0, 3e38, 1e-45, 4.0])
    found = scales(one, other)
    assert found[:6].tolist() == [1.0] * 6
    assert found[6:8].tolist() == [1 / LARGEST, LARGEST]
    assert found[8] == 1.0


@given(ranges, ranges, st.floats(0.0, 1.0))
def test_smoothing_shares_the_difficulty(x: np.ndarray, w: np.ndarray, alpha: float) -> None:
    s = smooth_scales(x, w, alpha).astype(np.float64)
    # max|x / s| and max|w * s| have the product they had, split by alpha.
    np.testing.assert_allclose((x / s) * (w * s), x.astype(np.float64) * w, rtol=1e-6)
    product = x.astype(np.float64) * w
    np.testing.assert_allclose(x / s, product ** (1 - alpha), rtol=1e-5)


def test_smoothing_by_hand() -> None:
    # alpha 1/2: the largest of both sides meet in the middle.
    x, w = np.float32([2.0, 16.0, 9.0]), np.float32([2.0, 1.0, 1.0])
    assert smooth_scales(x, w).tolist() == [1.0, 4.0, 3.0]
    assert smooth_scales(x, w, 1.0).tolist() == [2.0, 16.0, 9.0]
    assert smooth_scales(x, w, 0.0).tolist() == [0.5, 1.0, 1.0]
