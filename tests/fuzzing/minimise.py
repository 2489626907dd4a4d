"""A smaller model that still fails, by leaving out outputs, nodes and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
from onnx import TensorProto, helper, shape_inference

Fails = Callable[[onnx.ModelProto], bool]


def minimised(proto: onnx.ModelProto, fails: Fails) -> onnx.ModelProto:
    """The model without what it fails without; `fails` is asked about valid models only."""
    best = proto
    shrinking = True
    while shrinking:
        shrinking = False
        for smaller in _smaller(best):
            if _is_valid(smaller) and fails(smaller):
                best, shrinking = smaller, True
                break
    return best


def _smaller(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Models with one thing less, the largest losses first."""
    for at in range(len(proto.graph.output) if len(proto.graph.output) > 1 else 0):
        made = _copy(proto)
        del made.graph.output[at]
        yield _swept(made)
    types = _types(proto)
    for at in range(len(proto.graph.node)):
        yield from _ending(proto, at, types)
    for at in reversed(range(len(proto.graph.node))):
        yield from _bypassed(proto, at)
    for at, node in enumerate(proto.graph.node):
        for place, attribute in enumerate(node.attribute):
            if attribute.HasField("g"):
                for inner in range(len(attribute.g.node)):
                    yield from _thinned(proto, at, place, inner)


def _ending(proto: onnx.ModelProto, at: int, types: dict[str, int]) -> Iterator[onnx.ModelProto]:
    """The model up to a node: what it gives is the only output."""
    names = [name for name in proto.graph.node[at].output if name in types]
    if [info.name for info in proto.graph.output] != names[:1] and names:
        made = _copy(proto)
        del made.graph.output[:]
        made.graph.output.append(helper.make_tensor_value_info(names[0], types[names[0]], None))
        made = _swept(made)
        if len(made.graph.node) < len(proto.graph.node):
            yield made


def _bypassed(proto: onnx.ModelProto, at: int) -> Iterator[onnx.ModelProto]:
    """Without a node: one of its inputs stands for what it gives."""
    node = proto.graph.node[at]
    for name in dict.fromkeys(filter(None, node.input)):
        made = _copy(proto)
        del made.graph.node[at]
        _rename(made.graph, node.output[0], name)
        if all(info.name != node.output[0] for info in made.graph.output):
            yield _swept(made)


def _thinned(proto: onnx.ModelProto, at: int, place: int, inner: int) -> Iterator[onnx.ModelProto]:
    """Without a node of a body."""
    node = proto.graph.node[at].attribute[place].g.node[inner]
    for name in [*dict.fromkeys(filter(None, node.input)), None]:
        made = _copy(proto)
        body = made.graph.node[at].attribute[place].g
        del body.node[inner]
        if name is not None:
            _rename(body, node.output[0], name)
        yield _swept(made)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Readers read another name; outputs of a body that have the old one need a node for it."""
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name == old:
                node.input[at] = new
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, old, new)
    for info in graph.output:
        # one output twice is what onnxruntime does not get right
        is_free = all(other.name != new for other in graph.output)
        if info.name == old and is_free and any(new in node.output for node in graph.node):
            info.name = new


def _swept(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without nodes, initializers, inputs and functions that no output depends on."""
    graph = proto.graph
    needed = {info.name for info in graph.output}
    for at in reversed(range(len(graph.node))):
        if needed.isdisjoint(graph.node[at].output):
            del graph.node[at]
        else:
            needed |= set(_reads(graph.node[at]))
    for kept in (graph.initializer, graph.input):
        for at in reversed(range(len(kept))):
            if kept[at].name not in needed:
                del kept[at]
    called = {node.op_type for node in graph.node}
    for at in reversed(range(len(proto.functions))):
        if proto.functions[at].name not in called:
            del proto.functions[at]
    return proto


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from (info.name for info in attribute.g.output)
            for inner in attribute.g.node:
                yield from _reads(inner)


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element types by name, as far as they are inferred."""
    try:
        inferred = shape_inference.infer_shapes(proto).graph
    except shape_inference.InferenceError:
        return {}
    infos = [*inferred.value_info, *inferred.output]
    found = {info.name: info.type.tensor_type.elem_type for info in infos}
    return {name: kind for name, kind in found.items() if kind != TensorProto.UNDEFINED}


def _is_valid(proto: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError:
        return False
    return bool(proto.graph.node) and len(proto.graph.output) > 0


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    return made
