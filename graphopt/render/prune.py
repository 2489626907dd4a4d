"""What `optimize` says of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.render import text
from graphopt.render.int8 import ratio

if TYPE_CHECKING:
    from graphopt.prune_report import PrunedGroup, PrunedLayer, PruneRecord, PruneTrial

_ROWS: Final = 12  # of layers; the whole account is in the report
_GROUPS: Final = 4


def show_prune(found: PruneRecord, console: Console, *, every_candidate: bool = False) -> None:
    """Layers, then what was kept, how it compares, and what it gained."""
    layers = [layer for layer in found.layers if layer.kept < layer.total]
    if layers:
        console.print(_layers(found, layers, every=every_candidate))
        console.print()
    if len(found.candidates) > 1 and (every_candidate or not found.kept):
        console.print(_candidates(found.candidates))
        console.print()
    console.print(text.facts(_facts(found)))


def _facts(found: PruneRecord) -> list[tuple[str, Text | str]]:
    lines: list[tuple[str, Text | str]] = [("prune", _kept(found))]
    if found.found:
        lines.append(("compared", _compared(found)))
    gone = [group for group in found.groups if group.gone]
    lines += [("channels", _group(group)) for group in _largest(gone)]
    if len(gone) > _GROUPS:
        lines.append(("channels", f"and of {text.plural(len(gone) - _GROUPS, 'group')} more"))
    if found.bytes is not None:
        change = text.change(found.bytes_lossless, found.bytes)
        sizes = f"{text.size(found.bytes_lossless)} -> {text.size(found.bytes)}"
        lines.append(("size", f"{sizes} ({change}) against the lossless model"))
    if found.to_lossless is not None:
        lines.append(("speed", _speed(found)))
    if found.feeds:
        lines.append(("fitted", f"on {text.plural(found.feeds, 'feed')}, by {found.recovery}"))
    if found.decisions is not None:
        said = "read from" if found.mode == "replay" else "in"
        lines.append(("decisions", f"{said} {text.clean(found.decisions)}"))
    return lines + [("note", text.clean(note)) for note in found.notes]


def _kept(found: PruneRecord) -> Text:
    if not found.kept:
        said = f": {text.clean(found.reason)}"
        return Text("nothing kept", style="bold red").append(said, style="not bold default")
    style = "bold yellow" if found.forced else "bold green"
    said = "forced" if found.forced else "replayed" if found.mode == "replay" else "kept"
    more = f": {text.clean(found.candidate)}; {text.clean(found.reason)}"
    return Text(said, style=style).append(more, style="not bold default")


def _compared(found: PruneRecord) -> str:
    line = text.clean(found.found)
    if found.before is None or found.after is None:
        return line
    if found.min_sqnr is None or found.metric is not None:
        lost = max(found.before - found.after, 0.0)
        line += f"; {lost:.4f} lost of {found.max_drop:.4f} that may be"
    if found.min_sqnr is not None:
        line += f"; {found.min_sqnr:g} dB have to be left"
    return line


def _speed(found: PruneRecord) -> str:
    assert found.to_lossless is not None
    times = [found.ms_original, found.ms_lossless, found.ms]
    steps = " -> ".join(text.milliseconds(ms) for ms in times if ms is not None)
    line = f"{ratio(found.to_lossless)} against the lossless model"
    if found.to_original is not None:
        line += f", {found.to_original.ratio:.2f}x against the original"
    if found.macs_gone is not None:
        line += f"; {found.macs_gone:.0%} of MACs are gone"
    return f"{line}; {steps}"


def _largest(groups: Sequence[PrunedGroup]) -> list[PrunedGroup]:
    return sorted(groups, key=lambda group: -group.gone / max(1, group.units))[:_GROUPS]


def _group(group: PrunedGroup) -> str:
    return text.clean(group.text)


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


def _candidates(candidates: Sequence[PruneTrial]) -> Table:
    table = text.table("candidate", "compared", "good", "size", left=2)
    for candidate in candidates:
        mark = Text("yes", style="green") if candidate.good else Text("no", style="red")
        name, found = text.clean(candidate.name), text.clean(candidate.found)
        table.add_row(name, found, mark, text.size(candidate.bytes))
    return table
