"""Normalisation written out in parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from graphopt.passes.guards import from_front
from graphopt.rules import Const, Ops, Rejected, Rewrite, Var, absent, require, rule


@rule(
    "fuse-mean",
    min_opset=7,
    sample=[
        {"x": (2, 5, 8), "c": 1 / 40, "d": 40.0, "total.axes": [1, -1], "total.keepdims": 0},
        {"c": [[[1 / 40]]], "d": [40.0], "total.keepdims": 1},
        {"c": 1 / 80, "d": 80.0, "total.axes": None},
    ],
    refuses=[
        {"c": 1 / 41, "d": 41.0},
        {"x": (2, "n", 8)},
        {"c": [1 / 40] * 2, "d": [40.0] * 2},
        {"c": [[[[1 / 40]]]], "d": [[[[40.0]]]]},
    ],
)
def fuse_mean(op: Ops, x: Var, c: Const = absent(1.0), d: Const = absent(1.0)) -> Rewrite:
    """sum(x) * (1/n) or sum(x) / n => ReduceMean(x)."""
    total = op.ReduceSum(x)
    yield op.Mul(total, c) | op.Div(total, d)  # ---------------- before => after
    stated = total.attr("axes")
    axes = from_front(range(x.rank) if stated is None else stated, x.rank)
    require(x.dtype.kind == "f", "the values are not floating-point")
    count = math.prod(_number(x.shape[axis]) for axis in axes)
    divisor = d.scalar()
    off, eps = abs(count * c.scalar() - divisor), np.finfo(x.dtype).eps
    require(off <= eps * divisor != 0, "it does not divide by the number of elements")
    require(max(c.values.ndim, d.values.ndim) <= total.rank, "the constant adds axes")
    return op.ReduceMean(x, axes=axes, keepdims=total.attr("keepdims"))


def _number(size: int | str | None) -> int:
    if not isinstance(size, int):
        raise Rejected("the number of elements is not known")
    return size


@rule(
    "fuse-layer-norm",
    min_opset=17,
    sample={"x": (2, 5, 8), "gamma": (8,), "beta": (8,), "eps": 1e-5},
    refuses=[
        {"gamma": (5, 1), "beta": (5, 1)},
        {"gamma": (1,), "beta": (1,)},
        {"beta": (5, 8)},
        {"x": (2, 5, 1)},
    ],
)
def fuse_layer_norm(op: Ops, x: Var, gamma: Const, beta: Const, eps: Const) -> Rewrite:
    """(x - mean(x)) / sqrt(var(x) + eps) * gamma + beta => LayerNormalization(x, gamma, beta)."""
    d = op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))
    square = op.Mul(d, d) | op.Pow(d, 2.0)
    std = op.Sqrt(op.Add(op.ReduceMean(square, axes=[-1], keepdims=1), eps))
    normed = op.Div(d, std) | op.Mul(d, op.Reciprocal(std))
    yield op.Add(op.Mul(normed, gamma), beta)  # --------------- before => after
    require(gamma.shape == beta.shape == x.shape[-1:], "affine is not per-feature")
    return op.LayerNormalization(
        x, gamma, beta, axis=-1, epsilon=eps.scalar(), stash_type=precision(x)
    )


def precision(x: Var) -> int | None:
    """The type in which LayerNormalization computes, where that is not its default, float32."""
    return onnx.TensorProto.DOUBLE if x.dtype == np.float64 else None


@rule(
    "fuse-plain-layer-norm",
    min_opset=17,
    sample={"x": (2, 5, 8), "eps": 1e-5},
    refuses=[{"eps": [1e-5] * 8}],
)
def fuse_plain_layer_norm(op: Ops, x: Var, eps: Const) -> Rewrite:
    """(x - mean(x)) / sqrt(var(x) + eps) => LayerNormalization(x, 1)."""
    d = op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))
    square = op.Mul(d, d) | op.Pow(d, 2.0)
    std = op.Sqrt(op.Add(op.ReduceMean(square, axes=[-1], keepdims=1), eps))
    yield op.Div(d, std) | op.Mul(d, op.Reciprocal(std))  # ----- before => after
    features = x.shape[-1]
    if not isinstance(features, int):
        raise Rejected("the number of features is not known")
    ones = np.ones(features, np.float32)
    return op.LayerNormalization(x, ones, axis=-1, epsilon=eps.scalar(), stash_type=precision(x))


@rule(
    "fuse-layer-norm-mul",
    min_opset=17,
    sample=[
        {"x": (2, 5, 8), "s": (8,), "b": (8,), "c": (8,), "ln.axis": -1, "ln.epsilon": 1e-3},
        {"c": 0.5},
        {"s": (5, 8), "b": (5, 8), "c": (5, 8), "ln.axis": 1},
    ],
    refuses=[{"c": (5, 1)}, {"c": (5, 8)}, {"c": (1, 1, 1, 1)}],
)
def fuse_layer_norm_mul(op: Ops, x: Var, s: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """LayerNormalization(x, s, b) * c => LayerNormalization(x, s*c, b*c), c per feature."""
    ln = op.LayerNormalization(x, s, b)
    yield op.Mul(ln, c)  # -------------------------------------- before => after
    require(_is_per_feature(c, s), "the constant is not per feature")
    bias = None if b.is_absent else b.values * c.values
    return op.LayerNormalization(x, s.values * c.values, bias, **ln.attrs)


@rule(
    "fuse-layer-norm-add",
    min_opset=17,
    sample=[
        {"x": (2, 5, 8), "s": (8,), "b": (8,), "c": (8,), "ln.axis": -1, "ln.epsilon": 1e-3},
        {"s": (5, 8), "b": (5, 8), "c": (5, 8), "ln.axis": 1},
    ],
    refuses=[{"c": (5, 1)}, {"c": (2, 5, 8)}, {"x": (1, 5, 8), "c": (2, 5, 8)}],
)
def fuse_layer_norm_add(op: Ops, x: Var, s: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """LayerNormalization(x, s, b) + c => LayerNormalization(x, s, b + c), c per feature."""
    ln = op.LayerNormalization(x, s, b)
    yield op.Add(ln, c)  # -------------------------------------- before => after
    require(_is_per_feature(c, s), "the constant is not per feature")
    require(b.values.ndim <= s.values.ndim, "the bias has more axes than the scale")
    bias = np.broadcast_to(b.values + c.values, s.values.shape)
    return op.LayerNormalization(x, s, bias, **ln.attrs)


def _is_per_feature(c: Const, scale: Const) -> bool:
    """True for a constant of the scale's shape, or one number that adds no axis to it."""
    alike = c.values.shape == scale.values.shape
    return alike or (c.values.size == 1 and c.values.ndim <= scale.values.ndim)


_TOTALS: list[dict[str, Any]] = [
    {"x": (2, 5, 8), "y": (2, 5, 8)},
    {"x": (5, 8), "y": (5, 8)},
    {"x": ("n", 5, 8), "y": ("n", 5, 8)},
]
_UNEQUAL: list[dict[str, Any]] = [
    {"y": (8,)},
    {"x": (3, 2, 5, 8), "y": (3, 2, 5, 8)},
]


@rule(
    "sum-before-layer-norm",
    min_opset=17,
    sample=[{**each, "s": (8,), "b": (8,), "ln.axis": -1} for each in _TOTALS],
    refuses=_UNEQUAL,
)
def sum_before_layer_norm(op: Ops, x: Var, y: Var, s: Var, b: Var = absent()) -> Rewrite:
    """LayerNormalization(x + y) => LayerNormalization(Sum(x, y)).

    onnxruntime's CPU provider takes five times as long for the two in one operator, which it makes
    of an Add; of a Sum it does not.
    """
    total = op.Add(x, y)
    ln = op.LayerNormalization(total, s, b)
    yield ln  # ------------------------------------------------- before => after
    _require_skip(x, y)
    return op.LayerNormalization(op.Sum(x, y), s, b, **ln.attrs)


@rule(
    "sum-before-mean",
    min_opset=8,
    max_opset=16,
    sample=[{**each, "mean.axes": [-1], "mean.keepdims": None} for each in _TOTALS],
    refuses=[*_UNEQUAL, {"mean.axes": [0]}, {"mean.keepdims": 0, "x": (8, 8), "y": (8, 8)}],
)
def sum_before_mean(op: Ops, x: Var, y: Var) -> Rewrite:
    """(x + y) - mean(x + y) => the same of Sum(x, y): see sum-before-layer-norm."""
    total = op.Add(x, y)
    mean = op.ReduceMean(total)
    yield op.Sub(total, mean)  # -------------------------------- before => after
    _require_skip(x, y)
    is_last = from_front(mean.attr("axes") or (), total.rank) == [total.rank - 1]
    require(is_last and mean.attr("keepdims"), "the mean is not that of each row")
    again = op.Sum(x, y)
    return op.Sub(again, op.ReduceMean(again, **mean.attrs))


def _require_skip(x: Var, y: Var) -> None:
    """What onnxruntime requires before it makes one operator of a sum and a normalisation.

    It believes what a model declares of sizes, so that they need not be proven equal.
    """
    require(x.rank == y.rank and x.rank in (2, 3), "it is no sum of two batches of rows")
    require(x.dtype.kind == "f", "the values are not floating-point")
