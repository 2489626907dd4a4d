"""Pruning as a step of `optimize`: searched for on a model that lies on disk, or replayed on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from graphopt.account import Remarks, Sizes, kept_or_forced
from graphopt.decisions import Decisions
from graphopt.ir import Model
from graphopt.passes.recipe import StagedRecipe
from graphopt.prune_account import prune_account, prune_decision, replayed_pruning
from graphopt.prune_report import PruneRecord
from graphopt.pruning import PruneOutcome, PruneRequest, Pruning
from graphopt.recorded import Setting, applied_or_refused
from graphopt.search import Trial
from graphopt.selection import Tell
from graphopt.wanted import PruneWanted

Array = NDArray[Any]


class Prune:
    """The step. `recipe` is what was found, or read; None where that is nothing.

    Warnings gather in `remarks`.
    """

    name: ClassVar[str] = "prune"

    def __init__(self, wanted: PruneWanted, common: Mapping[str, Any], remarks: Remarks) -> None:
        self.recipe: StagedRecipe | None = None
        self.is_wanted = wanted.is_wanted
        self.has_zeros = False
        self._remarks = remarks
        self._wanted = wanted
        self._request = _request(wanted, common)
        self._outcome: PruneOutcome | None = None
        self._trial: Trial[StagedRecipe] | None = None
        self._path: Path | None = None

    def read(self, decisions: Decisions, arrays: Mapping[str, Array], path: Path) -> None:
        """Take what a file decided, with its weights. Raises ValueError for what is no recipe."""
        self._path, found = path, decisions.pruning
        self.is_wanted = found is not None
        if found is not None:
            self.has_zeros = found.zeros
            self.recipe = StagedRecipe.of(arrays)

    def search(
        self, original: Path, lossless: Path, folder: Path, sizes: Sizes, tell: Tell
    ) -> PruneRecord:
        """Look for the best candidate, judged against the original."""
        outcome = Pruning(original, lossless, self._request, folder, tell).run()
        trial = kept_or_forced(outcome, self._remarks, force=self._request.force)
        if trial is not None:
            self.recipe, self.has_zeros = trial.recipe, self._wanted.wants_zeros
            self._outcome, self._trial = outcome, trial
        return prune_account(outcome, self._request, trial, sizes, lossless)

    def applied(self, base: Path) -> Model:
        """The pruned model, all zeros in it; as it is where nothing is kept."""
        if self.recipe is None:
            return Model.load(base)
        return applied_or_refused(self.recipe.dense, base, self._path)

    def replayed(self, decisions: Decisions, base: Path, sizes: Sizes) -> PruneRecord | None:
        """The account of decisions that were read."""
        if decisions.pruning is None:
            return None
        max_drop = float(decisions.options.get("max_drop") or 0.0)
        return replayed_pruning(decisions.pruning, max_drop, sizes)

    @property
    def options(self) -> dict[str, Setting]:
        """What the user asked for, for the decisions file."""
        if not self.is_wanted:
            return {}
        wanted = self._wanted
        return {
            "sparsity": wanted.sparsity,
            "nm": wanted.nm,
            "block": wanted.block,
            "threshold": wanted.threshold,
            "channels": wanted.channels,
            "importance": wanted.importance,
            "recover": wanted.recover,
        }

    @property
    def arrays(self) -> dict[str, Array]:
        """What the decisions need beside them."""
        return {} if self.recipe is None else self.recipe.arrays

    def decided(self, decisions: Decisions) -> Decisions:
        """The decisions with those of this step."""
        if self._outcome is None or self._trial is None:
            return decisions
        found = prune_decision(self._outcome, self._request, self._trial)
        more = {"pruning": found, "candidate": self._trial.name, "found": self._trial.verdict.text}
        return decisions.model_copy(update=more)


def _request(wanted: PruneWanted, common: Mapping[str, Any]) -> PruneRequest:
    sparsity, channels = wanted.shares
    data = common["data"]
    return PruneRequest(
        **common,
        sparsity=sparsity,
        pattern=wanted.pattern,
        threshold=wanted.threshold,
        importance=wanted.weight_importance(data),
        channels=channels,
        unit_importance=wanted.unit_importance(data),
        recovery=wanted.recovery(data),
    )
