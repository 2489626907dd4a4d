"""The part of the editor that puts the nodes of a body into the graph around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx

from graphopt.edit import Editor
from graphopt.ir import SERIALS, Graph, Node, Value
from graphopt.operators import IDENTITY


def splice(
    edit: Editor,
    node: Node,
    body: Graph,
    arguments: Sequence[Value | None] = (),
    rename: Callable[[str], str] = str,
) -> list[Node]:
    """Put the nodes of `body` in the place of `node`, whose outputs they compute from then on.

    `arguments` stand for the inputs of the body, `rename` gives each name of the body the one it
    has outside. An output that no node of the body can compute itself (a weight, an argument, a
    value that is two outputs) comes from an Identity. Returns the nodes.
    """
    _release(edit, node, body)
    edit.detach_node(node)
    parameters = set(body.inputs)
    for value in list(body.values.values()):
        if value not in parameters:
            _move_value(edit, value, node.graph, rename(value.name))
    added = list(body.nodes)
    for inner in added:
        _move_node(edit, inner, node.graph, node.position)
    results: list[Value | None] = list(body.outputs)
    for parameter, argument in zip(body.inputs, arguments, strict=True):
        edit.replace_uses(parameter, argument)
        results = [argument if result is parameter else result for result in results]
    added += _compute_outputs(edit, node, results, set(added))
    edit.forget_types()
    return added


def _release(edit: Editor, node: Node, body: Graph) -> None:
    """Take the body off its node: what its nodes read stays read when the node goes."""
    before = node.bodies
    node.bodies = {
        name: [inner for inner in inners if inner is not body] for name, inners in before.items()
    }

    def undo() -> None:
        node.bodies = before

    edit.journal(undo)


def _compute_outputs(
    edit: Editor, node: Node, results: list[Value | None], made: set[Node]
) -> list[Node]:
    """Let the outputs of the node be the results; the Identity nodes that this takes."""
    added = []
    for slot, target in enumerate(node.outputs):
        result = results[slot]
        if target is None or result is None:
            continue
        if result.producer in made and not result.is_output and result not in node.outputs:
            edit.move_output(result, target)
            edit.replace_uses(result, target)
            edit.remove_value(result)
            results = [target if other is result else other for other in results]
        else:
            proto = onnx.NodeProto(op_type=IDENTITY, name=edit.unique(f"{target.name}/{IDENTITY}"))
            proto.input.append(result.name)
            proto.output.append(target.name)
            known, place = {result.name: result}, node.position
            added.append(edit.add_node(node.graph, proto, known, {target.name: target}, place, ""))
    return added


def _move_value(edit: Editor, value: Value, graph: Graph, name: str) -> None:
    before = value.graph, value.name, value.position, value.weight
    info = value.graph.value_info.get(value.name)
    value.graph, value.name, value.position = graph, name, next(graph.positions)
    if value.weight is not None:
        value.weight = value.weight.named(name)
    graph._restore_value(value)
    if name != before[1]:
        for reader in value.consumers:
            reader.rewired = True
            reader.graph._touch()
        if value.producer is not None:
            value.producer.rewired = True
    if info is not None:
        graph.value_info[name] = onnx.ValueInfoProto()
        graph.value_info[name].CopyFrom(info)
        graph.value_info[name].name = name

    def undo() -> None:
        graph._remove_value(value)
        if info is not None:
            del graph.value_info[name]
        value.graph, value.name, value.position, value.weight = before

    edit.journal(undo)


def _move_node(edit: Editor, node: Node, graph: Graph, position: float) -> None:
    """Both ends of its edges move along: nothing is counted again."""
    before = node.graph, node.position, node.serial
    node.graph, node.position, node.serial = graph, position, next(SERIALS)
    graph.nodes[node] = None

    def undo() -> None:
        del graph.nodes[node]
        node.graph, node.position, node.serial = before

    edit.journal(undo)
