"""Streaming moments, regressions and im2col: against numpy and ONNX's reference convolution."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from graphopt.kernels import moments as module
from graphopt.kernels.moments import Gram, Moments, Regression, unfold

Array = NDArray[Any]


def split(x: Array, cuts: list[int]) -> list[Array]:
    return np.split(x, sorted(cut % (len(x) + 1) for cut in cuts))


@given(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 2**32 - 1))
def test_moments_of_batches_merged_are_those_of_all(n: int, cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, 3, 4)) * [[1.0], [1e-3], [1e3]] + [[0.0], [1e3], [1.0]]).astype(
        np.float32
    )
    parts = [Moments(3) for _ in range(len(cuts) + 1)]
    for moments, part in zip(parts, split(x, cuts), strict=True):
        moments.add(part)
    merged = parts[0]
    for other in parts[1:]:
        merged.merge(other)
    assert merged.count == 4 * n
    if n:
        wide = x.astype(np.float64)
        np.testing.assert_allclose(merged.mean, wide.mean(axis=(0, 2)), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.variance, wide.var(axis=(0, 2)), rtol=1e-9)
        m2 = np.square(wide - wide.mean(axis=(0, 2), keepdims=True)).sum(axis=(0, 2))
        np.testing.assert_allclose(merged.m2, m2, rtol=1e-9)
    else:
        assert merged.variance.tolist() == [0.0] * 3


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_moments_along_any_axis(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    x = np.random.default_rng(0).standard_normal((5, 4, 3))
    moments = Moments(x.shape[axis])
    moments.add(x, axis)
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), atol=1e-15)
    np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=1e-13)
    with pytest.raises(ValueError, match="for 9"):
        Moments(9).add(x, axis)


def test_a_large_mean_costs_no_digits() -> None:
    # 1e8 squared has no digit left for a variance of 1e-2 in float64.
    x = np.random.default_rng(0).standard_normal((64, 1)) * 0.1 + 1e8
    moments = Moments(1)
    for row in np.split(x, 8):
        moments.add(row)
    np.testing.assert_allclose(moments.variance, x.var(axis=0), rtol=1e-6)


@given(
    st.integers(0, 30),
    st.lists(st.integers(0, 30), max_size=3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_gram_of_batches_merged_is_that_of_all(
    n: int, cuts: list[int], bias: bool, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((n, 5)).astype(np.float32)
    parts = [Gram(5, bias) for _ in range(len(cuts) + 1)]
    for gram, part in zip(parts, split(x, cuts), strict=True):
        gram.add(part)
    merged = parts[0]
    for other in parts[1:]:
        merged.merge(other)
    wide = x.astype(np.float64)
    full = np.column_stack([wide, np.ones(n)]) if bias else wide
    assert merged.count == n
    np.testing.assert_allclose(merged.matrix, full.T @ full, rtol=1e-12, atol=1e-12)
    assert (merged.matrix == merged.matrix.T).all()
    if bias and n:
        np.testing.assert_allclose(merged.mean, wide.mean(axis=0), rtol=1e-12, atol=1e-12)


def test_gram_of_rows_in_chunks_and_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 10)
    x = np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float16)
    gram = Gram(4)
    gram.add(x)
    rows = x.reshape(-1, 4).astype(np.float64)
    assert gram.count == 14
    np.testing.assert_allclose(gram.matrix, rows.T @ rows, rtol=1e-13)


def test_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="3 features for 4"):
        Gram(4).add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="Gram matrices"):
        Gram(4, bias=True).merge(Gram(5))
    with pytest.raises(ValueError, match="without bias"):
        _ = Gram(4).mean
    with pytest.raises(ValueError, match="2 channels for 3"):
        Moments(3).merge(Moments(2))


def convolution(x: Array, w: Array, attributes: dict[str, Any]) -> Array:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((2, 3, 11), [3], {}),
        ((2, 4, 11), [4], {"strides": [3], "pads": [2, 1], "dilations": [2], "group": 2}),
        ((1, 3, 7, 9), [1, 1], {}),
        ((2, 3, 7, 9), [3, 2], {"pads": [1, 0, 2, 1]}),
        ((2, 6, 8, 9), [3, 3], {"strides": [2, 3], "pads": [1, 1, 1, 1], "group": 3}),
        ((1, 4, 9, 9), [2, 3], {"dilations": [3, 2], "strides": [1, 2], "group": 4}),
        ((1, 2, 5, 6, 4), [2, 3, 2], {"strides": [2, 1, 1], "pads": [0, 1, 0, 1, 0, 1]}),
    ],
)
def test_a_convolution_is_a_product_with_unfolded_rows(
    shape: tuple[int, ...], kernel: list[int], attributes: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    group = attributes.get("group", 1)
    x = rng.integers(-9, 9, shape).astype(np.float32)  # products are exact
    w = rng.integers(-9, 9, (2 * group, shape[1] // group, *kernel)).astype(np.float32)
    expected = np.moveaxis(convolution(x, w, attributes), 1, -1)
    rows = unfold(x, kernel, **attributes)
    assert rows.shape == (group, expected[..., 0].size, w[0].size)
    assert rows.dtype == np.float32
    weights = w.reshape(group, 2, -1)
    found = [r @ v.T for r, v in zip(rows, weights, strict=True)]
    np.testing.assert_array_equal(np.concatenate(found, axis=1).reshape(expected.shape), expected)


def test_a_kernel_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="larger"):
        unfold(np.zeros((1, 1, 2, 5), np.float32), (3, 3))


# -- regressions -----------------------------------------------------------------------------------


def same(found: Regression, x: Array, y: Array) -> None:
    """What is known of rows and targets, against numpy on all of them."""
    wide, y = np.column_stack([x, np.ones(len(x))]).astype(np.float64), y.astype(np.float64)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    assert found.count == len(x)
    np.testing.assert_allclose(found.matrix, wide.T @ wide, **close)
    np.testing.assert_allclose(found.cross, wide.T @ y, **close)
    np.testing.assert_allclose(found.energy, np.square(y).sum(axis=0), **close)
    if len(x):
        np.testing.assert_allclose(found.variance, y.var(axis=0), rtol=1e-9, atol=1e-12)


@given(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=3), st.integers(0, 2**32 - 1))
def test_regressions_of_batches_merged_are_that_of_all(n: int, cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal((n, size)).astype(np.float32) for size in (4, 3))
    parts = [Regression(4, 3) for _ in range(len(cuts) + 1)]
    for each, rows, targets in zip(parts, split(x, cuts), split(y, cuts), strict=True):
        each.add(rows, targets)
    merged = parts[0]
    for other in parts[1:]:
        merged.merge(other)
    same(merged, x, y)


def test_regressions_of_rows_in_chunks_and_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 15)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 9, 3)).astype(np.float16)
    found = Regression(4, 3)
    found.add(x, y)
    same(found, x.reshape(-1, 4), y.reshape(-1, 3))


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_many_regressions_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 11, 4)).astype(np.float32), rng.standard_normal((5, 11, 2))
    states = [Regression(4, 2) for _ in range(5)]
    Regression.add_all(states, x[:, :7], y[:, :7])
    Regression.add_all(states, x[:, 7:], y[:, 7:])
    for state, rows, targets in zip(states, x, y, strict=True):
        same(state, rows, targets)


def test_an_output_that_does_not_vary_has_no_variance_below_zero() -> None:
    found = Regression(1, 1)
    found.add(np.zeros((7, 1)), np.full((7, 1), 0.1))
    assert 0 <= found.variance[0] < 1e-15


def test_regressions_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"rows \(2, 3\) and targets \(2, 2\)"):
        Regression(4, 2).add(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"rows \(2, 4\) and targets \(3, 2\)"):
        Regression(4, 2).add(np.zeros((2, 4)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="targets"):
        Regression(4, 2).add(np.zeros((2, 4)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="regressions"):
        Regression(4, 2).merge(Regression(4, 3))
