"""What running the original can and cannot tell about it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from graphopt.ir import Model, Node, Value
from graphopt.operators import RUNTIME_DOMAINS, SHAPE_READERS, STORAGE_READERS, is_random

_FLOATS: dict[int, str] = {
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
_NARROWING = ("float64", "float32", "float16", "bfloat16", "float8")


def obstacle(model: Model, has_custom_ops: bool) -> str:
    """Why runs of the original prove nothing, "" where they may."""
    needed = list(_needed_nodes(model))
    random = next((node for node in needed if is_random(node)), None)
    if random is not None:
        return f"{random.label} draws random numbers: two runs of the original differ"
    foreign = sorted(foreign_domains(model))
    if foreign and not has_custom_ops:
        return f"operators of domain {', '.join(foreign)} need their library: --custom-ops lib.so"
    return ""


def foreign_domains(model: Model) -> set[str]:
    """Domains of operators that neither onnxruntime nor the model itself defines."""
    functions = {domain for domain, *_ in model.functions}
    used = {node.domain for node in model.nodes()}
    for function in model.functions.values():
        used |= {node.domain for node in function.node}
    return used - functions - RUNTIME_DOMAINS - {"ai.onnx"}


def depends_on_values(model: Model, output: str) -> bool:
    """True where the output depends on what an input holds, not merely on its shape."""
    start = model.graph.values.get(output)
    if start is None:
        return True
    return any(
        value in model.graph.input_set and value.constant is None for value in _sources(start)
    )


def narrowest_float(model: Model) -> str:
    """The narrowest float type that the graph computes in, as a key of `judge.TOLERANCES`."""
    found = {"float64"}
    for graph in model.graphs():
        for value in graph.values.values():
            stored = _stored_type(value)
            if stored is None:
                info = graph.value_info.get(value.name)
                found.add(_kind(info.type.tensor_type.elem_type) if info is not None else "")
            elif not _is_storage(value):
                found.add(_kind(stored))
        for node in graph.nodes:
            target = node.attribute("to")
            if target is not None:
                found.add(_kind(target.i))
    return max(found - {""}, key=_NARROWING.index)


def _stored_type(value: Value) -> int | None:
    """Element type of an initializer or a Constant node's tensor; None for what is computed."""
    if value.weight is not None:
        return value.weight.data_type
    node = value.producer
    if node is None or node.op != "Constant" or node.domain:
        return None
    stated = node.attribute("value")
    return stated.t.data_type if stated is not None else None


def _is_storage(value: Value) -> bool:
    """True where the values are only widened when read: nothing is rounded to their type again."""
    return not value.is_output and all(
        node.op in STORAGE_READERS and value not in node.inputs[1:] for node in value.consumers
    )


def decibels(relative_rms: float) -> float | None:
    """A relative error as a signal-to-noise ratio in dB; None where there is no error."""
    return None if relative_rms <= 0 else -20 * math.log10(relative_rms)


def _kind(data_type: int) -> str:
    if data_type in _FLOATS:
        return _FLOATS[data_type]
    known = onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(data_type) if data_type in known else ""
    return "float8" if name.startswith("FLOAT") else ""


def _needed_nodes(model: Model) -> Iterator[Node]:
    """Nodes that some output depends on, with everything in their bodies."""
    pending = list(model.graph.outputs)
    seen: set[Node] = set()
    while pending:
        node = pending.pop().producer
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(value for value in node.inputs if value is not None)
        for body in node.graphs():
            for inner in body.walk():
                for reader in inner.nodes:
                    if reader not in seen:
                        seen.add(reader)
                        yield reader
                    pending.extend(v for v in reader.inputs if v is not None and v.producer)


def _sources(start: Value) -> Iterator[Value]:
    """Values without a producer that the elements of `start` depend on."""
    pending, seen = [start], {start}
    while pending:
        value = pending.pop()
        node = value.producer
        if node is None:
            yield value
            continue
        if node.op in SHAPE_READERS and node.domain == "":
            continue
        read = [v for v in node.inputs if v is not None]
        for body in node.graphs():
            for inner in body.walk():
                read += [v for n in inner.nodes for v in n.inputs if v is not None]
                read += inner.outputs
        for other in read:
            if other not in seen:
                seen.add(other)
                pending.append(other)
