"""Low rank as a step of `optimize`: searched for on a model that lies on disk, or replayed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from graphopt.account import Remarks, Sizes, kept_or_forced
from graphopt.decisions import Decisions
from graphopt.ir import Model
from graphopt.low_rank_account import low_rank_account, low_rank_decision, replayed_low_rank
from graphopt.low_rank_report import LowRankRecord
from graphopt.low_rank_search import AUTO, LowRanking, LowRankOutcome, LowRankRequest
from graphopt.passes.recipe import StagedRecipe
from graphopt.recorded import Setting, applied_or_refused
from graphopt.search import Trial
from graphopt.selection import Tell, lost
from graphopt.wanted import LowRankWanted

Array = NDArray[Any]


class LowRank:
    """The step. `recipe` is what was found, or read; None where that is nothing.

    Warnings gather in `remarks`.
    """

    name: ClassVar[str] = "low_rank"

    def __init__(self, wanted: LowRankWanted, common: Mapping[str, Any], remarks: Remarks) -> None:
        self.recipe: StagedRecipe | None = None
        self.is_wanted = wanted.is_wanted
        self._remarks = remarks
        self._wanted = wanted
        self._request = LowRankRequest(share=wanted.kept or AUTO, methods=wanted.methods, **common)
        self._outcome: LowRankOutcome | None = None
        self._trial: Trial[StagedRecipe] | None = None
        self._path: Path | None = None

    def read(self, decisions: Decisions, arrays: Mapping[str, Array], path: Path) -> None:
        """Take what a file decided, with its factors. Raises ValueError for what is no recipe."""
        self._path = path
        self.is_wanted = decisions.low_rank is not None
        if self.is_wanted:
            self.recipe = StagedRecipe.of(arrays)
            if not arrays:
                raise ValueError("there are no factors in it")

    def search(
        self, original: Path, base: Path, folder: Path, sizes: Sizes, tell: Tell
    ) -> LowRankRecord:
        """Look for the best candidate, judged against the original."""
        outcome = LowRanking(original, base, self._request, folder, tell).run()
        trial = kept_or_forced(outcome, self._remarks, force=self._request.force)
        if trial is not None:
            self.recipe, self._outcome, self._trial = trial.recipe, outcome, trial
        return low_rank_account(outcome, self._request, trial, sizes)

    @property
    def alternatives(self) -> list[Trial[StagedRecipe]]:
        """What was found, and of all that is good what loses least: it leaves room for others."""
        if self._outcome is None or self._trial is None:
            return []
        good = [trial for trial in self._outcome.trials if trial.verdict.good]
        left = self._outcome.left
        gentle = min(good, key=lambda x: (*lost(x), -left[x.name]), default=self._trial)
        return [self._trial] if gentle is self._trial else [self._trial, gentle]

    def choose(self, trial: Trial[StagedRecipe] | None, sizes: Sizes) -> LowRankRecord:
        """Keep another of the candidates, or none; the new account."""
        assert self._outcome is not None
        self._trial, self.recipe = trial, None if trial is None else trial.recipe
        forced = f"forced: {self._outcome.reason}"
        others = [warning for warning in self._remarks.warnings if warning != forced]
        is_forced = trial is not None and bool(self._outcome.reason)
        self._remarks.warnings = [*others, forced] if is_forced else others
        return low_rank_account(self._outcome, self._request, trial, sizes)

    def applied(self, base: Path) -> Model:
        """The model with what was decided, as it is where that is nothing."""
        if self.recipe is None:
            return Model.load(base)
        return applied_or_refused(self.recipe.dense, base, self._path)

    def replayed(self, decisions: Decisions, base: Path, sizes: Sizes) -> LowRankRecord | None:
        """The account of decisions that were read."""
        if decisions.low_rank is None:
            return None
        max_drop = float(decisions.options.get("max_drop") or 0.0)
        return replayed_low_rank(decisions.low_rank, max_drop, sizes)

    @property
    def options(self) -> dict[str, Setting]:
        """What the user asked for, for the decisions file."""
        if not self.is_wanted:
            return {}
        return {"low_rank": self._wanted.share, "low_rank_method": self._wanted.method}

    @property
    def arrays(self) -> dict[str, Array]:
        """What the decisions need beside them."""
        return {} if self.recipe is None else self.recipe.arrays

    def decided(self, decisions: Decisions) -> Decisions:
        """The decisions with those of this step."""
        if self._outcome is None or self._trial is None:
            return decisions
        found = low_rank_decision(self._outcome, self._trial)
        more = {"low_rank": found, "candidate": self._trial.name}
        return decisions.model_copy(update={**more, "found": self._trial.verdict.text})
