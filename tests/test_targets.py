"""Every line of the table of integer kernels, against the graph that onnxruntime runs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model
from graphopt.passes.quantize.barriers import BARRIER
from graphopt.passes.quantize.emission import Options
from graphopt.passes.quantize.units import Units
from graphopt.targets import ORT_CPU, QUANTIZED_UNASKED, SLOW_ON_INTEGERS, has_vnni
from tests.graphs import model, node, value
from tests.quantization_error import Errors
from tests.quantized import (
    Small,
    Static,
    constant,
    executed,
    integers,
    make_static,
    normal,
    run,
    without,
)

Kernels = dict[str, int]
IMAGE = (2, 8, 6, 10)
W = normal("w", 8, 8, 1, 1, scale=0.35)
V = normal("v", 8, 8, 1, 1, scale=0.35)
B = normal("b", 8)
CONV = node("Conv", ["x", "w", "b"], ["h"])
M = normal("m", 24, 32, scale=0.2)
BIAS = normal("bias", 32)


def check_numbers(static: Static, compared: bool = True) -> None:
    """Within what the steps allow, with optimisations and without, which agree.

    Means are compared where weights mix many roundings; on a lattice of few numbers they are not
    independent. Of those there are as many as weights.
    """
    weights = [u.weights.name for u in static.units if u.weights is not None]
    feed = static.feeds[0]
    errors = Errors(static, feed)
    exact = run(static.before, "off", feed)
    off, default = (run(static.after, level, feed) for level in ("off", "default"))
    for name, expected in exact.items():
        worst, power = errors.of(name)
        noise = 1e-5 * np.abs(expected).max(initial=0.0)  # of arithmetic in float32
        independent = min([power.size, *(errors.constant(name).size for name in weights)])
        mean = power.mean() * (1 + 6 / np.sqrt(independent)) + noise**2
        for found in (off[name], default[name]):
            lost = np.abs(found.astype(np.float64) - expected)
            assert (lost <= worst * (1 + 1e-4) + noise).all(), float((lost - worst).max())
            assert not weights or np.mean(lost**2) <= mean
        apart = np.mean((off[name].astype(np.float64) - default[name]) ** 2)
        assert not compared or apart <= 0.1 * power.mean() + noise**2


def fused(small: Small, expected: Kernels, **options: Any) -> Static:
    """All units run on these kernels, no weights are dequantized, and the numbers are right."""
    static = make_static(small, **options)
    assert static.kernels == expected
    assert static.dequantized == []
    check_numbers(static)
    return static


def alone(op: str, *more: str, held: Sequence[onnx.TensorProto] = (), **attributes: Any) -> Small:
    """The operator between an input and an output."""
    inputs = {name: IMAGE for name in ("x", *more) if name not in {t.name for t in held} and name}
    return Small([node(op, ["x", *more], ["y"], **attributes)], inputs, ["y"], held, spread=2.0)


def between(op: str, *more: str, held: Sequence[onnx.TensorProto] = (), **attributes: Any) -> Small:
    """The operator between two convolutions."""
    made = [CONV, node(op, ["h", *more], ["z"], **attributes), node("Conv", ["z", "v"], ["y"])]
    return Small(made, {"x": IMAGE}, ["y"], [W, B, V, *held])


# -- convolutions ----------------------------------------------------------------------------------

CONVOLUTIONS = {
    "2-D": ((2, 8, 9, 9), (12, 8, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "1-D": ((2, 8, 40), (12, 8, 3), {"dilations": [2]}),
    "3-D": ((1, 4, 5, 5, 5), (6, 4, 3, 3, 3), {}),
    "pointwise": ((2, 8, 6, 6), (12, 8, 1, 1), {}),
    "depthwise": ((2, 8, 9, 9), (8, 1, 3, 3), {"group": 8}),
    "depthwise 1-D": ((2, 8, 40), (8, 1, 5), {"group": 8, "pads": [2, 2]}),
    "grouped": ((2, 8, 9, 9), (12, 2, 3, 3), {"group": 4}),
    "open": (("a", 8, "m", "m"), (12, 8, 3, 3), {"auto_pad": "SAME_UPPER"}),
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("clamp", ["", "Relu", "Clip"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, clamp: str, has_bias: bool) -> None:
    shape, weights, attributes = CONVOLUTIONS[name]
    inputs = ["x", "k", *(["b"] if has_bias else [])]
    made = [node("Conv", inputs, ["h" if clamp else "y"], **attributes)]  # type: ignore[arg-type]
    if clamp:
        made.append(node(clamp, ["h", *(["low", "six"] if clamp == "Clip" else [])], ["y"]))
    held = [normal("k", *weights), normal("b", weights[0])]
    held += [constant("low", 0.0), constant("six", 6.0)]
    fused(Small(made, {"x": shape}, ["y"], held), {"QLinearConv": 1})


@pytest.mark.parametrize("top", [0.3, 1.0, 6.0, 31.888313, 1000.7])
def test_any_clip_at_zero_is_dropped(top: float) -> None:
    """31.888313 / 255 in float32, times 255, is more than that."""
    made = [CONV, node("Clip", ["h", "low", "top"], ["y"])]
    held = [W, B, constant("low", 0.0), constant("top", top)]
    fused(Small(made, {"x": IMAGE}, ["y"], held, spread=top), {"QLinearConv": 1})


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (None, 0.5), (0.1, 1.0)])
def test_other_clips_stay_operators(low: float | None, high: float) -> None:
    made = [CONV, node("Clip", ["h", "low" if low is not None else "", "high"], ["y"])]
    held = [W, B, constant("low", low or 0.0), constant("high", high)]
    static = make_static(Small(made, {"x": IMAGE}, ["y"], held))
    assert static.kernels == {"QLinearConv": 1, "Clip": 1}
    assert static.dequantized == []


# -- products --------------------------------------------------------------------------------------

SHAPES = [(6, 24), ("m", 24), (1, 24), (2, 6, 24), ("a", "b", 24), (2, 3, 6, 24)]


def product(bias: str = "", clamp: bool = False, last: str = "y") -> list[onnx.NodeProto]:
    result = f"{last}0" if clamp else last
    made = [node("MatMul", ["x", "m"], [f"{last}p" if bias else result])]
    if bias:
        operands = [f"{last}p", "bias"] if bias == "right" else ["bias", f"{last}p"]
        made.append(node("Add", operands, [result]))
    return [*made, node("Relu", [result], [last])] if clamp else made


@pytest.mark.parametrize("shape", SHAPES)
def test_matmul(shape: tuple[int | str, ...]) -> None:
    fused(Small(product(), {"x": shape}, ["y"], [M]), {"MatMulIntegerToFloat": 1})


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("held", [BIAS, normal("bias", 1, 32), constant("bias", 0.7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_and_bias(
    shape: tuple[int | str, ...], held: onnx.TensorProto, side: str, clamp: bool
) -> None:
    static = make_static(Small(product(side, clamp), {"x": shape}, ["y"], [M, held]))
    kernels = dict(static.kernels)
    assert kernels.pop("Relu", 0) == clamp
    if len(shape) > 2 and isinstance(shape[0], str):
        # The runtime makes no Gemm of this: the bias is added apart, and dequantized to be.
        assert kernels == {"MatMulIntegerToFloat": 1, "Add": 1}
        (dequantized,) = static.dequantized
        assert dequantized == "bias/y/integers"
    else:
        assert kernels.pop("Reshape", 0) == (2 if len(shape) > 2 else 0)
        assert kernels == {"QGemm": 1}
        assert static.dequantized == []
    check_numbers(static)


@pytest.mark.parametrize("held", [None, BIAS, normal("bias", 1, 32), normal("bias", 1)])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("shape", [(6, 24), ("m", 24), (1, 24)])
def test_gemm(shape: tuple[int | str, ...], transposed: int, held: onnx.TensorProto | None) -> None:
    inputs = ["x", "t" if transposed else "m", *(["bias"] if held else [])]
    made = [node("Gemm", inputs, ["y"], transB=transposed)]
    turned = constant("t", numpy_helper.to_array(M).T)
    constants = [M, turned, *([held] if held else [])]
    fused(Small(made, {"x": shape}, ["y"], constants), {"QGemm": 1})


@pytest.mark.parametrize("bias", [(32,), (6, 32), (6, 1)])
@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_other_gemms_stay_floats(attributes: dict[str, Any], bias: tuple[int, ...]) -> None:
    shape = (24, 6) if "transA" in attributes else (6, 24)
    made = [node("Gemm", ["x", "m", "bias"], ["y"], **attributes)]
    static = make_static(Small(made, {"x": shape}, ["y"], [M, normal("bias", *bias)]))
    assert static.found == ([] if attributes or len(bias) > 1 else ["y"])


@pytest.mark.parametrize(
    ("shape", "weights", "bias"),
    [
        ((24,), (24, 32), ()),  # an activation without rows
        ((2, 6, 24), (2, 24, 32), ()),  # a stack of matrices
        ((6, 24), (24, 32), (1, 1, 32)),  # a bias that adds an axis
        ((6, 24), (24, 32), (6, 32)),  # one for each row
    ],
)
def test_products_that_no_kernel_computes(
    shape: tuple[int, ...], weights: tuple[int, ...], bias: tuple[int, ...]
) -> None:
    made = product("right" if bias else "")
    held = [normal("m", *weights), normal("bias", *bias)]
    static = make_static(Small(made, {"x": shape}, ["y"], held))
    assert "y" not in static.found or static.units[-1].kind == "sum"
    check_numbers(static)


def test_products_in_a_row_never_leave_integers() -> None:
    made = [
        node("Gemm", ["x", "m", "bias"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "m2"], ["k"]),
        node("Gemm", ["k", "m3"], ["y"]),
    ]
    held = [M, BIAS, normal("m2", 32, 16), normal("m3", 16, 8)]
    static = fused(Small(made, {"x": (6, 24)}, ["y"], held), {"QGemm": 2, "QLinearMatMul": 1})
    assert static.counts["QuantizeLinear"] == 1


@pytest.mark.parametrize("is_output", [False, True])
@pytest.mark.parametrize("kind", ["MatMul", "Add", "Gemm", "Relu"])
def test_a_product_that_integers_and_floats_read(kind: str, is_output: bool) -> None:
    """The copy before QuantizeLinear keeps the product on integers; without it, it is float."""
    first = {
        "MatMul": product(last="h"),
        "Add": product("right", last="h"),
        "Gemm": [node("Gemm", ["x", "m", "bias"], ["h"])],
        "Relu": product("right", clamp=True, last="h"),
    }[kind]
    made = [*first, node("MatMul", ["h", "m2"], ["y"])]
    made += [] if is_output else [node("Tanh", ["h"], ["t"])]
    held = [M, BIAS, normal("m2", 32, 16)]
    static = make_static(Small(made, {"x": (6, 24)}, ["y", "h" if is_output else "t"], held))
    kernels = static.counts
    assert kernels["MatMulIntegerToFloat"] + kernels["QGemm"] == 2
    assert static.dequantized == []
    assert kernels[BARRIER] == (kind != "Relu")
    check_numbers(static)
    if kind != "Relu":
        bare = executed(bypassed(static.after))
        assert {"MatMul", "Gemm"} & {n.op_type for n in bare.graph.node}


LAST = node("Cos", ["r"], ["y"])
BEHIND: dict[str, tuple[list[onnx.NodeProto], list[str], bool]] = {
    "Relu": ([node("Relu", ["h"], ["r"]), LAST], ["y"], True),
    "Clip": ([node("Clip", ["h", "low", "six"], ["r"]), LAST], ["y"], True),
    "two clamps": (
        [node("Relu", ["h"], ["q"]), node("Clip", ["q", "low", "six"], ["r"]), LAST],
        ["y"],
        True,
    ),
    "a Clip that no range says": (
        [node("Clip", ["h", "minus", "one"], ["r"]), node("MatMul", ["r", "m2"], ["y"])],
        ["y"],
        True,
    ),
    "a Relu that is quantized": (
        [node("Relu", ["h"], ["r"]), node("MatMul", ["r", "m2"], ["y"])],
        ["y"],
        False,
    ),
    "two readers": (
        [node("Relu", ["h"], ["r"]), LAST, node("Tanh", ["r"], ["t"])],
        ["y", "t"],
        False,
    ),
    "an output": ([node("Relu", ["h"], ["y"])], ["y"], False),
    "another activation": ([node("Sigmoid", ["h"], ["r"]), LAST], ["y"], False),
}


@pytest.mark.parametrize("shape", [(6, 24), (2, 6, 24)])
@pytest.mark.parametrize("kind", ["MatMul", "Add", "Gemm"])
@pytest.mark.parametrize("name", BEHIND)
def test_a_clamp_behind_a_product(name: str, kind: str, shape: tuple[int, ...]) -> None:
    """onnxruntime looks behind a clamp for QuantizeLinear; a copy stands where there is none."""
    behind, outputs, needs = BEHIND[name]
    first = {
        "MatMul": product(last="h"),
        "Add": product("right", last="h"),
        "Gemm": [node("Gemm", ["x", "m", "bias"], ["h"])],
    }[kind]
    if kind == "Gemm" and len(shape) > 2:
        return
    held = [M, BIAS, normal("m2", 32, 16), constant("low", 0.0), constant("six", 6.0)]
    held += [constant("minus", -1.0), constant("one", 1.0)]
    small = Small([*first, *behind], {"x": shape}, outputs, held)
    static = make_static(small, choose=lambda units: [u for u in units if u.kind == "product"])
    products = len(static.units)
    kernels = static.counts
    in_integers = ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul")
    assert sum(kernels[op] for op in in_integers) == products
    assert static.dequantized == []
    # A sum of three axes has a Reshape before the clamp, which is enough.
    needs = needs and (kind != "Add" or len(shape) == 2)
    assert kernels[BARRIER] == needs
    feed = static.feeds[0]
    exact, found = (run(p, "default", feed)["y"] for p in (static.before, static.after))
    assert np.mean((found - exact) ** 2) < 1e-2 * np.mean(exact**2)
    if needs:
        bare = executed(bypassed(static.after))
        assert sum(n.op_type in in_integers for n in bare.graph.node) == products - 1


# -- one operand after another ---------------------------------------------------------------------

SUMS: dict[str, Small] = {
    "tensors": alone("Add", "u"),
    "itself": alone("Add", "x"),
    "constant": alone("Add", "k", held=[normal("k", 8, 1, 1)]),
    "scalar": alone("Add", "k", held=[constant("k", -0.7)]),
    "larger constant": alone("Add", "k", held=[normal("k", 3, 1, 8, 6, 10)]),
    "constant first": Small(
        [node("Add", ["k", "x"], ["y"])], {"x": IMAGE}, ["y"], [normal("k", 8, 1, 1)]
    ),
    "broadcast": Small([node("Add", ["x", "u"], ["y"])], {"x": IMAGE, "u": (2, 8, 1, 1)}, ["y"]),
    "number": Small([node("Add", ["x", "u"], ["y"])], {"x": IMAGE, "u": ()}, ["y"]),
}


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("name", SUMS)
def test_sums_and_gates(name: str, op: str) -> None:
    small = SUMS[name]
    made = [node(op, small.nodes[0].input, ["y"])]
    fused(Small(made, small.inputs, ["y"], small.held), {f"QLinear{op}": 1})


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("clamp", ["Relu", "Clip"])
def test_clamped_sums_and_gates(clamp: str, op: str) -> None:
    bounds = ["low", "six"] if clamp == "Clip" else []
    made = [node(op, ["x", "u"], ["h"]), node(clamp, ["h", *bounds], ["y"])]
    held = [constant("low", 0.0), constant("six", 6.0)]
    small = Small(made, {"x": IMAGE, "u": IMAGE}, ["y"], held, spread=4.0)
    fused(small, {f"QLinear{op}": 1})


OPERATORS: dict[str, tuple[str, dict[str, Any], Kernels]] = {
    "sigmoid": ("Sigmoid", {}, {"QLinearSigmoid": 1}),
    "leaky": ("LeakyRelu", {"alpha": 0.1}, {"QLinearLeakyRelu": 1}),
    "hard sigmoid": ("HardSigmoid", {}, {"QLinearAdd": 1}),
    "hard sigmoid of six": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, {"QLinearAdd": 1}),
    "hard sigmoid below": ("HardSigmoid", {"alpha": 0.3, "beta": -0.2}, {"QLinearAdd": 1}),
    "hard swish": ("HardSwish", {}, {"QLinearAdd": 1, "QLinearMul": 1}),
    "mean": ("GlobalAveragePool", {}, {"QLinearGlobalAveragePool": 1}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    op, attributes, kernels = OPERATORS[name]
    fused(alone(op, **attributes), kernels)
    fused(between(op, **attributes), {"QLinearConv": 2, **kernels})


@pytest.mark.parametrize("shape", [(2, 8, 20), (2, 4, 5, 5, 5)])
def test_means_of_other_ranks(shape: tuple[int, ...]) -> None:
    made = [node("GlobalAveragePool", ["x"], ["y"])]
    fused(Small(made, {"x": shape}, ["y"]), {"QLinearGlobalAveragePool": 1})


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_a_hard_sigmoid_that_does_not_rise_is_no_unit(alpha: float) -> None:
    assert make_static(alone("HardSigmoid", alpha=alpha)).found == []


def test_silu() -> None:
    made = [CONV, node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["z"])]
    made.append(node("Conv", ["z", "v"], ["y"]))
    small = Small(made, {"x": IMAGE}, ["y"], [W, B, V])
    static = fused(small, {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1})
    assert (static.counts["QuantizeLinear"], static.counts["DequantizeLinear"]) == (1, 1)


# -- uniform normalisations ------------------------------------------------------------------------


def normalisation(shift: float, scale: float = 2.0) -> list[onnx.TensorProto]:
    named = {"gamma": scale, "beta": shift, "mean": 0.3, "var": 0.8}
    return [constant(name, np.full(8, number)) for name, number in named.items()]


NORM = ("gamma", "beta", "mean", "var")


@pytest.mark.parametrize("shift", [0.0, 0.5, -2.5, 1e-4, 40.0])
def test_a_uniform_normalisation_costs_nothing(shift: float) -> None:
    held = normalisation(shift)
    fused(between("BatchNormalization", *NORM, held=held), {"QLinearConv": 2})
    static = fused(alone("BatchNormalization", *NORM, held=held), {})
    assert (static.counts["QuantizeLinear"], static.counts["DequantizeLinear"]) == (1, 1)


@pytest.mark.parametrize("shift", [0.5, -2.5, 40.0])
def test_its_shift_is_exact(shift: float) -> None:
    """What it adds is a whole number of steps, so that only its source is rounded."""
    static = make_static(alone("BatchNormalization", *NORM, held=normalisation(shift)))
    (unit,) = static.units
    x, y = static.tensors["x"], static.tensors["y"]
    steps = unit.shift / unit.factor / float(x.scale)
    assert round(steps) != 0
    assert steps == pytest.approx(round(steps), abs=1e-4)
    assert int(x.zero_point) - int(y.zero_point) == round(steps)
    assert float(y.scale) == pytest.approx(unit.factor * float(x.scale), rel=1e-6)


@pytest.mark.parametrize("after", ["Reshape", "Concat", "Sigmoid"])
def test_a_normalisation_and_what_moves_its_result(after: str) -> None:
    held = [*normalisation(-2.5), integers("shape", 2, 8, 10, 6), normal("k", 8, 16, 1, 1), V]
    made = [node("BatchNormalization", ["x", *NORM], ["n"])]
    if after == "Concat":
        made.append(node("Concat", ["n", "x"], ["z"], axis=1))
    else:
        made.append(node(after, ["n", *(["shape"] if after == "Reshape" else [])], ["z"]))
    made.append(node("Conv", ["z", "k" if after == "Concat" else "v"], ["y"]))
    kernels = {"Reshape": "Reshape", "Concat": "QLinearConcat", "Sigmoid": "QLinearSigmoid"}
    fused(Small(made, {"x": IMAGE}, ["y"], held), {kernels[after]: 1, "QLinearConv": 1})


@pytest.mark.parametrize(
    "why", ["factors", "shifts", "training", "negative", "zero", "variance", "infinite"]
)
def test_other_normalisations_are_no_units(why: str) -> None:
    held = normalisation(0.5)
    if why == "factors":
        held[0] = constant("gamma", np.linspace(1, 2, 8))
    elif why == "shifts":
        held[1] = normal("beta", 8)
    elif why == "zero":
        held = normalisation(0.5, 0.0)
    elif why == "negative":
        held = normalisation(0.5, -1.0)
    elif why == "variance":
        held[3] = constant("var", np.full(8, -1.0))
    elif why == "infinite":
        held[1] = constant("beta", np.full(8, np.inf))
    attributes: dict[str, Any] = {"training_mode": 1} if why == "training" else {}
    made = [node("BatchNormalization", ["x", *NORM], ["y"], **attributes)]
    before = model(made, [value("x", IMAGE)], [value("y", IMAGE)], held)
    assert list(Units(Editor(Model.load(before)))) == []


# -- movement --------------------------------------------------------------------------------------

AXES = integers("axes", 2)
MOVES: dict[str, tuple[str, list[str], list[onnx.TensorProto], dict[str, Any]]] = {
    "Reshape": ("Reshape", ["shape"], [integers("shape", 2, 8, 10, 6)], {}),
    "Transpose": ("Transpose", [], [], {"perm": [0, 1, 3, 2]}),
    "Slice": ("Slice", ["axes", "five", "axes"], [AXES, integers("five", 5)], {}),
    "Gather": ("Gather", ["picked"], [integers("picked", 3, 1, 1)], {"axis": 2}),
    "DepthToSpace": ("DepthToSpace", [], [], {"blocksize": 2}),
    "MaxPool": ("MaxPool", [], [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "Resize": ("Resize", ["", "sizes"], [constant("sizes", [1, 1, 2, 2])], {"mode": "nearest"}),
    "Resize to sizes": (
        "Resize",
        ["", "", "sizes"],
        [integers("sizes", 2, 8, 12, 20)],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_movement_keeps_no_conversions(name: str) -> None:
    op, more, held, attributes = MOVES[name]
    lonely = make_static(alone(op, *more, held=held, **attributes))
    assert (lonely.counts["QuantizeLinear"], lonely.counts["DequantizeLinear"]) == (1, 1)
    check_numbers(lonely)
    small = between(op, *more, held=held, **attributes)
    if op == "DepthToSpace":
        held = [W, B, normal("v", 8, 2, 1, 1)]
        small = Small(small.nodes, small.inputs, ["y"], held)
    static = make_static(small)
    moving = {"MaxPool": "NhwcMaxPool"}.get(op, op)
    expected = {"QLinearConv": 2, **({} if op == "Transpose" else {moving: 1})}
    assert static.kernels == expected
    assert (static.counts["QuantizeLinear"], static.counts["DequantizeLinear"]) == (1, 1)
    check_numbers(static)


def test_squeeze_unsqueeze_flatten() -> None:
    made = [
        CONV,
        node("Unsqueeze", ["h", "axes"], ["u"]),
        node("Squeeze", ["u", "axes"], ["q"]),
        node("Flatten", ["q"], ["f"]),
        node("Gemm", ["f", "k"], ["y"]),
    ]
    small = Small(made, {"x": IMAGE}, ["y"], [W, B, AXES, normal("k", 480, 5, scale=0.05)])
    moved = {"Unsqueeze": 1, "Squeeze": 1, "Flatten": 1}
    static = fused(small, {"QLinearConv": 1, **moved, "QGemm": 1})
    assert (static.counts["QuantizeLinear"], static.counts["DequantizeLinear"]) == (1, 0)


@pytest.mark.parametrize("outputs", [["a", "c"], ["y"]])
def test_split(outputs: list[str]) -> None:
    made = [CONV, node("Split", ["h"], ["a", "c"], axis=1)]
    kernels = {"QLinearConv": 1, "Split": 1}
    if outputs == ["y"]:
        made += [node("Sigmoid", ["a"], ["s"]), node("Mul", ["s", "c"], ["y"])]
        kernels |= {"QLinearSigmoid": 1, "QLinearMul": 1}
    static = fused(Small(made, {"x": IMAGE}, outputs, [W, B]), kernels)
    assert static.counts["QuantizeLinear"] == 1


def test_a_split_with_results_that_nobody_reads_stays_float() -> None:
    made = [CONV, node("Split", ["h"], ["a", "c"], axis=1), node("Sigmoid", ["a"], ["y"])]
    static = make_static(Small(made, {"x": IMAGE}, ["y"], [W, B]))
    assert static.found == ["h", "y"]
    check_float_between(static)


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "linear"},
        {"mode": "cubic"},
        {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 1.5},
    ],
)
def test_a_resize_that_makes_new_numbers_is_no_unit(attributes: dict[str, Any]) -> None:
    held = [integers("sizes", 2, 8, 12, 20), constant("roi", [0, 0, -0.2, -0.2, 1, 1, 1.5, 1.5])]
    assert make_static(alone("Resize", "roi", "", "sizes", held=held, **attributes)).found == []


def test_what_says_how_to_move_is_not_quantized() -> None:
    made = [node("Resize", ["x", "x", "", "sizes"], ["y"], mode="nearest")]
    static = make_static(Small(made, {"x": (2,)}, ["y"], [integers("sizes", 4)]))
    (resize,) = (n for n in static.after.graph.node if n.op_type == "Resize")
    assert list(resize.input) == ["x/dequantized", "x", "", "sizes"]


# -- Concat ----------------------------------------------------------------------------------------


def concatenated(*parts: onnx.NodeProto, spread: float = 0.3) -> Small:
    made = [CONV, node("Conv", ["x", "v"], ["k"]), *parts]
    names = [parts[-1].output[0] if parts else "h", "k"]
    made += [node("Concat", names, ["z"], axis=1), node("Conv", ["z", "c"], ["y"])]
    return Small(made, {"x": IMAGE}, ["y"], [W, B, V, normal("c", 8, 16, 1, 1)], spread=spread)


def test_concat_of_parts_that_have_no_scale_in_common_is_not_chosen() -> None:
    made = [node("Mul", ["x", "small"], ["s"]), node("Concat", ["s", "x"], ["y"], axis=1)]
    small = Small(made, {"x": IMAGE}, ["y"], [constant("small", 0.1)])
    static = make_static(small)
    assert (static.found, static.chosen) == (["s", "y"], ["s"])


def test_concat_of_one_scale() -> None:
    static = fused(concatenated(), {"QLinearConv": 3, "QLinearConcat": 1})
    assert static.tensors["h"] == static.tensors["k"] == static.tensors["z"]
    assert (static.counts["QuantizeLinear"], static.counts["DequantizeLinear"]) == (1, 1)


@pytest.mark.parametrize("op", ["Relu", "HardSigmoid"])
def test_a_clamp_is_not_lost_in_a_concat(op: str) -> None:
    """What is clamped keeps the range that says so; the others still share one."""
    static = make_static(concatenated(node(op, ["h"], ["r"])))
    assert "z" in static.chosen
    assert static.tensors["r"].zero_point == 0
    assert static.tensors["k"] == static.tensors["z"] != static.tensors["r"]
    more = {"QLinearAdd": 1} if op == "HardSigmoid" else {}
    assert static.kernels == {"QLinearConv": 3, "QLinearConcat": 1, **more}
    check_numbers(static)


# -- contexts --------------------------------------------------------------------------------------

CONTEXTS: dict[str, tuple[list[onnx.NodeProto], list[str], Kernels]] = {
    "an output that is read": (
        [CONV, node("Conv", ["h", "v"], ["y"])],
        ["y", "h"],
        {"QLinearConv": 2},
    ),
    "integers and floats read": (
        [CONV, node("Conv", ["h", "v"], ["y"]), node("Tanh", ["h"], ["t"])],
        ["y", "t"],
        {"QLinearConv": 2, "Tanh": 1},
    ),
    "an input that floats read": (
        [CONV, node("Tanh", ["x"], ["t"])],
        ["h", "t"],
        {"QLinearConv": 1, "Tanh": 1},
    ),
    "read twice by one node": (
        [CONV, node("Mul", ["h", "h"], ["y"])],
        ["y"],
        {"QLinearConv": 1, "QLinearMul": 1},
    ),
    "shared weights": ([CONV, node("Conv", ["h", "w"], ["y"])], ["y"], {"QLinearConv": 2}),
    "shared weights and bias": (
        [CONV, node("Conv", ["h", "w", "b"], ["y"])],
        ["y"],
        {"QLinearConv": 2},
    ),
    "shared activations": (
        [CONV, node("Conv", ["x", "v"], ["k"]), node("Add", ["h", "k"], ["y"])],
        ["y"],
        {"QLinearConv": 2, "QLinearAdd": 1},
    ),
    "a residual": (
        [
            CONV,
            node("Conv", ["h", "v"], ["k"]),
            node("Add", ["h", "k"], ["s"]),
            node("Relu", ["s"], ["r"]),
            node("Conv", ["r", "w"], ["y"]),
        ],
        ["y"],
        {"QLinearConv": 3, "QLinearAdd": 1},
    ),
    "constants of nodes": (
        [
            node("Constant", [], ["cw"], value=W),
            node("Constant", [], ["cb"], value=B),
            node("Conv", ["x", "cw", "cb"], ["y"]),
        ],
        ["y"],
        {"QLinearConv": 1},
    ),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str) -> None:
    made, outputs, kernels = CONTEXTS[name]
    fused(Small(made, {"x": IMAGE}, outputs, [W, B, V]), kernels)


def test_weights_that_two_convolutions_share_stay_one() -> None:
    made, outputs, _ = CONTEXTS["shared weights"]
    static = make_static(Small(made, {"x": IMAGE}, outputs, [W, B]))
    stored = [t for t in static.after.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(t.dims == [8, 8, 1, 1] for t in stored) == 1


def test_weights_behind_identity_stay_as_they_are() -> None:
    """Folding goes before quantizing: here nothing looks through it, and nothing is lost."""
    made = [node("Identity", ["w"], ["i"]), node("Conv", ["x", "i", "b"], ["y"])]
    static = make_static(Small(made, {"x": IMAGE}, ["y"], [W, B]))
    assert static.found == []
    assert static.after == static.before


@pytest.mark.parametrize(
    "held",
    [
        constant("k", [0.0, -np.inf] * 4),
        constant("k", [np.nan] * 8),
    ],
)
def test_constants_that_are_not_finite_stay_floats(held: onnx.TensorProto) -> None:
    made = [node("Add", ["x", "k"], ["y"])]
    assert list(Units(Editor(Model.load(Small(made, {"x": (2, 8)}, ["y"], [held]).proto())))) == []


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_corrections_are_added(kind: str) -> None:
    """To a bias, to none, and behind a MatMul: the same as another bias."""
    weights = W if kind == "Conv" else normal("m", 10, 8)
    shape = IMAGE if kind == "Conv" else (6, 10)
    more = numpy_helper.to_array(B) * 3
    for inputs in (["x", weights.name], ["x", weights.name, "b"])[: 1 if kind == "MatMul" else 2]:
        small = Small([node(kind, inputs, ["y"])], {"x": shape}, ["y"], [weights, B])
        plain, moved = make_static(small), make_static(small, corrections={"y": more})
        feed = plain.feeds[0]
        step = float(moved.tensors["y"].scale) if kind == "Conv" else 1e-2
        added = run(moved.after, "off", feed)["y"] - run(plain.after, "off", feed)["y"]
        expected = more.reshape(-1, 1, 1) if kind == "Conv" else more
        within = np.abs(added - expected) <= 2 * step
        assert kind == "Conv" or within.all()
        assert within.mean() > 0.5  # the rest leaves the range that was calibrated without
        assert not moved.dequantized


# -- opsets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 23, 27])
def test_opsets(opset: int) -> None:
    counted: dict[str, Any] = {"num_outputs": 2} if opset >= 18 else {}
    made = [
        CONV,
        node("MaxPool", ["h"], ["p"], kernel_shape=[2, 2]),
        node("Add", ["p", "p"], ["s"]),
        node("Relu", ["s"], ["r"]),
        node("Split", ["r"], ["a", "c"], axis=1, **counted),
        node("Concat", ["c", "a"], ["cat"], axis=1),
        node("HardSigmoid", ["cat"], ["g"]),
        node("Mul", ["g", "cat"], ["gated"]),
        node("GlobalAveragePool", ["gated"], ["mean"]),
        node("Reshape", ["mean", "shape"], ["f"]),
        node("Gemm", ["f", "k", "kb"], ["q"]),
        node("Sigmoid", ["q"], ["y"]),
    ]
    held = [W, B, integers("shape", 2, -1), normal("k", 8, 7), normal("kb", 7)]
    kernels = {
        "QLinearConv": 1,
        "QLinearAdd": 2,
        "NhwcMaxPool": 1,
        "Split": 1,
        "QLinearConcat": 1,
        "QLinearMul": 1,
        "QLinearGlobalAveragePool": 1,
        "Reshape": 1,
        "QGemm": 1,
        "QLinearSigmoid": 1,
    }
    static = make_static(Small(made, {"x": IMAGE}, ["y"], held, opset=opset))
    assert static.kernels == kernels
    assert (static.counts["QuantizeLinear"], static.counts["DequantizeLinear"]) == (1, 1)
    assert static.dequantized == []
    assert {entry.version for entry in static.after.opset_import} == {opset}
    check_numbers(static, compared=False)


@pytest.mark.parametrize("opset", [11, 12])
def test_there_are_no_units_where_channels_have_no_scales(opset: int) -> None:
    small = Small([CONV], {"x": IMAGE}, ["h"], [W, B], opset=opset)
    assert make_static(small).found == []
    later = make_static(Small([CONV], {"x": IMAGE}, ["h"], [W, B], opset=13)).after
    later.opset_import[0].version = opset
    with pytest.raises(onnx.checker.ValidationError, match="axis"):
        onnx.checker.check_model(later, full_check=True)


def test_there_are_no_units_where_the_runtime_has_no_conversions() -> None:
    """onnxruntime 1.32 reads opset 28; when it has QuantizeLinear-28, OPSETS can go on."""
    assert make_static(Small([CONV], {"x": IMAGE}, ["h"], [W, B], opset=28)).found == []
    later = make_static(Small([CONV], {"x": IMAGE}, ["h"], [W, B], opset=27)).after
    later.opset_import[0].version = 28
    with pytest.raises(RuntimeFailure, match=r"QuantizeLinear\(28\)"):
        executed(later)


# -- what must not be done, and why ----------------------------------------------------------------


def bypassed(proto: onnx.ModelProto, op: str = BARRIER) -> onnx.ModelProto:
    """Without the nodes of an operator of one operand."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    source = {n.output[0]: n.input[0] for n in made.graph.node if n.op_type == op}
    assert source
    for each in made.graph.node:
        each.input[:] = [source.get(name, name) for name in each.input]
    for each in [n for n in made.graph.node if n.op_type == op]:
        made.graph.node.remove(each)
    return made


def check_float_between(static: Static) -> None:
    """Optimisations change no number: nothing is quantized that was not asked for."""
    feed = static.feeds[0]
    for name, expected in run(static.after, "off", feed).items():
        found = run(static.after, "default", feed)[name]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert static.dequantized == []


FLOAT_BETWEEN: dict[str, tuple[list[onnx.NodeProto], str]] = {
    "Conv": ([node("Conv", ["h", "k"], ["z"], pads=[1, 1, 1, 1])], "QLinearConv"),
    "Conv and bias": ([node("Conv", ["h", "k", "b"], ["z"], pads=[1, 1, 1, 1])], "QLinearConv"),
    "Conv and Relu": (
        [node("Conv", ["h", "k"], ["z0"], pads=[1, 1, 1, 1]), node("Relu", ["z0"], ["z"])],
        "QLinearConv",
    ),
    "Conv behind Transpose": (
        [
            node("Transpose", ["h"], ["t"], perm=[0, 1, 3, 2]),
            node("Conv", ["t", "k"], ["z0"], pads=[1, 1, 1, 1]),
            node("Transpose", ["z0"], ["z"], perm=[0, 1, 3, 2]),
        ],
        "QLinearConv",
    ),
    "ConvTranspose": ([node("ConvTranspose", ["h", "k"], ["z"], pads=[1, 1, 1, 1])], ""),
    "AveragePool": (
        [node("AveragePool", ["h"], ["z"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
        "QLinearAveragePool",
    ),
    "Softmax": ([node("Softmax", ["h"], ["z"])], "QLinearSoftmax"),
}


@pytest.mark.parametrize("name", FLOAT_BETWEEN)
def test_what_stays_float_between_integers_stays_so(name: str) -> None:
    """Without the copy, onnxruntime takes it onto integers all the same."""
    inner, unasked = FLOAT_BETWEEN[name]
    made = [CONV, *inner, node("Conv", ["z", "v"], ["y"])]
    held = [W, B, V, normal("k", 8, 8, 3, 3, scale=0.1)]
    names = {n.output[0] for n in inner}
    static = make_static(Small(made, {"x": IMAGE}, ["y"], held), choose=without(*names))
    assert {inner[0].op_type, inner[-2:][0].op_type} & (QUANTIZED_UNASKED | SLOW_ON_INTEGERS)
    assert set(static.chosen) == {"h", "y"}
    assert static.counts["QLinearConv"] == 2
    assert static.counts[BARRIER] == 1
    check_float_between(static)
    bare = executed(bypassed(static.after))
    kernels = [n.op_type for n in bare.graph.node]
    if unasked:
        assert kernels.count(unasked) == (3 if unasked == "QLinearConv" else 1)
    else:
        held = {t.name for t in bare.graph.initializer}  # type: ignore[assignment]
        dequantized = [n.input[0] for n in bare.graph.node if n.op_type == "DequantizeLinear"]
        assert any(name in held for name in dequantized)


def test_a_gemm_stays_float_between_integers() -> None:
    made = [
        node("Sigmoid", ["x"], ["h"]),
        node("Gemm", ["h", "k", "b"], ["z"]),
        node("Sigmoid", ["z"], ["y"]),
    ]
    small = Small(made, {"x": (6, 24)}, ["y"], [normal("k", 24, 8), B])
    static = make_static(small, choose=without("z"))
    assert static.counts["QGemm"] == 0
    check_float_between(static)
    assert "QGemm" in {n.op_type for n in executed(bypassed(static.after)).graph.node}


def test_nothing_is_held_back_that_would_not_be_drawn_in() -> None:
    """The other side is floats, or somebody else reads the result."""
    last = node("Conv", ["z", "v"], ["y"])
    for made in (
        [node("Tanh", ["x"], ["t"]), node("Conv", ["t", "k"], ["z"]), last],
        [CONV, node("Conv", ["h", "k"], ["z"]), last, node("Tanh", ["z"], ["t"])],
    ):
        outputs = ["y", "t"] if len(made) == 4 else ["y"]
        held = [W, B, V, normal("k", 8, 8, 1, 1)]
        static = make_static(Small(made, {"x": IMAGE}, outputs, held), choose=without("z"))
        assert static.counts[BARRIER] == 0
        check_float_between(static)


def changed(proto: onnx.ModelProto, change: Callable[[onnx.ModelProto], None]) -> onnx.GraphProto:
    """The graph that onnxruntime runs of a changed copy."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    change(made)
    return executed(made).graph


def test_signed_activations_with_branches_do_not_fuse() -> None:
    made = [CONV, node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["y"])]
    static = make_static(Small(made, {"x": IMAGE}, ["y"], [W, B]))

    def sign(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.UINT8:
                array = numpy_helper.to_array(tensor).astype(np.int16) - 128
                tensor.CopyFrom(numpy_helper.from_array(array.astype(np.int8), tensor.name))

    found = [n.op_type for n in changed(static.after, sign).node]
    assert "QLinearConv" not in found


def test_movement_without_zero_points_keeps_conversions() -> None:
    held = [integers("shape", 2, 8, 10, 6)]
    static = make_static(between("Reshape", "shape", held=held))

    def omit(proto: onnx.ModelProto) -> None:
        for each in proto.graph.node:
            if each.op_type in ("QuantizeLinear", "DequantizeLinear"):
                shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
                if len(each.input) > 2 and shapes.get(each.input[2]) == []:
                    del each.input[2]

    found = [n.op_type for n in changed(static.after, omit).node]
    assert found.count("DequantizeLinear") > static.counts["DequantizeLinear"]


@pytest.mark.parametrize("clamp", ["Relu", "Clip"])
def test_a_clamp_inside_the_range_keeps_the_convolution_in_floats(clamp: str) -> None:
    made = [CONV, node(clamp, ["h", *(["low", "high"] if clamp == "Clip" else [])], ["y"])]
    held = [W, B, constant("low", 0.0), constant("high", 0.5)]
    static = make_static(Small(made, {"x": IMAGE}, ["y"], held))

    def widen(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            if clamp == "Relu" and tensor.name == "y/zero_point":
                tensor.CopyFrom(numpy_helper.from_array(np.array(9, np.uint8), tensor.name))
            if clamp == "Clip" and tensor.name == "y/scale":
                array = numpy_helper.to_array(tensor) * np.float32(2)
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), tensor.name))

    assert static.kernels == {"QLinearConv": 1}
    assert "QLinearConv" not in [n.op_type for n in changed(static.after, widen).node]


def test_a_float_bias_makes_a_float_gemm() -> None:
    """The reason why biases are integers: MatMul and Add of floats become a Gemm that stays one."""
    static = make_static(Small(product("right"), {"x": (6, 24)}, ["y"], [M, BIAS]))

    def restore(proto: onnx.ModelProto) -> None:
        (adder,) = (n for n in proto.graph.node if n.op_type == "Add")
        adder.input[1] = "float bias"
        proto.graph.initializer.append(constant("float bias", numpy_helper.to_array(BIAS)))

    found = [n.op_type for n in changed(static.after, restore).node]
    assert "Gemm" in found
    assert "QGemm" not in found


def test_the_table_names_what_these_tests_cover() -> None:
    tested = {"Conv", "MatMul", "Gemm", "Add", "Mul", "BatchNormalization", "Concat", "Split"}
    tested |= {op for op, *_ in OPERATORS.values()} | {op for op, *_ in MOVES.values()}
    tested |= {"Squeeze", "Unsqueeze", "Flatten"}
    assert set(ORT_CPU) == tested
    assert not {"Softmax", "AveragePool"} & set(ORT_CPU)


# -- the CPU ---------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_vnni_is_what_the_cpu_says() -> None:
    if platform.machine() in ("aarch64", "arm64"):
        assert has_vnni()
        return
    flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    assert has_vnni() == bool(flags & {"avx512_vnni", "avx_vnni"})


@pytest.mark.parametrize("kind", ["Conv", "MatMul", "Gemm"])
@pytest.mark.parametrize("bits", [7, 8])
def test_sums_of_two_products_do_not_saturate(kind: str, bits: int) -> None:
    """All weights and activations at the end of their ranges; 8 bits need VNNI."""
    if bits == 8 and not has_vnni():
        pytest.skip("this CPU adds two products in 16 bits")
    weights = constant("k", np.full((32, 64, 1, 1) if kind == "Conv" else (64, 32), 0.5))
    shape = (1, 64, 4, 4) if kind == "Conv" else (8, 64)
    made = [node(kind, ["x", "k"], ["y"])]
    before = Small(made, {"x": shape}, ["y"], [weights]).proto()
    feed = {"x": np.full(shape, 3.0, np.float32)}
    static = make_static(before, [feed], options=Options(bits, "max"))
    assert static.counts["QLinearConv" if kind == "Conv" else "MatMulIntegerToFloat"] or (
        kind == "Gemm" and static.counts["QGemm"]
    )
    np.testing.assert_allclose(run(static.after, "default", feed)["y"], 96.0, rtol=1e-5)
