"""Plans made by placing buffers one by one into gaps: orders and placements, all of them named.

An order says which buffer is next; a placement says which of the gaps between the buffers that are
placed already, and in use at any of the same times, it goes to. By size and by breadth are those of
Pisarchyk and Lee (arXiv:2001.03288).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from graphopt.kernels.arena import Ints, Problem, Sections, Solution

Placing = Callable[[Ints, Ints, int], int]


# -- orders ----------------------------------------------------------------------------------------


def by_size(problem: Problem) -> Ints:
    """The largest first; those of equal size by the time they begin."""
    return np.lexsort((problem.lower, -problem.size))


def by_area(problem: Problem) -> Ints:
    """The largest product of size and lifetime first."""
    area = problem.size.astype(np.float64) * (problem.upper - problem.lower)
    return np.lexsort((problem.lower, -problem.size, -area))


def by_lifetime(problem: Problem) -> Ints:
    """The longest in use first."""
    return np.lexsort((-problem.size, problem.lower - problem.upper))


def by_start(problem: Problem) -> Ints:
    """As they come into use, the largest of equal ones first: as an allocator at run time."""
    return np.lexsort((-problem.size, problem.lower))


def by_breadth(problem: Problem) -> Ints:
    """Sections by the bytes that are in use in them, most first; the buffers of each by size."""
    sections = problem.sections
    if not len(sections):
        return np.arange(len(problem))
    rank = np.empty(len(sections), np.int64)
    rank[np.argsort(-sections.live, kind="stable")] = np.arange(len(sections))
    return np.lexsort((problem.lower, -problem.size, _least(rank, sections)))


def by_crowd(problem: Problem) -> Ints:
    """By the most bytes ever in use beside them, then by area."""
    sections = problem.sections
    if not len(sections):
        return np.arange(len(problem))
    crowd = _least(-sections.live, sections)
    area = problem.size.astype(np.float64) * (problem.upper - problem.lower)
    return np.lexsort((-area, crowd))


def _least(values: Ints, sections: Sections) -> Ints:
    """The least of values [sections] in the lifetime of each buffer, by tables of powers of two."""
    first, last = sections.first, np.maximum(sections.last, sections.first + 1)
    level = np.frexp((last - first).astype(np.float64))[1].astype(np.int64) - 1
    found = np.empty(len(first), np.int64)
    table = values
    for power in range(int(level.max(initial=0)) + 1):
        here = np.flatnonzero(level == power)
        found[here] = np.minimum(table[first[here]], table[last[here] - (1 << power)])
        step = 1 << power
        table = np.minimum(table[:-step], table[step:]) if len(table) > step else table
    return found


# -- placements ------------------------------------------------------------------------------------


def first_fit(starts: Ints, tops: Ints, size: int) -> int:
    """The lowest gap. `starts`: of the neighbours by offset; `tops`: the highest end up to each."""
    floors = np.concatenate([_ZERO, tops[:-1]])
    fits = starts - floors >= size
    at = int(fits.argmax())
    return int(floors[at]) if fits[at] else int(tops[-1])


def best_fit(starts: Ints, tops: Ints, size: int) -> int:
    """The gap that leaves the least, the lowest of equal ones; the top where none is left."""
    floors = np.concatenate([_ZERO, tops[:-1]])
    waste = starts - floors - size
    fits = np.flatnonzero(waste >= 0)
    return int(floors[fits[waste[fits].argmin()]]) if len(fits) else int(tops[-1])


_ZERO: Final = np.zeros(1, np.int64)


class Placed:
    """Buffers that have offsets, sorted by these: what the next one finds in its way."""

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self.table = np.empty((4, capacity), np.int64)  # offset, end, lower, upper

    def neighbours(self, lower: int, upper: int) -> tuple[Ints, Ints]:
        """Offsets, ascending, and ends of all that are in use at any time from lower to upper."""
        offset, end, first, last = self.table[:, : self.count]
        near = np.flatnonzero((first < upper) & (last > lower))
        return offset[near], end[near]

    def add(self, offset: int, end: int, lower: int, upper: int) -> None:
        at = int(self.table[0, : self.count].searchsorted(offset))
        self.table[:, at + 1 : self.count + 1] = self.table[:, at : self.count]
        self.table[:, at] = offset, end, lower, upper
        self.count += 1


def place(
    problem: Problem,
    order: Ints,
    placing: Placing,
    placed: Placed | None = None,
    offsets: Ints | None = None,
) -> Ints:
    """Offsets [n] of buffers that are placed in this order, beside what is placed, if anything is.

    `offsets` [n] are those of the buffers that the order leaves out.
    """
    found = np.zeros(len(problem), np.int64) if offsets is None else offsets.copy()
    placed = Placed(len(problem)) if placed is None else placed
    order = order[problem.present[order]]
    columns = np.stack([order, problem.lower[order], problem.upper[order], problem.size[order]])
    for i, lower, upper, size in columns.T.tolist():
        starts, ends = placed.neighbours(lower, upper)
        offset = placing(starts, np.maximum.accumulate(ends), size) if len(starts) else 0
        found[i] = offset
        placed.add(offset, offset + size, lower, upper)
    return found


# -- strategies ------------------------------------------------------------------------------------

ORDERS: Final[dict[str, Callable[[Problem], Ints]]] = {
    "size": by_size,
    "area": by_area,
    "breadth": by_breadth,
    "crowd": by_crowd,
    "start": by_start,
    "lifetime": by_lifetime,
}
PLACEMENTS: Final[dict[str, Placing]] = {"best": best_fit, "first": first_fit}


def separate(problem: Problem) -> Solution:
    """Every buffer has bytes of its own: what planning saves is measured from here."""
    return Solution.of(problem, np.cumsum(problem.size) - problem.size)


def _greedy(order: str, placement: str) -> Callable[[Problem], Solution]:
    def solved(problem: Problem) -> Solution:
        return Solution.of(problem, place(problem, ORDERS[order](problem), PLACEMENTS[placement]))

    return solved


STRATEGIES: Final[dict[str, Callable[[Problem], Solution]]] = {
    "separate": separate,
    **{f"{o}/{p}": _greedy(o, p) for o in ORDERS for p in PLACEMENTS},
}
