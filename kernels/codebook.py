"""Numbers as indices into a table of few: k-means on a line, which sorting makes nearly exact.

On a line every cluster is a range of the sorted numbers, so that sums over prefixes give its mean
and its squared error at once. Up to `EXACT` distinct numbers are divided by dynamic programming
(Wang and Song, Ckmeans.1d.dp, The R Journal 3/2, 2011; divide and conquer over the first number of
a cluster, which never decreases). Of more, as many ranges are divided first; Lloyd's iterations on
all numbers then go on from what that gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

EXACT: Final = 1024  # distinct numbers that are divided as well as can be
_FINE: Final = 8  # ranges for each entry, where there are more
_ROUNDS: Final = 4  # in which half of them are found
_STEPS: Final = 300  # of Lloyd's iterations; more than about fifty are rare

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Codebook:
    """`table` ascends, float32 [entries]; `indices` uint8, in the shape of what was divided.

    `error` is the sum of squared differences, each times its importance.
    """

    table: NDArray[np.float32]
    indices: NDArray[np.uint8]
    error: float

    @property
    def values(self) -> NDArray[np.float32]:
        """What is kept of the numbers."""
        return self.table[self.indices]


def codebook(
    array: Array, entries: int, *, importance: Array | None = None, keep_zero: bool = False
) -> Codebook:
    """The table of at most `entries` float32 that stands for an array with least squared error.

    `importance`, which broadcasts to the array, weighs squares; what has none goes to the nearest
    entry. With no more distinct float32 numbers than entries nothing is lost (-0.0 becomes 0.0).
    `keep_zero` gives zeros an entry of their own. The same input gives the same table, whatever the
    machine: all that is computed with is rounded as IEEE 754 says. Raises ValueError for entries
    outside 2 to 256, for numbers that are not finite, and for importance that is negative or not.
    """
    if not 2 <= entries <= 256:
        raise ValueError(f"a table has 2 to 256 entries, not {entries}")
    given = np.asarray(array, np.float32)
    weights = _weights(importance, given.shape)
    if not np.isfinite(given).all():
        raise ValueError("numbers that are not finite have no mean")
    line = _Line.of(given.reshape(-1) + np.float32(0), weights)
    if len(line.numbers) <= entries:
        table = line.numbers.astype(np.float32)
    elif keep_zero and (line.numbers == 0).any():
        rest = _divided(line.where((line.numbers != 0) & (line.weights > 0)), entries - 1)
        table = np.unique(np.append(rest, np.float32(0)))
    else:
        table = _divided(line.where(line.weights > 0), entries)
    indices = nearest(given, table)
    lost = np.subtract(given, table[indices], dtype=np.float64) ** 2
    error = float(lost.sum() if weights is None else (lost.reshape(-1) * weights).sum())
    return Codebook(table, indices, error)


def nearest(given: Array, table: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The entry of an ascending table that is closest to each number; of two the smaller."""
    wide = table.astype(np.float64)
    found = np.searchsorted((wide[:-1] + wide[1:]) / 2, given.reshape(-1))
    return found.astype(np.uint8).reshape(given.shape)


def _weights(importance: Array | None, shape: tuple[int, ...]) -> Floats | None:
    if importance is None:
        return None
    weights = np.broadcast_to(np.asarray(importance, np.float64), shape).reshape(-1)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("importance is 0 or more, and finite")
    return weights if weights.any() else None  # of nothing at all: all the same


@dataclass(frozen=True)
class _Line:
    """Distinct numbers, ascending, and sums over prefixes: of weights, of weighted numbers."""

    numbers: Floats
    mass: Floats
    moment: Floats

    @staticmethod
    def of(flat: Array, weights: Floats | None) -> _Line:
        if weights is None:
            numbers, counts = np.unique(flat, return_counts=True)
            mass: Floats = counts.astype(np.float64)
        else:
            numbers, place = np.unique(flat, return_inverse=True)
            mass = np.bincount(place, weights, len(numbers)).astype(np.float64)
        return _Line.summed(numbers.astype(np.float64), mass)

    @staticmethod
    def summed(numbers: Floats, mass: Floats) -> _Line:
        return _Line(numbers, _prefix(mass), _prefix(mass * numbers))

    @property
    def weights(self) -> Floats:
        """Of each number."""
        return np.diff(self.mass)

    def where(self, kept: NDArray[np.bool_]) -> _Line:
        """Only some of the numbers."""
        return self if kept.all() else _Line.summed(self.numbers[kept], self.weights[kept])

    def means(self, bounds: NDArray[np.int64], otherwise: Floats | float = np.nan) -> Floats:
        """Of the numbers between two bounds each; `otherwise` where there are none."""
        mass, moment = np.diff(self.mass[bounds]), np.diff(self.moment[bounds])
        return np.where(mass > 0, moment / np.where(mass > 0, mass, 1), otherwise)


def _prefix(terms: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(terms)])


def _divided(line: _Line, entries: int) -> NDArray[np.float32]:
    """Entries of least squared error, rounded to float32: two of them may become one."""
    if len(line.numbers) <= entries:
        return line.numbers.astype(np.float32)
    exact = max(EXACT, _FINE * entries)
    if len(line.numbers) <= exact:
        centres = line.means(_cheapest(line, entries))
    else:
        cuts = _split(line, _even(line, exact // 2), exact // 2)
        coarse = _Line.summed(line.means(cuts), np.diff(line.mass[cuts]))
        centres = line.means(cuts[_cheapest(coarse, min(entries, len(cuts) - 1))])
        centres = _lloyd(line, centres[np.isfinite(centres)])
    return np.unique(centres[np.isfinite(centres)].astype(np.float32))


def _even(line: _Line, count: int) -> NDArray[np.int64]:
    """Bounds of at most `count` ranges that lose about as much each.

    Their number is about as the cube root of the density (Panter and Dite, Proc. IRE 39, 1951), so
    that most are where most numbers are, yet enough where few are.
    """
    numbers, ranks = line.numbers, np.linspace(0, line.mass[-1], 2 * count + 1)
    by_rank = numbers[np.minimum(np.searchsorted(line.mass[1:], ranks), len(numbers) - 1)]
    by_value = np.linspace(numbers[0], numbers[-1], 2 * count + 1)  # far from most there are few
    knots = np.unique(np.concatenate([by_rank, by_value]))
    share = np.diff(line.mass[np.searchsorted(numbers, knots)])
    steps = _prefix(_root(share) * np.sqrt(np.diff(knots)) * _eighth(np.diff(knots)))
    goal = knots[np.searchsorted(steps, np.linspace(0, steps[-1], count + 1)[1:-1])]
    inner = np.searchsorted(numbers, goal)
    return np.unique(np.concatenate([[0], inner, [len(line.numbers)]]))


def _split(line: _Line, cuts: NDArray[np.int64], more: int) -> NDArray[np.int64]:
    """Divide ranges that lose most at their means, `more` in all: those that hold outliers."""
    square = _prefix(line.weights * line.numbers**2)
    for _ in range(_ROUNDS):
        means = line.means(cuts)
        lost = np.diff(square[cuts]) - means * np.diff(line.moment[cuts])
        worst = np.argsort(-lost, kind="stable")[: more // _ROUNDS]
        cuts = np.unique(np.append(cuts, np.searchsorted(line.numbers, means[worst])))
    return cuts


def _root(x: Floats) -> Floats:
    """x ** (3/8), by square roots: those are rounded alike on every machine, cube roots are not."""
    return np.sqrt(np.sqrt(x)) * _eighth(x)


def _eighth(x: Floats) -> Floats:
    return np.sqrt(np.sqrt(np.sqrt(x)))


def _lloyd(line: _Line, centres: Floats) -> Floats:
    """Means of what is nearest, until that no longer changes."""
    before: Array | None = None
    for _ in range(_STEPS):
        inner = np.searchsorted(line.numbers, (centres[:-1] + centres[1:]) / 2)
        bounds = np.concatenate([[0], inner, [len(line.numbers)]])
        if before is not None and np.array_equal(bounds, before):
            break
        before, centres = bounds, line.means(bounds, centres)
    return centres


def _cheapest(line: _Line, clusters: int) -> NDArray[np.int64]:
    """Bounds [clusters + 1] of the division with least squared error."""
    size, total = len(line.numbers), line.mass
    away = line.numbers - line.moment[-1] / total[-1]  # sums of squares cancel far from zero
    moment, square = _prefix(line.weights * away), _prefix(line.weights * away**2)

    def cost(first: Array, end: Array) -> Floats:
        mass, part = total[end] - total[first], moment[end] - moment[first]
        return square[end] - square[first] - part**2 / np.where(mass > 0, mass, 1)

    ends = np.arange(size + 1)
    best = cost(np.zeros_like(ends), ends)
    starts = np.zeros((clusters, size + 1), np.int64)
    for cluster in range(1, clusters):
        best, starts[cluster] = _with_one_more(best, cost)
    bounds = np.empty(clusters + 1, np.int64)
    bounds[-1] = size
    for cluster in range(clusters - 1, -1, -1):
        bounds[cluster] = starts[cluster, bounds[cluster + 1]]
    return bounds


def _with_one_more(
    best: Floats, cost: Callable[[Array, Array], Floats]
) -> tuple[Floats, NDArray[np.int64]]:
    """The least error up to each end with one more cluster, and where that one starts.

    A later end never has an earlier start: ends in the middle of two that are settled have their
    starts between those of the two. All middles of one width are settled at once.
    """
    last = len(best) - 1
    found, starts = np.zeros_like(best), np.zeros(len(best), np.int64)
    width = 1 << last.bit_length()
    while width:
        ends = np.arange(width, last + 1, 2 * width)
        low = starts[ends - width]
        after = np.minimum(ends + width, last)
        high = np.where(ends + width <= last, starts[after], ends)
        high = np.maximum(np.minimum(high, ends), low)
        found[ends], starts[ends] = _least(best, cost, ends, low, high)
        width //= 2
    return found, starts


def _least(
    best: Floats, cost: Callable[[Array, Array], Floats], ends: Array, low: Array, high: Array
) -> tuple[Floats, NDArray[np.int64]]:
    """For each end the least error over the starts from `low` to `high`, and the first such."""
    counts = high - low + 1
    if not len(ends):
        return np.empty(0), np.empty(0, np.int64)
    heads = np.cumsum(counts) - counts
    first = np.arange(counts.sum()) + np.repeat(low - heads, counts)
    errors = best[first] + cost(first, np.repeat(ends, counts))
    least = np.minimum.reduceat(errors, heads)
    reached = np.where(errors == np.repeat(least, counts), first, len(best))
    return least, np.minimum.reduceat(reached, heads)
