"""Buffers with lifetimes in one arena: the problem, a plan, what no plan can beat, the check.

Lifetimes are half-open: a buffer that ends where another begins may share its bytes. The problem
is known as dynamic storage allocation, and as packing rectangles that move in one direction only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_PAIRS: Final = 1 << 22  # of buffers that are compared at once


@dataclass(frozen=True, slots=True)
class Buffer:
    """`size` bytes that are in use at the times `lower` <= t < `upper`."""

    id: Hashable
    lower: int
    upper: int
    size: int


@dataclass(frozen=True)
class Problem:
    """Buffers, whose offsets are to be multiples of `alignment` bytes.

    Raises ValueError where two ids are equal, a size is negative, a lifetime ends before it begins
    or the alignment is not positive.
    """

    buffers: tuple[Buffer, ...]
    alignment: int = 1
    ids: tuple[Hashable, ...] = field(init=False, repr=False, compare=False)

    def __init__(self, buffers: Iterable[Buffer], alignment: int = 1) -> None:
        object.__setattr__(self, "buffers", tuple(buffers))
        object.__setattr__(self, "alignment", alignment)
        object.__setattr__(self, "ids", tuple(buffer.id for buffer in self.buffers))
        if alignment < 1:
            raise ValueError(f"an alignment of {alignment} bytes")
        seen: set[Hashable] = set()
        for buffer in self.buffers:
            if buffer.id in seen:
                raise ValueError(f"two buffers are called {buffer.id!r}")
            seen.add(buffer.id)
            if buffer.size < 0:
                raise ValueError(f"buffer {buffer.id!r} has {buffer.size} bytes")
            if buffer.upper < buffer.lower:
                raise ValueError(f"buffer {buffer.id!r} ends before it begins")

    def __len__(self) -> int:
        return len(self.buffers)

    @cached_property
    def lower(self) -> Ints:
        """First times [n]."""
        return np.array([buffer.lower for buffer in self.buffers], np.int64)

    @cached_property
    def upper(self) -> Ints:
        """Times [n] at which they are no longer in use."""
        return np.array([buffer.upper for buffer in self.buffers], np.int64)

    @cached_property
    def size(self) -> Ints:
        """Bytes [n], rounded up to multiples of the alignment."""
        exact = np.array([buffer.size for buffer in self.buffers], np.int64)
        return -(-exact // self.alignment) * self.alignment

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """[n]: those that take bytes at any time; the others go anywhere."""
        return (self.size > 0) & (self.upper > self.lower)

    @cached_property
    def sections(self) -> Sections:
        """Stretches of time in which the same buffers are in use."""
        used = self.present
        times = np.unique(np.concatenate([self.lower[used], self.upper[used]]))
        first = np.where(used, np.searchsorted(times, self.lower), 0)
        last = np.where(used, np.searchsorted(times, self.upper), 0)
        change = np.zeros(max(len(times), 1), np.int64)
        np.add.at(change, first, np.where(used, self.size, 0))
        np.add.at(change, last, np.where(used, -self.size, 0))
        return Sections(first, last, np.cumsum(change)[:-1])


@dataclass(frozen=True)
class Sections:
    """Buffer i is in use in the sections `first[i]` <= s < `last[i]`; `live` bytes in each."""

    first: Ints
    last: Ints
    live: Ints

    def __len__(self) -> int:
        return len(self.live)


@dataclass(frozen=True)
class Solution:
    """Where each buffer begins, in bytes, and the bytes that the arena needs."""

    offsets: Mapping[Any, int]
    height: int

    @classmethod
    def of(cls, problem: Problem, offsets: Ints) -> Solution:
        """Offsets [n] in the order of the buffers."""
        found = np.where(problem.present, offsets, 0)
        tops = np.where(problem.present, found + problem.size, 0)
        named = dict(zip(problem.ids, found.tolist(), strict=True))
        return cls(named, int(tops.max(initial=0)))


def lower_bound(problem: Problem) -> int:
    """The most bytes that are in use at one time, sizes rounded up to the alignment."""
    return int(problem.sections.live.max(initial=0))


def check(problem: Problem, solution: Solution) -> None:
    """Compares every pair of buffers: shares nothing with what makes plans.

    Raises ValueError that names what is wrong: two buffers that share bytes while both are in use,
    one whose offset is missing, unknown, negative, not aligned, or that leaves the arena.
    """
    offset = _own(problem, solution)
    table = [(b.lower, b.upper, b.size) for b in problem.buffers]
    lower, upper, size = np.array(table, np.int64).reshape(-1, 3).T
    end = offset + size
    rows = max(1, _PAIRS // max(len(problem), 1))
    used = (size > 0) & (upper > lower)
    for start, stop in pairwise([*range(0, len(problem), rows), len(problem)]):
        a = slice(start, stop), None
        b = None, slice(start, None)
        shared = (lower[a] < upper[b]) & (lower[b] < upper[a])
        shared &= (offset[a] < end[b]) & (offset[b] < end[a]) & used[a] & used[b]
        found = np.argwhere(np.triu(shared, 1))
        if len(found):
            i, j = (found[0] + start).tolist()
            raise ValueError(f"buffers {_said(problem, i, offset)} and {_said(problem, j, offset)}")


def _own(problem: Problem, solution: Solution) -> NDArray[Any]:
    """Offsets [n] that are fine as far as each buffer alone is concerned."""
    unknown = solution.offsets.keys() - set(problem.ids)
    if unknown:
        raise ValueError(f"no buffer is called {next(iter(unknown))!r}")
    for buffer in problem.buffers:
        if buffer.id not in solution.offsets:
            raise ValueError(f"buffer {buffer.id!r} has no offset")
        offset = solution.offsets[buffer.id]
        if offset < 0 or offset % problem.alignment:
            raise ValueError(f"buffer {buffer.id!r} begins at {offset}: negative or not aligned")
        if offset + buffer.size > solution.height:
            raise ValueError(f"buffer {buffer.id!r} ends above the arena of {solution.height}")
    return np.array([solution.offsets[buffer.id] for buffer in problem.buffers], np.int64)


def _said(problem: Problem, index: int, offset: Ints) -> str:
    buffer = problem.buffers[index]
    start = int(offset[index])
    return (
        f"{buffer.id!r} (bytes {start} to {start + buffer.size} at times {buffer.lower} to "
        f"{buffer.upper})"
    )
