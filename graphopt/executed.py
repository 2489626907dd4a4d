"""Which node of the graph that onnxruntime runs computes what of the model.

onnxruntime fuses, renames and inserts nodes. It calls the result of a fusion after a node that it
replaced, or after a value that it computes. What left no name belongs to the executed node that
absorbed it: the one behind it, or the one before it where that one's output lost its name
(activations and residual sums go into the blocked convolution before them).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from graphopt.constants import constant_of, node_constant
from graphopt.ir import Model, Node, Value

# What onnxruntime inserts to change a layout or a type: it computes nothing that the model states.
CONVERSIONS: Final = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "QuantizeLinear",
        "ReorderInput",
        "ReorderOutput",
        "Transpose",
    }
)
QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
_SUFFIXES: Final = re.compile(r"(_token_\d+)?(_bn)?(_nchwc)?(_token_\d+)?$")
_LARGEST_TAIL: Final = 16  # nodes that may have gone into the node before them


class Executed:
    """Which node of the optimised graph computes what the original states.

    `owners` says of a node of the original which executed node computes it (none where it is
    folded away), `roots` which original value an executed node ends in, and `conversions` which
    original value an inserted node turns into another layout or type ("" where that is unknown).
    `marks` says which nodes of the original a name is made of.
    """

    def __init__(
        self, original: Model, optimized: Model, marks: Callable[[str], list[Node]]
    ) -> None:
        self.original, self.optimized = original, optimized
        self.nodes = list(optimized.nodes())
        self.owners: dict[Node, Node] = {}
        self.roots: dict[Node, Value] = {}
        self.conversions: dict[Node, str] = {}
        self.values = {
            name: value
            for graph in reversed(list(self.original.graphs()))
            for name, value in graph.values.items()
        }
        self._marks = {node: marks(node.name) for node in self.nodes}
        self._inserted = {n for n in self.nodes if n.op in CONVERSIONS and not self._marks[n]}
        self._present = {value for node in self.nodes for value in self._stated(node)}
        computing = [node for node in self.nodes if node not in self._inserted]
        for node in computing:
            self._own(self._known(node), node)
        for node in computing:
            if self._results(node):
                self._claim(node, self._known(node))
            else:
                self._own(self._way_to_operator(node), node)
        for node in computing:
            self._find_root(node)
        for node in computing:
            self._claim(node, self._known(node))
        for node in computing:
            if node not in self.roots and (root := self._nearest_root(node)) is not None:
                self.roots[node] = root
        for node in filter(self._inserted.__contains__, self.nodes):
            self.conversions[node] = self._converted(node)

    def original_name(self, value: Value) -> str:
        """What an executed value is called in the original; "" where it is not known there."""
        if value.name in self.values:
            return value.name
        node = value.producer
        if node is None:
            return ""
        root = self.roots.get(node)
        return root.name if root is not None else self.conversions.get(node, "")

    # -- alignment -------------------------------------------------------------------------------

    def _own(self, nodes: Iterable[Node | None], owner: Node) -> None:
        for node in nodes:
            if node is not None:
                self.owners.setdefault(node, owner)

    def _named(self, names: Iterable[str]) -> list[Value]:
        found = (self.values.get(name) for name in names)
        return [value for value in found if value is not None and value.producer is not None]

    def _results(self, node: Node) -> list[Value]:
        """The original values among the outputs of an executed node."""
        return self._named(value.name for value in node.outputs if value is not None)

    def _stated(self, node: Node) -> list[Value]:
        """The original values that an executed node computes, by what it is called after."""
        if found := self._results(node):
            return found
        marked = [value for mark in self._marks[node] for value in mark.outputs if value]
        return marked or self._named([_SUFFIXES.sub("", node.name)])

    def _known(self, node: Node) -> list[Node]:
        """The original nodes that an executed node is called after, or ends in."""
        values = [*self._stated(node), *([self.roots[node]] if node in self.roots else [])]
        return self._marks[node] + [value.producer for value in values if value.producer]

    def _way_to_operator(self, node: Node) -> list[Node]:
        """The nameless nodes before those it is called after, up to one of its operator.

        A convolution may be called after the normalisation or activation that went into it.
        """
        came_from: dict[Node, Node | None] = dict.fromkeys(self._known(node))
        waiting = deque(came_from)
        while waiting:
            found = waiting.popleft()
            if node.op.endswith(found.op):
                way = [found]
                while (following := came_from[way[-1]]) is not None:
                    way.append(following)
                return way
            for source in _sources(found):
                if source not in came_from and source not in self.owners:
                    came_from[source] = found
                    waiting.append(source)
        return []

    def _find_root(self, node: Node) -> None:
        if found := self._results(node):
            self.roots[node] = found[0]
        elif behind := [v for other in self._conversions_of(node) for v in self._results(other)]:
            self.roots[node] = behind[0]
        elif stated := self._stated(node):
            self.roots[node], tail = self._tail(stated[-1], self._read_from(node))
            self._own(tail, node)
        else:
            return
        self._present.add(self.roots[node])

    def _conversions_of(self, node: Node) -> Iterator[Node]:
        """The inserted nodes that the outputs of a node go through."""
        waiting = deque([node])
        while waiting:
            for reader in _readers(waiting.popleft()):
                if reader in self._inserted:
                    yield reader
                    waiting.append(reader)

    def _read_from(self, node: Node) -> set[Node]:
        """The executed nodes whose results a node reads, whatever converts them on the way."""
        found, waiting = set[Node](), deque([node])
        while waiting:
            for source in _sources(waiting.popleft()):
                if source in self._inserted:
                    waiting.append(source)
                else:
                    found.add(source)
        return found

    def _tail(self, start: Value, read_from: set[Node]) -> tuple[Value, list[Node]]:
        """How far the nameless nodes behind a value compute just one other value, and which."""
        end, tail = start, list[Node]()
        inside, reached = dict[Node, None](), [start]
        while len(inside) < _LARGEST_TAIL:
            readers = (reader for value in reached for reader in value.consumers)
            candidates = (reader for reader in readers if reader not in inside)
            ready = (n for n in candidates if self._extends(n, start, inside, read_from))
            if (node := next(ready, None)) is None:
                break
            inside[node] = None
            reached.extend(value for value in node.outputs if value is not None)
            open_ends = [
                v for v in reached if v.is_output or not inside.keys() >= v.consumers.keys()
            ]
            if len(open_ends) == 1:
                end, tail = open_ends[0], list(inside)
        return end, tail

    def _extends(
        self, node: Node, start: Value, inside: dict[Node, None], read_from: set[Node]
    ) -> bool:
        """A node without an owner, all of whose operands the executed node has or reads.

        Integer kernels end in integers: DequantizeLinear went into what reads it.
        """
        return (
            node not in self.owners
            and node.op != DEQUANTIZE
            and all(
                value is None
                or value is start
                or value.producer is None
                or value.producer in inside
                or self.owners.get(value.producer) in read_from
                or constant_of(value, self.original.store) is not None
                for value in node.inputs
            )
        )

    def _claim(self, owner: Node, nodes: Iterable[Node]) -> None:
        """Nodes that an executed node computes, back to what other executed nodes compute."""
        waiting = deque(nodes)
        seen = set(waiting)
        while waiting:
            node = waiting.popleft()
            if self.owners.setdefault(node, owner) is owner:
                behind = {
                    value.producer
                    for value in node.inputs
                    if value is not None
                    and value.producer is not None
                    and value not in self._present
                    and node_constant(value.producer, self.original.store) is None
                }
                waiting.extend(behind - seen)
                seen |= behind

    def _nearest_root(self, node: Node) -> Value | None:
        """The root of the nearest executed node behind, else before, else around a node."""
        for step in (_readers, _sources):
            seen, waiting = {node}, deque([node])
            while waiting:
                for other in step(waiting.popleft()):
                    if other in self.roots:
                        return self.roots[other]
                    if other not in seen:
                        seen.add(other)
                        waiting.append(other)
        owner = node.graph.owner
        return None if owner is None else self.roots.get(owner)

    def _converted(self, node: Node) -> str:
        for other in (node, *self._conversions_of(node)):
            if found := self._results(other):
                return found[0].name
        source = node.inputs[0]
        while source is not None:
            if source.name in self.values:
                return source.name
            if source.producer is None:
                return ""
            if source.producer in self.roots:
                return self.roots[source.producer].name
            source = source.producer.inputs[0] if source.producer.inputs else None
        return ""


def _readers(node: Node) -> Iterator[Node]:
    for value in node.outputs:
        if value is not None:
            yield from value.consumers


def _sources(node: Node) -> Iterator[Node]:
    for value in node.inputs:
        if value is not None and value.producer is not None:
            yield value.producer
