"""Loading time, first run and memory of a model, measured in a process that does nothing else.

A process that has already run a model says little: its allocator holds memory, its peak is past,
and onnxruntime keeps thread pools. `probe` starts `python -m graphopt.probe`, which measures and
answers in JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from graphopt.errors import RuntimeFailure
from graphopt.runtime import Feed, Level, Session
from graphopt.trace import first_run_memory

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Probe:
    """A fresh process that loads a model and runs it once, with the file in the page cache.

    `rss_peak_bytes` is the most memory resident at any time of load and run, above what the
    interpreter with onnxruntime and the feed takes before loading. `mem_in_use_peak` is the most
    that onnxruntime's CPU arena held in the first run, weights included, None if unreported.
    """

    load_s: float
    first_run_s: float
    rss_peak_bytes: int
    mem_in_use_peak: int | None


def probe(
    model: Path,
    feed: Feed,
    *,
    threads: int = 0,
    optimizations: Level = "default",
    custom_ops: Sequence[Path] = (),
    timeout: float | None = None,
) -> Probe:
    """Load and run a model once in a fresh process; `timeout` in seconds.

    Raises RuntimeFailure if the model does not load or run, or takes the process down.
    """
    request = {
        "threads": threads,
        "optimizations": optimizations,
        "custom_ops": [Path(library).absolute() for library in custom_ops],
    }
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        file = Path(folder) / "request.pickle"  # .npz would lose bfloat16, lists and None
        file.write_bytes(pickle.dumps((Path(model).absolute(), dict(feed), request)))
        command = [sys.executable, "-P", "-m", "graphopt.probe", str(file)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=_env()
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeFailure(f"{model} did not load and run in {timeout} s") from error
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise RuntimeFailure(
            f"the process that ran {model} ended with code {done.returncode}"
        ) from error
    if "error" in answer:
        raise RuntimeFailure(answer["error"])
    return Probe(**answer)


def _env() -> dict[str, str]:

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _measure(file: Path) -> Probe:
    model, feed, options = pickle.loads(file.read_bytes())
    # Otherwise the peak may be that of the imports. Where the kernel does not allow the reset, a
    # small model's peak reads a few megabytes too high.
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    session = Session(model, **options)
    loaded = time.perf_counter()
    session.run(feed)
    ran = time.perf_counter()
    peak = max(0, _peak_rss() - before)
    session.close()
    memory = first_run_memory(model, feed, **options)
    return Probe(loaded - started, ran - loaded, peak, memory.peak if memory else None)


def _peak_rss() -> int:
    """The most bytes of this process that were ever resident (since the reset, on Linux)."""
    if _STATUS.exists():
        # Not getrusage: on Linux its peak is inherited from the process that started this one.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    information = psutil.Process().memory_info()
    if hasattr(information, "peak_wset"):  # Windows
        return int(information.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def main() -> None:
    """Answer one request of `probe` on stdout."""
    try:
        answer = dataclasses.asdict(_measure(Path(sys.argv[1])))
    except RuntimeFailure as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
