"""Int8 that pays: candidates are made, judged on data, timed, and the best is kept, or none is."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from graphopt.census import census
from graphopt.data import given_feeds
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.ir import Model
from graphopt.judging import Budget, Judge
from graphopt.passes.quantize import noise
from graphopt.passes.quantize.blocks import blocks
from graphopt.passes.quantize.candidates import CONVERSIONS, Candidates, names_of
from graphopt.passes.quantize.noise import Noise
from graphopt.passes.quantize.recipe import (
    DYNAMIC,
    HALF,
    STATIC,
    TABLE,
    Recipe,
    half_regions,
    table_regions,
)
from graphopt.proposals import first_feed
from graphopt.runtime import Feed, Session
from graphopt.search import Search, Trial, Winner, fastest
from graphopt.statistics import Statistics, sweep
from graphopt.targets import has_vnni

_log = logging.getLogger(__name__)

Mode = Literal["auto", "static", "dynamic", "weights"]
MODES: Final[tuple[Mode, ...]] = ("auto", "static", "dynamic", "weights")
_NOISE_FEEDS: Final = 8  # feeds on which noise is followed through the model
_LEAST_GAIN: Final = 1e-3  # ms; below, a block gains nothing that could be measured
_SECONDS: Final = 12.0  # of each of the two measurements of whole models

Tell = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    mode: Mode = "auto"
    data: str | None = None
    budget: Budget = field(default_factory=Budget)
    threads: int = 0
    seed: int = 0
    custom_ops: tuple[Path, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class Sensitivity:
    """What a block of units does when it alone is on integers.

    `noise` is that of the model's outputs (`Quality.noise`), `gain_ms` what the block saves by the
    profiles, `sqnr_db` that of its result when everything is on integers.
    """

    root: str
    operators: str
    noise: float
    gain_ms: float
    roots: frozenset[str]
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What was found: the recipe that is kept, None where nothing is, and the account of it."""

    recipe: Recipe | None
    reason: str
    trials: list[Trial[Recipe]]
    winner: Winner[Recipe]
    candidates: Candidates
    noise: Noise | None
    feeds: int

    @property
    def kept(self) -> Trial[Recipe] | None:
        """The candidate that is kept."""
        return self.winner.trial if self.recipe is not None else None


class Compression:
    """The search for one model. `folder` is for the files of candidates."""

    def __init__(
        self, original: Path, lossless: Path, request: Request, folder: Path, tell: Tell
    ) -> None:
        self._original = original
        self._lossless = lossless
        self._request = request
        self._folder = folder
        self._tell = tell
        self._feed: Feed | None = None
        self._feeds = 0
        self._candidates = Candidates(lossless, 8 if has_vnni() else 7)
        self._judge = Judge(original, self.feeds, request.budget, request.custom_ops)
        self._search: Search[Recipe] = Search(
            self._write, self._judge, lambda what: tell(f"trying {what}", None)
        )

    def run(self) -> Outcome:
        """Search. Raises UsageError where the data does not fit, or there is none to calibrate."""
        mode = self._request.mode
        if self._request.data is None and mode == "static":
            raise UsageError("static int8 has to be calibrated: --data with some inputs")
        with self._judge:
            good: list[Trial[Recipe]] = []
            if mode in ("auto", "static") and self._request.data is not None:
                good += self._static()
            if mode in ("auto", "dynamic"):
                good += self._dynamic(good)
            if mode == "weights":
                recipe = self._stored(Recipe({}), self._lossless)
                stored = self._search.try_out("weights in fewer bits", recipe)
                good += [stored] if stored.verdict.good else []
            return self._best(good)

    def feeds(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The feeds, anew: given ones, or one that is proposed."""
        request = self._request
        if request.data is None:
            yield dict(self._proposed())
            return
        with Session(self._original, custom_ops=request.custom_ops) as session:
            yield from given_feeds(request.data, session, limit)

    def _proposed(self) -> Feed:
        if self._feed is None:
            request = self._request
            self._feed = first_feed(
                self._original,
                data=request.data,
                shapes={},
                seed=request.seed,
                custom_ops=list(request.custom_ops),
            )
        return self._feed

    def _write(self, recipe: Recipe, number: int) -> Path:
        target = self._folder / f"candidate-{number}.onnx"
        recipe.write(self._lossless, target)
        return target

    # -- candidates --------------------------------------------------------------------------------

    def _static(self) -> list[Trial[Recipe]]:
        candidates = self._candidates
        everything = self._profiled()
        if everything is None:
            return []
        tried, seen = [everything], [everything.recipe.options]
        for factor in CONVERSIONS:
            recipe = candidates.cut(factor)
            if recipe.options and recipe.options not in seen:
                seen.append(recipe.options)
                name = f"cheapest division, conversions x {factor:g}"
                tried.append(self._search.try_out(name, recipe))
        if len(tried) > 1:
            # Costs as they are within a division: layouts around a unit are others than before.
            candidates.refine(
                tried[1].file, tried[1].recipe, self._proposed(), self._request.threads
            )
            recipe = candidates.cut()
            if recipe.options not in seen:
                tried.append(self._search.try_out("cheapest division, costs within it", recipe))
        good = [trial for trial in tried if trial.verdict.good]
        divided = tried[1:]
        if divided and not any(trial.verdict.good for trial in divided):
            repaired = self._repaired(min(divided, key=lambda trial: trial.verdict.drop))
            good += [] if repaired is None else [repaired]
        return good

    def _profiled(self) -> Trial[Recipe] | None:
        """Everything static, by which costs are known from then on; None if nothing can be."""
        candidates, threads = self._candidates, self._request.threads
        candidates.calibrate(self._calibrated())
        if not candidates.can_be_static:
            return None
        everything = self._search.try_out("all on integers", candidates.everything())
        self._tell("profiling", None)
        candidates.profile(everything.file, self._proposed(), threads)
        return everything

    def _repaired(self, trial: Trial[Recipe]) -> Trial[Recipe] | None:
        """What is left of a candidate once it is good enough."""
        found = self._sensitivities(trial.recipe)
        worst = sorted(found, key=lambda each: -each.noise / max(each.gain_ms, _LEAST_GAIN))
        of = {each.root: each.roots for each in found}

        def without(recipe: Recipe, given_up: frozenset[str]) -> Recipe:
            barred = frozenset[str]().union(*(of[root] for root in given_up))
            return self._candidates.cut(1.0, barred)

        return self._search.repair(trial, [each.root for each in worst], without)

    def _sensitivities(self, recipe: Recipe) -> list[Sensitivity]:
        """What each block of a choice does to the outputs when it alone is on integers."""
        found = []
        parts = blocks(self._candidates.chosen(recipe))
        for number, block in enumerate(parts):
            self._tell("sensitivity", number / len(parts))
            alone = recipe.without(frozenset(recipe.options) - block.roots)
            target = self._folder / "alone.onnx"
            alone.write(self._lossless, target)
            noise_alone = self._judge.noise(target, _NOISE_FEEDS)
            costs = [self._candidates.milliseconds(root) for root in block.roots]
            gain = sum(a - b for a, b in costs if a is not None and b is not None)
            found.append(Sensitivity(block.root, block.operators, noise_alone, gain, block.roots))
        return found

    def sensitivity(self) -> list[Sensitivity]:
        """Of every block that can be static. Raises UsageError where there is no data."""
        if self._request.data is None:
            raise UsageError("sensitivity has to be measured on data: --data with some inputs")
        with self._judge:
            everything = self._profiled()
            if everything is None:
                return []
            found = self._followed(everything)
            return [
                replace(each, sqnr_db=found.sqnr_db(each.root))
                for each in self._sensitivities(everything.recipe)
            ]

    def _calibrated(self) -> Statistics:
        def count(done: int) -> None:
            self._feeds = done
            self._tell(f"calibrating, {done} feeds", None)

        return sweep(
            self._lossless,
            self.feeds(),
            self._candidates.observers,
            threads=self._request.threads,
            custom_ops=self._request.custom_ops,
            progress=count,
        )

    def _followed(self, trial: Trial[Recipe]) -> Noise:
        self._tell("following noise", None)
        feeds = itertools.islice(self.feeds(), _NOISE_FEEDS)
        names = names_of(self._candidates.units)
        return noise.measure(self._lossless, trial.file, names, feeds, self._request.threads)

    def _dynamic(self, static: list[Trial[Recipe]]) -> list[Trial[Recipe]]:
        """Dynamic products alone, and beside static units of what was good enough."""
        candidates = self._candidates
        if not candidates.products:
            return []
        tried = [self._search.try_out("dynamic", candidates.dynamic())]
        for trial in static[-1:]:
            mixed = candidates.with_dynamic(trial.recipe)
            if mixed.options != trial.recipe.options:
                tried.append(self._search.try_out(f"{trial.name}, and dynamic", mixed))
        return [trial for trial in tried if trial.verdict.good]

    def _stored(self, recipe: Recipe, file: Path) -> Recipe:
        """The recipe of a file, with what is floating-point in it stored in fewer bits."""
        edit = Editor(Model.load(file))
        more = dict.fromkeys(set(self._candidates.tables) & set(table_regions(edit)), TABLE)
        more |= dict.fromkeys(half_regions(edit), HALF)
        return replace(recipe, options={**dict(sorted(more.items())), **recipe.options})

    def _smaller(self, winner: Winner[Recipe]) -> Winner[Recipe]:
        """The winner in fewer bytes, where that is as good and not slower."""
        trial = winner.trial
        assert trial is not None
        recipe = self._stored(trial.recipe, trial.file)
        if recipe.options == trial.recipe.options:
            return winner
        stored = self._search.try_out(f"{trial.name}, stored in fewer bits", recipe)
        if not stored.verdict.good:
            return winner
        again = self._timed([trial, stored])
        ratio, before = (again.against_lossless[t.name] for t in (stored, trial))
        return replace(again, trial=stored if ratio.high >= before.median else trial)

    # -- the choice --------------------------------------------------------------------------------

    def _best(self, good: list[Trial[Recipe]]) -> Outcome:
        self._tell("timing", None)
        winner = self._timed(good)
        if winner.trial is not None:
            winner = self._fused(winner, good)
        if winner.pays:
            winner = self._smaller(winner)
        reason = self._reason(winner)
        recipe = winner.trial.recipe if winner.trial is not None else None
        if reason and not self._request.force:
            recipe = None
        found = None
        if winner.trial is not None and winner.trial.recipe.taking(STATIC):
            found = self._followed(winner.trial)
        return Outcome(
            recipe, reason, self._search.trials, winner, self._candidates, found, self._feeds
        )

    def _timed(self, good: list[Trial[Recipe]]) -> Winner[Recipe]:
        return fastest(
            good,
            self._original,
            self._lossless,
            self._proposed(),
            threads=self._request.threads,
            seconds=_SECONDS,
            custom_ops=self._request.custom_ops,
        )

    def _fused(self, winner: Winner[Recipe], good: list[Trial[Recipe]]) -> Winner[Recipe]:
        """Regions that do not run on integer kernels after all are taken out again."""
        trial = winner.trial
        assert trial is not None
        static = sorted(trial.recipe.taking(STATIC))
        try:
            left = census(trial.file, static, custom_ops=self._request.custom_ops).unfused
        except RuntimeFailure as failure:
            _log.info("no census: %s", failure)
            return winner
        heavy = {u.root for u in self._candidates.units if u.weights is not None}
        lost = frozenset(left) & heavy
        if not lost:
            return winner
        again = self._search.try_out(
            f"{trial.name}, less {len(lost)} that do not fuse", trial.recipe.without(lost)
        )
        return self._timed([again, *good]) if again.verdict.good else winner

    def _reason(self, winner: Winner[Recipe]) -> str:
        """Why nothing is kept, "" where something is."""
        trials = self._search.trials
        if not trials:
            return "there is nothing in it that can run on integers"
        if winner.trial is None:
            best = min(trials, key=lambda trial: trial.verdict.drop)
            return f"no candidate is good enough; the best of them: {best.verdict.text}"
        if not winner.pays:
            ratio = winner.against_lossless[winner.trial.name]
            return (
                f"int8 is not faster than the best lossless model here: {ratio.median:.2f}x "
                f"({ratio.low:.2f} to {ratio.high:.2f})"
            )
        return ""


def counts(recipe: Recipe) -> Mapping[str, int]:
    """How many regions take each option."""
    options = (STATIC, DYNAMIC, TABLE, HALF)
    return {option: len(recipe.taking(option)) for option in options if recipe.taking(option)}
