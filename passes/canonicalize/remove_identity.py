"""Nodes that pass a value on under another name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value


@dataclass(frozen=True)
class RemoveIdentity:
    """Identity(x) => x.

    The output of a graph keeps its name: there the node that computes x computes it as the output.
    An output that is an Identity of an input, of an initializer or of another output stays.
    """

    name: ClassVar[str] = "remove-identity"

    def run(self, model: Model, edit: Editor) -> None:
        for graph in list(model.graphs()):
            for node in list(graph.nodes):
                if node.op == "Identity" and node.domain == "":
                    _remove(node, edit)


def _remove(node: Node, edit: Editor) -> None:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or result is None or result in result.graph.pinned:
        return
    before = node.text()
    if not result.is_output:
        if _hidden(result, source.name, source.graph):
            return
        edit.replace_uses(result, source)
        edit.remove_node(node)
        edit.record("remove-identity", result.name, before, f"{result.name} := {source.name}")
    elif _can_take_name(source, result):
        producer = source.producer
        assert producer is not None
        before = f"{producer.text()}\n{before}"
        edit.detach_node(node)
        edit.move_output(source, result)
        edit.replace_uses(source, result)
        edit.remove_value(source)
        edit.record("remove-identity", result.name, before, producer.text())


def _can_take_name(source: Value, result: Value) -> bool:
    """True where the node that computes `source` may compute it as the graph output `result`."""
    return (
        source.producer is not None
        and source.graph is result.graph
        and not source.is_output
        and source not in source.graph.pinned
        and not _hidden(source, result.name, result.graph)
    )


def _hidden(value: Value, name: str, owner: Graph) -> bool:
    """True where a reader of `value` sits in a body in which `name` means something else."""
    for reader in value.consumers:
        graph: Graph | None = reader.graph
        while graph is not None and graph is not owner:
            if name in graph.values:
                return True
            graph = graph.owner.graph if graph.owner is not None else None
    return False
