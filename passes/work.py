"""What the nodes of a model do: multiply-accumulates, at the shapes that a run showed."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from graphopt import macs
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.observers import Observer
from graphopt.operators import MACS
from graphopt.regions import fixed


def sizes_wanted(model: Model) -> set[Observer]:
    """What has to be seen so that the shapes of all that products read are known."""
    nodes = (node for node in model.graph.nodes if (node.domain, node.op) in MACS)
    read = {v for node in nodes for v in node.inputs if v is not None and not fixed(v)}
    return {Observer(value.name, "moving-average") for value in read}


def node_macs(edit: Editor, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """MACs of one node, counted as a model of its own; 0 where a shape is not known.

    `shapes` are those of values by name, beside those that are proved.
    """
    inputs, sizes = [], {}
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    for slot, value in enumerate(node.inputs):
        if value is None:
            continue
        known, name = edit.types[value], f"x{slot}"
        size = size_of(value.name, known.shape if known is not None else None, shapes)
        if size is None or known is None:
            return 0
        proto.input[slot] = name
        sizes[name] = size
        inputs.append(onnx.helper.make_tensor_value_info(name, known.data_type, size))
    proto.output[:] = [f"y{slot}" for slot in range(len(node.outputs))]
    graph = onnx.helper.make_graph([proto], "node", inputs, [])
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in proto.output)
    model = onnx.ModelProto(ir_version=edit.model.proto.ir_version, graph=graph)
    model.opset_import.extend(edit.model.proto.opset_import)
    return macs.count(model, sizes).total


def size_of(
    name: str,
    proven: tuple[int | str | None, ...] | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...] | None:
    """The shape of a value as a run showed it, or as it is proved; None where neither is."""
    if name in shapes:
        return shapes[name]
    found = tuple(size for size in proven or () if isinstance(size, int))
    return found if proven is not None and len(found) == len(proven) else None
