"""Products whose activations are quantized at run time: numbers, kernels, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.quantize.dynamic import can_be_dynamic, make_dynamic
from tests import graphs
from tests.optimized import (
    applied,
    nodes,
    noise_of_rounding,
    operators,
    run,
    sqnr,
    stored,
)

Array = NDArray[Any]
RNG = np.random.default_rng(0)
K, N = 96, 160
W = RNG.normal(size=(K, N)).astype(np.float32)
B = RNG.normal(size=N).astype(np.float32)
X = RNG.normal(size=(2, 24, K)).astype(np.float32)


def open_shape(rank: int) -> list[str]:
    """Sizes of an output, of which nothing is said."""
    return [f"d{axis}" for axis in range(rank)]


def constant(name: str, array: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def product(
    weights: Array = W,
    bias: Array | None = B,
    opset: int = 17,
    shape: tuple[int | str, ...] = ("a", "b", K),
) -> onnx.ModelProto:
    """y = x w (+ b)."""
    held = [constant("w", weights)]
    made = [graphs.node("MatMul", ["x", "w"], ["y" if bias is None else "p"])]
    if bias is not None:
        held.append(constant("b", bias))
        made.append(graphs.node("Add", ["b", "p"], ["y"]))
    rank = max(len(shape), np.ndim(bias) if bias is not None else 0)
    inputs, outputs = [graphs.value("x", shape)], [graphs.value("y", open_shape(rank))]
    return graphs.model(made, inputs, outputs, held, opset=opset)


def gemm(opset: int = 17, weights: Array = W, **attributes: Any) -> onnx.ModelProto:
    held = [constant("w", weights), constant("b", B)]
    made = [graphs.node("Gemm", ["x", "w", "b"], ["y"], **attributes)]
    inputs, outputs = [graphs.value("x", ("a", K))], [graphs.value("y", open_shape(2))]
    return graphs.model(made, inputs, outputs, held, opset=opset)


def quantized(before: onnx.ModelProto, *, checked: bool = True, **options: Any) -> onnx.ModelProto:
    """With every product and LSTM dynamic."""

    def change(edit: Editor) -> None:
        for node in nodes(edit, "MatMul", "Gemm", "LSTM"):
            assert can_be_dynamic(node, edit) is None
            assert make_dynamic(edit, node, **options)

    made, edit = applied(before, change, checked=checked)
    assert {change.rule for change in edit.changes} == {"quantize-dynamic"}
    return made


def reason(before: onnx.ModelProto, op: str = "MatMul") -> str | None:
    edit = Editor(Model.load(before))
    node = nodes(edit, op)[0]
    found = can_be_dynamic(node, edit)
    if found is not None:
        with pytest.raises(ValueError, match="cannot be dynamic"):
            make_dynamic(edit, node)
        assert edit.mark() == (0, 0)
    return found


def exactly(x: Array, q: Array, scales: Array, bias: Array | float) -> Array:
    """DynamicQuantizeLinear and the product as ONNX defines them, in float64 on integers."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(np.float32(-low) / step), 0, 255)
    u = np.clip(np.rint(x / step) + zero, 0, 255)
    result: Array = (u - zero) @ q.astype(np.float64) * (np.float64(step) * scales) + bias
    return result


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("bias", [None, B])
def test_products_are_those_of_the_integers(opset: int, portable: bool, bias: Array | None) -> None:
    made = quantized(product(bias=bias, opset=opset), portable=portable)
    held = stored(made)
    expected = exactly(X, held["w/int8"], held["w/scales"], 0.0 if bias is None else bias)
    for level in ("off", "default"):
        np.testing.assert_allclose(run(made, level, x=X), expected, rtol=1e-5, atol=1e-4)
    if portable and opset >= 11:
        assert all(not node.domain for node in made.graph.node)


def test_what_is_lost_is_what_rounding_loses() -> None:
    made = quantized(product(bias=None))
    held = stored(made)
    step = (X.max() - X.min()) / 255
    lost = noise_of_rounding(X, step) + noise_of_rounding(W, held["w/scales"])
    found = sqnr(X @ W, run(made, x=X))
    assert found > 30
    assert found == pytest.approx(-10 * np.log10(lost), abs=0.5)


def test_seven_bits_cannot_saturate_sums_of_two_products() -> None:
    held = stored(quantized(product(), bits=7))
    assert np.abs(held["w/int8"].astype(int)).max() == 64
    assert 2 * 255 * 64 < 2**15


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm(trans: int) -> None:
    before = gemm(transB=trans, weights=W.T if trans else W)
    made = quantized(before)
    assert sqnr(run(before, x=X[0]), run(made, x=X[0])) > 30
    assert operators(made) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (2, 1, 3, K), (0, K)])
def test_activations_of_unknown_rank(shape: tuple[int, ...]) -> None:
    before = product(bias=None)
    for info in (before.graph.input[0], before.graph.output[0]):
        info.type.tensor_type.ClearField("shape")
    made = quantized(before, checked=False)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected, found = x @ W, run(made, x=x)
    assert found.shape == expected.shape
    assert not x.size or sqnr(expected, found) > 30


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("rows", [1, 7])
def test_odd_sizes(rows: int, columns: int) -> None:
    weights, x = W[:rows, :columns], X[..., :rows]
    made = quantized(product(weights, B[:columns], shape=("a", "b", rows)))
    held = stored(made)
    expected = exactly(x, held["w/int8"], held["w/scales"], B[:columns])
    np.testing.assert_allclose(run(made, x=x), expected, rtol=1e-5, atol=1e-5)


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("shape", [("a", "b", K), (2, 24, K)])
def test_one_reader_is_one_kernel(opset: int, portable: bool, shape: tuple[int | str, ...]) -> None:
    made = quantized(product(opset=opset, shape=shape), portable=portable)
    assert operators(made) == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("portable", [False, True])
def test_readers_share_what_is_quantized_once(portable: bool) -> None:
    made = [graphs.node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(3)]
    held = [constant(f"w{i}", np.roll(W, i, 0)) for i in range(3)]
    outputs = [graphs.value(f"y{i}", open_shape(3)) for i in range(3)]
    before = graphs.model(made, [graphs.value("x", ("a", "b", K))], outputs, held)
    after = quantized(before, portable=portable)
    assert [n.op_type for n in after.graph.node].count("DynamicQuantizeLinear") == 1
    assert operators(after) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3}
    assert sqnr(run(before, x=X), run(after, x=X)) > 30


def test_weights_that_two_nodes_read_stay_one() -> None:
    made = [
        graphs.node("MatMul", ["x", "w"], ["h"]),
        graphs.node("Relu", ["h"], ["r"]),
        graphs.node("MatMul", ["r", "w"], ["y"]),
    ]
    square = W[:, :K]
    inputs, outputs = [graphs.value("x", ("a", K))], [graphs.value("y", open_shape(2))]
    after = quantized(graphs.model(made, inputs, outputs, [constant("w", square)]))
    assert sorted(stored(after)) == ["w/int8", "w/scales"]
    assert operators(after)["DynamicQuantizeMatMul"] == 2


def test_weights_of_which_one_reader_stays_float() -> None:
    made = [
        graphs.node("MatMul", ["x", "w"], ["y"]),
        graphs.node("ReduceSum", ["w"], ["s"], keepdims=0),
    ]
    outputs = [graphs.value("y", open_shape(2)), graphs.value("s", ())]
    before = graphs.model(made, [graphs.value("x", ("a", K))], outputs, [constant("w", W)])
    assert sorted(stored(quantized(before))) == ["w", "w/int8", "w/scales"]


@pytest.mark.parametrize("way", ["Constant", "Transpose", "Identity", "Cast"])
def test_weights_behind_other_nodes(way: str) -> None:
    node, held = graphs.node("Identity", ["v"], ["w"]), [constant("v", W)]
    expected = W
    if way == "Constant":
        node, held = graphs.node("Constant", [], ["w"], value=constant("", W)), []
    elif way == "Transpose":
        node = graphs.node("Transpose", ["v"], ["w"], perm=[1, 0])
        held = [constant("v", W.T)]
    elif way == "Cast":
        node = graphs.node("Cast", ["v"], ["w"], to=TensorProto.FLOAT)
        held = [constant("v", W.astype(np.float16))]
        expected = W.astype(np.float16).astype(np.float32)
    made = [node, graphs.node("MatMul", ["x", "w"], ["y"])]
    inputs, outputs = [graphs.value("x", ("a", K))], [graphs.value("y", open_shape(2))]
    after = quantized(graphs.model(made, inputs, outputs, held))
    assert operators(after) == {"DynamicQuantizeMatMul": 1}
    assert {n.op_type for n in after.graph.node} == {
        "DynamicQuantizeLinear",
        "MatMulIntegerToFloat",
    }
    assert len(stored(after)) == 2
    assert sqnr(X[0] @ expected, run(after, x=X[0])) > 30


@pytest.mark.parametrize("portable", [False, True])
def test_inside_bodies(portable: bool) -> None:
    branches = [
        graphs.graph(
            [
                graphs.node("MatMul", ["x", held], [f"p{i}"]),
                graphs.node("Add", [f"p{i}", "b"], [f"y{i}"]),
            ],
            [],
            [graphs.value(f"y{i}", open_shape(2))],
            [constant("own", -W)] if held == "own" else [],
            name=f"branch{i}",
        )
        for i, held in enumerate(["w", "own"])
    ]
    inputs = [graphs.value("x", ("a", K)), graphs.CONDITION]
    before = graphs.model(
        [graphs.if_node(*branches)],
        inputs,
        [graphs.value("y", open_shape(2))],
        [constant("w", W), constant("b", B)],
    )
    after = quantized(before, portable=portable)
    assert operators(after) == {"If": 1, "DynamicQuantizeMatMul": 2}
    for c in (True, False):
        feed = {"x": X[0], "c": np.array(c)}
        assert sqnr(run(before, **feed), run(after, **feed)) > 30


@pytest.mark.parametrize(
    ("bias", "shape", "rows"),
    [
        ((4, 1, N), ("a", K), (24,)),
        ((1, 1, N), ("a", K), (24,)),
        ((24, N), ("a", "b", K), (2, 24)),
        ((24, 1), ("a", "b", K), (2, 24)),
    ],
)
def test_a_bias_that_is_no_row_stays_outside(
    bias: tuple[int, ...], shape: tuple[int | str, ...], rows: tuple[int, ...]
) -> None:
    added = np.random.default_rng(2).normal(size=bias).astype(np.float32)
    made = quantized(product(bias=added, shape=shape))
    assert operators(made) == {"DynamicQuantizeMatMul": 1, "Add": 1}
    x = X.reshape(-1, K)[: int(np.prod(rows))].reshape(*rows, K)
    expected, found = x @ W + added, run(made, x=x)
    assert found.shape == expected.shape
    assert sqnr(expected, found) > 30


@pytest.mark.parametrize("bias", [(), (1,), (1, N), (1, 1, N)])
def test_a_bias_that_is_a_row_goes_in(bias: tuple[int, ...]) -> None:
    added = np.random.default_rng(2).normal(size=bias).astype(np.float32)
    made = quantized(product(bias=np.asarray(added)))
    assert operators(made) == {"DynamicQuantizeMatMul": 1}
    assert sqnr(X @ W + added, run(made, x=X)) > 30


def test_a_product_that_is_an_output_keeps_its_name() -> None:
    before = product()
    before.graph.output.append(graphs.value("p", open_shape(3)))
    made = quantized(before)
    assert operators(made)["Add"] == 1
    assert [info.name for info in made.graph.output] == ["y", "p"]


def test_a_change_that_is_denied_is_not_made() -> None:
    edit = Editor(Model.load(product()), denied=[("quantize-dynamic", "y")])
    assert not make_dynamic(edit, nodes(edit, "MatMul")[0])
    assert edit.mark() == (0, 0)


# -- what is refused -------------------------------------------------------------------------------


def test_reasons() -> None:
    assert reason(product(shape=(K,), bias=None)) == "the activation is a vector"
    assert reason(product(W[None].repeat(2, 0), None)) == "the weights have 3 axes instead of 2"
    spoilt = W.copy()
    spoilt[3, 4] = np.nan
    assert reason(product(spoilt)) == "the weights are not finite"
    assert reason(product(W[:, :0], None)) == "the weights are empty"
    assert reason(gemm(alpha=2.0), "Gemm") == "alpha is 2"
    assert reason(gemm(beta=0.5), "Gemm") == "beta is 0.5"
    assert reason(gemm(transA=1), "Gemm") == "transA is 1"
    assert reason(product(), "Add") == "it is no MatMul or Gemm"
    half = product(W.astype(np.float16), None)
    half.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    half.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert reason(half) == "the weights are float16"
    fed = product()
    fed.graph.input.append(graphs.value("w", (K, N)))
    assert reason(fed) == "the weights are not constant"


# -- LSTM ------------------------------------------------------------------------------------------


def recurrent(
    op: str = "LSTM", directions: int = 1, outputs: tuple[str, ...] = ("y",), **attributes: Any
) -> onnx.ModelProto:
    gates, hidden, width = {"LSTM": 4, "GRU": 3}[op], 24, 40
    rng = np.random.default_rng(3)
    held = [
        constant(name, rng.normal(size=(directions, gates * hidden, size)).astype(np.float32) / 5)
        for name, size in (("w", width), ("r", hidden))
    ]
    held.append(constant("b", rng.normal(size=(directions, 2 * gates * hidden)).astype("f4") / 5))
    stated = {"hidden_size": hidden, **attributes}
    if directions == 2:
        stated["direction"] = "bidirectional"
    made = [graphs.node(op, ["x", "w", "r", "b"], list(outputs), **stated)]
    ranks = dict(zip(outputs, (4, 3, 3), strict=False))
    shown = [graphs.value(name, open_shape(ranks[name])) for name in outputs if name]
    return graphs.model(made, [graphs.value("x", ("t", "n", width))], shown, held)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("outputs", [("y",), ("", "y"), ("y", "h", "c")])
def test_lstm(directions: int, outputs: tuple[str, ...]) -> None:
    before = recurrent("LSTM", directions, outputs)
    after = quantized(before)
    assert operators(after) == {"DynamicQuantizeLSTM": 1}
    x = np.random.default_rng(4).normal(size=(11, 3, 40)).astype(np.float32)
    assert sqnr(run(before, x=x), run(after, x=x)) > 30
    held = stored(after)
    assert held["w/int8"].shape == (directions, 40, 96)
    wide = held["w/int8"].astype(np.float32) * held["w/scales"][:, None, :]
    step = held["w/scales"][:, None, :]
    original = stored(before)["w"].transpose(0, 2, 1)
    assert (np.abs(wide - original) <= step / 2 * (1 + 1e-5)).all()


def test_lstm_of_seven_bits() -> None:
    held = stored(quantized(recurrent(), bits=7))
    assert [np.abs(held[f"{name}/int8"].astype(int)).max() for name in "wr"] == [64, 64]


def test_recurrent_operators_that_have_no_kernel() -> None:
    gru = recurrent("GRU")
    assert reason(gru, "GRU") == "onnxruntime has no integer kernel of GRU"
    first = recurrent(layout=1)
    assert reason(first, "LSTM") == "the batch comes first, which onnxruntime refuses"
