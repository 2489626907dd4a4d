"""The only mutator. Every edit is undone from a journal, and every change is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphopt.ir import Graph, Model, Node, Value


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a pass did: the rule, the value it stands on, the graph before and after."""

    rule: str
    root: str
    before: str
    after: str


class Editor:
    """Edits a model; `undo_to(mark())` takes back everything since, newest first."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.changes: list[Change] = []
        self._journal: list[Callable[[], None]] = []

    def mark(self) -> tuple[int, int]:
        """The present moment, for `undo_to`."""
        return len(self._journal), len(self.changes)

    def undo_to(self, mark: tuple[int, int]) -> None:
        """Take back every edit and change since `mark`."""
        edits, changes = mark
        if len(self._journal) > edits:
            while len(self._journal) > edits:
                self._journal.pop()()
            for graph in self.model.graphs():
                graph._restore_order()
        del self.changes[changes:]

    def record(self, rule: str, root: str, before: str, after: str) -> None:
        """Tell what was done; `root` is the name it stands on, `before` and `after` are text."""
        self.changes.append(Change(rule, root, before, after))

    def set_input(self, node: Node, slot: int, value: Value | None) -> None:
        """Let input `slot` of the node read `value`."""
        old = node.inputs[slot]
        node.graph._set_input(node, slot, value)
        self._journal.append(lambda: node.graph._set_input(node, slot, old))

    def replace_uses(self, old: Value, new: Value) -> None:
        """Let every reader of `old`, in bodies too, read `new`. Graph outputs stay as they are."""
        for node in list(old.consumers):
            for slot, value in enumerate(node.inputs):
                if value is old:
                    self.set_input(node, slot, new)

    def move_output(self, old: Value, new: Value) -> None:
        """Let the node that computes `old` compute it under the name `new`, which must be free."""
        node = old.producer
        assert node is not None
        assert new.producer is None
        slot = node.outputs.index(old)
        node.graph._set_output(node, slot, new)

        def undo() -> None:
            node.graph._set_output(node, slot, old)

        self._journal.append(undo)

    def remove_node(self, node: Node) -> None:
        """Remove a node that nobody reads, and the values that it computed."""
        graph = node.graph
        for value in node.outputs:
            if value is not None and (value.consumers or value.is_output):
                raise ValueError(f"{node.label} cannot go: {value.name!r} is still read")
        graph._remove_node(node)
        self._journal.append(lambda: graph._restore_node(node))
        for value in node.outputs:
            if value is not None:
                self._remove_value(graph, value)

    def detach_node(self, node: Node) -> None:
        """Remove a node but keep its outputs, which another node is about to compute."""
        graph = node.graph
        graph._remove_node(node)
        self._journal.append(lambda: graph._restore_node(node))

    def remove_value(self, value: Value) -> None:
        """Remove a name that nothing computes or reads any more: a weight, a bypassed value."""
        if value.consumers or value.is_output or value.producer is not None:
            raise ValueError(f"{value.name!r} cannot go: it is still used")
        self._remove_value(value.graph, value)

    def freeze_input(self, value: Value) -> None:
        """Take an input with a default off the graph's inputs: its default becomes its value."""
        graph = value.graph
        before = graph.inputs
        graph._set_inputs([other for other in before if other is not value])
        self._journal.append(lambda: graph._set_inputs(before))

    def adopt(self, other: Model) -> None:
        """Let the model be `other`, for passes that make a new graph instead of editing one."""
        before = self.model.proto, self.model.graph

        def undo() -> None:
            self.model.proto, self.model.graph = before

        self.model.proto, self.model.graph = other.proto, other.graph
        self._journal.append(undo)

    def _remove_value(self, graph: Graph, value: Value) -> None:
        graph._remove_value(value)
        self._journal.append(lambda: graph._restore_value(value))
