"""What a report says of pruning: what went, what that did, layer by layer, and what it gained."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from graphopt.record import Record
from graphopt.step_report import StepRecord, TrialRecord

NO_SPEED: Final = "onnxruntime gains no speed from single zeros: they make the file smaller"


class PrunedLayer(Record):
    """One layer. Errors are mean squares relative to the variance of what the layer gave before."""

    root: str
    operator: str
    kept: int = Field(description="weights that are not zero, before channels are cut out")
    total: int
    error_before: float = Field(description="with the weights that stay, in the pruned model")
    error_after: float = Field(description="once they are fitted again")
    ridge: float = Field(description="added to the mean squares of what it reads; 0: not fitted")
    bytes_before: int
    bytes_after: int
    ms_before: float | None = Field(default=None, description="as profiled here")
    ms_after: float | None = None


class PrunedGroup(Record):
    """Channels, heads or hidden units that go together."""

    root: str
    text: str = Field(description="how many go, of what, and because of what")
    units: int
    gone: int
    harm: float | None = Field(
        default=None, description="1 - agreement when these alone go, as measured and interpolated"
    )


class PruneTrial(TrialRecord):
    """One candidate: whether it is good enough."""

    share: float = Field(description="of the weights that are zero, or of the MACs that are gone")


class PruneRecord(StepRecord):
    """What pruning was asked for, what was found, and what was kept."""

    mode: Literal["search", "replay"]
    zeros: bool = Field(description="single weights went, so that the file is sparse")
    channels: bool = Field(description="channels went, so that the model is another one")
    recovery: str
    importance: str
    held_out: bool = Field(
        default=False, description="it was compared on feeds that no layer was fitted on"
    )
    macs_gone: float | None = Field(default=None, description="a share of all; of channels only")
    layers: list[PrunedLayer] = Field(default=[])
    groups: list[PrunedGroup] = Field(default=[])
    candidates: list[PruneTrial] = Field(default=[])
