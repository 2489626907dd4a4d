"""What a report says of weights stored as tables and indices, and what the decisions file does."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from graphopt.record import Record
from graphopt.step_report import StepRecord, TrialRecord

NO_SPEED: Final = (
    "tables make the file smaller: onnxruntime looks weights up as it loads the model, so that "
    "nothing is faster and no memory is saved"
)


class CodedWeight(Record):
    """One weight of a layer."""

    name: str
    bits: int = Field(description="of an index; 32 where it stays as it is")
    reason: str = Field(default="", description="why it stays")
    bytes_before: int
    bytes_after: int = Field(description="of table and indices")
    sqnr_db: float | None = Field(
        default=None, description="of the weight itself; None where nothing is lost, or it stays"
    )


class CodebookTrial(TrialRecord):
    """One candidate: whether it is good enough."""

    weights: dict[str, int] = Field(description="how many weights have indices of so many bits")


class CodebookRecord(StepRecord):
    """What was asked for, what was found, and what was kept."""

    mode: Literal["search", "replay"]
    bits: str = Field(description="what was asked for: auto, 4 or 8")
    bytes_base: int = Field(description="of the model that it was done to")
    weights: list[CodedWeight] = Field(default=[], description="of the candidate, largest first")
    candidates: list[CodebookTrial] = Field(default=[])


class CodebookDecision(Record):
    """Bits by weight. Tables follow from the weights, so that a replay gives the same bytes."""

    candidate: str
    found: str
    bits: dict[str, Literal[4, 8]] = Field(description="of an index, by the weight's name")
