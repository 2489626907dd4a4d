"""What a user asks of int8, and what of that can come to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from graphopt.compress import MODES, Mode
from graphopt.errors import UsageError
from graphopt.judging import Budget
from graphopt.metric import load_metric

_ASK: Final = "int8='auto' (--int8 auto)"


@dataclass(frozen=True)
class Wanted:
    """What the user asks of int8: to search for it (`mode`), or to replay decisions."""

    mode: Mode | None
    budget: Budget = field(default_factory=Budget)
    decisions: Path | None = None
    replay: Path | None = None
    force: bool = False
    threads: int = 0

    def check(self, target: str, data: str | None, models: Sequence[Path]) -> None:
        """Raise UsageError, at once, for what can come to nothing."""
        if self.mode is not None and self.mode not in MODES:
            raise UsageError(f"int8 {self.mode!r}: there are {', '.join(map(repr, MODES))}")
        if self.mode is None and self.replay is None:
            raise UsageError(f"{self._first()}: it is for int8, which is not asked for: {_ASK}")
        if target != "ort-cpu":
            raise UsageError(
                "int8 is made for onnxruntime's CPU provider: ask for that target as well, "
                "target='ort-cpu' (--target ort-cpu)"
            )
        self._check_numbers()
        if self.mode == "static" and data is None and self.replay is None:
            raise UsageError("static int8 has to be calibrated: --data with some inputs")
        if self.decisions is not None and self.replay is not None:
            raise UsageError("decisions are recorded, or replayed: give one of the two")
        if self.decisions is not None:
            place = self.decisions.resolve()
            if any(place == model.resolve() for model in models):
                raise UsageError(f"decisions {self.decisions}: that is a model of this run")
        if self.budget.metric is not None and self.replay is None:
            load_metric(self.budget.metric)

    def _first(self) -> str:
        """The first option that was given."""
        given = {
            "metric": self.budget.metric,
            "min-sqnr": self.budget.min_sqnr,
            "decisions": self.decisions,
            "force": self.force or None,
            "threads": self.threads or None,
        }
        return next((name for name, value in given.items() if value is not None), "max-drop")

    def _check_numbers(self) -> None:
        budget = self.budget
        if not (budget.max_drop >= 0 and math.isfinite(budget.max_drop)):
            raise UsageError(f"max-drop {budget.max_drop}: it is 0 or more")
        if budget.min_sqnr is not None and not math.isfinite(budget.min_sqnr):
            raise UsageError(f"min-sqnr {budget.min_sqnr}: it is a number of decibels")
        if self.threads < 0:
            raise UsageError(f"threads {self.threads}: 0 for all cores, or a number of them")
