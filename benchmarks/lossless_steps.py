"""The steps of `lossless.py` on one model; each keeps what it measured in the model's results."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from benchmarks import peers
from benchmarks.lossless_tables import OURS, RIVALS, TIME_BARS, Results, is_valid
from graphopt.errors import GraphoptError
from graphopt.ir import Model

TIMED = (OURS, *TIME_BARS)
ENOUGH_SECONDS = 30.0  # of one tool on one model, after which its time is not taken again
PROOF_TIMEOUT = 1200.0
LATENCY_TIMEOUT = 1200.0

# In a process of its own: what a peer wrote may take onnxruntime down.
_PROOF = """
import json, sys
from pathlib import Path
from graphopt.errors import GraphoptError
from graphopt.validate import validate_files
try:
    record = validate_files(Path(sys.argv[1]), Path(sys.argv[2]))
    found = {
        "verdict": record.verdict,
        "reason": record.reason,
        "error": record.error,
        "used": max((output.used for output in record.outputs), default=0.0),
    }
except GraphoptError as error:
    found = {"verdict": "failed", "reason": str(error), "error": 0.0, "used": 0.0}
print(json.dumps(found))
"""

_LATENCY = """
import json, sys
from pathlib import Path
from graphopt.proposals import first_feed
from graphopt.timing import time_paired
models = [Path(name) for name in sys.argv[2:]]
timed = time_paired(models, first_feed(models[0]), seconds=float(sys.argv[1]))
ratios = [[round(x, 4) for x in (r.median, r.low, r.high)] for r in timed.ratios[1:]]
print(json.dumps({"reason": "", "ratios": ratios}))
"""


@dataclass(frozen=True)
class Work:
    """One model, the tools to run on it, and the folder for what they write."""

    name: str
    source: Path
    tools: list[peers.Peer]
    versions: dict[str, str]
    folder: Path
    results: Results
    again: bool

    def output(self, tool: peers.Peer) -> Path:
        return self.folder / f"{tool.name}-{self.versions[tool.name]}" / "out.onnx"

    def cell(self, tool: peers.Peer) -> dict[str, Any]:
        return self.results.cell(self.name, tool.name)

    def optimized(self, tool: peers.Peer) -> Path:
        """The tool's file, written anew where an earlier call did not leave it."""
        target = self.output(tool)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            peers.run(tool, self.source, target)
        return target


def nodes_of(path: Path) -> tuple[int, int]:
    """Nodes after inlining functions, bodies and Constant nodes included; and the foreign ones.

    Foreign are those whose operator ONNX does not define in the model's opsets.
    """
    model = onnx.load(path, load_external_data=False)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    nodes = list(_nodes_in(model.graph))
    return len(nodes), sum(
        not onnx.defs.has(node.op_type, opsets.get(node.domain, 0), node.domain) for node in nodes
    )


def _nodes_in(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for body in bodies:
                yield from _nodes_in(body)


def count_bytes(path: Path) -> int:
    """Bytes of the model's file and of the files with external data that it refers to."""
    return sum(file.stat().st_size for file in {path, *Model.load(path).store.files()})


def measure_file(work: Work, tool: peers.Peer) -> None:
    """Optimise once in process and count what came out."""
    cell, target = work.cell(tool), work.output(tool)
    if "run" in cell and not work.again:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    run = peers.run(tool, work.source, target)
    cell.clear()
    cell.update(version=work.versions[tool.name], run=_rounded(asdict(run)))
    if not run.error:
        try:
            nodes, foreign = nodes_of(target)
            cell.update(nodes=nodes, foreign=foreign, bytes=count_bytes(target))
        except (OSError, DecodeError, GraphoptError) as error:
            cell["run"] |= _rounded({"error": f"unreadable: {error}"})


def measure_proof(work: Work, tool: peers.Peer) -> None:
    """Compare the tool's file with the original."""
    cell = work.cell(tool)
    if "nodes" not in cell or ("proof" in cell and not work.again):
        return
    call = [sys.executable, "-P", "-c", _PROOF, str(work.source), str(work.optimized(tool))]
    cell["proof"] = _rounded(_answer(call, PROOF_TIMEOUT))


def measure_proofs(work: Work, decisive: bool) -> None:
    """Compare all files with the original, or only those that decide a bar."""
    if not decisive:
        for tool in work.tools:
            measure_proof(work, tool)
        return
    for what in ("nodes", "bytes"):
        rivals = [t for t in work.tools if t.name in RIVALS and what in work.cell(t)]
        for tool in sorted(rivals, key=lambda tool: work.cell(tool)[what]):
            measure_proof(work, tool)
            if is_valid(work.cell(tool)):
                break
    for tool in work.tools:
        if tool.name == OURS:
            measure_proof(work, tool)


def _answer(call: list[str], timeout: float) -> dict[str, Any]:
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"verdict": "unproven", "reason": f"no end after {timeout:.0f} s"}
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        return {"verdict": "failed", "reason": f"exit code {done.returncode}: {said}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_command(work: Work, tool: peers.Peer) -> None:
    """Run the tool as users do."""
    cell = work.cell(tool)
    if "command" in cell and not work.again:
        return
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        run = peers.command(tool, work.source, Path(folder) / "out.onnx")
    cell["command"] = _rounded(asdict(run))


def measure_times(work: Work, runs: int) -> None:
    """Run the timed tools in turn, each round in another order; the medians are kept."""
    tools = [tool for tool in work.tools if tool.name in TIMED]
    versions = {tool.name: work.versions[tool.name] for tool in tools}
    record = work.results.model(work.name).get("times", {})
    if record.get("versions") == versions and record.get("runs", 0) >= runs and not work.again:
        return
    measured: dict[str, list[peers.Run]] = {tool.name: [] for tool in tools}
    for round_number in range(runs):
        for tool in tools[round_number % len(tools) :] + tools[: round_number % len(tools)]:
            so_far = measured[tool.name]
            if sum(run.seconds for run in so_far) < ENOUGH_SECONDS:
                so_far.append(peers.run(tool, work.source, work.folder / "timed.onnx"))
    (work.folder / "timed.onnx").unlink(missing_ok=True)
    work.results.model(work.name)["times"] = {
        "versions": versions,
        "runs": runs,
        "tools": {
            name: _rounded(
                {
                    "seconds": statistics.median(run.seconds for run in some),
                    "cpu_seconds": statistics.median(run.cpu_seconds for run in some),
                    "runs": len(some),
                }
            )
            for name, some in measured.items()
            if not any(run.error for run in some)
        },
    }


def measure_latency(work: Work, seconds: float) -> None:
    """Time the original and all valid files, then ours against the fastest of the peers'."""
    valid = [tool for tool in work.tools if is_valid(work.cell(tool))]
    versions = {tool.name: work.versions[tool.name] for tool in valid}
    record = work.results.model(work.name).get("latency", {})
    if not valid or (record.get("versions") == versions and not work.again):
        return
    files = {tool.name: work.optimized(tool) for tool in valid}
    found = _ratios(seconds, work.source, *files.values())
    ratios = dict(zip(files, found.get("ratios", []), strict=False))
    record = {"versions": versions, "ratios": ratios, "reason": found["reason"]}
    rivals = [name for name in ratios if name != OURS]
    if rivals and OURS in ratios:
        best = max(rivals, key=lambda name: ratios[name][0])
        duel = _ratios(seconds, files[best], files[OURS])
        record |= {"best": best, "against_best": duel.get("ratios", [None])[0]}
    work.results.model(work.name)["latency"] = record


def _ratios(seconds: float, *models: Path) -> dict[str, Any]:
    """`ratios` of the first model's time to those of the others, or the `reason` for none."""
    call = [sys.executable, "-P", "-c", _LATENCY, str(seconds), *map(str, models)]
    return _answer(call, LATENCY_TIMEOUT)


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits, since more would only be noise; of paths only the last name."""
    rounded: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        elif isinstance(value, str):
            value = re.sub(r"(?:/[\w.+-]+)+/", "", value)[:300]
        rounded[key] = value
    return rounded
