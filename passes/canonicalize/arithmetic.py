"""Sums, products and bounds that say the same with fewer operators."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.passes.canonicalize.repeats import bounds, clipped
from graphopt.passes.guards import adds_no_axes
from graphopt.rules import Const, Ops, Rewrite, Var, require, rule

_WHOLE = "the values are not floating-point"
_LARGER = "the constant would be larger"
_NO_CLIP = "runtimes have no such Clip in every version"
_AXES = "the constant adds axes, or may"


@rule("subtract-negated", min_opset=7, sample=[{"x": (2, 3), "y": (2, 3)}, {"y": (3,)}])
def subtract_negated(op: Ops, x: Var, y: Var) -> Rewrite:
    """x + -y => x - y."""
    yield op.Add(x, op.Neg(y))  # ------------------------------- before => after
    return op.Sub(x, y)


@rule("add-negated", min_opset=7, sample=[{"x": (2, 3), "y": (2, 3)}, {"x": (3,)}])
def add_negated(op: Ops, x: Var, y: Var) -> Rewrite:
    """x - -y => x + y."""
    yield op.Sub(x, op.Neg(y))  # ------------------------------- before => after
    return op.Add(x, y)


@rule(
    "merge-additions",
    min_opset=7,
    sample=[
        {"x": (2, 3), "a": 0.5, "b": [1.0, 2.0, 0.25]},
        {"a": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "b": [[-0.5, 1.0, -1.5]]},
        {"a": 0.0, "b": [1.5, 2.5, 3.5]},
        {"a": 0.75, "b": -0.25},
    ],
    refuses=[
        {"a": [[1.0], [2.0]], "b": [1.0, 2.0, 3.0]},
        {"a": 8.0, "b": [1.0, 2.0, -5.0]},
        {"a": -1.0, "b": 2.0, "x": (3,)} | {"a": [2.0], "b": [-1.5]},
        {"x": [[1, 2, 3]], "a": 4, "b": 5},
    ],
)
def merge_additions(op: Ops, x: Var, a: Const, b: Const) -> Rewrite:
    """(x + a) + b => x + (a + b), a and b constants that do not cancel."""
    total = op.Add(op.Add(x, a), b)
    yield total  # ---------------------------------------------- before => after
    require(total.dtype.kind == "f", _WHOLE)
    both = a.values.astype(np.float64) + b.values
    require(both.size <= max(a.values.size, b.values.size), _LARGER)
    # where they cancel, the sum before was rounded at a size that is gone now
    largest = np.maximum(abs(a.values), abs(b.values))
    require((abs(both) >= largest / 2).all(), "the constants cancel")
    return op.Add(x, both)


@rule(
    "merge-multiplication-division",
    min_opset=7,
    sample=[{"x": (2, 3), "a": 0.5, "b": [1.5, 2.5, 3.0]}, {"a": (2, 3), "b": 0.7}, {"a": 0.0}],
    refuses=[
        {"a": [[1.0], [2.0]]},
        {"x": [[1, 2, 3]], "a": 4, "b": 2},
        {"a": 1e-30, "b": 1e30},
        {"b": 0.0},
    ],
)
def merge_multiplication_division(op: Ops, x: Var, a: Const, b: Const) -> Rewrite:
    """(x * a) / b => x * (a/b), a and b constant."""
    yield op.Div(op.Mul(x, a), b)  # ---------------------------- before => after
    return op.Mul(x, quotient(a, b, x))


@rule(
    "merge-division-multiplication",
    min_opset=7,
    sample=[{"x": (2, 3), "a": 0.5, "b": [1.5, 2.5, 3.0]}, {"a": [[2.0, 3.0, 4.0]], "b": 0.0}],
    refuses=[
        {"a": [[1.0], [2.0]]},
        {"x": [[1, 2, 3]], "a": 4, "b": 2},
        {"b": 1e-30, "a": 1e30},
        {"a": 0.0},
    ],
)
def merge_division_multiplication(op: Ops, x: Var, a: Const, b: Const) -> Rewrite:
    """(x / a) * b => x * (b/a), a and b constant."""
    yield op.Mul(op.Div(x, a), b)  # ---------------------------- before => after
    return op.Mul(x, quotient(b, a, x))


def quotient(a: Const, b: Const, x: Var) -> NDArray[Any]:
    """a / b in double precision; rejects what is not as exact in the type of `x`, or larger."""
    require(x.dtype.kind == "f", _WHOLE)
    ratio: NDArray[Any] = a.values.astype(np.float64) / b.values
    require(ratio.size <= max(a.values.size, b.values.size), _LARGER)
    small = np.finfo(x.dtype).tiny
    require(((abs(ratio) >= small) | (ratio == 0)).all(), "the quotient would underflow")
    return ratio


@rule(
    "clip-extremes",
    min_opset=8,
    sample=[{"x": (2, 3), "a": -0.5, "b": 0.5}, {"a": [[0.0]], "b": [0.25]}, {"b": -0.5}],
    refuses=[
        {"a": 1.0},
        {"a": [-0.5, -0.25, 0.0]},
        {"b": [[[0.5]]]},
        {"x": [[1, 2, 3]], "a": 1, "b": 2},
    ],
)
def clip_extremes(op: Ops, x: Var, a: Const, b: Const) -> Rewrite:
    """min(max(x, a), b) or max(min(x, b), a) => Clip(x, a, b), a <= b numbers."""
    yield op.Min(op.Max(x, a), b) | op.Max(op.Min(x, b), a)  # -- before => after
    low, high = a.scalar(), b.scalar()
    require(low <= high, "the bounds are not in order")
    require(x.dtype in (np.float16, np.float32), _NO_CLIP)
    require(adds_no_axes(a, x) and adds_no_axes(b, x), _AXES)
    return op.Clip(x, min=low, max=high)


@rule(
    "clip-positive",
    min_opset=8,
    sample=[{"x": (2, 3), "b": 0.5}, {"b": [[0.25]]}, {"b": 0.0}],
    refuses=[{"b": -0.5}, {"b": [0.5, 0.25, 0.75]}, {"b": [[[0.5]]]}],
)
def clip_positive(op: Ops, x: Var, b: Const) -> Rewrite:
    """min(Relu(x), b) => Clip(x, 0, b), b >= 0 a number."""
    yield op.Min(op.Relu(x), b)  # ------------------------------ before => after
    high = b.scalar()
    require(high >= 0, "the bound is negative")
    require(x.dtype in (np.float16, np.float32), _NO_CLIP)
    require(adds_no_axes(b, x), _AXES)
    return op.Clip(x, min=0.0, max=high)


@rule(
    "clip-at-zero",
    min_opset=8,
    sample=[{"x": (2, 3), "c": 0.0}, {"c": [[0.0]]}],
    refuses=[{"c": 0.5}, {"c": [[[0.0]]]}, {"x": [[1, 2]], "c": 0}, {"x": (3, 1), "c": [0.0] * 4}],
)
def clip_at_zero(op: Ops, x: Var, c: Const) -> Rewrite:
    """max(x, 0) => Relu(x), which runtimes fuse with what computes x."""
    yield op.Max(x, c)  # --------------------------------------- before => after
    require(c.scalar() == 0, "the constant is not zero")
    require(x.dtype.kind == "f", _WHOLE)
    require(adds_no_axes(c, x), _AXES)
    return op.Relu(x)


@rule(
    "merge-clip-relu",
    min_opset=6,
    sample=[
        {"x": (2, 3), "clip.min": -0.5, "clip.max": 0.5},
        {"clip.min": 0.25, "clip.max": None},
        {"clip.max": -0.25, "clip.min": None},
    ],
    refuses=[{"clip.min": 0.75}],
)
def merge_clip_relu(op: Ops, x: Var) -> Rewrite:
    """Relu(Clip(x, a, b)) => Clip(x, max(a, 0), max(b, 0))."""
    clip = op.Clip(x)
    yield op.Relu(clip)  # -------------------------------------- before => after
    low, high = (max(bound, 0.0) for bound in bounds(clip))
    return clipped(op, x, low, high)


@rule(
    "factor-out",
    min_opset=7,
    sample=[
        {"x": (2, 3, 4, 5), "s": (2, 3, 1, 1)},
        {"s": (3, 1, 1)},
        {"x": ("n", 3, "h", "w"), "s": ("n", 3, 1, 1)},
    ],
    refuses=[{"s": (2, 3, 4, 5)}, {"x": (2, 3, 1, 1)}, {"s": (2, 3, 4, "n")}],
)
def factor_out(op: Ops, x: Var, s: Var) -> Rewrite:
    """x + x * s => x * (s + 1), s smaller than x: one pass over what is large, not two."""
    total = op.Add(x, op.Mul(x, s))
    yield total  # ---------------------------------------------- before => after
    require(total.dtype.kind == "f", _WHOLE)
    ahead = total.rank - s.rank
    smaller = ahead > 0 or any(
        size == 1 != large for size, large in zip(s.shape, total.shape, strict=True)
    )
    require(smaller, "the factor is as large as the sum, or may be")
    return op.Mul(x, op.Add(s, np.ones((), total.dtype)))


@rule(
    "multiply-squares",
    min_opset=7,
    sample=[{"x": (2, 3), "y": (2, 3)}, {"y": (3,)}],
)
def multiply_squares(op: Ops, x: Var, y: Var) -> Rewrite:
    """x**2 + y**2 => x*x + y*y, which runtimes compute in less time."""
    total = op.Add(op.Pow(x, 2.0), op.Pow(y, 2.0))
    yield total  # ---------------------------------------------- before => after
    require(total.dtype.kind == x.dtype.kind == y.dtype.kind == "f", _WHOLE)
    return op.Add(op.Mul(x, x), op.Mul(y, y))
