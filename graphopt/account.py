"""The account of int8 in the report: what was kept and why, and everything that was tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from graphopt.compress import Outcome, Request, counts
from graphopt.decisions import Decisions, RegionDecision
from graphopt.int8_regions import Choice, operators
from graphopt.int8_report import CandidateRecord, Int8Record, Precision, RegionRecord
from graphopt.ir import Model, Node
from graphopt.judging import Judged
from graphopt.passes.quantize.recipe import DYNAMIC, HALF, STATIC, TABLE, WEIGHTS, Recipe
from graphopt.regions import boundary, connected
from graphopt.report import model_bytes
from graphopt.search import Trial
from graphopt.selection import least_bad
from graphopt.step_report import RatioRecord
from graphopt.timing import Ratio

R = TypeVar("R")
_PRECISIONS: Mapping[str, Precision] = {
    STATIC: "int8",
    DYNAMIC: "dynamic int8",
    WEIGHTS[8]: "int8 weights",
    WEIGHTS[4]: "int4 weights",
    TABLE: "int8 table",
    HALF: "float16",
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of the models before."""

    original: int
    lossless: int


@dataclass
class Remarks:
    """What is said beside the numbers: `warnings` in the report's, `notes` in int8's own part."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Found(Protocol[R]):
    """What a search found: `kept` is None where nothing is worth keeping, for the `reason`."""

    @property
    def kept(self) -> Trial[R] | None: ...
    @property
    def reason(self) -> str: ...
    @property
    def trials(self) -> list[Trial[R]]: ...


def kept_or_forced(found: Found[R], remarks: Remarks, *, force: bool) -> Trial[R] | None:
    """What is kept. With `force` the best good one, or, where none is good, the least bad."""
    kept = found.kept
    if kept is None and force:
        kept = least_bad(found.trials)
    if kept is not None and found.reason:
        remarks.warnings.append(f"forced: {found.reason}")
    return kept


def account(
    outcome: Outcome, request: Request, trial: Trial[Recipe] | None, sizes: Sizes
) -> Int8Record:
    """The record of a search; `trial` is what is kept, None where nothing is."""
    winner, budget = outcome.winner, request.budget
    shown = trial or winner.trial
    whole: dict[str, Any] = {}
    if shown is not None:
        whole = _of_candidate(outcome, shown)
    if winner.timing is not None:
        whole["ms_lossless"] = winner.timing.models[0].ms
        whole["ms_original"] = winner.timing.models[-1].ms
    return Int8Record(
        mode=request.mode,
        kept=trial is not None,
        forced=trial is not None and bool(outcome.reason),
        reason=outcome.reason or "the fastest candidate that is good enough",
        metric=budget.metric,
        max_drop=budget.max_drop,
        min_sqnr=budget.min_sqnr,
        feeds=outcome.feeds,
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        candidates=[_candidate(outcome, each) for each in outcome.trials],
        **({"candidate": ""} | whole),
    )


def replayed_account(decisions: Decisions, lossless: Model, sizes: Sizes) -> Int8Record:
    """The record of decisions that were replayed: what they say; nothing is measured."""
    chosen = [r for r in decisions.regions if r.option in _PRECISIONS]
    budget = decisions.options
    max_drop, min_sqnr = budget.get("max_drop"), budget.get("min_sqnr")
    metric = budget.get("metric")
    return Int8Record(
        mode="replay",
        kept=True,
        candidate=decisions.candidate,
        reason=f"decided by graphopt {decisions.graphopt} on {decisions.host.cpu}",
        found=decisions.found,
        metric=metric if isinstance(metric, str) else None,
        max_drop=float(max_drop or 0.0),
        min_sqnr=None if min_sqnr is None else float(min_sqnr),
        bytes_original=sizes.original,
        bytes_lossless=sizes.lossless,
        counts={o: n for o in _PRECISIONS if (n := sum(r.option == o for r in chosen))},
        regions=_recorded(decisions, lossless),
    )


def _recorded(decisions: Decisions, model: Model) -> list[RegionRecord]:
    """Regions as in the report of the search: units that hand each other integers are one."""
    nodes = {region.root: list(_nodes(region, model)) for region in decisions.regions}
    static = [region for region in decisions.regions if region.option == STATIC]
    owner = {node: region for region in static for node in nodes[region.root]}
    found = []
    for group in connected(owner):
        inside = list({owner[node].root: owner[node] for node in group}.values())
        outputs = [value.name for value in boundary(group)[1]]
        found.append(_region(outputs[-1], group, inside, outputs))
    reasons: dict[str, list[RegionDecision]] = {}
    for region in decisions.regions:
        if region.option not in _PRECISIONS:
            reasons.setdefault(region.reason, []).append(region)
        elif region.option != STATIC:
            found.append(_region(region.root, nodes[region.root], [region]))
    left = [_region("", [n for r in f for n in nodes[r.root]], f) for f in reasons.values()]
    return found + left


def _nodes(region: RegionDecision, model: Model) -> Iterator[Node]:
    for name in region.nodes:
        value = model.graph.values.get(name)
        if value is not None and value.producer is not None:
            yield value.producer


def _region(
    root: str,
    nodes: Sequence[Node],
    inside: Sequence[RegionDecision],
    outputs: Collection[str] = (),
) -> RegionRecord:
    """Several decisions as one region: its time where all have one, the noise of its outputs."""
    given = [r.sqnr_db for r in inside if not outputs or r.root in outputs]
    before = [r.ms_before for r in inside if r.ms_before is not None]
    after = [r.ms_after for r in inside if r.ms_after is not None]
    precision = _PRECISIONS.get(inside[0].option, "float")
    is_float = precision == "float"
    return RegionRecord(
        root=root,
        operators=operators(nodes) or "1 weight",
        precision=precision,
        why=Counter(r.reason for r in inside).most_common(1)[0][0],
        nodes=len(nodes),
        ms_before=sum(before) if len(before) == len(inside) else None,
        ms_after=sum(after) if len(after) == len(inside) and not is_float else None,
        sqnr_db=min((db for db in given if db is not None), default=None),
    )


def _of_candidate(outcome: Outcome, trial: Trial[Recipe]) -> dict[str, Any]:
    """What is said of the candidate that is kept, or of the best one."""
    winner, verdict = outcome.winner, trial.verdict
    choice, outputs = Choice(outcome, trial), outcome.candidates.model.graph.outputs
    found: dict[str, Any] = {
        "candidate": trial.name,
        "found": verdict.text,
        "counts": dict(counts(trial.recipe)),
        "regions": choice.records(),
        "bytes": model_bytes(trial.file),
        "to_lossless": ratio_record(winner.against_lossless, trial.name),
        "to_original": ratio_record(winner.against_original, trial.name),
        "sqnr_db": {value.name: choice.sqnr_db([value.name]) for value in outputs},
    }
    if isinstance(verdict, Judged):
        found["before"], found["after"] = verdict.before, verdict.after
        if verdict.quality is not None:
            found["sqnr_db"] = {o.name: o.sqnr_db for o in verdict.quality.outputs}
    finalists = list(winner.against_original)  # as they were timed, behind the lossless model
    if winner.timing is not None and trial.name in finalists:
        found["ms"] = winner.timing.models[1 + finalists.index(trial.name)].ms
    return found


def _candidate(outcome: Outcome, trial: Trial[Recipe]) -> CandidateRecord:
    return CandidateRecord(
        name=trial.name,
        good=trial.verdict.good,
        found=trial.verdict.text,
        drop=trial.verdict.drop,
        bytes=model_bytes(trial.file),
        regions=dict(counts(trial.recipe)),
        to_lossless=ratio_record(outcome.winner.against_lossless, trial.name),
        to_original=ratio_record(outcome.winner.against_original, trial.name),
    )


def ratio_record(ratios: Mapping[str, Ratio], name: str) -> RatioRecord | None:
    """How a candidate compares in time; None where it was not timed."""
    found = ratios.get(name)
    if found is None:
        return None
    return RatioRecord(ratio=found.median, low=found.low, high=found.high)
