"""Operators put into another layout: what takes the place of a group of them, and of Transposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.passes.canonicalize.layout_regions import Change, Content, Region, made_in, read_in
from graphopt.passes.canonicalize.layouts import Permutation, inverse
from graphopt.proofs import TensorType

RULE: Final = "move-transposes"

Key = tuple[Value, Permutation]
Stored = Mapping[Key, NDArray[Any]]


def permuted(change: Change, region: Region) -> Stored:
    """The constants that the operators read in their new layout. Raises ModelError without data."""
    found: dict[Key, NDArray[Any]] = {}
    for node in change.nodes:
        for slot, permutation in region.members[node].move.constants.items():
            value = node.inputs[slot]
            weight = region.facts.constant(value)
            assert value is not None
            assert weight is not None
            if (value, permutation) not in found:
                values: NDArray[Any] = weight.values
                ahead = (1,) * (len(permutation) - values.ndim)
                moved = values.reshape(ahead + values.shape).transpose(permutation)
                found[value, permutation] = np.ascontiguousarray(moved)
    return found


class Relayout:
    """Makes one change. Every value that anyone else reads keeps its name and its layout."""

    def __init__(self, edit: Editor, region: Region, change: Change, stored: Stored) -> None:
        self._edit = edit
        self._region = region
        self._change = change
        self._flipped = set(change.nodes)
        self._stored = stored
        self._constants: dict[Key, Value] = {}
        self._other: dict[Content, Value] = {}  # each in the layout that its root is not in
        self._content = {v: c for c in change.contents for v, _, _ in c.values()}
        self._told: list[str] = []
        self._made: list[Node] = []

    def make(self) -> tuple[str, str]:
        """Do it; the nodes before and after, as text."""
        for node in self._sorted():
            self._replace(node)
        for content in self._change.contents:
            self._clean(content)
        return "\n".join(self._told), "\n".join(node.text() for node in self._made)

    def _sorted(self) -> list[Node]:
        """What computes a content before what reads it."""
        before: dict[Node, set[Node]] = {node: set() for node in self._change.nodes}
        for content in self._change.contents:
            producer = self._region.producer(content)
            for node, _ in self._region.readers(content):
                if node in before and producer in before:
                    before[node].add(producer)
        return list(TopologicalSorter(before).static_order())

    # -- one operator --------------------------------------------------------------------------

    def _replace(self, node: Node) -> None:
        """The operator in its other layout in the place of the operator."""
        move = self._region.members[node].move
        inputs = list(node.inputs)
        for slot in move.inputs:
            inputs[slot] = self._read(node, slot)
        for slot, permutation in move.constants.items():
            inputs[slot] = self._constant(node, slot, permutation)
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        if move.op:
            proto.op_type = move.op
            del proto.attribute[:]
        for key, numbers in move.settings.items():
            at = key if isinstance(key, int) else self._region.facts.slot(node.op, key)
            if at is None:
                _state(proto, str(key), numbers)
            else:
                inputs += [None] * (at + 1 - len(inputs))
                inputs[at] = self._setting(node, at, numbers)
        self._told.append(node.text())
        self._edit.detach_node(node)
        moved = {n: self._content_of(node.outputs[n]) for n in move.outputs}
        outputs: list[Value | str | None] = list(node.outputs)
        for n, content in moved.items():
            outputs[n] = self._free(content)
        added = self._add(proto, inputs, outputs, node)
        for n, content in moved.items():
            self._other[content] = self._typed(added.outputs[n], content.root, content.permutation)
            self._keep(content, node)

    def _content_of(self, value: Value | None) -> Content:
        assert value is not None
        return self._content[value]

    def _read(self, node: Node, slot: int) -> Value:
        """The content of that input, in the layout that the operator is about to compute in."""
        content = self._content_of(node.inputs[slot])
        if self._region.members[node].layout != content.layout:
            return content.root
        if content not in self._other:
            self._other[content] = (
                content.copies[0]
                if content.copies
                else self._transposed(content.root, content.permutation, None, node)
            )
        return self._other[content]

    def _free(self, content: Content) -> Value | str:
        """What the operator is to compute: the copy that there was, or a new name."""
        if not content.copies:
            return self._edit.unique(f"{content.root.name}/Transpose")
        copy = content.copies[0]
        assert copy.producer is not None
        self._told.append(copy.producer.text())
        self._edit.detach_node(copy.producer)
        return copy

    def _keep(self, content: Content, node: Node) -> None:
        """Compute the root from the new layout, where anyone still reads it."""
        if content.layout in read_in(self._region, content, self._flipped):
            back = inverse(content.permutation)
            self._transposed(self._other[content], back, content.root, node)

    def _clean(self, content: Content) -> None:
        """Take out what nobody reads any more."""
        for copy in content.copies:
            node = copy.producer
            unread = not copy.consumers and not _is_kept(copy)
            if unread and node is not None and self._region.is_between(node):
                self._told.append(node.text())
                self._edit.remove_node(node)
        if made_in(self._region, content, self._flipped) != content.layout:
            root = content.root
            if root.producer is None and not root.consumers:
                self._edit.remove_value(root)

    # -- new nodes and values ------------------------------------------------------------------

    def _typed(self, made: Value | None, value: Value, permutation: Permutation) -> Value:
        """The new value, with what is proven of it: it is the other one, permuted."""
        assert made is not None
        known = self._edit.types[value]
        if known is not None and known.shape is not None:
            shape = tuple(known.shape[axis] for axis in permutation)
            self._edit.types[made] = TensorType(known.data_type, shape)
        return made

    def _transposed(
        self, value: Value, permutation: Permutation, result: Value | None, node: Node
    ) -> Value:
        target = result or self._edit.unique(f"{value.name}/Transpose")
        base = target if isinstance(target, str) else target.name
        proto = onnx.NodeProto(op_type="Transpose", name=self._edit.unique(f"{base}/Transpose"))
        _state(proto, "perm", list(permutation))
        added = self._add(proto, [value], [target], node)
        return self._typed(added.outputs[0], value, permutation)

    def _add(
        self,
        proto: onnx.NodeProto,
        inputs: list[Value | None],
        outputs: Sequence[Value | str | None],
        node: Node,
    ) -> Node:
        proto.input[:] = [value.name if value is not None else "" for value in inputs]
        proto.output[:] = [v.name if isinstance(v, Value) else v or "" for v in outputs]
        known = {value.name: value for value in inputs if value is not None}
        results = {value.name: value for value in outputs if isinstance(value, Value)}
        added = self._edit.add_node(node.graph, proto, known, results, node.position, RULE)
        self._made.append(added)
        return added

    def _constant(self, node: Node, slot: int, permutation: Permutation) -> Value:
        value = node.inputs[slot]
        assert value is not None
        if (value, permutation) not in self._constants:
            tensor = onnx.numpy_helper.from_array(self._stored[value, permutation])
            made = self._store(node, f"{value.name}/Transpose", tensor)
            self._constants[value, permutation] = made
        return self._constants[value, permutation]

    def _setting(self, node: Node, slot: int, numbers: Any) -> Value:
        """Numbers as a constant input, of the type of what was there or, of Slice, goes with it."""
        there = [node.inputs[at] for at in (slot, 1) if at < len(node.inputs)]
        known = next((self._edit.types[value] for value in there if value is not None), None)
        element = known.data_type if known is not None else onnx.TensorProto.INT64
        array = np.asarray(numbers, onnx.helper.tensor_dtype_to_np_dtype(element))
        base = next(value.name for value in node.outputs if value is not None)
        return self._store(node, f"{base}/constant", onnx.numpy_helper.from_array(array))

    def _store(self, node: Node, name: str, tensor: onnx.TensorProto) -> Value:
        tensor.name = self._edit.unique(name)
        return self._edit.add_constant(node.graph, tensor.name, tensor, node.position)


def _state(proto: onnx.NodeProto, name: str, numbers: Any) -> None:
    """Let the attribute be these numbers."""
    kept = [attribute for attribute in proto.attribute if attribute.name != name]
    del proto.attribute[:]
    kinds = onnx.AttributeProto
    kind = kinds.INTS if isinstance(numbers, list) else kinds.INT
    stated = onnx.helper.make_attribute(name, numbers, attr_type=kind)
    proto.attribute.extend([*kept, stated])


def _is_kept(value: Value) -> bool:
    return value.is_output or value in value.graph.pinned
