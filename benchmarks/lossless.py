"""graphopt and its peers on every model: nodes, bytes, validity, time, memory and latency.

    python benchmarks/lossless.py [--models NAME ...] [--peers NAME ...] [--steps STEP ...]
        [--latency] [--again] [--markdown FILE]

Steps: `files` optimises in process and counts what came out, `proof` compares it with the original
as graphopt does, `command` runs each tool as users do (graphopt validates there, peers as they do
by default), `times` repeats the in-process runs of graphopt, onnxslim and onnxsim in turn, and
`latency` times original and results in onnxruntime, paired. What was measured is kept in --json and
skipped the next time, until the model or the tool changes or --again is given.

Nodes are counted after functions were inlined, with those in bodies and with Constant nodes. Bytes
include external data.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import lossless_steps, lossless_tables, peers
from models import digits, fetch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "lossless.json"
STEPS = ("files", "proof", "command", "times", "latency")


def sources(wanted: Iterable[str]) -> dict[str, Path]:
    """Models by name: those wanted, by default all."""
    trained = {f"digits_{name}": name for name in digits.FLOORS}
    found = {}
    for name in wanted or [*fetch.names(), *trained, *fetch.architectures()]:
        if name in trained:
            found[name] = digits.path(trained[name])
        else:
            is_real = name in fetch.names()
            found[name] = fetch.fetch(name) if is_real else fetch.architecture(name)
    return found


def version_of(tool: peers.Peer) -> str:
    """The version; of graphopt the commit of its sources, and a hash of what is not committed."""
    if tool.version:
        return tool.version
    parts = ["graphopt", "passes", "kernels"]
    commit = _git("log", "-1", "--format=%h", "--", *parts).strip()
    if not _git("status", "--porcelain", "--", *parts):
        return commit
    content = hashlib.sha256()
    for part in parts:
        for file in sorted((ROOT / part).rglob("*.py")):
            content.update(file.read_bytes())
    return f"{commit}+{content.hexdigest()[:8]}"


def _git(*arguments: str) -> str:
    call = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout


def measure(work: lossless_steps.Work, given: argparse.Namespace) -> None:
    """All steps that are asked for, on one model."""
    for tool in work.tools:
        if work.cell(tool).get("version") != work.versions[tool.name]:
            work.cell(tool).clear()
            work.cell(tool)["version"] = work.versions[tool.name]
    for step in given.steps:
        print(f"{work.name}: {step}", file=sys.stderr, flush=True)
        if step == "files":
            for tool in work.tools:
                lossless_steps.measure_file(work, tool)
        elif step == "proof":
            lossless_steps.measure_proofs(work, given.decisive)
        elif step == "command":
            for tool in work.tools:
                lossless_steps.measure_command(work, tool)
        elif step == "times":
            lossless_steps.measure_times(work, given.runs)
        elif step == "latency":
            lossless_steps.measure_latency(work, given.seconds)
        work.results.save()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--peers", nargs="*", default=list(peers.PEERS), metavar="NAME")
    parser.add_argument("--without-graphopt", action="store_true", help="measure only peers")
    parser.add_argument("--steps", nargs="*", default=list(STEPS[:4]), choices=STEPS)
    parser.add_argument("--latency", action="store_true", help="the step `latency` too")
    parser.add_argument("--decisive", action="store_true", help="prove only what decides a bar")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--runs", type=int, default=5, help="of `times` (default: 5)")
    parser.add_argument("--seconds", type=float, default=20, help="of `latency` (default: 20)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files of all tools")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    given = parser.parse_args()
    given.steps += ["latency"] if given.latency and "latency" not in given.steps else []
    return given


def main() -> int:
    given = _arguments()
    results = lossless_tables.Results(given.json)
    ours = [] if given.without_graphopt else [peers.GRAPHOPT]
    tools = [*(peers.PEERS[name] for name in given.peers), *ours]
    versions = {tool.name: version_of(tool) for tool in tools}
    with tempfile.TemporaryDirectory() as temporary:
        for name, source in sources(given.models).items() if given.steps else ():
            with source.open("rb") as file:
                record = results.start(name, hashlib.file_digest(file, "sha256").hexdigest())
            record.update(
                nodes=lossless_steps.nodes_of(source)[0], bytes=lossless_steps.count_bytes(source)
            )
            folder = (given.keep or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            work = lossless_steps.Work(name, source, tools, versions, folder, results, given.again)
            measure(work, given)
            if not given.keep:
                shutil.rmtree(folder)
    if given.markdown:
        given.markdown.write_text(lossless_tables.page(results.models))
    judged = list(lossless_tables.bars(results.models))
    for is_met, text, missed in judged:
        print("\n    ".join([f"{'met' if is_met else 'NOT MET'}: {text}", *missed]))
    return int(not all(is_met for is_met, _, _ in judged))


if __name__ == "__main__":
    sys.exit(main())
