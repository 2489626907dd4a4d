"""Regions: boundaries and components on small graphs, extraction against runs of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import onnx
import pytest
from onnx import helper

from graphopt import exporter
from graphopt.errors import UsageError
from graphopt.exposed import write_exposed
from graphopt.ir import Model, Node
from graphopt.regions import Region, boundary, connected, extract
from graphopt.runtime import Session
from graphopt.signature import model_signature, signature
from tests import graphs
from tests.graphs import node, value

F32 = np.float32


def load(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Any] = ("x",),
    outputs: Sequence[Any] = ("y",),
    initializers: Sequence[onnx.TensorProto] = (),
    **options: Any,
) -> Model:
    return Model.load(graphs.model(nodes, inputs, outputs, initializers, **options))


def computing(model: Model, names: str) -> list[Node]:
    """The nodes that compute these values, one name a letter or word."""
    wanted = set(names.split())
    return [n for n in model.nodes() if any(v is not None and v.name in wanted for v in n.outputs)]


def names(values: Sequence[Any]) -> list[str]:
    return [v.name for v in values]


CHAIN = [
    node("Exp", ["x"], ["a"]),
    node("Mul", ["a", "w"], ["b"]),
    node("Add", ["b", "x"], ["c"]),
    node("Neg", ["b"], ["d"]),
    node("Sub", ["c", "d"], ["y"]),
]
W = onnx.numpy_helper.from_array(np.arange(4, dtype=F32), "w")


def test_boundary_leaves_constants_out() -> None:
    model = load(CHAIN, initializers=[W])
    for wanted, inputs, outputs in (
        ("a b", ["x"], ["b"]),
        ("b c", ["a", "x"], ["b", "c"]),  # b is read by d as well
        ("c d", ["b", "x"], ["c", "d"]),
        ("a b c d y", ["x"], ["y"]),
    ):
        found = boundary(computing(model, wanted))
        assert (names(found[0]), names(found[1])) == (inputs, outputs)


def test_an_overridable_weight_and_an_output_inside_are_boundary() -> None:
    model = load(CHAIN, inputs=["x", "w"], outputs=["y", "a"], initializers=[W])
    found = boundary(computing(model, "a b"))
    assert (names(found[0]), names(found[1])) == (["x", "w"], ["a", "b"])


def test_constant_nodes_outside_are_constants() -> None:
    constant = node("Constant", [], ["w"], value=W)
    model = load([constant, *CHAIN])
    assert names(boundary(computing(model, "b"))[0]) == ["a"]


def branching() -> Model:
    """An If whose branch reads `b` and a weight of the graph around it."""
    then = graphs.graph([node("Mul", ["b", "w"], ["t"])], outputs=[value("t", None)])
    other = graphs.graph([node("Neg", ["c2"], ["e"])], outputs=[value("e", None)])
    nodes = [
        node("Exp", ["x"], ["a"]),
        node("Neg", ["a"], ["b"]),
        node("Abs", ["x"], ["c2"]),
        graphs.if_node(then, other),
    ]
    return load(nodes, [value("x"), graphs.CONDITION], [value("y", None)], [W])


def test_what_bodies_read_is_read() -> None:
    model = branching()
    (choice,) = [n for n in model.nodes() if n.op == "If"]
    assert names(boundary([choice])[0]) == ["c", "c2", "b"]
    assert names(boundary(computing(model, "a b"))[1]) == ["b"]
    inside = [choice, *computing(model, "b c2")]
    assert [names(side) for side in boundary(inside)] == [["a", "x", "c"], ["y"]]
    groups = connected([choice, *computing(model, "a b")])
    assert [[n.op for n in group] for group in groups] == [["Exp", "Neg", "If"]]


def test_regions_inside_bodies() -> None:
    model = branching()
    region = Region.of(computing(model, "t"))
    assert (region.root, names(region.inputs), names(region.outputs)) == ("t", ["b"], ["t"])


def test_components_match_networkx() -> None:
    """Random graphs and random subsets of their nodes."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        nodes = [node("Exp", ["x"], ["v0"])]
        for at in range(1, 14):
            read = [f"v{k}" for k in rng.integers(0, at, 2)]
            nodes.append(node("Add", read, [f"v{at}"]))
        model = load(nodes, outputs=["v13"])
        subset = [n for n in model.nodes() if rng.random() < 0.5]
        reference = nx.Graph()
        reference.add_nodes_from(subset)
        for a, b in itertools.permutations(subset, 2):
            if set(a.outputs) & set(b.inputs):
                reference.add_edge(a, b)
        expected = {frozenset(c) for c in nx.connected_components(reference)}
        found = connected(reversed(subset))
        assert {frozenset(c) for c in found} == expected
        assert all(list(c) == sorted(c, key=lambda n: n.place) for c in found)


# ------------------------------------------------------------------------------- extraction


def whole(model: Model, feed: Mapping[str, Any], wanted: Sequence[str], folder: Path) -> Any:
    """Values inside a run of the whole model."""
    file = write_exposed(model, folder / "whole.onnx", wanted)
    with Session(file, optimizations="off", threads=1) as session:
        return session.run(feed, list(wanted))


def check_extract(model: Model, nodes: Sequence[Node], feed: Mapping[str, Any], tmp: Path) -> None:
    """The region computes from the whole model's values what the whole model computes."""
    inputs, outputs = boundary(nodes)
    inner = [v.name for v in inputs if v.name not in feed]
    values = dict(feed) | whole(model, feed, inner + names(outputs), tmp)
    shapes = {name: (array.dtype, array.shape) for name, array in values.items()}
    before = exporter.to_proto(model).SerializeToString()
    made = extract(model, nodes, shapes)
    assert exporter.to_proto(model).SerializeToString() == before
    # onnx's inference does not know sparse weights
    onnx.checker.check_model(made, full_check=not made.graph.sparse_initializer)
    assert [i.name for i in made.graph.input] == names(inputs)
    assert [o.name for o in made.graph.output] == names(outputs)
    assert made == extract(model, list(reversed(nodes)), shapes)
    with Session(made.SerializeToString(), optimizations="off", threads=1) as session:
        found = session.run({v.name: values[v.name] for v in inputs})
    for name, array in found.items():
        np.testing.assert_array_equal(array, values[name])


@pytest.mark.parametrize("file", graphs.DIGITS, ids=lambda file: file.stem)
def test_windows_of_the_digits_models(file: Path, tmp_path: Path) -> None:
    model = Model.load(file)
    nodes = [n for n in model.graph.nodes if n.op != "Constant"]
    feed = {"image": np.random.default_rng(0).random((2, 1, 8, 8)).astype(F32)}
    for start in range(0, len(nodes), max(1, len(nodes) // 8)):
        check_extract(model, nodes[start : start + 9], feed, tmp_path)


def test_bodies_and_functions_and_sparse_weights_come_along(tmp_path: Path) -> None:
    model = branching()
    (choice,) = [n for n in model.nodes() if n.op == "If"]
    feed = {"x": np.ones(4, F32), "c": np.array(True)}
    check_extract(model, [choice], feed, tmp_path)
    check_extract(model, [choice, *computing(model, "b")], feed, tmp_path)

    sparse = onnx.SparseTensorProto(dims=[4])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.array([2.0], F32), "w"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([1])))
    proto = graphs.model(CHAIN)
    proto.graph.sparse_initializer.append(sparse)
    loaded = Model.load(proto)
    check_extract(loaded, computing(loaded, "a b"), {"x": np.ones(4, F32)}, tmp_path)

    body = [node("Exp", ["p"], ["q"])]
    function = helper.make_function("my", "F", ["p"], ["q"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("F", ["x"], ["a"], domain="my"), node("Neg", ["a"], ["y"])]
    proto = graphs.model(nodes, domains=["my"])
    proto.functions.append(function)
    loaded = Model.load(proto)
    check_extract(loaded, computing(loaded, "a"), {"x": np.ones(4, F32)}, tmp_path)


def test_the_opset_stays_and_the_ir_is_one_that_runs() -> None:
    model = load(CHAIN, initializers=[W], opset=11, ir=13)
    made = extract(model, computing(model, "a"), {"x": (F32, (7,))})
    assert made.opset_import == model.proto.opset_import
    assert made.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 7
    with Session(made.SerializeToString()) as session:
        assert session.run({"x": np.zeros(7, F32)})["a"].shape == (7,)


def test_a_missing_type_is_an_error() -> None:
    model = load(CHAIN, initializers=[W])
    with pytest.raises(UsageError, match="type and shape of 'x' are not known"):
        extract(model, computing(model, "a"), {})
    with pytest.raises(UsageError, match="without outputs"):
        extract(model, [], {})


# ------------------------------------------------------------------------------- signatures


def blocks(count: int, **changes: Any) -> Model:
    """Equal blocks x -> Conv -> BatchNormalization-like Mul -> Relu, each with its own weights."""
    nodes, weights = [], []
    for at in range(count):
        last = {"kernel": 3, "axis": [0], "op": "Relu", "slope": False} | changes
        if at < count - 1:
            last = {"kernel": 3, "axis": [0], "op": "Relu", "slope": False}
        kernel = last["kernel"]
        weights.append(graphs.weight(f"w{at}", (4, 4, kernel, kernel), at))
        weights.append(graphs.weight(f"s{at}", (4, 1, 1), at + 99))
        axes = onnx.numpy_helper.from_array(np.array(last["axis"], np.int64), f"axes{at}")
        weights.append(axes)
        pads = [kernel // 2] * 4
        nodes += [
            node("Conv", [f"v{at}", f"w{at}"], [f"c{at}"], f"conv{at}", pads=pads),
            node("Mul", [f"c{at}", f"s{at}"], [f"m{at}"]),
            node(last["op"], [f"m{at}"], [f"r{at}"]),
            node("Unsqueeze", [f"r{at}", f"axes{at}"], [f"u{at}"]),
            node("Squeeze", [f"u{at}", f"axes{at}"], [f"v{at + 1}"]),
        ]
    inputs = [value("v0", (1, 4, 8, 8))]
    return load(nodes, inputs, [value(f"v{count}", None)], weights)


def of_block(model: Model, at: int, shape: tuple[int, ...] = (1, 4, 8, 8)) -> str:
    region = Region.of(computing(model, f"c{at} m{at} r{at} u{at} v{at + 1}"))
    return signature(region, {f"v{at}": (F32, shape)})


def test_repeated_blocks_have_one_signature() -> None:
    model = blocks(3)
    assert len({of_block(model, at) for at in range(3)}) == 1


@pytest.mark.parametrize("change", [{"kernel": 5}, {"axis": [1]}, {"op": "Sigmoid"}])
def test_what_changes_the_cost_changes_the_signature(change: dict[str, Any]) -> None:
    model = blocks(2, **change)
    assert of_block(model, 0) != of_block(model, 1)
    assert of_block(model, 0) == of_block(blocks(2), 0)


def test_shapes_and_types_of_inputs_count() -> None:
    model = blocks(1)
    assert of_block(model, 0) != of_block(model, 0, (1, 4, 16, 16))
    region = Region.of(computing(model, "c0"))
    single = signature(region, {"v0": (F32, (1, 4, 8, 8))})
    assert single != signature(region, {"v0": (np.float64, (1, 4, 8, 8))})


def test_wiring_counts_and_order_in_the_file_does_not() -> None:
    def made(nodes: list[onnx.NodeProto]) -> str:
        model = load(nodes, ["x", "z"])
        both = dict.fromkeys(("x", "z"), (F32, (4,)))
        return signature(Region("y", tuple(model.graph.nodes)), both)

    a, b = node("Exp", ["x"], ["a"]), node("Neg", ["z"], ["b"])
    y = node("Sub", ["a", "b"], ["y"])
    assert made([a, b, y]) == made([b, a, y])
    assert made([a, b, y]) != made([a, b, node("Sub", ["b", "a"], ["y"])])
    assert made([a, b, y]) != made([node("Exp", ["x"], ["a"]), node("Neg", ["x"], ["b"]), y])
    shared = [node("Exp", ["x"], ["a"]), node("Sub", ["a", "a"], ["y"])]
    twice = [*shared[:1], node("Exp", ["x"], ["b"]), y]
    assert made(shared) != made(twice)


def test_which_values_are_handed_out_counts() -> None:
    one, two = load(CHAIN, initializers=[W]), load(CHAIN, outputs=["y", "a"], initializers=[W])
    known = {"x": (F32, (4,))}
    regions = [Region("b", tuple(computing(model, "a b"))) for model in (one, two)]
    assert signature(regions[0], known) != signature(regions[1], known)


def test_bodies_count() -> None:
    def made(op: str, scale: float) -> str:
        then = graphs.graph([node(op, ["x", "k"], ["t"])], outputs=[value("t", None)])
        then.initializer.append(onnx.numpy_helper.from_array(np.full(4, scale, F32), "k"))
        other = graphs.graph([node("Neg", ["x"], ["e"])], outputs=[value("e", None)])
        model = load([graphs.if_node(then, other)], [value("x"), graphs.CONDITION])
        shapes = {"x": (F32, (4,)), "c": (np.bool_, ())}
        return signature(Region.of(model.graph.nodes), shapes)

    assert made("Mul", 1.0) == made("Mul", 2.0)
    assert made("Mul", 1.0) != made("Add", 1.0)


def test_signatures_of_models_know_opsets_and_inputs() -> None:
    def made(opset: int = 17, size: int = 4, name: str = "x") -> str:
        nodes = [node("Exp", [name], ["y"])]
        return model_signature(graphs.model(nodes, [value(name, (size,))], opset=opset))

    assert made() == made(name="other")
    assert len({made(), made(opset=18), made(size=5)}) == 3
