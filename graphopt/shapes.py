"""Proven types and shapes: what follows from constants, from enforced input sizes, by inference.

Nothing declared is believed: neither value_info, nor the shapes of outputs, nor that two dims of
one name are equal. The sizes and ranks of graph inputs are: onnxruntime refuses a feed that
contradicts them. Symbols that inference carries from one value to another do mean equality.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import onnx

from graphopt import collector, size_terms
from graphopt.constants import constant_of, small_tensor
from graphopt.inference import counts_back, inferred, walk
from graphopt.ir import Graph, Model, Node, Value
from graphopt.operators import SCALARS
from graphopt.proofs import Proofs, TensorType


class Types:
    """What is proven of every value of a model; kept up as nodes are added."""

    def __init__(self, model: Model, proofs: Proofs | None = None) -> None:
        self._model = model
        self.proofs = proofs or Proofs()
        self._known: dict[Value, TensorType] = {}
        self._opsets = list(model.proto.opset_import)
        versions = tuple(sorted(model.opsets.items())), model.proto.ir_version
        self._inferred = self.proofs.inferred.setdefault(versions, {})
        graphs = list(model.graphs())
        with collector.paused():
            found = inferred(model, self.proofs.types, has_bodies=len(graphs) > 1)
            protos = walk(found.graph) if len(graphs) > 1 else [found.graph]
            for graph, proto in zip(graphs, protos, strict=True):
                self._collect(graph, proto)
            self.proofs.settle(self._known)
        for graph in graphs:
            if graph.owner is not None:
                self._complete(graph)

    def __getitem__(self, value: Value) -> TensorType | None:
        """What is proven of the value; None where that is nothing, or it is no tensor."""
        if value.weight is not None and (weight := value.constant) is not None:
            return TensorType(weight.data_type, weight.shape)
        return self._known.get(value)

    def __setitem__(self, value: Value, known: TensorType) -> None:
        self._known[value] = known

    def infer(
        self,
        node: onnx.NodeProto,
        inputs: Mapping[str, TensorType],
        data: Mapping[str, onnx.TensorProto],
    ) -> dict[str, TensorType]:
        """Types of a node's outputs by name, from those of its inputs and from constants."""
        call = _call(node, inputs, data)
        slots = self._inferred.get(call)
        if slots is None:
            try:
                found = self._infer(node, inputs, data)
            except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, RuntimeError):
                found = {}
            typed = {name: from_proto(kind) for name, kind in found.items()}
            if node.op_type == "Reshape" and not node.domain:
                typed = {n: self._reshaped(node, kind, inputs, data) for n, kind in typed.items()}
            slots = self._inferred[call] = tuple(typed.get(name) for name in node.output)
        return {n: kind for n, kind in zip(node.output, slots, strict=True) if kind is not None}

    def forget(self) -> None:
        """Leave what is known to the next inference, which may name open sizes differently."""
        self.proofs.before = self._known

    def _reshaped(
        self,
        node: onnx.NodeProto,
        kind: TensorType | None,
        inputs: Mapping[str, TensorType],
        data: Mapping[str, onnx.TensorProto],
    ) -> TensorType | None:
        """With the free size solved for, where it follows from the open ones."""
        known, target = inputs[node.input[0]], data.get(node.input[-1])
        if kind is None or kind.shape is None or target is None:
            return kind
        if known.shape is None or None in known.shape or None not in kind.shape:
            return kind
        proofs = self.proofs
        sizes = [d if isinstance(d, int) else proofs.size(str(d)) for d in known.shape]
        literal = any(a.name == "allowzero" and a.i for a in node.attribute)
        numbers = [int(number) for number in onnx.numpy_helper.to_array(target)]
        found = size_terms.solved(sizes, numbers, zeros_copy=not literal)
        shape = tuple(
            old if new is None or old is not None else proofs.dim(new)
            for old, new in zip(kind.shape, found, strict=True)
        )
        return TensorType(kind.data_type, shape)

    def accepts(
        self,
        node: onnx.NodeProto,
        inputs: Mapping[str, TensorType],
        data: Mapping[str, onnx.TensorProto],
    ) -> bool:
        """False where the operator cannot take inputs of these types and values.

        Runtimes refuse a model that has such a node, even where no run would come to it.
        """
        ranks = (inputs[n].rank for n in _scalars(node) if n in inputs)
        if any(rank is not None and rank > 0 for rank in ranks):
            return False
        try:
            self._infer(node, inputs, data)
        except onnx.shape_inference.InferenceError:
            return False
        except (onnx.defs.SchemaError, RuntimeError):
            return True
        return True

    def _infer(
        self,
        node: onnx.NodeProto,
        inputs: Mapping[str, TensorType],
        data: Mapping[str, onnx.TensorProto],
    ) -> dict[str, onnx.TypeProto]:
        if any(name and name not in inputs for name in node.input):
            return {}
        if counts_back(node, self._model.opsets.get("", 1)):
            return {}
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._model.opsets.get(domain)
        if (node.op_type, domain, version) == ("Slice", "", 10):
            version = 11  # see `_slice_as_later`
        schema = onnx.defs.get_schema(node.op_type, version or 1, domain)
        return onnx.shape_inference.infer_node_outputs(
            schema,
            node,
            {name: known.proto() for name, known in inputs.items()},
            dict(data),
            opset_imports=self._opsets,
            ir_version=self._model.proto.ir_version,
        )

    def _collect(self, graph: Graph, proto: onnx.GraphProto) -> None:
        alike: dict[bytes, TensorType | None] = {}  # blocks of a model repeat one another
        for info in (*proto.value_info, *proto.output, *proto.input):
            value = graph.values.get(info.name)
            stated = info.type.SerializeToString()
            if stated not in alike:
                alike[stated] = from_proto(info.type)
            known = alike[stated]
            if value is not None and known is not None:
                self._known[value] = known

    def _complete(self, body: Graph) -> None:
        """What onnx leaves open in a body: it does not look at constants of the graphs around."""
        for node in body.nodes:
            if node.bodies or all(self._is_settled(value) for value in node.outputs):
                continue
            found = node_types(node, self, self._model)
            for value in node.outputs:
                if value is not None and value.name in found:
                    self._known[value] = found[value.name]

    def _is_settled(self, value: Value | None) -> bool:
        known = self[value] if value is not None else None
        if known is None or known.shape is None:
            return value is None
        return all(isinstance(size, int) for size in known.shape)


def _call(
    node: onnx.NodeProto,
    inputs: Mapping[str, TensorType],
    data: Mapping[str, onnx.TensorProto],
) -> Hashable:
    """All that the types of a node's outputs depend on: blocks of a model repeat one another."""
    operands = []
    for name in node.input:
        tensor = data.get(name)
        held = b"" if tensor is None else tensor.raw_data or tensor.SerializeToString()
        operands.append((inputs.get(name), held))
    attributes = tuple(a.SerializeToString(deterministic=True) for a in node.attribute)
    return node.domain, node.op_type, attributes, tuple(operands), len(node.output)


def from_proto(kind: onnx.TypeProto) -> TensorType | None:
    """The type of a tensor; None for sequences, maps, optionals and what has no element type."""
    tensor = kind.tensor_type
    if not tensor.elem_type:
        return None
    if not tensor.HasField("shape"):
        return TensorType(tensor.elem_type, None)
    return TensorType(tensor.elem_type, tuple(_dim(dim) for dim in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None


def _scalars(node: onnx.NodeProto) -> list[str]:
    slots = SCALARS.get(node.op_type, frozenset()) if not node.domain else frozenset()
    return [name for slot, name in enumerate(node.input) if slot in slots]


def small_data(value: Value, model: Model) -> onnx.TensorProto | None:
    """The tensor behind a constant of up to 1 KB: inference reads shapes and axes from it.

    It may be the weight's own: to be read only.
    """
    weight = constant_of(value, model.store)
    small = None if weight is None else small_tensor(weight)
    if small is None or small.name == value.name:
        return small
    tensor = onnx.TensorProto()
    tensor.CopyFrom(small)
    tensor.name = value.name
    return tensor


def node_types(node: Node, types: Types, model: Model) -> dict[str, TensorType]:
    """Types that follow for the outputs of a node in the graph."""
    known, data = _operands(node, types, model)
    return types.infer(_current(node), known, data)


def takes(
    node: Node, types: Types, model: Model, given: Mapping[Value, TensorType | onnx.TensorProto]
) -> bool:
    """False where the node in the graph would be refused if these were types of its inputs, or
    constants that they are."""
    known, data = _operands(node, types, model)
    for value, what in given.items():
        if isinstance(what, TensorType):
            known[value.name] = what
        else:
            known[value.name] = TensorType(what.data_type, tuple(what.dims))
            data[value.name] = what
    return types.accepts(_current(node), known, data)


def _operands(
    node: Node, types: Types, model: Model
) -> tuple[dict[str, TensorType], dict[str, onnx.TensorProto]]:
    known = {v.name: t for v in node.inputs if v is not None and (t := types[v]) is not None}
    data = {v.name: d for v in node.inputs if v is not None and (d := small_data(v, model))}
    return known, data


def _current(node: Node) -> onnx.NodeProto:
    """The proto with the names of today; bodies as they were in the file."""
    if not node.rewired:
        return node.proto
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[:] = [value.name if value is not None else "" for value in node.inputs]
    proto.output[:] = [value.name if value is not None else "" for value in node.outputs]
    return proto
