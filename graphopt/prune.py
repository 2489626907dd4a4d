"""Pruning as a step of `optimize`: searched for on a model that lies on disk, or replayed on it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from graphopt import exporter
from graphopt.account import Remarks, Sizes, kept_or_forced
from graphopt.decisions import Decisions, sha256
from graphopt.errors import UsageError
from graphopt.passes.recipe import StagedRecipe
from graphopt.prune_account import prune_account, prune_decision, replayed_pruning
from graphopt.prune_report import PruneRecord
from graphopt.pruning import PruneOutcome, PruneRequest, Pruning
from graphopt.recorded import Setting
from graphopt.search import Trial
from graphopt.selection import Tell
from graphopt.wanted import PruneWanted

_DAMAGE: Final = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile)


class Prune:
    """The step. `recipe` is what was found, or read; None where that is nothing.

    Warnings gather in `remarks`.
    """

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

    def read(self, decisions: Decisions, path: Path) -> None:
        """Take what a file decided, with the weights beside it. Raises UsageError for damage."""
        self._path, found = path, decisions.pruning
        self.is_wanted = found is not None
        if found is None:
            return
        self.has_zeros = found.zeros
        beside = path.with_name(path.name + ".npz")
        try:
            if sha256([beside]) != found.sha256:
                raise ValueError("it is not the file that was written with them")
            with np.load(beside, allow_pickle=False) as archive:
                self.recipe = StagedRecipe.of({name: archive[name] for name in archive.files})
        except _DAMAGE as error:
            said = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"decisions {path}: the weights {beside.name}: {said}") from None

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

    def base(self, lossless: Path, folder: Path) -> Path:
        """The pruned model, all zeros in it, as a file; the lossless one where nothing is kept."""
        if self.recipe is None:
            return lossless
        target = folder / "base.onnx"
        try:
            exporter.save(self.recipe.dense(lossless), target)
        except (LookupError, ValueError) as error:
            if self._path is None:
                raise
            said = " ".join(str(error).split())
            raise UsageError(f"decisions {self._path}: cannot be replayed: {said}") from error
        return target

    def replayed(self, decisions: Decisions, sizes: Sizes) -> PruneRecord | None:
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

    def decided(self, decisions: Decisions, beside: Path) -> tuple[Decisions, list[Path]]:
        """The decisions with those of this step, and the file of weights, if there is one."""
        if self._outcome is None or self._trial is None or self.recipe is None:
            return decisions, []
        with beside.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.recipe.arrays)
        found = prune_decision(self._outcome, self._request, self._trial, sha256([beside]))
        more = {"pruning": found, "candidate": self._trial.name, "found": self._trial.verdict.text}
        return decisions.model_copy(update=more), [beside]


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
