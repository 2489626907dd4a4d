"""The steps of `int8.py` on one model; each keeps what it measured in the model's results."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import int8_tools, lossless_steps, peers
from benchmarks.evaluation import scores
from benchmarks.evaluation.sets import EvaluationSet, write_feeds
from benchmarks.int8_tools import LOSSLESS, ORIGINAL, OURS, TOOLS, Tool
from benchmarks.lossless_tables import Results
from graphopt.runtime import Session

WORKER = Path(__file__).parent / "int8_worker.py"
PAIRS = Path(__file__).parent / "int8_pairs.py"
TIMEOUT = 3600.0  # seconds

# In a process of its own: what a peer wrote may take onnxruntime down.
_LATENCY = """
import json, sys
from pathlib import Path
import numpy as np
from graphopt.timing import time_paired
seconds, feed, *files = sys.argv[1:]
with np.load(feed) as given:
    feed = dict(given)
timed = time_paired([Path(file) for file in files], feed, seconds=float(seconds), threads=2)
ratios = [[round(x, 4) for x in (r.median, r.low, r.high)] for r in timed.ratios]
print(json.dumps({"ratios": ratios, "ms": [float(f"{m.ms:.4g}") for m in timed.models]}))
"""


@dataclass(frozen=True)
class Work:
    """One model, its sets, the tools to run on it, and the folder for what they write."""

    name: str
    source: Path
    sets: EvaluationSet
    tools: list[Tool]
    versions: dict[str, str]
    folder: Path
    results: Results
    again: bool

    def cell(self, tool: str) -> dict[str, Any]:
        return self.results.cell(self.name, tool)

    def place(self, tool: str) -> Path:
        """The folder for what the tool writes."""
        return self.folder / f"{tool}-{self.versions[tool]}"

    def result(self, tool: str) -> Path | None:
        """The file that counts for the tool: where it refused, the lossless one; None for none."""
        if not TOOLS[tool].source and tool not in (LOSSLESS, OURS):
            return self.source
        made = self.cell(tool).get("make", {})
        if made.get("refused"):
            return self.result(LOSSLESS)
        file = self.place(tool) / TOOLS[tool].file
        return None if made.get("error", "not made") or not file.exists() else file

    def valid(self, tool: str) -> bool:
        return self.result(tool) is not None and not self.cell(tool).get("invalid")

    def has(self, tool: str, what: str) -> bool:
        """It was measured before, and is not to be measured again."""
        return what in self.cell(tool) and not self.again

    @property
    def feeds(self) -> Path:
        """The calibration samples, each in a file of its own."""
        folder = self.folder / "feeds"
        if not folder.exists():
            with Session(self.source) as session:
                ranks = {port.name: len(port.shape) for port in session.inputs}
            draft = folder.with_suffix(".draft")
            write_feeds(self.sets.feeds(ranks), draft)
            draft.rename(folder)
        return folder

    @property
    def first_feed(self) -> Path:
        return self.feeds / "00000.npz"


def call(python: Path | str, *arguments: str | Path) -> dict[str, Any]:
    """The answer of a fresh process, the last line it prints, or the `error` that ended it."""
    command = [str(python), "-P", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {TIMEOUT:.0f} s"}
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": plain(said or f"exit code {done.returncode}")}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plain(text: str) -> str:
    """Of paths only the last name, since the rest means nothing elsewhere."""
    return re.sub(r"(?:/[\w.+\[\],-]+)+/", "", text)[:300]


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits, since more would only be noise."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def make(work: Work, tool: Tool) -> None:
    """Write the tool's file, count its bytes and see whether onnxruntime takes it."""
    if work.has(tool.name, "make"):
        return
    cell = work.cell(tool.name)
    for stale in ("make", "bytes", "invalid", "score"):
        cell.pop(stale, None)
    target = work.place(tool.name) / tool.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if tool.name in (LOSSLESS, OURS):
        cell["make"] = _optimize(work, tool.name, target)
    elif tool.source:
        run = peers.run(tool.peer(work.name, work.feeds), work.source, target, TIMEOUT)
        cell["make"] = rounded({**asdict(run), "error": plain(run.error)})
    else:
        cell["make"] = {"error": ""}
    file = work.result(tool.name)
    if file is None:
        return
    if tool.runtime == "openvino":
        weights = file.with_suffix(".bin")
        cell["bytes"] = file.stat().st_size + (weights.stat().st_size if tool.source else 0)
        return
    cell["bytes"] = lossless_steps.count_bytes(file)
    checked = call(sys.executable, WORKER, "check", work.source, file, work.first_feed)
    cell["invalid"] = checked.get("invalid", "") or plain(checked.get("error", ""))


def _optimize(work: Work, tool: str, target: Path) -> dict[str, Any]:
    """Run graphopt's command: exit code 1 is a refusal of int8, after which lossless counts."""
    options: list[str | Path] = []
    if tool == OURS:
        options = [*INT8, "--data", work.sets.calibration]
        options += ["--report", target.with_name("report.json")]
    run = int8_tools.optimize(work.source, target, *options, timeout=TIMEOUT)
    found = {"seconds": run.seconds, "peak_bytes": run.peak_bytes, "error": ""}
    if tool == OURS and run.code == 1:
        found["refused"] = plain(run.said)
    elif run.code != 0:
        found["error"] = plain(run.said) or f"exit code {run.code}"
    return rounded(found)


INT8 = ("--target", "ort-cpu", "--int8", "auto")
"""The options of graphopt's command, but for the data."""


def score(work: Work, tool: Tool, check: bool) -> None:
    """Score the tool's file; with `check` compare with what the set's own script prints."""
    file = work.result(tool.name)
    if work.has(tool.name, "score") or file is None or not work.valid(tool.name):
        return
    rows = work.place(tool.name) / "rows.npy"
    rows.parent.mkdir(parents=True, exist_ok=True)
    found = call(
        int8_tools.interpreter(tool),
        *(WORKER, "score", work.name, file, work.sets.folder, rows, tool.runtime, tool.precision),
    )
    if check and tool.runtime == "onnxruntime" and work.sets.script.exists():
        found["script"] = _script(work, file, found.get("score", math.nan))
    work.cell(tool.name)["score"] = found


def _script(work: Work, file: Path, expected: float) -> str:
    """What the set's own script prints of the file, and whether our score is among it."""
    done = subprocess.run(
        [sys.executable, str(work.sets.script), str(file)], capture_output=True, text=True
    )
    said = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", said)]
    agrees = any(abs(number - expected) < 1e-4 for number in numbers)
    return said if agrees else f"DISAGREES: {said}"


def compare(work: Work) -> None:
    """The drop of every score from the original's, and from graphopt's, with their intervals."""
    metric = scores.METRICS[work.name]

    def rows(tool: str) -> Any:
        cell = work.results.model(work.name)["tools"].get(tool, {})
        is_known = cell.get("version") == work.versions[tool] and "score" in cell.get("score", {})
        file = work.place(tool) / "rows.npy"
        return np.load(file) if is_known and file.exists() else None

    reference, ours = rows(ORIGINAL), rows(OURS)
    for tool in TOOLS:
        found = rows(tool)
        for name, other in (("drop", reference), ("below_ours", ours)):
            if found is not None and other is not None:
                drop = scores.paired_drop(metric, other, found)
                record = [float(f"{x:.4g}") for x in (drop.drop, drop.low, drop.high)]
                work.cell(tool)["score"][name] = record


def latency(work: Work, seconds: float) -> None:
    """Time all valid files in one interleaved measurement, then ours against the lossless one."""
    timed = [
        tool.name
        for tool in work.tools
        if tool.runtime == "onnxruntime" and tool.name != ORIGINAL and work.valid(tool.name)
    ]
    versions = {name: work.versions[name] for name in timed}
    record = work.results.model(work.name).get("latency", {})
    if not timed or (record.get("versions") == versions and not work.again):
        return
    # One file that counts twice is timed once.
    files = {name: work.result(name) for name in timed}
    distinct = [file for file in dict.fromkeys(files.values()) if file is not None]
    found = _timed(work, seconds, [work.source, *distinct])
    record = {"versions": versions, "error": found.get("error", "")}
    if "ratios" in found:
        ratios = dict(zip(distinct, found["ratios"][1:], strict=True))
        milliseconds = dict(zip(distinct, found["ms"][1:], strict=True))
        record["ms"] = {ORIGINAL: found["ms"][0]}
        record["ms"] |= {name: milliseconds[file] for name, file in files.items() if file}
        record["ratios"] = {name: ratios[file] for name, file in files.items() if file}
    # Ratios to the original, each with an interval, do not give the interval of their quotient.
    ours, lossless = files.get(OURS), files.get(LOSSLESS)
    if ours and lossless and ours != lossless:
        record["to_lossless"] = _timed(work, seconds, [lossless, ours]).get("ratios", [0, None])[1]
    work.results.model(work.name)["latency"] = record


def _timed(work: Work, seconds: float, files: Iterable[Path]) -> dict[str, Any]:
    return call(sys.executable, "-c", _LATENCY, str(seconds), work.first_feed, *files)


def openvino(work: Work, seconds: float) -> None:
    """Time OpenVINO's files and onnxruntime's original and int8 file in alternation."""
    ours = [t.name for t in work.tools if t.name in (ORIGINAL, OURS) and work.valid(t.name)]
    theirs = [tool for tool in work.tools if tool.runtime == "openvino" and work.valid(tool.name)]
    theirs = [tool for tool in theirs if "error" not in work.cell(tool.name).get("score", {})]
    versions = {name: work.versions[name] for name in (*ours, *(tool.name for tool in theirs))}
    record = work.results.model(work.name).get("openvino", {})
    if not theirs or (record.get("versions") == versions and not work.again):
        return
    files = [f"onnxruntime={work.result(name)}" for name in ours]
    files += [f"{tool.precision}={work.result(tool.name)}" for tool in theirs]
    python = int8_tools.interpreter(theirs[0])
    found = call(sys.executable, PAIRS, str(seconds), work.first_feed, python, *files)
    record = {"versions": versions, "error": found.get("error", "")}
    if "ratios" in found:
        names = [*ours, *(tool.name for tool in theirs)]
        record["ms"] = dict(zip(names, found["ms"], strict=True))
        record["ratios"] = dict(zip(names[1:], found["ratios"][1:], strict=True))
    work.results.model(work.name)["openvino"] = record
