"""Products and sums with constants, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.passes.fusion.convolution import channel_vector
from graphopt.passes.guards import broadcasts_into
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

_CHANNELS = np.random.default_rng(0).uniform(0.5, 1.5, 3).reshape(3, 1, 1)
_POSITIVE = [0.5, 0.7, 1.1]


@rule(
    "fuse-scale-shift",
    min_opset=9,
    sample=[
        {"x": (2, 3, 4, 5), "c": _CHANNELS, "d": (3, 1, 1)},
        {"c": _CHANNELS[None], "d": 0.5},
        {"c": 2.0, "d": (1, 3, 1, 1)},
        {"x": ("n", 3, "h", 5)},
        {"c": 2.0, "d": 0.5},
    ],
    refuses=[
        {"x": (2, 1, 4, 5)},
        {"c": (5,)},
        {"d": (4, 1)},
        {"x": (2, 3, 4), "c": 2.0, "d": 0.5},
        {"x": (2, "n", 4, 5), "c": 2.0, "d": 0.5},
        {"x": (3, 1)},
        {"d": (1, 1, 3, 1, 1)},
        {"d": (2, 3, 1, 1)},
    ],
)
def fuse_scale_shift(op: Ops, x: Var, c: Const, d: Const) -> Rewrite:
    """x * c + d => BatchNormalization(x, c, d, 0, 1), c and d per channel.

    It runs in half the time in onnxruntime, which can keep its blocked layout around it. Numbers
    that are the same for all channels are only spread out over those of an image.
    """
    yield op.Add(op.Mul(x, c), d)  # ---------------------------- before => after
    channels = max(c.values.size, d.values.size)
    require(x.rank > 2, "there are no channels")
    if channels == 1 and x.rank > 3 and isinstance(x.shape[1], int):
        channels = x.shape[1]
    require(1 < channels == x.shape[1], "the constants are not per channel")
    scale, shift = (channel_vector(each, x.rank, channels) for each in (c, d))
    zeros = np.zeros(channels, scale.dtype)
    return op.BatchNormalization(x, scale, shift, zeros, zeros + 1, epsilon=0.0)


@rule(
    "fuse-mul-batchnorm",
    min_opset=9,
    sample=[
        {"x": (2, 3, 4, 5), "c": 0.5, "gamma": (3,), "beta": (3,), "mean": (3,), "var": _POSITIVE},
        {"c": _CHANNELS},
        {"x": (2, 3), "c": [[0.5]]},
    ],
    refuses=[{"c": (5,)}, {"x": (2, 1, 4, 5), "c": _CHANNELS}, {"c": (2, 1, 1, 1)}],
)
def fuse_mul_batchnorm(
    op: Ops, x: Var, c: Const, gamma: Const, beta: Const, mean: Const, var: Const
) -> Rewrite:
    """BatchNormalization(x * c, gamma, beta, mean, var) => the same of x, gamma times c."""
    bn = op.BatchNormalization(op.Mul(x, c), gamma, beta, mean, var, training_mode=0)
    yield bn  # ------------------------------------------------- before => after
    channels = len(gamma.values)
    require(c.values.size == 1 or x.shape[1] == channels, "the channels are spread out")
    k = gamma.values / np.sqrt(var.values + bn.attr("epsilon"))
    zeros = np.zeros_like(k)
    shift = beta.values - mean.values * k
    scale = k * channel_vector(c, x.rank, channels)
    return op.BatchNormalization(x, scale, shift, zeros, zeros + 1, epsilon=0.0)


@rule(
    "fuse-matmul-mul",
    min_opset=7,
    sample=[
        {"x": (2, 3, 4), "w": (4, 5), "c": (5,)},
        {"c": 0.5},
        {"c": [[0.5]]},
        {"w": (2, 4, 5), "c": (1, 5)},
        {"c": (1, 1, 5)},
    ],
    refuses=[
        {"c": (3, 1)},
        {"c": (3, 5)},
        {"c": (2, 1, 5)},
        {"c": (1, 1, 1, 5)},
        {"w": (4, 1), "c": (5,)},
        {"w": (4,), "x": (2, 4, 4), "c": (4,)},
        {"x": (4,), "c": (3, 1)},
    ],
)
def fuse_matmul_mul(op: Ops, x: Var, w: Const, c: Const) -> Rewrite:
    """MatMul(x, w) * c => MatMul(x, w*c), c per column."""
    product = op.MatMul(x, w)
    yield op.Mul(product, c)  # --------------------------------- before => after
    require(w.values.ndim > 1, "the weights are not a matrix")
    require(c.values.ndim <= product.rank, "the constant adds axes")
    row = _plain_row(c.values)
    require(broadcasts_into(row.shape, (1, w.values.shape[-1])), "it is not per column")
    return op.MatMul(x, w.values * row)


def _plain_row(values: NDArray[Any]) -> NDArray[Any]:
    """The constant beside a matrix, without what axes of size one it has in front of two."""
    ahead = max(values.ndim - 2, 0)
    return values.reshape(values.shape[ahead:]) if set(values.shape[:ahead]) <= {1} else values


@rule(
    "fuse-biased-matmul-mul",
    min_opset=7,
    sample=[
        {"x": (2, 3, 4), "w": (4, 5), "b": (5,), "c": (5,)},
        {"c": 0.5},
        {"b": (1, 1, 5), "c": (1, 1, 5)},
        {"b": 0.5, "c": [[0.5]]},
    ],
    refuses=[
        {"c": (3, 1)},
        {"c": (3, 5)},
        {"c": (1, 1, 1, 5)},
        {"b": (3, 5)},
        {"w": (4, 1), "b": (1,), "c": (5,)},
        {"w": (4, 1), "c": (1,)},
        {"w": (2, 4, 5)},
    ],
)
def fuse_biased_matmul_mul(op: Ops, x: Var, w: Const, b: Const, c: Const) -> Rewrite:
    """(MatMul(x, w) + b) * c => MatMul(x, w*c) + b*c, both per column."""
    product = op.MatMul(x, w)
    yield op.Mul(op.Add(product, b), c)  # ---------------------- before => after
    require(w.values.ndim == 2, "the weights are not a matrix")
    require(max(b.values.ndim, c.values.ndim) <= product.rank, "a constant adds axes")
    bias, row = (_plain_row(each.values) for each in (b, c))
    columns = (1, w.values.shape[1])
    fits = broadcasts_into(bias.shape, columns) and broadcasts_into(row.shape, columns)
    require(fits, "a constant is not per column")
    return op.Add(op.MatMul(x, w.values * row), bias * row)


@rule(
    "fuse-matmuls",
    min_opset=7,
    sample=[{"x": (2, 3, 4), "v": (4, 5), "w": (5, 6)}, {"v": (4, 20), "w": (20, 4)}],
    refuses=[{"v": (4, 2), "w": (2, 6)}, {"w": (5,)}, {"w": (2, 5, 6)}, {"v": (2, 4, 5)}],
)
def fuse_matmuls(op: Ops, x: Var, v: Const, w: Const) -> Rewrite:
    """MatMul(MatMul(x, v), w) => MatMul(x, v @ w), where that is less to multiply and to store."""
    yield op.MatMul(op.MatMul(x, v), w)  # ---------------------- before => after
    require(v.values.ndim == w.values.ndim == 2, "the weights are not matrices")
    inputs, between = v.values.shape
    outputs = w.values.shape[1]
    require(inputs * outputs <= between * (inputs + outputs), "the product would be larger")
    return op.MatMul(x, v.values.astype(np.float64) @ w.values)


@rule(
    "fuse-gemm-mul",
    min_opset=7,
    sample=[
        {"x": (3, 4), "w": (4, 5), "b": (5,), "c": (5,), "gemm.alpha": 0.5, "gemm.beta": 2.0}
        | {"gemm.transB": 0},
        {"w": (5, 4), "c": (1, 5), "b": (3, 5), "gemm.transB": 1, "gemm.beta": 1.0},
        {"c": 0.5, "b": (3, 1)},
    ],
    refuses=[{"c": (3, 1)}, {"c": (3, 5)}, {"c": (1, 1, 5)}, {"w": (4, 1), "b": 0.5}],
)
def fuse_gemm_mul(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Gemm(x, w, b) * c => Gemm(x, w*c, b*c), c per column."""
    gemm = op.Gemm(x, w, b)
    yield op.Mul(gemm, c)  # ------------------------------------ before => after
    transposed = gemm.attr("transB")
    columns = w.values.shape[0 if transposed else 1]
    require(broadcasts_into(c.values.shape, (1, columns)), "the constant is not per column")
    k = c.values.reshape(-1)
    bias = None if b.is_absent else b.values * c.values
    return op.Gemm(x, w.values * (k[:, None] if transposed else k), bias, **gemm.attrs)


@rule(
    "fuse-gemm-add",
    min_opset=7,
    sample=[
        {"x": (3, 4), "w": (4, 5), "b": (5,), "c": (5,), "gemm.beta": 2.0, "gemm.transB": 0},
        {"w": (5, 4), "c": 0.5, "b": (3, 1), "gemm.transB": 1, "gemm.beta": 1.0},
        {"c": [[1.0] * 5] * 3, "b": 0.5},
    ],
    refuses=[
        {"c": (1, 1, 5)},
        {"x": (1, 4), "c": (3, 5)},
        {"w": (4, 1), "b": 0.5},
        {"b": 0.5, "c": [-1.0] * 5},
    ],
)
def fuse_gemm_add(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Gemm(x, w, b) + c => Gemm(x, w, b + c)."""
    gemm = op.Gemm(x, w, b)
    yield op.Add(gemm, c)  # ------------------------------------ before => after
    require(broadcasts_into(c.values.shape, gemm.shape), "what is added spreads out")
    stated = b.values * gemm.attr("beta")
    both = stated + c.values
    # where they cancel, the sum before was rounded at a size that is gone now
    largest = np.maximum(abs(stated), abs(c.values))
    require((abs(both) >= largest / 2).all(), "the constants cancel")
    return op.Gemm(x, w, both, **gemm.attrs | {"beta": 1.0})
