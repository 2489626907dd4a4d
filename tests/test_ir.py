"""The graph: handles, scoping, everything that a round trip must not lose, broken graphs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Model, Node
from graphopt.operators import LEGACY, is_known, is_pure, is_random
from tests import graphs
from tests.graphs import CONDITION, exported, forced, node, value, weight

# -- round trips -----------------------------------------------------------------------------------


def assert_round_trip(source: onnx.ModelProto | Path, name: str = "") -> None:
    """Given back as it was: untouched, and with every graph and node rebuilt."""
    original = onnx.load(source) if isinstance(source, Path) else source
    assert exporter.to_proto(Model.load(source)) == original, name
    assert exporter.to_proto(forced(source)) == original, name


@pytest.mark.parametrize("path", [*graphs.ARCHITECTURES, *graphs.DIGITS], ids=lambda p: p.stem)
def test_round_trip_of_files(path: Path, tmp_path: Path) -> None:
    assert_round_trip(path)
    proto = onnx.load(path)
    canonical = graphs.save(proto, tmp_path / "m.onnx")
    for loaded in (Model.load(canonical), forced(canonical)):
        exporter.save(loaded, tmp_path / "out.onnx")
        assert (tmp_path / "out.onnx").read_bytes() == canonical.read_bytes()


def test_there_are_files_to_test_on() -> None:
    assert len(graphs.ARCHITECTURES) >= 20
    assert len(graphs.DIGITS) == 4


@pytest.mark.parametrize("kind", graphs.KINDS)
def test_round_trip_of_onnx_cases(kind: str, tmp_path: Path) -> None:
    """All of onnx's own test models, sequences and optionals included; to files as well."""
    cases = [case for case in graphs.onnx_cases() if case.kind == kind]
    for case in cases:
        assert_round_trip(case.source, case.name)
        proto = case.proto()
        canonical = graphs.save(proto, tmp_path / "m.onnx")
        exporter.save(forced(canonical), tmp_path / "out.onnx")
        assert (tmp_path / "out.onnx").read_bytes() == canonical.read_bytes(), case.name
        for inner in Model.load(canonical).nodes():
            assert inner.text()
    least = {"node": 1884, "simple": 20, "pytorch-converted": 50, "pytorch-operator": 20}
    assert len(cases) >= least[kind]
    if kind == "simple":
        assert sum(case.kind != "node" for case in graphs.onnx_cases()) >= 140


def test_a_file_in_an_unusual_order_of_fields_keeps_its_bytes(tmp_path: Path) -> None:
    """Not canonical, so only an untouched model, whose weights stay put, is the same."""
    proto = graphs.matmul()
    rest = copy.deepcopy(proto)
    rest.ClearField("graph")
    graph_first = onnx.ModelProto(graph=proto.graph).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(graph_first + rest.SerializeToString())
    assert exporter.to_proto(Model.load(path)) == proto


# -- handles ---------------------------------------------------------------------------------------


def twins() -> Model:
    """Two equal nodes, and a name that two bodies both use."""
    body = graphs.graph([node("Neg", ["x"], ["r"], name="same")], (), ["r"])
    nodes = [
        graphs.if_node(body, body, ["t"]),
        node("Relu", ["t"], [""], name="n"),
        node("Relu", ["t"], [""], name="n"),
        node("Relu", ["t"], ["y"]),
    ]
    return Model.load(graphs.model(nodes, [CONDITION, "x"]))


def test_nodes_are_told_apart_by_identity() -> None:
    first, second = list(twins().graph.nodes)[1:3]
    assert first.proto == second.proto
    assert first != second
    assert len({first, second}) == 2
    assert {first: 1}.get(second) is None


def test_values_are_told_apart_by_identity() -> None:
    loaded = twins()
    one, other = (body.values["r"] for body in next(iter(loaded.graph.nodes)).graphs())
    assert one.name == other.name
    assert one != other
    assert len({one, other}) == 2


def test_edges_are_known_from_both_ends() -> None:
    loaded = Model.load(
        graphs.model([node("Add", ["x", "x"], ["t"]), node("Mul", ["t", "x"], ["y"])])
    )
    x, t, y = (loaded.graph.values[name] for name in "xty")
    add, mul = loaded.graph.nodes
    assert x.consumers == {add: 2, mul: 1}
    assert (x.producer, t.producer, y.producer) == (None, add, mul)
    assert (x.is_input, t.is_input) == (True, False)
    assert (y.is_output, t.is_output) == (True, False)
    assert add.inputs == [x, x]


def test_uses_in_bodies_count() -> None:
    inner = graphs.graph([node("Add", ["x", "w"], ["r2"])], (), ["r2"])
    middle = graphs.graph([graphs.if_node(inner, inner, ["r"])], (), ["r"])
    proto = graphs.model(
        [graphs.if_node(middle, middle)], [CONDITION, "x"], ["y"], [weight("w", (4,))]
    )
    loaded = Model.load(proto)
    adds = [n for n in loaded.nodes() if n.op == "Add"]
    assert len(adds) == 4
    assert loaded.graph.values["w"].consumers == dict.fromkeys(adds, 1)
    assert loaded.graph.values["c"].consumers.keys() == {n for n in loaded.nodes() if n.op == "If"}


def test_a_body_may_reuse_a_name_of_the_graph_around() -> None:
    body = graphs.graph([node("Neg", ["t"], ["s"])], (), ["s"], [weight("t", (4,))])
    nodes = [
        node("Relu", ["x"], ["t"]),
        graphs.if_node(body, body, ["u"]),
        node("Add", ["t", "u"], ["y"]),
    ]
    loaded = Model.load(graphs.model(nodes, [CONDITION, "x"]))
    assert [n.op for n in loaded.graph.values["t"].consumers] == ["Add"]
    for inner in [n for n in loaded.nodes() if n.op == "Neg"]:
        assert inner.inputs[0] is inner.graph.values["t"]


def test_left_out_inputs_and_outputs_keep_their_slots() -> None:
    nodes = [node("Clip", ["x", "", "hi"], ["t"]), node("Dropout", ["t"], ["", "y"])]
    outputs = [value("y", (4,), TensorProto.BOOL)]
    proto = graphs.model(nodes, ["x"], outputs, [helper.make_tensor("hi", 1, [], [1.0])])
    clip, dropout = Model.load(proto).graph.nodes
    assert clip.inputs[1] is None
    assert dropout.outputs[0] is None
    assert_round_trip(proto)


def test_node_text_is_onnx_syntax() -> None:
    body = graphs.graph([node("Neg", ["x"], ["r"])], (), ["r"])
    nodes = [
        graphs.if_node(body, body, ["t"]),
        node("Clip", ["t", "", "t"], ["u"]),
        node("Gelu", ["u"], ["v"], domain="com.microsoft"),
        node("Constant", [], ["k"], value=weight("k", (2, 3))),
        node("Transpose", ["v"], ["y"], perm=[0, 2, 1]),
        node("Upsample", ["v"], ["z"], scales=[1.0] * 500),
    ]
    proto = graphs.model(nodes, [CONDITION, "x"], domains=["com.microsoft"])
    texts = [n.text() for n in Model.load(proto).graph.nodes]
    assert texts[:5] == [
        "t = If <else_branch = {...}, then_branch = {...}> (c)",
        "u = Clip (t, , t)",
        "v = com.microsoft.Gelu (u)",
        "k = Constant <value = float[2,3]> ()",
        "y = Transpose <perm = [0, 2, 1]> (v)",
    ]
    assert len(texts[5]) < 160
    assert texts[5].endswith("...> (v)")


def test_labels_are_one_line() -> None:
    proto = graphs.model([node("Relu", ["x"], ["y"], name="a\nb")])
    (relu,) = Model.load(proto).graph.nodes
    assert relu.label == "Relu 'a\\nb'"
    proto.graph.node[0].name = "plain"
    assert next(iter(Model.load(proto).graph.nodes)).label == "Relu plain"
    proto.graph.node[0].name = ""
    assert next(iter(Model.load(proto).graph.nodes)).label == "Relu 'y'"


def test_opsets_and_domains_are_normalised() -> None:
    proto = graphs.model([node("Relu", ["x"], ["y"], domain="ai.onnx")], domains=["foreign"])
    proto.opset_import[0].domain = "ai.onnx"
    loaded = Model.load(proto)
    assert loaded.opsets == {"": 17, "foreign": 1}
    assert next(iter(loaded.graph.nodes)).domain == ""
    assert_round_trip(proto)  # the file's spelling stays


def test_declared_types_are_found_wherever_declared() -> None:
    proto = graphs.matmul()
    proto.graph.value_info.append(value("w", (16, 32)))
    graph = Model.load(proto).graph
    sizes = {
        name: [d.dim_value for d in found.declared_type.tensor_type.shape.dim]
        for name, found in graph.values.items()
        if found.declared_type is not None
    }
    assert sizes == {"x": [1, 16], "y": [1, 32], "w": [16, 32]}


# -- what a round trip must not lose ---------------------------------------------------------------


def test_constant_nodes_stay_constant_nodes() -> None:
    forms = {
        "value": weight("k", (300,)),
        "value_float": 1.5,
        "value_ints": [1, 2],
        "value_string": b"s",
        "value_floats": [0.5],
        "sparse_value": helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(2, np.float32), "s"),
            numpy_helper.from_array(np.arange(2), "i"),
            [4],
        ),
    }
    nodes = [
        node("Constant", [], [f"k{i}"], **{key: v}) for i, (key, v) in enumerate(forms.items())
    ]
    proto = graphs.model([*nodes, node("Neg", ["x"], ["y"])])
    loaded = Model.load(proto)
    assert all(v.weight is None for v in loaded.graph.values.values())
    assert_round_trip(proto)


def test_initializers_that_are_inputs_stay_both() -> None:
    """In an order of their own: they may not follow the inputs'."""
    nodes = [node("Add", ["a", "b"], ["t"]), node("Add", ["t", "d"], ["y"])]
    weights = [weight(name, (4,), i) for i, name in enumerate("dba")]
    proto = graphs.model(nodes, ["a", "b", "d"], ["y"], weights)
    graph = Model.load(proto).graph
    assert [v.name for v in graph.inputs] == ["a", "b", "d"]
    assert [v.name for v in graph.initializers] == ["d", "b", "a"]
    for name in "abd":
        assert graph.values[name].weight is not None
        assert graph.values[name].constant is None  # a caller may feed another one
    assert_round_trip(proto)


@pytest.mark.parametrize(("ir", "frozen"), [(3, True), (4, False), (10, False)])
def test_inputs_below_ir_4_are_no_choice_of_the_caller(ir: int, frozen: bool) -> None:
    """There every initializer had to be listed as an input."""
    proto = graphs.matmul()
    proto.ir_version = ir
    proto.graph.input.append(value("w", (16, 32)))
    graph = Model.load(proto).graph
    assert (graph.values["w"].constant is not None) == frozen
    assert graph.values["x"].constant is None
    assert_round_trip(proto)


def documented() -> onnx.ModelProto:
    proto = graphs.matmul()
    proto.producer_name, proto.producer_version = "producer", "1.2"
    proto.domain, proto.model_version, proto.doc_string = "org.model", 7, "model doc"
    proto.metadata_props.add(key="author", value="me")
    graph = proto.graph
    graph.doc_string = "graph doc"
    graph.metadata_props.add(key="g", value="h")
    graph.node[0].doc_string = "node doc"
    graph.node[0].metadata_props.add(key="namespace", value="layer1")
    graph.node[0].attribute.append(helper.make_attribute("alpha", 1.0, doc_string="attribute doc"))
    graph.input[0].doc_string = "input doc"
    graph.input[0].metadata_props.add(key="i", value="j")
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.output[0].doc_string = "output doc"
    graph.initializer[0].doc_string = "weight doc"
    graph.initializer[0].metadata_props.add(key="w", value="x")
    graph.value_info.append(value("w", (16, 32)))
    annotation = graph.quantization_annotation.add(tensor_name="x")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    graph.initializer.append(weight("scale", (1,)))
    configuration = proto.configuration.add(name="two", num_devices=2)
    configuration.device.extend(["cpu", "cpu"])
    graph.node[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    return proto


def test_docs_metadata_and_annotations_survive(tmp_path: Path) -> None:
    """Node, graph and model docs and metadata, version, domain, denotations, devices."""
    proto = documented()
    assert_round_trip(proto)
    path = graphs.save(proto, tmp_path / "m.onnx")
    exporter.save(forced(path), tmp_path / "out.onnx", "always")
    back = onnx.load(tmp_path / "out.onnx")
    back.graph.initializer[0].ClearField("data_location")
    assert back == proto


def test_docs_survive_an_edit_of_their_node() -> None:
    loaded = Model.load(documented())
    (matmul,) = loaded.graph.nodes
    Editor(loaded).set_input(matmul, 0, loaded.graph.values["scale"])
    made = exporter.to_proto(loaded)
    expected = documented()
    expected.graph.node[0].input[0] = "scale"
    assert made == expected


def test_values_that_annotations_name_are_pinned() -> None:
    graph = Model.load(documented()).graph
    assert graph.pinned == {graph.values["scale"]}


def test_a_weight_that_both_branches_read_is_written_once(tmp_path: Path) -> None:
    body = graphs.graph([node("Mul", ["x", "w"], ["r"])], (), [value("r", (600,))])
    io = [CONDITION, value("x", (600,))], [value("y", (600,))]
    proto = graphs.model([graphs.if_node(body, body)], *io, [weight("w", (600,))])
    path = graphs.save(proto, tmp_path / "m.onnx")
    loaded = forced(path)
    assert [v.name for g in loaded.graphs() for v in g.initializers] == ["w"]
    for policy in ("auto", "always"):
        files = exporter.save(loaded, tmp_path / "out.onnx", policy)  # type: ignore[arg-type]
        assert sum(f.stat().st_size for f in files) < path.stat().st_size + 200
    assert (
        onnx.load(tmp_path / "out.onnx").graph.initializer[0].raw_data
        == weight("w", (600,)).raw_data
    )


def test_weights_of_bodies_survive_and_go_outside_on_demand(tmp_path: Path) -> None:
    body = graphs.graph(
        [node("Mul", ["x", "w"], ["r"])], (), [value("r", (600,))], [weight("w", (600,))]
    )
    io = [CONDITION, value("x", (600,))], [value("y", (600,))]
    proto = graphs.model([graphs.if_node(body, body)], *io)
    assert_round_trip(proto)
    files = exporter.save(forced(proto), tmp_path / "out.onnx", "always")
    assert len(files) == 2
    assert files[0].stat().st_size < 1000
    onnx.checker.check_model(files[0])


def test_optional_sequence_and_map_types_survive() -> None:
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [3])
    sequence = helper.make_sequence_type_proto(tensor)
    optional = helper.make_optional_type_proto(sequence)
    sparse = helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [3])
    mapping = onnx.TypeProto()
    mapping.map_type.key_type = TensorProto.INT64
    mapping.map_type.value_type.CopyFrom(tensor)
    kinds = [sequence, optional, sparse, mapping]
    inputs = [helper.make_value_info(f"i{n}", kind) for n, kind in enumerate(kinds)]
    outputs = [helper.make_value_info(f"o{n}", kind) for n, kind in enumerate(kinds)]
    nodes = [node("Identity", [f"i{n}"], [f"o{n}"]) for n in range(len(kinds))]
    proto = graphs.model(nodes, inputs, outputs)
    assert Model.load(proto).graph.values["i1"].declared_type == optional
    assert_round_trip(proto)


def test_an_unsorted_file_is_sorted() -> None:
    """By depth first from the file's order, bodies' uses included."""
    body = graphs.graph([node("Neg", ["late"], ["r"]), node("Relu", ["r"], ["t"])], (), ["t"])
    nodes = [
        node("Add", ["b", "u"], ["y"], name="last"),
        graphs.if_node(body, body, ["u"]),
        node("Relu", ["a"], ["b"]),
        node("Neg", ["x"], ["a"]),
        node("Exp", ["x"], ["late"]),
    ]
    proto = graphs.model(nodes, [CONDITION, "x"])
    loaded = Model.load(proto)
    made = exporter.to_proto(loaded)
    assert sorted(n.output[0] for n in made.graph.node) == sorted(n.output[0] for n in nodes)
    onnx.checker.check_model(made)
    assert [n.output[0] for n in made.graph.node] == ["a", "b", "late", "u", "y"]
    assert {n.output[0]: n for n in made.graph.node} == {n.output[0]: n for n in nodes}
    assert exported(made) == made
    assert [v.name for n in loaded.graph.nodes for v in n.outputs if v] == [
        "a",
        "b",
        "late",
        "u",
        "y",
    ]


def test_a_body_that_only_returns_an_outer_value_comes_after_it() -> None:
    body = graphs.graph([], (), ["t"])
    nodes = [graphs.if_node(body, body), node("Neg", ["x"], ["t"])]
    made = exported(graphs.model(nodes, [CONDITION, "x"]))
    assert [n.op_type for n in made.graph.node] == ["Neg", "If"]


def test_an_unsorted_body_is_sorted() -> None:
    body = graphs.graph([node("Relu", ["r"], ["t"]), node("Neg", ["x"], ["r"])], (), ["t"])
    proto = graphs.model([graphs.if_node(body, body)], [CONDITION, "x"])
    made = exported(proto)
    for attribute in made.graph.node[0].attribute:
        assert [n.op_type for n in attribute.g.node] == ["Neg", "Relu"]
    onnx.checker.check_model(made)


def test_a_long_unsorted_chain_is_sorted_without_recursion() -> None:
    count = 5000
    nodes = [node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(count)]
    proto = graphs.model(nodes[::-1], ["v0"], [f"v{count}"])
    assert [n.output[0] for n in exported(proto).graph.node] == [f"v{i + 1}" for i in range(count)]


def test_a_sorted_file_keeps_its_order(tmp_path: Path) -> None:
    """Any of its orders: not the one that we would choose."""
    nodes = [
        node("Exp", ["x"], ["unrelated"]),
        node("Neg", ["x"], ["a"]),
        node("Exp", ["x"], ["later"]),
        node("Relu", ["a"], ["b"]),
        node("Add", ["b", "later"], ["c"]),
        node("Add", ["c", "unrelated"], ["y"]),
    ]
    path = graphs.save(graphs.model(nodes), tmp_path / "m.onnx")
    exporter.save(forced(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def attributes() -> dict[str, AttributeProto]:
    kind = AttributeProto
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(400, np.float32), "s"),
        numpy_helper.from_array(np.arange(400), "i"),
        [500],
    )
    body = graphs.graph([node("Neg", ["x"], ["r"])], (), ["r"], [weight("inside")])
    made = {
        "empty floats": kind(type=kind.FLOATS),
        "empty ints": kind(type=kind.INTS),
        "empty strings": kind(type=kind.STRINGS),
        "empty string": kind(type=kind.STRING, s=b""),
        "empty tensors": kind(type=kind.TENSORS),
        "empty graphs": kind(type=kind.GRAPHS),
        "no type": kind(i=3),
        "zero": kind(type=kind.INT, i=0),
        "float": kind(type=kind.FLOAT, f=-0.0),
        "ints": kind(type=kind.INTS, ints=[-1, 2**62]),
        "string": kind(type=kind.STRING, s=b"\xff\xfe\x00bytes"),
        "strings": kind(type=kind.STRINGS, strings=[b"a", b"\xff", b""]),
        "tensor": kind(type=kind.TENSOR, t=weight("t")),
        "tensors": kind(type=kind.TENSORS, tensors=[weight("t0"), weight("t1", (2,))]),
        "graph": kind(type=kind.GRAPH, g=body),
        "graphs": kind(type=kind.GRAPHS, graphs=[body, body]),
        "sparse_tensor": kind(type=kind.SPARSE_TENSOR, sparse_tensor=sparse),
        "sparse_tensors": kind(type=kind.SPARSE_TENSORS, sparse_tensors=[sparse, sparse]),
        "type_proto": kind(type=kind.TYPE_PROTO, tp=value("v").type),
        "type_protos": kind(type=kind.TYPE_PROTOS, type_protos=[value("v").type]),
    }
    for name, attribute in made.items():
        attribute.name = name.replace(" ", "_")
    return made


@pytest.mark.parametrize("name", attributes())
def test_every_kind_of_attribute_survives(name: str) -> None:
    call = node("Foreign", ["x"], ["y"], domain="foreign")
    call.attribute.append(attributes()[name])
    proto = graphs.model([call], domains=["foreign"])
    assert_round_trip(proto)
    (loaded,) = Model.load(proto).graph.nodes
    assert loaded.text().startswith("y = foreign.Foreign <")
    found = loaded.attribute(name.replace(" ", "_"))
    assert found is not None
    assert loaded.attribute("other") is None
    assert len(list(loaded.graphs())) == {"graph": 1, "graphs": 2}.get(name, 0)


def test_bodies_in_lists_are_graphs_like_others() -> None:
    call = node("Foreign", ["x"], ["y"], domain="foreign")
    call.attribute.append(attributes()["graphs"])
    loaded = Model.load(graphs.model([call], domains=["foreign"]))
    assert [n.op for n in loaded.nodes()] == ["Foreign", "Neg", "Neg"]
    assert len(loaded.graph.values["x"].consumers) == 3


def function(
    name: str, nodes: list[onnx.NodeProto], domain: str = "local", overload: str = ""
) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    made = helper.make_function(domain, name, ["a"], ["b"], nodes, imports, ["alpha"])
    made.overload = overload
    return made


def test_functions_with_overloads_and_referred_attributes_survive() -> None:
    leaky = node("LeakyRelu", ["a"], ["b"])
    leaky.attribute.add(name="alpha", ref_attr_name="alpha", type=AttributeProto.FLOAT)
    calls = [
        node("F", ["x"], ["t"], domain="local", alpha=0.1),
        node("F", ["t"], ["y"], domain="local"),
    ]
    calls[1].overload = "two"
    proto = graphs.model(calls, domains=["local"])
    proto.functions.extend(
        [function("F", [leaky]), function("F", [node("Neg", ["a"], ["b"])], overload="two")]
    )
    proto.functions[0].doc_string = "doc"
    proto.functions[0].metadata_props.add(key="k", value="v")
    proto.functions[0].value_info.append(value("a"))
    proto.functions[0].attribute_proto.append(helper.make_attribute("beta", 2.0))
    assert_round_trip(proto)
    loaded = Model.load(proto)
    assert set(loaded.functions) == {("local", "F", ""), ("local", "F", "two")}
    assert [n.overload for n in loaded.graph.nodes] == ["", "two"]


def test_foreign_domains_survive() -> None:
    nodes = [
        node("FusedThing", ["x"], ["t"], domain="com.example", mode="fast"),
        node("Gelu", ["t"], ["u"], domain="com.microsoft"),
        node("Scaler", ["u"], ["y"], domain="ai.onnx.ml", offset=[0.0], scale=[1.0]),
    ]
    assert_round_trip(graphs.model(nodes, domains=["com.example", "com.microsoft", "ai.onnx.ml"]))


def trained() -> onnx.ModelProto:
    """A training step that reads `rate` directly and `momentum` from a body."""
    nodes = [node("MatMul", ["x", "w"], ["t"]), node("Neg", ["t"], ["y"])]
    io = [value("x", (1, 16))], [value("y", (1, 32))]
    weights = [weight("w"), weight("rate", (1,)), weight("momentum", (1,)), weight("other", (1,))]
    proto = graphs.model(nodes, *io, weights)
    body = graphs.graph([node("Identity", ["momentum"], ["m"])], (), [value("m", (1,))])
    info = proto.training_info.add()
    info.algorithm.name = "step"
    info.algorithm.node.extend(
        [node("Mul", ["w", "rate"], ["w2"]), graphs.if_node(body, body, ["m2"])]
    )
    info.algorithm.initializer.append(weight("large"))
    info.initialization.name = "start"
    info.initialization.node.append(node("Identity", ["start"], ["w0"]))
    info.initialization.initializer.append(weight("start"))
    info.initialization_binding.add(key="w", value="w0")
    info.update_binding.add(key="w", value="w2")
    return proto


def test_training_information_survives_and_pins_what_it_reads() -> None:
    proto = trained()
    assert_round_trip(proto)
    graph = Model.load(proto).graph
    assert {v.name for v in graph.pinned} == {"w", "rate", "momentum"}


def test_unknown_fields_survive(tmp_path: Path) -> None:
    """Fields of a later ONNX, in every message of the model."""

    def extended(message: object) -> None:
        extra = b"\xfa\x7f\x05later"  # field 2047, length-delimited
        message.MergeFromString(extra)  # type: ignore[attr-defined]

    proto = documented()
    graph = proto.graph
    for message in (
        proto,
        graph,
        graph.node[0],
        graph.node[0].attribute[0],
        graph.initializer[0],
        graph.initializer[1],
        graph.input[0],
        graph.output[0],
        graph.quantization_annotation[0],
        proto.opset_import[0],
    ):
        extended(message)
    data = proto.SerializeToString()
    assert data.count(b"later") == 10
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    for loaded in (Model.load(path), forced(path)):
        exporter.save(loaded, tmp_path / "out.onnx")
        assert (tmp_path / "out.onnx").read_bytes() == data


def test_stale_information_about_names_that_went_is_dropped() -> None:
    proto = graphs.model([node("Neg", ["x"], ["t"]), node("Relu", ["x"], ["y"])])
    proto.graph.value_info.extend([value("t"), value("y")])
    proto.graph.quantization_annotation.add(tensor_name="t")
    proto.graph.quantization_annotation.add(tensor_name="y")
    loaded = Model.load(proto)
    Editor(loaded).remove_node(next(iter(loaded.graph.nodes)))
    made = exporter.to_proto(loaded).graph
    assert [info.name for info in made.value_info] == ["y"]
    assert [a.tensor_name for a in made.quantization_annotation] == ["y"]


def test_a_body_that_returns_an_outer_value_pins_it() -> None:
    """onnxruntime rejects it, but it is the file's business; the value must not go."""
    body = graphs.graph([], (), ["t"])
    proto = graphs.model([node("Neg", ["x"], ["t"]), graphs.if_node(body, body)], [CONDITION, "x"])
    loaded = Model.load(proto)
    assert loaded.graph.pinned == {loaded.graph.values["t"]}
    assert_round_trip(proto)


def test_exporting_leaves_the_graph_as_it_is() -> None:
    """Even where an edit has put a node before what it reads."""
    nodes = [node("Neg", ["x"], ["a"]), node("Exp", ["x"], ["b"]), node("Add", ["a", "b"], ["y"])]
    proto = graphs.model(nodes)
    loaded = Model.load(proto)
    edit = Editor(loaded)
    mark = edit.mark()
    neg, *_ = loaded.graph.nodes
    edit.set_input(neg, 0, loaded.graph.values["b"])
    assert [n.output[0] for n in exporter.to_proto(loaded).graph.node] == ["b", "a", "y"]
    assert [n.op for n in loaded.graph.nodes] == ["Neg", "Exp", "Add"]
    edit.undo_to(mark)
    assert exporter.to_proto(loaded) == proto


# -- broken graphs ---------------------------------------------------------------------------------


def broken(proto: onnx.ModelProto, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        Model.load(proto)
    assert str(caught.value) == f"model: {reason}"


def test_a_cycle_is_named() -> None:
    nodes = [
        node("Add", ["x", "b"], ["a"], name="first"),
        node("Relu", ["a"], ["b"], name="second"),
    ]
    broken(graphs.model(nodes, ["x"], ["b"]), "the graph has a cycle through Add first")


def test_a_node_that_reads_itself_is_a_cycle() -> None:
    broken(graphs.model([node("Add", ["x", "y"], ["y"])]), "the graph has a cycle through Add 'y'")


def test_a_cycle_through_a_body_is_found() -> None:
    body = graphs.graph([node("Neg", ["t"], ["r"])], (), ["r"])
    nodes = [graphs.if_node(body, body, ["s"]), node("Relu", ["s"], ["t"])]
    broken(graphs.model(nodes, [CONDITION], ["t"]), "the graph has a cycle through If 's'")


def test_a_name_computed_twice() -> None:
    nodes = [node("Neg", ["x"], ["y"]), node("Relu", ["x"], ["y"], name="again")]
    broken(graphs.model(nodes), "'y' is computed twice: by Neg 'y' and by Relu again")


def test_a_name_computed_over_an_input_or_initializer() -> None:
    reason = "'x' is computed twice: by an input or initializer and by Neg 'x'"
    broken(graphs.model([node("Neg", ["x"], ["x"])], ["x"], ["x"]), reason)
    proto = graphs.model([node("Neg", ["x"], ["x"])], [], ["x"], [weight("x", (4,))])
    broken(proto, reason)


def test_two_inputs_or_initializers_of_one_name() -> None:
    broken(graphs.model([node("Neg", ["x"], ["y"])], ["x", "x"]), "two graph inputs are called 'x'")
    doubled = [weight("w", (4,)), weight("w", (4,))]
    broken(
        graphs.model([node("Neg", ["w"], ["y"])], [], ["y"], doubled),
        "two initializers are called 'w'",
    )


def test_a_dangling_input() -> None:
    broken(
        graphs.model([node("Neg", ["gone"], ["y"])]), "Neg 'y' reads 'gone', which nothing computes"
    )


def test_a_dangling_input_of_a_body_and_one_hidden_in_a_sibling() -> None:
    then = graphs.graph([node("Neg", ["x"], ["mine"])], (), ["mine"])
    other = graphs.graph([node("Relu", ["mine"], ["r"])], (), ["r"])
    proto = graphs.model([graphs.if_node(then, other)], [CONDITION, "x"])
    broken(proto, "Relu 'r' reads 'mine', which nothing computes")


def test_a_dangling_output() -> None:
    broken(
        graphs.model([node("Neg", ["x"], ["t"])]),
        "the graph has the output 'y', which nothing computes",
    )
    body = graphs.graph([node("Neg", ["x"], ["r"])], (), ["gone"])
    proto = graphs.model([graphs.if_node(body, body)], [CONDITION, "x"])
    broken(proto, "a body of If 'y' has the output 'gone', which nothing computes")


def test_two_bodies_under_one_attribute_name() -> None:
    body = graphs.graph([node("Neg", ["x"], ["r"])], (), ["r"])
    proto = graphs.model([graphs.if_node(body, body)], [CONDITION, "x"])
    proto.graph.node[0].attribute[1].name = proto.graph.node[0].attribute[0].name
    broken(proto, "If 'y' has two attributes 'else_branch'")


# -- operators that nobody knows -------------------------------------------------------------------


def test_an_unknown_operator_of_the_standard_domain() -> None:
    reason = f"ai.onnx has no operator 'Frobnicate' (onnx {onnx.__version__})"
    broken(graphs.model([node("Frobnicate", ["x"], ["y"], name="n")]), f"Frobnicate n: {reason}")
    body = graphs.graph([node("Frobnicate", ["x"], ["r"], domain="ai.onnx")], (), ["r"])
    proto = graphs.model([graphs.if_node(body, body)], [CONDITION, "x"])
    broken(proto, f"Frobnicate 'r': {reason}")


def test_unknown_operators_elsewhere_are_not_our_business() -> None:
    assert_round_trip(graphs.model([node("Frobnicate", ["x"], ["y"], domain="f")], domains=["f"]))


def test_a_function_may_define_an_operator_of_the_standard_domain() -> None:
    proto = graphs.model([node("Frobnicate", ["x"], ["y"])])
    proto.functions.append(function("Frobnicate", [node("Neg", ["a"], ["b"])], domain="ai.onnx"))
    assert_round_trip(proto)


@pytest.mark.parametrize("op", ["Upsample", "Scatter", "Relu", "Attention", "RMSNormalization"])
def test_operators_of_any_version_are_known(op: str) -> None:
    assert is_known(op)


def test_legacy_operators_are_those_that_onnxruntime_has_kernels_for() -> None:
    state = onnxruntime.capi.onnxruntime_pybind11_state
    kernels = {
        kernel.op_name
        for kernel in state.get_all_opkernel_def()
        if kernel.domain in ("", "ai.onnx") and kernel.provider == "CPUExecutionProvider"
    }
    assert {op for op in kernels if not onnx.defs.has(op)} == LEGACY


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Affine", {"alpha": 2.0, "beta": 1.0}),
        ("Crop", {"border": [1, 1, 1, 1]}),
        ("ImageScaler", {"scale": 2.0, "bias": [0.0, 0.0, 0.0]}),
        ("ParametricSoftplus", {"alpha": 1.0, "beta": 1.0}),
        ("Scale", {"scale": 2.0}),
        ("ScaledTanh", {"alpha": 1.0, "beta": 1.0}),
    ],
)
def test_legacy_operators_load_and_run(op: str, attributes: dict[str, object]) -> None:
    from graphopt.runtime import Session

    shape = (1, 3, 4, 4)
    proto = graphs.model(
        [node(op, ["x"], ["y"], **attributes)],
        [value("x", shape)],
        [value("y", None)],
        opset=8,
        ir=8,
    )
    assert_round_trip(proto)
    with Session(exported(proto).SerializeToString(), threads=1) as session:
        assert session.run({"x": np.ones(shape, np.float32)})["y"].size


# -- facts about operators -------------------------------------------------------------------------


def call(proto: onnx.ModelProto) -> tuple[Node, Model]:
    loaded = Model.load(proto)
    return next(iter(loaded.graph.nodes)), loaded


def test_nodes_of_foreign_domains_are_not_pure() -> None:
    assert is_pure(*call(graphs.model([node("Neg", ["x"], ["y"])])))
    assert not is_pure(
        *call(graphs.model([node("Print", ["x"], ["y"], domain="f")], domains=["f"]))
    )
    body = graphs.graph([node("Print", ["x"], ["r"], domain="f")], (), ["r"])
    proto = graphs.model([graphs.if_node(body, body)], [CONDITION, "x"], domains=["f"])
    assert not is_pure(*call(proto))


def test_a_function_is_as_pure_as_its_body() -> None:
    proto = graphs.model([node("F", ["x"], ["y"], domain="local")], domains=["local"])
    proto.functions.append(function("F", [node("G", ["a"], ["b"], domain="local")]))
    proto.functions.append(function("G", [node("Neg", ["a"], ["b"])]))
    assert is_pure(*call(proto))
    proto.functions[1].node[0].domain = "foreign"
    assert not is_pure(*call(proto))
    proto.functions[1].node[0].domain = "ai.onnx"
    assert is_pure(*call(proto))
    proto.functions[1].node[0].CopyFrom(node("F", ["a"], ["b"], domain="local"))
    assert not is_pure(*call(proto))  # recursion
    body = graphs.graph([node("Print", ["a"], ["r"], domain="f")], (), ["r"])
    proto.functions[1].node[0].CopyFrom(graphs.if_node(body, body, ["b"]))
    assert not is_pure(*call(proto))


def test_each_overload_is_judged_alone() -> None:
    proto = graphs.model([node("F", ["x"], ["y"], domain="local")], domains=["local"])
    proto.functions.append(function("F", [node("Neg", ["a"], ["b"])]))
    proto.functions.append(
        function("F", [node("Print", ["a"], ["b"], domain="f")], overload="loud")
    )
    assert is_pure(*call(proto))
    proto.graph.node[0].overload = "loud"
    assert not is_pure(*call(proto))


def test_what_is_random() -> None:
    def random(*nodes: onnx.NodeProto, opset: int = 17, **inputs: object) -> bool:
        proto = graphs.model(nodes, ["x", value("m", (), TensorProto.BOOL)], ["y"], opset=opset)
        if (fixed := inputs.get("m")) is not None:
            proto.graph.initializer.append(helper.make_tensor("m", TensorProto.BOOL, [], [fixed]))
            del proto.graph.input[1]
        last = list(Model.load(proto).graph.nodes)[-1]
        return is_random(last)

    assert random(node("RandomNormalLike", ["x"], ["y"]))
    assert random(node("Bernoulli", ["x"], ["y"]))
    assert not random(node("Neg", ["x"], ["y"]))
    assert not random(node("Bernoulli", ["x"], ["y"], domain="com.microsoft"))
    assert not random(node("Dropout", ["x"], ["y"]))
    live = node("Dropout", ["x", "", "m"], ["y"])
    assert random(live)
    assert random(live, m=True)
    assert not random(live, m=False)
    off = helper.make_tensor("off", TensorProto.BOOL, [], [False])
    constant = node("Constant", [], ["k"], value=off)
    assert not random(constant, node("Dropout", ["x", "", "k"], ["y"]))
    assert random(node("Dropout", ["x"], ["y"], is_test=0), opset=6)
    assert not random(node("Dropout", ["x"], ["y"], is_test=1), opset=6)
