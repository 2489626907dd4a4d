"""The account of pruning in the report, and in the decisions file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.account import Sizes, ratio_record
from graphopt.attribution import NodeCosts
from graphopt.decisions import PruningDecision
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.judging import Judged
from graphopt.passes.fitting import LayerFit
from graphopt.passes.linear import linear_layers
from graphopt.passes.prune.remove import SUFFIX
from graphopt.passes.recipe import StagedRecipe
from graphopt.prune_report import (
    NO_SPEED,
    PrunedGroup,
    PrunedLayer,
    PruneRecord,
    PruneTrial,
)
from graphopt.pruning import PruneOutcome, PruneRequest
from graphopt.report import model_bytes
from graphopt.search import Trial


def prune_account(
    outcome: PruneOutcome,
    request: PruneRequest,
    trial: Trial[StagedRecipe] | None,
    sizes: Sizes,
    lossless: Path,
) -> PruneRecord:
    """The record of a search; `trial` is what is kept, None where nothing is."""
    winner, budget = outcome.winner, request.budget
    shown = trial or winner.trial or (outcome.trials[-1] if outcome.trials else None)
    is_cut = request.channels is not None
    more: dict[str, Any] = {}
    if shown is not None:
        more |= _of(outcome, shown, lossless)
    if winner.timing is not None:
        more["ms_lossless"] = winner.timing.models[0].ms
        more["ms"] = winner.timing.models[1].ms
        more["ms_original"] = winner.timing.models[-1].ms
    return PruneRecord(
        mode="search",
        kept=trial is not None,
        forced=trial is not None and bool(outcome.reason),
        candidate=shown.name if shown is not None else "",
        reason=outcome.reason or ("it is faster" if is_cut else "it is smaller"),
        zeros=request.wants_zeros,
        channels=is_cut,
        recovery=request.recovery,
        importance=_importance(request),
        metric=budget.metric,
        max_drop=budget.max_drop,
        min_sqnr=budget.min_sqnr,
        feeds=outcome.feeds,
        held_out=outcome.held_out,
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        candidates=[_trial(outcome, each) for each in outcome.trials],
        notes=[*outcome.notes, *([NO_SPEED] if request.wants_zeros else [])],
        **more,
    )


def replayed_pruning(decision: PruningDecision, max_drop: float, sizes: Sizes) -> PruneRecord:
    """The record of pruning that was decided elsewhere: nothing is measured."""
    return PruneRecord(
        mode="replay",
        kept=True,
        candidate=decision.candidate,
        reason="as it was decided",
        found=decision.found,
        zeros=decision.zeros,
        channels=bool(decision.groups),
        recovery=decision.recovery,
        importance=decision.importance,
        max_drop=max_drop,
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        groups=[
            PrunedGroup(root=root, text=f"{gone} units of {root}", units=0, gone=gone)
            for root, gone in decision.groups.items()
        ],
        notes=[NO_SPEED] if decision.zeros else [],
    )


def prune_decision(
    outcome: PruneOutcome, request: PruneRequest, trial: Trial[StagedRecipe]
) -> PruningDecision:
    """What the decisions file says."""
    return PruningDecision(
        candidate=trial.name,
        found=trial.verdict.text,
        zeros=request.wants_zeros,
        recovery=request.recovery,
        importance=_importance(request),
        groups={g.root: g.gone for g in outcome.groups.get(trial.name, []) if g.gone},
    )


def _importance(request: PruneRequest) -> str:
    by: list[str] = [request.importance] if request.wants_zeros else []
    by += [request.unit_importance] if request.channels is not None else []
    return ", ".join(dict.fromkeys(by))


def _of(outcome: PruneOutcome, trial: Trial[StagedRecipe], lossless: Path) -> dict[str, Any]:
    """What is said of one candidate."""
    winner, verdict, name = outcome.winner, trial.verdict, trial.name
    found: dict[str, Any] = {
        "found": verdict.text,
        "bytes": model_bytes(trial.file),
        "to_lossless": ratio_record(winner.against_lossless, name),
        "to_original": ratio_record(winner.against_original, name),
        "layers": _layers(outcome, trial, lossless),
        "macs_gone": outcome.macs.get(name),
        "groups": [
            PrunedGroup(root=g.root, text=g.text, units=g.units, gone=g.gone, harm=g.harm)
            for g in outcome.groups.get(name, [])
        ],
    }
    if isinstance(verdict, Judged):
        found["before"], found["after"] = verdict.before, verdict.after
    return found


def _layers(outcome: PruneOutcome, trial: Trial[StagedRecipe], lossless: Path) -> list[PrunedLayer]:
    before, after = _weight_bytes(lossless), _weight_bytes(trial.file)
    return [
        PrunedLayer(
            root=fit.root,
            operator=fit.operator,
            kept=fit.kept,
            total=fit.total,
            error_before=fit.error_before,
            error_after=fit.error_after,
            ridge=fit.ridge,
            bytes_before=before.get(fit.root, 0),
            bytes_after=after.get(fit.root, after.get(fit.root + SUFFIX, 0)),
            ms_before=_ms(outcome.costs, fit),
            ms_after=_ms(outcome.costs_after, fit),
        )
        for fit in outcome.layers.get(trial.name, [])
    ]


def _ms(costs: NodeCosts | None, fit: LayerFit) -> float | None:
    """What a layer takes, with all that runs as one with it."""
    if costs is None:
        return None
    for name in (fit.root, fit.root + SUFFIX):
        if any(name in (root, *costs.computed[root]) for root in costs.values):
            return costs.of([name])
    return None


def _weight_bytes(path: Path) -> dict[str, int]:
    """Bytes that each layer's weights take in a file, by what the layer computes."""
    edit = Editor(Model.load(path))
    return {layer.root: layer.weight.nbytes for layer in linear_layers(edit, sparse=True)}


def _trial(outcome: PruneOutcome, trial: Trial[StagedRecipe]) -> PruneTrial:
    return PruneTrial(
        name=trial.name,
        good=trial.verdict.good,
        found=trial.verdict.text,
        drop=trial.verdict.drop,
        bytes=model_bytes(trial.file),
        share=outcome.shares.get(trial.name, 0.0),
    )
