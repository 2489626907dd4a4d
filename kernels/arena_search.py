"""The best plan in a given time: greedy ones, then exact searches in many orders, or a climb.

Whether an exact search ends soon depends on luck with its order, so many are tried, each with few
nodes, then with more; in turns at the bound, which often is the optimum even where it looks far
away, and half way between it and the best plan so far.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from graphopt.kernels import arena_exact, arena_greedy
from graphopt.kernels.arena import Ints, Problem, Solution, lower_bound
from graphopt.kernels.arena_climb import climb
from graphopt.kernels.arena_exact import Limits, Whole, within

EXACT: Final = "exact"
CLIMB: Final = "climb"
ALL: Final = (*arena_greedy.STRATEGIES, EXACT, CLIMB)

_FIRST: Final = 3  # nodes per buffer in the first round of exact searches
_GROWTH: Final = 4  # of these from round to round; fewer for other hopes and orders with noise
_SHARE: Final = 0.4  # of the way from what is hoped for to the best plan: what is tried for
_EASIER: Final = 0.6  # of the share, after a plan was found
_HARDER: Final = 0.8  # of the rest of the way, after none was
_NOISE: Final = 0.15
_PLACED: Final = 5e-5, 4e-9  # seconds that a node takes, and for each section of each buffer
_ALWAYS: Final = 2  # greedy strategies that are tried whatever the time
_MOVES: Final = 200  # of a climb, per buffer, before it begins anew


class _Attempt(NamedTuple):
    order: str
    noise: float
    nodes: int
    hopeful: bool  # for what is hoped for, or for something between it and the best plan


@dataclass
class _State:
    """What is known so far; shared with other processes through `peer`, the least height of any."""

    problem: Problem
    best: Solution
    least: int  # no plan is lower
    goal: int  # a lower plan is not asked for
    seconds: float
    deadline: float
    steps: float
    peer: Any = None
    taken: int = 0

    def height(self) -> int:
        return min(self.best.height, self.peer.value) if self.peer else self.best.height

    def keep(self, plan: Solution) -> None:
        if plan.height < self.best.height:
            self.best = plan
        if self.peer:
            with self.peer.get_lock():
                self.peer.value = min(self.peer.value, plan.height)

    def reached(self) -> bool:
        return self.height() <= max(self.goal, self.least)

    def over(self) -> bool:
        return self.reached() or self.taken >= self.steps or time.monotonic() > self.deadline


def solve(
    problem: Problem,
    *,
    seconds: float,
    capacity: int | None = None,
    strategies: Sequence[str] = ALL,
    seed: int = 0,
    processes: int = 1,
    steps: float = math.inf,
) -> Solution:
    """The lowest plan that is found in about `seconds`, by the named strategies of `ALL`.

    Ends at once when no plan can be lower, or when the plan fits `capacity` bytes. The first two
    greedy strategies run whatever the time. With one process, equal seeds give equal plans
    where `steps` (nodes of searches, plans of a climb) end it rather than the time. Each further
    process starts an interpreter; scripts then need `if __name__ == "__main__"`. Raises ValueError
    for an unknown strategy.
    """
    start = time.monotonic()
    unknown = [name for name in strategies if name not in ALL]
    if unknown:
        raise ValueError(f"no strategy is called {unknown[0]!r}; there are {', '.join(ALL)}")
    bound = lower_bound(problem)
    plan = arena_greedy.separate(problem)
    state = _State(problem, plan, bound, capacity or 0, seconds, start + seconds, steps)
    for number, name in enumerate(n for n in strategies if n in arena_greedy.STRATEGIES):
        if not state.reached() and (number < _ALWAYS or not state.over()):
            state.keep(arena_greedy.STRATEGIES[name](problem))
    names = [name for name in strategies if name in (EXACT, CLIMB)]
    if processes > 1 and names and not state.over():
        return _together(state, names, seed, processes)
    _searched(state, names, seed, 0, 1)
    return state.best


def _searched(state: _State, names: Sequence[str], seed: int, index: int, count: int) -> None:
    """Exact searches where they fit memory and time, else a climb; `index` of `count` processes."""
    whole = Whole(state.problem, arena_exact.ORDERS[0])
    node = _PLACED[0] + _PLACED[1] * int((whole.last - whole.first).sum())
    quick = len(whole.used) * node < state.seconds or CLIMB not in names
    if EXACT in names and whole.tractable and quick:
        _exact(state, seed, index, count)
    elif CLIMB in names:
        _climbed(state, seed + index)


# -- exact searches --------------------------------------------------------------------------------


def _attempts(buffers: int, index: int, count: int) -> Iterator[_Attempt]:
    """Without end, in rounds: each order as it is, then for less, and with noise."""
    nodes, turn = _FIRST * buffers, 0
    while True:
        for order in arena_exact.ORDERS:
            turn += 1
            if turn % count == index:
                few = max(nodes // _GROWTH, buffers + buffers // 2)
                yield _Attempt(order, 0.0, nodes, True)
                yield _Attempt(order, 0.0, few, False)
                yield _Attempt(order, _NOISE, few, False)
                yield _Attempt(order, _NOISE, few, True)
        nodes *= _GROWTH


def _exact(state: _State, seed: int, index: int, count: int) -> None:
    attempts = _attempts(len(state.problem), index, count)
    share = _SHARE
    for number, attempt in enumerate(attempts):
        if state.over():
            return
        whole = Whole(state.problem, attempt.order, attempt.noise, seed + count * number + index)
        hoped = max(state.goal, state.least)
        span = (state.height() - whole.unit - hoped) // whole.unit
        target = hoped + (0 if attempt.hopeful else int(span * share) * whole.unit)
        nodes = min(attempt.nodes, state.steps - state.taken)
        found = within(whole, target, Limits(nodes, state.deadline, state.reached))
        state.taken += found.nodes + 1
        if not attempt.hopeful:
            share = share * _EASIER if found.offsets is not None else 1 - (1 - share) * _HARDER
        if found.offsets is not None:
            state.keep(Solution.of(state.problem, found.offsets))
        elif found.certain:
            state.least = max(state.least, (target // whole.unit + 1) * whole.unit)


# -- climbs ----------------------------------------------------------------------------------------


def _climbed(state: _State, seed: int) -> None:
    """From one order after another, the best of them first."""
    problem = state.problem
    orders: list[tuple[int, str, Ints]] = []
    for name, order in arena_greedy.ORDERS.items():
        if state.over():
            break
        made = order(problem)
        plan = Solution.of(problem, arena_greedy.place(problem, made, arena_greedy.best_fit))
        state.keep(plan)
        orders.append((plan.height, name, made))
    orders.sort(key=lambda entry: entry[:2])
    number = 0
    while orders and not state.over():
        moves = min(_MOVES * len(problem), state.steps - state.taken)
        plan = climb(
            problem,
            orders[number % len(orders)][2],
            deadline=state.deadline,
            steps=moves,
            seed=seed + 1000 * number,
            stopped=lambda height: min(height, state.height()) <= max(state.goal, state.least),
        )
        state.taken += int(min(moves, state.steps)) + 1
        state.keep(plan)
        number += 1


# -- several processes -----------------------------------------------------------------------------


def _together(state: _State, names: Sequence[str], seed: int, processes: int) -> Solution:
    """The same in each process, at other attempts, until one of them reaches what is hoped for."""
    context = multiprocessing.get_context("spawn")
    state.peer = context.Value("q", state.best.height)
    ends: list[tuple[Any, Connection]] = []
    for index in range(1, processes):
        here, there = context.Pipe(duplex=False)
        until = time.time() + state.deadline - time.monotonic()
        given = state.problem, state.goal, state.seconds, until, state.steps, state.peer
        other = context.Process(
            target=_worker, args=(given, names, seed, index, processes, there), daemon=True
        )
        other.start()
        there.close()
        ends.append((other, here))
    _searched(state, names, seed, 0, processes)
    best = state.best
    for other, here in ends:
        found: Solution = here.recv()
        best = min(best, found, key=lambda plan: plan.height)
        other.join()
    return best


def _worker(
    given: tuple[Any, ...], names: Sequence[str], seed: int, index: int, count: int, end: Connection
) -> None:
    problem, goal, seconds, until, steps, peer = given
    deadline = time.monotonic() + until - time.time()
    plan = arena_greedy.separate(problem)
    state = _State(problem, plan, lower_bound(problem), goal, seconds, deadline, steps, peer)
    _searched(state, names, seed, index, count)
    end.send(state.best)
