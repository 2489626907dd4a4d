"""Which nodes of a graph run whenever the graph does."""

from __future__ import annotations

from graphopt.ir import Graph, Node


def needed_nodes(graph: Graph) -> set[Node]:
    """Nodes that an output of the graph needs; a runtime need not run any other.

    What a run of them refuses is a proof about the model. Nodes stand in topological order.
    """
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        made = [value for value in node.outputs if value is not None]
        if any(value.is_output for value in made) or any(
            _within(graph, reader) in needed for value in made for reader in value.consumers
        ):
            needed.add(node)
    return needed


def _within(graph: Graph, reader: Node) -> Node:
    """The node of the graph that the reader is, or that it is in a body of."""
    while reader.graph is not graph and reader.graph.owner is not None:
        reader = reader.graph.owner
    return reader
