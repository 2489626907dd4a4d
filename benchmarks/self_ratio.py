"""Does the interval that `graphopt bench` prints tell the truth? Time models against themselves.

    python benchmarks/self_ratio.py [--runs 14] [--seconds 10] [--threads 0]

Three synthetic models (about 0.05, 2 and 30 ms on two cores) are each timed against themselves
`runs` times, every time in a fresh process. The true ratio is 1, so 99 % intervals should miss it
about once in a hundred runs; fewer than 19 of 20 is a failure (exit 1). It also prints half the
width of the intervals, which is the smallest difference that `bench` can see.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from graphopt.timing import Ratio, time_paired

REQUIRED = 0.95


def dense(width: int, layers: int) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """Gemm and Relu, `layers` times, on one row of `width` features."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        weight = rng.normal(size=(width, width)) / np.sqrt(width)
        weights.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Gemm", [value, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        value = f"r{i}"
    return _model(nodes, weights, value, (1, width)), (1, width)


def convolutions(channels: int, size: int, layers: int) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """3 x 3 Conv and Relu, `layers` times, on one image of (channels, size, size)."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        weight = rng.normal(size=(channels, channels, 3, 3)) / np.sqrt(9 * channels)
        weights.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"h{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        value = f"r{i}"
    shape = (1, channels, size, size)
    return _model(nodes, weights, value, shape), shape


def _model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    last: str,
    shape: tuple[int, ...],
) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", last)
    ]
    graph = helper.make_graph(nodes, "self_ratio", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return model


MODELS = {
    "dense 4 x 384": lambda: dense(384, 4),
    "conv 4 x 64 x 56 x 56": lambda: convolutions(64, 56, 4),
    "conv 12 x 64 x 112 x 112": lambda: convolutions(64, 112, 12),
}


def run_once(name: str, seed: int, seconds: float, threads: int) -> None:
    """Time one model against itself and print the result as JSON."""
    model, shape = MODELS[name]()
    feed = {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        timing = time_paired([path, path], feed, seconds=seconds, seed=seed, threads=threads)
    ratio = dataclasses.asdict(timing.ratios[1])
    print(json.dumps({"ms": timing.models[0].ms, "blocks": timing.blocks, "ratio": ratio}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=14, help="self-runs of each model")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one run")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_once(options.one[0], int(options.one[1]), options.seconds, options.threads)
        return 0
    covered = total = 0
    for name in MODELS:
        widths, hits = [], 0
        for seed in range(options.runs):
            command = [sys.executable, __file__, "--seconds", str(options.seconds)]
            command += ["--threads", str(options.threads), "--one", name, str(seed)]
            done = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            ratio = Ratio(**done["ratio"])
            hit = ratio.low <= 1 <= ratio.high
            hits += hit
            widths.append(ratio.half_width)
            print(
                f"{name}: {done['ms']:.3f} ms, {done['blocks']} blocks, {ratio.median:.4f} "
                f"[{ratio.low:.4f}, {ratio.high:.4f}]{'' if hit else '  MISSES 1'}",
                flush=True,
            )
        covered, total = covered + hits, total + options.runs
        print(
            f"{name}: {hits} of {options.runs} intervals contain 1; half-width median "
            f"{np.median(widths):.2%}, largest {max(widths):.2%}",
            flush=True,
        )
    print(f"all: {covered} of {total} intervals contain 1 ({covered / total:.1%})")
    return 0 if covered >= REQUIRED * total else 1


if __name__ == "__main__":
    sys.exit(main())
