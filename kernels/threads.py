"""One thread for many small products: BLAS gains nothing from more, and waits for busy cores."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator

import threadpoolctl


@functools.cache
def _controller() -> threadpoolctl.ThreadpoolController:
    """The libraries that are loaded; looking for them takes milliseconds."""
    importlib.import_module("scipy.linalg")  # brings a BLAS of its own, beside numpy's
    return threadpoolctl.ThreadpoolController()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """BLAS on one thread inside.

    Decompositions of 64 x 64 x 3 x 3 kernels took 100 times as long on two threads of two cores
    that something else ran on as well.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield
