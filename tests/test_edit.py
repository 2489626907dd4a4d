"""The editor: every edit is undone exactly, and refuses what would break the graph."""

from __future__ import annotations

import contextlib
import random

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import exporter
from graphopt.edit import Change, Editor
from graphopt.errors import ModelError
from graphopt.ir import Graph, Model, Node, Value
from tests import graphs
from tests.graphs import CONDITION, node, value, weight


def random_model(rng: random.Random) -> onnx.ModelProto:
    """A DAG of a few nodes over inputs, defaults and weights, with bodies that capture."""
    count = iter(range(10_000))

    def fill(
        visible: list[str], depth: int
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], list[str]]:
        nodes, weights = [], []
        visible = list(visible)
        for _ in range(rng.randint(0, 2)):
            tensor = weight(f"w{next(count)}", rng.choice([(4,), (400,)]), next(count))
            weights.append(tensor)
            visible.append(tensor.name)
        for _ in range(rng.randint(1, 5)):
            out = f"v{next(count)}"
            kind = rng.choice(["Neg", "Identity", "Add", "Constant", "If" if depth else "Split"])
            if kind == "If":
                bodies = []
                for _ in range(2):
                    inner, own, names = fill(visible, depth - 1)
                    bodies.append(graphs.graph(inner, (), [names[-1]], own))
                nodes.append(graphs.if_node(*bodies, [out]))
            elif kind == "Constant":
                nodes.append(node("Constant", [], [out], value=weight("", (4,))))
            elif kind == "Split":
                nodes.append(node("Split", [rng.choice(visible)], [out, f"{out}b"]))
                visible.append(f"{out}b")
            else:
                reads = [rng.choice(visible) for _ in range(2 if kind == "Add" else 1)]
                nodes.append(node(kind, reads, [out]))
            visible.append(out)
        return nodes, weights, visible

    inputs = ["c", "x", "d0", "d1"]
    nodes, weights, names = fill(inputs, 2)
    computed = [name for n in nodes for name in n.output]
    outputs = rng.sample(computed, min(len(computed), 2))
    weights += [weight("d1", (4,)), weight("d0", (4,))]
    described = [CONDITION, value("x"), value("d0"), value("d1")]
    proto = graphs.model(nodes, described, outputs, weights)
    infos = [value(name) for name in names if rng.random() < 0.5 and name not in outputs]
    proto.graph.value_info.extend(infos)
    for name in rng.sample(names, 1):
        proto.graph.quantization_annotation.add(tensor_name=name)
    return proto


def visible_to(graph: Graph) -> list[Value]:
    found: list[Value] = []
    around: Graph | None = graph
    while around is not None:
        found += around.values.values()
        around = around.owner.graph if around.owner is not None else None
    return found


def random_edit(loaded: Model, edit: Editor, rng: random.Random) -> None:
    """One of the editor's methods with arguments that it accepts, or does nothing."""
    graph = rng.choice(list(loaded.graphs()))
    kind = rng.choice(["set", "drop", "replace", "remove", "value", "freeze", "move", "record"])
    nodes = list(graph.nodes)
    if kind in ("set", "drop") and nodes:
        target = rng.choice(nodes)
        if target.inputs:
            new = rng.choice(visible_to(graph)) if kind == "set" else None
            edit.set_input(target, rng.randrange(len(target.inputs)), new)
    elif kind == "replace":
        values = list(graph.values.values())
        if len(values) > 1:
            edit.replace_uses(*rng.sample(values, 2))
    elif kind == "remove":
        free = [n for n in nodes if not any(v and (v.consumers or v.is_output) for v in n.outputs)]
        if free:
            edit.remove_node(rng.choice(free))
    elif kind == "value":
        unused = [
            v
            for v in graph.values.values()
            if not (v.consumers or v.is_output or v.producer or v.is_input)
        ]
        if unused:
            edit.remove_value(rng.choice(unused))
    elif kind == "freeze":
        fixed = [v for v in loaded.graph.inputs if v.weight is not None]
        if fixed:
            edit.freeze_input(rng.choice(fixed))
    elif kind == "move":
        identities = [
            n for n in nodes if n.op == "Identity" and n.inputs[0] and n.inputs[0].producer
        ]
        if identities:
            target = rng.choice(identities)
            source, result = target.inputs[0], target.outputs[0]
            if source and result and source.graph is graph and source.producer is not target:
                edit.detach_node(target)
                edit.move_output(source, result)
    else:
        edit.record("rule", "root", "before", "after")


def edges(loaded: Model) -> list[object]:
    """Everything that the IR knows of its edges, in a form to compare."""
    found: list[object] = []
    for graph in loaded.graphs():
        found.append([v.name for v in graph.inputs])
        found.append([v.name for v in graph.initializers])
        found += [(one, list(one.inputs), list(one.outputs)) for one in graph.nodes]
        found += [
            (held, held.producer, dict(held.consumers), held.weight, held.is_input)
            for held in graph.values.values()
        ]
    return found


def check_edges(loaded: Model) -> None:
    """Both ends of every edge agree: counted anew from the nodes."""
    readers: dict[Value, dict[Node, int]] = {}
    for one in loaded.nodes():
        for read in one.inputs:
            if read is not None:
                counts = readers.setdefault(read, {})
                counts[one] = counts.get(one, 0) + 1
        for made in one.outputs:
            assert made is None or made.producer is one
    for graph in loaded.graphs():
        for held in graph.values.values():
            assert held.consumers == readers.get(held, {}), held
            assert held.producer is None or held.producer in held.producer.graph.nodes


@settings(max_examples=400)
@given(seed=st.integers(0, 1 << 32), before=st.integers(0, 3), edits=st.integers(1, 12))
def test_undo_restores_the_exact_model(seed: int, before: int, edits: int) -> None:
    rng = random.Random(seed)
    loaded = Model.load(random_model(rng))
    edit = Editor(loaded)
    for _ in range(before):
        random_edit(loaded, edit, rng)
    mark = edit.mark()
    state = edges(loaded)
    proto = None
    with contextlib.suppress(ModelError):  # the random edits have made a cycle
        proto = exporter.to_proto(loaded)
    changes = list(edit.changes)
    for _ in range(edits):
        random_edit(loaded, edit, rng)
        check_edges(loaded)
    edit.undo_to(mark)
    check_edges(loaded)
    assert edit.changes == changes
    assert edges(loaded) == state
    if proto is not None:
        assert exporter.to_proto(loaded) == proto


def chain() -> tuple[Model, Editor]:
    nodes = [node("Neg", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("Add", ["b", "w"], ["y"])]
    loaded = Model.load(graphs.model(nodes, ["x"], ["y"], [weight("w", (4,))]))
    return loaded, Editor(loaded)


def text(loaded: Model) -> list[str]:
    return [n.text() for n in loaded.graph.nodes]


def test_undo_in_steps() -> None:
    loaded, edit = chain()
    start = exporter.to_proto(loaded)
    neg, relu, add = loaded.graph.nodes
    first = edit.mark()
    edit.replace_uses(loaded.graph.values["b"], loaded.graph.values["a"])
    edit.record("skip", "b", "x", "y")
    second = edit.mark()
    edit.remove_node(relu)
    edit.record("remove", "b", "z", "")
    assert text(loaded) == ["a = Neg (x)", "y = Add (a, w)"]
    edit.undo_to(second)
    assert text(loaded) == ["a = Neg (x)", "b = Relu (a)", "y = Add (a, w)"]
    assert edit.changes == [Change("skip", "b", "x", "y")]
    edit.undo_to(first)
    assert exporter.to_proto(loaded) == start
    assert edit.changes == []
    assert list(loaded.graph.nodes) == [neg, relu, add]


def test_undo_brings_nodes_back_in_their_order() -> None:
    """Passes sweep a graph in order: one that was undone must not leave another one behind."""
    loaded, edit = chain()
    mark = edit.mark()
    neg, relu, add = loaded.graph.nodes
    edit.set_input(add, 0, loaded.graph.values["x"])
    edit.remove_node(relu)
    edit.remove_node(neg)
    edit.undo_to(mark)
    assert list(loaded.graph.nodes) == [neg, relu, add]


def test_undo_brings_initializers_back_in_their_order() -> None:
    nodes = [node("Add", ["x", "w2"], ["y"])]
    weights = [weight(f"w{i}", (4,), i) for i in range(4)]
    loaded = Model.load(graphs.model(nodes, ["x"], ["y"], weights))
    edit = Editor(loaded)
    mark = edit.mark()
    for name in ("w1", "w0"):
        edit.remove_value(loaded.graph.values[name])
    assert [t.name for t in exporter.to_proto(loaded).graph.initializer] == ["w2", "w3"]
    edit.undo_to(mark)
    assert [t.name for t in exporter.to_proto(loaded).graph.initializer] == ["w0", "w1", "w2", "w3"]


def test_undo_leaves_initializers_that_are_inputs_in_the_order_of_the_file() -> None:
    nodes = [node("Sum", ["a", "b", "d"], ["y"])]
    weights = [weight(name, (4,), i) for i, name in enumerate(["d", "b", "a", "unread"])]
    proto = graphs.model(nodes, ["a", "b", "d"], ["y"], weights)
    loaded = Model.load(proto)
    edit = Editor(loaded)
    mark = edit.mark()
    edit.remove_value(loaded.graph.values["unread"])
    edit.undo_to(mark)
    assert exporter.to_proto(loaded) == proto


def test_undo_of_nothing_changes_nothing() -> None:
    loaded, edit = chain()
    edit.undo_to(edit.mark())
    assert not loaded.graph.edited


def test_removing_a_node_releases_what_its_bodies_read() -> None:
    body = graphs.graph([node("Mul", ["x", "w"], ["r"])], (), ["r"])
    nodes = [graphs.if_node(body, body, ["dead"]), node("Neg", ["x"], ["y"])]
    proto = graphs.model(nodes, [CONDITION, "x"], ["y"], [weight("w", (4,))])
    loaded = Model.load(proto)
    edit = Editor(loaded)
    mark = edit.mark()
    branch, neg = loaded.graph.nodes
    edit.remove_node(branch)
    assert loaded.graph.values["w"].consumers == {}
    assert loaded.graph.values["x"].consumers == {neg: 1}
    assert "dead" not in loaded.graph.values
    edit.undo_to(mark)
    assert len(loaded.graph.values["w"].consumers) == 2
    assert exporter.to_proto(loaded) == proto


def test_a_node_that_is_read_cannot_go() -> None:
    loaded, edit = chain()
    neg, _, add = loaded.graph.nodes
    with pytest.raises(ValueError, match="Neg 'a' cannot go: 'a' is still read"):
        edit.remove_node(neg)
    with pytest.raises(ValueError, match="Add 'y' cannot go: 'y' is still read"):
        edit.remove_node(add)


def test_a_value_that_is_used_cannot_go() -> None:
    loaded, edit = chain()
    *_, add = loaded.graph.nodes
    edit.set_input(add, 0, None)  # nobody reads b any more, but a node computes it
    for name in ("w", "a", "b", "y"):
        with pytest.raises(ValueError, match=f"'{name}' cannot go: it is still used"):
            edit.remove_value(loaded.graph.values[name])


def test_uses_in_bodies_are_replaced_and_the_bodies_written() -> None:
    inner = graphs.graph([node("Neg", ["t"], ["r2"])], (), ["r2"])
    middle = graphs.graph([graphs.if_node(inner, inner, ["r"])], (), ["r"])
    nodes = [node("Relu", ["x"], ["t"]), graphs.if_node(middle, middle)]
    loaded = Model.load(graphs.model(nodes, [CONDITION, "x"]))
    edit = Editor(loaded)
    edit.replace_uses(loaded.graph.values["t"], loaded.graph.values["x"])
    made = exporter.to_proto(loaded)
    for outer in made.graph.node[1].attribute:
        for attribute in outer.g.node[0].attribute:
            assert list(attribute.g.node[0].input) == ["x"]


def test_graph_outputs_are_no_uses() -> None:
    loaded, edit = chain()
    edit.replace_uses(loaded.graph.values["y"], loaded.graph.values["a"])
    assert loaded.graph.outputs == [loaded.graph.values["y"]]
    assert exporter.to_proto(loaded).graph.output[0].name == "y"


def test_only_what_was_edited_is_rebuilt() -> None:
    """Other nodes are the very protos of the file."""
    loaded, edit = chain()
    neg, relu, add = loaded.graph.nodes
    edit.set_input(add, 0, loaded.graph.values["a"])
    assert (neg.rewired, relu.rewired, add.rewired) == (False, False, True)
    assert exporter._export_node(neg) is neg.proto
    assert exporter._export_node(add) is not add.proto
    assert add.proto.input[0] == "b"  # the file's own node is left as it was


def test_a_frozen_input_keeps_its_default() -> None:
    nodes = [node("Add", ["x", "d"], ["y"])]
    loaded = Model.load(graphs.model(nodes, ["x", "d"], ["y"], [weight("d", (4,))]))
    edit = Editor(loaded)
    held = loaded.graph.values["d"]
    assert held.constant is None
    edit.freeze_input(held)
    assert held.constant is held.weight is not None
    made = exporter.to_proto(loaded).graph
    assert [i.name for i in made.input] == ["x"]
    assert [t.name for t in made.initializer] == ["d"]
