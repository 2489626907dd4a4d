"""Plans for buffers in one arena: the check by planted faults, plans by brute force and bounds."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from graphopt.kernels.arena import Buffer, Problem, Solution, check, lower_bound
from graphopt.kernels.arena_greedy import PLACEMENTS, STRATEGIES

DATA = Path(__file__).parents[1] / "benchmarks" / "data" / "planning"
PAPER = [
    (0, 2, 32), (1, 5, 28), (2, 6, 36), (3, 6, 16), (4, 6, 8), (5, 8, 64), (6, 9, 10), (7, 9, 40)
]  # fmt: skip


def problem(rows: list[tuple[int, int, int]], alignment: int = 1) -> Problem:
    return Problem([Buffer(f"b{i}", *row) for i, row in enumerate(rows)], alignment)


def drawn(n: int, times: int, seed: int, sizes: int = 9, longest: int | None = None) -> Problem:
    rng = np.random.default_rng(seed)
    lower = rng.integers(0, times, n)
    upper = lower + rng.integers(1, (longest or times) + 1, n)
    size = rng.integers(1, sizes + 1, n)
    return problem(list(zip(lower.tolist(), upper.tolist(), size.tolist(), strict=True)))


def least(of: Problem) -> int:
    """The least height, by trying all orders: each buffer rests as low as those before it allow.

    Some order of the buffers by their offsets in a best plan leads to a plan as good.
    """
    best = sum(buffer.size for buffer in of.buffers)
    for order in itertools.permutations(of.buffers):
        tops: list[tuple[Buffer, int]] = []
        for b in order:
            under = [t for a, t in tops if a.lower < b.upper and b.lower < a.upper]
            tops.append((b, max(under, default=0) + b.size))
        best = min(best, max(top for _, top in tops))
    return best


# -- the problem and the check ---------------------------------------------------------------------


def test_the_bound_is_the_largest_live_sum() -> None:
    assert lower_bound(problem([(0, 2, 5), (2, 4, 7), (1, 3, 1)])) == 8
    assert lower_bound(problem([(0, 2, 5), (1, 3, 1)], alignment=4)) == 12
    assert lower_bound(problem([])) == 0
    assert lower_bound(problem([(3, 3, 5), (0, 9, 0)])) == 0


@pytest.mark.parametrize(
    ("rows", "alignment", "said"),
    [
        ([(0, 1, -1)], 1, "-1 bytes"),
        ([(2, 1, 4)], 1, "ends before it begins"),
        ([(0, 1, 4)], 0, "alignment of 0"),
    ],
)
def test_impossible_problems_are_named(
    rows: list[tuple[int, int, int]], alignment: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        problem(rows, alignment)


def test_two_buffers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two buffers are called 'x'"):
        Problem([Buffer("x", 0, 1, 1), Buffer("x", 1, 2, 1)])


def test_the_check_finds_every_planted_overlap() -> None:
    """Each pair that is in use together, moved to share one byte, is found and named."""
    of = drawn(14, 9, seed=3)
    plan = STRATEGIES["separate"](of)
    check(of, plan)
    planted = 0
    for a, b in itertools.combinations(of.buffers, 2):
        moved = dict(plan.offsets) | {b.id: plan.offsets[a.id] + a.size - 1}
        others = [c for c in of.buffers if c not in (a, b)]
        alone = Problem([a, b])
        faulty = Solution({i: moved[i] for i in (a.id, b.id)}, plan.height + 9)
        if a.lower < b.upper and b.lower < a.upper:
            planted += 1
            with pytest.raises(ValueError, match=f"'{a.id}' .* '{b.id}'"):
                check(alone, faulty)
            with pytest.raises(ValueError, match=f"'{b.id}'"):
                check(Problem([b, *others, a]), Solution(moved, plan.height + 9))
        else:
            check(alone, faulty)
    assert planted > 30


def test_touching_lifetimes_and_bytes_are_no_overlap() -> None:
    of = problem([(0, 2, 4), (2, 4, 4), (0, 4, 4)])
    check(of, Solution({"b0": 0, "b1": 0, "b2": 4}, 8))


@pytest.mark.parametrize(
    ("offsets", "height", "said"),
    [
        ({"b0": 0}, 16, "'b1' has no offset"),
        ({"b0": 0, "b1": 8, "x": 0}, 16, "no buffer is called 'x'"),
        ({"b0": -8, "b1": 8}, 16, "'b0' begins at -8"),
        ({"b0": 0, "b1": 12}, 32, "'b1' begins at 12: negative or not aligned"),
        ({"b0": 0, "b1": 8}, 12, "'b1' ends above the arena of 12"),
    ],
)
def test_the_check_names_what_is_wrong(offsets: dict[str, int], height: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(problem([(0, 2, 5), (1, 3, 7)], alignment=8), Solution(offsets, height))


def test_the_check_reaches_the_last_of_many_buffers() -> None:
    """More pairs than are compared at once."""
    n = 5000
    of = problem([(i, i + 1, 4) for i in range(n - 1)] + [(n - 2, n, 4)])
    offsets = {f"b{i}": 0 for i in range(n - 1)} | {f"b{n - 1}": 3}
    with pytest.raises(ValueError, match=r"'b4998' .* 'b4999'"):
        check(of, Solution(offsets, 8))


# -- placing in an order ---------------------------------------------------------------------------


def test_the_example_of_the_paper() -> None:
    """Pisarchyk and Lee's network of eight tensors: greedy by size needs 124 bytes."""
    of = problem(PAPER)
    plan = STRATEGIES["size/best"](of)
    check(of, plan)
    assert plan.height == 124
    assert STRATEGIES["separate"](of).height == sum(row[2] for row in PAPER)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("alignment", [1, 8])
def test_plans_are_valid(name: str, alignment: int) -> None:
    for seed in range(12):
        of = Problem(drawn(40, 20, seed, sizes=50, longest=7).buffers, alignment)
        plan = STRATEGIES[name](of)
        check(of, plan)
        assert lower_bound(of) <= plan.height <= int(of.size.sum())
        assert plan == STRATEGIES[name](of)


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_to_place(name: str) -> None:
    assert STRATEGIES[name](problem([])) == Solution(MappingProxyType({}), 0)
    of = problem([(0, 4, 0), (0, 4, 8), (2, 2, 8), (1, 3, 0)])
    plan = STRATEGIES[name](of)
    check(of, plan)
    assert plan.height == 8 or name == "separate"


def test_placements_differ_where_they_should() -> None:
    """Gaps of 5 and of 3 bytes below the top: the first that fits, and the one it fills."""
    starts, tops = np.array([5, 20, 40]), np.array([15, 37, 50])
    assert PLACEMENTS["first"](starts, tops, 3) == 0
    assert PLACEMENTS["best"](starts, tops, 3) == 37
    assert PLACEMENTS["best"](starts, tops, 4) == 0
    assert PLACEMENTS["first"](starts, tops, 6) == PLACEMENTS["best"](starts, tops, 6) == 50


@pytest.mark.parametrize("name", ["size/best", "breadth/first"])
def test_ten_thousand_buffers_take_seconds(name: str) -> None:
    of = drawn(10_000, 8_000, seed=1, sizes=1 << 20, longest=600)
    start = time.process_time()
    plan = STRATEGIES[name](of)
    assert time.process_time() - start < 5
    assert plan.height >= lower_bound(of)
