"""What a report says of low rank: which layers were split into what, and what that did."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graphopt.record import Record
from graphopt.step_report import StepRecord, TrialRecord


class SplitRecord(Record):
    """One layer, or several that read one weight and are split alike."""

    root: str
    operator: str
    layers: int
    outputs: int
    inputs: int = Field(description="weights for each output")
    method: str = Field(description="svd, channel, spatial, tucker, cp; empty: left as it is")
    ranks: list[int] = Field(description="channels between the parts")
    error: float = Field(description="share of the variance of what it gives that is lost")
    degeneracy: float | None = Field(
        default=None, description="of cp: squares of all terms over those of the weights"
    )
    macs_before: int
    macs_after: int
    ms_before: float | None = Field(default=None, description="as profiled here, in the model")
    ms_after: float | None = None


class LowRankTrial(TrialRecord):
    """One candidate: whether it is good enough."""

    left: float = Field(description="share of the MACs")


class LowRankRecord(StepRecord):
    """What was asked for, what was found, and what was kept."""

    mode: Literal["search", "replay"]
    methods: list[str] = Field(description="forms that layers could take")
    held_out: bool = Field(
        default=False, description="it was compared on feeds that no layer was fitted on"
    )
    macs_left: float | None = Field(default=None, description="share of the model's MACs")
    layers: list[SplitRecord] = Field(default=[], description="all that could be split, in order")
    candidates: list[LowRankTrial] = Field(default=[])


class SplitDecision(Record):
    """How one layer was split; its factors lie in the file of weights."""

    root: str
    method: str
    ranks: list[int]
    error: float


class LowRankDecision(Record):
    """What was split."""

    candidate: str
    found: str
    macs_left: float
    layers: list[SplitDecision]
