"""What `optimize` says of weights stored as tables and indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import lossy, text

if TYPE_CHECKING:
    from graphopt.codebook_report import CodebookRecord, CodedWeight

_ROWS: Final = 12  # of weights; the whole account is in the report
_FLOAT: Final = 32


def show_codebook(
    found: CodebookRecord, console: Console, *, every_candidate: bool = False
) -> None:
    """Weights, then what was kept, how it compares, and how small it is."""
    if any(weight.bits < _FLOAT for weight in found.weights):
        console.print(_weights(found.weights, every=every_candidate))
        console.print()
    if len(found.candidates) > 1 and (every_candidate or not found.kept):
        console.print(lossy.candidates(found.candidates))
        console.print()
    console.print(text.facts(_facts(found)))


def _facts(found: CodebookRecord) -> list[tuple[str, Text | str]]:
    lines: list[tuple[str, Text | str]] = [("codebook", lossy.kept(found))]
    if found.found:
        lines.append(("compared", lossy.compared(found)))
    if found.bytes is not None:
        lines.append(("size", lossy.size(found, found.bytes_base, "model before")))
    if found.decisions is not None:
        lines.append(("decisions", lossy.decided(found)))
    return lines + [("note", text.clean(note)) for note in found.notes]


def _weights(weights: Sequence[CodedWeight], *, every: bool) -> Table:
    """A row for each weight, the largest first; the rest in one row."""
    table = text.table("weight", "bits", "bytes", "bytes after", "SQNR", left=1)
    shown = weights if every else weights[:_ROWS]
    for weight in shown:
        is_float = weight.bits == _FLOAT
        lost = "exact" if weight.sqnr_db is None else f"{weight.sqnr_db:.1f} dB"
        table.add_row(
            text.clean(weight.name),
            "float" if is_float else str(weight.bits),
            text.size(weight.bytes_before),
            text.size(weight.bytes_after),
            text.clean(weight.reason) if is_float else lost,
        )
    rest = weights[len(shown) :]
    if rest:
        before, after = sum(x.bytes_before for x in rest), sum(x.bytes_after for x in rest)
        name = Text(f"{len(rest)} more", style="dim")
        table.add_row(name, "", text.size(before), text.size(after), "")
    return table
