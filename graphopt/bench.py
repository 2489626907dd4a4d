"""Models compared on one feed: speed interleaved, loading and memory each in a fresh process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.probe import probe
from graphopt.report import BenchEntry, BenchRecord, host
from graphopt.runtime import Feed
from graphopt.timing import time_paired


def bench(
    models: Sequence[Path],
    feed: Feed,
    *,
    threads: int = 0,
    seconds: float = 20.0,
    seed: int = 0,
    custom_ops: Sequence[Path] = (),
    progress: Callable[[str, float | None], None] | None = None,
) -> BenchRecord:
    """Measure the models on the feed; `seconds` is for the timing, loading once each comes on top.

    Raises RuntimeFailure if a model does not load or does not run on the feed.
    """
    started = time.perf_counter()
    tell = progress or (lambda what, share: None)
    probes = []
    for model in models:
        tell(f"loading {model.name}", None)
        probes.append(probe(model, feed, threads=threads, custom_ops=custom_ops))
    tell("timing", 0.0)
    timed = time_paired(
        models,
        feed,
        threads=threads,
        seconds=seconds,
        seed=seed,
        custom_ops=custom_ops,
        progress=lambda share: tell("timing", share),
    )
    entries = [
        BenchEntry(
            path=str(path),
            ms=timing.ms,
            ms_low=timing.low,
            ms_high=timing.high,
            ratio=ratio.median,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            load_seconds=fresh.load_s,
            first_run_seconds=fresh.first_run_s,
            peak_bytes=fresh.rss_peak_bytes,
        )
        for path, timing, ratio, fresh in zip(
            models, timed.models, timed.ratios, probes, strict=True
        )
    ]
    return BenchRecord(
        host=host(),
        shapes=shapes_of(feed),
        threads=threads,
        confidence=timed.confidence,
        blocks=timed.blocks,
        runs=timed.runs,
        seconds=time.perf_counter() - started,
        models=entries,
    )


def shapes_of(feed: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of the tensors in a feed."""
    return {n: list(v.shape) for n, v in feed.items() if isinstance(v, np.ndarray | np.generic)}
