"""What a report says of int8: what was kept and why, what else was tried, region by region."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graphopt.record import Record

Precision = Literal[
    "int8", "dynamic int8", "int8 weights", "int4 weights", "int8 table", "float16", "float"
]


class RatioRecord(Record):
    """Time of another model divided by the candidate's, with its interval; above 1 is faster."""

    ratio: float
    low: float
    high: float


class CandidateRecord(Record):
    """One candidate: whether it is good enough, and how fast it is."""

    name: str
    good: bool = Field(description="within what may be lost")
    found: str = Field(description="how it compares with the original, in words")
    drop: float = Field(description="what it loses, in the units of `max_drop`")
    bytes: int
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


class Int8Record(Record):
    """What int8 was asked for, what was found, and what was kept.

    Everything measured is of the candidate that is kept, or of the best one where none is.
    """

    mode: Literal["auto", "static", "dynamic", "weights", "replay"]
    kept: bool
    candidate: str = Field(description="name of the candidate that the rest is about, if any")
    reason: str = Field(description="why it is kept, or why nothing is")
    forced: bool = Field(default=False, description="it is kept only because that was forced")
    found: str = Field(default="", description="how it compares with the original, in words")
    metric: str | None = Field(default=None, description="None: by agreement with the original")
    before: float | None = Field(default=None, description="the original's score; agreement: 1")
    after: float | None = Field(default=None, description="its score, or agreement")
    max_drop: float = Field(description="what may be lost of it")
    min_sqnr: float | None = None
    feeds: int = Field(default=0, description="that calibration saw; 0: nothing was calibrated")
    sqnr_db: dict[str, float | None] = Field(
        default={}, description="of outputs against the original; None where no real numbers"
    )
    ms_original: float | None = None
    ms_lossless: float | None = None
    ms: float | None = Field(default=None, description="median milliseconds per run, as timed")
    to_lossless: RatioRecord | None = None
    to_original: RatioRecord | None = None
    bytes_original: int
    bytes_lossless: int
    bytes: int | None = None
    counts: dict[str, int] = Field(default={}, description="how many regions take each option")
    candidates: list[CandidateRecord] = Field(default=[])
    regions: list[RegionRecord] = Field(default=[])
    notes: list[str] = Field(default=[])
    decisions: str | None = Field(default=None, description="file they were written to, or read")
    seconds: dict[str, float] = Field(default={}, description="by stage")
