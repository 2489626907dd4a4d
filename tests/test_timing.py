"""Paired timing: its statistics on synthetic timings, its protocol on a clock of our own.

No test here depends on how fast this machine is; benchmarks/self_ratio.py does that.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphopt import timing
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.timing import PairedTiming, Ratio, centre, summarise, time_paired

# ------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("n", "critical"), [(8, 0), (10, 3), (12, 7), (15, 15), (20, 37), (25, 68)]
)
def test_signed_rank_quantile_matches_the_tables(n: int, critical: int) -> None:
    """Two-sided 1 % critical values of the Wilcoxon signed-rank test."""
    assert timing._signed_rank_quantile(n, 0.005) == critical


@pytest.mark.parametrize("n", [8, 9, 11])
def test_signed_rank_quantile_matches_enumeration(n: int) -> None:
    sums = [
        sum(ranks) for k in range(n + 1) for ranks in itertools.combinations(range(1, n + 1), k)
    ]
    largest = timing._signed_rank_quantile(n, 0.005)
    assert np.mean(np.array(sums) <= largest) <= 0.005 < np.mean(np.array(sums) <= largest + 1)


def draws(kind: str, rng: np.random.Generator, n: int) -> Any:
    if kind == "normal":
        return rng.normal(size=n)
    if kind == "heavy":
        return rng.standard_t(2, size=n)
    return np.where(rng.random(n) < 0.1, 10, 1) * rng.normal(size=n)  # bursts


@pytest.mark.parametrize("kind", ["normal", "heavy", "bursts"])
@pytest.mark.parametrize("n", [5, 7, 8, 12, 40])
def test_the_interval_covers_as_often_as_it_says(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = [centre(draws(kind, rng, n)) for _ in range(1500)]
    missed = np.mean([not low <= 0 <= high for _, low, high in intervals])
    assert missed < 0.02
    assert all(low <= middle <= high for middle, low, high in intervals)


def test_ranks_shrug_off_a_burst() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.01, size=20)
    calm = centre(values)
    values[7] = 50.0
    burst = centre(values)
    np.testing.assert_allclose(burst, calm, atol=0.01)


def test_the_interval_follows_shift_scale_and_sign() -> None:
    values = np.random.default_rng(1).normal(size=12)
    for n in (6, 12):
        middle, low, high = centre(values[:n])
        np.testing.assert_allclose(
            centre(3 * values[:n] + 2), [3 * middle + 2, 3 * low + 2, 3 * high + 2]
        )
        np.testing.assert_allclose(centre(-values[:n]), [-middle, -high, -low])


def test_a_wider_confidence_is_wider() -> None:
    values = np.random.default_rng(1).normal(size=12)
    _, low99, high99 = centre(values, 0.99)
    _, low90, high90 = centre(values, 0.90)
    assert low99 < low90 < high90 < high99


def blocks_of(
    rng: np.random.Generator,
    *,
    blocks: int = 12,
    rounds: int = 30,
    true: float = 1.0,
    session: float = 0.03,
    noise: float = 0.05,
) -> list[Any]:
    """Two models whose sessions differ by block, on a machine that drifts and has bursts."""
    result = []
    for _ in range(blocks):
        base = np.exp(rng.normal(0, session, size=2)) * [1.0, 1.0 / true]
        drift = np.exp(np.cumsum(rng.normal(0, 0.02, size=(rounds, 1)), axis=0))
        bursts = np.where(rng.random((rounds, 2)) < 0.05, 3.0, 1.0)
        result.append(5 * base * drift * bursts * np.exp(rng.normal(0, noise, size=(rounds, 2))))
    return result


@pytest.mark.parametrize("blocks", [5, 9, 20])
@pytest.mark.parametrize("true", [1.0, 0.8, 3.0])
def test_summaries_cover_the_true_ratio(blocks: int, true: float) -> None:
    rng = np.random.default_rng(7)
    missed = 0
    for _ in range(300):
        ratio = summarise(blocks_of(rng, blocks=blocks, true=true), runs=1).ratios[1]
        missed += not ratio.low <= true <= ratio.high
    assert missed <= 9  # 3 %


def test_more_rounds_do_not_hide_that_sessions_differ() -> None:
    """Counting rounds as independent would shrink the interval tenfold, and miss the truth."""

    def typical(rounds: int) -> float:
        rng = np.random.default_rng(3)
        made = (summarise(blocks_of(rng, rounds=rounds), runs=1) for _ in range(30))
        return float(np.median([timing.ratios[1].half_width for timing in made]))

    few, many = typical(20), typical(2000)
    assert many > 0.02  # sessions differ by 3 % x sqrt(2), seen 12 times
    assert many > few / 2


def test_a_burst_within_a_block_is_ignored() -> None:
    block = np.full((30, 2), 5.0)
    block[3, 0] = block[17, 0] = 500.0
    ratio = summarise([block] * 8, runs=1).ratios[1]
    assert (ratio.low, ratio.high) == (1.0, 1.0)


def test_summary_fields() -> None:
    block = np.array([[4.0, 2.0, 8.0], [4.4, 2.2, 8.8], [3.6, 1.8, 7.2]])
    summary = summarise([block] * 8, runs=96)
    assert isinstance(summary, PairedTiming)
    assert [t.ms for t in summary.models] == [4.0, 2.0, 8.0]
    assert summary.models[0].iqr == pytest.approx(0.8)
    assert [r.median for r in summary.ratios] == pytest.approx([1.0, 2.0, 0.5])
    assert (summary.blocks, summary.runs, summary.confidence) == (8, 96, 0.99)
    assert summary.ratios[0] == Ratio(1.0, 1.0, 1.0)


def test_significance_is_the_whole_interval() -> None:
    faster, unsure, slower = Ratio(1.1, 1.01, 1.2), Ratio(1.1, 0.99, 1.2), Ratio(0.9, 0.8, 0.99)
    assert [r.significantly_faster for r in (faster, unsure, slower)] == [True, False, False]
    assert [r.significantly_slower for r in (faster, unsure, slower)] == [False, False, True]
    assert Ratio(2.0, 1.9, 2.1).half_width == pytest.approx(0.05)


# -------------------------------------------------------------------------------- protocol


class Machine:
    """A clock that only moves when a fake session loads or runs, and a log of what happened."""

    def __init__(self, costs: list[float], load: float) -> None:
        self.now = 0.0
        self.costs, self.load = costs, load
        self.loaded: list[int] = []
        self.ran: list[int] = []
        self.open = 0
        self.fail = -1
        self.gc: set[bool] = set()

    def session(self, model: bytes, **_: Any) -> FakeSession:
        self.now += self.load
        self.loaded.append(model[0])
        return FakeSession(self, model[0])


class FakeSession:
    def __init__(self, machine: Machine, index: int) -> None:
        self.machine, self.index = machine, index
        machine.open += 1

    def run(self, feed: Any) -> None:
        if len(self.machine.loaded) > self.machine.fail >= 0:
            raise RuntimeFailure("Relu node '' failed")
        self.machine.now += self.machine.costs[self.index]

    def bind(self, feed: Any) -> Callable[[], None]:
        def call() -> None:
            self.machine.now += self.machine.costs[self.index]
            self.machine.ran.append(self.index)
            self.machine.gc.add(gc.isenabled())

        return call

    def close(self) -> None:
        self.machine.open -= 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(costs: list[float], load: float = 0.05) -> Machine:
        made = Machine(costs, load)
        monkeypatch.setattr(timing, "Session", made.session)
        monkeypatch.setattr("graphopt.timing.time.perf_counter", lambda: made.now)
        return made

    return make


MODELS: list[Any] = [bytes([i]) for i in range(4)]


def test_ratios_on_a_perfect_clock(machine: Callable[..., Machine]) -> None:
    fake = machine([0.010, 0.005, 0.020])
    result = time_paired(MODELS[:3], {}, seconds=10)
    assert [t.ms for t in result.models] == pytest.approx([10, 5, 20])
    assert [r.median for r in result.ratios] == pytest.approx([1, 2, 0.5])
    assert result.ratios[1].significantly_faster
    assert result.ratios[2].significantly_slower
    assert fake.open == 0
    assert fake.now <= 11


def test_every_block_loads_fresh_sessions_in_alternating_order(
    machine: Callable[..., Machine],
) -> None:
    fake = machine([0.01] * 3)
    time_paired(MODELS[:3], {}, seconds=1, blocks=8)
    assert len(fake.loaded) == 3 * 8
    orders = [tuple(fake.loaded[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    for first, second in zip(orders[::2], orders[1::2], strict=True):
        assert second == first[::-1]
    assert len(set(orders[::2])) > 1


def test_rounds_are_interleaved_in_random_order(machine: Callable[..., Machine]) -> None:
    fake = machine([0.01, 0.01])
    result = time_paired(MODELS[:2], {}, seconds=20, blocks=2)
    rounds = result.runs // 2
    assert rounds >= 100
    last = fake.ran[-2 * rounds :]
    pairs = [tuple(last[i : i + 2]) for i in range(0, 2 * rounds, 2)]
    assert set(pairs) == {(0, 1), (1, 0)}
    assert 0.3 < pairs.count((0, 1)) / rounds < 0.7


def test_the_seed_decides_the_orders(machine: Callable[..., Machine]) -> None:
    def orders(seed: int) -> tuple[list[int], list[int]]:
        fake = machine([0.01, 0.01, 0.01])
        time_paired(MODELS[:3], {}, seconds=1, blocks=6, seed=seed)
        return fake.loaded, fake.ran

    assert orders(1) == orders(1)
    assert orders(1)[0] != orders(2)[0]
    assert orders(1)[1] != orders(2)[1]


def test_fast_models_are_timed_in_batches(machine: Callable[..., Machine]) -> None:
    fake = machine([2e-5, 4e-5])
    result = time_paired(MODELS[:2], {}, seconds=2, blocks=2)
    assert [t.ms for t in result.models] == pytest.approx([0.02, 0.04])
    batches = [len(list(runs)) for _, runs in itertools.groupby(fake.ran[-1000:])]
    assert min(batches[1:-1]) >= 25  # runs of 20 us in half a millisecond


def test_every_session_is_warmed_up(machine: Callable[..., Machine]) -> None:
    fake = machine([0.001, 0.3])
    result = time_paired(MODELS[:2], {}, seconds=1, blocks=2)
    untimed = [fake.ran.count(index) - result.runs for index in (0, 1)]
    assert untimed[0] >= 2 * 10  # 10 ms
    assert untimed[1] >= 2 * timing.WARM_RUNS


@pytest.mark.parametrize(
    ("cost", "load", "seconds", "least", "most"),
    [
        (0.0001, 0.005, 20, 40, 60),  # loads at once: as many sessions as are useful
        (0.005, 0.1, 20, 20, 60),
        (0.030, 0.5, 20, 8, 20),
        (0.2, 8.0, 20, 5, 5),  # loading alone takes more than the time given
    ],
)
def test_as_many_blocks_as_time_allows(
    machine: Callable[..., Machine],
    cost: float,
    load: float,
    seconds: float,
    least: int,
    most: int,
) -> None:
    fake = machine([cost, cost], load)
    result = time_paired(MODELS[:2], {}, seconds=seconds)
    assert least <= result.blocks <= most
    assert result.runs >= timing.MIN_ROUNDS * result.blocks
    if most > 5:
        assert 0.6 * seconds <= fake.now <= 1.1 * seconds


def test_progress_rises_to_one(machine: Callable[..., Machine]) -> None:
    for blocks in (None, 7):
        machine([0.01, 0.01])
        shares: list[float] = []
        time_paired(MODELS[:2], {}, seconds=3, blocks=blocks, progress=shares.append)
        assert shares == sorted(shares)
        assert 0 < shares[0] < 1
        assert shares[-1] == 1.0


def test_a_failure_closes_every_session(machine: Callable[..., Machine]) -> None:
    fake = machine([0.01, 0.01])
    fake.fail = 5
    with pytest.raises(RuntimeFailure, match="Relu node"):
        time_paired(MODELS[:2], {}, seconds=1, blocks=8)
    assert fake.open == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_collection_while_timing(machine: Callable[..., Machine], enabled: bool) -> None:
    fake = machine([0.01])
    if not enabled:
        gc.disable()
    try:
        time_paired(MODELS[:1], {}, seconds=1, blocks=2)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert False in fake.gc


def test_one_model_has_no_ratio_but_its_own(machine: Callable[..., Machine]) -> None:
    machine([0.01])
    result = time_paired(MODELS[:1], {}, seconds=1)
    assert result.ratios == (Ratio(1.0, 1.0, 1.0),)
    assert result.models[0].ms == pytest.approx(10)


def test_nothing_to_compare_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        time_paired([], {})
    with pytest.raises(UsageError):
        time_paired(MODELS[:1], {}, blocks=1)


def test_real_sessions() -> None:
    """The whole way through onnxruntime, without a word on how long it takes."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    data = model.SerializeToString()
    feed = {"x": np.ones(4, np.float32)}
    result = time_paired([data, data], feed, blocks=2, seconds=0.1, threads=1)
    assert result.blocks == 2
    assert all(t.low <= t.ms <= t.high for t in result.models)
    assert result.ratios[1].low <= result.ratios[1].median <= result.ratios[1].high
    with pytest.raises(RuntimeFailure, match="Required inputs"):
        time_paired([data, data], {}, blocks=2, seconds=0.1)
