"""Coupled groups: channels, heads and hidden units of which single ones can go.

The dependency graph of DepGraph (Fang et al., CVPR 2023) for ONNX: what goes together is found
index by index, so that concatenated, split, shuffled and flattened channels are followed as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.operators import MACS
from graphopt.passes.prune.labels import Fix, Labels, Reading
from graphopt.passes.prune.walk import Place, Stored, Walk

Units = NDArray[np.int64]
"""The number of the unit that each index of an axis belongs to, -1 for none."""

_NAMED: Final = 4  # of what shares a group


@dataclass(frozen=True, eq=False)
class Slot:
    """An axis of the constant that the node reads, with the unit of each index.

    Of a reader also the node that multiplies, what it multiplies and along which axis. Index i
    meets index i of `read`; in a grouped convolution the one at that place of every group. What
    an LSTM, GRU or RNN reads of its own last step is a reader whose `product` computes `read`.
    """

    node: Node
    slot: int
    axis: int
    units: Units
    product: Node | None = None
    read: Value | None = None
    read_axis: int = -1

    @property
    def value(self) -> Value:
        """The constant."""
        value = self.node.inputs[self.slot]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class Parts:
    """What removal changes. Nodes and slots go on holding when other groups change names."""

    places: list[tuple[Place, Units]] = field(default_factory=list)
    stored: list[tuple[Stored, int, Units]] = field(default_factory=list)  # with its axis
    fixes: list[tuple[Fix, Units, Units]] = field(default_factory=list)  # counted, watched


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: each is the least that can go at once from all tensors that share it.

    `axes` are the activations in order of computation, with their axis and the unit of each index;
    `root` is the name of the first. `givers` are all constants that have an index for what is
    computed, biases and scales included, `readers` the weights that take it in: where those of a
    unit are zero it can go and nothing else changes.
    """

    root: str
    units: int
    axes: Mapping[Value, tuple[int, Units]]
    givers: list[Slot]
    readers: list[Slot]
    sharers: tuple[Node, ...]  # that bring several of its values together, or pass them on
    parts: Parts

    def text(self, count: int) -> str:
        """One line for people: what goes because of what."""
        products = dict.fromkeys(slot.product for slot in self.readers if slot.product is not None)
        reading = [f"{node.label} (reads)" for node in products if node not in self.sharers]
        names = [node.label for node in self.sharers] + reading
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        first = next((s for s in self.givers if s.node is self._first), self.givers[0])
        shared = ", ".join(names[:_NAMED]) + more
        one = "shares" if len(names) == 1 else "share"
        what = f"remove {count} of {self.units} channels of {first.node.label}"
        return f"{what} because {shared} {one} them"

    def __str__(self) -> str:
        return self.text(1)

    @property
    def _first(self) -> Node:
        return self.parts.places[0][0].node


def groups_of(edit: Editor) -> list[Group]:
    """All groups of the main graph with at least two units, in order of computation.

    They hold until the graph is edited otherwise than by removing units of them.
    """
    walk = Walk(edit)
    walk.run()
    return list(_Numbering(walk).groups())


class _Numbering:
    """Classes of labels that are units, by the axes that they have in common."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._classes, self._is_unit = walk.coupling.classes()
        self._number = np.full(len(self._is_unit), -1, np.int64)
        self._group = self._connected()
        self._counts: dict[int, int] = {}
        for place in walk.places:
            self._enumerate(place.labels)

    def groups(self) -> Iterator[Group]:
        """Each with everything that it has a part in."""
        walk, parts = self._walk, dict[int, Parts]()
        for place in walk.places:
            if (at := self._at(place.labels)) >= 0:
                parts.setdefault(at, Parts()).places.append((place, self._units(place.labels)))
        for stored in walk.stored:
            for axis, each in enumerate(stored.axes):
                if each.labels is not None and (at := self._at(each.labels)) in parts:
                    parts[at].stored.append((stored, axis, self._units(each.labels)))
        for fix in walk.coupling.fixes:
            if (at := self._at(fix.watched)) in parts:
                both = self._units(fix.labels), self._units(fix.watched)
                parts[at].fixes.append((fix, *both))
        readings: dict[int, list[Reading]] = {}
        reading: set[tuple[Node, int]] = set()
        for found in walk.coupling.readings:
            at = self._at(found.labels)
            readings.setdefault(at, []).append(found)
            reading.add((found.product, at))
        sharers: dict[int, list[Node]] = {}
        for node, arrays in walk.joined.items():
            brought = [self._at(labels) for labels in arrays]
            for at in dict.fromkeys(brought):
                brings = brought.count(at) > 1 or (node.domain, node.op) in MACS
                if at >= 0 and brings and (node, at) not in reading:
                    sharers.setdefault(at, []).append(node)
        for at, part in parts.items():
            if self._counts[at] > 1:
                yield self._made(at, part, readings.get(at, []), sharers.get(at, []))

    def _made(self, at: int, parts: Parts, readings: list[Reading], sharers: list[Node]) -> Group:
        axes: dict[Value, tuple[int, Units]] = {}
        for place, units in parts.places:
            value = place.node.outputs[place.slot]
            if value is not None and place.axis >= 0:
                axes.setdefault(value, (place.axis, units))
        readers = [
            Slot(
                reading.origin.node,
                reading.origin.slot,
                reading.axis,
                self._units(reading.labels),
                reading.product,
                reading.read,
                reading.read_axis,
            )
            for reading in readings
        ]
        read = {(slot.node, slot.slot, slot.axis) for slot in readers}
        givers = [
            Slot(*stored.readers[0], axis, units)
            for stored, axis, units in parts.stored
            if (*stored.readers[0], axis) not in read
        ]
        root = next(iter(axes)).name
        return Group(root, self._counts[at], axes, givers, readers, tuple(sharers), parts)

    def _connected(self) -> Labels:
        """The group of each class: those on one axis are of one."""
        walk = self._walk
        arrays = [place.labels for place in walk.places]
        arrays += [a.labels for s in walk.stored for a in s.axes if a.labels is not None]
        arrays += [fix.watched for fix in walk.coupling.fixes]
        chains = []
        for labels in arrays:
            classes = np.unique(self._classes[labels])
            chains.append(classes[self._is_unit[classes]])
        left = np.concatenate([chain[:-1] for chain in chains] or [np.zeros(0, np.int64)])
        right = np.concatenate([chain[1:] for chain in chains] or [np.zeros(0, np.int64)])
        size = len(self._is_unit)
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), (size, size))
        found: Labels = connected_components(graph, directed=False)[1].astype(np.int64)
        return found

    def _at(self, labels: Labels) -> int:
        """The group that has units on an axis with these labels, -1 for none."""
        classes = self._classes[labels]
        units = classes[self._is_unit[classes]]
        return int(self._group[units[0]]) if len(units) else -1

    def _enumerate(self, labels: Labels) -> None:
        classes = self._classes[labels]
        new = classes[self._is_unit[classes] & (self._number[classes] < 0)]
        if not len(new):
            return
        found, first = np.unique(new, return_index=True)
        ordered = found[np.argsort(first)]
        at = int(self._group[ordered[0]])
        start = self._counts.get(at, 0)
        self._number[ordered] = np.arange(start, start + len(ordered))
        self._counts[at] = start + len(ordered)

    def _units(self, labels: Labels) -> Units:
        return self._number[self._classes[labels]]
