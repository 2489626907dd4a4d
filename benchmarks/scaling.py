"""Does the cost of a node depend on how many there are? Load, fire every rule, export.

    python benchmarks/scaling.py [--runs 5] [--no-rules] [--against onnxsim]

The model is a chain of MatMul, Add and Relu. Each size runs in fresh processes that take turns;
CPU time is counted, and the best of the runs, since other work on the machine only ever adds. The
marginal time per node from 1,000 to 10,000 nodes is compared with that from 10,000 to 100,000.
Exit code 1 where the ratio is over the bar.

With `--against`, graphopt's whole level 2 takes turns with a peer on the longest chain instead:
load, optimise and save in fresh processes, without imports and without validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import peers

SIZES = (1_000, 10_000, 100_000)
BAR = 1.3
BAR_AGAINST = 0.5

_JOB = """
import json, sys, time
from pathlib import Path
import graphopt.passes.rules
from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.rewrite import apply_rules
from graphopt.rules import RULES
source, target, fire = sys.argv[1:]
times = [time.process_time()]
model = Model.load(Path(source))
times.append(time.process_time())
edit = Editor(model)
if fire == "fire":
    edit.types
times.append(time.process_time())
if fire == "fire":
    apply_rules(list(RULES.values()), edit)
times.append(time.process_time())
exporter.save(model, Path(target))
times.append(time.process_time())
steps = dict(zip(["load", "types", "rules", "save"], [b - a for a, b in zip(times, times[1:])]))
print(json.dumps({**steps, "whole": times[-1] - times[0], "changes": len(edit.changes)}))
"""


def chain(count: int) -> onnx.ModelProto:
    """`count` nodes: MatMul, Add and Relu in turn, over weights that all of them share."""
    rng = np.random.default_rng(0)
    nodes = []
    last = "x"
    for number in range(count):
        name = f"v{number}"
        op, operands = [("MatMul", [last, "w"]), ("Add", [last, "b"]), ("Relu", [last])][number % 3]
        nodes.append(helper.make_node(op, operands, [name]))
        last = name
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (4, 16)) for n in ("x", last)]
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in (("w", (16, 16)), ("b", (16,)))
    ]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 10
    return made


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--no-rules", action="store_true")
    arguments.add_argument("--against", choices=peers.PEERS)
    given = arguments.parse_args()
    if given.against:
        sys.exit(against(peers.PEERS[given.against], given.runs))
    runs: dict[int, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            Path(folder, f"{size}.onnx").write_bytes(chain(size).SerializeToString())
        for _ in range(given.runs):
            for size in SIZES:
                runs[size].append(measure(Path(folder, f"{size}.onnx"), fire=not given.no_rules))
    best = {
        size: {step: min(run[step] for run in runs[size]) for step in runs[size][0]}
        for size in SIZES
    }
    for size, steps in best.items():
        parts = "  ".join(
            f"{step} {seconds:.3f} s" for step, seconds in steps.items() if step != "changes"
        )
        print(f"{size:7,} nodes  {parts}  {steps['changes']:.0f} changes")
    sys.exit(report(best))


def against(peer: peers.Peer, runs: int) -> int:
    """Compare the whole of level 2 with a peer; the exit code."""
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "chain.onnx"), Path(folder, "out.onnx")
        source.write_bytes(chain(SIZES[-1]).SerializeToString())
        for _ in range(runs):
            for each in (peers.GRAPHOPT, peer):
                run = peers.run(each, source, target)
                if run.error:
                    sys.exit(f"{each.name}: {run.error}")
                seconds[each.name].append(run.cpu_seconds)
                nodes = len(onnx.load(target).graph.node)
                print(f"{each.name:10} {run.cpu_seconds:6.2f} s CPU, {nodes:,} nodes", flush=True)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    print(f"graphopt / {peer.name}: {ours / theirs:.2f} of its CPU time, bar {BAR_AGAINST}")
    return 0 if ours <= BAR_AGAINST * theirs else 1


def measure(source: Path, *, fire: bool) -> dict[str, float]:
    """Seconds of each step, in a process of its own."""
    target = source.with_suffix(".out")
    command = [sys.executable, "-c", _JOB, str(source), str(target), "fire" if fire else "pass"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def report(best: dict[int, dict[str, float]]) -> int:
    """Print marginal times; the exit code."""
    ratios = {}
    for step in ("load", "types", "rules", "save", "whole"):
        low, high = (
            (best[b][step] - best[a][step]) / (b - a) for a, b in itertools.pairwise(SIZES)
        )
        ratios[step] = high / low if low > 0 else float("nan")
        print(
            f"{step:6} {low * 1e6:8.1f} us a node up to 10,000, {high * 1e6:8.1f} us up to 100,000",
            end="",
        )
        print(f", ratio {ratios[step]:.2f}")
    print(f"whole: {ratios['whole']:.2f}, bar {BAR}")
    return 0 if ratios["whole"] <= BAR else 1


if __name__ == "__main__":
    main()
