"""Conversions between element types."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from graphopt.rules import Ops, Rewrite, Var, require, rule

_BFLOAT16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)


@rule("lower-cast-like", min_opset=15, sample=[{"x": (2, 3), "like": [1, 2]}, {"like": (2,)}])
def lower_cast_like(op: Ops, x: Var, like: Var) -> Rewrite:
    """CastLike(x, y) => Cast(x, to=type of y)."""
    cast = op.CastLike(x, like)
    yield cast  # ----------------------------------------------- before => after
    return op.Cast(x, to=onnx.helper.np_dtype_to_tensor_dtype(like.dtype), **cast.attrs)


@rule(
    "merge-casts",
    min_opset=6,
    sample=[
        {"x": [[1, 0, 3], [0, -5, 6]], "inner.to": 7, "outer.to": 1},
        {"x": [[True, False]], "inner.to": 6, "outer.to": 9},
        {"x": np.array([1.5, 3e38], _BFLOAT16), "inner.to": 1, "outer.to": 11},
    ],
    refuses=[
        {"inner.to": 6},
        {"inner.to": 9},
        {"inner.to": 1, "outer.to": 7},
        {"x": (2, 3), "inner.to": 11, "outer.to": 7},
        {"x": [[2**53 + 1, 3]], "inner.to": 11},
        {"x": np.array([1.5, 3e38], _BFLOAT16), "inner.to": 10, "outer.to": 1},
    ],
)
def merge_casts(op: Ops, x: Var) -> Rewrite:
    """Cast(Cast(x, a), b) => Cast(x, b), where type a holds every value of x."""
    inner = op.Cast(x)
    outer = op.Cast(inner)
    yield outer  # ---------------------------------------------- before => after
    require(holds(inner.dtype, x.dtype), "the type between loses values")
    # out of its range, what a float becomes as an integer is up to the runtime
    safe = outer.dtype.kind not in "iu" or inner.dtype.kind in "iub"
    require(safe or holds(outer.dtype, x.dtype), "floats that no integer holds may pass")
    return op.Cast(x, **outer.attrs)


def holds(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """True where every value of type `narrow` is one of type `wide`: numbers and booleans."""
    if wide == narrow:
        return True
    if "biuf".find(wide.kind) < 0 or "biuf".find(narrow.kind) < 0:
        return wide in (np.float32, np.float64) and narrow.name == "bfloat16"
    if wide.kind == "f" and narrow.kind in "iu":
        return 8 * narrow.itemsize <= np.finfo(wide).nmant
    return np.can_cast(narrow, wide, "safe")
