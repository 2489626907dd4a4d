"""Int8 as a step of `optimize`: searched for on a model that lies on disk, or replayed on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from numpy.typing import NDArray

from graphopt.account import Remarks, Sizes, account, kept_or_forced, replayed_account
from graphopt.compress import Compression, Mode, Outcome, Request
from graphopt.decisions import Decisions
from graphopt.errors import UsageError
from graphopt.int8_report import Int8Record
from graphopt.ir import Model
from graphopt.passes.quantize.recipe import Recipe
from graphopt.recorded import (
    Setting,
    applied_or_refused,
    has_regions,
    recipe_of,
    rounded,
    with_regions,
)
from graphopt.search import Trial
from graphopt.selection import Tell
from graphopt.targets import OPSETS

NEEDED_OPSET: Final = 17  # what older models are raised to: the most widely read
_RANGE: Final = f"{OPSETS[0]} to {OPSETS[-1]}"

Array = NDArray[Any]


class Int8:
    """The step. `recipe` is what was found, or read; None where that is nothing.

    Warnings and notes gather in `remarks`.
    """

    name: ClassVar[str] = "int8"

    def __init__(self, mode: Mode | None, common: Mapping[str, Any], remarks: Remarks) -> None:
        self.recipe: Recipe | None = None
        self.is_wanted = mode is not None
        self.remarks = remarks
        self._request = Request(mode=mode or "auto", **common)
        self._outcome: Outcome | None = None
        self._trial: Trial[Recipe] | None = None
        self._path: Path | None = None

    def read(self, decisions: Decisions, arrays: Mapping[str, Array], path: Path) -> None:
        """Take what a file decided. Raises UsageError for what no recipe can be."""
        self._path = path
        self.is_wanted = has_regions(decisions)
        if self.is_wanted:
            self.recipe = recipe_of(decisions, path)

    def opset(self, own: int | None, given: int | None) -> int | None:
        """The opset to convert to: what is `given`, else one that int8 needs, else None."""
        if given is None and own is not None and own < OPSETS[0]:
            said = f"opset {own} became {NEEDED_OPSET}: int8 needs {_RANGE}"
            self.remarks.notes.append(said)
            return NEEDED_OPSET
        stated = own if given is None else given
        if stated is not None and stated not in OPSETS:
            said = f"opset {stated}: static int8 needs {_RANGE}"
            if self._request.mode == "static":
                raise UsageError(f"{said}; --opset {NEEDED_OPSET} gives it that")
            self.remarks.notes.append(said)
        return given

    def search(
        self, original: Path, base: Path, folder: Path, sizes: Sizes, tell: Tell
    ) -> Int8Record:
        """Look for the best recipe for the model `base`, judged against the original."""
        request = self._request
        outcome = Compression(original, base, request, folder, tell).run()
        if request.data is None and request.mode == "auto":
            self.remarks.notes.append("without --data nothing was calibrated: no static int8")
        trial = kept_or_forced(outcome, self.remarks, force=self._request.force)
        if trial is not None:
            self.recipe = rounded(trial.recipe)
            self._outcome, self._trial = outcome, dataclasses.replace(trial, recipe=self.recipe)
        record = account(outcome, request, trial, sizes)
        return record.model_copy(update={"notes": self.remarks.notes})

    def applied(self, base: Path) -> Model:
        """The model with what was decided, as it is where that is nothing."""
        if self.recipe is None:
            return Model.load(base)
        return applied_or_refused(self.recipe.apply, base, self._path)

    def replayed(self, decisions: Decisions, base: Path, sizes: Sizes) -> Int8Record | None:
        """The account of decisions that were read."""
        if self.recipe is None:
            return None
        return replayed_account(decisions, Model.load(base), sizes)

    @property
    def options(self) -> dict[str, Setting]:
        """What the user asked for, for the decisions file."""
        return {"int8": self._request.mode if self.is_wanted else None}

    @property
    def arrays(self) -> dict[str, Array]:
        """What the decisions need beside them: nothing."""
        return {}

    def decided(self, decisions: Decisions) -> Decisions:
        """The decisions with those of this step."""
        if self._outcome is None or self._trial is None:
            return decisions
        return with_regions(decisions, self._outcome, self._trial)
