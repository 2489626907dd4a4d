"""Timing the variants of regions, once for all regions that cost the same, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from graphopt.errors import UsageError
from graphopt.runtime import Feed
from graphopt.signature import model_signature
from graphopt.timing import PairedTiming, time_paired

Class = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]
"""Signatures of the variants, and type and shape of what they are fed."""


class Timer:
    """Paired timings of variants of a region: the first is what the others are compared with.

    `seconds` is what all measurements together may take; each of the `expected` classes gets its
    share of what is left. A class that was measured is not measured again. `progress` is called
    with the share of the time that is used up, 0 to 1.
    """

    def __init__(
        self,
        threads: int = 2,
        seconds: float = 60.0,
        *,
        expected: int = 1,
        progress: Callable[[float], None] | None = None,
        seed: int = 0,
    ) -> None:
        if seconds <= 0 or expected < 1:
            raise UsageError("a timer needs some time, and a class to expect")
        self.threads = threads
        self.seconds = seconds
        self.expected = expected
        self.spent = 0.0
        self.measured: dict[Class, PairedTiming] = {}
        self._report = progress or (lambda share: None)
        self._seed = seed

    @property
    def left(self) -> float:
        """Seconds that may still be spent."""
        return max(0.0, self.seconds - self.spent)

    def time(self, variants: Sequence[onnx.ModelProto], feed: Feed) -> PairedTiming | None:
        """The timing of the variants' class; None where the time is used up before it.

        A measurement needs five fresh sessions of each variant and may exceed its share by that.
        Raises RuntimeFailure if a variant does not load or run.
        """
        key = self.key(variants, feed)
        if key in self.measured:
            return self.measured[key]
        if self.left <= 0:
            return None
        share = self.left / max(1, self.expected - len(self.measured))
        base = self.spent

        def report(part: float) -> None:
            self._report(min(1.0, (base + part * share) / self.seconds))

        started = time.perf_counter()
        try:
            self.measured[key] = time_paired(
                [variant.SerializeToString() for variant in variants],
                feed,
                threads=self.threads,
                seconds=share,
                seed=self._seed,
                progress=report,
            )
        finally:
            self.spent += time.perf_counter() - started
        self._report(min(1.0, self.spent / self.seconds))
        return self.measured[key]

    def key(self, variants: Sequence[onnx.ModelProto], feed: Feed) -> Class:
        """What two measurements share that need not be made twice."""
        signatures = tuple(model_signature(variant) for variant in variants)
        return signatures, tuple(_forms(variants[0] if variants else None, feed))


def _forms(
    variant: onnx.ModelProto | None, feed: Mapping[str, Any]
) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of what is fed, in the order of the inputs: names do not count."""
    inputs = [] if variant is None else [info.name for info in variant.graph.input]
    arrays = [np.asarray(feed[name]) for name in inputs if name in feed]
    return [(array.dtype.name, array.shape) for array in arrays]
