"""From the IR back to the hollow model: untouched parts are the protos they came from."""

from __future__ import annotations

from pathlib import Path

import onnx

from graphopt import collector, output
from graphopt.importer import in_order
from graphopt.ir import Graph, Model, Node


def to_hollow(model: Model) -> onnx.ModelProto:
    """The model as a hollow ModelProto, its weights references into `model.store`."""
    if not model.graph.edited:
        return model.proto
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    with collector.paused():
        _export_graph(model.graph, proto.graph)
    return proto


def to_proto(model: Model) -> onnx.ModelProto:
    """The full ModelProto. Raises ModelError over 2 GB."""
    return output.serialize(to_hollow(model), model.store)


def save(model: Model, path: Path, external: output.ExternalPolicy = "auto") -> list[Path]:
    """Write the model; returns the files. Not atomic by itself: see `output.Target`."""
    return output.write(to_hollow(model), model.store, path, external)


def _export_graph(graph: Graph, target: onnx.GraphProto) -> None:
    """Replace what passes may change in `target`, a copy of the graph's proto."""
    if not graph.edited:
        return
    nodes = in_order(sorted(graph.nodes, key=lambda node: node.place), "result")
    for field in ("node", "initializer", "sparse_initializer", "input"):
        target.ClearField(field)
    target.node.extend(_export_node(node) for node in nodes)
    for value in graph.initializers:
        assert value.weight is not None
        if isinstance(value.weight.proto, onnx.SparseTensorProto):
            target.sparse_initializer.append(value.weight.proto)
        else:
            target.initializer.append(value.weight.proto)
    kept_inputs = {value.name for value in graph.inputs}
    target.input.extend(info for info in graph.proto.input if info.name in kept_inputs)
    info = _value_info(graph)
    annotations = [a for a in target.quantization_annotation if a.tensor_name in graph.values]
    for field, kept in (("value_info", info), ("quantization_annotation", annotations)):
        if kept != list(getattr(target, field)):
            copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
            target.ClearField(field)
            getattr(target, field).extend(copies)


def _value_info(graph: Graph) -> list[onnx.ValueInfoProto]:
    """What the file declares of its values, and of those that came from bodies.

    A value that became a constant says all of this itself.
    """
    proto, redeclared = graph.proto, graph.redeclared
    given = {tensor.name for tensor in proto.initializer}
    given |= {tensor.values.name for tensor in proto.sparse_initializer}
    stated = {
        info.name for field in (proto.value_info, proto.input, proto.output) for info in field
    }
    kept = [
        graph.value_info.get(info.name) if info.name in redeclared else info
        for info in proto.value_info
    ]
    moved = [info for name, info in graph.value_info.items() if name not in stated]
    return [
        info
        for info in (*kept, *moved)
        if info is not None
        and (value := graph.values.get(info.name)) is not None
        and (value.weight is None or info.name in given)
    ]


def _export_node(node: Node) -> onnx.NodeProto:
    bodies_edited = any(body.edited for body in node.graphs())
    if not node.rewired and not bodies_edited:
        return node.proto
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    if node.rewired:
        del proto.input[:], proto.output[:]
        proto.input.extend(value.name if value else "" for value in node.inputs)
        proto.output.extend(value.name if value else "" for value in node.outputs)
    for attribute in proto.attribute:
        targets = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for body, target in zip(node.bodies.get(attribute.name, ()), targets, strict=False):
            _export_graph(body, target)
    return proto
