"""graphopt's int8 and that of its peers: score, validity, bytes and speed, one table a model.

    python benchmarks/int8.py [--models NAME ...] [--tools NAME ...] [--steps STEP ...]
        [--sets FOLDER] [--again] [--markdown FILE]

Steps: `make` writes every tool's file, `score` scores the files and takes the drop from fp32,
`latency` times those that onnxruntime runs and then OpenVINO's in alternation with it, `memory`
takes the peak of calibration at 10, 100 and 1000 samples, `command` times the whole command. What
was measured is kept in --json and skipped the next time, until the model, its sets or the tool
change or --again is given. The files stay in graphopt's cache.

Sets are built from what Python packages bring (see evaluation/build.py), or taken from --sets, a
folder with a folder for every model as evaluation/sets.py describes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import onnx

from benchmarks import int8_costs, int8_steps, int8_tables, lossless, lossless_steps, peers
from benchmarks.evaluation import build
from benchmarks.evaluation.scores import METRICS
from benchmarks.evaluation.sets import EvaluationSet
from benchmarks.int8_steps import Work
from benchmarks.int8_tools import ORIGINAL, TOOLS
from benchmarks.lossless_tables import Results
from models import fetch

RESULTS = Path(__file__).parent / "results" / "int8.json"
STEPS = ("make", "score", "latency", "memory", "command")


def cache() -> Path:
    """The folder for files and sets, beside that for the fetched models."""
    found = fetch.cache_directory()
    return (found if "GRAPHOPT_CACHE" in os.environ else found.parent) / "int8"


def weights_share(path: Path) -> float:
    """The share of float weights in the bytes of a model's file."""
    model = onnx.load(path)
    tensors = [
        *model.graph.initializer,
        *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t")),
    ]
    weights = sum(t.ByteSize() for t in tensors if t.data_type == onnx.TensorProto.FLOAT)
    return round(weights / path.stat().st_size, 3)


def prepare(name: str, source: Path, given: argparse.Namespace, results: Results) -> Work:
    """The work on one model, what was measured of other models, sets or tools forgotten."""
    folder = given.sets / name if given.sets else build.built(name, source, cache() / "sets")
    sets = EvaluationSet(folder)
    with source.open("rb") as file:
        model = hashlib.file_digest(file, "sha256").hexdigest()
    digest = sets.digest()
    record = results.start(name, f"{model}, sets {digest}")
    record["bytes"], record["weights"] = lossless_steps.count_bytes(source), weights_share(source)
    record["sets"] = "given" if given.sets else "built"
    tools = [t for t in TOOLS.values() if t.name in given.tools or t.name == ORIGINAL]
    ours = lossless.version_of(peers.GRAPHOPT)
    versions = {name: tool.version or ours for name, tool in TOOLS.items()}
    for tool in tools:
        cell = results.cell(name, tool.name)
        if cell.get("version") != versions[tool.name]:
            cell.clear()
            cell["version"] = versions[tool.name]
    kept = cache() / "files" / f"{name}-{model[:8]}-{digest}"
    return Work(name, source, sets, tools, versions, kept, results, given.again)


def measure(work: Work, given: argparse.Namespace) -> None:
    """All steps that are asked for, on one model."""
    for step in given.steps:
        print(f"{work.name}: {step}", file=sys.stderr, flush=True)
        if step == "make":
            for tool in work.tools:
                int8_steps.make(work, tool)
                work.results.save()
        elif step == "score":
            for tool in work.tools:
                int8_steps.score(work, tool, given.check)
            int8_steps.compare(work)
        elif step == "latency":
            int8_steps.latency(work, given.seconds)
            int8_steps.openvino(work, given.seconds)
        elif step == "memory":
            int8_costs.memory(work)
        elif step == "command":
            int8_costs.command(work)
        work.results.save()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(METRICS), choices=METRICS)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--sets", type=Path, metavar="FOLDER", help="take the sets from there")
    parser.add_argument("--check", action="store_true", help="compare with the sets' own eval.py")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--seconds", type=float, default=40, help="of `latency` (default: 40)")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    return parser.parse_args()


def main() -> int:
    given = _arguments()
    results = Results(given.json)
    sources = lossless.sources(given.models) if given.steps else {}
    for name, source in sources.items():
        measure(prepare(name, source, given, results), given)
    models = {name: results.models[name] for name in METRICS if name in results.models}
    if given.markdown:
        options = " ".join(int8_steps.INT8)
        given.markdown.write_text(int8_tables.page(models, options))
    print(int8_tables.summary_table(models))
    judged = list(int8_tables.bars(models))
    for is_met, text, missed in judged:
        print("\n    ".join([f"{'met' if is_met else 'NOT MET'}: {text}", *missed]))
    return int(not all(is_met for is_met, _, _ in judged))


if __name__ == "__main__":
    sys.exit(main())
