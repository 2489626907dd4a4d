"""One search for every lossy choice: whole candidates, judged first and then timed together.

Candidates are whole models. Each is judged against the original on data; one that is not good
enough gives up regions, the noisiest first, until it is. Those that are good enough are timed with
the best lossless model in one interleaved measurement, and the fastest is kept if it is faster than
that, beyond the interval of the measurement.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from graphopt.runtime import Feed
from graphopt.timing import PairedTiming, Ratio, time_paired

_log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is good enough; `drop` is what it loses, in the units of the budget."""

    good: bool
    drop: float
    text: str


@dataclass(frozen=True)
class Trial(Generic[R]):
    """A candidate that was written and judged: a recipe, its file, and what was found."""

    name: str
    recipe: R
    file: Path
    verdict: Verdict


class Search(Generic[R]):
    """Writes and judges recipes, each once. `write` makes the file of a recipe under a number."""

    def __init__(
        self,
        write: Callable[[R, int], Path],
        judge: Callable[[Path], Verdict],
        tell: Callable[[str], None],
    ) -> None:
        self._write = write
        self._judge = judge
        self._tell = tell
        self.trials: list[Trial[R]] = []

    def try_out(self, name: str, recipe: R) -> Trial[R]:
        """Write and judge one candidate."""
        self._tell(name)
        file = self._write(recipe, len(self.trials))
        trial = Trial(name, recipe, file, self._judge(file))
        _log.info("%s: %s", name, trial.verdict.text)
        self.trials.append(trial)
        return trial

    def repair(
        self, trial: Trial[R], ranking: Sequence[str], without: Callable[[R, frozenset[str]], R]
    ) -> Trial[R] | None:
        """The candidate with the fewest regions of the ranking's front given up that is good.

        Doubles the number given up until it is good, then halves the gap twice: each step is a
        whole model, so that no more exact answer is worth its time. None if nothing is left.
        """
        bad, count = 0, 1
        found: Trial[R] | None = None
        while found is None and bad < len(ranking):
            count = min(count, len(ranking))
            tried = self._giving_up(trial, ranking, count, without)
            if tried.verdict.good:
                found = tried
            else:
                bad, count = count, 2 * count
        good = count
        for _ in range(2):
            if found is None or good - bad < 2:
                break
            middle = (good + bad) // 2
            tried = self._giving_up(trial, ranking, middle, without)
            if tried.verdict.good:
                found, good = tried, middle
            else:
                bad = middle
        return found

    def _giving_up(
        self,
        trial: Trial[R],
        ranking: Sequence[str],
        count: int,
        without: Callable[[R, frozenset[str]], R],
    ) -> Trial[R]:
        given_up = frozenset(ranking[:count])
        return self.try_out(f"{trial.name}, less {count}", without(trial.recipe, given_up))


@dataclass(frozen=True)
class Winner(Generic[R]):
    """The fastest good candidate, None where none is; ratios by the candidates' names."""

    trial: Trial[R] | None
    against_lossless: Mapping[str, Ratio]
    against_original: Mapping[str, Ratio]
    timing: PairedTiming | None

    @property
    def pays(self) -> bool:
        """True where it is faster than the lossless model beyond doubt."""
        return self.trial is not None and self.against_lossless[self.trial.name].low > 1


def race(
    trials: Sequence[Trial[R]],
    lossless: Path,
    feed: Feed,
    *,
    threads: int,
    seconds: float,
    custom_ops: Sequence[Path] = (),
    progress: Callable[[float], None] | None = None,
) -> dict[str, Ratio]:
    """time(lossless) / time(candidate) of all, by name, from one interleaved measurement."""
    models = [lossless, *(trial.file for trial in trials)]
    found = time_paired(
        models,
        feed,
        threads=threads,
        seconds=seconds,
        custom_ops=custom_ops,
        progress=progress,
    )
    return {trial.name: found.ratios[1 + index] for index, trial in enumerate(trials)}


def fastest(
    trials: Sequence[Trial[R]],
    known: Mapping[str, Ratio],
    original: Path,
    lossless: Path,
    feed: Feed,
    *,
    threads: int,
    seconds: float,
    custom_ops: Sequence[Path] = (),
    progress: Callable[[float], None] | None = None,
) -> Winner[R]:
    """The best of good candidates: two that a race has found the fastest, timed more closely.

    Fresh sessions and another order than the race had: what was only lucky there is found out.
    """
    good = [trial for trial in trials if trial.verdict.good]
    if not good:
        return Winner(None, dict(known), {}, None)
    closest = sorted(good, key=lambda trial: -known[trial.name].median)[:2]
    final = time_paired(
        [lossless, *(trial.file for trial in closest), original],
        feed,
        threads=threads,
        seconds=seconds,
        custom_ops=custom_ops,
        seed=1,
        progress=progress,
    )
    ratios = {t.name: final.ratios[1 + index] for index, t in enumerate(closest)}
    best = max(closest, key=lambda trial: ratios[trial.name].median)
    base = final.ratios[-1]  # lossless to original: below 1 where lossless is faster
    whole = {name: _over(ratio, base) for name, ratio in ratios.items()}
    return Winner(best, {**known, **ratios}, whole, final)


def _over(ratio: Ratio, base: Ratio) -> Ratio:
    """time(original) / time(candidate) of two ratios to the lossless model."""
    return Ratio(ratio.median / base.median, ratio.low / base.high, ratio.high / base.low)
