"""Functions of the rows that a table is looked up by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Model, Node, Value, Weight
from graphopt.operators import BROADCASTING, ELEMENTWISE
from graphopt.storage import tensor_bytes

_RULE: Final = "fold-lookup"


@dataclass(frozen=True)
class FoldLookups:
    """f(Gather(table, i)) => Gather(f(table), i), f a function of each element and constants.

    The function may take any number of operators; what folds constants then folds f(table), once
    for each row and not once for each index. The table is constant and read by nothing else, and
    its rows are looked up along the first axis.
    """

    name: ClassVar[str] = "fold-lookups"

    def run(self, model: Model, edit: Editor) -> None:
        for graph in model.graphs():
            for node in list(graph.nodes):
                if node in graph.nodes and (lookup := _Lookup.of(node, model, edit)) is not None:
                    _fold(lookup, model, edit)


@dataclass(frozen=True)
class _Lookup:
    """A Gather of rows of a table that is constant, and that nothing else reads."""

    node: Node
    table: Value
    result: Value
    weight: Weight
    rank: int  # of the result

    @staticmethod
    def of(node: Node, model: Model, edit: Editor) -> _Lookup | None:
        if node.op != "Gather" or node.domain or len(node.inputs) != 2:
            return None
        table, result = node.inputs[0], node.outputs[0]
        weight = constant_of(table, model.store)
        axis = node.attribute("axis")
        if table is None or result is None or weight is None or weight.is_sparse:
            return None
        if (axis is not None and axis.i) or table.consumers != {node: 1} or table.is_output:
            return None
        known = edit.types[result]
        if known is None or known.rank is None or not weight.shape:
            return None
        return _Lookup(node, table, result, weight, known.rank)

    def in_table(self, weight: Weight) -> tuple[int, ...] | None:
        """Shape of a constant beside the table that had this weight's beside rows; None where it
        tells rows apart, or spreads them out."""
        row = self.weight.shape[1:]
        if len(weight.shape) > self.rank:
            return None
        ahead = len(weight.shape) - len(row)
        sizes = weight.shape[max(ahead, 0) :]
        fits = all(a in (1, b) for a, b in zip(sizes, row[len(row) - len(sizes) :], strict=True))
        return sizes if fits and set(weight.shape[: max(ahead, 0)]) <= {1} else None


def _fold(lookup: _Lookup, model: Model, edit: Editor) -> None:
    region = _region(lookup, model)
    exits = (_ending(node, lookup, region) for node in reversed(region))
    nodes = next((found for found in exits if found), None)
    if nodes is None:
        return
    result = nodes[-1].outputs[0]
    assert result is not None
    if not _is_no_larger(result, lookup, edit) or not edit.allows(_RULE, result.name):
        return
    _swap(nodes, result, lookup, model, edit)


def _region(lookup: _Lookup, model: Model) -> list[Node]:
    """Nodes that compute each element from those of one row and from constants, in order."""
    inside: dict[Value | None, None] = {lookup.result: None}
    found: dict[Node, None] = {}
    pending = list(lookup.result.consumers)
    while pending:
        node = pending.pop()
        if node in found or node.graph is not lookup.node.graph or len(node.outputs) != 1:
            continue
        if not _acts_by_element(node, inside, lookup, model):
            continue
        found[node] = None
        inside[node.outputs[0]] = None
        pending += node.outputs[0].consumers if node.outputs[0] is not None else ()
    return list(found)


def _acts_by_element(
    node: Node, inside: Iterable[Value | None], lookup: _Lookup, model: Model
) -> bool:
    if node.domain or node.op not in BROADCASTING | ELEMENTWISE:
        return False
    for slot, value in enumerate(node.inputs):
        if value in inside:
            if slot and node.op in ELEMENTWISE:
                return False
            continue
        weight = constant_of(value, model.store)
        if value is None and node.op in ELEMENTWISE:
            continue
        if weight is None or weight.is_sparse:
            return False
        if node.op in BROADCASTING and lookup.in_table(weight) is None:
            return False
    return True


def _ending(end: Node, lookup: _Lookup, region: list[Node]) -> list[Node] | None:
    """The nodes that `end` needs, if nothing else needs what they compute."""
    made = {node.outputs[0]: node for node in region}
    needed = {end: None}
    pending = [end]
    while pending:
        for value in pending.pop().inputs:
            maker = made.get(value)
            if maker is not None and maker not in needed:
                needed[maker] = None
                pending.append(maker)
    for value in (lookup.result, *(node.outputs[0] for node in needed if node is not end)):
        if value is None or value.is_output or value in value.graph.pinned:
            return None
        if not value.consumers.keys() <= needed.keys():
            return None
    return [node for node in region if node in needed]


def _is_no_larger(result: Value, lookup: _Lookup, edit: Editor) -> bool:
    """True where the function's table takes no more bytes, and there is one to compute it from."""
    known = edit.types[result]
    if known is None:
        return False
    sizes = [tensor_bytes(kind, [8]) for kind in (known.data_type, lookup.weight.data_type)]
    if sizes[0] > sizes[1]:
        return False
    try:
        return bool(lookup.weight.values.size)
    except ModelError:
        return False  # a weightless model has none


def _swap(nodes: list[Node], result: Value, lookup: _Lookup, model: Model, edit: Editor) -> None:
    """Compute the nodes from the table itself, and look the result up."""
    gather = lookup.node
    before = "\n".join(node.text() for node in (gather, *nodes))
    stand: dict[Value, Value] = {lookup.result: lookup.table}
    for node in nodes:
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        proto.name = edit.unique(f"{node.outputs[0].name}/table") if node.outputs[0] else ""
        known: dict[str, Value] = {}
        del proto.input[:], proto.output[:]
        for value in node.inputs:
            if value is not None and value not in stand:
                stand[value] = _beside(value, node, lookup, model, edit)
            proto.input.append(stand[value].name if value is not None else "")
            known |= {stand[value].name: stand[value]} if value is not None else {}
        proto.output.append(proto.name)
        made = edit.add_node(gather.graph, proto, known, {}, gather.position, _RULE)
        if node.outputs[0] is not None and made.outputs[0] is not None:
            stand[node.outputs[0]] = made.outputs[0]
    edit.detach_node(nodes[-1])
    _look_up(stand[result], result, gather, edit)
    for node in (*reversed(nodes[:-1]), gather):
        edit.remove_node(node)
    edit.record(_RULE, result.name, before, _told(nodes, stand, result))


def _beside(value: Value, node: Node, lookup: _Lookup, model: Model, edit: Editor) -> Value:
    """A constant of the function, with the axes that it has beside the table."""
    weight = constant_of(value, model.store)
    assert weight is not None
    shape = lookup.in_table(weight) if node.op in BROADCASTING else weight.shape
    if shape is None or shape == weight.shape:
        return value
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(weight.values).reshape(shape))
    tensor.name = edit.unique(f"{value.name}/row")
    return edit.add_constant(lookup.node.graph, tensor.name, tensor, lookup.node.position)


def _look_up(table: Value, result: Value, gather: Node, edit: Editor) -> None:
    indices = gather.inputs[1]
    assert indices is not None
    proto = onnx.NodeProto()
    proto.CopyFrom(gather.proto)
    proto.name = edit.unique(gather.name or f"{result.name}/Gather")
    proto.input[:] = [table.name, indices.name]
    proto.output[:] = [result.name]
    known = {value.name: value for value in (table, indices)}
    edit.add_node(gather.graph, proto, known, {result.name: result}, gather.position, _RULE)


def _told(nodes: list[Node], stand: dict[Value, Value], result: Value) -> str:
    makers = [stand[v].producer for node in nodes if (v := node.outputs[0]) is not None]
    return "\n".join(each.text() for each in (*makers, result.producer) if each is not None)
