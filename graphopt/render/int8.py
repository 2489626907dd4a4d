"""What `optimize` says of int8, and the screen of `sensitivity`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import lossy, text

if TYPE_CHECKING:
    from graphopt.int8_report import CandidateRecord, Int8Record, RegionRecord
    from graphopt.sensitivity import SensitivityRecord

_ROWS: Final = 12  # of regions, alike ones in one row; the whole account is in the report
_BLOCKS: Final = 20
_FLOATS: Final = 6  # reasons why something stayed floating-point
_NAMES: Final = 3


def show_int8(found: Int8Record, console: Console, *, every_candidate: bool = False) -> None:
    """Regions, then what was kept, how it compares, and how fast it is."""
    if found.regions:
        console.print(_regions(found.regions))
        console.print()
    if found.candidates and (every_candidate or not found.kept):
        console.print(_candidates(found.candidates))
        console.print()
    console.print(text.facts(_facts(found)))


def _facts(found: Int8Record) -> list[tuple[str, Text | str]]:
    lines: list[tuple[str, Text | str]] = [("int8", lossy.kept(found))]
    if found.found:
        lines.append(("compared", lossy.compared(found)))
    if found.to_lossless is not None:
        lines.append(("speed", lossy.speed(found)))
    if found.feeds:
        lines.append(("calibrated", f"on {text.plural(found.feeds, 'feed')}"))
    lines += [("in floats", line) for line in _in_floats(found.regions)]
    if found.decisions is not None:
        lines.append(("decisions", lossy.decided(found)))
    return lines + [("note", text.clean(note)) for note in found.notes]


# -- regions ---------------------------------------------------------------------------------------


def _regions(regions: Sequence[RegionRecord]) -> Table:
    """A row for each kind of region, the one that took longest first; the rest in one row."""
    table = text.table("region", "operators", "as", "before", "after", "SQNR", left=3)
    rows = sorted(_alike([r for r in regions if r.precision != "float"]), key=_weight)
    for row in rows[:_ROWS]:
        table.add_row(*_cells(row))
    rest = [region for row in rows[_ROWS:] for region in row]
    if rest:
        table.add_row(
            Text(f"{len(rest)} more", style="dim"),
            _operators(rest),
            "",
            _sum([r.ms_before for r in rest]),
            _sum([r.ms_after for r in rest]),
            _lowest(rest),
        )
    left = [region for region in regions if region.precision == "float"]
    if left:
        table.add_row(
            Text("the rest", style="dim"),
            _operators(left),
            "float",
            _sum([r.ms_before for r in left if r.ms_before is not None]),
            "",
            "",
        )
    return table


def _alike(regions: Sequence[RegionRecord]) -> list[list[RegionRecord]]:
    """Dynamic products of the same operators share a row, and so do weights."""
    groups: dict[tuple[str, ...], list[RegionRecord]] = {}
    for region in regions:
        own = (region.root,) if region.precision == "int8" else ()
        groups.setdefault((region.precision, region.operators, *own), []).append(region)
    return list(groups.values())


def _weight(row: Sequence[RegionRecord]) -> float:
    return -sum(region.ms_before or 0.0 for region in row)


def _cells(row: Sequence[RegionRecord]) -> list[Text | str]:
    first = row[0]
    name = text.clean(first.root) if len(row) == 1 else f"{len(row)} alike"
    return [
        name,
        _operators(row),
        first.precision,
        _sum([region.ms_before for region in row]),
        _sum([region.ms_after for region in row]),
        _lowest(row),
    ]


def _operators(regions: Sequence[RegionRecord]) -> str:
    """The operators of all, those of which there are most: 12 Conv, 9 Mul, 3 others."""
    counted: Counter[str] = Counter()
    for region in regions:
        for part in filter(None, region.operators.split(", ")):
            number, _, operator = part.partition(" ")
            counted[operator] += int(number)
    ranked = counted.most_common()
    shown = [f"{n} {text.clean(operator)}" for operator, n in ranked[:_NAMES]]
    others = sum(n for _, n in ranked[_NAMES:])
    return ", ".join([*shown, f"{others} others"] if others else shown)


def _sum(times: Sequence[float | None]) -> str:
    known = [ms for ms in times if ms is not None]
    return text.milliseconds(sum(known)) if known and len(known) == len(times) else ""


def _lowest(regions: Sequence[RegionRecord]) -> str:
    found = min((r.sqnr_db for r in regions if r.sqnr_db is not None), default=None)
    return "" if found is None else decibels(found)


def decibels(number: float) -> str:
    """A ratio of signal to noise."""
    return "exact" if number == float("inf") else f"{number:.0f} dB"


def _in_floats(regions: Sequence[RegionRecord]) -> list[str]:
    """Why operators stayed as they were, where most of them did first."""
    left = sorted((r for r in regions if r.precision == "float"), key=lambda r: -r.nodes)
    lines = [f"{region.why}: {_operators([region])}" for region in left[:_FLOATS]]
    rest = sum(region.nodes for region in left[_FLOATS:])
    return [*lines, f"for other reasons: {rest} operators"] if rest else lines


def _candidates(candidates: Sequence[CandidateRecord]) -> Table:
    table = text.table("candidate", "compared", "good", "size", "to lossless", left=2)
    for candidate in candidates:
        mark = Text("yes", style="green") if candidate.good else Text("no", style="red")
        speed = "" if candidate.to_lossless is None else lossy.ratio(candidate.to_lossless)
        name, found = text.clean(candidate.name), text.clean(candidate.found)
        table.add_row(name, found, mark, text.size(candidate.bytes), speed)
    return table


# -- sensitivity -----------------------------------------------------------------------------------


def show_sensitivity(found: SensitivityRecord, console: Console) -> None:
    """A row for each block, the one that adds most noise first."""
    name = text.clean(Path(found.model.path).name)
    console.print(Text(f"{name}   opset {found.opset}", style="bold"), soft_wrap=True)
    console.print()
    if not found.blocks:
        console.print("there is nothing in it that can be static int8")
        return
    table = text.table("block", "operators", "noise", "SQNR", "gain", left=2)
    for block in found.blocks[:_BLOCKS]:
        table.add_row(
            text.clean(block.root),
            text.clean(block.operators),
            text.error(block.noise),
            "" if block.sqnr_db is None else decibels(block.sqnr_db),
            _gain(block.gain_ms),
        )
    rest = found.blocks[_BLOCKS:]
    if rest:
        more, noise = f"{len(rest)} more", sum(block.noise for block in rest)
        gain = sum(block.gain_ms for block in rest)
        table.add_row(Text(more, style="dim"), "", text.error(noise), "", _gain(gain))
    console.print(table)
    console.print()
    lines: list[tuple[str, Text | str]] = [
        ("noise", "1 - agreement of the outputs when the block alone is on integers"),
        ("SQNR", "of the block's result when everything is on integers"),
        ("gain", "milliseconds it saves on integers; below 0 it costs"),
        ("measured", f"in {text.duration(found.seconds)}"),
    ]
    console.print(text.facts(lines))


def _gain(ms: float) -> str:
    return f"{'-' if ms < 0 else ''}{text.milliseconds(abs(ms))}"
