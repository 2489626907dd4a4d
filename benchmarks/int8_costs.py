"""What it costs to quantize: memory by the number of calibration samples, time of the command."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import int8_tools, peers
from benchmarks.evaluation.sets import write_feeds
from benchmarks.int8_steps import INT8, TIMEOUT, Work, plain, rounded
from benchmarks.int8_tools import ENTROPY, OURS, TOOLS

MEMORY_MODEL = "ppocr_cls_v2"
MEMORY_SAMPLES = (10, 100, 1000)
MEMORY_TOOLS = (TOOLS[OURS], TOOLS["ort-default"], ENTROPY, TOOLS["nncf"])
"""Tools that calibrate. NNCF takes 300 samples at most, whatever it is given."""
COMMAND_MODEL = "nudenet_yolov8n"
COMMAND_SAMPLES = 20
COMMAND_TURNS = 3

# Half of the machine's memory at most: entropy calibration keeps every activation of every sample.
_LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_AS, ({0}, {0}))\n"


def _many(work: Work, count: int) -> Iterator[dict[str, Any]]:
    """So many feeds: the calibration samples again and again, each with noise of its own."""
    files = sorted(work.feeds.glob("*.npz"))
    rng = np.random.default_rng(0)
    for index in range(count):
        with np.load(files[index % len(files)]) as given:
            feed = dict(given)
        for name, array in feed.items():
            if array.dtype.kind == "f" and index >= len(files):
                noise = rng.normal(0, 0.01, array.shape).astype(array.dtype)
                feed[name] = array + noise
        yield feed


def memory(work: Work) -> None:
    """Peak memory of each tool that calibrates, at 10, 100 and 1000 samples."""
    if work.name != MEMORY_MODEL:
        return
    record = work.results.model(work.name).setdefault("memory", {})
    versions = {**work.versions, ENTROPY.name: ENTROPY.version}
    chosen = {tool.name for tool in work.tools}
    tools = [tool for tool in MEMORY_TOOLS if tool.name in chosen or tool == ENTROPY]
    for tool in tools:
        if record.get(tool.name, {}).get("version") != versions[tool.name] or work.again:
            record[tool.name] = {"version": versions[tool.name]}
    for count in MEMORY_SAMPLES:
        missing = [tool for tool in tools if str(count) not in record[tool.name]]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(dir=work.folder) as folder:
            feeds, target = Path(folder) / "feeds", Path(folder) / "out.onnx"
            write_feeds(_many(work, count), feeds)
            for tool in missing:
                record[tool.name][str(count)] = _cost(work, tool, target, feeds)
                work.results.save()


def _cost(work: Work, tool: int8_tools.Tool, target: Path, feeds: Path) -> dict[str, Any]:
    """Seconds and peak memory of one run of a tool, as a command."""
    if tool.name == OURS:
        run = int8_tools.optimize(work.source, target, *INT8, "--data", feeds, timeout=TIMEOUT)
        error = "" if run.code in (0, 1) else plain(run.said)
        found = {"seconds": run.seconds, "peak_bytes": run.peak_bytes, "error": error}
        return rounded(found)
    peer = tool.peer(work.name, feeds)
    peer = replace(peer, source=_LIMIT.format(psutil.virtual_memory().total // 2) + peer.source)
    done = peers.command(peer, work.source, target, TIMEOUT)
    found = {"seconds": done.seconds, "peak_bytes": done.peak_bytes, "error": plain(done.error)}
    return rounded(found)


def command(work: Work) -> None:
    """The whole command on 20 samples against onnxruntime's with entropy calibration, in turns."""
    versions = {OURS: work.versions[OURS], ENTROPY.name: ENTROPY.version}
    record = work.results.model(work.name).get("command", {})
    known = record.get("versions") == versions and not work.again
    if work.name != COMMAND_MODEL or TOOLS[OURS] not in work.tools or known:
        return
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], ENTROPY.name: []}
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        feeds, target = Path(folder) / "feeds", Path(folder) / "out.onnx"
        write_feeds(_many(work, COMMAND_SAMPLES), feeds)
        for _ in range(COMMAND_TURNS):
            for name, tool in ((OURS, TOOLS[OURS]), (ENTROPY.name, ENTROPY)):
                runs[name].append(_cost(work, tool, target, feeds))
    work.results.model(work.name)["command"] = {
        "versions": versions,
        "samples": COMMAND_SAMPLES,
        "seconds": {n: statistics.median(r["seconds"] for r in some) for n, some in runs.items()},
        "errors": {n: some[0]["error"] for n, some in runs.items() if some[0]["error"]},
    }
