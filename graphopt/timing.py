"""Which of several models is faster here, and how sure is that: paired, interleaved timing.

Three things spoil a naive comparison on an ordinary machine, each several per cent large:

* the machine drifts (clock, neighbours), so the models are timed in turn, in random order, within
  short rounds, and only ratios within a round are used;
* two sessions of the very same file differ, because their memory landed elsewhere, and stay
  different for as long as they live. So a measurement is made of blocks; every block loads each
  model afresh, in a new order, and counts as **one** observation however many rounds it has;
* disturbances are bursts, not a normal distribution. So a block is summarised by the median of its
  rounds, and blocks by ranks (Hodges-Lehmann estimate, Wilcoxon signed-rank interval: Hollander,
  Wolfe and Chicken, Nonparametric Statistical Methods, chapter 3), which is exact for any number
  of blocks when a disturbance is as likely to hit either model.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import UsageError
from graphopt.runtime import Feed, Level, Session

Times = NDArray[np.float64]
"""One block: milliseconds per run, shape (rounds, models)."""

CONFIDENCE = 0.99
MAX_BLOCKS = 60
MIN_BLOCKS = 5  # of a model whose loading alone uses up the time
RANK_BLOCKS = 8  # the fewest from which ranks give 99 %: 2 / 2**8 < 0.01
MIN_ROUNDS = 5
BATCH_SECONDS = 0.5e-3  # runs are timed in batches of at least this, against the timer's own cost
WARM_SECONDS = 10e-3
WARM_RUNS = 3  # the first plans the memory, the second allocates the plan


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run of one model: median and quartiles over all rounds."""

    ms: float
    low: float
    high: float

    @property
    def iqr(self) -> float:
        """The interquartile range, in milliseconds."""
        return self.high - self.low


@dataclass(frozen=True)
class Ratio:
    """time(reference) / time(model) with its confidence interval; above 1 the model is faster."""

    median: float
    low: float
    high: float

    @property
    def significantly_faster(self) -> bool:
        """The whole interval lies above 1."""
        return self.low > 1

    @property
    def significantly_slower(self) -> bool:
        """The whole interval lies below 1."""
        return self.high < 1

    @property
    def half_width(self) -> float:
        """Half the interval's length relative to the ratio: 0.02 is plus or minus 2 %."""
        return (self.high - self.low) / (2 * self.median)


@dataclass(frozen=True)
class PairedTiming:
    """What `time_paired` measured; `ratios[i]` is of `models[0]` to `models[i]`, so `[0]` is 1."""

    models: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    blocks: int
    runs: int
    """Timed runs of each model."""
    confidence: float = CONFIDENCE


def time_paired(
    models: Sequence[Path | bytes],
    feed: Feed,
    *,
    threads: int = 0,
    seconds: float = 20.0,
    blocks: int | None = None,
    seed: int = 0,
    optimizations: Level = "default",
    custom_ops: Sequence[Path] = (),
    progress: Callable[[float], None] | None = None,
) -> PairedTiming:
    """Time models on one feed, all loaded at once and run in turn.

    `seconds` is what the whole measurement should take, loading included; it takes longer for
    models that load slowly, since at least 5 fresh sessions of each are needed. `blocks` fixes
    their number (at least 2) instead. `seed` decides all orders. `progress` is called with the
    share done, 0 to 1. Raises RuntimeFailure if a model does not load or run.
    """
    if not models or (blocks is not None and blocks < 2):
        raise UsageError("timing needs at least one model and two blocks")
    rng = random.Random(seed)
    report = progress or (lambda share: None)

    def load(index: int) -> Session:
        model = models[index]
        return Session(model, threads=threads, optimizations=optimizations, custom_ops=custom_ops)

    measured: list[Times] = []
    plan = _Plan(seconds, blocks)
    runs = 0
    order = list(range(len(models)))
    while not plan.done(len(measured)):
        # The session loaded first is placed differently from the second: a block in one order is
        # followed by a block in the opposite order.
        order = order[::-1] if len(measured) % 2 else rng.sample(order, len(order))
        with _Block(load, feed, order, rng) as block:
            plan.loaded(block)
            measured.append(block.time(plan.rounds, rng))
            runs += plan.rounds * block.batch
        report(plan.share(len(measured)))
    report(1.0)
    return summarise(measured, runs=runs)


class _Block:
    """A fresh session of every model, warmed up in the order of loading."""

    def __init__(
        self, load: Callable[[int], Session], feed: Feed, order: Sequence[int], rng: random.Random
    ) -> None:
        started = time.perf_counter()
        self.sessions: list[Session] = []
        self.calls: list[Callable[[], Any]] = [_nothing] * len(order)
        # Odd amounts of memory kept between the sessions: without them the allocator hands the
        # memory of the last block's sessions to this block's, and they would not be independent.
        self.ballast: list[bytearray] = []
        try:
            for index in order:
                self.ballast += [bytearray(rng.randrange(1, 1 << 18)) for _ in range(4)]
                session = load(index)
                self.sessions.append(session)
                session.run(feed)  # turns an error into a RuntimeFailure
                self.calls[index] = session.bind(feed)
            slowest = max(_warm_up(self.calls[index]) for index in order)
            fastest = min(_warm_up(self.calls[index]) for index in order)
        except BaseException:
            self.close()
            raise
        self.batch = max(1, math.ceil(BATCH_SECONDS / fastest))
        self.setup_seconds = time.perf_counter() - started
        self.round_seconds = slowest * self.batch * len(order)

    def time(self, rounds: int, rng: random.Random) -> Times:
        """Milliseconds per run, shape (rounds, models), in a new random order every round."""
        result = np.empty((rounds, len(self.calls)))
        order = list(range(len(self.calls)))
        repeat = range(self.batch)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for row in result:
                rng.shuffle(order)
                for index in order:
                    call = self.calls[index]
                    started = time.perf_counter()
                    for _ in repeat:
                        call()
                    row[index] = time.perf_counter() - started
        finally:
            if collecting:
                gc.enable()
        return result * (1000 / self.batch)

    def close(self) -> None:
        self.calls = []
        for session in self.sessions:
            session.close()

    def __enter__(self) -> _Block:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nothing() -> None:
    pass


def _warm_up(call: Callable[[], Any]) -> float:
    """Run until warm and return the seconds of one run."""
    started = time.perf_counter()
    for done in itertools.count(1):
        call()
        spent = time.perf_counter() - started
        if done >= WARM_RUNS and spent >= WARM_SECONDS:
            return spent / done
    raise AssertionError


class _Plan:
    """How many blocks, of how many rounds: as many fresh sessions as the time allows.

    Blocks are what narrows the interval, so a block runs about as long as it took to load, and
    not longer, unless there is time left over at the largest number of blocks.
    """

    def __init__(self, seconds: float, blocks: int | None) -> None:
        self.seconds, self.blocks = seconds, blocks
        self.started = time.perf_counter()
        self.rounds = 0
        self.most = blocks or MAX_BLOCKS

    def loaded(self, block: _Block) -> None:
        if self.rounds == 0:
            share = self.seconds / self.most
            if self.blocks is None:
                share = min(max(share, 2 * block.setup_seconds), self.seconds / RANK_BLOCKS)
            self.rounds = max(
                MIN_ROUNDS, int((share - block.setup_seconds) / max(block.round_seconds, 1e-6))
            )

    def done(self, measured: int) -> bool:
        if self.blocks is not None:
            return measured >= self.blocks
        if measured < MIN_BLOCKS:
            return False
        spent = time.perf_counter() - self.started
        return measured >= self.most or spent * (measured + 1) / measured > self.seconds

    def share(self, measured: int) -> float:
        if self.blocks is not None:
            return measured / self.blocks
        spent = time.perf_counter() - self.started
        by_time = min(spent / self.seconds, measured / MIN_BLOCKS)
        return min(1.0, max(by_time, measured / self.most))


def summarise(
    blocks: Sequence[Times], *, runs: int, confidence: float = CONFIDENCE
) -> PairedTiming:
    """The statistics of measured blocks (at least 2), each of shape (rounds, models) in ms."""
    every = np.concatenate(blocks)
    timings = tuple(
        Timing(*(float(q) for q in np.quantile(column, [0.5, 0.25, 0.75]))) for column in every.T
    )
    ratios = [Ratio(1.0, 1.0, 1.0)]
    for index in range(1, every.shape[1]):
        logs = [float(np.median(np.log(b[:, 0] / b[:, index]))) for b in blocks]
        middle, low, high = centre(np.array(logs), confidence)
        ratios.append(Ratio(math.exp(middle), math.exp(low), math.exp(high)))
    return PairedTiming(timings, tuple(ratios), len(blocks), runs, confidence)


def centre(values: Times, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """The centre of independent, symmetrically distributed values, with its interval.

    Hodges-Lehmann estimate and Wilcoxon signed-rank interval; with too few values for ranks to
    reach this confidence, mean and Student's t interval. Needs at least 2 values.
    """
    n = len(values)
    if 2 / 2.0**n > 1 - confidence:
        from scipy.special import stdtrit  # scipy.stats takes much longer to import

        reach = stdtrit(n - 1, (1 + confidence) / 2) * values.std(ddof=1) / math.sqrt(n)
        mean = float(values.mean())
        return mean, float(mean - reach), float(mean + reach)
    i, j = np.triu_indices(n)
    averages = np.sort((values[i] + values[j]) / 2)
    skip = _signed_rank_quantile(n, (1 - confidence) / 2)
    return float(np.median(averages)), float(averages[skip]), float(averages[-1 - skip])


def _signed_rank_quantile(n: int, tail: float) -> int:
    """How many averages may be cut from each end: the largest k with P(rank sum <= k) <= tail.

    The signed-rank statistic of n values is a sum of the ranks 1..n, each in or out with
    probability 1/2.
    """
    probability = np.zeros(n * (n + 1) // 2 + 1)
    probability[0] = 1.0
    for rank in range(1, n + 1):
        taken = np.zeros_like(probability)
        taken[rank:] = probability[:-rank]
        probability = (probability + taken) / 2
    below = np.cumsum(probability)
    return int(np.searchsorted(below, tail, side="right")) - 1
