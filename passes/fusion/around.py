"""What else stands around a convolution or a product, and can be part of its weights."""

from __future__ import annotations

import numpy as np

from graphopt.passes.fusion.convolution import IMAGE, KERNEL, channel_vector
from graphopt.passes.guards import broadcasts_into
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

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
    outputs, width = w.values.shape[:2]
    group = conv.attr("group")
    require(c.values.size == 1 or x.shape[1] == group * width, "the channels are spread out")
    k = channel_vector(c, x.rank, group * width).reshape(group, 1, width)
    per_group = np.broadcast_to(k, (group, outputs // group, width)).reshape(outputs, width)
    rest = [1] * (w.values.ndim - 2)
    return op.Conv(x, w.values * per_group.reshape(outputs, width, *rest), b, **conv.attrs)


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
