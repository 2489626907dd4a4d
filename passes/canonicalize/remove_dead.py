"""Nodes, weights and names that no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Value
from graphopt.operators import is_pure


@dataclass(frozen=True)
class RemoveDead:
    """Remove nodes that no output needs, and initializers that no node reads.

    Nodes of foreign domains stay, since they may do more than compute; so do initializers that a
    caller can replace, and whatever annotations or training information name.
    """

    name: ClassVar[str] = "remove-dead"

    def run(self, model: Model, edit: Editor) -> None:
        _remove_nodes(model.graph, model, edit)
        for graph in model.graphs():
            _remove_initializers(graph, edit)


def _remove_nodes(graph: Graph, model: Model, edit: Editor) -> None:
    """Readers before what they read, so that one sweep finds every dead chain."""
    for node in sorted(graph.nodes, key=lambda node: node.place, reverse=True):
        dead = not any(_is_needed(value) for value in node.outputs if value is not None)
        root = next((value.name for value in node.outputs if value is not None), "")
        pure = dead and node.outputs and is_pure(node, model)
        if pure and edit.allows("remove-dead-node", root):
            before = node.text()
            edit.remove_node(node)
            edit.record("remove-dead-node", root, before, "")
            continue
        for body in node.graphs():
            _remove_nodes(body, model, edit)


def _remove_initializers(graph: Graph, edit: Editor) -> None:
    for value in list(graph.initializers):
        kept = value.constant
        if _is_needed(value) or kept is None:
            continue
        if not edit.allows("remove-dead-initializer", value.name):
            continue
        if value.is_input:
            edit.freeze_input(value)
        edit.remove_value(value)
        shape = ",".join(map(str, kept.shape))
        edit.record(
            "remove-dead-initializer", value.name, f"{value.name} [{shape}], {kept.nbytes} B", ""
        )


def _is_needed(value: Value) -> bool:
    return bool(value.consumers) or value.is_output or value in value.graph.pinned
