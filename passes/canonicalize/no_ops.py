"""Operators that hand their input on, by what their attributes and constants say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.passes.guards import (
    Dims,
    is_identity,
    is_neutral,
    same_shape,
    whole,
)
from graphopt.rules import Const, Ops, Rewrite, Var, require, rule

# The specification of Slice recommends INT_MAX for "to the end"; exporters mean either width.
TO_THE_END = 2**31 - 1
_ADDRESSES = 2**47  # bytes that a process has unless it asks for more


@rule("eliminate-identity", sample={"x": (2, 3)})
def eliminate_identity(op: Ops, x: Var) -> Rewrite:
    """Identity(x) => x."""
    yield op.Identity(x)  # ------------------------------------- before => after
    return x


@rule(
    "eliminate-dropout",
    min_opset=7,
    sample=[{"x": (2, 3), "drop.ratio": 0.3, "drop.training_mode": None}],
    refuses=[{"drop.ratio": 0.0, "drop.training_mode": True}],
)
def eliminate_dropout(op: Ops, x: Var) -> Rewrite:
    """Dropout(x) => x, in inference."""
    drop = op.Dropout(x)
    yield drop  # ----------------------------------------------- before => after
    mode = drop.attr("training_mode")
    require(mode is None or not mode.any(), "it is in training mode")
    return x


@rule(
    "eliminate-cast",
    min_opset=6,
    sample={"x": [[1, 2, 3], [4, 5, 6]], "cast.to": 7},
    refuses=[{"cast.to": 6}, {"cast.to": 1}],
)
def eliminate_cast(op: Ops, x: Var) -> Rewrite:
    """Cast(x, to=type of x) => x."""
    cast = op.Cast(x)
    yield cast  # ----------------------------------------------- before => after
    require(cast.dtype == x.dtype, "the type changes")
    return x


@rule(
    "eliminate-reshape",
    min_opset=5,
    sample=[
        {"x": (2, 3, 4), "reshaped.shape": [2, -1, 4]},
        {"reshaped.shape": [0, 3, 4]},
        {"reshaped.shape": [0, -1, 0]},
        {"x": ("n", 3, 4), "reshaped.shape": [-1, 3, 4]},
        {"x": ("n", 3, 4), "reshaped.shape": [-1, 0, 4]},
    ],
    refuses=[
        {"reshaped.shape": [3, 2, 4]},
        {"reshaped.shape": [2, 4, -1]},
        {"reshaped.shape": [6, 4]},
    ],
)
def eliminate_reshape(op: Ops, x: Var) -> Rewrite:
    """Reshape(x) => x, where the shape stays."""
    reshaped = op.Reshape(x)
    yield reshaped  # ------------------------------------------- before => after
    if not same_shape(x, reshaped):
        target = whole(reshaped.attr("shape"))
        require(_stays(target, x.shape), "the shape changes, or is not known to stay")
    return x


def _stays(target: list[int], shape: Dims) -> bool:
    """True where a target shape with a free size asks for the shape that is there.

    The free size follows from the others, which are the ones there or zero: beside a free size
    a zero copies, whatever allowzero says.
    """
    return (
        -1 in target
        and len(target) == len(shape)
        and all(new in (-1, 0, old) for new, old in zip(target, shape, strict=True))
    )


@rule(
    "eliminate-flatten",
    sample=[{"x": (2, 3), "flat.axis": 1}],
    refuses=[{"flat.axis": 0}, {"x": (2, 3, 4)}],
)
def eliminate_flatten(op: Ops, x: Var) -> Rewrite:
    """Flatten(x) => x, where x is a matrix already."""
    flat = op.Flatten(x)
    yield flat  # ----------------------------------------------- before => after
    require(x.rank == 2 and flat.attr("axis") in (1, -1), "the shape changes")
    return x


@rule(
    "eliminate-transpose",
    sample=[{"x": (2, 3, 4), "moved.perm": [0, 1, 2]}, {"x": (3,), "moved.perm": None}],
    refuses=[{"moved.perm": [0, 2, 1]}, {"x": (3, 3, 3), "moved.perm": None}],
)
def eliminate_transpose(op: Ops, x: Var) -> Rewrite:
    """Transpose(x) => x, where no axis moves."""
    moved = op.Transpose(x)
    yield moved  # ---------------------------------------------- before => after
    order = moved.attr("perm")
    require(x.rank < 2 if order is None else is_identity(order), "axes move")
    return x


@rule(
    "eliminate-pad",
    min_opset=2,
    sample=[{"x": (2, 3), "pad.pads": [0, 0, 0, 0]}],
    refuses=[{"pad.pads": [0, 0, 0, 1]}, {"pad.pads": [-1, 0, 1, 0]}],
)
def eliminate_pad(op: Ops, x: Var) -> Rewrite:
    """Pad(x, zeros) => x."""
    pad = op.Pad(x)
    yield pad  # ------------------------------------------------ before => after
    require(not any(whole(pad.attr("pads"))), "it pads")
    return x


@rule(
    "eliminate-slice",
    sample=[
        {"x": (2, 3, 4), "part.starts": [0, 0], "part.ends": [3, 9], "part.axes": [1, -1]},
        {"part.starts": [0, -7], "part.ends": [2, 2**63 - 1], "part.axes": None},
        {"x": ("n", 256, 256), "part.starts": [0], "part.ends": [2 * 10**9], "part.axes": [0]},
    ],
    refuses=[
        {"part.starts": [0, 1]},
        {"part.ends": [2, 9]},
        {"part.ends": [3, -1]},
        {"part.steps": [1, 2]},
        {"part.ends": [2**63 - 1, 2**63 - 1], "part.steps": [1, 2]},
        {"part.starts": [1, 1], "part.ends": [2**63 - 1, 2**63 - 1]},
        {"x": ("n", 3, "m"), "part.ends": [3, 1]},
        {"x": ("n", 3, 4), "part.starts": [0], "part.ends": [2 * 10**9], "part.axes": [0]},
    ],
)
def eliminate_slice(op: Ops, x: Var) -> Rewrite:
    """Slice(x) => x, where everything is taken."""
    part = op.Slice(x)
    yield part  # ----------------------------------------------- before => after
    starts, ends = whole(part.attr("starts")), whole(part.attr("ends"))
    axes, steps = part.attr("axes"), part.attr("steps")
    require(steps is None or set(whole(steps)) <= {1}, "it takes every so many only")
    along = range(len(ends)) if axes is None else whole(axes)
    for start, end, axis in zip(starts, ends, along, strict=True):
        if start != 0 or (end < TO_THE_END and not _is_beyond(end, axis, x)):
            size = x.shape[axis]
            require(size is not None and size == part.shape[axis], "it leaves out an end")
    return x


def _is_beyond(end: int, axis: int, x: Var) -> bool:
    """True where so much along the axis would be more than processors have addresses for."""
    others = [size for at, size in enumerate(x.shape) if at != axis % x.rank]
    sizes = [size for size in others if isinstance(size, int)]
    return len(sizes) == len(others) and end * math.prod(sizes) * x.dtype.itemsize > _ADDRESSES


@rule(
    "eliminate-zero",
    min_opset=7,
    sample=[{"x": (2, 3), "c": 0.0}, {"c": [[0.0], [0.0]]}],
    refuses=[{"c": [[0.0]] * 3, "x": (1, 3)}, {"c": [[0.0], [1.0]]}, {"c": [[[0.0]]]}],
)
def eliminate_zero(op: Ops, x: Var, c: Const) -> Rewrite:
    """x + 0 or x - 0 => x."""
    yield op.Add(x, c) | op.Sub(x, c)  # ------------------------ before => after
    require(is_neutral(c, 0, x), "the constant is not zero, or spreads the value out")
    return x


@rule(
    "eliminate-one",
    min_opset=7,
    sample=[{"x": (2, 3), "c": 1.0}, {"c": [[1.0], [1.0]]}],
    refuses=[{"c": [[1.0]] * 3, "x": (1, 3)}, {"c": [[1.0], [2.0]]}, {"c": [[[1.0]]]}],
)
def eliminate_one(op: Ops, x: Var, c: Const) -> Rewrite:
    """x * 1, x / 1 or x ** 1 => x."""
    yield op.Mul(x, c) | op.Div(x, c) | op.Pow(x, c)  # --------- before => after
    require(is_neutral(c, 1, x), "the constant is not one, or spreads the value out")
    return x


def _no_bound(bound: float) -> dict[str, Any]:
    """Samples of a bound that is none, and near-misses."""
    spread: list[dict[str, Any]] = [{"c": [[[bound]]]}, {"x": (1,), "c": [bound] * 3}]
    return {
        "sample": [{"x": (2, 3), "c": bound}, {"c": [[bound]]}, {"c": [bound] * 3}],
        "refuses": [{"c": 0.0}, {"c": -bound}, {"c": [bound, 0.0, bound]}, *spread],
    }


@rule("eliminate-lower-bound", min_opset=8, **_no_bound(-np.inf))
def eliminate_lower_bound(op: Ops, x: Var, c: Const) -> Rewrite:
    """max(x, -inf) => x."""
    yield op.Max(x, c)  # --------------------------------------- before => after
    require(is_neutral(c, -np.inf, x), "it is a bound, or spreads the value out")
    return x


@rule("eliminate-upper-bound", min_opset=8, **_no_bound(np.inf))
def eliminate_upper_bound(op: Ops, x: Var, c: Const) -> Rewrite:
    """min(x, inf) => x."""
    yield op.Min(x, c)  # --------------------------------------- before => after
    require(is_neutral(c, np.inf, x), "it is a bound, or spreads the value out")
    return x


@rule("eliminate-concat", min_opset=6, sample={"x": (2, 3), "Concat.axis": 1})
def eliminate_concat(op: Ops, x: Var) -> Rewrite:
    """Concat(x), Sum(x), Mean(x), Max(x) or Min(x) of one => x."""
    yield op.Concat(x) | op.Sum(x) | op.Mean(x) | op.Max(x) | op.Min(x)  # before => after
    return x


@rule(
    "eliminate-expand",
    min_opset=8,
    sample=[{"x": (2, 3), "size": [2, 1]}, {"size": [3]}],
    refuses=[{"x": (1, 3)}, {"size": [1, 2, 3]}],
)
def eliminate_expand(op: Ops, x: Var, size: Var) -> Rewrite:
    """Expand(x, size) => x, where the shape stays."""
    expanded = op.Expand(x, size)
    yield expanded  # ------------------------------------------- before => after
    require(same_shape(x, expanded), "the shape changes, or is not known to stay")
    return x


@rule(
    "eliminate-tile",
    min_opset=6,
    sample={"x": (2, 3), "repeats": [1, 1]},
    refuses=[{"repeats": [1, 2]}],
)
def eliminate_tile(op: Ops, x: Var, repeats: Const) -> Rewrite:
    """Tile(x, ones) => x."""
    yield op.Tile(x, repeats)  # -------------------------------- before => after
    require((repeats.values == 1).all(), "it repeats")
    return x


@rule(
    "eliminate-squeeze",
    sample={"x": (2, 3), "squeezed.axes": None},
    refuses=[{"x": (2, 1)}],
)
def eliminate_squeeze(op: Ops, x: Var) -> Rewrite:
    """Squeeze(x) => x, where no size is one."""
    squeezed = op.Squeeze(x)
    yield squeezed  # ------------------------------------------- before => after
    sizes = [size for size in x.shape if isinstance(size, int)]
    require(len(sizes) == x.rank and 1 not in sizes, "a size is one, or may be")
    return x


@rule(
    "eliminate-unsqueeze",
    sample={"x": (2, 3), "wide.axes": np.array([], np.int64)},
    refuses=[{"wide.axes": [1]}],
)
def eliminate_unsqueeze(op: Ops, x: Var) -> Rewrite:
    """Unsqueeze(x, none) => x."""
    wide = op.Unsqueeze(x)
    yield wide  # ----------------------------------------------- before => after
    require(not whole(wide.attr("axes")), "it adds axes")
    return x
