"""Weights as tables and indices as a step of `optimize`: searched for on a file, or replayed on it.

It comes last: what pruning left and int8 made integers stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from graphopt.account import Remarks, Sizes, kept_or_forced
from graphopt.codebook_report import (
    NO_SPEED,
    CodebookDecision,
    CodebookRecord,
    CodebookTrial,
    CodedWeight,
)
from graphopt.codebook_search import (
    AUTO,
    BitsAsked,
    CodebookOutcome,
    CodebookRequest,
    CodebookSearch,
)
from graphopt.decisions import Decisions
from graphopt.ir import Model
from graphopt.judging import Judged
from graphopt.passes.quantize.codebook import CodebookRecipe
from graphopt.recorded import Setting, applied_or_refused
from graphopt.report import model_bytes
from graphopt.search import Trial
from graphopt.selection import Tell, least_bad

Array = NDArray[Any]


class Codebook:
    """The step. `recipe` is what was found, or read; None where that is nothing.

    Warnings gather in `remarks`.
    """

    name: ClassVar[str] = "codebook"

    def __init__(self, bits: BitsAsked | None, common: Mapping[str, Any], remarks: Remarks) -> None:
        self.recipe: CodebookRecipe | None = None
        self.is_wanted = bits is not None
        self._remarks = remarks
        self._bits = bits
        self._request = CodebookRequest(bits=bits or AUTO, **common)
        self._trial: Trial[CodebookRecipe] | None = None
        self._path: Path | None = None
        self._tables: dict[tuple[str, int], Array] = {}  # as the search found them

    def read(self, decisions: Decisions, arrays: Mapping[str, Array], path: Path) -> None:
        """Take what a file decided."""
        self._path, found = path, decisions.codebook
        self.is_wanted = found is not None
        if found is not None:
            self.recipe = CodebookRecipe(found.bits)

    def search(
        self, original: Path, base: Path, folder: Path, sizes: Sizes, tell: Tell
    ) -> CodebookRecord:
        """Look for the smallest good candidate for `base`, judged against the original."""
        outcome = CodebookSearch(original, base, self._request, folder, tell).run()
        trial = kept_or_forced(outcome, self._remarks, force=self._request.force)
        if trial is not None:
            self.recipe, self._trial = trial.recipe, trial
            self._tables = {key: coding.table for key, coding in outcome.codings.items()}
        return _account(outcome, self._request, trial, sizes, model_bytes(base))

    def applied(self, base: Path) -> Model:
        """The model with what was decided, as it is where that is nothing."""
        if self.recipe is None:
            return Model.load(base)
        recipe = self.recipe
        return applied_or_refused(lambda file: recipe.apply(file, self._tables), base, self._path)

    def replayed(self, decisions: Decisions, base: Path, sizes: Sizes) -> CodebookRecord | None:
        """The account of decisions that were read."""
        decision = decisions.codebook
        if decision is None:
            return None
        return CodebookRecord(
            mode="replay",
            kept=True,
            candidate=decision.candidate,
            reason="as it was decided",
            found=decision.found,
            bits=", ".join(str(bits) for bits in sorted(set(decision.bits.values()))),
            max_drop=float(decisions.options.get("max_drop") or 0.0),
            bytes_original=sizes.original,
            bytes_lossless=sizes.lossless,
            bytes_base=model_bytes(base),
            notes=[NO_SPEED],
        )

    @property
    def options(self) -> dict[str, Setting]:
        """What the user asked for, for the decisions file."""
        return {"codebook": self._bits} if self.is_wanted else {}

    @property
    def arrays(self) -> dict[str, Array]:
        """What the decisions need beside them: nothing, tables follow from the weights."""
        return {}

    def decided(self, decisions: Decisions) -> Decisions:
        """The decisions with those of this step."""
        if self._trial is None:
            return decisions
        trial = self._trial
        found = CodebookDecision(
            candidate=trial.name,
            found=trial.verdict.text,
            bits=dict(sorted(trial.recipe.bits.items())),
        )
        more = {"codebook": found, "candidate": trial.name, "found": trial.verdict.text}
        return decisions.model_copy(update=more)


def _account(
    outcome: CodebookOutcome,
    request: CodebookRequest,
    trial: Trial[CodebookRecipe] | None,
    sizes: Sizes,
    base: int,
) -> CodebookRecord:
    """The record of a search; `trial` is what is kept, None where nothing is."""
    shown, budget = trial or least_bad(outcome.trials), request.budget
    more: dict[str, Any] = {}
    if shown is not None:
        verdict = shown.verdict
        more = {"found": verdict.text, "bytes": model_bytes(shown.file)}
        more["weights"] = _weights(outcome, shown.recipe)
        if isinstance(verdict, Judged):
            more |= {"before": verdict.before, "after": verdict.after}
    return CodebookRecord(
        mode="search",
        kept=trial is not None,
        forced=trial is not None and bool(outcome.reason),
        candidate=shown.name if shown is not None else "",
        reason=outcome.reason or "it is smaller",
        bits=str(request.bits),
        metric=budget.metric,
        max_drop=budget.max_drop,
        min_sqnr=budget.min_sqnr,
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        bytes_base=base,
        candidates=[_trial(each) for each in outcome.trials],
        notes=[*outcome.notes, NO_SPEED],
        **more,
    )


def _weights(outcome: CodebookOutcome, recipe: CodebookRecipe) -> list[CodedWeight]:
    found = []
    for name, size in sorted(outcome.sizes.items(), key=lambda item: -item[1]):
        bits = recipe.bits.get(name)
        if bits is None:
            reason = outcome.refusals.get(name, "it does too much harm")
            found.append(
                CodedWeight(name=name, bits=32, reason=reason, bytes_before=size, bytes_after=size)
            )
            continue
        coding = outcome.codings[name, bits]
        found.append(
            CodedWeight(
                name=name,
                bits=bits,
                bytes_before=size,
                bytes_after=coding.bytes,
                sqnr_db=coding.sqnr_db,
            )
        )
    return found


def _trial(trial: Trial[CodebookRecipe]) -> CodebookTrial:
    return CodebookTrial(
        name=trial.name,
        good=trial.verdict.good,
        found=trial.verdict.text,
        drop=trial.verdict.drop,
        bytes=model_bytes(trial.file),
        weights={str(b): n for b, n in sorted(Counter(trial.recipe.bits.values()).items())},
    )
