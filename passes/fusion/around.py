"""What else stands around a convolution or a product, and can be part of its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.passes.fusion.convolution import IMAGE, KERNEL, channel_vector
from graphopt.passes.guards import broadcasts_into, whole
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

_POSITIVE = np.random.default_rng(1).uniform(0.5, 1.5, 6)
_HEADS = {"x": (2, 3, 8), "w": (8, 6), "b": (6,), "c": 0.3, "target": [2, 3, 2, 3]}


@rule(
    "fuse-mul-conv",
    min_opset=7,
    sample=[
        {"x": (2, 6, 8, 7), "w": (4, 6, 3, 3), "c": (6, 1, 1), "b": (4,)}
        | {"conv.group": 1, "conv.pads": [1, 0, 2, 1]},
        {"w": (4, 3, 3, 3), "c": (1, 6, 1, 1), "conv.group": 2},
        {"w": (6, 1, 3, 3), "b": (6,), "conv.group": 6},
        {"c": 0.5},
    ],
    refuses=[
        {"c": (7,)},
        {"c": (2, 1, 1, 1)},
        {"x": (2, 1, 8, 7)},
        {"x": (6, 8, 7), "c": (1, 6, 1, 1)},
        {"c": (1, 1, 6, 1, 1), "x": (6, 8, 7)} | {"x": (2, 6, 6, 6), "c": (6,)},
    ],
)
def fuse_mul_conv(op: Ops, x: Var, w: Const, c: Const, b: Const = absent()) -> Rewrite:
    """Conv(x * c, w, b) => Conv(x, w*c, b), c per channel: what is padded with stays zero."""
    conv = op.Conv(op.Mul(x, c), w, b)
    yield conv  # ----------------------------------------------- before => after
    group, width = conv.attr("group"), w.values.shape[1]
    require(c.values.size == 1 or x.shape[1] == group * width, "the channels are spread out")
    k = channel_vector(c, x.rank, group * width)
    return op.Conv(x, w.values * _per_input(k, w, group), b, **conv.attrs)


_UNPADDED: list[dict[str, Any]] = [
    {"x": (2, 6, 8, 7), "w": (4, 6, 3, 3), "b": (4,), "conv.group": None, "conv.pads": [0] * 4}
    | {"conv.auto_pad": None, "conv.strides": [2, 1]},
    {"w": (4, 3, 1, 1), "conv.group": 2},
    {"conv.auto_pad": "VALID", "conv.pads": None},
]
_PADDED: list[dict[str, Any]] = [
    {"conv.pads": [0, 1, 0, 0]},
    {"conv.auto_pad": "SAME_UPPER", "conv.pads": None},
]


def _shifted(w: Const, shift: NDArray[Any], group: int) -> NDArray[Any]:
    """What a constant per input channel adds to each output channel, where nothing is padded."""
    outputs, width = w.values.shape[:2]
    total = w.values.reshape(group, outputs // group, width, -1).sum(-1, dtype=np.float64)
    added = np.einsum("gow,gw->go", total, shift.reshape(group, width).astype(np.float64))
    return np.asarray(added.reshape(outputs))


def _pads_nothing(conv: Var) -> bool:
    stated = conv.attr("auto_pad") in ("NOTSET", "VALID", None)
    return stated and not np.any(conv.attr("pads") or 0)


@rule(
    "fuse-add-conv",
    min_opset=7,
    sample=[
        {**_UNPADDED[0], "c": (6, 1, 1)},
        {**_UNPADDED[1], "c": (1, 6, 1, 1)},
        {**_UNPADDED[2], "c": 0.5},
    ],
    refuses=[
        *_PADDED,
        {"c": (7,)},
        {"c": (2, 1, 1, 1)},
        {"x": (2, 1, 8, 7)},
        {"x": (6, 8, 7), "c": (1, 6, 1, 1)},
    ],
)
def fuse_add_conv(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Conv(x + c, w, b) => Conv(x, w, b + sum(w*c)), c per channel, where nothing is padded."""
    conv = op.Conv(op.Add(x, c), w, b)
    yield conv  # ----------------------------------------------- before => after
    require(_pads_nothing(conv), "it pads, and what it pads with is not moved")
    group, width = conv.attr("group"), w.values.shape[1]
    require(c.values.size == 1 or x.shape[1] == group * width, "the channels are spread out")
    bias = b.values + _shifted(w, channel_vector(c, x.rank, group * width), group)
    return op.Conv(x, w, bias, **conv.attrs)


@rule(
    "fuse-batchnorm-conv",
    min_opset=9,
    sample=[
        {**each, "gamma": _POSITIVE, "beta": (6,), "mean": (6,), "var": _POSITIVE}
        for each in _UNPADDED
    ],
    refuses=_PADDED,
)
def fuse_batchnorm_conv(
    op: Ops,
    x: Var,
    w: Const,
    gamma: Const,
    beta: Const,
    mean: Const,
    var: Const,
    b: Const = absent(0.0),
) -> Rewrite:
    """Conv(BatchNormalization(x), w, b) => Conv(x, w*k, b + sum(w*(beta - mean*k))), k = gamma/std.

    Only where nothing is padded: what is padded with is not normalised.
    """
    bn = op.BatchNormalization(x, gamma, beta, mean, var, training_mode=0)
    conv = op.Conv(bn, w, b)
    yield conv  # ----------------------------------------------- before => after
    require(_pads_nothing(conv), "it pads, and what it pads with is not normalised")
    group = conv.attr("group")
    k = gamma.values / np.sqrt(var.values + bn.attr("epsilon"))
    bias = b.values + _shifted(w, beta.values - mean.values * k, group)
    return op.Conv(x, w.values * _per_input(k, w, group), bias, **conv.attrs)


def _per_input(k: NDArray[Any], w: Const, group: int) -> NDArray[Any]:
    """A vector over input channels, shaped to scale weights [outputs, inputs / group, ...]."""
    outputs, width = w.values.shape[:2]
    spread = np.broadcast_to(k.reshape(group, 1, width), (group, outputs // group, width))
    return spread.reshape(outputs, width, *[1] * (w.values.ndim - 2))


@rule(
    "fuse-convs",
    min_opset=7,
    sample=[
        {"x": (2, 6, 8, 7), "v": (5, 6, 1, 1), "a": (5,), "w": (4, 5, 1, 1), "b": (4,)}
        | {"first.pads": None, "first.strides": None, "second.strides": [1, 2]},
        {"v": (8, 6, 1, 1), "a": (8,), "w": (4, 8, 3, 2)},
        {"v": (5, 6, 3, 3), "first.pads": [1, 0, 1, 2]}
        | {"first.strides": [2, 1], "second.strides": None},
    ],
    refuses=[
        {"v": (2, 6, 1, 1), "a": (2,), "w": (4, 2, 1, 1)},
        {"v": (6, 2, 1, 1), "a": (6,), "w": (4, 6, 1, 1), "first.group": 3},
        {"v": (8, 6, 1, 1), "a": (8,), "w": (4, 4, 1, 1), "second.group": 2},
        {"v": (5, 6, 2, 2), "w": (4, 5, 2, 2)},
        {"v": (5, 6, 2, 2), "second.pads": [0, 1, 0, 0]},
        {"v": (5, 6, 2, 2)},
        {"first.pads": [0, 1, 0, 0], "w": (4, 5, 3, 2)},
        {"first.strides": [2, 1], "w": (4, 5, 3, 2)},
    ],
)
def fuse_convs(
    op: Ops, x: Var, v: Const, w: Const, a: Const = absent(0.0), b: Const = absent(0.0)
) -> Rewrite:
    """Conv(Conv(x, v, a), w, b) => Conv(x, w @ v, w @ a + b), where that is less to multiply.

    One of them looks at single points, and what is between them is neither padded nor skipped.
    """
    first = op.Conv(x, v, a)
    second = op.Conv(first, w, b)
    yield second  # --------------------------------------------- before => after
    require(first.attr("group") == second.attr("group") == 1, "channels are in groups")
    require(_pads_nothing(second), "what is between them is padded")
    outputs, between = w.values.shape[:2]
    inner, outer = (each.values.astype(np.float64) for each in (v, w))
    if _is_pointwise(first, v) and _pads_nothing(first):
        both, kept = np.einsum("oc...,ci->oi...", outer, inner.reshape(between, -1)), second
    else:
        require(_is_pointwise(second, w), "neither looks at single points of the other")
        both, kept = np.einsum("oc,c...->o...", outer.reshape(outputs, -1), inner), first
    require(both.size <= inner.size + outer.size, "there would be more to multiply")
    bias = b.values + _shifted(w, np.broadcast_to(a.values, between), 1)
    return op.Conv(x, both, bias, **kept.attrs)


def _is_pointwise(conv: Var, w: Const) -> bool:
    """True for a kernel of single points that skips none."""
    return set(w.values.shape[2:]) <= {1} and set(whole(conv.attr("strides"))) <= {1}


@rule(
    "drop-zero-bias",
    sample=[{"x": IMAGE, "w": KERNEL, "b": [0.0] * 4, "conv.strides": [2, 1]}],
    refuses=[{"b": [0.0, 0.0, 0.5, 0.0]}],
)
def drop_zero_bias(op: Ops, x: Var, w: Var, b: Const) -> Rewrite:
    """Conv(x, w, zeros) => Conv(x, w)."""
    conv = op.Conv(x, w, b)
    yield conv  # ----------------------------------------------- before => after
    require(not b.values.any(), "the bias is not zero")
    return op.Conv(x, w, **conv.attrs)


@rule(
    "drop-zero-addend",
    min_opset=11,
    sample=[
        {"a": (3, 4), "b": (4, 5), "c": [0.0] * 5, "gemm.alpha": 0.5, "gemm.beta": 2.0},
        {"c": 0.0},
    ],
    refuses=[{"c": [0.0, 0.0, 0.5, 0.0, 0.0]}],
)
def drop_zero_addend(op: Ops, a: Var, b: Var, c: Const) -> Rewrite:
    """Gemm(a, b, zeros) => Gemm(a, b)."""
    gemm = op.Gemm(a, b, c)
    yield gemm  # ----------------------------------------------- before => after
    require(not c.values.any(), "what is added is not zero")
    return op.Gemm(a, b, **gemm.attrs)


@rule(
    "fuse-matmul-div",
    min_opset=7,
    sample=[
        {"x": (2, 3, 4), "w": (4, 5), "c": [0.5, 0.7, 1.1, 1.3, 1.7]},
        {"c": 0.7},
        {"w": (2, 4, 5), "c": [[0.7]]},
    ],
    refuses=[
        {"c": (3, 1)},
        {"c": (3, 5)},
        {"c": (1, 1, 1, 5)},
        {"w": (4, 1), "c": (5,)},
        {"c": 0.0},
        {"w": (4,), "x": (2, 4, 4), "c": (4,)},
        {"x": (4,), "c": [[0.7]]},
    ],
)
def fuse_matmul_div(op: Ops, x: Var, w: Const, c: Const) -> Rewrite:
    """MatMul(x, w) / c => MatMul(x, w/c), c per column."""
    product = op.MatMul(x, w)
    yield op.Div(product, c)  # --------------------------------- before => after
    require(w.values.ndim > 1, "the weights are not a matrix")
    require(broadcasts_into(c.values.shape, (1, w.values.shape[-1])), "it is not per column")
    require(c.values.ndim <= product.rank, "the constant adds axes")
    return op.MatMul(x, w.values / c.values)


@rule(
    "fuse-projection-scale",
    min_opset=7,
    sample=[
        {**_HEADS, "c": 0.3, "moved.perm": [0, 2, 1, 3]},
        {"w": (2, 8, 6), "c": [[[2.5]]]},
        {"x": (3, 0, 8), "target": [0, 3, 2, 3], "apart.allowzero": 1},
    ],
    refuses=[
        {"c": [0.3, 0.4, 0.5]},
        {"c": [[[[[0.3]]]]]},
        {"w": (8,), "b": 0.5, "target": [1, 2, 3, 1], "c": [0.5, 0.7]},
    ],
)
def fuse_projection_scale(
    op: Ops, x: Var, w: Const, c: Const, target: Const, b: Const = absent(0.0)
) -> Rewrite:
    """f(MatMul(x, w) + b) * c => f(MatMul(x, w*c) + b*c), f moves elements, c one number."""
    product = op.MatMul(x, w)
    biased = op.Add(product, b)
    apart = op.Reshape(biased | product, target)
    moved = op.Transpose(apart)
    scaled = op.Mul(moved, c)
    yield scaled  # --------------------------------------------- before => after
    factor = c.scalar()
    made = op.MatMul(x, w.values * factor)
    if not b.is_absent:
        made = op.Add(made, b.values * factor)
    return op.Transpose(op.Reshape(made, target, **apart.attrs), **moved.attrs)


@rule(
    "merge-matmul-scales",
    min_opset=7,
    sample=[{"x": (2, 3, 4), "y": (2, 4, 5), "a": 0.3, "b": 0.7}, {"a": [[0.3]]}],
    refuses=[
        {"a": (4,)},
        {"b": (5,)},
        {"b": [[[[0.7]]]]},
        {"a": [[[[0.3]]]]},
        {"a": 1e-30, "b": 1e-30},
    ],
)
def merge_matmul_scales(op: Ops, x: Var, y: Var, a: Const, b: Const) -> Rewrite:
    """MatMul(x * a, y * b) => MatMul(x * (a*b), y), a and b numbers."""
    product = op.MatMul(op.Mul(x, a), op.Mul(y, b))
    yield product  # -------------------------------------------- before => after
    both = a.scalar() * b.scalar()
    require(a.values.ndim <= x.rank and b.values.ndim <= y.rank, "a factor adds axes")
    require(product.dtype.kind == "f", "the values are not floating-point")
    require(abs(both) >= np.finfo(product.dtype).tiny, "the factor would underflow")
    return op.MatMul(op.Mul(x, np.asarray(both)), y)
