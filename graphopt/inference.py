"""onnx's shape inference over a whole model, kept from what it believes or infers wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import onnx

from graphopt import exporter
from graphopt.constants import hollow_tensor, small_tensor
from graphopt.ir import Graph, Model, Value, Weight
from graphopt.operators import FORWARD_AXES
from graphopt.proofs import TensorType

_NOWHERE: Final = "graphopt.unknown"  # a domain of which inference knows nothing
_LATER: Final = "graphopt.later"  # a domain of functions that are operators of a later opset


def inferred(
    model: Model, proven: Mapping[Value, TensorType], *, has_bodies: bool
) -> onnx.ModelProto:
    """onnx's inference over the hollow model, from what is proven and nothing merely declared."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exporter.to_hollow(model))
    graphs = list(walk(proto.graph)) if has_bodies else [proto.graph]
    for graph in graphs:
        _densify(graph, model)
    _forget_defaults(model.graph, proto.graph)
    opset = model.opsets.get("", 1)
    for graph in graphs:
        del graph.value_info[:]
        for info in graph.output:
            _forget_shape(info.type)
        for node in graph.node:
            if counts_back(node, opset):
                node.domain = _NOWHERE
        if opset == 10:
            _slice_as_later(graph)
    proto.opset_import.add(domain=_NOWHERE, version=1)
    if opset == 10:
        proto.opset_import.add(domain=_LATER, version=1)
        proto.functions.extend(_later_slices())
    for info in proto.graph.input:
        _own_symbols(info)
    outputs = {info.name: info for info in proto.graph.output}
    for value, known in proven.items():
        if model.graph.values.get(value.name) is not value:
            continue
        if value.name in outputs:
            outputs[value.name].type.CopyFrom(known.proto())
        else:
            proto.graph.value_info.add(name=value.name, type=known.proto())
    for graph in graphs[1:]:
        for info in graph.input:
            _forget_shape(info.type)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)


def _densify(graph: onnx.GraphProto, model: Model) -> None:
    """State sparse initializers as dense ones, of which inference knows what they are."""
    for sparse in graph.sparse_initializer:
        weight = Weight(sparse, model.store)
        graph.initializer.append(small_tensor(weight) or hollow_tensor(weight))
    del graph.sparse_initializer[:]


def _forget_defaults(graph: Graph, proto: onnx.GraphProto) -> None:
    """Take out what a caller may replace: inference would read shapes from it."""
    if any(value.weight is not None and value.constant is None for value in graph.inputs):
        fixed = {value.name for value in graph.initializers if value.constant is not None}
        kept = [tensor for tensor in proto.initializer if tensor.name in fixed]
        del proto.initializer[:]
        proto.initializer.extend(kept)


def counts_back(node: onnx.NodeProto, opset: int) -> bool:
    """True for negative axes in a version that onnx infers wrongly with them."""
    if node.op_type not in FORWARD_AXES or node.domain or opset >= FORWARD_AXES[node.op_type]:
        return False
    return any(axis < 0 for a in node.attribute if a.name == "axes" for axis in a.ints)


def _slice_as_later(graph: onnx.GraphProto) -> None:
    """Infer Slice of opset 10 as that of 11: onnx lets the former leave open sizes as they are."""
    for node in graph.node:
        if node.op_type == "Slice" and not node.domain:
            node.op_type, node.domain = f"Slice{len(node.input)}", _LATER


def _later_slices() -> Iterator[onnx.FunctionProto]:
    for count in (3, 4, 5):
        names = ["data", "starts", "ends", "axes", "steps"][:count]
        body = [onnx.helper.make_node("Slice", names, ["output"])]
        opsets = [onnx.helper.make_opsetid("", 11)]
        yield onnx.helper.make_function(_LATER, f"Slice{count}", names, ["output"], body, opsets)


def _forget_shape(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type"):
        kind.tensor_type.ClearField("shape")


def _own_symbols(info: onnx.ValueInfoProto) -> None:
    """Give every free dim a symbol of its own: equal names prove nothing."""
    for axis, dim in enumerate(info.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value") or dim.dim_value <= 0:
            dim.dim_param = f"size({info.name}, {axis})"


def walk(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and its bodies, in the order of `Graph.walk`."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for body in bodies:
                yield from walk(body)
