"""Numbers as people read them, and the console that tables go to."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Final

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphopt.shell import mute_stdout

_GAP: Final = 3  # columns between tables
_SHORTEST: Final = 16  # columns that a long name gets, at least
_LINES: Final = 2


def stdout() -> Console:
    """The console on stdout: colours only on a terminal, 80 columns where there is none."""
    return _Stdout(file=sys.stdout, markup=False, highlight=False, emoji=False)


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence: rich would exit with 1, whatever the command found out."""
        self.quiet = True
        mute_stdout()


def table(*columns: str, left: int = 1) -> Table:
    """An open table; the first `left` columns hold text, the others numbers."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    for position, title in enumerate(columns):
        if position < left:
            result.add_column(title, overflow="fold")
        else:
            result.add_column(title, justify="right", no_wrap=True)
    return result


def facts(rows: Sequence[tuple[str, Text | str]]) -> Table:
    """Lines of a label and what it says, wrapped below itself."""
    result = Table(box=None, pad_edge=False, show_header=False)
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for label, content in rows:
        result.add_row(label, content)
    return result


def indented(content: Table) -> Padding:
    """The table with air around it."""
    return Padding(content, (1, 0, 0, 0))


def show_beside(tables: Sequence[Table], console: Console) -> None:
    """Tables side by side as far as the width goes, then below."""
    rows: list[list[Table]] = []
    used = 0
    for one in tables:
        width = console.measure(one).maximum + _GAP
        if rows and used + width <= console.width + _GAP:
            rows[-1].append(one)
            used += width
        else:
            rows.append([one])
            used = width
    for row in rows:
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        grid.add_row(*row)
        console.print(grid)
        console.print()


def clean(text: str) -> str:
    """A name from a file, safe to print: what is not printable appears as its escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tail(name: str, width: int) -> str:
    """The end of a name, which tells it from others, in so many columns: ...conv2/Conv."""
    if cell_len(name) <= width:
        return name
    dots = "..."[: max(width, 0)]
    for start in range(1, len(name)):
        if cell_len(name[start:]) <= width - len(dots):
            return dots + name[start:]
    return dots


class Name:
    """A name in a cell of a table: of a long one as much of its end as has room on two lines.

    `more` stands behind it whatever is left.
    """

    def __init__(self, name: str, more: str = "") -> None:
        self._name = clean(name)
        self._more = more

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = cell_len(self._name + self._more)
        return Measurement(min(longest, _SHORTEST), longest)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        shown = tail(self._name, _LINES * width - cell_len(self._more)) + self._more
        yield Text("\n".join(chop_cells(shown, width)), no_wrap=True, overflow="crop")


def count(number: float) -> str:
    """12345678 => 12.3 M, decimal prefixes."""
    return _scaled(number, ("", " k", " M", " G", " T", " P"))


def size(bytes_: float) -> str:
    """12345678 => 12.3 MB, decimal prefixes."""
    return _scaled(bytes_, (" B", " kB", " MB", " GB", " TB", " PB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(number) >= 999.95 and power < len(units) - 1:
        number /= 1000
        power += 1
    return f"{number:.0f}{units[0]}" if power == 0 else f"{number:.1f}{units[power]}"


def change(before: float, after: float) -> str:
    """200 => 150 as -25.0 %; a change too small for that still shows its sign."""
    if before == after:
        return "="
    if before == 0:
        return "new"
    percent = 100 * (after - before) / before
    if abs(percent) < 0.05:
        return "-0.0 %" if percent < 0 else "+0.0 %"
    return f"{percent:+.1f} %"


def share(part: float) -> str:
    """0.123 => 12.3 %."""
    return f"{100 * part:.1f} %"


def error(number: float) -> str:
    """A relative error: two digits, 0 where there is none."""
    return "0" if number == 0 else f"{number:.1e}" if math.isfinite(number) else str(number)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits: 0.012 => 12.0 ms."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return milliseconds(1000 * seconds)


def milliseconds(ms: float) -> str:
    """Three digits, of milliseconds."""
    digits = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3
    return f"{ms:.{digits}f} ms"


def plural(number: int, noun: str) -> str:
    """2, "feed" => 2 feeds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
