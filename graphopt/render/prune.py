"""What `optimize` says of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import lossy, text

if TYPE_CHECKING:
    from graphopt.prune_report import PrunedGroup, PrunedLayer, PruneRecord

_ROWS: Final = 12  # of layers; the whole account is in the report
_GROUPS: Final = 4


def show_prune(found: PruneRecord, console: Console, *, every_candidate: bool = False) -> None:
    """Layers, then what was kept, how it compares, and what it gained."""
    layers = [layer for layer in found.layers if layer.kept < layer.total]
    if layers:
        console.print(_layers(found, layers, every=every_candidate))
        console.print()
    if len(found.candidates) > 1 and (every_candidate or not found.kept):
        console.print(lossy.candidates(found.candidates))
        console.print()
    console.print(text.facts(_facts(found)))


def _facts(found: PruneRecord) -> list[tuple[str, Text | str]]:
    lines: list[tuple[str, Text | str]] = [("prune", lossy.kept(found))]
    if found.found:
        lines.append(("compared", lossy.compared(found)))
    cut = [group for group in found.groups if group.gone]
    lines += [("channels", text.clean(group.text)) for group in _largest(cut)]
    if len(cut) > _GROUPS:
        lines.append(("channels", f"and of {text.plural(len(cut) - _GROUPS, 'group')} more"))
    if found.bytes is not None:
        lines.append(("size", lossy.size(found, found.bytes_lossless, "lossless model")))
    if found.to_lossless is not None:
        gone = "" if found.macs_gone is None else f"; {found.macs_gone:.0%} of MACs are gone"
        lines.append(("speed", lossy.speed(found, gone)))
    if found.feeds:
        lines.append(("fitted", _fitted(found)))
    if found.decisions is not None:
        lines.append(("decisions", lossy.decided(found)))
    return lines + [("note", text.clean(note)) for note in found.notes]


def _fitted(found: PruneRecord) -> str:
    line = f"on {text.plural(found.feeds, 'feed')}, by {found.recovery}"
    if found.held_out:
        return f"{line}; compared on others"
    return line if found.metric is not None else f"{line}; compared on the same"


def _largest(groups: Sequence[PrunedGroup]) -> list[PrunedGroup]:
    return sorted(groups, key=lambda group: -group.gone / max(1, group.units))[:_GROUPS]


def _layers(found: PruneRecord, layers: Sequence[PrunedLayer], *, every: bool) -> Table:
    """A row for each layer, the largest first, with what it gained; the rest in one row."""
    gain = ("ms", "ms after") if found.channels else ("bytes", "bytes after")
    table = text.table("layer", "kept", "error", "fitted", *gain, left=1)
    ranked = sorted(layers, key=lambda layer: -layer.total)
    shown = ranked if every else ranked[:_ROWS]
    for layer in shown:
        table.add_row(
            text.clean(layer.root),
            f"{layer.kept / max(1, layer.total):.0%}",
            text.error(layer.error_before),
            text.error(layer.error_after) if found.recovery != "none" else "",
            *_gain(found, [layer]),
        )
    rest = ranked[len(shown) :]
    if rest:
        kept, total = sum(each.kept for each in rest), sum(each.total for each in rest)
        name = Text(f"{len(rest)} more", style="dim")
        table.add_row(name, f"{kept / max(1, total):.0%}", "", "", *_gain(found, rest))
    return table


def _gain(found: PruneRecord, layers: Sequence[PrunedLayer]) -> tuple[str, str]:
    """Before and after: milliseconds where channels went, else bytes."""
    if not found.channels:
        before, after = (
            sum(s) for s in zip(*((x.bytes_before, x.bytes_after) for x in layers), strict=True)
        )
        return text.size(before), text.size(after)
    times = [[x.ms_before for x in layers], [x.ms_after for x in layers]]
    known = [[ms for ms in each if ms is not None] for each in times]
    first, second = (
        text.milliseconds(sum(each)) if len(each) == len(layers) else "" for each in known
    )
    return first, second
