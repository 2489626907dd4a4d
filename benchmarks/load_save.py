"""Reading and writing a model: graphopt against onnx, time and memory.

    python benchmarks/load_save.py MODEL.onnx [--runs N] [--folder FOLDER]

Every run is a fresh process that has its modules imported before the clock starts; the two take
turns, and what the one wrote is flushed to disk before the other starts. graphopt's time includes
its fsync, which onnx does not do (shown apart). Memory is the peak above the imported interpreter,
as a share of the model's bytes; pages of the mapped file count once touched, and a kernel that
keeps it in large folios maps up to 2 MB at a touch. The result is the median of the ratios of
neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TIME_BAR = 0.2
MEMORY_BAR = 0.5

_ONNX = """
import onnx
def job(source, target):
    onnx.save(onnx.load(source), target)
"""

_GRAPHOPT = """
from pathlib import Path
import graphopt.importer
from graphopt import exporter, output
from graphopt.ir import Model
flush = os.fsync
def timed(descriptor):
    global synced
    started = time.perf_counter()
    flush(descriptor)
    synced += time.perf_counter() - started
os.fsync = timed
def job(source, target):
    exporter.save(Model.load(Path(source)), Path(target))
"""

_FRAME = """
import json, os, re, resource, sys, time
synced = 0.0
{job}
def peak():
    try:
        status = open("/proc/self/status").read()
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024
before = peak()
started = time.perf_counter()
job(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": seconds, "memory": peak() - before, "synced": synced}}))
"""


def run(job: str, model: Path, target: Path) -> dict[str, float]:
    """Load and save once in a fresh process: seconds, bytes of memory, seconds in fsync."""
    for file in target.parent.iterdir():
        file.unlink()
    os.sync()
    command = [sys.executable, "-c", _FRAME.format(job=job), str(model), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def bytes_of(model: Path) -> int:
    """The model's file and the files beside it that its name marks as its data."""
    beside = re.compile(re.escape(model.name) + r"[._]data$")
    return sum(
        f.stat().st_size for f in model.parent.iterdir() if f == model or beside.match(f.name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=7, help="runs of each (default: 7)")
    parser.add_argument("--folder", type=Path, help="where to write (default: beside the model)")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    size = bytes_of(model)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder or model.parent) as folder:
        target = Path(folder) / "out.onnx"
        run(_ONNX, model, target)  # the page cache holds the model from here on
        for turn in range(arguments.runs):
            pair = [(_GRAPHOPT, ours), (_ONNX, theirs)]
            for job, results in pair if turn % 2 else reversed(pair):
                results.append(run(job, model, target))
    ratio = statistics.median(
        o["seconds"] / t["seconds"] for o, t in zip(ours, theirs, strict=True)
    )
    print(f"{model.name}: {size / 1e6:,.1f} MB, {arguments.runs} runs each")
    for name, results in (("onnx", theirs), ("graphopt", ours)):
        seconds = statistics.median(r["seconds"] for r in results)
        memory = statistics.median(r["memory"] for r in results)
        synced = statistics.median(r["synced"] for r in results)
        print(
            f"{name:>9}: {seconds * 1000:8.1f} ms (fsync {synced * 1000:.1f}),"
            f" {memory / 1e6:8.1f} MB above imports ({memory / size:.2f} of the model)"
        )
    memory_share = statistics.median(o["memory"] for o in ours) / size
    print(f"time ratio {ratio:.3f} (bar {TIME_BAR}), memory {memory_share:.3f} (bar {MEMORY_BAR})")
    return 0 if ratio <= TIME_BAR and memory_share <= MEMORY_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
