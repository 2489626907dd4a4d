"""Pruning that pays: channels that cost time for what they tell, then single weights for bytes.

Channels are chosen by measured milliseconds for measured harm; what is kept has to be faster than
the best lossless model, or, where only single weights go, smaller.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from graphopt import exporter
from graphopt.attribution import NodeCosts, node_costs
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.ir import Model, Node
from graphopt.operators import MACS
from graphopt.passes.prune import importance as units_by
from graphopt.passes.prune.channels import Choice, Harm, choose, column_masks, power_law, steps
from graphopt.passes.prune.costs import Work
from graphopt.passes.prune.fitting import LayerFit, Recovery, Settings, fit, grams
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.importance import UnitImportance, ranking, unit_scores
from graphopt.passes.prune.recipe import PruneRecipe, Stage
from graphopt.passes.prune.weights import Importance, Pattern, Sparsity, prune_weights
from graphopt.regions import fixed
from graphopt.report import file_info
from graphopt.runtime import Feed
from graphopt.search import Trial, Winner
from graphopt.selection import Asked, Selection, Tell, slower
from graphopt.statistics import Observer, Statistics, sweep

AUTO: Final = "auto"
Share = float | Literal["auto"]
SPARSITIES: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # tried for "auto"
CHANNELS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of MACs, likewise
_LEVELS: Final = (0.25, 0.5)  # of a group's units, at which harm is measured
_HARM_FEEDS: Final = 8
_FIT_FEEDS: Final = 256  # samples of feeds are more: this many feeds tell what a layer does


@dataclass(frozen=True, kw_only=True)
class PruneRequest(Asked):
    """What the user asked for of pruning. `sparsity` and `channels`: a share, "auto", or None."""

    sparsity: Share | None = None
    pattern: Pattern = field(default_factory=Pattern)
    threshold: float | None = None
    importance: Importance = "lamp"
    channels: Share | None = None
    unit_importance: UnitImportance = "obs"
    recovery: Recovery = "lsq"

    @property
    def wants_zeros(self) -> bool:
        """True where single weights are to go."""
        return self.sparsity is not None or self.threshold is not None or bool(self.pattern.m)


@dataclass(frozen=True)
class GroupCut:
    """A group with what was measured of it, and how many of its units go."""

    text: str
    root: str
    units: int
    gone: int
    harm: float | None


@dataclass
class PruneOutcome:
    """What was found: the recipe that is kept, None where nothing is, and the account of it.

    `layers` are of each candidate, by name, and so are `groups`, the `shares` of zeros or MACs, and
    the MACs that go with channels; `costs` are of the lossless model and of the kept one.
    """

    recipe: PruneRecipe | None
    reason: str
    trials: list[Trial[PruneRecipe]]
    winner: Winner[PruneRecipe]
    layers: Mapping[str, list[LayerFit]]
    groups: Mapping[str, list[GroupCut]]
    shares: Mapping[str, float]
    macs: Mapping[str, float]
    notes: Sequence[str]
    costs: NodeCosts | None
    costs_after: NodeCosts | None
    feeds: int

    @property
    def kept(self) -> Trial[PruneRecipe] | None:
        """The candidate that is kept."""
        return self.winner.trial if self.recipe is not None else None


class Pruning:
    """The search for one model. `folder` is for the files of candidates."""

    def __init__(
        self, original: Path, lossless: Path, request: PruneRequest, folder: Path, tell: Tell
    ) -> None:
        self._lossless = lossless
        self._request = request
        self._folder = folder
        self._tell = tell
        self._selection: Selection[PruneRecipe] = Selection(
            original, lossless, request, tell, self._write
        )
        self._settings = Settings(
            request.recovery, threads=request.threads, custom_ops=request.custom_ops
        )
        self._layers: dict[str, list[LayerFit]] = {}
        self._groups: dict[str, list[GroupCut]] = {}
        self._shares: dict[str, float] = {}
        self._macs: dict[str, float] = {}
        self._notes: list[str] = []
        self._costs: NodeCosts | None = None
        self._attempt: Callable[[float], Trial[PruneRecipe] | None] | None = None
        self._feeds = 0

    def run(self) -> PruneOutcome:
        """Search. Raises UsageError where the data does not fit, or is missing."""
        with self._selection.judge:
            self._costs = self._profile(self._lossless)
            base: Trial[PruneRecipe] | None = None
            if self._request.channels is not None:
                base = self._channels(self._request.channels)
            if not self._request.wants_zeros or (
                base is None and self._request.channels is not None
            ):
                return self._outcome(base)
            sparse = self._zeros(base)
            if (
                base is not None
                and base.verdict.good
                and (sparse is None or not sparse.verdict.good)
            ):
                found = "no share" if sparse is None else f"{sparse.name}: {sparse.verdict.text}"
                self._notes.append(f"channels alone are kept, zeros lose too much: {found}")
                return self._outcome(base)
            return self._outcome(sparse)

    def _write(self, recipe: PruneRecipe, number: int) -> Path:
        target = self._folder / f"pruned-{number}.onnx"
        recipe.write(self._lossless, target)
        return target

    def _fit_feeds(self) -> Callable[[], Iterator[Feed]] | None:
        """The feeds that layers are fitted on; None where there is no data."""
        if self._request.data is None:
            return None
        return lambda: itertools.islice(self._selection.feeds(), _FIT_FEEDS)

    def _largest(
        self, shares: Sequence[float], attempt: Callable[[float], Trial[PruneRecipe] | None]
    ) -> Trial[PruneRecipe] | None:
        """The candidate with the largest of the shares that is good, by halving the range."""
        low, high = 0, len(shares)
        best = None
        while low < high:
            middle = (low + high) // 2
            trial = attempt(shares[middle])
            if trial is not None and trial.verdict.good:
                best, low = trial, middle + 1
            else:
                high = middle
        return best

    # -- single weights ----------------------------------------------------------------------------

    def _zeros(self, base: Trial[PruneRecipe] | None) -> Trial[PruneRecipe] | None:
        stages = () if base is None else base.recipe.stages
        with tempfile.TemporaryDirectory(prefix="graphopt-", dir=self._folder) as folder:
            dense = Path(folder) / "dense.onnx"
            exporter.save(PruneRecipe(stages).dense(self._lossless), dense)

            def attempt(share: float | None) -> Trial[PruneRecipe]:
                return self._sparse(dense, stages, base, share)

            sparsity = self._request.sparsity
            if sparsity == AUTO:
                return self._largest(SPARSITIES, attempt)
            return attempt(sparsity)

    def _sparse(
        self,
        dense: Path,
        stages: tuple[Stage, ...],
        base: Trial[PruneRecipe] | None,
        share: float | None,
    ) -> Trial[PruneRecipe]:
        request = self._request
        how = Sparsity(share, request.threshold, request.pattern, request.importance)
        name = _zeros_name(how)
        whole, edit = Model.load(dense), Editor(Model.load(dense))

        def tell(done: float) -> None:
            self._tell(f"pruning weights, {name}", done)

        found = prune_weights(whole, edit, how, self._fit_feeds(), self._settings, tell)
        self._feeds = found.feeds
        stage = Stage.between(whole, edit, {})
        name = name if base is None else f"{base.name}, {name}"
        self._layers[name] = found.layers
        self._shares[name] = 1 - found.kept / max(1, found.total)
        if base is not None:
            self._groups[name] = self._groups[base.name]
            self._macs[name] = self._macs[base.name]
        return self._selection.try_out(name, PruneRecipe((*stages, stage)))

    # -- channels ----------------------------------------------------------------------------------

    def trial(
        self, *, channels: float | None = None, sparsity: float | None = None
    ) -> Trial[PruneRecipe] | None:
        """One candidate of these shares, judged and not timed; None where nothing can go.

        Without any, zeros are those of the pattern or the threshold that were asked for.

        What channels tell is measured once, however many shares are tried.
        """
        with self._selection.judge:
            if channels is not None:
                return self._attempts()(channels)
            return self._sparse(self._lossless, (), None, sparsity)

    def share(self, trial: Trial[PruneRecipe]) -> float:
        """Of the MACs, or of the weights, that are gone in a candidate."""
        return self._shares[trial.name]

    def _channels(self, share: Share) -> Trial[PruneRecipe] | None:
        """The candidate with channels out; of several that are good the fastest."""
        attempt = self._attempts()
        if share != AUTO:
            return attempt(share)
        self._largest(CHANNELS, attempt)
        good = self._selection.good
        if not good:
            return None
        self._selection.race(good)
        return max(good, key=self._selection.speed)

    def _attempts(self) -> Callable[[float], Trial[PruneRecipe] | None]:
        """Makes the candidate of a share of the MACs."""
        if self._attempt is None:
            self._attempt = self._prepared()
        return self._attempt

    def _prepared(self) -> Callable[[float], Trial[PruneRecipe] | None]:
        """Measure what channels tell and cost."""
        edit = Editor(Model.load(self._lossless))
        groups = groups_of(edit)
        if not groups:
            return lambda share: None
        seen = self._observed(groups)
        work = Work(edit, groups, self._shapes())
        choices = self._choices(edit, groups, seen)
        self._costs = self._costs or self._profile(self._lossless)
        ms = node_times(edit, self._costs)
        return lambda share: self._cut(edit, groups, choices, work, share, ms)

    def _cut(
        self,
        edit: Editor,
        groups: Sequence[Group],
        choices: Sequence[Choice],
        work: Work,
        share: float,
        ms: Mapping[Node, float] | None,
    ) -> Trial[PruneRecipe] | None:
        cut = choose(choices, work, share, ms)
        if not cut:
            return None
        gone = {root: len(units) for root, units in cut.items()}
        part = 1 - work.macs(gone) / max(1, work.total)
        name = f"{part:.0%} of MACs less"
        if name in self._layers:  # the steps of the groups are coarse: another share, one cut
            return next((t for t in self._selection.trials if t.name == name), None)
        stage, self._layers[name] = self._fitted(edit, groups, cut, self._fit_feeds(), name)
        self._shares[name] = self._macs[name] = part
        self._groups[name] = [
            GroupCut(
                c.group.text(gone.get(c.group.root, 0)),
                c.group.root,
                c.group.units,
                gone.get(c.group.root, 0),
                c.harm(gone[c.group.root]) if c.group.root in gone else None,
            )
            for c in choices
        ]
        return self._selection.try_out(name, PruneRecipe((stage,)))

    def _fitted(
        self,
        whole: Editor,
        groups: Sequence[Group],
        cut: Mapping[str, tuple[int, ...]],
        feeds: Callable[[], Iterator[Feed]] | None,
        name: str,
        *,
        readers_only: bool = False,
    ) -> tuple[Stage, list[LayerFit]]:
        """What readers have to learn before the cut, and the account of all layers."""
        if feeds is None:
            return Stage(cut=cut), []
        dense, edit = Model.load(self._lossless), Editor(Model.load(self._lossless))
        masks = column_masks(whole, groups, cut)
        only = set(masks) if readers_only else None

        def tell(done: float) -> None:
            self._tell(f"fitting layers, {name}", done)

        found = fit(dense, edit, masks, feeds, self._settings, only=only, progress=tell)
        self._feeds = found.feeds if not readers_only else self._feeds
        return Stage.between(dense, edit, cut), found.layers

    def _profile(self, file: Path) -> NodeCosts:
        """Where a model's time goes."""
        self._tell("profiling", None)
        feed, request = self._selection.proposed(), self._request
        return node_costs(file, feed, request.threads, custom_ops=request.custom_ops)

    def _observed(self, groups: Sequence[Group]) -> Statistics | None:
        """What calibration sees of what the groups' readers read; None where nothing is needed."""
        wanted = units_by.observed(groups, self._request.unit_importance)
        if not wanted:
            return None
        if self._request.data is None:
            raise UsageError(
                f"importance {self._request.unit_importance} needs feeds: --data with some inputs"
            )
        return sweep(
            self._lossless,
            itertools.islice(self._selection.feeds(), _FIT_FEEDS),
            wanted,
            threads=self._request.threads,
            custom_ops=self._request.custom_ops,
            progress=lambda done: self._tell(f"calibrating, {done} feeds", None),
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all values on the feed that is timed."""
        model = Model.load(self._lossless)
        products = (node for node in model.graph.nodes if (node.domain, node.op) in MACS)
        read = {v for node in products for v in node.inputs if v is not None and not fixed(v)}
        wanted = [Observer(value.name, "moving-average") for value in read]
        request = self._request
        feed = [self._selection.proposed()]
        options: dict[str, Any] = {"threads": request.threads, "custom_ops": request.custom_ops}
        seen = sweep(self._lossless, feed, wanted, **options)
        return {v.name: seen.shape(v.name).first for v in read if seen.has_shape(v.name)}

    def _choices(
        self, edit: Editor, groups: Sequence[Group], seen: Statistics | None
    ) -> list[Choice]:
        """What can be chosen, with the harm that was measured of every group alone."""
        known = self._grams(edit, groups)
        found = []
        for number, group in enumerate(groups):
            self._tell("measuring what channels tell", number / len(groups))
            counts = steps(group)
            if not counts:
                continue
            by = self._request.unit_importance
            scores = unit_scores(edit, group, by, seen, known)
            order = ranking(scores)
            found.append(Choice(group, counts, self._harm(edit, groups, group, order), order))
        return found

    def _grams(self, edit: Editor, groups: Sequence[Group]) -> dict[str, Any]:
        """Gram matrices of what the groups' readers read, where their choice needs them."""
        roots = units_by.readers_of(edit, groups, self._request.unit_importance)
        feeds = self._fit_feeds()
        if not roots or feeds is None:
            return {}

        def tell(done: float) -> None:
            self._tell("seeing what channels tell", done)

        return grams(Model.load(self._lossless), roots, feeds, self._settings, tell)

    def _harm(
        self, edit: Editor, groups: Sequence[Group], group: Group, order: Sequence[int]
    ) -> Harm:
        """The noise of the outputs by how many units of a group go, from two measurements."""
        measured = []
        for level in _LEVELS:
            count = min(max(1, round(level * group.units)), group.units - 1)
            cut = {group.root: tuple(sorted(order[:count]))}
            measured.append((count / group.units, self._noise(edit, groups, cut)))
        if measured[0][0] == measured[1][0]:
            measured[0] = (measured[0][0] / 2, measured[0][1] / 4)
        law = power_law(*measured)
        return lambda count: law(count / group.units)

    def _noise(
        self, edit: Editor, groups: Sequence[Group], cut: Mapping[str, tuple[int, ...]]
    ) -> float:
        """Of the outputs with this cut alone, its readers fitted on a few feeds."""
        feeds = self._fit_feeds()
        few = None if feeds is None else (lambda: itertools.islice(feeds(), _HARM_FEEDS))
        target = self._folder / "alone.onnx"
        stage, _ = self._fitted(edit, groups, cut, few, "one group", readers_only=True)
        exporter.save(PruneRecipe((stage,)).dense(self._lossless), target)
        try:
            return self._selection.judge.noise(target, _HARM_FEEDS)
        except RuntimeFailure:
            return math.inf

    # -- the choice --------------------------------------------------------------------------------

    def _outcome(self, last: Trial[PruneRecipe] | None) -> PruneOutcome:
        good = last is not None and last.verdict.good
        winner: Winner[PruneRecipe] = Winner(None, {}, {}, None)
        if last is not None and good:
            winner = self._selection.fastest([last])
        reason = self._reason(last, winner)
        kept = last if good and (not reason or self._request.force) else None
        return PruneOutcome(
            None if kept is None else kept.recipe,
            reason,
            self._selection.trials,
            winner,
            self._layers,
            self._groups,
            self._shares,
            self._macs,
            self._notes,
            self._costs,
            None if kept is None else self._profile(kept.file),
            self._feeds,
        )

    def _reason(self, last: Trial[PruneRecipe] | None, winner: Winner[PruneRecipe]) -> str:
        """Why nothing is kept, "" where something is."""
        trials = self._selection.trials
        if not trials:
            return "there are no channels in it that can go, nor weights"
        if last is None or winner.trial is None:
            best = min(trials, key=lambda trial: trial.verdict.drop)
            return (
                f"no candidate is good enough; the best of them, {best.name}: {best.verdict.text}"
            )
        if self._request.channels is not None:
            if not winner.pays:
                ratio = slower(winner.against_lossless, winner.trial.name)
                return f"it is not faster than the best lossless model here: {ratio}"
        elif not self._is_smaller(winner.trial.file):
            return "it is not smaller than the best lossless model: too few zeros to store as such"
        return ""

    def _is_smaller(self, file: Path) -> bool:
        return file_bytes(file) < file_bytes(self._lossless)


def file_bytes(file: Path) -> int:
    """Of a model with the weights beside it."""
    beside = file.with_name(file.name + ".data")
    return file_info(file, [file, *([beside] if beside.exists() else [])]).bytes


def _zeros_name(how: Sparsity) -> str:
    if how.pattern.m:
        return f"{how.pattern.n} of {how.pattern.m} weights"
    if how.threshold is not None:
        return f"no weights below {how.threshold:g}"
    block = how.pattern
    where = "" if block.rows * block.columns == 1 else f" in blocks of {block.rows}x{block.columns}"
    return f"{how.share:.0%} zeros{where}"


def node_times(edit: Editor, costs: NodeCosts) -> dict[Node, float]:
    """Milliseconds by node: of what runs as one, the product has all."""
    values, found = edit.model.graph.values, dict[Node, float]()
    for root, ms in costs.values.items():
        names = [*costs.computed[root], root]
        nodes = [values[name].producer for name in names if name in values]
        known = [node for node in nodes if node is not None]
        owner = next((n for n in known if (n.domain, n.op) in MACS), known[-1] if known else None)
        if owner is not None:
            found[owner] = found.get(owner, 0.0) + ms
    return found
