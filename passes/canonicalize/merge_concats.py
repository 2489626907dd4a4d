"""What is joined piece by piece along one axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value

_RULE: Final = "merge-concats"


@dataclass(frozen=True)
class MergeConcats:
    """Concat(a, Concat(b, c)) => Concat(a, b, c), along one axis, however deep.

    The inner one goes, so nothing else may read it.
    """

    name: ClassVar[str] = "merge-concats"

    def run(self, model: Model, edit: Editor) -> None:
        for graph in model.graphs():
            _merge_in(graph, edit)


def _merge_in(graph: Graph, edit: Editor) -> None:
    for node in list(graph.nodes):  # in order: an inner one has taken in what was in it
        if node.op != "Concat" or node.domain or node not in graph.nodes:
            continue
        inner = [
            value for value in node.inputs if value is not None and _is_part(value, node, edit)
        ]
        root = node.outputs[0]
        if inner and root is not None and edit.allows(_RULE, root.name):
            _flatten(node, root, inner, edit)


def _is_part(value: Value, node: Node, edit: Editor) -> bool:
    """True for what another Concat along the same axis computes for this node alone."""
    maker = value.producer
    if maker is None or maker.op != "Concat" or maker.domain or maker.graph is not node.graph:
        return False
    if value.is_output or value in value.graph.pinned or value.consumers != {node: 1}:
        return False
    axes = [_axis(each) for each in (node, maker)]
    if None in axes:
        return False
    known = edit.types[value]
    if known is not None and known.rank:
        axes = [axis % known.rank for axis in axes if axis is not None]
    return axes[0] == axes[1]


def _axis(node: Node) -> int | None:
    stated = node.attribute("axis")
    return stated.i if stated is not None else None


def _flatten(node: Node, root: Value, inner: list[Value], edit: Editor) -> None:
    makers = [value.producer for value in inner if value.producer is not None]
    before = "\n".join(each.text() for each in (*makers, node))
    parts: list[Value] = []
    for value in node.inputs:
        if value in inner and value is not None and value.producer is not None:
            parts += [part for part in value.producer.inputs if part is not None]
        elif value is not None:
            parts.append(value)
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:], proto.output[:]
    proto.input.extend(part.name for part in parts)
    proto.output.append(root.name)
    edit.detach_node(node)
    known = {part.name: part for part in parts}
    made = edit.add_node(node.graph, proto, known, {root.name: root}, node.position, _RULE)
    for maker in makers:
        edit.remove_node(maker)
    edit.record(_RULE, root.name, before, made.text())
