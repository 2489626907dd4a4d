"""The place of nodes that others are to compute the same results: these, and their constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Graph, Node, Value
from graphopt.operators import is_pure

CONTRIB: Final = "com.microsoft"

Array = NDArray[Any]


class Site:
    """Lets other nodes compute what the last of `nodes` computes, under the same names.

    `nodes` are in order of computation and read by each other alone, but for the last. Use: call
    `constant` and `call` until every output of the last node is computed again, then `close`.
    """

    def __init__(self, edit: Editor, nodes: Sequence[Node], rule: str) -> None:
        self._edit = edit
        self._rule = rule
        self._nodes = nodes
        self._before = "\n".join(node.text() for node in nodes)
        self._read = [value for node in nodes for value in node.inputs if value is not None]
        self._made: list[Node] = []
        self._known = {value: edit.types[value] for value in nodes[-1].outputs if value is not None}
        self.node = nodes[-1]
        self.root = next(iter(self._known)).name
        edit.detach_node(self.node)

    def constant(self, owner: Value, suffix: str, array: Array) -> Value:
        """A constant made of `owner`: one that is there, `owner` too, if equal.

        It stands in the graph of `owner` where other graphs read that as well, else beside the
        node: what a body reads of the graph around it is handed over at every run.
        """
        base, graph = f"{owner.name}/{suffix}", self.node.graph
        if any(reader.graph is not graph for reader in owner.consumers):
            graph = owner.graph
        for there in (owner, *_named(base, owner.graph), *_named(base, graph)):
            if self._holds(there, array):
                return there
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))
        tensor.name = self._edit.unique(base)
        return self._edit.add_constant(graph, tensor.name, tensor, -1.0)

    def _holds(self, value: Value, array: Array) -> bool:
        weight = constant_of(value, self._edit.model.store)
        if weight is None or weight.is_sparse or weight.shape != array.shape:
            return False
        there = weight.values
        return there.dtype == array.dtype and there.tobytes() == array.tobytes()

    def call(
        self,
        op: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value | str],
        domain: str = "",
        stated: Sequence[onnx.AttributeProto] = (),
        **attributes: Any,
    ) -> list[Value]:
        """A new node. A Value among the outputs is a result; a string names a value, derived.

        Attributes are those that an operator before it `stated`, and others.
        """
        edit = self._edit
        if domain:
            import_contrib(edit)
        names = [out.name if isinstance(out, Value) else edit.unique(out) for out in outputs]
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        proto = onnx.helper.make_node(
            op,
            [value.name if value is not None else "" for value in inputs],
            names,
            edit.unique(f"{names[0]}/{op}"),
            domain=domain,
            **attributes,
        )
        proto.attribute.extend(stated)
        known = {value.name: value for value in inputs if value is not None}
        results = {out.name: out for out in outputs if isinstance(out, Value)}
        place = self.node
        node = edit.add_node(place.graph, proto, known, results, place.position, self._rule)
        self._made.append(node)
        return [value for value in node.outputs if value is not None]

    def close(self) -> None:
        """Take out what nobody reads any more, and tell what was done."""
        edit = self._edit
        for node in reversed(self._nodes[:-1]):
            edit.remove_node(node)
        for value in dict.fromkeys(self._read):
            _release(edit, value)
        for value, known in self._known.items():
            if known is not None:  # inference knows nothing of the runtime's own operators
                edit.prove(value, known)
        after = "\n".join(node.text() for node in self._made)
        edit.record(self._rule, self.root, self._before, after)


def import_contrib(edit: Editor) -> None:
    """Let the model import onnxruntime's own operators."""
    if CONTRIB not in edit.model.opsets:
        imported = [*edit.model.proto.opset_import, onnx.helper.make_opsetid(CONTRIB, 1)]
        edit.define(list(edit.model.proto.functions), imported)


def is_visible(value: Value, graph: Graph) -> bool:
    """True where nodes of the graph can read the value by its name."""
    around: Graph | None = graph
    while around is not None and around is not value.graph:
        if value.name in around.values:
            return False
        around = around.owner.graph if around.owner is not None else None
    return around is not None


def _release(edit: Editor, value: Value) -> None:
    """Take out a value that lost its last reader, and what computes it, and so on."""
    if value.consumers or value.is_output or value in value.graph.pinned:
        return
    node = value.producer
    if node is None:
        if value.constant is not None:
            if value.is_input:
                edit.freeze_input(value)
            edit.remove_value(value)
        return
    unread = not any(v is not None and (v.consumers or v.is_output) for v in node.outputs)
    if unread and is_pure(node, edit.model):
        read = [v for v in node.inputs if v is not None]
        edit.remove_node(node)
        for other in dict.fromkeys(read):
            _release(edit, other)


def _named(base: str, graph: Graph) -> Iterator[Value]:
    """The values of the graph that were named after `base`."""
    name, number = base, 1
    while (found := graph.values.get(name)) is not None:
        yield found
        number += 1
        name = f"{base}_{number}"
