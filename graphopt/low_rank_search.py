"""Low rank that pays: layers split where that is measured to be faster, into what loses least.

What each form and rank loses is known from the data, what it takes from the model as it runs here;
how many MACs stay is asked for, or as few as the budget allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.fitting import Settings
from graphopt.passes.lowrank.factor import factor
from graphopt.passes.lowrank.forms import Method
from graphopt.passes.lowrank.options import AUTOMATIC, Option, Splittable
from graphopt.passes.lowrank.table import Ranks, tabulate
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.passes.work import sizes_wanted
from graphopt.runtime import Feed
from graphopt.search import Trial, Winner
from graphopt.selection import Asked, Selection, Tell, lost, slower
from graphopt.split_harm import harms
from graphopt.split_times import SplitTimes
from graphopt.statistics import sweep

AUTO: Final = "auto"
Share = float | Literal["auto"]
SHARES: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of MACs, tried for "auto"
FIT_FEEDS: Final = 256  # samples of feeds are more: this many feeds tell what a layer does
_HARM_FEEDS: Final = 16  # on which the harm of single layers is measured
_CHECKS: Final = 5  # rounds in which what turned out slow is given up
_ROUNDS: Final = 3  # of profiles in each
_MISSED: Final = 0.02  # of the MACs: a share that is missed by more is told


@dataclass(frozen=True, kw_only=True)
class LowRankRequest(Asked):
    """What the user asked for: `share` of the model's MACs to be left, or "auto"; the forms."""

    share: Share = AUTO
    methods: tuple[Method, ...] = AUTOMATIC


@dataclass(frozen=True)
class SplitLayer:
    """A layer, or several that read one weight, with what was chosen and what that does.

    `ranks` are channels between the parts, `error` is of the variance of what it gives;
    milliseconds are as timed before the weights were fitted, None where they were not.
    """

    group: Splittable
    option: Option
    ranks: tuple[int, ...]
    error: float
    degeneracy: float | None
    ms_before: float | None
    ms_after: float | None


@dataclass
class LowRankOutcome:
    """What was found: the recipe that is kept, None where nothing is, and the account of it.

    `layers` are of each candidate, by name, and so are the shares of MACs that are `left`.
    """

    recipe: StagedRecipe | None
    reason: str
    trials: list[Trial[StagedRecipe]]
    winner: Winner[StagedRecipe]
    layers: Mapping[str, list[SplitLayer]]
    left: Mapping[str, float]
    notes: Sequence[str]
    feeds: int
    held_out: bool

    @property
    def kept(self) -> Trial[StagedRecipe] | None:
        """The candidate that is kept."""
        return self.winner.trial if self.recipe is not None else None


def table_of(
    lossless: Path,
    feed: Feed,
    methods: Sequence[Method],
    feeds: Callable[[], Iterator[Feed]] | None,
    settings: Settings,
    tell: Tell,
) -> Ranks:
    """All that can be chosen for a model, with shapes as in a run on `feed`."""
    model = Model.load(lossless)
    seen = sweep(
        lossless,
        [feed],
        sizes_wanted(model),
        threads=settings.threads,
        custom_ops=settings.custom_ops,
    )
    shapes = {v: seen.shape(v).first for v in seen.values if seen.has_shape(v)}
    what = "seeing what ranks tell"
    tell(what, None)  # without feeds it is not known how much is done
    return tabulate(model, shapes, methods, feeds, settings, lambda done: tell(what, done))


class LowRanking:
    """The search for one model. `folder` is for the files of candidates."""

    def __init__(
        self, original: Path, lossless: Path, request: LowRankRequest, folder: Path, tell: Tell
    ) -> None:
        self._lossless = lossless
        self._request = request
        self._folder = folder
        self._tell = tell
        self._selection: Selection[StagedRecipe] = Selection(
            original, lossless, request, tell, self._write
        )
        self._settings = Settings(threads=request.threads, custom_ops=request.custom_ops)
        self._ranks: Ranks | None = None
        self._harms: dict[str, float] = {}
        self._times: SplitTimes | None = None
        self._layers: dict[str, list[SplitLayer]] = {}
        self._left: dict[str, float] = {}
        self._notes: list[str] = []
        self._fitted_on = 0

    def run(self) -> LowRankOutcome:
        """Search. Raises UsageError where the data does not fit, or is missing."""
        with self._selection.judge:
            share = self._request.share
            if share == AUTO:
                self._largest()
            else:
                self._paying(share)
            return self._outcome()

    def trial(self, share: float) -> Trial[StagedRecipe] | None:
        """One candidate that leaves a share of the MACs, judged; what layers take is not asked."""
        with self._selection.judge:
            chosen = self._table.allocated(share)
            return self._tried(chosen, {}, f"{self._table.left(chosen):.0%} of MACs")

    def left(self, trial: Trial[StagedRecipe]) -> float:
        """The share of MACs that are left in a candidate."""
        return self._left[trial.name]

    # -- what can be chosen ------------------------------------------------------------------------

    @property
    def _table(self) -> Ranks:
        """Options and what they lose, measured once."""
        if self._ranks is None:
            ranks = table_of(
                self._lossless,
                self._selection.proposed(),
                self._request.methods,
                self._feeds(),
                self._settings,
                self._tell,
            )
            self._ranks = self._weighted(ranks) if ranks.probes else ranks
        return self._ranks

    def _weighted(self, ranks: Ranks) -> Ranks:
        """The options with errors by what they do to the outputs."""
        self._harms = harms(
            self._lossless,
            ranks.probes,
            list(itertools.islice(self._selection.feeds(), _HARM_FEEDS)),
            self._selection.judge.classes,
            threads=self._settings.threads,
            custom_ops=self._settings.custom_ops,
            folder=self._folder,
            progress=lambda done: self._tell("measuring what layers tell", done),
        )
        options = {
            root: [
                # What loses nothing does no harm, however much another form of the layer does.
                replace(each, error=each.error and each.error * self._harms.get(root, 1.0))
                for each in found
            ]
            for root, found in ranks.options.items()
        }
        return replace(ranks, options=options, probes={})  # weights that are not needed again

    @property
    def _timed(self) -> SplitTimes:
        """What layers take, measured once."""
        if self._times is None:
            self._times = SplitTimes(
                self._lossless,
                self._table,
                self._selection.proposed(),
                self._request.threads,
                self._request.custom_ops,
                self._folder,
                lambda done: self._tell("timing layers", done),
            )
        return self._times

    def _feeds(self) -> Callable[[], Iterator[Feed]] | None:
        """The feeds that layers are fitted on; None where there is no data."""
        if self._request.data is None:
            return None
        return lambda: itertools.islice(self._selection.feeds(), FIT_FEEDS)

    def _priced(self) -> dict[str, list[Option]]:
        """Options by what they take; those that do not pay are left out."""
        times, found = self._timed, {}
        for group in self._table.groups:
            options = []
            for option in self._table.options[group.root]:
                ms = times.estimate(group.root, option)
                if option.method is None or times.pays(group, option, ms):
                    options.append(replace(option, cost=ms))
            found[group.root] = options
        return found

    def _chosen(self, share: float) -> tuple[dict[str, Option], dict[str, float]]:
        """What loses least for its time, and what each layer takes then, timed all together.

        What turns out not to pay is given up, and others take its place; in the end layers are
        left whole.
        """
        options, chosen, ms = self._priced(), dict[str, Option](), dict[str, float]()
        for check in range(_CHECKS):
            chosen = self._table.allocated(share, options)
            self._tell("checking what layers take", check / _CHECKS)
            ms = self._timed.chosen(chosen, rounds=_ROUNDS)
            slow = [
                group.root
                for group in self._table.groups
                if chosen[group.root].method is not None
                and not self._timed.pays(group, chosen[group.root], ms[group.root])
            ]
            if not slow:
                return chosen, ms
            for root in slow:
                dear = chosen[root]
                options[root] = [o for o in options[root] if o is not dear]
                chosen[root] = options[root][0]
                ms[root] = self._timed.dense[root]
        return chosen, ms

    # -- candidates --------------------------------------------------------------------------------

    def _largest(self) -> None:
        """Candidates of fewer and fewer MACs, by halving the range of shares."""
        low, high = 0, len(SHARES)
        while low < high:
            middle = (low + high) // 2
            trial = self._paying(SHARES[middle])
            if trial is not None and trial.verdict.good:
                low = middle + 1
            else:
                high = middle

    def _paying(self, share: float) -> Trial[StagedRecipe] | None:
        """The candidate of a share, of layers that pay; None where there are none."""
        chosen, ms = self._chosen(share)
        left = self._table.left(chosen)
        is_split = any(option.method is not None for option in chosen.values())
        if is_split and self._request.share != AUTO and left > share + _MISSED:
            self._notes.append(
                f"{left:.0%} of the MACs are left, not {share:.0%}: other layers are not faster "
                "when they are split"
            )
        name = f"{left:.0%} of MACs"
        if name in self._layers:  # no more can go: another share, one choice
            return next((t for t in self._selection.trials if t.name == name), None)
        return self._tried(chosen, ms, name)

    def _tried(
        self, chosen: Mapping[str, Option], ms: Mapping[str, float], name: str
    ) -> Trial[StagedRecipe] | None:
        """The candidate with these options, fitted and judged."""
        if all(option.method is None for option in chosen.values()):
            return None
        dense, edit = Model.load(self._lossless), Editor(Model.load(self._lossless))
        found = factor(
            dense,
            edit,
            self._table.groups,
            chosen,
            self._feeds(),
            self._settings,
            known=self._table.moments,
            progress=lambda done: self._tell(f"fitting layers, {name}", done),
        )
        self._fitted_on = found.fitted.feeds
        self._left[name] = self._table.left(chosen)
        self._layers[name] = [
            SplitLayer(
                group,
                chosen[group.root],
                () if (split := found.splits.get(group.root)) is None else split.ranks,
                found.errors.get(group.root, 0.0),
                None if split is None else split.degeneracy,
                self._times.dense[group.root] if self._times is not None else None,
                ms.get(group.root),
            )
            for group in self._table.groups
        ]
        stage = Stage.between(dense, edit, splits=found.splits)
        return self._selection.try_out(name, StagedRecipe((stage,)))

    def _write(self, recipe: StagedRecipe, number: int) -> Path:
        target = self._folder / f"split-{number}.onnx"
        recipe.write(self._lossless, target)
        return target

    # -- the choice --------------------------------------------------------------------------------

    def _outcome(self) -> LowRankOutcome:
        winner = self._selection.fastest(self._selection.good)
        reason = self._reason(winner)
        keep = winner.trial is not None and (not reason or self._request.force)
        return LowRankOutcome(
            winner.trial.recipe if keep and winner.trial is not None else None,
            reason,
            self._selection.trials,
            winner,
            self._layers,
            self._left,
            self._notes,
            self._fitted_on,
            self._selection.holds_out,
        )

    def _reason(self, winner: Winner[StagedRecipe]) -> str:
        """Why nothing is kept, "" where something is."""
        trials = self._selection.trials
        if not trials:
            return "there are no layers in it that are faster here when they are split"
        if winner.trial is None:
            best = min(trials, key=lost)
            return (
                f"no candidate is good enough; the best of them, {best.name}: {best.verdict.text}"
            )
        if not winner.pays:
            ratio = slower(winner.against_lossless, winner.trial.name)
            return f"it is not faster than the best lossless model here: {ratio}"
        return ""
