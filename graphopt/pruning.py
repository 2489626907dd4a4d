"""Pruning that pays: channels that cost time for what they tell, then single weights for bytes.

Channels are chosen by measured milliseconds for measured harm; what is kept has to be faster than
the best lossless model, or, where only single weights go, smaller.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from graphopt import exporter
from graphopt.attribution import NodeCosts, node_costs
from graphopt.channel_search import ChannelSearch, GroupCut
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.fitting import LayerFit, Recovery, Settings
from graphopt.passes.prune.importance import UnitImportance
from graphopt.passes.prune.weights import Importance, Pattern, Sparsity, prune_weights
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.report import model_bytes
from graphopt.runtime import Feed
from graphopt.search import Trial, Winner
from graphopt.selection import Asked, Selection, Tell, lost, slower

AUTO: Final = "auto"
Share = float | Literal["auto"]
SPARSITIES: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # tried for "auto"
CHANNELS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of MACs, likewise
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


@dataclass
class PruneOutcome:
    """What was found: the recipe that is kept, None where nothing is, and the account of it.

    `layers` are of each candidate, by name, and so are `groups`, the `shares` of zeros or MACs, and
    the MACs that go with channels; `costs` are of the lossless model and of the kept one.
    """

    recipe: StagedRecipe | None
    reason: str
    trials: list[Trial[StagedRecipe]]
    winner: Winner[StagedRecipe]
    layers: Mapping[str, list[LayerFit]]
    groups: Mapping[str, list[GroupCut]]
    shares: Mapping[str, float]
    macs: Mapping[str, float]
    notes: Sequence[str]
    costs: NodeCosts | None
    costs_after: NodeCosts | None
    feeds: int
    held_out: bool

    @property
    def kept(self) -> Trial[StagedRecipe] | None:
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
        self._selection: Selection[StagedRecipe] = Selection(
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
        self._search: ChannelSearch | None = None
        self._fitted_on = 0

    def run(self) -> PruneOutcome:
        """Search. Raises UsageError where the data does not fit, or is missing."""
        with self._selection.judge:
            self._costs = self._profile(self._lossless)
            base: Trial[StagedRecipe] | None = None
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

    def _write(self, recipe: StagedRecipe, number: int) -> Path:
        target = self._folder / f"pruned-{number}.onnx"
        recipe.write(self._lossless, target)
        return target

    def _feeds(self) -> Callable[[], Iterator[Feed]] | None:
        """The feeds that layers are fitted on; None where there is no data."""
        if self._request.data is None:
            return None
        return lambda: itertools.islice(self._selection.feeds(), _FIT_FEEDS)

    def _largest(
        self, shares: Sequence[float], attempt: Callable[[float], Trial[StagedRecipe] | None]
    ) -> Trial[StagedRecipe] | None:
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

    def _zeros(self, base: Trial[StagedRecipe] | None) -> Trial[StagedRecipe] | None:
        stages = () if base is None else base.recipe.stages
        with tempfile.TemporaryDirectory(prefix="graphopt-", dir=self._folder) as folder:
            dense = Path(folder) / "dense.onnx"
            exporter.save(StagedRecipe(stages).dense(self._lossless), dense)

            def attempt(share: float | None) -> Trial[StagedRecipe]:
                return self._sparse(dense, stages, base, share)

            sparsity = self._request.sparsity
            if sparsity == AUTO:
                return self._largest(SPARSITIES, attempt)
            return attempt(sparsity)

    def _sparse(
        self,
        dense: Path,
        stages: tuple[Stage, ...],
        base: Trial[StagedRecipe] | None,
        share: float | None,
    ) -> Trial[StagedRecipe]:
        request = self._request
        how = Sparsity(share, request.threshold, request.pattern, request.importance)
        name = _zeros_name(how)
        whole, edit = Model.load(dense), Editor(Model.load(dense))

        def tell(done: float) -> None:
            self._tell(f"pruning weights, {name}", done)

        found = prune_weights(whole, edit, how, self._feeds(), self._settings, tell)
        self._fitted_on = found.feeds
        stage = Stage.between(whole, edit, {})
        name = name if base is None else f"{base.name}, {name}"
        self._layers[name] = found.layers
        self._shares[name] = 1 - found.kept / max(1, found.total)
        if base is not None:
            self._groups[name] = self._groups[base.name]
            self._macs[name] = self._macs[base.name]
        return self._selection.try_out(name, StagedRecipe((*stages, stage)))

    # -- channels ----------------------------------------------------------------------------------

    def trial(
        self, *, channels: float | None = None, sparsity: float | None = None
    ) -> Trial[StagedRecipe] | None:
        """One candidate of a share, judged and not timed; None where nothing can go.

        Without one, zeros are those of the pattern or the threshold that were asked for. What
        channels tell is measured once, however many shares are tried.
        """
        with self._selection.judge:
            if channels is not None:
                return self._cut(channels)
            return self._sparse(self._lossless, (), None, sparsity)

    def share(self, trial: Trial[StagedRecipe]) -> float:
        """Of the MACs, or of the weights, that are gone in a candidate."""
        return self._shares[trial.name]

    def _channels(self, share: Share) -> Trial[StagedRecipe] | None:
        """The candidate with channels out; of several that are good the fastest."""
        if share != AUTO:
            return self._cut(share)
        self._largest(CHANNELS, self._cut)
        good = self._selection.good
        if not good:
            return None
        self._selection.race(good)
        return max(good, key=self._selection.speed)

    def _cut(self, share: float) -> Trial[StagedRecipe] | None:
        """The candidate of a share of the MACs; None where nothing can go."""
        if self._search is None:
            self._search = ChannelSearch(
                self._lossless,
                self._request.unit_importance,
                self._selection,
                self._feeds(),
                self._settings,
                self._costs or self._profile(self._lossless),
                self._folder,
                self._tell,
            )
        search, cut = self._search, self._search.cut(share)
        if not cut:
            return None
        part = search.macs_gone(cut)
        name = f"{part:.0%} of MACs less"
        if name in self._layers:  # the steps of the groups are coarse: another share, one cut
            return next((t for t in self._selection.trials if t.name == name), None)
        stage, found = search.fitted(cut, lambda done: self._tell(f"fitting layers, {name}", done))
        self._layers[name], self._fitted_on = found.layers, found.feeds
        self._shares[name] = self._macs[name] = part
        self._groups[name] = search.account(cut)
        return self._selection.try_out(name, StagedRecipe((stage,)))

    def _profile(self, file: Path) -> NodeCosts:
        """Where a model's time goes."""
        self._tell("profiling", None)
        feed, request = self._selection.proposed(), self._request
        return node_costs(file, feed, request.threads, custom_ops=request.custom_ops)

    # -- the choice --------------------------------------------------------------------------------

    def _outcome(self, last: Trial[StagedRecipe] | None) -> PruneOutcome:
        good = last is not None and last.verdict.good
        winner: Winner[StagedRecipe] = Winner(None, {}, {}, None)
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
            self._fitted_on,
            self._selection.holds_out,
        )

    def _reason(self, last: Trial[StagedRecipe] | None, winner: Winner[StagedRecipe]) -> str:
        """Why nothing is kept, "" where something is."""
        trials = self._selection.trials
        if not trials:
            return "there are no channels in it that can go, nor weights"
        if last is None or winner.trial is None:
            best = min(trials, key=lost)
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
        return model_bytes(file) < model_bytes(self._lossless)


def _zeros_name(how: Sparsity) -> str:
    if how.pattern.m:
        return f"{how.pattern.n} of {how.pattern.m} weights"
    if how.threshold is not None:
        return f"no weights below {how.threshold:g}"
    block = how.pattern
    where = "" if block.rows * block.columns == 1 else f" in blocks of {block.rows}x{block.columns}"
    return f"{how.share:.0%} zeros{where}"
