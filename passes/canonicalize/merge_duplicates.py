"""What is computed, or stored, twice."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.operators import ONE_PER_READER, REPEATABLE_DOMAINS, is_random

_SAMPLE: Final = 4096  # bytes at either end of a weight that are compared before the rest
_CHUNK: Final = 1 << 24  # bytes of two weights that are compared at a time

Seen = ChainMap[Hashable, Node]


@dataclass(frozen=True)
class MergeDuplicates:
    """Equal initializers => one; nodes of equal operator, attributes and inputs => one.

    Bodies read what the graphs around them have already. Random operators, operators with bodies,
    and a DequantizeLinear, which a runtime fuses with its reader, stay apart. A weight is read
    only where another has its type and shape.
    """

    name: ClassVar[str] = "merge-duplicates"

    def run(self, model: Model, edit: Editor) -> None:
        _merge_weights(model, edit)
        _Merger(edit, frozenset(model.functions)).merge(model.graph, ChainMap())


# -- initializers ----------------------------------------------------------------------------------


def _merge_weights(model: Model, edit: Editor) -> None:
    alike: dict[Hashable, list[Value]] = defaultdict(list)
    for graph in model.graphs():
        for value in graph.initializers:
            weight = value.constant
            if weight is not None and not weight.is_sparse:
                alike[weight.data_type, weight.shape].append(value)
    for values in alike.values():
        if len(values) > 1:
            _merge_equal(values, edit)


def _merge_equal(values: list[Value], edit: Editor) -> None:
    """Merge what is equal among initializers of one type and shape, outer graphs first."""
    kept: dict[Hashable, list[Value]] = defaultdict(list)
    for value in values:
        assert value.weight is not None
        try:
            content = _content(value.weight)
        except ModelError:
            continue  # it has no data: the model is weightless
        alike = kept[_sample(content)]
        for other in alike:
            if _merges(value, other, content, edit):
                break
        else:
            alike.append(value)


def _merges(value: Value, other: Value, content: NDArray[np.uint8], edit: Editor) -> bool:
    """Let readers of `value` read `other`, where both hold the same; False where not."""
    assert value.weight is not None
    assert other.weight is not None
    if value.is_output or not _is_visible(other, value.graph) or not edit.can_bypass(value, other):
        return False
    if not _equal(content, _content(other.weight)):
        return False
    if not edit.allows("merge-initializers", value.name):
        return False
    shape = ",".join(map(str, value.weight.shape))
    if value.is_input:
        edit.freeze_input(value)
    edit.bypass(value, other)
    edit.record(
        "merge-initializers", value.name, f"{value.name} [{shape}]", f"{value.name} := {other.name}"
    )
    return True


def _is_visible(value: Value, graph: Graph) -> bool:
    around: Graph | None = graph
    while around is not None and around is not value.graph:
        around = around.owner.graph if around.owner is not None else None
    return around is not None


def _content(weight: Weight) -> NDArray[np.uint8]:
    """The bytes of a dense tensor, still in the file where they lie there as they are."""
    if weight.data_type == onnx.TensorProto.STRING:
        texts = weight.tensor.string_data
        text = b"".join(len(t).to_bytes(8, "little") + t for t in texts)
        return np.frombuffer(text, np.uint8)
    array: NDArray[Any] = np.ascontiguousarray(weight.values).reshape(-1)
    return array.view(np.uint8)


def _sample(content: NDArray[np.uint8]) -> bytes:
    return content[:_SAMPLE].tobytes() + content[-_SAMPLE:].tobytes()


def _equal(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    return a.size == b.size and all(
        np.array_equal(a[at : at + _CHUNK], b[at : at + _CHUNK]) for at in range(0, a.size, _CHUNK)
    )


# -- nodes -----------------------------------------------------------------------------------------


class _Merger:
    """Merges in order, so that readers of merged nodes are equal in their turn."""

    def __init__(self, edit: Editor, functions: frozenset[tuple[str, str, str]]) -> None:
        self._edit = edit
        self._functions = functions
        # The value that a name stood for when nodes were keyed: a node that takes over the name
        # of a graph output computes the same as before.
        self._first: dict[Value, Value] = {}

    def merge(self, graph: Graph, seen: Seen) -> None:
        """Merge nodes of the graph, and of its bodies with those around them."""
        for node in list(graph.nodes):
            if node.bodies:
                for body in node.graphs():
                    self.merge(body, seen.new_child())
                continue
            key = self._key(node)
            if key is None:
                continue
            other = seen.get(key)
            if other is None:
                seen[key] = node
            else:
                self._absorb(other, node)

    def _key(self, node: Node) -> Hashable | None:
        """What two nodes must share to compute the same; None for one that is never merged."""
        if node.domain not in REPEATABLE_DOMAINS or node.op in ONE_PER_READER or is_random(node):
            return None
        if self._functions and (node.domain, node.op, node.overload) in self._functions:
            return None
        inputs = [self._first.get(v, v) if v is not None else None for v in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        present = [value is not None for value in node.outputs]
        attributes = [a.SerializeToString(deterministic=True) for a in node.proto.attribute]
        return node.domain, node.op, tuple(sorted(attributes)), tuple(inputs), tuple(present)

    def _absorb(self, kept: Node, node: Node) -> None:
        """Let readers of `node` read what `kept` computes, where they can."""
        edit = self._edit
        pairs = [
            (old, new)
            for old, new in zip(node.outputs, kept.outputs, strict=True)
            if old is not None and new is not None
        ]
        root = pairs[0][0].name if pairs else ""
        if not pairs or not all(edit.can_bypass(old, new) for old, new in pairs):
            return
        if not edit.allows("merge-nodes", root):
            return
        before = node.text()
        told = ", ".join(f"{old.name} := {new.name}" for old, new in pairs)
        edit.detach_node(node)
        for old, new in pairs:
            if old.is_output:
                self._first[old] = self._first.get(new, new)
            edit.bypass(old, new)
        edit.record("merge-nodes", root, before, told)
