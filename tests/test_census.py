"""The census, and which executed node computes what: facts about onnxruntime's optimised graph."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.census import census
from graphopt.errors import ModelError, RuntimeFailure
from graphopt.marked import MarkedCopy
from tests import graphs
from tests.graphs import value

INT8, UINT8 = np.int8, np.uint8
WEIGHTS = [graphs.weight(f"w{at}", (16, 16, 3, 3), at) for at in range(3)]
IMAGE = [value("x", (1, 16, 8, 8))]


def const(name: str, array: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, dtype), name)


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


def build(*parts: Any, opset: int = 21) -> bytes:
    return bytes(graphs.model(*parts, opset=opset).SerializeToString())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; nothing may be left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ----------------------------------------------------------------------------------- counts


def test_census_counts_bodies_and_domains(temporary: Path) -> None:
    then = helper.make_graph([node("Exp", "x", "t")], "then", [], [value("t", None)])
    other = helper.make_graph([node("Neg", "x", "e")], "else", [], [value("e", None)])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    gelu = helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft")
    model = graphs.model(
        [choice, gelu],
        [value("x", (4,)), value("c", (), TensorProto.BOOL)],
        [value("z", (4,))],
        domains=["com.microsoft"],
    )
    counted = census(model.SerializeToString(), optimizations="off")
    assert counted.counts == {"If": 1, "Exp": 1, "Neg": 1, "com.microsoft::Gelu": 1}
    assert counted.nodes == 4
    assert counted.integer == {}
    assert not list(temporary.iterdir())


def test_census_shows_what_each_level_fuses() -> None:
    constants = [const("half", 0.5), const("one", 1.0), const("root", np.sqrt(2.0))]
    nodes = [
        node("Div", "x root", "d"),
        node("Erf", "d", "e"),
        node("Add", "e one", "a"),
        node("Mul", "x a", "m"),
        node("Mul", "m half", "y"),
    ]

    def gelu(opset: int) -> bytes:
        parts = nodes, [value("x", ("N", 4))], [value("y", None)], constants
        return build(*parts, opset=opset)

    assert census(gelu(17), optimizations="off").nodes == 5
    assert census(gelu(17), optimizations="extended").counts == {"com.microsoft::Gelu": 1}
    assert census(gelu(20), optimizations="extended").counts == {"Gelu": 1}  # standard now
    conv = build(
        [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Relu", "c", "y")],
        [value("x", (1, 16, 8, 8))],
        [value("y", None)],
        [const("w", np.ones((16, 16, 3, 3)))],
    )
    assert census(conv, optimizations="basic").counts == {"Conv": 1, "Relu": 1}
    assert census(conv, optimizations="extended").counts == {"com.microsoft::FusedConv": 1}


def test_what_is_no_model_is_an_error(temporary: Path) -> None:
    with pytest.raises(ModelError, match="not an ONNX model"):
        census(b"\xff\xff\xff\xff")
    mismatched = build([node("MatMul", "x w", "y", "product")], IMAGE, ["y"], [graphs.weight("w")])
    with pytest.raises(RuntimeFailure, match=r"Load model from model failed.*\(product\)"):
        census(mismatched)
    assert not list(temporary.iterdir())


# --------------------------------------------------------------------------- integer kernels


def quantized_matmul() -> bytes:
    """Activations u8 and weights s8 per channel, as DequantizeLinear around a MatMul."""
    nodes = [
        node("QuantizeLinear", "x s zu", "q"),
        node("DequantizeLinear", "q s zu", "xd"),
        node("DequantizeLinear", "w ws wz", "wd", axis=1),
        node("MatMul", "xd wd", "y"),
    ]
    weights = [
        const("s", 0.1),
        const("zu", 128, UINT8),
        const("w", np.ones((16, 8)), INT8),
        const("ws", np.full(8, 0.1)),
        const("wz", np.zeros(8), INT8),
    ]
    return build(nodes, [value("x", ("N", 16))], [value("y", None)], weights)


def test_census_sees_integer_kernels() -> None:
    fused = census(quantized_matmul(), ["y"])
    assert fused.counts["com.microsoft::MatMulIntegerToFloat"] == 1
    assert fused.integer == {"com.microsoft::MatMulIntegerToFloat": 1}
    assert (fused.integer_kernels, fused.unfused, fused.dequantized_constants) == (1, (), ())
    assert (fused.quantized, fused.dequantized) == (("x",), ())
    raw = census(quantized_matmul(), ["y"], optimizations="off")
    assert (raw.integer_kernels, raw.unfused, raw.dequantized_constants) == (0, ("y",), ("wd",))
    assert (raw.quantized, raw.dequantized) == (("x",), ("xd",))


def convolutions(between: list[onnx.NodeProto], last: str) -> bytes:
    """Two quantized convolutions with something between `a` and `b`, and QDQ on both sides."""
    qdq = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
        node("DequantizeLinear", "w ws wz", "w1", axis=0),
        node("Conv", "xd w1", "c1", pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "c1 s z", "aq"),
        node("DequantizeLinear", "aq s z", "a"),
        *between,
        node("DequantizeLinear", "w ws wz", "w2", axis=0),
        node("Conv", "b w2", "c2", pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "c2 s z", "yq"),
        node("DequantizeLinear", "yq s z", last),
    ]
    rng = np.random.default_rng(0)
    weights = [
        const("s", 0.1),
        const("z", 128, UINT8),
        const("w", rng.integers(-9, 9, (16, 16, 3, 3)), INT8),
        const("ws", np.full(16, 0.1)),
        const("wz", np.zeros(16), INT8),
    ]
    return build(qdq, [value("x", (1, 16, 8, 8))], [value(last, None)], weights)


def test_roots_that_fused_and_that_did_not() -> None:
    """Tanh has no integer kernel; a pool between equal scales moves 8-bit data."""
    pool = [
        node("MaxPool", "a", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "p s z", "pq"),
        node("DequantizeLinear", "pq s z", "b"),
    ]
    roots = ["c1", "p", "c2", "y", "nothing"]
    moved = census(convolutions(pool, "y"), roots)
    assert moved.unfused == ("nothing",)  # y is the dequantized c2
    assert moved.integer["com.microsoft::QLinearConv"] == 2
    assert sum(n for op, n in moved.integer.items() if "MaxPool" in op) == 1
    assert moved.integer_kernels == 2
    assert (moved.quantized, moved.dequantized) == (("x",), ("y",))

    tanh = [
        node("Tanh", "a", "p"),
        node("QuantizeLinear", "p s z", "pq"),
        node("DequantizeLinear", "pq s z", "b"),
    ]
    stuck = census(convolutions(tanh, "y"), roots)
    assert stuck.unfused == ("p", "nothing")
    assert (stuck.quantized, stuck.dequantized) == (("x", "p"), ("a", "y"))


def test_weight_only_conv_keeps_its_dequantize() -> None:
    """onnxruntime does not fold DequantizeLinear of a weight: it runs every time."""
    model = build(
        [node("DequantizeLinear", "w s z", "d"), node("Conv", "x d", "y")],
        [value("x", (1, 4, 8, 8))],
        [value("y", None)],
        [const("w", np.ones((4, 4, 3, 3)), INT8), const("s", 0.1), const("z", 0, INT8)],
    )
    counted = census(model, ["y"])
    assert counted.dequantized_constants == ("d",)
    assert (counted.dequantized, counted.unfused) == ((), ("y",))


def test_constants_of_outer_graphs_and_constant_nodes_are_constants() -> None:
    then = helper.make_graph([node("DequantizeLinear", "w s", "t")], "then", [], [value("t")])
    constant = helper.make_node("Constant", [], ["v"], value=const("", np.ones(4), INT8))
    other = helper.make_graph(
        [constant, node("DequantizeLinear", "v s", "e")], "else", [], [value("e")]
    )
    model = build(
        [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        [value("c", (), TensorProto.BOOL)],
        [value("y")],
        [const("w", np.ones(4), INT8), const("s", 0.5)],
    )
    counted = census(model, optimizations="off")
    assert sorted(counted.dequantized_constants) == ["e", "t"]
    assert counted.counts == {"DequantizeLinear": 2, "If": 1}  # onnxruntime lifted the Constant


# ------------------------------------------------------------------------------- alignment


def aligned(model: bytes) -> dict[str, tuple[str, list[str]]]:
    """By root: the operator that computes it, and the values of the nodes that went into it."""
    with MarkedCopy(model) as copy:
        graph = copy.executed(threads=1)
    found: dict[str, tuple[str, list[str]]] = {
        root.name: (executed.op, []) for executed, root in graph.roots.items()
    }
    for original, owner in graph.owners.items():
        found[graph.roots[owner].name][1].append(original.outputs[0].name)  # type: ignore[union-attr]
    return {root: (op, sorted(values)) for root, (op, values) in found.items()}


def conv(x: str, w: str, y: str) -> onnx.NodeProto:
    return node("Conv", f"{x} {w}", y, pads=[1, 1, 1, 1])


def test_activations_go_into_the_convolution_before_them() -> None:
    nodes = [
        conv("x", "w0", "a"),
        node("Relu", "a", "b"),
        conv("b", "w1", "c"),
        node("Sigmoid", "c", "g"),
        node("Mul", "c g", "d"),
        conv("d", "w2", "y"),
    ]
    found = aligned(build(nodes, IMAGE, [value("y", None)], WEIGHTS))
    assert found["b"] == ("Conv", ["a", "b"])
    assert found["y"] == ("Conv", ["y"])
    # SiLU is a kernel of its own, or part of the convolution, as onnxruntime likes
    assert {value for _, values in found.values() for value in values} == set("abcgdy")
    assert "g" in found["d"][1]


def test_a_residual_sum_goes_into_the_convolution_that_reads_the_other_operand() -> None:
    nodes = [
        conv("x", "w0", "a"),
        conv("a", "w1", "b"),
        node("Add", "a b", "s"),
        node("Relu", "s", "r"),
        conv("r", "w2", "y"),
    ]
    found = aligned(build(nodes, IMAGE, [value("y", None)], WEIGHTS))
    assert found["r"] == ("Conv", ["b", "r", "s"])
    assert found["a"] == ("Conv", ["a"])
    assert found["y"] == ("Conv", ["y"])


def test_an_integer_convolution_ends_in_integers() -> None:
    """Its output loses its name to another layout, and the next one takes the DequantizeLinear."""
    sigmoid = [
        node("Sigmoid", "a", "p"),
        node("QuantizeLinear", "p s z", "pq"),
        node("DequantizeLinear", "pq s z", "b"),
    ]
    found = aligned(convolutions(sigmoid, "y"))
    assert found["aq"] == ("QLinearConv", ["aq", "c1", "w1", "xd"])
    assert found["pq"] == ("QLinearSigmoid", ["a", "p", "pq"])
    assert found["yq"] == ("QLinearConv", ["b", "c2", "w2", "yq"])


def test_a_fused_matmul_takes_the_transpose_before_it() -> None:
    nodes = [
        node("Exp", "k", "e"),
        node("Transpose", "e", "t", perm=[0, 2, 1]),
        node("MatMul", "q t", "m"),
        node("Mul", "m scale", "y"),
    ]
    inputs = [value("q", (2, 4, 8)), value("k", (2, 6, 8))]
    found = aligned(build(nodes, inputs, [value("y", None)], [const("scale", 0.125)]))
    assert found["y"] == ("FusedMatMul", ["m", "t", "y"])
    assert found["e"] == ("Exp", ["e"])


def test_equal_names_of_nodes_do_not_confuse() -> None:
    nodes = [node("Exp", "x", "a", "n"), node("Neg", "a", "b", "n"), node("Abs", "b", "y", "n")]
    found = aligned(build(nodes, [value("x")], [value("y")]))
    assert found == {"a": ("Exp", ["a"]), "b": ("Neg", ["b"]), "y": ("Abs", ["y"])}
