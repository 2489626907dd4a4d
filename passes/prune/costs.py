"""What a unit is worth: the multiply-accumulates that go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphopt.edit import Editor
from graphopt.ir import Node
from graphopt.operators import MACS
from graphopt.passes.prune.groups import Group, Units
from graphopt.passes.work import node_macs


@dataclass
class Parts:
    """The part of one node's work that a unit of each group is, by the groups' roots."""

    given: dict[str, float] = field(default_factory=dict)
    read: dict[str, float] = field(default_factory=dict)

    def left(self, taken: Mapping[str, int]) -> float:
        """What is left of the work once so many units of the groups are gone."""
        left = 1.0
        for side in (self.given, self.read):
            left *= max(1 - sum(taken.get(root, 0) * part for root, part in side.items()), 0.0)
        return left


class Work:
    """What every node does, and how much of it goes with units: of MACs, or of measured time.

    `shapes` are those of values by name. A value without a shape counts nothing; a recurrent
    operator counts what it gives.
    """

    def __init__(
        self, edit: Editor, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._parts: dict[Node, Parts] = {}
        self._of: dict[str, dict[Node, None]] = {group.root: {} for group in groups}
        for group in groups:
            self._add(group)
        products = (n for n in edit.model.graph.nodes if (n.domain, n.op) in MACS)
        self._macs = {node: node_macs(edit, node, shapes) for node in products}
        self.total = sum(self._macs.values())

    def _add(self, group: Group) -> None:
        for place, units in group.parts.places:
            if place.axis >= 0:
                given = self._parts.setdefault(place.node, Parts()).given
                part = _part(units, group.units)
                given[group.root] = max(given.get(group.root, 0.0), part)
                self._of[group.root][place.node] = None
        for slot in group.readers:
            node = slot.product
            if node is not None and slot.read not in node.outputs:
                read = self._parts.setdefault(node, Parts()).read
                read[group.root] = _part(slot.units, group.units)
                self._of[group.root][node] = None

    def macs(self, taken: Mapping[str, int]) -> float:
        """MACs once so many units are gone, by the groups' roots."""
        return self._left(self._macs, taken)

    def cost(self, taken: Mapping[str, int], ms: Mapping[Node, float] | None) -> float:
        """Milliseconds then, if each node takes `ms` now and time goes with work; MACs without."""
        return self._left(self._macs if ms is None else ms, taken)

    def saved(
        self,
        taken: Mapping[str, int],
        root: str,
        count: int,
        ms: Mapping[Node, float] | None,
    ) -> float:
        """What `cost` falls by when so many units of one group are gone, others as they are."""
        of = self._macs if ms is None else ms
        after = {**taken, root: count}
        return sum(
            of.get(node, 0.0) * (self._parts[node].left(taken) - self._parts[node].left(after))
            for node in self._of[root]
        )

    def _left(self, of: Mapping[Node, float], taken: Mapping[str, int]) -> float:
        none = Parts()
        return sum(cost * self._parts.get(node, none).left(taken) for node, cost in of.items())


def costs(edit: Editor, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """MACs that one unit of the group is worth on average, at these shapes of values by name.

    Of every product that gives, passes or reads it; of a recurrent operator what it gives. Values
    without a shape count nothing.
    """
    work = Work(edit, [group], shapes)
    return work.total - work.macs({group.root: 1})


def _part(units: Units, count: int) -> float:
    """The part of an axis that one unit takes on average."""
    return float(np.count_nonzero(units >= 0)) / len(units) / count
