"""Operators applied twice: what undoes itself, what the second time changes nothing, bounds."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.rules import Const, Ops, Rejected, Rewrite, Var, require, rule


@rule("cancel-negations", sample={"x": (2, 3)})
def cancel_negations(op: Ops, x: Var) -> Rewrite:
    """Neg(Neg(x)) => x."""
    yield op.Neg(op.Neg(x))  # ---------------------------------- before => after
    return x


@rule("cancel-nots", sample={"x": [[True, False], [False, True]]})
def cancel_nots(op: Ops, x: Var) -> Rewrite:
    """Not(Not(x)) => x."""
    yield op.Not(op.Not(x))  # ---------------------------------- before => after
    return x


@rule("merge-idempotent", min_opset=6, sample={"x": (2, 3)})
def merge_idempotent(op: Ops, x: Var) -> Rewrite:
    """f(f(x)) => f(x), f = Relu, Abs, Ceil or Floor."""
    relu, absolute, ceil, floor = op.Relu(x), op.Abs(x), op.Ceil(x), op.Floor(x)
    once = relu | absolute | ceil | floor
    yield op.Relu(relu) | op.Abs(absolute) | op.Ceil(ceil) | op.Floor(floor)  # before => after
    return once


def bounds(clip: Var) -> tuple[float, float]:
    """Lower and upper bound of a Clip, infinite where it has none."""
    low, high = (_bound(clip.attr(name), free) for name, free in _FREE.items())
    if not low <= high:
        raise Rejected("the bounds are not in order")
    return low, high


_FREE = {"min": -np.inf, "max": np.inf}


def _bound(stated: Any, free: float) -> float:
    return free if stated is None else float(np.asarray(stated).reshape(-1)[0])


def clipped(op: Ops, x: Var, low: float, high: float) -> Any:
    """Clip with the bounds that are finite."""
    return op.Clip(
        x, min=low if np.isfinite(low) else None, max=high if np.isfinite(high) else None
    )


@rule(
    "merge-clips",
    min_opset=6,
    sample=[
        {"x": (2, 3), "inner.min": -0.5, "inner.max": 1.0, "outer.min": -1.0, "outer.max": 0.25},
        {"inner.min": None, "outer.max": None},
        {"inner.min": 0.5, "outer.max": 0.25},
    ],
    refuses=[
        {"inner.min": 2.0},
        {"outer.min": 0.5},
        {"x": [[1, 2**53 + 1]], "inner.min": 0, "inner.max": 2**53 + 1}
        | {"outer.min": 0, "outer.max": 2**60},
    ],
)
def merge_clips(op: Ops, x: Var) -> Rewrite:
    """Clip(Clip(x, a, b), c, d) => Clip(x, clip(a, c, d), clip(b, c, d))."""
    inner = op.Clip(x)
    outer = op.Clip(inner)
    yield outer  # ---------------------------------------------- before => after
    low, high = np.clip(bounds(inner), *bounds(outer))
    return clipped(op, x, low, high)


@rule(
    "merge-relu-clip",
    min_opset=6,
    sample=[
        {"x": (2, 3), "clip.min": -0.5, "clip.max": 0.5},
        {"clip.min": 0.25},
        {"clip.max": -0.25},
    ],
    refuses=[
        {"clip.min": 0.75},
        {"x": [[1, 2**53 + 1]], "clip.min": 0, "clip.max": 2**53 + 1},
    ],
)
def merge_relu_clip(op: Ops, x: Var) -> Rewrite:
    """Clip(Relu(x), a, b) => Clip(x, clip(0, a, b), b)."""
    clip = op.Clip(op.Relu(x))
    yield clip  # ----------------------------------------------- before => after
    low, high = bounds(clip)
    return clipped(op, x, min(max(low, 0.0), high), high)


@rule(
    "merge-multiplications",
    min_opset=7,
    sample=[
        {"x": (2, 3), "a": 0.5, "b": (3,)},
        {"a": (2, 3), "b": (1, 3)},
        {"a": 0.0, "b": [1.5, 2.5, 3.5]},
    ],
    refuses=[{"a": (2, 1), "b": (3,)}, {"a": 1e-30, "b": 1e-30}],
)
def merge_multiplications(op: Ops, x: Var, a: Const, b: Const) -> Rewrite:
    """(x * a) * b => x * (a*b), a and b constant."""
    product = op.Mul(op.Mul(x, a), b)
    yield product  # -------------------------------------------- before => after
    require(product.dtype.kind == "f", "the values are not floating-point")
    both = a.values.astype(np.float64) * b.values
    require(both.size <= max(a.values.size, b.values.size), "the product would be larger")
    small = np.finfo(product.dtype).tiny
    require(((abs(both) >= small) | (both == 0)).all(), "the product would underflow")
    return op.Mul(x, both)
