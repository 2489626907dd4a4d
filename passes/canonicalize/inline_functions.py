"""Functions that a model defines, expanded where they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.importer import import_body
from graphopt.ir import STANDARD_DOMAINS, Model, Node
from graphopt.operators import RUNTIME_DOMAINS, is_known
from graphopt.splice import splice

Key = tuple[str, str, str]
RULE: Final = "inline-function"
REMOVE: Final = "remove-function"


@dataclass(frozen=True)
class InlineFunctions:
    """A call of a function of the model => the nodes of the function, under names of their own.

    Definitions that nothing calls any more go. Functions stay that were written for other versions
    of the operator sets than the model imports, and those that a runtime has a kernel for.
    """

    name: ClassVar[str] = "inline-functions"

    def run(self, model: Model, edit: Editor) -> None:
        functions = model.functions
        if not functions:
            return
        recursive = {key for key in functions if _calls_itself(key, functions)}
        for graph in list(model.graphs()):
            pending = list(reversed(graph.nodes))
            while pending:
                node = pending.pop()
                function = functions.get(_key(node.proto))
                if function is None or _key(node.proto) in recursive:
                    continue
                added = _inline(node, function, model, edit)
                pending.extend(reversed(added))
                for inner in added:
                    for body in inner.graphs():
                        pending.extend(n for part in body.walk() for n in part.nodes)
        _remove_unused(model, edit)


def _key(node: onnx.NodeProto) -> Key:
    return ("" if node.domain in STANDARD_DOMAINS else node.domain, node.op_type, node.overload)


def _inline(node: Node, function: onnx.FunctionProto, model: Model, edit: Editor) -> list[Node]:
    root = next((value.name for value in node.outputs if value is not None), "")
    reason = _obstacle(node, function, model)
    if reason:
        edit.rejections.append((RULE, node.label, reason))
        return []
    if not edit.allows(RULE, root):
        return []
    proto = _expanded(node, function, node.name or root, edit.unique)
    try:
        body = import_body(proto, model.store, model.label)
    except ModelError as error:
        edit.rejections.append((RULE, node.label, str(error)))
        return []
    before = node.text()
    given = [*node.inputs, *[None] * (len(body.inputs) - len(node.inputs))]
    added = splice(edit, node, body, given)
    edit.record(RULE, root, before, "\n".join(other.text() for other in added))
    return added


def _obstacle(node: Node, function: onnx.FunctionProto, model: Model) -> str:
    """Why the function cannot be expanded at this call, "" if it can."""
    domain = "" if function.domain in STANDARD_DOMAINS else function.domain
    if (domain == "" and is_known(function.name)) or (domain and domain in RUNTIME_DOMAINS):
        return "a runtime may have a kernel of that name"
    if node.bodies:
        return "it is called with a graph"
    if len(node.inputs) > len(function.input) or len(node.outputs) > len(function.output):
        return "the call does not fit the function"
    wanted = {entry.domain: entry.version for entry in function.opset_import}
    for used in {inner.domain for inner in _nodes(function.node)}:
        used = "" if used in STANDARD_DOMAINS else used
        stated = wanted.get(used, wanted.get("ai.onnx") if used == "" else None)
        if stated != model.opsets.get(used):
            return f"it imports version {stated} of {used or 'ai.onnx'!r}"
    absent = {
        name
        for slot, name in enumerate(function.input)
        if slot >= len(node.inputs) or node.inputs[slot] is None
    }
    if absent.intersection(function.output):
        return "it returns an input that is left out"
    return ""


def _expanded(
    node: Node, function: onnx.FunctionProto, prefix: str, unique: Callable[[str], str]
) -> onnx.GraphProto:
    """The function as a graph, its attributes as the call gives them, its names new."""
    names: dict[str, str] = {"": ""}

    def renamed(name: str) -> str:
        if name not in names:
            names[name] = unique(f"{prefix}/{name}")
        return names[name]

    given = {a.name: a for a in (*function.attribute_proto, *node.proto.attribute)}
    graph = onnx.GraphProto(name=function.name)
    graph.node.extend(function.node)
    graph.value_info.extend(function.value_info)
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in function.input)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
    _specialise(graph, given, renamed, lambda name: unique(f"{prefix}/{name}"))
    return graph


def _specialise(
    graph: onnx.GraphProto,
    given: dict[str, onnx.AttributeProto],
    renamed: Callable[[str], str],
    called: Callable[[str], str],
) -> None:
    """Replace references to attributes and every name of a value, bodies included."""
    for info in (*graph.input, *graph.output, *graph.value_info):
        info.name = renamed(info.name)
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = renamed(sparse.values.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = renamed(annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = renamed(entry.value)
    for node in graph.node:
        if node.name:
            node.name = called(node.name)
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        attributes = list(_resolved(node.attribute, given))
        node.ClearField("attribute")
        node.attribute.extend(attributes)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                _specialise(body, given, renamed, called)


def _resolved(
    attributes: Sequence[onnx.AttributeProto], given: dict[str, onnx.AttributeProto]
) -> Iterator[onnx.AttributeProto]:
    """The attributes, those that refer to one of the call as it was given, or not at all."""
    for attribute in attributes:
        copy = onnx.AttributeProto()
        if not attribute.ref_attr_name:
            copy.CopyFrom(attribute)
            yield copy
        elif attribute.ref_attr_name in given:
            copy.CopyFrom(given[attribute.ref_attr_name])
            copy.name = attribute.name
            yield copy


def _nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body.node)


def _calls_itself(key: Key, functions: dict[Key, onnx.FunctionProto]) -> bool:
    seen: set[Key] = set()
    pending = [key]
    while pending:
        for node in _nodes(functions[pending.pop()].node):
            called = _key(node)
            if called == key:
                return True
            if called in functions and called not in seen:
                seen.add(called)
                pending.append(called)
    return False


def _remove_unused(model: Model, edit: Editor) -> None:
    """Drop definitions that nothing calls, and operator sets that only they were in."""
    functions = model.functions
    live: set[Key] = set()
    pending = [_key(node.proto) for node in model.nodes()]
    for info in model.proto.training_info:
        for graph in (info.algorithm, info.initialization):
            pending += [_key(node) for node in _nodes(graph.node)]
    while pending:
        key = pending.pop()
        if key in functions and key not in live:
            live.add(key)
            pending += [_key(node) for node in _nodes(functions[key].node)]
    dead = [key for key in functions if key not in live and edit.allows(REMOVE, "/".join(key))]
    if not dead:
        return
    kept = [function for key, function in functions.items() if key not in dead]
    used = {node.domain for node in model.nodes()} | {""}
    used |= {inner.domain for function in kept for inner in _nodes(function.node)}
    gone = {key[0] for key in dead} - used - {function.domain for function in kept}
    edit.define(kept, [o for o in model.proto.opset_import if o.domain not in gone])
    for key in dead:
        edit.record(REMOVE, "/".join(key), f"function {key[0]}.{key[1]}", "")
