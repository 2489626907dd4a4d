"""The concrete size of every value once the sizes of the inputs are chosen. Nothing is run.

Node by node, in order: onnx's own inference gives the types, and what can be computed from small
integers (shapes, axes, lengths) is computed by onnx's reference implementation, so that a shape
which the graph calculates is followed too. Good for estimates; a proof of nothing.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from graphopt.operators import BODIES, RANDOM, SAME_AS_INPUT, SHAPE_READERS, SHAPED_LIKE

_log = logging.getLogger(__name__)
_MAX_ELEMENTS: Final = 4096  # of a value that is followed; shapes have a few, masks some hundreds
Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a value: its type, with sizes where known, and its elements if computed."""

    type: onnx.TypeProto
    data: NDArray[Any] | None = None

    @property
    def size(self) -> Size | None:
        """The shape, None where a dim is unknown or the value is no tensor."""
        return size_of(self.type)


@dataclass(frozen=True, slots=True)
class Call:
    """One node with the shapes it meets; in `bodies` those it may run, each as its calls."""

    node: onnx.NodeProto
    inputs: list[Size | None]
    outputs: list[Size | None]
    bodies: list[list[Call]] = field(default_factory=list)


def size_of(kind: onnx.TypeProto) -> Size | None:
    """The shape of a tensor type where every dim is a number."""
    if not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def walk(
    model: onnx.ModelProto, inputs: Mapping[str, Size], symbols: Mapping[str, int]
) -> list[Call]:
    """Every call of the main graph in order, for inputs of these shapes.

    `model` may be hollow; functions are inlined first. `symbols` gives the sizes behind names of
    dims, for the types that the file declares where inference has nothing to say.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    walker = _Walker(model, symbols)
    known = {}
    for info in model.graph.input:
        kind = onnx.TypeProto()
        kind.CopyFrom(info.type)
        if info.name in inputs:
            _set_size(kind, inputs[info.name])
        known[info.name] = Known(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference implementation: casts, divisions
        return walker.graph(model.graph, known)


class _Walker:
    def __init__(self, model: onnx.ModelProto, symbols: Mapping[str, int]) -> None:
        self._imports = list(model.opset_import)
        self._opsets = {_domain(entry.domain): entry.version for entry in model.opset_import}
        self._ir = model.ir_version
        self._symbols = symbols

    def graph(self, graph: onnx.GraphProto, known: MutableMapping[str, Known]) -> list[Call]:
        """Walk the nodes and add what they compute to `known`."""
        for tensor in graph.initializer:
            known[tensor.name] = _constant(tensor)
        for sparse in graph.sparse_initializer:
            kind = onnx.helper.make_tensor_type_proto(sparse.values.data_type, sparse.dims)
            known[sparse.values.name] = Known(kind)
        declared = {info.name: info.type for info in (*graph.value_info, *graph.output)}
        return [self._call(node, known, declared) for node in graph.node]

    def _call(
        self,
        node: onnx.NodeProto,
        known: MutableMapping[str, Known],
        declared: Mapping[str, onnx.TypeProto],
    ) -> Call:
        bodies: list[list[Call]] = []
        if _domain(node.domain) == "" and node.op_type in BODIES:
            found, bodies = self._bodies(node, known)
        else:
            found = self._infer(node, known)
        for name in filter(None, node.output):
            if (name not in found or found[name].size is None) and name in declared:
                stated = self._substituted(declared[name])
                if size_of(stated) is not None or name not in found:
                    found[name] = Known(stated)
        known.update(found)
        sizes = [known[name].size if name in known else None for name in node.input]
        outputs = [known[name].size if name in known else None for name in node.output]
        return Call(node, sizes, outputs, bodies)

    def _infer(self, node: onnx.NodeProto, known: Mapping[str, Known]) -> dict[str, Known]:
        """Types of the outputs, and their elements where they follow from known elements."""
        node, keeps = _standard(node)
        if any(name and name not in known for name in node.input):
            return {}
        if keeps:
            kind = known[node.input[0]].type
            return {name: Known(kind) for name in (*node.output[:1], *node.output[3:4])}
        types: Mapping[str, onnx.TypeProto] = {}
        try:
            version = self._opsets[_domain(node.domain)]
            schema = onnx.defs.get_schema(node.op_type, version, _domain(node.domain))
            types = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: known[name].type for name in node.input if name},
                {n: _tensor(known[n], n) for n in node.input if n and known[n].data is not None},
                opset_imports=self._imports,
                ir_version=self._ir,
            )
        except Exception as error:  # foreign operator, or a model that contradicts itself
            _log.debug("no inference for %s: %s", node.op_type, error)
        found = {name: Known(kind) for name, kind in types.items() if name}
        found.update(self._evaluate(node, known, found))
        return found

    def _evaluate(
        self, node: onnx.NodeProto, known: Mapping[str, Known], found: Mapping[str, Known]
    ) -> dict[str, Known]:
        """The outputs computed, if they are small and depend on nothing but known elements."""
        feed: dict[str, Any] = {}
        for name in filter(None, node.input):
            value = known[name]
            if value.data is not None:
                feed[name] = value.data
            elif node.op_type in SHAPE_READERS and value.size is not None:
                feed[name] = np.broadcast_to(np.float32(0), value.size)  # takes no memory
            else:
                return {}
        large = any(
            (v.size is not None and math.prod(v.size) > _MAX_ELEMENTS) for v in found.values()
        )
        if large or _domain(node.domain) or node.op_type in RANDOM or _is_hollow(node):
            return {}
        try:
            evaluator = ReferenceEvaluator(node, opsets=self._opsets)
            results = evaluator.run(None, feed)
        except Exception as error:
            _log.debug("no value for %s: %s", node.op_type, error)
            return {}
        return {
            name: _computed(result)
            for name, result in zip(node.output, results, strict=False)
            if name and isinstance(result, np.ndarray | np.generic) and result.size <= _MAX_ELEMENTS
        }

    def _bodies(
        self, node: onnx.NodeProto, known: MutableMapping[str, Known]
    ) -> tuple[dict[str, Known], list[list[Call]]]:
        """Walk the bodies, which see what is around them, and conclude on the node's outputs."""
        kind = BODIES[node.op_type]
        graphs = {a.name: a.g for a in node.attribute if a.HasField("g")}
        if kind == "branch":
            condition = known[node.input[0]].data if node.input[0] in known else None
            if condition is not None and condition.size == 1:
                graphs = {"taken": graphs["then_branch" if condition.all() else "else_branch"]}
        results: list[list[Known | None]] = []
        bodies = []
        for graph in graphs.values():
            inner: ChainMap[str, Known] = ChainMap({}, known)
            inner.update(_arguments(node, graph, known, kind))
            bodies.append(self.graph(graph, inner))
            results.append([inner.get(info.name) for info in graph.output])
        if kind == "branch":
            merged = [_merge(values) for values in zip(*results, strict=False)]
        elif kind == "scan" and self._opsets.get("", 0) < 9:
            merged = []  # that version also had a batch axis; nobody exports it any more
        else:
            merged = list(_iterated(node, graphs["body"], known, results[0], kind))
        names = zip(node.output, merged, strict=False)
        return {name: value for name, value in names if name and value is not None}, bodies

    def _substituted(self, kind: onnx.TypeProto) -> onnx.TypeProto:
        """A declared type with the chosen sizes in place of the names of dims."""
        copy = onnx.TypeProto()
        copy.CopyFrom(kind)
        for dim in copy.tensor_type.shape.dim if copy.tensor_type.HasField("shape") else ():
            if dim.dim_param in self._symbols:
                dim.dim_value = self._symbols[dim.dim_param]
        return copy


def _arguments(
    node: onnx.NodeProto, graph: onnx.GraphProto, known: Mapping[str, Known], kind: str
) -> Iterator[tuple[str, Known]]:
    """What the inputs of a body are: declared types, made sharper by what the node is given."""
    for position, info in enumerate(graph.input):
        value = Known(info.type)
        # A loop's body takes (iteration, condition, states), a node (trip count, condition, states)
        name = node.input[position] if position < len(node.input) else ""
        if name in known and not (kind == "loop" and position < 2):
            outer = known[name].type
            value = Known(outer)
            if kind == "scan" and position >= len(node.input) - _scan_inputs(node):
                value = Known(_without_axis(outer))
        yield info.name, value


def _iterated(
    node: onnx.NodeProto,
    body: onnx.GraphProto,
    known: Mapping[str, Known],
    results: Sequence[Known | None],
    kind: str,
) -> Iterator[Known | None]:
    """Outputs of a Loop or Scan: final states, then per-iteration values stacked."""
    trips: int | None = None
    if kind == "loop":
        states = len(body.input) - 2
        initial = node.input[2:]
        results = results[1:]
        if node.input[0] in known and (count := known[node.input[0]].data) is not None:
            trips = int(count.reshape(-1)[0])
    else:
        scanned = _scan_inputs(node)
        states = len(body.input) - scanned
        initial = node.input[:states]
        size = known[node.input[-1]].size if node.input[-1] in known else None
        trips = size[0] if size else None
    for position, value in enumerate(results):
        if position < states:
            before = known.get(initial[position]) if position < len(initial) else None
            stays = value is not None and before is not None and before.size == value.size
            yield Known(value.type) if value is not None and stays else None
            continue
        if value is None:
            yield None
            continue
        stacked = onnx.TypeProto()
        stacked.CopyFrom(value.type)
        if value.size is not None:
            stacked.tensor_type.shape.ClearField("dim")
            first = stacked.tensor_type.shape.dim.add()
            if trips is not None:
                first.dim_value = trips
            for size_ in value.size:
                stacked.tensor_type.shape.dim.add(dim_value=size_)
        yield Known(stacked)


def _scan_inputs(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)


def _without_axis(kind: onnx.TypeProto) -> onnx.TypeProto:
    """One slice of a scanned input, along its first axis."""
    copy = onnx.TypeProto()
    copy.CopyFrom(kind)
    if copy.tensor_type.HasField("shape") and copy.tensor_type.shape.dim:
        del copy.tensor_type.shape.dim[0]
    return copy


def _merge(values: Sequence[Known | None]) -> Known | None:
    """What two branches agree on."""
    first = values[0]
    if first is None or any(v is None or v.size != first.size for v in values):
        return None
    same = all(v is first or (v and v.data is not None) for v in values)
    return first if same and len(values) == 1 else Known(first.type)


def _standard(node: onnx.NodeProto) -> tuple[onnx.NodeProto, bool]:
    """A fused operator of onnxruntime as the standard one of that shape; and is it the input's?"""
    if node.domain != "com.microsoft":
        return node, False
    if node.op_type in SAME_AS_INPUT:
        return node, True
    if node.op_type not in SHAPED_LIKE:
        return node, False
    operator, slots = SHAPED_LIKE[node.op_type]
    inputs = [node.input[slot] for slot in slots if slot < len(node.input)]
    like = onnx.helper.make_node(operator, inputs, list(node.output[:1]))
    schema = onnx.defs.get_schema(operator)
    like.attribute.extend(a for a in node.attribute if a.name in schema.attributes)
    return like, False


def _is_hollow(node: onnx.NodeProto) -> bool:
    return any(a.t.external_data or a.sparse_tensor.values.external_data for a in node.attribute)


def _constant(tensor: onnx.TensorProto) -> Known:
    kind = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    if tensor.external_data or math.prod(tensor.dims) > _MAX_ELEMENTS:
        return Known(kind)
    try:
        return Known(kind, onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError):  # a weight without its data
        return Known(kind)


def _computed(result: NDArray[Any] | np.generic) -> Known:
    array = np.asarray(result)
    element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return Known(onnx.helper.make_tensor_type_proto(element, array.shape), array)


def _tensor(value: Known, name: str) -> onnx.TensorProto:
    assert value.data is not None
    return onnx.numpy_helper.from_array(value.data, name)


def _set_size(kind: onnx.TypeProto, size: Size) -> None:
    kind.tensor_type.shape.ClearField("dim")
    for dim in size:
        kind.tensor_type.shape.dim.add(dim_value=dim)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
