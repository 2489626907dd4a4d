"""Booleans, choices and operands that are the same twice."""

from __future__ import annotations

from graphopt.passes.guards import is_neutral, same_shape
from graphopt.rules import Const, Ops, Rewrite, Var, require, rule

_TRUTHS = [[True, False, True], [False, True, True]]
_SPREADS = "the constant decides, or spreads the value out"


@rule(
    "eliminate-and",
    min_opset=7,
    sample=[{"x": _TRUTHS, "c": True}, {"c": [[True], [True]]}],
    refuses=[
        {"c": False},
        {"c": [[True], [False]]},
        {"c": [[[True]]]},
        {"x": [[True]], "c": [True, True]},
    ],
)
def eliminate_and(op: Ops, x: Var, c: Const) -> Rewrite:
    """And(x, true) => x."""
    yield op.And(x, c)  # --------------------------------------- before => after
    require(is_neutral(c, True, x), _SPREADS)
    return x


@rule(
    "eliminate-or",
    min_opset=7,
    sample=[{"x": _TRUTHS, "c": False}, {"c": [[False], [False]]}],
    refuses=[{"c": True}, {"c": [[True], [False]]}, {"c": [[[False]]]}],
)
def eliminate_or(op: Ops, x: Var, c: Const) -> Rewrite:
    """Or(x, false) => x."""
    yield op.Or(x, c)  # ---------------------------------------- before => after
    require(is_neutral(c, False, x), _SPREADS)
    return x


@rule("merge-same-truths", min_opset=7, sample={"x": _TRUTHS})
def merge_same_truths(op: Ops, x: Var) -> Rewrite:
    """And(x, x) or Or(x, x) => x."""
    yield op.And(x, x) | op.Or(x, x)  # ------------------------- before => after
    return x


@rule("merge-same-extremes", min_opset=8, sample={"x": (2, 3)})
def merge_same_extremes(op: Ops, x: Var) -> Rewrite:
    """Max(x, x) or Min(x, x) => x."""
    yield op.Max(x, x) | op.Min(x, x)  # ------------------------ before => after
    return x


@rule(
    "eliminate-where",
    min_opset=9,
    sample=[
        {"c": [[True], [True]], "x": (2, 3), "y": (3,)},
        {"c": [[False, False, False]], "x": (1,), "y": (2, 3)},
        {"c": False, "x": 0.5, "y": ("n", 3)},
    ],
    refuses=[
        {"c": [[True], [False]], "y": (2, 3)},
        {"x": (3,)},
        {"c": [[False], [False]]},
        {"y": (4, 2, 3)},
    ],
)
def eliminate_where(op: Ops, c: Const, x: Var, y: Var) -> Rewrite:
    """Where(c, x, y) => x or y, c true or false throughout."""
    chosen = op.Where(c, x, y)
    yield chosen  # --------------------------------------------- before => after
    truths = c.values
    require(truths.all() or not truths.any(), "the condition is not the same throughout")
    taken = x if truths.all() else y
    require(same_shape(taken, chosen), "what is chosen is spread out, or may be")
    return taken


@rule(
    "merge-same-choices",
    min_opset=9,
    sample=[{"c": [True, False, True], "x": (2, 3)}, {"c": [[True]], "x": ("n", 3)}],
    refuses=[{"c": [[[True]]]}, {"x": (2, 1)}],
)
def merge_same_choices(op: Ops, c: Var, x: Var) -> Rewrite:
    """Where(c, x, x) => x."""
    chosen = op.Where(c, x, x)
    yield chosen  # --------------------------------------------- before => after
    require(same_shape(x, chosen), "the condition spreads the value out, or may")
    return x


@rule(
    "swap-negated-choices",
    min_opset=9,
    sample={"c": [True, False, True], "x": (2, 3), "y": (3,)},
)
def swap_negated_choices(op: Ops, c: Var, x: Var, y: Var) -> Rewrite:
    """Where(Not(c), x, y) => Where(c, y, x)."""
    yield op.Where(op.Not(c), x, y)  # -------------------------- before => after
    return op.Where(c, y, x)
