"""One node from one opset to another, a version of its operator at a time.

Most changes of an operator only let it take more types or settings: such a node stays as it is.
The others are for the table of adapters, or for onnx's version converter, which is shown the node
alone, in a model made for it: so it never sees a weight, and what it loses of a model (functions,
metadata, bodies, sparse and external tensors) is never there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx
import onnx.version_converter

from graphopt.passes.canonicalize.opset_adapters import ADAPTERS, NoAdapterError, Site
from graphopt.passes.canonicalize.opset_versions import (
    Scope,
    missing,
    next_change,
    since,
    unchanged,
)
from graphopt.shapes import from_proto

_GRAPHS: Final = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass
class Steps:
    """Rewrites nodes of the standard domain from opset `source` to `target`."""

    source: int
    target: int
    _known: dict[bytes, list[onnx.NodeProto]] = field(default_factory=dict)

    def convert(self, node: onnx.NodeProto, scope: Scope) -> list[onnx.NodeProto]:
        """The nodes for the target; the very node where it can stay as it is.

        Values that are new have names that start with a space. Raises NoAdapterError.
        """
        return self._convert(node, self.source, scope)

    def _convert(self, node: onnx.NodeProto, version: int, scope: Scope) -> list[onnx.NodeProto]:
        while (step := next_change(node.op_type, version, self.target)) is not None:
            before, version = step
            made = self._step(node, before, version, scope)
            if len(made) > 1:
                scope = _extended(made, version, scope)
                return [n for one in made for n in self._convert(one, version, scope)]
            (node,) = made
        return [node]

    def _step(
        self, node: onnx.NodeProto, before: int, after: int, scope: Scope
    ) -> list[onnx.NodeProto]:
        adapter = ADAPTERS.get((node.op_type, before, after))
        if adapter is not None:
            return list(adapter(Site(node, scope.types, scope.data, _fresh)))
        if (kept := unchanged(node, before, after, scope)) is not None:
            return [kept]
        if since(node.op_type, after) == 0:
            raise NoAdapterError(f"there is no such operator in opset {after}")
        if any(attribute.type in _GRAPHS for attribute in node.attribute):
            raise NoAdapterError("it holds a graph and means something else there")
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise NoAdapterError("it is inside a function and takes its settings from the call")
        alone, names = _alone(node, before, scope)
        key = alone.SerializeToString(deterministic=True)
        if key not in self._known:
            self._known[key] = _checked(_by_onnx(alone, after), after)
        return [_renamed(made, names) for made in self._known[key]]


_numbers = itertools.count()


def _fresh(base: str) -> str:
    """A name that no value of a file is likely to have; the caller gives it a better one."""
    return f" {base} {next(_numbers)}"


def _alone(
    node: onnx.NodeProto, version: int, scope: Scope
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A model of nothing but the node under names of its own, and what these stand for."""
    graph = onnx.GraphProto(name="node")
    copy = graph.node.add(op_type=node.op_type)
    copy.attribute.extend(node.attribute)
    inner: dict[str, str] = {"": ""}
    for name in node.input:
        if name not in inner:
            inner[name] = f"input{len(inner)}"
            _declare(graph, name, inner[name], scope)
        copy.input.append(inner[name])
    for position, name in enumerate(node.output):
        copy.output.append(f"output{position}" if name else "")
        if name:
            graph.output.add(name=f"output{position}")
            inner[name] = f"output{position}"
    model = onnx.ModelProto(ir_version=8, graph=graph)
    model.opset_import.add(domain="", version=version)
    return model, {short: name for name, short in inner.items()}


def _declare(graph: onnx.GraphProto, name: str, inner: str, scope: Scope) -> None:
    known, tensor = scope.types.get(name), scope.data.get(name)
    info = graph.input.add(name=inner)
    if known is not None:
        info.type.CopyFrom(known.proto())
    if tensor is not None:
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = inner


def _by_onnx(model: onnx.ModelProto, version: int) -> list[onnx.NodeProto]:
    """What onnx makes of the model; initializers that it adds become Constant nodes."""
    try:
        made = onnx.version_converter.convert_version(model, version)
    except Exception as error:  # its assertions come as RuntimeError, its checks as others
        raise NoAdapterError(_reason(str(error))) from None
    given = {info.name for info in model.graph.input}
    used = {name for node in made.graph.node for name in node.input}
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in made.graph.initializer
        if tensor.name in used and tensor.name not in given
    ]
    return [*constants, *made.graph.node]


def _checked(nodes: list[onnx.NodeProto], version: int) -> list[onnx.NodeProto]:
    """The nodes, which onnx's converter may have left with what the version does not know."""
    for node in nodes:
        schema = onnx.defs.get_schema(node.op_type, version, "")
        for attribute in node.attribute:
            if attribute.name not in schema.attributes:
                raise NoAdapterError(f"there is no attribute {attribute.name!r} in {version}")
        if (slot := missing(node, schema)) is not None:
            raise NoAdapterError(f"its input {slot} has to be given in {version}")
    return nodes


def _reason(text: str) -> str:
    """What onnx's converter says, without its C++ files and assertions."""
    said = " ".join(text.split()).rpartition("failed: ")[2]
    return f"onnx's converter gives up: {said}" if said else "onnx's converter gives up"


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    """The node under the names outside; those that only the converter knows become fresh ones."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for name in (*node.input, *node.output):
        if name not in names:
            names[name] = _fresh("value")
    copy.input[:] = [names[name] for name in node.input]
    copy.output[:] = [names[name] for name in node.output]
    return copy


def _extended(nodes: Sequence[onnx.NodeProto], version: int, scope: Scope) -> Scope:
    """The scope with the values between new nodes."""
    graph = onnx.GraphProto(name="nodes", node=nodes)
    made = {name for node in nodes for name in node.output}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name not in made):
        if name:
            _declare(graph, name, name, scope)
    model = onnx.ModelProto(ir_version=8, graph=graph)
    model.opset_import.add(domain="", version=version)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    found = {info.name: from_proto(info.type) for info in inferred.graph.value_info}
    constants = {n.output[0]: n.attribute[0].t for n in nodes if n.op_type == "Constant"}
    types = {name: kind for name, kind in found.items() if kind is not None}
    return Scope({**scope.types, **types}, {**scope.data, **constants})
