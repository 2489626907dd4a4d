"""What `optimize` says of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import lossy, text

if TYPE_CHECKING:
    from graphopt.low_rank_report import LowRankRecord, SplitRecord

_ROWS: Final = 12  # of layers; the whole account is in the report
_MUCH: Final = 10.0  # of a degeneracy: terms that large cancel


def show_low_rank(found: LowRankRecord, console: Console, *, every_candidate: bool = False) -> None:
    """Layers, then what was kept, how it compares, and what it gained."""
    split = [layer for layer in found.layers if layer.method]
    if split:
        console.print(_layers(split, every=every_candidate))
        console.print()
    if len(found.candidates) > 1 and (every_candidate or not found.kept):
        console.print(lossy.candidates(found.candidates))
        console.print()
    console.print(text.facts(_facts(found, split)))


def _facts(found: LowRankRecord, split: Sequence[SplitRecord]) -> list[tuple[str, Text | str]]:
    lines: list[tuple[str, Text | str]] = [("low rank", lossy.kept(found))]
    if found.found:
        lines.append(("compared", lossy.compared(found)))
    if found.bytes is not None:
        lines.append(("size", lossy.size(found, found.bytes_lossless, "lossless model")))
    if found.to_lossless is not None:
        left = "" if found.macs_left is None else f"; {found.macs_left:.0%} of MACs are left"
        lines.append(("speed", lossy.speed(found, left)))
    if found.feeds:
        where = "others" if found.held_out else "the same"
        more = "" if found.metric is not None else f"; compared on {where}"
        lines.append(("fitted", f"on {text.plural(found.feeds, 'feed')}{more}"))
    large = [layer for layer in split if (layer.degeneracy or 0.0) > _MUCH]
    lines += [
        ("note", f"{text.clean(x.root)}: terms of {x.degeneracy:.0f}x the weights cancel")
        for x in large
    ]
    if found.decisions is not None:
        lines.append(("decisions", lossy.decided(found)))
    return lines + [("note", text.clean(note)) for note in found.notes]


def _layers(layers: Sequence[SplitRecord], *, every: bool) -> Table:
    """A row for each layer that is split, the one with most MACs first; the rest in one row."""
    table = text.table("layer", "as", "error", "MACs", "after", "ms", "after", left=2)
    ranked = sorted(layers, key=lambda layer: -layer.macs_before)
    shown = ranked if every else ranked[:_ROWS]
    for layer in shown:
        name = text.Name(layer.root, f" and {layer.layers - 1} more" if layer.layers > 1 else "")
        ranks = "x".join(map(str, layer.ranks))
        as_split = f"{layer.method} {ranks}"
        table.add_row(name, as_split, text.error(layer.error), *_gain([layer]))
    rest = ranked[len(shown) :]
    if rest:
        table.add_row(Text(f"{len(rest)} more", style="dim"), "", "", *_gain(rest))
    return table


def _gain(layers: Sequence[SplitRecord]) -> list[str]:
    """MACs and milliseconds, before and after."""
    macs = [sum(layer.macs_before for layer in layers), sum(layer.macs_after for layer in layers)]
    times = [[layer.ms_before for layer in layers], [layer.ms_after for layer in layers]]
    known = [[ms for ms in each if ms is not None] for each in times]
    shown = [text.milliseconds(sum(x)) if len(x) == len(layers) else "" for x in known]
    return [*map(text.count, macs), *shown]
