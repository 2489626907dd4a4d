"""Is there a plan within a capacity? A complete search that is quick to give up.

After minimalloc (Moffitt, ASPLOS 2023). Buffers are placed by ascending offsets, each on top of
what is placed under it, which is enough: where offsets have the least sum, none can be lowered. A
branch ends where in some section the least offset of its open buffers, and the bytes of all of
them, exceed the capacity, or where an open buffer would fit below the next offset. Parts of time
that no open buffer connects are searched each on its own.

What is added: an open buffer that was passed over where it could have been placed waits for another
to be placed under it, so it cannot begin before the least end of its open neighbours; when a part
has no plan, the search goes on where the part came to be, whatever was placed in the parts beside
it since; and children of a node are judged several at once, as arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graphopt.kernels.arena import Ints, Problem

Array = NDArray[Any]

ORDERS: Final = ("TWA", "CAT", "WAT", "TCA", "TAW", "AWT")
_JUDGED: Final = 4  # children of a node at once, fewer where the sections have more members than
_MEMBERS: Final = 1 << 14
_CLOCK: Final = 16  # nodes between looks at the clock
_LARGEST: Final = 1 << 24  # pairs of buffers, or of buffers and sections, that are kept as arrays
_HALF: Final = 1 << 29  # units: below it, sums of three fit 32 bits


class Found(NamedTuple):
    """Offsets [n] if there are any, whether that is certain, and the nodes that it took."""

    offsets: Ints | None
    certain: bool
    nodes: int


@dataclass(frozen=True)
class Limits:
    """When to stop without an answer: nodes, a time of the monotonic clock, or when `stopped`."""

    nodes: float = float("inf")
    deadline: float = float("inf")
    stopped: Callable[[], bool] = lambda: False

    def over(self, nodes: int) -> bool:
        if nodes >= self.nodes:
            return True
        return not nodes % _CLOCK and (time.monotonic() > self.deadline or self.stopped())


class Whole:
    """The buffers [n] that take bytes, in units of their greatest common divisor.

    `order` says which open buffer is tried first, most important letter first: T the bytes that are
    open beside it, W its lifetime, C the sections of it, A bytes times lifetime. `noise` is the
    standard deviation of the logarithm of what all but T are multiplied with.
    """

    def __init__(self, problem: Problem, order: str, noise: float = 0.0, seed: int = 0) -> None:
        self.problem = problem
        self.used = np.flatnonzero(problem.present)
        sections = problem.sections
        size = problem.size[self.used]
        self.unit = max(1, int(np.gcd.reduce(size, initial=0)))
        self.size = size // self.unit
        self.first, self.last = sections.first[self.used], sections.last[self.used]
        self.live = sections.live // self.unit
        self.order = order
        width = (problem.upper - problem.lower)[self.used].astype(np.float64)
        keys = {"W": width, "C": self.last - self.first, "A": width * self.size}
        rng = np.random.default_rng(seed)
        self.keys = {k: v * np.exp(noise * rng.standard_normal(len(v))) for k, v in keys.items()}

    @property
    def tractable(self) -> bool:
        """Whether the arrays of a search would fit the memory."""
        return len(self.used) * max(len(self.used), len(self.live)) <= _LARGEST

    def ranked(self, ids: Ints, base: int, total: Array) -> Ints:
        """Open buffers, first to be tried first; `total` bytes are open in sections from base."""
        spans = np.stack([self.first[ids], self.last[ids]], axis=1).ravel() - base
        crowd = np.maximum.reduceat(np.append(total, 0), spans)[::2]
        keys = {k: v[ids] for k, v in self.keys.items()} | {"T": crowd}
        return ids[np.lexsort([-keys[letter] for letter in reversed(self.order)])]


class _Open(NamedTuple):
    """A part that is still to be searched: open buffers [k], sections [s], then other parts.

    `lowest` [k] is on top of what is placed, `waits` [k] what a buffer must at least begin at.
    """

    ids: Ints
    base: int
    total: Array
    lowest: Array
    waits: Array
    floor: int
    after: _Open | None


class _Part:
    """Buffers [k] that are open where a part begins, by rank, and its sections [s]."""

    def __init__(self, whole: Whole, ids: Ints, base: int, total: Array) -> None:
        self.ids, self.base = ids, base
        self.first, self.last = whole.first[ids] - base, whole.last[ids] - base
        self.size = whole.size[ids].astype(total.dtype)
        sections = np.arange(len(total))
        live = (self.first <= sections[:, None]) & (sections[:, None] < self.last)
        rows, self.members = np.nonzero(live)
        self.starts = np.searchsorted(rows, sections)
        self.judged = max(1, min(_JUDGED, _MEMBERS // max(len(rows), 1)))
        self.beside = (self.first[:, None] < self.last) & (self.first < self.last[:, None])
        np.fill_diagonal(self.beside, False)
        self.cuts = _crossing(self.first, self.last, len(total))


def _crossing(first: Ints, last: Ints, sections: int) -> Ints:
    """How many of the buffers connect each section with the next [sections - 1]."""
    change = np.zeros(sections + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last - 1, -1)
    return np.cumsum(change)[: max(sections - 1, 0)]


@dataclass(slots=True)
class _Node:
    """A part with some buffers placed (their `lowest` is the capacity), and what may be next."""

    part: _Part
    lowest: Array
    waits: Array
    total: Array
    cuts: Ints
    floor: int
    after: _Open | None
    owner: int  # depth of the node at which the part came to be
    next: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    passed: Array = field(default_factory=lambda: np.zeros(0, np.int64))  # their waits from then on
    ends: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    most: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    judged: int = 0
    ready: list[tuple[int, Array]] = field(default_factory=list)


class _Search:
    def __init__(self, whole: Whole, capacity: int, limits: Limits) -> None:
        self.whole, self.capacity, self.limits = whole, capacity, limits
        self.offsets = np.zeros(len(whole.used), np.int64)
        self.place = np.zeros(len(whole.used), np.int64)
        self.stack: list[_Node] = []
        self.nodes = 0

    def run(self) -> Found:
        kind = np.int32 if self.capacity < _HALF else np.int64
        n = len(self.whole.used)
        if self.whole.live.max(initial=0) > self.capacity:
            return Found(None, True, 0)
        nothing = np.zeros(n, kind)
        live = self.whole.live.astype(kind)
        cuts = _crossing(self.whole.first, self.whole.last, len(live))
        rest = self.split(_Open(np.arange(n), 0, live, nothing, nothing, 0, None), cuts)
        if rest is not None:
            self.enter(rest, -1)
        while self.stack:
            if self.limits.over(self.nodes):
                return Found(None, False, self.nodes)
            if self.advance():
                break
        else:
            if rest is not None:
                return Found(None, True, self.nodes)
        found = np.zeros(len(self.whole.problem), np.int64)
        found[self.whole.used] = self.offsets * self.whole.unit
        return Found(found, True, self.nodes)

    def advance(self) -> bool:
        """One step at the deepest node; whether all buffers are placed."""
        node = self.stack[-1]
        if node.ready:
            return self.descend(node, *node.ready.pop())
        if node.judged < len(node.next):
            self.judge(node)
        else:
            del self.stack[node.owner + 1 :]
        return False

    def enter(self, rest: _Open, owner: int) -> None:
        """The first of these parts as a node."""
        ids = self.whole.ranked(rest.ids, rest.base, rest.total)
        part = _Part(self.whole, ids, rest.base, rest.total)
        self.place[rest.ids] = np.arange(len(ids))
        at = self.place[ids]
        lowest, waits = rest.lowest[at], rest.waits[at]
        node = _Node(part, lowest, waits, rest.total, part.cuts, rest.floor, rest.after, owner)
        self.open(node)

    def open(self, node: _Node) -> None:
        """Finds which buffers may be next: none where another one would fit below it."""
        self.nodes += 1
        self.stack.append(node)
        part, lowest = node.part, node.lowest
        least = np.maximum(node.waits, node.floor)
        below = int((lowest + part.size).min())
        following = np.flatnonzero((lowest < below) & (lowest >= least))
        if len(following):
            node.next = following[np.argsort(lowest[following], kind="stable")]
            node.passed = np.zeros_like(node.next, lowest.dtype)
            node.ends = np.maximum(lowest, least) + part.size
            placed = lowest == self.capacity
            node.most = np.where(placed, 2 * self.capacity, self.capacity - part.size)

    def judge(self, node: _Node) -> None:
        """Which of the next few buffers may be placed; no more of them if none can be passed over.

        Rows are states: each buffer placed and those before it passed over, then all passed over.
        """
        part, done = node.part, node.judged
        chosen = node.next[done : done + part.judged]
        count = len(chosen)
        seen = node.next[: done + count]
        at = node.lowest[chosen]
        tops = (at + part.size[chosen])[:, None]
        beside = part.beside.take(chosen, axis=0)
        node.passed[done : done + count] = np.where(beside, node.ends, 2 * self.capacity).min(1)
        lowest = np.maximum(node.lowest, beside * tops)
        least = np.concatenate([lowest, node.lowest[None]])
        np.maximum(least, node.waits, out=least)
        before = np.arange(len(seen)) < np.arange(done, done + count + 1)[:, None]
        passed = np.where(before, node.passed[: len(seen)], 0)
        least[:, seen] = np.maximum(least[:, seen], passed)
        np.maximum(least, np.append(at, at[-1])[:, None], out=least)
        fits: NDArray[np.bool_] = np.all(least <= node.most, axis=1)
        least[np.arange(count), chosen] = self.capacity
        needed = np.minimum.reduceat(np.take(least, part.members, axis=1), part.starts, axis=1)
        needed += node.total
        for row, i in zip(needed, chosen.tolist(), strict=False):
            row[part.first[i] : part.last[i]] -= part.size[i]
        fits &= np.all(needed <= self.capacity, axis=1)
        node.ready = [(done + z, lowest[z]) for z in np.flatnonzero(fits[:count])[::-1].tolist()]
        node.judged = done + count if fits[count] else len(node.next)

    def descend(self, node: _Node, z: int, lowest: Array) -> bool:
        """Places the z-th of the next buffers, those before it passed over; whether all are."""
        part, chosen = node.part, int(node.next[z])
        floor = int(node.lowest[chosen])
        self.offsets[part.ids[chosen]] = floor
        lowest[chosen] = self.capacity
        waits = node.waits.copy()
        seen = node.next[:z]
        waits[seen] = np.maximum(waits[seen], node.passed[:z])
        start, stop = int(part.first[chosen]), int(part.last[chosen]) - 1
        total, cuts = node.total.copy(), node.cuts
        total[start : stop + 1] -= part.size[chosen]
        if stop > start:
            cuts = cuts.copy()
            cuts[start:stop] -= 1
        depth = len(self.stack) - 1
        if total.any() and cuts[start:stop].all():
            self.open(_Node(part, lowest, waits, total, cuts, floor, node.after, depth))
            return False
        still = np.flatnonzero(lowest != self.capacity)
        ids = part.ids[still]
        left = _Open(ids, part.base, total, lowest[still], waits[still], floor, node.after)
        rest = self.split(left, cuts)
        if rest is None:
            return True
        self.enter(rest, depth)
        return False

    def split(self, part: _Open, cuts: Ints) -> _Open | None:
        """Its parts that no open buffer connects, before those that are left anyway."""
        rest = part.after
        edges = [0, *(np.flatnonzero(cuts == 0) + 1).tolist(), len(part.total)]
        first, last = self.whole.first[part.ids] - part.base, self.whole.last[part.ids] - part.base
        for start, stop in pairwise(edges):
            inside = (first < stop) & (last > start)
            if inside.any():
                lowest, waits = part.lowest[inside], part.waits[inside]
                ids, base = part.ids[inside], part.base + start
                rest = _Open(ids, base, part.total[start:stop], lowest, waits, part.floor, rest)
        return rest


def within(whole: Whole, capacity: int, limits: Limits | None = None) -> Found:
    """A plan of at most `capacity` bytes, or that there is none, or neither within the limits.

    Raises ValueError for more buffers than a search can hold (see `Whole.tractable`).
    """
    if not whole.tractable:
        raise ValueError(f"{len(whole.used)} buffers are too many for an exact search")
    return _Search(whole, capacity // whole.unit, limits or Limits()).run()
