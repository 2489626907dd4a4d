"""Memory of calibration: its peak by the number of feeds, which must not make a difference.

    python benchmarks/calibration_memory.py [--counts 10 100 400] [--budget MB]

Every count is a fresh process that sweeps so many synthetic images through a detector of 320 x 320
pixels (58 MB of activations an image), with a histogram of every value, and reports its peak of
resident memory (VmHWM, Linux) above that of the imports, and its time. With a small budget the
values of an image are gathered in several runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models.fetch import fetch  # noqa: E402

MODEL = "nudenet_yolov8n"
BAR = 1.05  # of the highest peak over the lowest

_WORKER = """
import json, re, sys, time
from pathlib import Path
import numpy as np
import graphopt.runtime
from graphopt.ir import Model
from graphopt.statistics import Observer, sweep

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def images(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        scene = rng.random((1, 3, 10, 10)).repeat(32, 2).repeat(32, 3)
        yield {"images": (scene + 0.1 * rng.random((1, 3, 320, 320))).astype(np.float32)}

path, count, budget = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = peak()
model = Model.load(path)
names = [v.name for n in model.graph.nodes for v in n.outputs if v is not None]
started = time.perf_counter()
found = sweep(
    model, images(count), [Observer(n, "histogram") for n in names], budget=budget << 20
)
seconds = time.perf_counter() - started
seen = sum(found.histogram(n).count for n in names if n not in found.unseen)
print(json.dumps({"peak": peak() - before, "seconds": seconds, "seen": seen}))
"""


def run(model: Path, count: int, budget: int) -> dict[str, float]:
    """Sweep `count` images in a fresh process: peak in MB above imports, seconds, elements."""
    command = [sys.executable, "-c", _WORKER, str(model), str(count), str(budget)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 400])
    parser.add_argument("--budget", type=int, default=512, help="MB a run (default: 512)")
    arguments = parser.parse_args()
    model = fetch(MODEL)
    peaks = []
    for count in arguments.counts:
        measured = run(model, count, arguments.budget)
        peaks.append(measured["peak"])
        print(
            f"{count:5} feeds: peak {measured['peak']:6.1f} MB above imports, "
            f"{measured['seconds']:6.1f} s, {measured['seen'] / 1e6:,.0f} million elements"
        )
    growth = max(peaks) / min(peaks)
    print(f"highest over lowest peak {growth:.3f} (bar {BAR})")
    return 0 if growth <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
