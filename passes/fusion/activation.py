"""Activation functions written out in parts."""

from __future__ import annotations

import math

import numpy as np

from graphopt.passes.guards import adds_no_axes, from_front, whole
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

_SIXTH = 1 / 6
NO_DOUBLES = "runtimes have no HardSigmoid of doubles"
_EPSILON = 2.0**-23  # of float32, the type that attributes have


@rule("fuse-gelu", min_opset=20, sample={"x": (2, 3, 4)})
def fuse_gelu(op: Ops, x: Var) -> Rewrite:
    """x * (1 + erf(x / sqrt(2))) / 2 => Gelu(x)."""
    root = math.sqrt(2)
    gate = op.Add(op.Erf(op.Div(x, root) | op.Mul(x, 1 / root)), 1.0)
    twice = op.Mul(x, gate)
    half = op.Mul(twice, 0.5) | op.Div(twice, 2.0)
    yield half | op.Mul(op.Mul(x, 0.5), gate) | op.Mul(x, op.Mul(gate, 0.5))  # before => after
    return op.Gelu(x)


@rule("fuse-gelu-tanh", min_opset=20, sample={"x": (2, 3, 4)})
def fuse_gelu_tanh(op: Ops, x: Var) -> Rewrite:
    """x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3))) / 2 => Gelu(x, approximate="tanh")."""
    cube = op.Pow(x, 3.0) | op.Mul(op.Mul(x, x), x)
    bent = op.Add(x, op.Mul(cube, 0.044715))
    gate = op.Add(op.Tanh(op.Mul(bent, math.sqrt(2 / math.pi))), 1.0)
    half = op.Mul(op.Mul(x, gate), 0.5)
    yield half | op.Mul(op.Mul(x, 0.5), gate) | op.Mul(x, op.Mul(gate, 0.5))  # before => after
    require(x.dtype != np.float64, "the constants of Gelu hold in single precision")
    return op.Gelu(x, approximate="tanh")


@rule("state-gelu", min_opset=9, max_opset=19, sample={"x": (2, 3, 4)})
def state_gelu(op: Ops, x: Var) -> Rewrite:
    """x * (1 + erf(x * sqrt(1/2))) / 2 => x * (1 + erf(x / sqrt(2))) * 0.5.

    The parts in the order in which onnxruntime knows them, before there was Gelu.
    """
    root = math.sqrt(2)
    known, other = (
        op.Add(op.Erf(scaled), 1.0) for scaled in (op.Div(x, root), op.Mul(x, 1 / root))
    )
    either = known | other
    product = op.Mul(x, other)
    yield (  # -------------------------------------------------- before => after
        op.Mul(product, 0.5)
        | op.Mul(op.Mul(x, 0.5), other)
        | op.Mul(x, op.Mul(either, 0.5) | op.Div(either, 2.0))
        | op.Div(op.Mul(x, either), 2.0)
    )
    gate = op.Add(op.Erf(op.Div(x, root)), 1.0)
    return op.Mul(op.Mul(x, gate), 0.5)


@rule("state-gelu-tanh", min_opset=7, max_opset=19, sample={"x": (2, 3, 4)})
def state_gelu_tanh(op: Ops, x: Var) -> Rewrite:
    """x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x**3))) / 2 => the same, in other steps.

    Those that onnxruntime knows, before there was Gelu: the cube by Pow, and half of x.
    """
    root, share = math.sqrt(2 / math.pi), 0.044715
    cubes = op.Mul(op.Mul(op.Mul(x, x), x), share) | op.Mul(x, op.Mul(x, op.Mul(x, share)))
    known, other = (
        op.Add(op.Tanh(op.Mul(op.Add(x, cube), root)), 1.0)
        for cube in (op.Mul(op.Pow(x, 3.0), share), cubes)
    )
    either = known | other
    yield (  # -------------------------------------------------- before => after
        op.Mul(op.Mul(x, 0.5), other)
        | op.Mul(op.Mul(x, either), 0.5)
        | op.Mul(x, op.Mul(either, 0.5))
    )
    require(x.dtype != np.float64, "the constants of Gelu hold in single precision")
    bent = op.Add(x, op.Mul(op.Pow(x, 3.0), share))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(op.Mul(bent, root)), 1.0))


@rule("fuse-hard-swish", min_opset=14, sample={"x": (2, 3, 4)})
def fuse_hard_swish(op: Ops, x: Var) -> Rewrite:
    """x * clip(x + 3, 0, 6) / 6 => HardSwish(x)."""
    moved = op.Add(x, 3.0)
    gate = op.Clip(moved, min=0.0, max=6.0) | op.Min(op.Max(moved, 0.0) | op.Relu(moved), 6.0)
    product = op.Mul(x, gate)
    share = op.Div(gate, 6.0) | op.Mul(gate, _SIXTH)
    yield op.Div(product, 6.0) | op.Mul(product, _SIXTH) | op.Mul(x, share)  # before => after
    require(x.dtype != np.float64, NO_DOUBLES)
    return op.HardSwish(x)


@rule(
    "gate-hard-swish",
    min_opset=7,
    max_opset=13,
    sample={"x": (2, 3, 4)},
)
def gate_hard_swish(op: Ops, x: Var) -> Rewrite:
    """x * clip(x + 3, 0, 6) / 6 => x * HardSigmoid(x, 1/6, 1/2), before there was HardSwish."""
    gate = op.Clip(op.Add(x, 3.0), min=0.0, max=6.0)
    product = op.Mul(x, gate)
    yield op.Div(product, 6.0) | op.Mul(product, _SIXTH)  # ----- before => after
    require(x.dtype != np.float64, NO_DOUBLES)
    return op.Mul(x, op.HardSigmoid(x, alpha=_SIXTH, beta=0.5))


@rule(
    "gate-scaled-hard-swish",
    min_opset=7,
    max_opset=13,
    sample=[{"x": (2, 3, 4), "c": 0.03}, {"c": (4,)}],
)
def gate_scaled_hard_swish(op: Ops, x: Var, c: Const = absent(1.0)) -> Rewrite:
    """x * clip(x + 3, 0, 6) * c => x * HardSigmoid(x, 1/6, 1/2) * 6c.

    A factor alone is no node less, but goes into weights; and runtimes keep their layout.
    """
    gated = op.Mul(x, op.Clip(op.Add(x, 3.0), min=0.0, max=6.0))
    yield op.Mul(gated, c) | gated  # --------------------------- before => after
    require(x.dtype != np.float64, NO_DOUBLES)
    return op.Mul(op.Mul(x, op.HardSigmoid(x, alpha=_SIXTH, beta=0.5)), c.values * 6)


@rule(
    "fuse-scaled-hard-swish",
    min_opset=14,
    sample=[{"x": (2, 3, 4), "c": 0.03}, {"c": (4,)}],
)
def fuse_scaled_hard_swish(op: Ops, x: Var, c: Const = absent(1.0)) -> Rewrite:
    """x * clip(x + 3, 0, 6) * c => HardSwish(x) * 6c."""
    gated = op.Mul(x, op.Clip(op.Add(x, 3.0), min=0.0, max=6.0))
    yield op.Mul(gated, c) | gated  # --------------------------- before => after
    require(x.dtype != np.float64, NO_DOUBLES)
    return op.Mul(op.HardSwish(x), c.values * 6)


@rule("fuse-hard-sigmoid", min_opset=7, sample={"x": (2, 3, 4)})
def fuse_hard_sigmoid(op: Ops, x: Var) -> Rewrite:
    """clip(x + 3, 0, 6) / 6 => HardSigmoid(x, 1/6, 1/2)."""
    gate = op.Clip(op.Add(x, 3.0), min=0.0, max=6.0)
    yield op.Div(gate, 6.0) | op.Mul(gate, _SIXTH)  # ----------- before => after
    require(x.dtype != np.float64, NO_DOUBLES)
    return op.HardSigmoid(x, alpha=_SIXTH, beta=0.5)


@rule(
    "fuse-gated-hard-swish",
    min_opset=14,
    sample={"x": (2, 3, 4), "gate.alpha": _SIXTH, "gate.beta": 0.5},
    refuses=[{"gate.alpha": 0.2}, {"gate.beta": 0.4}],
)
def fuse_gated_hard_swish(op: Ops, x: Var) -> Rewrite:
    """x * HardSigmoid(x, 1/6, 1/2) => HardSwish(x)."""
    gate = op.HardSigmoid(x)
    yield op.Mul(x, gate)  # ------------------------------------ before => after
    require(abs(gate.attr("alpha") - _SIXTH) <= _EPSILON * _SIXTH, "alpha is not 1/6")
    require(abs(gate.attr("beta") - 0.5) <= _EPSILON / 2, "beta is not 1/2")
    return op.HardSwish(x)


@rule("fuse-mish", min_opset=18, sample={"x": (2, 3, 4)})
def fuse_mish(op: Ops, x: Var) -> Rewrite:
    """x * tanh(Softplus(x)) => Mish(x)."""
    yield op.Mul(x, op.Tanh(op.Softplus(x)))  # ----------------- before => after
    return op.Mish(x)


@rule(
    "fuse-leaky-relu",
    min_opset=8,
    sample=[{"x": (2, 3, 4), "a": 0.1}, {"a": [[1.0]]}],
    refuses=[{"a": 1.5}, {"a": -0.5}, {"a": [0.1, 0.2, 0.3, 0.4]}, {"a": [[[[0.1]]]]}],
)
def fuse_leaky_relu(op: Ops, x: Var, a: Const) -> Rewrite:
    """max(x, a*x) => LeakyRelu(x, a), 0 < a <= 1."""
    yield op.Max(x, op.Mul(x, a))  # ---------------------------- before => after
    slope = a.scalar()
    require(0 < slope <= 1, "the slope is not between zero and one")
    require(x.dtype in (np.float16, np.float32), "attributes hold single precision")
    require(adds_no_axes(a, x), "the slope adds axes, or may")
    return op.LeakyRelu(x, alpha=slope)


@rule(
    "fuse-softmax",
    min_opset=13,
    sample=[
        {"x": (2, 3, 4), "top.axes": [1], "total.axes": [-2]},
        {"top.axes": [-1], "total.axes": [-1]},
    ],
    refuses=[{"total.axes": [2]}, {"top.axes": [1, 2], "total.axes": [1, 2]}],
)
def fuse_softmax(op: Ops, x: Var) -> Rewrite:
    """exp(x - max(x)) / sum(exp(x - max(x))) => Softmax(x)."""
    top = op.ReduceMax(x, keepdims=1)
    powers = op.Exp(op.Sub(x, top))
    total = op.ReduceSum(powers, keepdims=1)
    yield op.Div(powers, total) | op.Mul(powers, op.Reciprocal(total))  # before => after
    first, second = (whole(each.attr("axes")) for each in (top, total))
    require(len(first) == len(second) == 1, "it does not run along one axis")
    same = first == second or from_front(first, x.rank) == from_front(second, x.rank)
    require(same, "maximum and sum run along different axes")
    return op.Softmax(x, axis=first[0])
