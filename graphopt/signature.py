"""One short text for all regions that cost the same to run."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Final

import numpy as np
import onnx

from graphopt.constants import constant_of, node_constant
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.regions import Region, Shapes, boundary, fixed, operands_first
from graphopt.storage import Store

# Elements up to which the values of a constant count: sizes, axes, indices, flags.
_VALUES_UP_TO: Final[dict[int, int]] = {
    onnx.TensorProto.BOOL: 64,
    onnx.TensorProto.INT32: 8,  # longer ones may be quantized biases
    onnx.TensorProto.INT64: 64,
}


def signature(region: Region, shapes: Shapes) -> str:
    """A hash of what decides how long a region runs, 32 hex digits.

    Structure, operators, attributes, types and shapes of inputs and constants, and the values of
    small integer constants count; names, the order in the file and the values of weights do not.
    `shapes` is as for `graphopt.regions.extract`; what it says of other values counts too. Regions
    are compared within one model: its operator sets do not count.
    """
    writer = _Writer(shapes)
    writer.region(region)
    return writer.digest.hexdigest()


def model_signature(proto: onnx.ModelProto) -> str:
    """The same for a whole model, whose operator sets and declared inputs count."""
    model = Model.load(proto)
    writer = _Writer({})
    writer.write(sorted(model.opsets.items()))
    writer.graph(model.graph)
    return writer.digest.hexdigest()


class _Writer:
    """Feeds a hash with nodes in an order of their own: back from the outputs, operands first."""

    def __init__(self, shapes: Shapes) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self._shapes = shapes
        self._numbers: dict[Value, int] = {}

    def write(self, *parts: object) -> None:
        self.digest.update(repr(parts).encode("utf-8", "backslashreplace"))

    def region(self, region: Region) -> None:
        _, outputs = boundary(region.nodes)
        outputs.sort(key=lambda value: value.name != region.root)  # stable: the root comes first
        self._nodes(outputs, region.nodes)

    def graph(self, graph: Graph) -> None:
        for value in graph.inputs:
            kind = value.declared_type
            self._operand(value)
            self.write(None if kind is None else kind.SerializeToString(deterministic=True))
        self._nodes(graph.outputs, graph.nodes)

    def _nodes(self, outputs: Collection[Value], nodes: Collection[Node]) -> None:
        inside = set(nodes)
        ends = [value.producer for value in outputs if value.producer in inside]
        for node in operands_first([*ends, *nodes], inside):
            self._node(node)
        for value in outputs:
            self._operand(value)
        self.write("end")

    def _node(self, node: Node) -> None:
        self.write(node.domain, node.op, node.overload, len(node.inputs), len(node.outputs))
        constant = node_constant(node, Store())
        if constant is not None:
            self._constant(constant)
        for attribute in sorted(node.proto.attribute, key=lambda a: a.name):
            if constant is None:
                self._attribute(node, attribute)
        for value in node.inputs:
            self._operand(value)
        for value in node.outputs:
            self._operand(value)

    def _attribute(self, node: Node, attribute: onnx.AttributeProto) -> None:
        self.write(attribute.name, attribute.type)
        if attribute.name in node.bodies:
            for body in node.bodies[attribute.name]:
                self.graph(body)
        elif attribute.HasField("t"):
            self._constant(Weight(attribute.t, Store()))
        elif attribute.HasField("sparse_tensor"):
            self._constant(Weight(attribute.sparse_tensor, Store()))
        else:
            stated = onnx.AttributeProto()
            stated.CopyFrom(attribute)
            stated.ClearField("doc_string")
            self.digest.update(stated.SerializeToString(deterministic=True))

    def _operand(self, value: Value | None) -> None:
        """A value by the number it has in this order; at first sight also what is known of it."""
        if value is None:
            self.write(None)
            return
        is_new = value not in self._numbers
        self.write(self._numbers.setdefault(value, len(self._numbers)))
        if not is_new:
            return
        if value.name in self._shapes:
            dtype, shape = self._shapes[value.name]
            self.write(np.dtype(dtype).name, tuple(shape))
        if fixed(value) and (constant := constant_of(value, Store())) is not None:
            self._constant(constant)

    def _constant(self, weight: Weight) -> None:
        self.write(weight.data_type, weight.shape, weight.is_sparse)
        if weight.size <= _VALUES_UP_TO.get(weight.data_type, -1):
            self.write(weight.values.tolist())
