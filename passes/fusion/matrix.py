"""What follows a matrix product and can be part of it."""

from __future__ import annotations

import numpy as np
import onnx

from graphopt.passes.guards import broadcasts_into, whole
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

_CHANNELS = np.random.default_rng(0).uniform(0.5, 1.5, 5)


@rule(
    "fuse-matmul-add",
    min_opset=7,
    sample=[
        {"a": (3, 4), "b": (4, 5), "c": (5,)},
        {"c": (1, 5)},
        {"c": (3, 1)},
        {"c": (3, 5)},
        {"c": 0.5},
    ],
    refuses=[
        {"a": (2, 3, 4)},
        {"a": (1, 4), "c": (3, 5)},
        {"b": (4, 1), "c": (5,)},
        {"c": (1, 3, 5)},
        {"b": (4,), "c": (3,)},
        {"a": [[1, 2]], "b": [[3], [4]], "c": [[5]]},
    ],
)
def fuse_matmul_add(op: Ops, a: Var, b: Var, c: Var) -> Rewrite:
    """MatMul(a, b) + c => Gemm(a, b, c), of matrices."""
    yield op.Add(op.MatMul(a, b), c)  # ------------------------- before => after
    require(a.rank == b.rank == 2, "the operands are not matrices")
    require(a.dtype in (np.float16, np.float32, np.float64), "runtimes have no such Gemm")
    require(broadcasts_into(c.shape, (a.shape[0], b.shape[1])), "what is added spreads out")
    return op.Gemm(a, b, c)


@rule(
    "fuse-gemm-batchnorm",
    min_opset=9,
    sample=[
        {
            "x": (3, 4),
            "w": (4, 5),
            "gamma": _CHANNELS,
            "beta": (5,),
            "mean": (5,),
            "var": _CHANNELS[::-1],
            "c": (5,),
            "gemm.alpha": 0.5,
            "gemm.beta": 2.0,
            "gemm.transA": 0,
            "gemm.transB": 0,
        },
        {"x": (4, 3), "w": (5, 4), "c": (1, 5), "gemm.transA": 1, "gemm.transB": 1},
        {"c": 0.5, "w": (5, 5), "x": (3, 5)},
    ],
    refuses=[{"c": (3, 1)}, {"c": (3, 5)}, {"x": (5, 4), "c": (5, 1)}],
)
def fuse_gemm_batchnorm(
    op: Ops,
    x: Var,
    w: Const,
    gamma: Const,
    beta: Const,
    mean: Const,
    var: Const,
    c: Const = absent(0.0),
) -> Rewrite:
    """BatchNormalization(Gemm(x, w, c)) => Gemm(x, w*k, (c - mean)*k + beta), k = gamma/std."""
    gemm = op.Gemm(x, w, c)
    bn = op.BatchNormalization(gemm, gamma, beta, mean, var, training_mode=0)
    yield bn  # ------------------------------------------------- before => after
    k = gamma.values / np.sqrt(var.values + bn.attr("epsilon"))
    added = c.values * gemm.attr("beta")
    require(broadcasts_into(added.shape, (1, len(k))), "what is added is not per feature")
    weights = w.values * (k[:, None] if gemm.attr("transB") else k)
    bias = (added.reshape(-1) - mean.values) * k + beta.values
    return op.Gemm(x, weights, bias, **gemm.attrs | {"beta": 1.0})


@rule(
    "fuse-one-hot-matmul",
    min_opset=12,
    sample=[
        {"i": [[0, 4, 2], [5, -1, 1]], "c": [[[0, 1, 2, 3, 4]]], "w": (5, 3)}
        | {"Unsqueeze.axes": [-1], "Reshape.shape": [2, 3, 1], "hot.to": 1},
        {"c": [0, 1, 2, 3, 4], "Unsqueeze.axes": [2], "Reshape.shape": [0, -1, 1]},
        {"i": np.array([[0, 4, 2], [5, -1, 1]], np.int32), "c": np.arange(5, dtype=np.int32)},
    ],
    refuses=[
        {"c": [[[0, 1, 2, 4, 3]]]},
        {"c": [[[[0, 1, 2, 3, 4]]]]},
        {"w": (2, 5, 3)},
        {"w": [[1.0], [2.0], [np.inf], [3.0], [4.0]]},
        {"c": [[[0], [1]]], "w": (1, 3)},
    ],
)
def fuse_one_hot_matmul(op: Ops, i: Var, c: Const, w: Const) -> Rewrite:
    """Cast(i == [0, 1, ...]) @ w => w[i]; what is none of the numbers picks zeros.

    They stand behind the rows of w, where -1 and what is too large end up.
    """
    apart = op.Unsqueeze(i) | op.Reshape(i)
    hot = op.Cast(op.Equal(apart, c))
    product = op.MatMul(hot, w)
    yield product  # -------------------------------------------- before => after
    require(i.dtype.kind in "iu" and i.dtype != np.uint64, "the indices are no integers")
    require(w.values.ndim == 2, "the weights are not a matrix")
    count = len(w.values)
    counts = c.values.shape[-1:] == (count,) and np.array_equal(c.values.ravel(), range(count))
    require(counts and c.values.ndim <= apart.rank, "the constant does not count up from zero")
    require(None not in apart.shape and apart.shape == (*i.shape, 1), "not one index a row")
    require(np.isfinite(w.values).all(), "zero times a weight is not zero")
    table = np.concatenate([w.values, np.zeros_like(w.values[:1])])
    wide = i if i.dtype == np.int64 else op.Cast(i, to=onnx.TensorProto.INT64)
    return op.Gather(table, op.Clip(wide, min=-1, max=count), axis=0)


@rule(
    "mean-by-matmul",
    min_opset=13,
    sample=[
        {"x": (2, 4, 6, 5), "w": (1, 6, 1, 1), "moved.perm": [0, 2, 1, 3], "shares.axis": 1}
        | {"conv.strides": None, "conv.pads": [0] * 4, "flat.shape": [0, 4, -1]},
        {"shares.axis": -3, "conv.pads": None, "flat.shape": [2, 20], "conv.strides": [1, 1]},
    ],
    refuses=[
        {"w": (3, 6, 1, 1), "flat.shape": [0, 12, -1]},
        {"w": (1, 6, 1, 2), "flat.shape": [0, 4, -1]},
        {"conv.strides": [1, 2]},
        {"conv.pads": [0, 0, 0, 1]},
        {"moved.perm": [0, 2, 3, 1], "flat.shape": [0, -1]},
        {"shares.axis": 2},
        {"x": (2, 1, 6, 5), "flat.shape": [0, 0, -1]},
    ],
)
def mean_by_matmul(op: Ops, x: Var, w: Const) -> Rewrite:
    """Reshape(Conv(Softmax(x moved), w)) => Reshape(MatMul(w, Softmax(x))), the mean of each row.

    What detectors make of a box's sides. Nothing moves, and the softmax runs where rows are.
    """
    moved = op.Transpose(x)
    shares = op.Softmax(moved)
    conv = op.Conv(shares, w)
    flat = op.Reshape(conv)
    yield flat  # ----------------------------------------------- before => after
    require(list(moved.attr("perm") or ()) == [0, 2, 1, 3], "it moves other axes")
    require(shares.attr("axis") % 4 == 1, "the softmax runs along another axis")
    require(w.values.shape[0] == 1 == w.values[0, 0].size, "it is not one weight for a channel")
    stays = not np.any(conv.attr("pads") or 0) and set(conv.attr("strides") or (1,)) == {1}
    require(stays and conv.attr("auto_pad") in ("NOTSET", None), "it pads, or goes in steps")
    require(0 not in whole(flat.attr("shape"))[1:], "a size is copied")
    mean = op.MatMul(w.values.reshape(1, -1), op.Softmax(x, axis=2))
    return op.Reshape(mean, shape=flat.attr("shape"), **flat.attrs)
