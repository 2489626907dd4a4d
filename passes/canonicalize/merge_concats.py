"""What is joined piece by piece along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value

_RULE: Final = "merge-concats"
_PARTS: Final = "join-parts"


@dataclass(frozen=True)
class MergeConcats:
    """Concat(a, Concat(b, c)) => Concat(a, b, c), along one axis, however deep.

    The inner one goes, so nothing else may read it. What a Split along that axis took apart, all
    of it and in order, is the whole again: Concat(a, *Split(x)) => Concat(a, x).
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
        if root is None:
            continue
        if inner and edit.allows(_RULE, root.name):
            node = _flatten(node, root, inner, edit)
        parts = _joined(node, edit)
        if len(parts) < len(node.inputs) and edit.allows(_PARTS, root.name):
            _restate(node, root, parts, _PARTS, edit)


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


def _joined(node: Node, edit: Editor) -> list[Value]:
    """The inputs, with what a Split took apart in the place of its parts."""
    found: list[Value] = []
    inputs = [value for value in node.inputs if value is not None]
    while inputs:
        maker = inputs[0].producer
        parts = list(maker.outputs) if maker is not None else []
        is_whole = len(parts) > 1 and inputs[: len(parts)] == parts
        if maker is not None and is_whole and _splits_along(maker, node, edit):
            found += [value for value in maker.inputs[:1] if value is not None]
            del inputs[: len(parts)]
        else:
            found.append(inputs.pop(0))
    return found


def _splits_along(maker: Node, node: Node, edit: Editor) -> bool:
    if maker.op != "Split" or maker.domain or maker.graph is not node.graph:
        return False
    stated = maker.attribute("axis")
    cut, seam = stated.i if stated is not None else 0, _axis(node)
    whole = maker.inputs[0]
    known = edit.types[whole] if whole is not None else None
    if seam is None or cut == seam:
        return cut == seam
    rank = known.rank if known is not None else None
    return rank is not None and rank > 0 and cut % rank == seam % rank


def _axis(node: Node) -> int | None:
    stated = node.attribute("axis")
    return stated.i if stated is not None else None


def _flatten(node: Node, root: Value, inner: list[Value], edit: Editor) -> Node:
    makers = [value.producer for value in inner if value.producer is not None]
    parts: list[Value] = []
    for value in node.inputs:
        if value in inner and value is not None and value.producer is not None:
            parts += [part for part in value.producer.inputs if part is not None]
        elif value is not None:
            parts.append(value)
    return _restate(node, root, parts, _RULE, edit, makers)


def _restate(
    node: Node, root: Value, parts: list[Value], rule: str, edit: Editor, gone: Sequence[Node] = ()
) -> Node:
    """Let the node join these instead; `gone` are nodes that nothing needs any more."""
    before = "\n".join(each.text() for each in (*gone, node))
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:], proto.output[:]
    proto.input.extend(part.name for part in parts)
    proto.output.append(root.name)
    edit.detach_node(node)
    known = {part.name: part for part in parts}
    made = edit.add_node(node.graph, proto, known, {root.name: root}, node.position, rule)
    for maker in gone:
        edit.remove_node(maker)
    edit.record(rule, root.name, before, made.text())
    return made
