"""The model written for another version of the standard operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.importer import build
from graphopt.ir import STANDARD_DOMAINS, Model, Node
from graphopt.passes.canonicalize.fold_constants import FoldConstants
from graphopt.passes.canonicalize.inline_functions import InlineFunctions
from graphopt.passes.canonicalize.opset_adapters import NoAdapterError
from graphopt.passes.canonicalize.opset_steps import Steps
from graphopt.passes.canonicalize.opset_versions import Scope
from graphopt.shapes import Types, small_data

RULE = "convert-operator"


@dataclass(frozen=True)
class ConvertOpset:
    """Operators of the model's opset => those of `opset`, higher or lower; 0 is the model's own.

    Functions that the model defines are inlined first. An operator that the other opset cannot
    express is a UsageError that names it.
    """

    name: ClassVar[str] = "convert-opset"
    opset: int = 0

    def run(self, model: Model, edit: Editor) -> None:
        source = model.opsets.get("")
        newest = onnx.defs.onnx_opset_version()
        if not 0 <= self.opset <= newest:
            raise UsageError(f"opset {self.opset}: onnx {onnx.__version__} knows 1 to {newest}")
        if self.opset in (0, source) or not edit.allows(self.name, ""):
            return
        if source is None:
            raise UsageError(f"opset {self.opset}: {model.label} imports no standard operators")
        if model.functions:
            InlineFunctions().run(model, edit)
            edit.settle()
        if self.opset < source:  # what older versions state as attributes has to be constant
            FoldConstants().run(model, edit)
            edit.settle()
        rewriter = _Rewriter(model, edit, Steps(source, self.opset))
        proto = rewriter.rewritten()
        edit.adopt(build(proto, model.store, model.label))
        edit.record(self.name, "", f"opset {source}", f"opset {self.opset}")


class _Rewriter:
    def __init__(self, model: Model, edit: Editor, steps: Steps) -> None:
        self._model = model
        self._edit = edit
        self._steps = steps
        self._types: Types = edit.types

    def rewritten(self) -> onnx.ModelProto:
        """The hollow model for the target opset."""
        proto = onnx.ModelProto()
        proto.CopyFrom(exporter.to_hollow(self._model))
        self._check_functions(proto)
        for entry in proto.opset_import:
            if entry.domain in STANDARD_DOMAINS:
                entry.version = self._steps.target
        pairs = list(zip(self._model.graphs(), _walk(proto.graph), strict=True))
        for graph, target in reversed(pairs):  # inner first: outer nodes hold the inner ones
            nodes = [
                n
                for one, p in zip(graph.nodes, target.node, strict=True)
                for n in self._converted(one, p)
            ]
            del target.node[:]
            target.node.extend(nodes)
        return proto

    def _converted(self, node: Node, proto: onnx.NodeProto) -> list[onnx.NodeProto]:
        if node.domain != "":
            return [proto]
        made = _convert(self._steps, node.label, proto, self._scope(node))
        if made == [proto]:
            return [proto]
        names: dict[str, str] = {}
        base = next((name for name in proto.output if name), proto.op_type)
        for one in made:
            one.input[:] = [self._named(name, base, names) for name in one.input]
            one.output[:] = [self._named(name, base, names) for name in one.output]
            one.name = self._edit.unique(f"{base}/{one.op_type}")
        main = next((n for n in made if n.op_type == proto.op_type), made[-1])
        main.name, main.doc_string = proto.name, proto.doc_string
        del main.metadata_props[:]
        main.metadata_props.extend(proto.metadata_props)
        after = "\n".join(Node(one, node.graph, 0).text() for one in made)
        self._edit.record(RULE, base, node.text(), after)
        return made

    def _named(self, name: str, base: str, names: dict[str, str]) -> str:
        """A name for good, for values that the conversion added."""
        if not name.startswith(" "):
            return name
        if name not in names:
            names[name] = self._edit.unique(f"{base}/{name.split()[0]}")
        return names[name]

    def _scope(self, node: Node) -> Scope:
        types = {v.name: t for v in node.inputs if v is not None and (t := self._types[v])}
        data = {v.name: d for v in node.inputs if v and (d := small_data(v, self._model))}
        return Scope(types, data)

    def _check_functions(self, proto: onnx.ModelProto) -> None:
        """Functions that cannot be inlined may stay where nothing in them changes."""
        for function in proto.functions:
            versions = {entry.domain: entry.version for entry in function.opset_import}
            source = versions.get("", versions.get("ai.onnx", self._steps.source))
            steps = Steps(source, self._steps.target)
            for node in (node for node in function.node if node.domain in STANDARD_DOMAINS):
                label = f"{node.op_type} in the function {function.name!r}"
                if _convert(steps, label, node, Scope({}, {})) != [node]:
                    raise UsageError(
                        f"opset {steps.target}: {label} would have to change, and the function "
                        "cannot be inlined"
                    )


def _convert(steps: Steps, label: str, proto: onnx.NodeProto, scope: Scope) -> list[onnx.NodeProto]:
    """The nodes in the place of one. Raises UsageError, which names it."""
    try:
        return steps.convert(proto, scope)
    except NoAdapterError as error:
        raise UsageError(
            f"opset {steps.target}: {label} cannot be converted from opset {steps.source}: {error}"
        ) from None


def _walk(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and its bodies, in the order of `Graph.walk`."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _walk(body)
