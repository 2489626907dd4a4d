"""What a report says of pruning: what went, what that did, layer by layer, and what it gained."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from graphopt.int8_report import RatioRecord
from graphopt.record import Record

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


class PruneTrial(Record):
    """One candidate: whether it is good enough."""

    name: str
    good: bool = Field(description="within what may be lost")
    found: str = Field(description="how it compares with the original, in words")
    drop: float = Field(description="what it loses, in the units of `max_drop`")
    bytes: int
    share: float = Field(description="of the weights that are zero, or of the MACs that are gone")


class PruneRecord(Record):
    """What pruning was asked for, what was found, and what was kept."""

    mode: Literal["search", "replay"]
    kept: bool
    forced: bool = False
    candidate: str
    reason: str = Field(description="why it is kept, or why nothing is")
    found: str = ""
    zeros: bool = Field(description="single weights went, so that the file is sparse")
    channels: bool = Field(description="channels went, so that the model is another one")
    recovery: str
    importance: str
    metric: str | None = None
    before: float | None = Field(default=None, description="the original's score; agreement: 1")
    after: float | None = None
    max_drop: float
    min_sqnr: float | None = None
    feeds: int = Field(default=0, description="that layers were fitted on")
    held_out: bool = Field(
        default=False, description="it was compared on feeds that no layer was fitted on"
    )
    bytes_original: int
    bytes_lossless: int
    bytes: int | None = None
    macs_gone: float | None = Field(default=None, description="a share of all; of channels only")
    ms_original: float | None = None
    ms_lossless: float | None = None
    ms: float | None = None
    to_lossless: RatioRecord | None = None
    to_original: RatioRecord | None = None
    layers: list[PrunedLayer] = Field(default=[])
    groups: list[PrunedGroup] = Field(default=[])
    candidates: list[PruneTrial] = Field(default=[])
    notes: list[str] = Field(default=[])
    decisions: str | None = None
    seconds: dict[str, float] = Field(default={}, description="by stage")
