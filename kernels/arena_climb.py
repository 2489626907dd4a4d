"""Better orders by small changes: buffers at the peak of a plan come before some neighbours.

As in the hill climbing of TVM's memory planner. For problems of any size: only what comes after a
change in the order is placed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from graphopt.kernels.arena import Ints, Problem, Solution, lower_bound
from graphopt.kernels.arena_greedy import Placed, Placing, best_fit, place

_WORSE: Final = 0.004  # of the height: how much worse is taken in one of e cases


def climb(
    problem: Problem,
    order: Ints,
    *,
    deadline: float = math.inf,
    steps: float = math.inf,
    seed: int = 0,
    placing: Placing = best_fit,
    stopped: Callable[[int], bool] = lambda height: False,
) -> Solution:
    """The best plan on a walk from an order [n], the first included.

    Ends at the lower bound, after `steps` plans, at `deadline` (of the monotonic clock, looked at
    after each plan), or when `stopped`, which is asked with the least height so far.
    """
    rng = np.random.default_rng(seed)
    order = order[problem.present[order]]
    offsets = place(problem, order, placing)
    height = _height(problem, offsets)
    best, least = offsets, height
    bound = lower_bound(problem)
    done = 0
    while least > bound and done < steps and time.monotonic() < deadline and not stopped(least):
        done += 1
        changed, start = _changed(problem, order, offsets, rng)
        found = _placed_from(problem, changed, start, offsets, placing)
        top = _height(problem, found)
        if top <= height or rng.random() < math.exp((height - top) / (_WORSE * height)):
            order, offsets, height = changed, found, top
            if top < least:
                best, least = found, top
    return Solution.of(problem, best)


def _height(problem: Problem, offsets: Ints) -> int:
    return int(((offsets + problem.size) * problem.present).max(initial=0))


def _changed(
    problem: Problem, order: Ints, offsets: Ints, rng: np.random.Generator
) -> tuple[Ints, int]:
    """A buffer at the peak, or one below it, before or in the place of an earlier neighbour.

    And the first position that is another one.
    """
    tops = offsets[order] + problem.size[order]
    at = int(rng.choice(np.flatnonzero(tops == tops.max())))
    for _ in range(int(rng.integers(3))):
        at = _neighbour(problem, order[: at + 1], rng)
    earlier = _neighbour(problem, order[: at + 1], rng)
    changed = order.copy()
    if rng.random() < 0.5:
        changed[[earlier, at]] = order[[at, earlier]]
    else:
        changed[earlier + 1 : at + 1] = order[earlier:at]
        changed[earlier] = order[at]
    return changed, earlier


def _neighbour(problem: Problem, order: Ints, rng: np.random.Generator) -> int:
    """The position of a buffer that is in use beside the last one; of any if there is none."""
    last, others = order[-1], order[:-1]
    beside = problem.lower[others] < problem.upper[last]
    beside &= problem.upper[others] > problem.lower[last]
    near = np.flatnonzero(beside)
    return int(rng.choice(near)) if len(near) else int(rng.integers(len(order)))


def _placed_from(
    problem: Problem, order: Ints, start: int, offsets: Ints, placing: Placing
) -> Ints:
    """Offsets [n] of an order whose first `start` buffers are where they were."""
    placed = Placed(len(order))
    kept = order[:start]
    kept = kept[np.argsort(offsets[kept], kind="stable")]
    low = offsets[kept]
    placed.table[:, :start] = (
        low,
        low + problem.size[kept],
        problem.lower[kept],
        problem.upper[kept],
    )
    placed.count = start
    return place(problem, order[start:], placing, placed, offsets)
