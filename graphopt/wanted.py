"""What a user asks of lossy steps, and what of that can come to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from graphopt.codebook_search import BitsAsked
from graphopt.compress import MODES, Mode
from graphopt.decisions import WEIGHTS
from graphopt.errors import UsageError
from graphopt.judging import Budget
from graphopt.metric import load_metric
from graphopt.passes.fitting import RECOVERIES, Recovery
from graphopt.passes.lowrank.forms import METHODS, Method
from graphopt.passes.lowrank.options import AUTOMATIC
from graphopt.passes.prune.importance import UNIT_IMPORTANCES, UnitImportance
from graphopt.passes.prune.weights import IMPORTANCES, Importance, Pattern, Sparsity
from graphopt.pruning import AUTO, Share

_ASK: Final = (
    "int8='auto' (--int8 auto), or sparsity, nm, threshold, channels, low-rank or codebook"
)
_BITS: Final[tuple[BitsAsked, ...]] = ("auto", 8, 4)


@dataclass(frozen=True, kw_only=True)
class PruneWanted:
    """What the user asks of pruning, as it was said: shares are numbers or "auto"."""

    sparsity: float | str | None = None
    nm: str | None = None
    block: str | None = None
    threshold: float | None = None
    channels: float | str | None = None
    importance: str | None = None
    recover: str | None = None

    @property
    def wants_zeros(self) -> bool:
        """True where single weights are to go."""
        return any(each is not None for each in (self.sparsity, self.nm, self.threshold))

    @property
    def is_wanted(self) -> bool:
        """True where anything is to go."""
        return self.wants_zeros or self.channels is not None

    @property
    def pattern(self) -> Pattern:
        """Where zeros lie."""
        stated = self.nm or self.block
        return Pattern.of(stated) if stated is not None else Pattern()

    @property
    def shares(self) -> tuple[Share | None, Share | None]:
        """Of zeros, and of MACs that go with channels."""
        return share("sparsity", self.sparsity), share("channels", self.channels)

    def weight_importance(self, data: str | None) -> Importance:
        """By which single weights are chosen: by what layers read where there is data."""
        given = next((each for each in IMPORTANCES if each == self.importance), None)
        return given or ("lamp" if data is None else "obs")

    def unit_importance(self, data: str | None) -> UnitImportance:
        """By which channels are chosen: by what their readers lose where there is data."""
        given = next((each for each in UNIT_IMPORTANCES if each == self.importance), None)
        return given or ("l2" if data is None else "obs")

    def recovery(self, data: str | None) -> Recovery:
        """How what is left is fitted: not at all without data."""
        given = next((each for each in RECOVERIES if each == self.recover), None)
        return given or ("none" if data is None else "lsq")

    def check(self, data: str | None) -> None:
        """Raise UsageError for what can come to nothing."""
        sparsity, _ = self.shares
        stated = {"sparsity": self.sparsity, "nm": self.nm, "threshold": self.threshold}
        given = [name for name, value in stated.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: say in one way how many weights go")
        if self.block is not None and self.sparsity is None:
            raise UsageError("block: how many go? sparsity (--sparsity) says it")
        if self.pattern.m and self.block is not None:
            raise UsageError(f"block {self.block!r}: write ROWSxCOLUMNS, as 4x1")
        if self.nm is not None and not self.pattern.m:
            raise UsageError(f"nm {self.nm!r}: write N:M, as 2:4")
        self._check_names(data)
        if self.wants_zeros and sparsity != AUTO:
            Sparsity(sparsity, self.threshold, self.pattern)

    def _check_names(self, data: str | None) -> None:
        if self.importance is not None:
            known: list[str] = [*(IMPORTANCES if self.wants_zeros else ())]
            known += UNIT_IMPORTANCES if self.channels is not None else ()
            known = list(dict.fromkeys(known))
            if self.importance not in known:
                raise UsageError(
                    f"importance {self.importance!r}: there are {', '.join(known)} for this"
                )
            if data is None and self.importance in ("wanda", "obs", "activation", "apoz"):
                raise UsageError(f"importance {self.importance} needs feeds: --data")
        if self.recover is not None and self.recover not in RECOVERIES:
            raise UsageError(f"recover {self.recover!r}: there are {', '.join(RECOVERIES)}")
        if data is None and self.recover not in (None, "none"):
            raise UsageError(f"recover {self.recover} needs feeds: --data with some inputs")


def share(name: str, stated: float | str | None) -> Share | None:
    """A share from 0 to below 1, or "auto". Raises UsageError for anything else."""
    if stated is None or stated == AUTO:
        return AUTO if stated == AUTO else None
    try:
        number = float(stated)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise UsageError(f"{name} {stated}: it is a share above 0 and below 1, or 'auto'")
    return number


@dataclass(frozen=True, kw_only=True)
class LowRankWanted:
    """What the user asks of low rank, as it was said: the share of MACs that is kept, and forms."""

    share: float | str | None = None
    method: str | None = None

    @property
    def is_wanted(self) -> bool:
        """True where layers are to be split."""
        return self.share is not None

    @property
    def kept(self) -> Share | None:
        """The share of MACs that is to be left."""
        return share("low-rank", self.share)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The forms that layers may take; layers that one cannot be of are left to the SVD."""
        if self.method in (None, AUTO):
            return AUTOMATIC
        return tuple(method for method in METHODS if method in ("svd", self.method))

    def check(self) -> None:
        """Raise UsageError for what can come to nothing."""
        if self.kept is None and self.method is not None:
            raise UsageError(
                f"low-rank-method {self.method}: how much is to be left? low-rank (--low-rank)"
            )
        if self.method is not None and self.method not in (AUTO, *METHODS):
            raise UsageError(
                f"low-rank-method {self.method!r}: there are auto, {', '.join(METHODS)}"
            )


@dataclass(frozen=True)
class Wanted:
    """What the user asks: of each lossy step, `mode` of int8, or to replay decisions."""

    mode: Mode | None
    budget: Budget = field(default_factory=Budget)
    decisions: Path | None = None
    replay: Path | None = None
    force: bool = False
    threads: int = 0
    prune: PruneWanted = field(default_factory=PruneWanted)
    low_rank: LowRankWanted = field(default_factory=LowRankWanted)
    codebook: str | int | None = None

    @property
    def bits(self) -> BitsAsked | None:
        """Of the indices of tables of weights."""
        return next((each for each in _BITS if str(each) == str(self.codebook)), None)

    @property
    def asks(self) -> bool:
        """True where any step is asked for."""
        steps = (self.mode, self.codebook, self.prune.is_wanted, self.low_rank.is_wanted)
        return any(each not in (None, False) for each in steps)

    def fits(self, data: str | None) -> bool:
        """True where weights are fitted to the feeds."""
        is_pruned = self.prune.is_wanted and self.prune.recovery(data) != "none"
        return is_pruned or (self.low_rank.is_wanted and data is not None)

    def check(self, target: str, data: str | None, models: Sequence[Path]) -> None:
        """Raise UsageError, at once, for what can come to nothing."""
        if self.mode is not None and self.mode not in MODES:
            raise UsageError(f"int8 {self.mode!r}: there are {', '.join(map(repr, MODES))}")
        self.low_rank.check()
        if self.codebook is not None and self.bits is None:
            raise UsageError(f"codebook {self.codebook!r}: there are {', '.join(map(str, _BITS))}")
        if self.replay is None and not self.asks:
            raise UsageError(f"{self._first()}: it is for lossy steps; ask for one: {_ASK}")
        if self.mode is not None and target != "ort-cpu":
            raise UsageError(
                "int8 is made for onnxruntime's CPU provider: ask for that target as well, "
                "target='ort-cpu' (--target ort-cpu)"
            )
        self._check_numbers()
        self.prune.check(data)
        if self.mode == "static" and data is None and self.replay is None:
            raise UsageError("static int8 has to be calibrated: --data with some inputs")
        if self.decisions is not None and self.replay is not None:
            raise UsageError("decisions are recorded, or replayed: give one of the two")
        if self.decisions is not None:
            place = self.decisions.resolve()
            if any(place == model.resolve() for model in models):
                raise UsageError(f"decisions {self.decisions}: that is a model of this run")
            beside = place.with_name(place.name + WEIGHTS)
            if data is not None and Path(data).resolve() in (place, beside):
                raise UsageError(f"decisions {self.decisions}: they would replace the data {data}")
            if data is not None and Path(data).resolve() == place.parent:
                raise UsageError(f"decisions {self.decisions}: they would be taken for data there")
        if self.budget.metric is not None and self.replay is None:
            load_metric(self.budget.metric)

    def _first(self) -> str:
        """The first option that was given."""
        prune = self.prune
        given = {
            "metric": self.budget.metric,
            "min-sqnr": self.budget.min_sqnr,
            "decisions": self.decisions,
            "force": self.force or None,
            "threads": self.threads or None,
            "block": prune.block,
            "importance": prune.importance,
            "recover": prune.recover,
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
