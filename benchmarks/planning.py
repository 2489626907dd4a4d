"""How near to the bound are plans of buffers in one arena, by strategy, and in what time?

    python benchmarks/planning.py [--seconds 2] [--long 60] [--processes 2]

Sets of benchmarks/data/planning: minimalloc's challenging ones, idealloc's of networks. Per set:
the bound (the largest live sum), the height of every strategy over it, and of `solve` in
`--seconds` with one process; for minimalloc's sets also the seconds that `solve` takes, within
`--long`, to reach the published capacity and then the bound. Every plan is checked pair by pair.
Writes benchmarks/results/planning.md; exit 1 where a number is worse than what is claimed there.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from graphopt.kernels.arena import Buffer, Problem, Solution, check, lower_bound
from graphopt.kernels.arena_greedy import STRATEGIES
from graphopt.kernels.arena_search import solve

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "planning"
RESULTS = HERE / "results" / "planning.md"
MEAN = 1.15  # of solve over the bound, on minimalloc's sets
NETWORKS = 1.01  # of solve over the bound, on idealloc's sets
SOLVED = 8  # of minimalloc's sets at their capacity
HEAD = """# Plans of buffers with lifetimes in one arena

Heights over the bound, which is the largest live sum and not always possible. Greedy strategies are
order/placement; `solve` is the search of arena_search.py with one process. Every plan was checked
pair by pair. Written by `python benchmarks/planning.py{flags}`, on two cores that others share.

"""


class Set(NamedTuple):
    name: str
    problem: Problem
    capacity: int | None


class Timed(NamedTuple):
    ratio: float
    height: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.ratio:.4f} ({self.seconds:.2f} s)"


def sets() -> list[Set]:
    """Of minimalloc, with their capacity, then of idealloc."""
    found = []
    for path in sorted(DATA.glob("*.csv*")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        buffers = [
            Buffer(row["id"], int(row["lower"]), int(row["upper"]), int(row["size"]))
            for row in rows
        ]
        name = path.name.removesuffix(".gz").removesuffix(".csv")
        head, _, tail = name.rpartition(".")
        known = tail.isdigit()
        made = Set(head if known else name, Problem(buffers), int(tail) if known else None)
        found.append(made)
    return sorted(found, key=lambda one: one.capacity is None)


def timed(problem: Problem, work: Callable[[Problem], Solution]) -> Timed:
    start = time.monotonic()
    plan = work(problem)
    seconds = time.monotonic() - start
    check(problem, plan)
    return Timed(plan.height / max(lower_bound(problem), 1), plan.height, seconds)


def by_strategy(every: list[Set], seconds: float) -> tuple[list[str], bool]:
    """Lines of a table, and whether the heights are what is claimed."""
    names = list(STRATEGIES)
    lines = [f"| set | buffers | bound | {' | '.join(names)} | solve, {seconds:g} s |"]
    lines.append("|---" * (len(names) + 4) + "|")
    ratios: list[list[float]] = []
    fine = True
    for name, problem, capacity in every:
        found = [timed(problem, STRATEGIES[strategy]) for strategy in names]
        best = timed(problem, partial(solve, seconds=seconds))
        cells = " | ".join(f"{one.ratio:.3f}" for one in found)
        lines.append(f"| {name} | {len(problem)} | {lower_bound(problem)} | {cells} | {best} |")
        print(lines[-1], flush=True)
        if capacity:
            ratios.append([one.ratio for one in (*found, best)])
        else:
            fine &= best.ratio <= NETWORKS
    means = [sum(column) / len(ratios) for column in zip(*ratios, strict=True)]
    lines.append(f"| mean, A to K | | | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    print(lines[-1], flush=True)
    return lines, fine and means[-1] <= MEAN


def at_capacity(every: list[Set], seconds: float, processes: int) -> tuple[list[str], bool]:
    """Lines of a table, and whether as many plans fit as is claimed."""
    lines = [
        f"| set | buffers | capacity / bound | fits after s, {processes} processes "
        f"| at the bound after s, {processes} processes |",
        "|---|---|---|---|---|",
    ]
    fitting = least = 0
    for name, problem, capacity in every:
        if capacity is None:
            continue
        bound = lower_bound(problem)
        cells = []
        for goal in (capacity, bound):
            work = partial(solve, seconds=seconds, capacity=goal, processes=processes)
            found = timed(problem, work)
            fits = found.height <= goal
            fitting += fits and goal == capacity
            least += fits and goal == bound < capacity
            cells.append(f"{found.seconds:.2f}" if fits else f"no: {found.ratio:.4f} of the bound")
            if capacity == bound:
                least += fits
                cells.append("the same")
                break
        row = f"| {name} | {len(problem)} | {capacity / bound:.4f} | {' | '.join(cells)} |"
        lines.append(row)
        print(row, flush=True)
    lines += ["", f"{fitting} fit the capacity, {least} need no more than the bound."]
    print(lines[-1])
    return lines, fitting >= SOLVED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--long", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    every = sets()
    heights, near = by_strategy(every, given.seconds)
    fits, enough = at_capacity(every, given.long, given.processes)
    flags = "".join(f" {flag}" for flag in sys.argv[1:])
    text = HEAD.format(flags=flags) + "\n".join([*heights, "", *fits]) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    return 0 if near and enough else 1


if __name__ == "__main__":
    sys.exit(main())
