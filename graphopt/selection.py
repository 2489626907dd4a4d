"""What every search for a lossy choice does alike: feed candidates, judge them, time them.

`search.py` knows nothing of models; here is one model, the data that came with it, the judge of
its candidates and the clock.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from graphopt.data import given_feeds
from graphopt.judging import Budget, Judge, Judged
from graphopt.proposals import first_feed
from graphopt.runtime import Feed, Session
from graphopt.search import Search, Trial, Winner, fastest, race
from graphopt.timing import Ratio

HELD_OUT: Final = 4  # each so-manieth feed
_SECONDS: Final = 5.0  # of each measurement of whole models

Tell = Callable[[str, float | None], None]
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user asked for, whatever the choice is about.

    With `holds_out` some feeds are kept for judging: what is fitted to feeds agrees with the
    original on those better than on any others.
    """

    data: str | None = None
    budget: Budget = field(default_factory=Budget)
    threads: int = 0
    seed: int = 0
    custom_ops: tuple[Path, ...] = ()
    force: bool = False
    holds_out: bool = False


class Selection(Generic[R]):
    """Candidates for one model: `write` makes the file of a recipe in `folder` under a number.

    As a context manager it holds the original, with which candidates are compared.
    """

    def __init__(
        self,
        original: Path,
        lossless: Path,
        asked: Asked,
        tell: Tell,
        write: Callable[[R, int], Path],
    ) -> None:
        self._original = original
        self._lossless = lossless
        self._asked = asked
        self._tell = tell
        self._feed: Feed | None = None
        self._speeds: dict[str, Ratio] = {}  # time(lossless) / time(candidate), by name
        self.judge = Judge(original, self._judged, asked.budget, asked.custom_ops)
        self._search: Search[R] = Search(
            write, self.judge, lambda what: tell(f"trying {what}", None)
        )
        self.try_out = self._search.try_out
        self.repair = self._search.repair

    @property
    def trials(self) -> list[Trial[R]]:
        """All candidates that were tried."""
        return self._search.trials

    @property
    def good(self) -> list[Trial[R]]:
        """Those that are good enough."""
        return [trial for trial in self.trials if trial.verdict.good]

    def feeds(self) -> Iterator[dict[str, Any]]:
        """The feeds to learn from, anew: given ones, or one that is proposed."""
        held = self.holds_out
        return (feed for number, feed in enumerate(self._all()) if not (held and _is_held(number)))

    def _judged(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The feeds to judge by, anew."""
        held = self.holds_out
        found = (feed for number, feed in enumerate(self._all()) if not held or _is_held(number))
        return itertools.islice(found, limit)

    @functools.cached_property
    def holds_out(self) -> bool:
        """True where some feeds are for judging alone: a metric brings its own, few are too few."""
        if not self._asked.holds_out or self._asked.budget.metric is not None:
            return False
        return sum(1 for _ in itertools.islice(self._all(), HELD_OUT)) == HELD_OUT

    def _all(self) -> Iterator[dict[str, Any]]:
        asked = self._asked
        if asked.data is None:
            yield dict(self.proposed())
            return
        with Session(self._original, custom_ops=asked.custom_ops) as session:
            yield from given_feeds(asked.data, session)

    def proposed(self) -> Feed:
        """The feed that models are timed on."""
        if self._feed is None:
            asked = self._asked
            self._feed = first_feed(
                self._original,
                data=asked.data,
                shapes={},
                seed=asked.seed,
                custom_ops=list(asked.custom_ops),
            )
        return self._feed

    def race(self, trials: list[Trial[R]]) -> None:
        """Know how fast these are."""
        new = [trial for trial in trials if trial.name not in self._speeds]
        if new:
            timing = self._timing("timing")
            self._speeds |= race(new, self._lossless, self.proposed(), **timing)

    def speed(self, trial: Trial[R]) -> float:
        """time(lossless) / time(candidate) of one that was raced."""
        return self._speeds[trial.name].median

    def is_timed(self, name: str) -> bool:
        """True where a candidate of this name was raced."""
        return name in self._speeds

    def as_fast(self, trial: Trial[R], other: Trial[R]) -> None:
        """Take one for as fast as another, until they are timed together."""
        self._speeds[trial.name] = self._speeds[other.name]

    def fastest(self, trials: list[Trial[R]]) -> Winner[R]:
        """The fastest of these, timed closely with the original."""
        self.race(trials)
        return fastest(
            trials,
            self._speeds,
            self._original,
            self._lossless,
            self.proposed(),
            **self._timing("timing the fastest"),
        )

    def _timing(self, what: str) -> dict[str, Any]:
        self._tell(what, 0.0)
        return {
            "threads": self._asked.threads,
            "seconds": _SECONDS,
            "custom_ops": self._asked.custom_ops,
            "progress": lambda share: self._tell(what, share),
        }


def _is_held(number: int) -> bool:
    return number % HELD_OUT == HELD_OUT - 1


def least_bad(trials: Iterable[Trial[R]]) -> Trial[R] | None:
    """Of all that run the one that loses least."""
    running = [trial for trial in trials if isinstance(trial.verdict, Judged)]
    return min(running, key=lost, default=None)


def lost(trial: Trial[R]) -> tuple[float, float]:
    """What a candidate loses; of those that agree alike, those with less noise lose less."""
    quality = trial.verdict.quality if isinstance(trial.verdict, Judged) else None
    return trial.verdict.drop, 0.0 if quality is None else quality.noise


def slower(ratios: Mapping[str, Ratio], name: str) -> str:
    """How a candidate compares in time, in words."""
    ratio = ratios[name]
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
