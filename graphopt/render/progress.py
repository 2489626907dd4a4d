"""Progress on stderr, for people only: a terminal gets one changing line, a pipe nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Tell = Callable[[str, float | None], None]


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """A function to call with what is going on and its share done (None: unknown)."""
    if not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    class _Bar(BarColumn):
        """A bar where the share is known; a pulse would pretend that something is measured."""

        def render(self, task):  # type: ignore[no-untyped-def]
            return "" if task.total is None else super().render(task)

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _Bar(bar_width=30))
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        current = ""

        def tell(what: str, share: float | None) -> None:
            nonlocal current
            if what != current:
                current = what
                bar.reset(task, description=what)
            bar.update(task, total=None if share is None else 1.0, completed=share or 0.0)

        yield tell
