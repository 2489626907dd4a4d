"""move-transposes: through which operators, when it pays, and what it leaves alone."""

from __future__ import annotations

import math
import random

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.canonicalize.move_transposes import MoveTransposes
from graphopt.passes.pipelines import pipeline
from graphopt.runtime import Session
from tests import goldens, graphs, random_layouts
from tests.graphs import node, value

TO_LAST, TO_FIRST = "perm = [0, 2, 3, 1]", "perm = [0, 3, 1, 2]"


def moved(before: str, expected: str, told: list[str], **how: bool) -> None:
    goldens.golden("move-transposes", before, expected, told, **how)  # type: ignore[arg-type]


def between(
    middle: list[onnx.NodeProto],
    *,
    weights: dict[str, np.ndarray] | None = None,  # type: ignore[type-arg]
    opset: int = 17,
) -> onnx.ModelProto:
    """`middle` computes b from a; a Transpose leads there from x (NCHW), and one back to y."""
    nodes = [node("Transpose", ["x"], ["a"], perm=[0, 2, 3, 1]), *middle]
    nodes.append(node("Transpose", ["b"], ["y"], perm=[0, 3, 1, 2]))
    tensors = [numpy_helper.from_array(v, name) for name, v in (weights or {}).items()]
    ports = [value("x", ("n", 4, 3, 2))], [value("y", (None,) * 4)]
    return graphs.model(nodes, *ports, tensors, opset=opset)


def cancelled(before: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its Transposes, computing the same bits."""
    made, _ = goldens.run(before, "move-transposes")
    goldens.check(before, made, "move-transposes")
    assert [n.op_type for n in made.graph.node if n.op_type == "Transpose"] == []
    assert len(made.graph.node) == len(before.graph.node) - 2
    return made


def stays(before: onnx.ModelProto | str) -> None:
    proto = graphs.parsed(before) if isinstance(before, str) else before
    made, told = goldens.run(proto, "move-transposes")
    assert told == []
    assert made == proto


def ints(*numbers: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(numbers, np.int64)


# -- by operator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Neg", "Erf", "LeakyRelu", "Identity"])
def test_of_one_operand(op: str) -> None:
    cancelled(between([node(op, ["a"], ["b"])]))


def test_bounds_stay() -> None:
    weights = {"low": np.float32(-1), "high": np.float32(1)}
    cancelled(between([node("Clip", ["a", "low", "high"], ["b"])], weights=weights))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "PRelu"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (3, 2, 4), (1, 1, 1, 4), (1, 3, 1, 1)])
def test_constants_broadcast_as_before(op: str, shape: tuple[int, ...]) -> None:
    constant = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    made = cancelled(between([node(op, ["a", "c"], ["b"])], weights={"c": constant}))
    [stored] = [t for t in made.graph.initializer if t.name == made.graph.node[0].input[1]]
    assert math.prod(stored.dims) == constant.size


@pytest.mark.parametrize("shape", [(3, 2, 4), (1, 3, 2, 4)])
def test_constants_of_where_and_in_front(shape: tuple[int, ...]) -> None:
    mask = np.arange(24).reshape(shape) % 3 == 0
    weights = {"m": mask, "c": np.ones(4, np.float32)}
    cancelled(between([node("Where", ["m", "c", "a"], ["b"])], weights=weights))


def test_two_operands_transposed_alike() -> None:
    moved(
        f"""g (float[1,4,3,2] p, float[1,4,3,2] q) => (float[1,3,2,4] y)
        {{ a = Transpose <{TO_LAST}> (p)  b = Transpose <{TO_LAST}> (q)  y = Add (a, b) }}""",
        f"""g (float[1,4,3,2] p, float[1,4,3,2] q) => (float[1,3,2,4] y)
        {{ "y/Transpose" = Add (p, q)
        ["y/Transpose_2"] y = Transpose <{TO_LAST}> ("y/Transpose") }}""",
        ["move-transposes y"],
    )


def test_concat_split_and_their_axes() -> None:
    c = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
    cancelled(between([node("Concat", ["a", "a"], ["b"], axis=-1)]))
    fed = between([node("Concat", ["a", "c"], ["b"], axis=1)], weights={"c": c})
    fed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    cancelled(fed)
    parts = [
        node("Split", ["a", "s"], ["k", "l"], axis=1),
        node("Concat", ["l", "k"], ["b"], axis=1),
    ]
    cancelled(between(parts, weights={"s": ints(1, 2)}))


@pytest.mark.parametrize("opset", [10, 17, 18])
def test_pad(opset: int) -> None:
    pads = [0, 1, 0, 2, 0, 0, 3, 1]
    if opset == 10:
        cancelled(between([node("Pad", ["a"], ["b"], pads=pads)], opset=opset))
        return
    weights = {"p": ints(*pads), "v": np.float32(7)}
    cancelled(between([node("Pad", ["a", "p", "v"], ["b"])], weights=weights, opset=opset))
    if opset == 18:
        weights = {"p": ints(1, 2, 0, 1), "k": ints(-1, 1)}
        cancelled(between([node("Pad", ["a", "p", "", "k"], ["b"])], weights=weights, opset=opset))


@pytest.mark.parametrize("axes", [None, (1, 3), (-1, -2)])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_slice(axes: tuple[int, int] | None, kind: type) -> None:
    weights = {"s": np.array([0, 1], kind), "e": np.array([9, 2], kind)}
    inputs = ["a", "s", "e"]
    if axes is not None:
        weights["k"] = np.array(axes, kind)
        inputs.append("k")
    cancelled(between([node("Slice", inputs, ["b"])], weights=weights))


def test_slice_with_attributes() -> None:
    cut = node("Slice", ["a"], ["b"], starts=[1], ends=[2], axes=[3])
    cancelled(between([cut], opset=9))


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("axes", [[1, 2], [-1], [3, 1], None])
def test_reductions_that_keep_axes(op: str, axes: list[int] | None) -> None:
    how = {} if axes is None else {"axes": axes}
    nodes = [node(op, ["a"], ["r"], **how), node("Sub", ["a", "r"], ["b"])]
    cancelled(between(nodes))


def test_reductions_that_drop_axes() -> None:
    moved(
        f"""g (float[n,4,3,2] x) => (float[n,4] y) {{
        a = Transpose <{TO_LAST}> (x)  y = ReduceMax <axes = [1, 2], keepdims = 0> (a) }}""",
        """g (float[n,4,3,2] x) => (float[n,4] y)
        { y = ReduceMax <keepdims = 0, axes = [2, 3]> (x) }""",
        ["move-transposes y"],
    )


def test_reductions_with_axes_as_input() -> None:
    nodes = [node("ReduceL1", ["a", "k"], ["r"]), node("Max", ["a", "r"], ["b"])]
    cancelled(between(nodes, weights={"k": ints(-1)}, opset=18))


@pytest.mark.parametrize("axis", [1, -1])
def test_positions_of_the_largest(axis: int) -> None:
    nodes = [node("ArgMax", ["a"], ["r"], axis=axis), node("Cast", ["r"], ["b"], to=1)]
    cancelled(between(nodes))


@pytest.mark.parametrize("opset", [11, 17])
def test_squeeze_and_unsqueeze(opset: int) -> None:
    axes = {"axes": [3]} if opset == 11 else {}
    more = [] if opset == 11 else ["k"]
    weights = {} if opset == 11 else {"k": ints(3)}
    nodes = [node("ArgMin", ["a"], ["r"], axis=3), node("Squeeze", ["r", *more], ["s"], **axes)]
    nodes += [node("Neg", ["s"], ["t"]), node("Unsqueeze", ["t", *more], ["u"], **axes)]
    cancelled(between([*nodes, node("Cast", ["u"], ["b"], to=1)], weights=weights, opset=opset))


def test_softmax_moves_where_it_gets_no_slower() -> None:
    cancelled(between([node("Softmax", ["a"], ["b"], axis=1)]))  # axis 2 of x
    stays(between([node("Softmax", ["a"], ["b"], axis=3)]))  # would be axis 1 of x


def test_softmax_over_all_axes_from_one_on() -> None:
    before = between([node("Softmax", ["a"], ["b"], axis=1)], opset=11)
    made, _ = goldens.run(before, "move-transposes")
    assert [n.op_type for n in made.graph.node] == ["Softmax"]
    first, second = (goldens.outputs(m, before)["y"][2] for m in (before, made))
    one, two = (np.frombuffer(data, np.float32) for data in (first, second))
    np.testing.assert_allclose(one, two, rtol=1e-6)  # a sum in another order
    stays(between([node("Softmax", ["a"], ["b"], axis=2)], opset=11))


def test_tile_and_expand() -> None:
    cancelled(between([node("Tile", ["a", "r"], ["b"])], weights={"r": ints(1, 2, 1, 3)}))
    nodes = [node("ReduceMax", ["a"], ["r"], axes=[1]), node("Expand", ["r", "e"], ["b"])]
    cancelled(between(nodes, weights={"e": ints(1, 3, 1, 1)}))


def test_resize_to_where_channels_come_first() -> None:
    resize = node("Resize", ["a", "", "s"], ["b"], mode="nearest")
    cancelled(between([resize], weights={"s": np.array([1, 2, 2, 1], np.float32)}))
    stays(between([resize], weights={"s": np.array([1, 2, 1, 2], np.float32)}))


def test_reshape_that_drops_and_adds_axes_of_one() -> None:
    nodes = [node("Reshape", ["r", "s"], ["t"]), node("Relu", ["t"], ["u"])]
    nodes = [node("ReduceMax", ["a"], ["r"], axes=[1]), *nodes]  # [n, 1, 2, 4]
    nodes.append(node("Reshape", ["u", "v"], ["b"]))
    cancelled(between(nodes, weights={"s": ints(-1, 2, 4), "v": ints(-1, 1, 2, 4)}))


def test_reshape_that_moves_elements_together_stays() -> None:
    nodes = [node("Reshape", ["a", "s"], ["t"]), node("Reshape", ["t", "v"], ["b"])]
    stays(between(nodes, weights={"s": ints(-1, 6, 4), "v": ints(-1, 3, 2, 4)}))


def test_reshape_after_a_transpose_of_ones() -> None:
    moved(
        """g (float[n,1,1,4] x) => (float[n,4] y) <int64[2] s = {-1, 4}>
        { a = Transpose <perm = [0, 3, 1, 2]> (x)  y = Reshape (a, s) }""",
        """g (float[n,1,1,4] x) => (float[n,4] y) <int64[2] s = {-1, 4},
        int64[2] "y/constant" = {-1, 4}> { y = Reshape (x, "y/constant") }""",
        ["move-transposes y"],
    )


def test_another_transpose_takes_the_first_in() -> None:
    moved(
        f"""g (float[n,4,3,2] x) => (float[2,3,4,n] y) {{ a = Transpose <{TO_LAST}> (x)
        b = Relu (a)  y = Transpose <perm = [2, 1, 3, 0]> (b) }}""",
        """g (float[n,4,3,2] x) => (float[2,3,4,n] y)
        { "b/Transpose" = Relu (x)  y = Transpose <perm = [3, 2, 1, 0]> ("b/Transpose") }""",
        ["move-transposes b"],
    )


@pytest.mark.parametrize(
    "other",
    [
        node("CumSum", ["a", "k"], ["b"]),
        node("LpNormalization", ["a"], ["b"]),
        node("Shape", ["a"], ["b"]),
        node("Hardmax", ["a"], ["b"]),
        node("Relu", ["a"], ["b"], domain="acme"),
    ],
)
def test_other_operators_stay(other: onnx.NodeProto) -> None:
    model = between([other], weights={"k": np.array(1, np.int64)})
    model.opset_import.add(domain="acme", version=1)
    if other.op_type == "Shape":
        del model.graph.node[-1]
        model.graph.output[0].name = "b"
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    stays(model)


# -- by cost ---------------------------------------------------------------------------------------


def test_sinks_to_where_there_is_less_to_move() -> None:
    made, told = goldens.run(
        graphs.parsed(
            f"""g (float[2,4,8,8] x) => (float[2,2,2,4] y) <int64[2] s = {{1, 1}},
            int64[2] e = {{3, 3}}, int64[2] k = {{1, 2}}>
            {{ a = Transpose <{TO_LAST}> (x)  y = Slice (a, s, e, k) }}"""
        ),
        "move-transposes",
    )
    assert told == ["move-transposes y"]
    assert [n.op_type for n in made.graph.node] == ["Slice", "Transpose"]


def test_hoists_to_where_there_is_less_to_move() -> None:
    made, _ = goldens.run(
        graphs.parsed(
            f"""g (float[2,4,8,8] x) => (float[2,4,10,8] y) <int64[8] p = {{0,0,1,0,0,0,1,0}}>
            {{ a = Pad (x, p)  b = Transpose <{TO_LAST}> (a)  y = MatMul (b, b) }}"""
        ),
        "move-transposes",
    )
    assert [n.op_type for n in made.graph.node] == ["Transpose", "Pad", "MatMul"]


def test_equal_costs_change_nothing() -> None:
    stays(f"""g (float[1,4,3,2] x) => (float[1,3,2,4] y)
    {{ a = Transpose <{TO_LAST}> (x)  b = Relu (a)  y = Neg (b) }}""")


def test_a_layout_that_is_read_keeps_its_transpose() -> None:
    """z needs none any more; y does, and takes it under its name."""
    moved(
        f"""g (float[1,4,3,2] x) => (float[1,3,2,4] y, float[1,4,3,2] z) {{
        a = Transpose <{TO_LAST}> (x)  y = Relu (a)  z = Transpose <{TO_FIRST}> (y) }}""",
        f"""g (float[1,4,3,2] x) => (float[1,3,2,4] y, float[1,4,3,2] z) {{
        z = Relu (x)  ["y/Transpose"] y = Transpose <{TO_LAST}> (z) }}""",
        ["move-transposes y"],
    )


def test_what_would_take_more_transposes_than_it_saves() -> None:
    stays(f"""g (float[1,4,3,2] x, float[1,3,2,4] v, float[1,3,2,4] w)
    => (float[1,4,3,2] y, float[1,3,2,4] z) {{
    a = Transpose <{TO_LAST}> (x)  b = Add (a, v)  c = Add (b, w)
    d = MatMul (c, c)  z = Add (d, b)  y = Transpose <{TO_FIRST}> (c) }}""")


def test_a_second_operand_is_transposed_where_two_transposes_go() -> None:
    made, told = goldens.run(
        graphs.parsed(
            f"""g (float[1,4,3,2] x, float[1,4,3,2] v, float[1,3,2,4] w) => (float[1,4,3,2] y) {{
            a = Transpose <{TO_LAST}> (x)  b = Transpose <{TO_LAST}> (v)  c = Add (a, b)
            d = Add (c, w)  y = Transpose <{TO_FIRST}> (d) }}"""
        ),
        "move-transposes",
    )
    assert told == ["move-transposes c"]
    assert sorted(n.op_type for n in made.graph.node) == ["Add", "Add", "Transpose"]


def test_a_pair_cancels_although_others_read_what_is_between() -> None:
    moved(
        f"""g (float[1,4,3,2] x) => (float[1,3,2,2] y, float[1,4,3,2] z) {{
        a = Transpose <{TO_LAST}> (x)  b = Transpose <{TO_FIRST}> (a)
        y = LpPool <kernel_shape = [1, 3]> (a)  z = Neg (b) }}""",
        f"""g (float[1,4,3,2] x) => (float[1,3,2,2] y, float[1,4,3,2] z) {{
        a = Transpose <{TO_LAST}> (x)  y = LpPool <kernel_shape = [1, 3]> (a)  z = Neg (x) }}""",
        ["cancel-transposes b"],
    )


def test_large_constants_are_not_stored_twice() -> None:
    """Another reads it as it is."""
    c = np.ones((1, 128, 32, 16), np.float32)
    nodes = [node("Transpose", ["x"], ["a"], perm=[0, 2, 3, 1]), node("Add", ["a", "c"], ["b"])]
    nodes += [node("Transpose", ["b"], ["y"], perm=[0, 3, 1, 2]), node("MatMul", ["c", "w"], ["z"])]
    weights = [numpy_helper.from_array(c, "c"), numpy_helper.from_array(np.ones((16, 2), "f"), "w")]
    ports = [value("x", (1, 16, 128, 32))], [value("y", (None,) * 4), value("z", (None,) * 4)]
    stays(graphs.model(nodes, *ports, weights))
    del nodes[3], ports[1][1], weights[1]
    cancelled(graphs.model(nodes, *ports, weights))


def test_several_transposes_of_what_would_move() -> None:
    """They are one after merge-duplicates; before, what they read keeps its layout."""
    proto = graphs.parsed(
        f"""g (float[1,3,2,4] x) => (float[1,3,2,4] y, float[1,3,2,4] z) {{
        a = Transpose <{TO_FIRST}> (x)  b = Relu (a)
        y = Transpose <{TO_LAST}> (b)  z = Transpose <{TO_LAST}> (b) }}"""
    )
    stays(proto)
    made, _ = goldens.run(proto, "merge-duplicates, move-transposes")
    goldens.check(proto, made, "merge-duplicates, move-transposes")


# -- what stays ------------------------------------------------------------------------------------


def test_declared_ranks_prove_nothing() -> None:
    """A custom operator, of whose output the file states a shape."""
    made = between([node("Add", ["a", "c"], ["b"])])
    made.graph.node.insert(0, node("Blob", ["x"], ["c"], domain="acme"))
    made.opset_import.add(domain="acme", version=1)
    made.graph.value_info.append(value("c", (1, 3, 2, 4)))
    stays(made)


def test_weights_without_data_stay() -> None:
    made = between([node("Add", ["a", "c"], ["b"])])
    made.graph.initializer.append(TensorProto(name="c", data_type=1, dims=[3, 2, 4]))
    stays(made)


def test_defaults_that_a_caller_replaces_are_no_constants() -> None:
    made = between([node("Add", ["a", "c"], ["b"])], weights={"c": np.ones(4, np.float32)})
    made.graph.input.append(value("c", (4,)))
    stays(made)


def test_pinned_names_stay_under_their_names() -> None:
    """Training information or an annotation reads them; whatever else moves, they are computed."""
    made = between([node("Relu", ["a"], ["r"]), node("Neg", ["r"], ["b"])])
    loaded = Model.load(made)
    loaded.graph.pinned.add(loaded.graph.values["r"])
    edit = Editor(loaded)
    MoveTransposes().run(loaded, edit)
    edit.settle()
    assert loaded.graph.values["r"].producer is not None
    assert [n.op for n in loaded.nodes()] == ["Relu", "Transpose", "Neg"]
    made.graph.output.append(value("r", (None,) * 4))
    found, _ = goldens.run(made, "move-transposes")
    goldens.check(made, found, "move-transposes")


BODIES = f"""g (bool c, float[1,4,3,2] x) => (float[1,4,3,2] y) {{
    a = Transpose <{TO_LAST}> (x)
    y = If (c) <
        then_branch = t () => (float[1,4,3,2] u)
        {{ b = Relu (a)  d = Transpose <{TO_LAST}> (x)  e = Mul (b, d)
           u = Transpose <{TO_FIRST}> (e) }},
        else_branch = e () => (float[1,4,3,2] v)
        {{ f = Transpose <{TO_LAST}> (x)  h = Relu (f)  v = Transpose <{TO_FIRST}> (h) }}> }}"""


def test_bodies_are_graphs_of_their_own() -> None:
    """In the first branch `a` comes from outside: moving would only exchange one for another."""
    original = graphs.parsed(BODIES)
    made, told = goldens.run(original, "move-transposes")
    assert "move-transposes h" in told
    goldens.check(original, made, "move-transposes")
    branches = {a.name: a.g for n in made.graph.node for a in n.attribute}
    assert [n.op_type for n in branches["else_branch"].node] == ["Relu"]


def test_denied_changes_are_not_made_and_fuel_ends() -> None:
    chains = "".join(
        f"a{i} = Transpose <{TO_LAST}> (x{i})  b{i} = {op} (a{i}) "
        f"y{i} = Transpose <{TO_FIRST}> (b{i}) "
        for i, op in enumerate(("Relu", "Neg", "Abs"))
    )
    inputs, outputs = (", ".join(f"float[1,4,3,2] {n}{i}" for i in range(3)) for n in "xy")
    proto = graphs.parsed(f"g ({inputs}) => ({outputs}) {{ {chains} }}")
    every = _told(proto)
    assert every == ["b0", "b1", "b2"]
    assert _told(proto, denied=[("move-transposes", "b1")]) == ["b0", "b2"]
    for fuel in range(4):
        assert _told(proto, fuel=fuel) == every[:fuel]


def _told(proto: onnx.ModelProto, **how: object) -> list[str]:
    edit = Editor(Model.load(proto), **how)  # type: ignore[arg-type]
    MoveTransposes().run(edit.model, edit)
    return [change.root for change in edit.changes]


# -- random models ---------------------------------------------------------------------------------


def run(proto: onnx.ModelProto) -> dict[str, bytes]:
    """What onnxruntime computes with optimisations off, to the bit."""
    with Session(proto.SerializeToString(), optimizations="off", threads=1) as session:
        found = session.run(random_layouts.feed())
    return {name: array.tobytes() + repr(array.shape).encode() for name, array in found.items()}


def cost(proto: onnx.ModelProto) -> tuple[int, int, int]:
    """Nodes, Transposes, and bytes that these move."""
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    results = [n.output[0] for n in proto.graph.node if n.op_type == "Transpose"]
    there = {output.name for output in proto.graph.output}
    named.graph.output.extend(onnx.ValueInfoProto(name=n) for n in results if n not in there)
    with Session(named.SerializeToString(), optimizations="off", threads=1) as session:
        found = session.run(random_layouts.feed())
    return len(proto.graph.node), len(results), sum(found[name].nbytes for name in results)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), size=st.integers(3, 24), opset=st.sampled_from([11, 13, 18]))
def test_random_layouts(seed: int, size: int, opset: int) -> None:
    proto = random_layouts.Layouts(random.Random(seed), opset).model(size)
    loaded = Model.load(proto)
    runs = run_pipeline(loaded, pipeline(0, "move-transposes"), verify_each=True)
    assert [one.error for one in runs if one.error] == []
    made = exporter.to_proto(loaded)
    assert run(made) == run(proto)
    before, after = cost(proto), cost(made)
    assert after <= before if runs[0].changes else made == proto
    assert all(a <= b for a, b in zip(after, before, strict=True))
    every = runs[0].changes
    for fuel in range(len(every)):  # each change leaves a sound graph that computes the same
        partly = Model.load(proto)
        run_pipeline(partly, pipeline(0, "move-transposes"), fuel=fuel, verify_each=True)
        assert run(exporter.to_proto(partly)) == run(proto)
