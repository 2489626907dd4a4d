"""Regions: nodes that one decision is about, cut out to be measured on their own.

A lossy choice (int8 here, low rank there) is made for a set of nodes of one graph at a time. What
it reads and computes is its boundary; cut out as a model of static shapes it can be timed; regions
with one signature cost the same, so that a block that repeats is timed once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from graphopt import exporter, output
from graphopt.constants import CONSTANT
from graphopt.errors import UsageError
from graphopt.ir import Model, Node, Value
from graphopt.runtime import limits


class StaticType(NamedTuple):
    """Element type and shape that a value has in a region; None for a size that varies."""

    dtype: npt.DTypeLike
    shape: tuple[int | None, ...]


Shapes = Mapping[str, tuple[npt.DTypeLike, tuple[int | None, ...]]]
"""Name of a value to its `StaticType`."""


@dataclass(frozen=True)
class Region:
    """Nodes of one graph, in file order; `root` names the value that the region is called after."""

    root: str
    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> Region:
        """These nodes, called after the last value that they hand out. Needs one such value."""
        ordered = tuple(sorted(set(nodes), key=lambda node: node.place))
        return cls(boundary(ordered)[1][-1].name, ordered)

    @property
    def inputs(self) -> list[Value]:
        """Values read from outside that are not constants, in the order of reading."""
        return boundary(self.nodes)[0]

    @property
    def outputs(self) -> list[Value]:
        """Values read outside, or outputs of the graph, in the order of computing."""
        return boundary(self.nodes)[1]


def boundary(nodes: Iterable[Node]) -> tuple[list[Value], list[Value]]:
    """What nodes read from outside that is no constant, and what of theirs is read outside.

    Bodies of the nodes belong to them: what these read counts as read. The nodes are of one graph;
    both lists follow their order in the file.
    """
    inside = dict.fromkeys(sorted(nodes, key=lambda node: node.place))
    produced = [v for node in inside for v in node.outputs if v is not None]
    known = set(produced)
    inputs = dict.fromkeys(
        value for node in inside for value in reads(node) if value not in known and not fixed(value)
    )
    outputs = [
        v for v in produced if v.is_output or any(outer(c, v) not in inside for c in v.consumers)
    ]
    return list(inputs), outputs


def connected(nodes: Iterable[Node]) -> list[tuple[Node, ...]]:
    """Groups of nodes that are joined by values that they hand each other, in file order.

    Nodes that only read the same value are not joined by it.
    """
    ordered = sorted(set(nodes), key=lambda node: node.place)
    group = {node: node for node in ordered}  # towards the first node of the group

    def first(node: Node) -> Node:
        while group[node] is not node:
            group[node] = node = group[group[node]]
        return node

    for node in ordered:
        for value in reads(node):
            if value.producer in group and not fixed(value):
                ends = sorted((first(node), first(value.producer)), key=lambda end: end.place)
                group[ends[1]] = ends[0]
    components: dict[Node, list[Node]] = {}
    for node in ordered:
        components.setdefault(first(node), []).append(node)
    return [tuple(component) for component in components.values()]


def extract(
    model: Model, nodes: Iterable[Node], shapes: Shapes, also: Collection[str] = ()
) -> onnx.ModelProto:
    """The nodes as a model of their own, which reads and computes their `boundary`.

    Values named in `also` are further outputs. `shapes` gives the type of every value that they
    read; outputs that it knows are declared as well. Constants come along in full, operator sets
    and functions are the model's, and all names stay. Raises UsageError where a type is missing,
    ModelError over 2 GB.
    """
    inside = sorted(set(nodes), key=lambda node: node.place)
    inputs, outputs = boundary(inside)
    made = [v for node in inside for v in node.outputs if v is not None]
    outputs += [v for v in made if v.name in also and v not in outputs]
    if not outputs:
        raise UsageError("a region without outputs cannot run on its own")
    proto = onnx.ModelProto(ir_version=min(model.proto.ir_version, limits().ir))
    proto.opset_import.extend(model.proto.opset_import)
    proto.functions.extend(model.proto.functions)
    graph = proto.graph
    graph.name = "region"
    graph.input.extend(_declared(value, shapes) for value in inputs)
    for value in outputs:
        known = value.name in shapes
        graph.output.append(
            _declared(value, shapes) if known else onnx.ValueInfoProto(name=value.name)
        )
    constants = _constants(inside)
    for weight in (value.weight for value in constants if value.weight is not None):
        if isinstance(weight.proto, onnx.SparseTensorProto):
            graph.sparse_initializer.append(weight.proto)
        else:
            graph.initializer.append(weight.proto)
    stated = dict.fromkeys(value.producer for value in constants if value.producer is not None)
    ordered = [*stated, *operands_first(inside, set(inside))]
    graph.node.extend(exporter._export_node(node) for node in ordered)
    return output.serialize(proto, model.store)


def _constants(nodes: Sequence[Node]) -> list[Value]:
    """Constants that nodes read and do not hold themselves, in the order of reading."""
    found = dict.fromkeys(value for node in nodes for value in reads(node) if fixed(value))
    inside = set(nodes)
    return [value for value in found if value.producer not in inside]


def _declared(value: Value, shapes: Shapes) -> onnx.ValueInfoProto:
    if value.name not in shapes:
        raise UsageError(f"the type and shape of {value.name!r} are not known")
    dtype, shape = shapes[value.name]
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return onnx.helper.make_tensor_value_info(value.name, element, shape)


def reads(node: Node) -> Iterator[Value]:
    """The values of the node's graph, and of those around it, that it and its bodies read."""
    yield from (value for value in node.inputs if value is not None)
    own = dict.fromkeys(graph for body in node.graphs() for graph in body.walk())
    for graph in own:
        values = [v for inner in graph.nodes for v in inner.inputs] + list(graph.outputs)
        yield from (v for v in values if v is not None and v.graph not in own)


def operands_first(ends: Iterable[Node], inside: Collection[Node]) -> Iterator[Node]:
    """Every node inside that the ends need, once, after what it reads; operands in their order."""
    done: set[Node] = set()
    for end in ends:
        stack = [(end, _operands(end, inside))] if end not in done else []
        done.add(end)
        while stack:
            node, operands = stack[-1]
            found = next((other for other in operands if other not in done), None)
            if found is None:
                stack.pop()
                yield node
            else:
                done.add(found)
                stack.append((found, _operands(found, inside)))


def _operands(node: Node, inside: Collection[Node]) -> Iterator[Node]:
    return (v.producer for v in reads(node) if v.producer is not None and v.producer in inside)


def outer(node: Node, value: Value) -> Node:
    """The node of the value's graph that reads it: the node itself, or the one it is a body of."""
    while node.graph is not value.graph:
        assert node.graph.owner is not None
        node = node.graph.owner
    return node


def fixed(value: Value) -> bool:
    """True for a constant: an initializer that no caller can replace, or of a Constant node."""
    made = value.producer
    is_stated = made is not None and made.op == CONSTANT and not made.domain
    return is_stated or value.constant is not None
