"""What exporters note of the code that they ran."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from graphopt.edit import Editor
from graphopt.ir import Model, Node

_RULE: Final = "strip-trace"
_TRACES: Final = frozenset({"pkg.torch.onnx.stack_trace"})
_TRACE: Final = re.compile(r'\.py(\(\d+\)|:\d+|", line \d+)')


@dataclass(frozen=True)
class StripTraces:
    """A node's stack trace in the exporting program => nothing.

    Traces name files of the machine that exported the model, and can be a quarter of it. All
    other metadata and documentation stays.
    """

    name: ClassVar[str] = "strip-traces"

    def run(self, model: Model, edit: Editor) -> None:
        for node in list(model.nodes()):
            if _has_trace(node):
                _strip(node, edit)


def _has_trace(node: Node) -> bool:
    if node.proto.doc_string and _TRACE.search(node.proto.doc_string):
        return True
    return any(entry.key in _TRACES for entry in node.proto.metadata_props)


def _strip(node: Node, edit: Editor) -> None:
    root = next((value.name for value in node.outputs if value is not None), "")
    if not edit.allows(_RULE, root):
        return
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    kept = [entry for entry in node.proto.metadata_props if entry.key not in _TRACES]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    if _TRACE.search(proto.doc_string):
        proto.ClearField("doc_string")
    gone = node.proto.ByteSize() - proto.ByteSize()
    edit.restate(node, proto)
    edit.record(_RULE, root, f"{node.text()}  # a trace of {gone:,} bytes", node.text())
