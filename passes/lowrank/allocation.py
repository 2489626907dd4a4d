"""How many MACs each layer keeps, so that all of them together lose least.

Errors of layers add up, each taken relative to what its layer gives: of all ways to reach the same
cost the one with the least sum is wanted. It is found on the lower convex hull of each layer's
options, step by step where an error costs least, which is the optimum for every cost it passes
through (Shoham and Gersho, 1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from graphopt.passes.lowrank.options import Option

Table = Mapping[str, Sequence[Option]]
"""Options of each layer by root, the dense one among them."""


def allocate(table: Table, is_enough: Callable[[Mapping[str, Option]], bool]) -> dict[str, Option]:
    """The options that together lose least for what they cost, cheaper ones until it is enough.

    All as cheap as they can be where it never is.
    """
    hulls = {root: hull(options) for root, options in table.items()}
    chosen = {root: steps[0] for root, steps in hulls.items()}
    at = dict.fromkeys(hulls, 0)
    heap = [(_slope(*steps[:2]), root) for root, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(heap)
    while heap and not is_enough(chosen):
        _, root = heapq.heappop(heap)
        at[root] += 1
        steps = hulls[root][at[root] :]
        chosen[root] = steps[0]
        if len(steps) > 1:
            heapq.heappush(heap, (_slope(*steps[:2]), root))
    return chosen


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over cost, the dearest first.

    The first is the best of those that lose least, whatever else is cheaper loses more.
    """
    ordered = sorted(options, key=lambda option: (option.cost, option.error))
    found: list[Option] = []
    for option in ordered:
        if found and option.error >= found[-1].error:
            continue
        while len(found) > 1 and _is_above(found[-2], found[-1], option):
            found.pop()
        found.append(option)
    return found[::-1]


def _is_above(a: Option, b: Option, c: Option) -> bool:
    """True where b lies on the line from a to c or above it; costs ascend."""
    return (b.error - a.error) * (c.cost - a.cost) >= (c.error - a.error) * (b.cost - a.cost)


def _slope(dear: Option, cheap: Option) -> float:
    """The error that one unit of cost is saved for."""
    return (cheap.error - dear.error) / (dear.cost - cheap.cost)
