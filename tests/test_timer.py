"""The timer of regions: classes are measured once, and the budget holds, on a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import timer as module
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.timer import Timer
from graphopt.timing import PairedTiming, Ratio, Timing
from tests import graphs
from tests.graphs import node, value


def variant(op: str, name: str = "x", seed: int = 0, size: int = 4) -> onnx.ModelProto:
    weight = graphs.weight("w", (size,), seed)
    nodes = [node(op, [name, "w"], ["y"])]
    return graphs.model(nodes, [value(name, (size,))], ["y"], [weight])


FEED = {"x": np.zeros(4, np.float32)}


class Measurements:
    """Stands for `time_paired`: takes the time it is given."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[float] = []
        self.slower = 1.0
        self.fail = False

    def __call__(
        self,
        models: list[bytes],
        feed: Any,
        *,
        threads: int,
        seconds: float,
        seed: int,
        progress: Callable[[float], None],
    ) -> PairedTiming:
        self.asked.append(seconds)
        self.now += seconds * self.slower
        if self.fail:
            raise RuntimeFailure("no")
        progress(0.5)
        progress(1.0)
        timings = tuple(Timing(1.0, 1.0, 1.0) for _ in models)
        return PairedTiming(timings, tuple(Ratio(1, 1, 1) for _ in models), 8, len(self.asked))


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> Measurements:
    made = Measurements()
    monkeypatch.setattr(module, "time_paired", made)
    monkeypatch.setattr("graphopt.timer.time.perf_counter", lambda: made.now)
    return made


def test_a_class_is_measured_once(paired: Measurements) -> None:
    timer = Timer(seconds=30, expected=3)
    first = timer.time([variant("Add"), variant("Mul")], FEED)
    again = [variant("Add", "other", 1), variant("Mul", "other", 2)]
    assert timer.time(again, {"other": FEED["x"]}) is first
    assert timer.time([variant("Mul"), variant("Add")], FEED) is not first
    assert timer.time([variant("Add"), variant("Mul")], {"x": np.zeros((2, 4), np.float32)})
    assert len(paired.asked) == 3


def test_classes_share_the_time(paired: Measurements) -> None:
    shares: list[float] = []
    timer = Timer(seconds=30, expected=3, progress=shares.append)
    for op in ("Add", "Mul", "Sub"):
        assert timer.time([variant(op)], FEED) is not None
    assert paired.asked == [10, 10, 10]
    assert timer.left == 0
    assert timer.time([variant("Div")], FEED) is None  # nothing is left
    assert timer.time([variant("Add")], FEED) is not None  # but what is known is known
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (pytest.approx(1 / 6), 1.0)


def test_what_takes_longer_is_taken_from_the_others(paired: Measurements) -> None:
    timer = Timer(seconds=30, expected=3)
    paired.slower = 2.0
    timer.time([variant("Add")], FEED)
    paired.slower = 1.0
    timer.time([variant("Mul")], FEED)
    timer.time([variant("Sub")], FEED)
    assert paired.asked == [10, 5, 5]


def test_a_failure_costs_time_and_is_not_remembered(paired: Measurements) -> None:
    timer = Timer(seconds=30, expected=3)
    paired.fail = True
    with pytest.raises(RuntimeFailure):
        timer.time([variant("Add")], FEED)
    assert (timer.left, timer.measured) == (20, {})


def test_no_time_is_an_error() -> None:
    with pytest.raises(UsageError):
        Timer(seconds=0)
    with pytest.raises(UsageError):
        Timer(expected=0)


def test_a_real_measurement() -> None:
    timer = Timer(threads=1, seconds=0.05)
    found = timer.time([variant("Add"), variant("Mul")], FEED)
    assert found is not None
    assert len(found.models) == 2
    assert timer.spent > 0
    assert timer.time([variant("Add", seed=5), variant("Mul")], FEED) is found
