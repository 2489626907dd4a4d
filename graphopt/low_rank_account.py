"""The account of low rank in the report, and in the decisions file."""

from __future__ import annotations

from typing import Any

from graphopt.account import Sizes, ratio_record
from graphopt.judging import Judged
from graphopt.low_rank_report import (
    LowRankDecision,
    LowRankRecord,
    LowRankTrial,
    SplitDecision,
    SplitRecord,
)
from graphopt.low_rank_search import LowRankOutcome, LowRankRequest, SplitLayer
from graphopt.passes.recipe import StagedRecipe
from graphopt.report import model_bytes
from graphopt.search import Trial


def low_rank_account(
    outcome: LowRankOutcome,
    request: LowRankRequest,
    trial: Trial[StagedRecipe] | None,
    sizes: Sizes,
) -> LowRankRecord:
    """The record of a search; `trial` is what is kept, None where nothing is."""
    winner, budget = outcome.winner, request.budget
    shown = trial or winner.trial or (outcome.trials[-1] if outcome.trials else None)
    more: dict[str, Any] = {}
    if shown is not None:
        more = _of(outcome, shown)
    if winner.timing is not None:
        more["ms_lossless"] = winner.timing.models[0].ms
        more["ms_original"] = winner.timing.models[-1].ms
    return LowRankRecord(
        mode="search",
        kept=trial is not None,
        forced=trial is not None and bool(outcome.reason),
        candidate=shown.name if shown is not None else "",
        reason=outcome.reason or "it is faster",
        methods=list(request.methods),
        metric=budget.metric,
        max_drop=budget.max_drop,
        min_sqnr=budget.min_sqnr,
        feeds=outcome.feeds,
        held_out=outcome.held_out,
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        candidates=[_trial(outcome, each) for each in outcome.trials],
        notes=list(outcome.notes),
        **more,
    )


def replayed_low_rank(decision: LowRankDecision, max_drop: float, sizes: Sizes) -> LowRankRecord:
    """The record of what was decided elsewhere: nothing is measured."""
    return LowRankRecord(
        mode="replay",
        kept=True,
        candidate=decision.candidate,
        reason="as it was decided",
        found=decision.found,
        methods=sorted({layer.method for layer in decision.layers}),
        max_drop=max_drop,
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        macs_left=decision.macs_left,
    )


def low_rank_decision(outcome: LowRankOutcome, trial: Trial[StagedRecipe]) -> LowRankDecision:
    """What the decisions file says."""
    return LowRankDecision(
        candidate=trial.name,
        found=trial.verdict.text,
        macs_left=outcome.left[trial.name],
        layers=[
            SplitDecision(
                root=layer.group.root,
                method=layer.option.method,
                ranks=list(layer.ranks),
                error=layer.error,
            )
            for layer in outcome.layers[trial.name]
            if layer.option.method is not None
        ],
    )


def _of(outcome: LowRankOutcome, trial: Trial[StagedRecipe]) -> dict[str, Any]:
    """What is said of one candidate."""
    winner, verdict, name = outcome.winner, trial.verdict, trial.name
    found: dict[str, Any] = {
        "found": verdict.text,
        "bytes": model_bytes(trial.file),
        "to_lossless": ratio_record(winner.against_lossless, name),
        "to_original": ratio_record(winner.against_original, name),
        "macs_left": outcome.left[name],
        "layers": [_layer(layer) for layer in outcome.layers[name]],
    }
    if isinstance(verdict, Judged):
        found["before"], found["after"] = verdict.before, verdict.after
    finalists = list(winner.against_original)  # as they were timed, behind the lossless model
    if winner.timing is not None and name in finalists:
        found["ms"] = winner.timing.models[1 + finalists.index(name)].ms
    return found


def _layer(layer: SplitLayer) -> SplitRecord:
    first, option = layer.group.first, layer.option
    return SplitRecord(
        root=first.root,
        operator=first.node.op,
        layers=len(layer.group.layers),
        outputs=first.shape[0],
        inputs=first.shape[1],
        method=option.method or "",
        ranks=list(layer.ranks),
        error=layer.error,
        degeneracy=layer.degeneracy,
        macs_before=layer.group.macs,
        macs_after=option.macs,
        ms_before=layer.ms_before,
        ms_after=layer.ms_after,
    )


def _trial(outcome: LowRankOutcome, trial: Trial[StagedRecipe]) -> LowRankTrial:
    return LowRankTrial(
        name=trial.name,
        good=trial.verdict.good,
        found=trial.verdict.text,
        drop=trial.verdict.drop,
        bytes=model_bytes(trial.file),
        left=outcome.left[trial.name],
    )
