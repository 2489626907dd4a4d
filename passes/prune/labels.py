"""Labels of indices: two of one class go together or not at all.

Every axis of a value that weights give has one label for each of its indices. Operators unite the
labels of what they bring together, and bar those that they cannot do without. What comes from
elsewhere has no labels, and bars whatever meets it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from graphopt.ir import Node, Value
from graphopt.size_terms import Size

Labels = NDArray[np.int64]
MOST: Final = 1 << 22  # labels of one axis; a reshape of more is not followed


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One axis: its size, None where nothing is known, and the label of each index if it has any.

    An axis with labels has a known size above 1.
    """

    size: Size | None
    labels: Labels | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """An integer that the graph measures: the number of indices of an axis with these labels."""

    labels: Labels


Number = Size | Counted | None
"""An element of a shape: known, measured, or unknown."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The constant behind a value: where the graph reads it, and which of its axes each one is."""

    node: Node
    slot: int
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of a value: axes (None: not even the rank), elements of a short vector of
    integers, and the constant that it is but for the order of its axes and its type."""

    axes: tuple[Axis, ...] | None
    numbers: tuple[Number, ...] | None = None
    origin: Origin | None = None

    @property
    def counted(self) -> list[Counted]:
        """The elements that are measured."""
        return [number for number in self.numbers or () if isinstance(number, Counted)]

    @property
    def literals(self) -> list[int] | None:
        """The elements, where all are known as numbers."""
        found = [number for number in self.numbers or () if isinstance(number, int)]
        return found if self.numbers is not None and len(found) == len(self.numbers) else None

    def permuted(self, order: Sequence[int]) -> Facts:
        """With the axes in this order."""
        assert self.axes is not None
        origin = self.origin
        if origin is not None:
            axes = tuple(origin.axes[axis] for axis in order)
            origin = dataclasses.replace(origin, axes=axes)
        return Facts(tuple(self.axes[axis] for axis in order), None, origin)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A product that sums over the labels: the axis of its weights, and what it multiplies."""

    origin: Origin
    axis: int  # of the constant
    labels: Labels
    product: Node
    read: Value
    read_axis: int
    is_recurrent: bool  # the node reads what it gave itself a step before


@dataclass(frozen=True, slots=True, eq=False)
class Fix:
    """What a node states about channels: a number of an attribute or of an input.

    It becomes the number of `labels` that are left, once one of `watched` is gone. Without an
    `index` the input holds indices into an axis with these labels, or the attribute is one number.
    Where the input comes from a Concat, the element is that of its input `part`, if that is given.
    """

    node: Node
    where: str | int  # attribute, or slot of the input
    index: int | None
    labels: Labels
    watched: Labels
    numbers: tuple[int, ...] = ()  # what the input, or that part of it, holds
    part: int | None = None


@dataclass(eq=False)
class Coupling:
    """All that a walk found out: labels united and barred, who gives them, who reads them."""

    readings: list[Reading] = field(default_factory=list)
    fixes: list[Fix] = field(default_factory=list)
    count: int = 0
    _repeats: set[int] = field(default_factory=set)
    _given: list[Labels] = field(default_factory=list)
    _barred: list[Labels] = field(default_factory=list)
    _united: list[tuple[Labels, Labels]] = field(default_factory=list)

    def fresh(self, size: int) -> Labels:
        """Labels that nothing else has."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def repeated(self, size: int) -> Labels:
        """Labels of what is the same for every index, and can come less often."""
        labels = self.fresh(size)
        self._repeats.update(labels.tolist())
        return labels

    def is_repeated(self, labels: Labels) -> bool:
        """True for labels of something that was only repeated."""
        return int(labels[0]) in self._repeats

    def fixed(self, size: int) -> Labels:
        """Labels of indices that have to stay."""
        labels = self.fresh(size)
        self._barred.append(labels)
        return labels

    def unite(self, first: Labels, *others: Labels) -> None:
        """Let the labels at equal places go together."""
        for other in others:
            if other is not first:
                assert first.shape == other.shape
                self._united.append((first.reshape(-1), other.reshape(-1)))

    def rows(self, grid: Labels) -> Labels:
        """One label for each row of the grid [n, m], whose labels go together."""
        for column in range(1, grid.shape[1]):
            self.unite(grid[:, 0], grid[:, column])
        return np.ascontiguousarray(grid[:, 0])

    def bar(self, *what: Axis | Counted | Labels | Facts | None) -> None:
        """Let the labels stay."""
        for each in what:
            if isinstance(each, Facts):
                self.bar(*(each.axes or ()), *each.counted)
            elif isinstance(each, np.ndarray):
                self._barred.append(each)
            elif each is not None and each.labels is not None:
                self._barred.append(each.labels)

    def join(self, axes: Sequence[Axis]) -> Axis:
        """The axis of a result to which these broadcast: one of size 1 has no say."""
        said = [axis for axis in axes if axis.size != 1]
        if not said:
            return Axis(1)
        sizes = {axis.size for axis in said}
        known = [size for size in sizes if isinstance(size, int)]
        size = known[0] if known else sizes.pop() if len(sizes) == 1 else None
        if len(sizes) > 1 or any(axis.labels is None for axis in said):
            self.bar(*said)
            return Axis(size)
        labels = [axis.labels for axis in said if axis.labels is not None]
        self.unite(*labels)
        return Axis(size, labels[0])

    def give(self, axis: Axis) -> None:
        """Note that weights compute what these labels stand for."""
        if axis.labels is not None:
            self._given.append(axis.labels)

    def classes(self) -> tuple[Labels, NDArray[Any]]:
        """The class of each label, and of each class if it is a unit.

        A unit is not barred, something computes it from weights and something else reads it with
        weights.
        """
        pairs = [np.concatenate(side) for side in zip(*self._united, strict=True)]
        rows, columns = pairs if pairs else (np.zeros(0, np.int64),) * 2
        graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), (self.count, self.count))
        number, classes = connected_components(graph, directed=False)
        read = [reading.labels for reading in self.readings if not reading.is_recurrent]
        units = np.ones(number, bool)
        for arrays, wanted in ((self._given, True), (read, True), (self._barred, False)):
            marked = np.zeros(number, bool)
            for labels in arrays:
                marked[classes[labels]] = True
            units &= marked if wanted else ~marked
        return classes.astype(np.int64), units


def same(a: Labels | None, b: Labels | None) -> bool:
    """True for the same labels in the same order."""
    return a is not None and b is not None and (a is b or np.array_equal(a, b))
