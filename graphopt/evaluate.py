"""Constant nodes computed by onnxruntime, many in one session, with its optimisations off."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model, Node, Value, Weight
from graphopt.operators import MACS
from graphopt.runtime import Session, limits
from graphopt.storage import HOLLOW_OVER

_BATCH_BYTES: Final = 1 << 28  # of constants read and results computed in one session

Arrays = dict[Value, NDArray[Any]]


def evaluate(nodes: Sequence[Node], wanted: Collection[Value], model: Model) -> Arrays:
    """The values that are wanted of those that the nodes compute, as far as onnxruntime can.

    Every input of a node is a constant of the model or computed by a node before it. A node that
    onnxruntime refuses or that fails, and what needs its results, is left out alone.
    """
    last_reader = {value: at for at, node in enumerate(nodes) for value in node.inputs if value}
    known: Arrays = {}
    at = 0
    for batch in _batches(nodes, model):
        at += len(batch)
        kept = {
            value
            for node in batch
            for value in node.outputs
            if value is not None and (value in wanted or last_reader.get(value, 0) >= at)
        }
        _run(batch, kept, known, model)
        for value in [v for v in known if v not in wanted and last_reader.get(v, 0) < at]:
            del known[value]
    return known


def _batches(nodes: Sequence[Node], model: Model) -> Iterator[list[Node]]:
    batch: list[Node] = []
    total = 0
    for node in nodes:
        weights = [w for value in node.inputs if (w := constant_of(value, model.store))]
        size = sum(weight.nbytes for weight in weights)
        if batch and total + size > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(node)
        total += size
    if batch:
        yield batch


def _run(nodes: Sequence[Node], kept: set[Value], known: Arrays, model: Model) -> None:
    """Compute the nodes together; where that fails, by halves."""
    nodes = _computable(nodes, known, model)
    if not nodes:
        return
    try:
        known.update(_compute(nodes, kept, known, model))
    except RuntimeFailure:
        half = len(nodes) // 2
        if not half:
            return
        read = {value for node in nodes[half:] for value in node.inputs if value is not None}
        _run(nodes[:half], kept | read, known, model)
        _run(nodes[half:], kept, known, model)


def _computable(nodes: Sequence[Node], known: Arrays, model: Model) -> list[Node]:
    """Those whose inputs are all constant, known, or computed by the others."""
    made: set[Value | None] = set()
    found = []
    for node in nodes:
        if all(
            value is None or value in known or value in made or constant_of(value, model.store)
            for value in node.inputs
        ):
            found.append(node)
            made.update(node.outputs)
    return found


def _compute(nodes: Sequence[Node], kept: set[Value], known: Arrays, model: Model) -> Arrays:
    names: dict[Value, str] = {}
    feed: dict[str, NDArray[Any]] = {}
    graph = onnx.GraphProto(name="constants")
    made = dict.fromkeys(v for node in nodes for v in node.outputs if v is not None)
    packed = {value for node in nodes if (node.domain, node.op) in MACS for value in node.inputs}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is None or value in names:
                continue
            name = names[value] = f"v{len(names)}"
            if value in made:
                continue
            array = None if value in packed else _plain_array(value, known, model)
            if array is None:
                graph.initializer.append(_tensor(value, name, known, model))
            else:
                element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                graph.input.append(
                    onnx.helper.make_tensor_value_info(name, element, list(array.shape))
                )
                feed[name] = array
        graph.node.append(_node(node, names, model))
    results = [value for value in made if value in kept]
    graph.output.extend(onnx.ValueInfoProto(name=names[value]) for value in results)
    proto = onnx.ModelProto(ir_version=limits().ir, graph=graph)
    proto.opset_import.add(version=model.opsets.get("", 1))
    with Session(_serialized(proto), optimizations="off", threads=1) as session:
        found = session.run(feed, [names[value] for value in results])
    return {value: np.asarray(found[names[value]]) for value in results}


def _plain_array(value: Value, known: Arrays, model: Model) -> NDArray[Any] | None:
    """A large constant as an array to feed, which spares copies; None for all that is to be a
    constant of the session as well: what kernels may pack before they run, types of ml_dtypes."""
    if value in known:
        array = known[value]
    else:
        weight = constant_of(value, model.store)
        assert weight is not None
        if weight.nbytes <= HOLLOW_OVER:
            return None
        array = weight.values
    is_plain = array.dtype.isbuiltin == 1 and array.dtype.kind != "O"
    # a range of a file need not start where its type should
    return np.require(array, requirements=["C", "ALIGNED"]) if is_plain else None


def _serialized(proto: onnx.ModelProto) -> bytes:
    try:
        return proto.SerializeToString()
    except (EncodeError, ValueError) as error:  # over 2 GB
        raise RuntimeFailure(f"too large for one session: {error}") from None


def _tensor(value: Value, name: str, known: Arrays, model: Model) -> onnx.TensorProto:
    if value in known:
        return onnx.numpy_helper.from_array(known[value], name)
    weight = constant_of(value, model.store)
    assert weight is not None
    if weight.is_sparse:
        return onnx.numpy_helper.from_array(weight.values, name)
    tensor = model.store.full(weight.tensor)
    tensor.name = name
    return tensor


def _node(node: Node, names: dict[Value, str], model: Model) -> onnx.NodeProto:
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.ClearField("name")
    proto.input[:] = [names[value] if value is not None else "" for value in node.inputs]
    proto.output[:] = [names[value] if value is not None else "" for value in node.outputs]
    for attribute in proto.attribute:
        if attribute.HasField("t"):
            attribute.t.CopyFrom(model.store.full(attribute.t))
    return proto


def as_weight(array: NDArray[Any], model: Model) -> Weight:
    """A computed array as a constant of the model, in its store where it is large."""
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))
    return Weight(model.store.kept(tensor), model.store)
