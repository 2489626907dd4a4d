"""Lines that the screens of all lossy steps have: what is kept, how it compares, how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from graphopt.render import text

if TYPE_CHECKING:
    from graphopt.step_report import RatioRecord, StepRecord, TrialRecord


def kept(found: StepRecord) -> Text:
    """What is kept and why, or why nothing is."""
    if not found.kept:
        said = f": {text.clean(found.reason)}"
        return Text("nothing kept", style="bold red").append(said, style="not bold default")
    style = "bold yellow" if found.forced else "bold green"
    said = "forced" if found.forced else "replayed" if found.mode == "replay" else "kept"
    more = f": {text.clean(found.candidate)}; {text.clean(found.reason)}"
    return Text(said, style=style).append(more, style="not bold default")


def compared(found: StepRecord) -> str:
    """The verdict with what is allowed: agreement 0.9981 on 32 feeds; 0.0019 of 0.0100 lost."""
    line = text.clean(found.found)
    if found.before is None or found.after is None:
        return line
    if found.min_sqnr is None or found.metric is not None:
        lost = max(found.before - found.after, 0.0)
        line += f"; {lost:.4f} lost of {found.max_drop:.4f} that may be"
    if found.min_sqnr is not None:
        line += f"; {found.min_sqnr:g} dB have to be left"
    return line


def speed(found: StepRecord, more: str = "") -> str:
    """Against the lossless model and the original, `more`, and the times of all."""
    assert found.to_lossless is not None
    times = [found.ms_original, found.ms_lossless, found.ms]
    steps = " -> ".join(text.milliseconds(ms) for ms in times if ms is not None)
    line = f"{ratio(found.to_lossless)} against the lossless model"
    if found.to_original is not None:
        line += f", {found.to_original.ratio:.2f}x against the original"
    return f"{line}{more}; {steps}"


def decided(found: StepRecord) -> str:
    """Where the decisions are."""
    said = "read from" if found.mode == "replay" else "in"
    return f"{said} {text.clean(found.decisions or '')}"


def ratio(found: RatioRecord) -> str:
    """1.85x (1.80-1.90)."""
    return f"{found.ratio:.2f}x ({found.low:.2f}-{found.high:.2f})"


def size(found: StepRecord, before: int, what: str) -> str:
    """1.2 MB -> 0.6 MB (-50 %) against the model that `what` says."""
    assert found.bytes is not None
    change = text.change(before, found.bytes)
    return f"{text.size(before)} -> {text.size(found.bytes)} ({change}) against the {what}"


def candidates(found: Sequence[TrialRecord]) -> Table:
    """A row for each candidate."""
    table = text.table("candidate", "compared", "good", "size", left=2)
    for candidate in found:
        mark = Text("yes", style="green") if candidate.good else Text("no", style="red")
        name, said = text.clean(candidate.name), text.clean(candidate.found)
        table.add_row(name, said, mark, text.size(candidate.bytes))
    return table
