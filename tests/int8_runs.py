"""Runs of int8 on the digits models whose timing is decided, not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import search
from graphopt.timing import PairedTiming, Ratio, Timing

DIGITS = Path(__file__).resolve().parent.parent / "models" / "digits"
DATA = f"{__file__}:feeds"
FEEDS = 8


def feeds() -> Iterator[dict[str, Any]]:
    """Images to calibrate on, some at a time."""
    with np.load(DIGITS / "calibration.npz") as data:
        for start in range(0, FEEDS * 16, 16):
            yield {"image": data["image"][start : start + 16]}


def timed(ratio: float) -> Callable[..., PairedTiming]:
    """What stands for `time_paired`: candidates are this much faster, the first of them most."""

    def time_paired(models: Sequence[Path | bytes], feed: Any, **_: Any) -> PairedTiming:
        found = [1.0, *(ratio - 0.01 * place for place in range(len(models) - 1))]
        if Path(str(models[-1])).parent.name not in (
            "candidates",
            "int8",
        ):  # the original comes last
            found[-1] = 0.8
        ratios = tuple(Ratio(each, 0.99 * each, 1.01 * each) for each in found)
        times = tuple(Timing(1 / each, 0.9 / each, 1.1 / each) for each in found)
        return PairedTiming(times, ratios, 8, 100)

    return time_paired


def decide(monkeypatch: Any, ratio: float) -> None:
    """Let every candidate be `ratio` times as fast as the lossless model."""
    monkeypatch.setattr(search, "time_paired", timed(ratio))
