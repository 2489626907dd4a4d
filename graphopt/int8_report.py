"""What a report says of int8: what was kept and why, what else was tried, region by region."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graphopt.record import Record
from graphopt.step_report import RatioRecord, StepRecord, TrialRecord

Precision = Literal[
    "int8", "dynamic int8", "int8 weights", "int4 weights", "int8 table", "float16", "float"
]


class CandidateRecord(TrialRecord):
    """One candidate: whether it is good enough, and how fast it is."""

    regions: dict[str, int] = Field(description="how many regions take each option")
    to_lossless: RatioRecord | None = Field(default=None, description="None where it was not timed")
    to_original: RatioRecord | None = Field(default=None, description="of the finalists only")


class RegionRecord(Record):
    """Operators that one choice was made for.

    Static int8: units that hand each other integers. Dynamic int8: one product. In floats: all
    operators that stay so for the same reason.
    """

    root: str = Field(description="the value it is called after; empty for operators in floats")
    operators: str = Field(description="as in '12 Conv, 9 Mul'")
    precision: Precision
    why: str
    nodes: int
    ms_before: float | None = Field(default=None, description="in floats, as profiled here")
    ms_after: float | None = Field(default=None, description="on integers, as profiled here")
    sqnr_db: float | None = Field(default=None, description="of its results, the lowest")


class Int8Record(StepRecord):
    """What int8 was asked for, what was found, and what was kept."""

    mode: Literal["auto", "static", "dynamic", "weights", "replay"]
    sqnr_db: dict[str, float | None] = Field(
        default={}, description="of outputs against the original; None where no real numbers"
    )
    counts: dict[str, int] = Field(default={}, description="how many regions take each option")
    candidates: list[CandidateRecord] = Field(default=[])
    regions: list[RegionRecord] = Field(default=[])
