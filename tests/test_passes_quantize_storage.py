"""Tables of integers, and weights stored in fewer bits than they are computed with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.quantize.embeddings import can_be_int8_table, make_int8_table
from graphopt.passes.quantize.half import can_be_half, can_be_int8, store_half, store_int8
from tests import graphs
from tests.optimized import applied, nodes, operators, run, sqnr, stored

Array = NDArray[Any]
RNG = np.random.default_rng(0)
TABLE = (RNG.normal(size=(50, 24)) * RNG.uniform(0.1, 9, (50, 1))).astype(np.float32)


def constant(name: str, array: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


# -- tables ----------------------------------------------------------------------------------------


def lookup(
    table: Array = TABLE, rank: int = 2, opset: int = 17, way: str = "", **attributes: Any
) -> onnx.ModelProto:
    held, made = [constant("t", table)], []
    if way == "Constant":
        held, made = [], [graphs.node("Constant", [], ["t"], value=constant("", table))]
    if way == "Transpose":
        held, made = [constant("s", table.T)], [graphs.node("Transpose", ["s"], ["t"])]
    made.append(graphs.node("Gather", ["t", "i"], ["y"], **attributes))
    inputs = [graphs.value("i", [f"i{axis}" for axis in range(rank)], TensorProto.INT64)]
    outputs = [graphs.value("y", [f"d{axis}" for axis in range(rank + table.ndim - 1)])]
    return graphs.model(made, inputs, outputs, held, opset=opset)


def integers(before: onnx.ModelProto) -> onnx.ModelProto:
    def change(edit: Editor) -> None:
        for node in nodes(edit, "Gather"):
            assert can_be_int8_table(node, edit) is None
            assert make_int8_table(edit, node)

    made, edit = applied(before, change)
    assert {change.rule for change in edit.changes} == {"quantize-embedding"}
    return made


@pytest.mark.parametrize("opset", [7, 10, 11, 13, 21])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0, 2)])
def test_rows_are_within_half_a_step(opset: int, shape: tuple[int, ...]) -> None:
    made = integers(lookup(rank=len(shape), opset=opset))
    low = -50 if opset >= 11 else 0
    i = np.random.default_rng(1).integers(low, 50, shape)
    step = np.abs(TABLE).max(axis=1, keepdims=True) / 127
    for level in ("off", "default"):
        found = run(made, level, i=i)
        assert found.shape == TABLE[i].shape
        assert (np.abs(found - TABLE[i]) <= step[i] / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis(axis: int) -> None:
    table = RNG.normal(size=(5, 16, 17)).astype(np.float32)
    made = integers(lookup(table, axis=axis))
    i = np.array([[0, 4, 2], [1, 1, 3]])
    expected, found = table.take(i, axis), run(made, i=i)
    assert found.shape == expected.shape
    assert sqnr(expected, found) > 30


def test_the_table_is_never_dequantized_as_a_whole() -> None:
    made = integers(lookup())
    assert operators(made) == {"Gather": 2, "Cast": 1, "Mul": 1}
    held = stored(made)
    assert {name: (a.dtype.name, a.shape) for name, a in held.items()} == {
        "t/int8": ("int8", (50, 24)),
        "t/scales": ("float32", (50, 1)),
    }


@pytest.mark.parametrize("way", ["Constant", "Transpose"])
def test_tables_behind_other_nodes(way: str) -> None:
    made = integers(lookup(way=way))
    assert len(stored(made)) == 2
    i = np.array([[3, 49]])
    assert sqnr(TABLE[i], run(made, i=i)) > 30


def test_tables_that_two_nodes_read_stay_one() -> None:
    before = lookup()
    before.graph.node.append(graphs.node("Gather", ["t", "i"], ["z"]))
    before.graph.output.append(graphs.value("z", ("d0", "d1", "d2")))
    assert len(stored(integers(before))) == 2


def test_tables_inside_bodies() -> None:
    branches = [
        graphs.graph(
            [graphs.node("Gather", ["t", "i"], [f"y{n}"])],
            [],
            [graphs.value(f"y{n}", ("a", "b"))],
            name=f"branch{n}",
        )
        for n in range(2)
    ]
    inputs = [graphs.value("i", ("n",), TensorProto.INT64), graphs.CONDITION]
    outputs, held = [graphs.value("y", ("a", "b"))], [constant("t", TABLE)]
    made = integers(graphs.model([graphs.if_node(*branches)], inputs, outputs, held))
    assert len(stored(made)) == 2
    i = np.array([7, 8])
    assert sqnr(TABLE[i], run(made, i=i, c=np.array(False))) > 30


def test_what_is_no_table() -> None:
    def reason(before: onnx.ModelProto) -> str | None:
        edit = Editor(Model.load(before))
        node = nodes(edit, "Gather")[0]
        found = can_be_int8_table(node, edit)
        with pytest.raises(ValueError, match="cannot read a table of integers"):
            make_int8_table(edit, node)
        return found

    assert reason(lookup(TABLE.reshape(150, 8))) == "rows of fewer than 16 elements"
    assert reason(lookup(TABLE[:2])) == "the table has fewer than 1024 elements"
    assert reason(lookup(opset=6)) == "scales of rows need opset 7"
    assert reason(lookup(np.ones((99, 16), np.int64))) == "the weights are int64"


# -- storage ---------------------------------------------------------------------------------------

C = 32
KERNELS = [(RNG.normal(size=(C, C, 3, 3)) / 20).astype(np.float32) for _ in range(2)]


def convolutions(kernels: list[Array] = KERNELS, opset: int = 17) -> onnx.ModelProto:
    """Two convolutions, which onnxruntime computes in a blocked layout."""
    held = [constant(f"w{i}", kernel) for i, kernel in enumerate(kernels)]
    made = [
        graphs.node("Conv", ["x", "w0"], ["h"], pads=[1, 1, 1, 1]),
        graphs.node("Relu", ["h"], ["r"]),
        graphs.node("Conv", ["r", "w1"], ["y"], pads=[1, 1, 1, 1]),
    ]
    inputs, outputs = [graphs.value("x", (1, C, 8, 8))], [graphs.value("y", (1, C, 8, 8))]
    return graphs.model(made, inputs, outputs, held, opset=opset)


def small(before: onnx.ModelProto, how: str, **options: Any) -> onnx.ModelProto:
    def change(edit: Editor) -> None:
        ask, store = {"half": (can_be_half, store_half), "int8": (can_be_int8, store_int8)}[how]
        chosen = [
            value
            for graph in edit.model.graphs()
            for value in list(graph.values.values())
            if ask(value, edit, **options) is None
        ]
        assert chosen
        for value in chosen:
            assert store(edit, value, **options)

    made, edit = applied(before, change)
    assert {change.rule for change in edit.changes} == {f"store-{how}"}
    return made


@pytest.mark.parametrize(("how", "factor"), [("half", 2), ("int8", 4)])
@pytest.mark.parametrize("opset", [7, 11, 17, 21])
def test_onnxruntime_folds_what_is_stored_small(how: str, factor: int, opset: int) -> None:
    before = convolutions(opset=opset)
    made = small(before, how)
    assert operators(made) == operators(before)
    assert operators(made)["ReorderInput"] <= 1  # the layout that it had, where the CPU has one
    size = sum(a.nbytes for a in stored(made).values())
    assert size - 4 * 2 * C * (how == "int8") == sum(k.nbytes for k in KERNELS) / factor
    x = RNG.normal(size=(1, C, 8, 8)).astype(np.float32)
    for level in ("off", "default"):
        assert sqnr(run(before, level, x=x), run(made, level, x=x)) > {"half": 65, "int8": 35}[how]


def test_numbers_that_are_stored() -> None:
    half = stored(small(convolutions(), "half"))
    assert half["w0/float16"].dtype == np.float16
    assert (np.abs(half["w0/float16"] - KERNELS[0]) <= np.abs(KERNELS[0]) * 2.0**-11 + 2e-8).all()
    held = stored(small(convolutions(), "int8"))
    kept = held["w1/int8"] * held["w1/scales"]
    assert held["w1/scales"].shape == (C, 1, 1, 1)
    assert (np.abs(kept - KERNELS[1]) <= held["w1/scales"] / 2 * (1 + 1e-5)).all()
    whole = stored(small(convolutions(), "int8", axis=None, bound=0.05))
    assert whole["w0/scales"].shape == ()


@pytest.mark.parametrize("how", ["half", "int8"])
def test_stored_weights_of_bodies_and_constants(how: str) -> None:
    w = RNG.normal(size=(40, 40)).astype(np.float32)
    branches = [
        graphs.graph(
            [
                graphs.node("Constant", [], [f"own{i}"], value=constant("", w + i)),
                graphs.node("MatMul", ["x", "w"], [f"p{i}"]),
                graphs.node("MatMul", [f"p{i}", f"own{i}"], [f"y{i}"]),
            ],
            [],
            [graphs.value(f"y{i}", ("m", "n"))],
            name=f"branch{i}",
        )
        for i in range(2)
    ]
    inputs = [graphs.value("x", ("a", 40)), graphs.CONDITION]
    outputs, held = [graphs.value("y", ("m", "n"))], [constant("w", w)]
    before = graphs.model([graphs.if_node(*branches)], inputs, outputs, held)
    made = small(before, how)
    assert len(stored(made)) == 3 * (2 if how == "int8" else 1)
    assert operators(made) == {"If": 1, "MatMul": 4}
    x = RNG.normal(size=(3, 40)).astype(np.float32)
    for c in (True, False):
        feed = {"x": x, "c": np.array(c)}
        assert sqnr(run(before, **feed), run(made, **feed)) > 30


def test_bounds() -> None:
    edit = Editor(Model.load(convolutions([KERNELS[0] * 1e6, KERNELS[1] * 1e-6])))
    values = edit.model.graph.values
    assert can_be_half(values["w0"], edit) == "it has numbers beyond those of float16"
    # below 2^-14 the steps of float16 are 2^-24, which is much of what is left here
    lost = KERNELS[1] * np.float32(1e-6) - np.float32((KERNELS[1] * 1e-6).astype(np.float16))
    error = np.linalg.norm(lost) / np.linalg.norm(KERNELS[1] * 1e-6)
    assert can_be_half(values["w1"], edit) == f"its error of {error:.2g} exceeds 0.00049"
    assert can_be_half(values["w1"], edit, bound=1.0) is None
    assert can_be_int8(values["w0"], edit) is None
    assert "exceeds 0.001" in str(can_be_int8(values["w0"], edit, bound=0.001))
    with pytest.raises(ValueError, match="'w0' cannot be stored as float16: it has numbers"):
        store_half(edit, values["w0"])
    with pytest.raises(ValueError, match="'x' cannot be stored as int8: it is not a dense"):
        store_int8(edit, values["x"])
    assert edit.mark() == (0, 0)


def test_weights_that_stay_as_they_are() -> None:
    table = RNG.normal(size=(4, 8)).astype(np.float32)
    held = [constant("t", table), constant("o", KERNELS[0]), constant("s", np.ones(2048, "f4"))]
    held.append(constant("q", np.ones((4, 2048), np.int8)))
    made = [
        graphs.node("MatMul", ["x", "t"], ["y"]),
        graphs.node("DequantizeLinear", ["q", "s"], ["z"], axis=1),
    ]
    outputs = [
        graphs.value("y", ("m", 8)),
        graphs.value("z", (4, 2048)),
        graphs.value("o", KERNELS[0].shape),
    ]
    before = graphs.model(made, [graphs.value("x", ("m", 4))], outputs, held)
    edit = Editor(Model.load(before))
    values = edit.model.graph.values
    assert can_be_half(values["t"], edit) == "it has fewer than 1024 elements"
    assert can_be_half(values["o"], edit) == "it is an output"
    assert can_be_half(values["s"], edit) == "it holds scales"
    assert can_be_half(values["q"], edit) == "it is int8"
    old = Editor(Model.load(convolutions(opset=6)))
    assert can_be_int8(old.model.graph.values["w0"], old) == "it takes opset 7"
