"""What onnxruntime reports about a run: time per node, and memory.

Each function loads the model in a session of its own and removes the files onnxruntime writes.
"""

from __future__ import annotations

import collections
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graphopt.runtime import Feed, Level, Session

_KERNEL = "_kernel_time"  # what onnxruntime appends to a node's name in its profile


@dataclass(frozen=True)
class OpTime:
    """What one node of the optimised graph cost in the runs of `profile`.

    `ms` is the median over the runs, which a disturbance of one of them does not move. It excludes
    the bodies of If, Loop and Scan, whose nodes are listed themselves; the clock ticks in whole
    microseconds. `calls` is per run; `output_bytes` is of the last call.
    """

    name: str
    op: str
    ms: float
    calls: float
    output_bytes: int | None


def profile(
    model: Path | bytes,
    feed: Feed,
    *,
    threads: int = 0,
    runs: int = 10,
    optimizations: Level = "default",
    custom_ops: Sequence[Path] = (),
    folder: Path | None = None,
) -> list[OpTime]:
    """Time every node of the graph as onnxruntime runs it, slowest first.

    Two runs warm up and are not counted. Profiling slows each node by some microseconds: shares
    are meant to be compared with each other, not with timings of the whole model.
    """
    trace = _trace(
        model,
        feed,
        runs=runs + 2,
        threads=threads,
        optimizations=optimizations,
        custom_ops=custom_ops,
        folder=folder,
    )
    spent: dict[tuple[str, str, str], list[float]] = {}
    calls: collections.Counter[tuple[str, str, str]] = collections.Counter()
    sizes: dict[tuple[str, str, str], int | None] = {}
    for number, run in enumerate(trace[2:]):
        for event, own in _own_times(run):
            arguments = event["args"]
            name = event["name"].removesuffix(_KERNEL)
            key = (name, arguments.get("op_name", ""), arguments.get("node_index", ""))
            spent.setdefault(key, [0.0] * runs)[number] += own
            calls[key] += 1
            sizes[key] = int(arguments["output_size"]) if "output_size" in arguments else None
    times = [
        OpTime(key[0], key[1], statistics.median(own) / 1000, calls[key] / runs, sizes[key])
        for key, own in spent.items()
    ]
    return sorted(times, key=lambda time: -time.ms)


def by_operator(times: Sequence[OpTime]) -> dict[str, float]:
    """Milliseconds per run by operator type, slowest first."""
    total: dict[str, float] = collections.defaultdict(float)
    for time in times:
        total[time.op] += time.ms
    return dict(sorted(total.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class RunMemory:
    """Bytes of onnxruntime's CPU arena in the first run of a fresh session.

    `held` is in use before the run (weights and their packed copies; weights that are mapped from
    the file are not in the arena); `peak` is the most in use at any time of the run.
    """

    held: int
    peak: int

    @property
    def activations(self) -> int:
        """What the run itself needed at its worst moment."""
        return self.peak - self.held


def first_run_memory(
    model: Path | bytes,
    feed: Feed,
    *,
    threads: int = 0,
    optimizations: Level = "default",
    custom_ops: Sequence[Path] = (),
    folder: Path | None = None,
    memory_reuse: bool = True,
    order: Literal["default", "priority"] = "default",
) -> RunMemory | None:
    """Measure the first run: from the second on, one planned block hides what is live when.

    None if this onnxruntime does not report memory (before 1.31, or built without it) or no node
    runs. Sizes include the arena's rounding (256 bytes, more for large blocks).
    """
    trace = _trace(
        model,
        feed,
        runs=1,
        threads=threads,
        optimizations=optimizations,
        custom_ops=custom_ops,
        folder=folder,
        memory_reuse=memory_reuse,
        order=order,
    )
    nodes = [event["args"] for event in trace[0]]
    if not nodes or "mem_in_use_peak" not in nodes[0]:
        return None
    held = int(nodes[0]["mem_bytes_in_use"]) - int(nodes[0]["mem_in_use_delta"])
    return RunMemory(held, max(int(node["mem_in_use_peak"]) for node in nodes))


def first_run_peak(model: Path | bytes, feed: Feed, **options: Any) -> int | None:
    """Bytes the first run needs on top of the loaded model; None where it is not reported."""
    memory = first_run_memory(model, feed, **options)
    return None if memory is None else memory.activations


def _trace(
    model: Path | bytes, feed: Feed, *, runs: int, **options: Any
) -> list[list[dict[str, Any]]]:
    """The node events of each run, in the order in which the nodes ended."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as temporary:
        with Session(model, profile_prefix=Path(temporary) / "trace", **options) as session:
            for _ in range(runs):
                session.run(feed)
            file = session.end_profiling()
        events = json.loads(file.read_bytes())
    trace: list[list[dict[str, Any]]] = [[]]
    for event in events:
        if event["name"] == "model_run":
            trace.append([])
        elif event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            trace[-1].append(event)
    return trace[:runs]


def _own_times(events: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with its microseconds less those of the events inside it (bodies of If, Loop)."""
    ended: list[dict[str, Any]] = []
    for event in events:  # a body's nodes end, and are listed, before the node that holds them
        inner = 0.0
        while ended and ended[-1]["ts"] >= event["ts"]:
            inner += ended.pop()["dur"]
        ended.append(event)
        yield event, max(0.0, event["dur"] - inner)
