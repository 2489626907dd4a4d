"""Which operators a change of layout may reach, and for which of them it pays.

Of every value in reach there are two layouts, and a Transpose leads from one to the other. Which
operators should compute in which is a minimum cut: the graph falls into what is left in its layout
and what is not, and each value across costs one Transpose. (Picard, Ratliff: "Minimum cuts and
related problems", Networks 5, 1975.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from graphopt.ir import Graph, Node, Shape, Value
from graphopt.passes.canonicalize.layout_moves import move_of
from graphopt.passes.canonicalize.layouts import Facts, Move, Permutation, inverse, is_still

_OPEN: Final = (16, 1, 256)  # what a size that is not known may be, most likely the first
_NODE: Final = 1 << 14  # how many bytes a runtime moves while it starts a node
_UNIT: Final = 1 << 20  # of costs: far more than there are operators, each of which weighs one

_REACH: Final = 400  # operators: what lies farther off stays as it is

Layout = int  # 0 or 1


@dataclass(eq=False)
class Content:
    """One content in two layouts: what is computed, and the Transposes of it.

    `root` is in `layout`; `permutation` leads from there to the other, in which `copies` are.
    `bytes` are as many as there may be open sizes.
    """

    root: Value
    layout: Layout
    permutation: Permutation
    bytes: tuple[int, ...]
    copies: list[Value] = field(default_factory=list)

    def values(self) -> Iterator[tuple[Value, Layout, Permutation]]:
        """Each value with its layout and what leads from it to the other one."""
        yield self.root, self.layout, self.permutation
        for copy in self.copies:
            yield copy, 1 - self.layout, inverse(self.permutation)


@dataclass(frozen=True)
class Member:
    """An operator in reach: the layout that it computes in, and what it is in the other."""

    layout: Layout
    move: Move


class Region:
    """All that a change of layout at one Transpose may reach."""

    def __init__(self, graph: Graph, facts: Facts, seed: Node) -> None:
        self.graph = graph
        self.facts = facts
        self.members: dict[Node, Member] = {}
        self.contents: list[Content] = []
        self._placed: dict[Value, Content] = {}
        permutation, root = facts.permutation(seed), seed.inputs[0]
        if permutation is None or root is None or is_still(permutation, facts.shape(root)):
            return
        if self._link(root, 0, permutation):
            self._grow()

    def _grow(self) -> None:
        for content in self.contents:  # which grows meanwhile
            for value, layout, permutation in content.values():
                for node in list(value.consumers):
                    for slot, read in enumerate(node.inputs):
                        if read is value:
                            self._visit(node, slot, False, layout, permutation)
            producer = content.root.producer
            if producer is not None:
                slot = producer.outputs.index(content.root)
                self._visit(producer, slot, True, content.layout, content.permutation)

    def _visit(
        self, node: Node, slot: int, is_output: bool, layout: Layout, permutation: Permutation
    ) -> None:
        if (
            len(self.members) == _REACH
            or node in self.members
            or node.graph is not self.graph
            or self.is_between(node)
        ):
            return
        move = move_of(node, slot, is_output, permutation, self.facts)
        if move is None:
            return
        linked = [(node.inputs[n], p) for n, p in move.inputs.items()]
        linked += [(node.outputs[n], p) for n, p in move.outputs.items()]
        known = len(self.contents)
        if all(value is not None and self._link(value, layout, p) for value, p in linked) and all(
            self._is_single(node.outputs[n]) for n in move.outputs
        ):
            self.members[node] = Member(layout, move)
            return
        for content in self.contents[known:]:
            for value, _, _ in content.values():
                del self._placed[value]
        del self.contents[known:]

    def _is_single(self, value: Value | None) -> bool:
        """False for what an operator computes with several copies: it can only become one."""
        return value is not None and len(self._placed[value].copies) <= 1

    def is_between(self, node: Node) -> bool:
        """True for a Transpose between the two layouts of a content."""
        content = self._placed.get(node.outputs[0]) if node.op == "Transpose" else None  # type: ignore[arg-type]
        return content is not None and node.outputs[0] in content.copies

    def _link(self, value: Value, layout: Layout, permutation: Permutation) -> bool:
        """Let the value have a second layout; False where that is at odds with what it has."""
        if self.facts.rank(value) != len(permutation):
            return False
        if (content := self._placed.get(value)) is not None:
            return (value, layout, permutation) in content.values()
        producer = value.producer
        if producer is not None and self._leads(producer, inverse(permutation)):
            assert producer.inputs[0] is not None
            value, layout, permutation = producer.inputs[0], 1 - layout, inverse(permutation)
        content = Content(value, layout, permutation, size_of(value, self.facts))
        content.copies = [
            copy
            for node in value.consumers
            if self._leads(node, permutation) and (copy := node.outputs[0]) is not None
        ]
        if any(member in self._placed for member, _, _ in content.values()):
            return False
        for member, _, _ in content.values():
            self._placed[member] = content
        self.contents.append(content)
        return True

    def _leads(self, node: Node, permutation: Permutation) -> bool:
        """True for a Transpose of this graph by just that permutation."""
        plain = node.op == "Transpose" and not node.domain and node.graph is self.graph
        return plain and node not in self.members and self.facts.permutation(node) == permutation

    def producer(self, content: Content) -> Node | None:
        """The operator in reach that computes it; None for all that stays in its layout."""
        node = content.root.producer
        if node is None or node not in self.members:
            return None
        slot = node.outputs.index(content.root)
        return node if slot in self.members[node].move.outputs else None

    def readers(self, content: Content) -> Iterator[tuple[Node | None, Layout]]:
        """Operators in reach that read it, None for what stays; and the layout that it reads."""
        for value, layout, _ in content.values():
            if value.is_output or value in value.graph.pinned:
                yield None, layout
            for node in value.consumers:
                member = self.members.get(node)
                for slot, read in enumerate(node.inputs):
                    if read is value and not (value is content.root and self.is_between(node)):
                        moves = member is not None and slot in member.move.inputs
                        yield (node if moves else None), layout


def size_of(value: Value, facts: Facts) -> tuple[int, ...]:
    """Bytes of a value, by what its open sizes may be."""
    shape: Shape = facts.shape(value) or ()
    fixed = facts.width(value) * math.prod(size for size in shape if isinstance(size, int))
    opened = sum(not isinstance(size, int) for size in shape)
    return tuple(fixed * size**opened for size in _OPEN)


# -- what pays -------------------------------------------------------------------------------------


def best(region: Region) -> set[Node]:
    """The operators that change their layout where Transposes cost least."""
    import networkx as nx  # takes longer to import than most models take to optimise

    flow = nx.DiGraph()
    flow.add_nodes_from((0, 1))
    _add_members(flow, region)
    for number, content in enumerate(region.contents):
        _add_content(flow, region, content, number)
    _, (first, _) = nx.minimum_cut(flow, 0, 1)
    return {node for node, m in region.members.items() if (node in first) != (m.layout == 0)}


def _add_members(flow: Any, region: Region) -> None:
    """Of equal costs, those that change less: each operator holds on to its layout a little."""
    for node, member in region.members.items():
        ends = (0, node) if member.layout == 0 else (node, 1)
        flow.add_edge(*ends, capacity=1)


def _add_content(flow: Any, region: Region, content: Content, number: int) -> None:
    """One cost if any reader is on the other side than the producer."""
    source: Node | int = region.producer(content) or content.layout
    readers: set[Node | int] = {
        layout if node is None else node for node, layout in region.readers(content)
    }
    readers.discard(source)
    if not readers:
        return
    cost = (content.bytes[0] + _NODE) * _UNIT
    to, back = ("to", number), ("back", number)
    if source != 1:
        flow.add_edge(source, to, capacity=cost)
        flow.add_edges_from((to, reader) for reader in readers)  # no capacity: never cut
    if source != 0:
        flow.add_edge(back, source, capacity=cost)
        flow.add_edges_from((reader, back) for reader in readers)


@dataclass
class Change:
    """Operators that change their layout together, and the contents that this touches."""

    nodes: list[Node]
    contents: list[Content]

    @property
    def root(self) -> str:
        """The name that it stands on: of what its first operator computes."""
        return next(value.name for value in self.nodes[0].outputs if value is not None)


def changes(region: Region, flipped: Collection[Node]) -> Iterator[Change]:
    """The flipped operators in groups that do not depend on one another, where a group pays."""
    import networkx as nx

    ends = nx.Graph()
    ends.add_nodes_from(flipped)
    for content in region.contents:
        touched = {region.producer(content), *(node for node, _ in region.readers(content))}
        ends.add_edges_from((content, node) for node in touched if node in flipped)
    order = {node: at for at, node in enumerate(region.members)}
    numbers = {content: at for at, content in enumerate(region.contents)}
    for group in nx.connected_components(ends):
        nodes = sorted((n for n in group if isinstance(n, Node)), key=order.__getitem__)
        contents = [content for content in group if isinstance(content, Content)]
        change = Change(nodes, sorted(contents, key=numbers.__getitem__))
        if _pays(region, change):
            yield change


def _pays(region: Region, change: Change) -> bool:
    """True where there are fewer Transposes or they move less, and neither more nor farther."""
    flipped = set(change.nodes)
    nodes, moved = 0, [0] * len(_OPEN)
    for content in change.contents:
        made = made_in(region, content, flipped)
        more = any(layout != made for layout in read_in(region, content, flipped))
        added = more - len(content.copies)
        nodes += added
        moved = [total + size * added for total, size in zip(moved, content.bytes, strict=True)]
    return max(nodes, *moved) <= 0 and min(nodes, *moved) < 0


def made_in(region: Region, content: Content, flipped: Collection[Node]) -> Layout:
    """The layout in which it is computed once these operators have changed theirs."""
    producer = region.producer(content)
    return content.layout if producer not in flipped else 1 - content.layout


def read_in(region: Region, content: Content, flipped: Collection[Node]) -> set[Layout]:
    """The layouts in which it is read once these operators have changed theirs."""
    return {
        layout if node not in flipped else 1 - layout for node, layout in region.readers(content)
    }
