"""What a report says of every lossy step alike: what is kept and why, how it compares, its size."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from graphopt.record import Record


class RatioRecord(Record):
    """Time of another model divided by the candidate's, with its interval; above 1 is faster."""

    ratio: float
    low: float
    high: float


class TrialRecord(Record):
    """One candidate: whether it is good enough."""

    name: str
    good: bool = Field(description="within what may be lost")
    found: str = Field(description="how it compares with the original, in words")
    drop: float = Field(description="what it loses, in the units of `max_drop`")
    bytes: int


class StepRecord(Record):
    """What a step was asked for, what was found, and what was kept.

    Everything measured is of the candidate that is kept, or of the best one where none is.
    """

    mode: str = Field(description="how it was asked for; 'replay': as it was decided elsewhere")
    kept: bool
    forced: bool = Field(default=False, description="it is kept only because that was forced")
    candidate: str = Field(description="name of the candidate that the rest is about, if any")
    reason: str = Field(description="why it is kept, or why nothing is")
    found: str = Field(default="", description="how it compares with the original, in words")
    metric: str | None = Field(default=None, description="None: by agreement with the original")
    before: float | None = Field(default=None, description="the original's score; agreement: 1")
    after: float | None = Field(default=None, description="its score, or agreement")
    max_drop: float = Field(description="what may be lost of it")
    min_sqnr: float | None = None
    feeds: int = Field(default=0, description="that it learned from; 0: from none")
    bytes_original: int
    bytes_lossless: int
    bytes: int | None = Field(
        default=None, description="of the file with all steps in it, where it is kept"
    )
    ms_original: float | None = None
    ms_lossless: float | None = None
    ms: float | None = Field(default=None, description="median milliseconds per run, as timed")
    to_lossless: RatioRecord | None = None
    to_original: RatioRecord | None = None
    notes: list[str] = Field(default=[])
    decisions: str | None = Field(default=None, description="file they were written to, or read")
    seconds: dict[str, float] = Field(default={}, description="by stage")

    @property
    def trials(self) -> Sequence[TrialRecord]:
        """All candidates."""
        return getattr(self, "candidates", ())
