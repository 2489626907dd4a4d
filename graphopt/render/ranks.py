"""The screen of `ranks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from graphopt.render import text

if TYPE_CHECKING:
    from graphopt.ranks import LayerRanks, RankOption, RanksRecord

_ROWS: Final = 8  # layers; JSON has them all


def show_ranks(found: RanksRecord, console: Console) -> None:
    """A few lines for each layer, the one with most MACs first, then what they mean."""
    name = text.clean(Path(found.model.path).name)
    console.print(Text(f"{name}   {text.count(found.macs)} MACs", style="bold"), soft_wrap=True)
    console.print()
    if not found.layers:
        console.print("there are no layers in it that can be split")
        return
    ranked = sorted(found.layers, key=lambda layer: -layer.share)
    table = text.table("layer", "ranks", "as", "MACs", "error", "ms", "pays", left=3)
    for column in table.columns[1:]:
        column.no_wrap = True
    for layer in ranked[:_ROWS]:
        _add(table, layer)
    if rest := ranked[_ROWS:]:
        share = text.share(sum(layer.share for layer in rest))
        table.add_row(Text(f"{len(rest)} more, {share} of MACs", style="dim"))
    console.print(table)
    console.print()
    console.print(text.facts(_facts(found)))


def _add(table: Table, layer: LayerRanks) -> None:
    """What the layer is and what its spectrum tells, beside what it takes, whole and split."""
    kernel = f" {'x'.join(map(str, layer.kernel))}" if layer.kernel else ""
    more = f" and {layer.layers - 1} more" if layer.layers > 1 else ""
    about = (
        f"{layer.operator}{kernel}, {layer.outputs} x {layer.inputs}\n"
        f"{text.share(layer.share)} of MACs"
    )
    ranks = f"{layer.rank_90} for 90 %\n{layer.rank_99} for 99 %\n{layer.evbmf} by EVBMF"
    rows: list[Sequence[str | Text]] = [("dense", "100%", "0", _time(layer.ms), "")]
    rows += map(_cells, _choices(layer))
    columns = [Text("\n").join(map(_text, column)) for column in zip(*rows, strict=True)]
    table.add_row(Group(text.Name(layer.root, more), Text(about, style="dim")), ranks, *columns)
    table.add_section()


def _choices(layer: LayerRanks) -> list[RankOption]:
    """The best ones, most MACs first, each once."""
    found = [option for _, option in sorted(layer.best.items(), reverse=True)]
    return list({(option.method, option.rank): option for option in found}.values())


def _cells(option: RankOption) -> Sequence[str | Text]:
    return (
        f"{option.method} {'x'.join(map(str, option.channels))}",
        f"{option.left:.0%}",
        text.error(option.error),
        _time(option.ms),
        Text("yes", style="green") if option.pays else Text("no", style="red"),
    )


def _time(ms: float | None) -> str:
    return "" if ms is None else text.milliseconds(ms)


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _facts(found: RanksRecord) -> list[tuple[str, Text | str]]:
    paying = [any(option.pays for option in layer.options) for layer in found.layers]
    if found.feeds:
        seen = f"of what a layer gives on {text.plural(found.feeds, 'feed')}"
        lost = "the layer's variance"
    else:
        seen = "of its weights: without --data all that it may read counts alike"
        lost = "the squares of the layer's weights"
    return [
        ("ranks", f"that keep a share of the energy {seen}; EVBMF: of weights above noise"),
        ("as", "what loses least of all that pays, at about 75, 50 and 25 % of the layer's MACs"),
        ("error", f"the share of {lost} that is lost, before anything is fitted"),
        ("pays", f"as much faster as there is less to do: {sum(paying)} of {len(paying)} layers"),
        ("measured", f"in {text.duration(found.seconds)}"),
    ]
