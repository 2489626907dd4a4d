"""Other optimisers of ONNX models, each run as its own documentation says.

    python benchmarks/peers.py [NAME ...]                        # make the environments
    python benchmarks/peers.py NAME ... --model MODEL.onnx       # run on a model and tell

Every peer has a virtual environment of its own, made at first use in the folder `peers` of
graphopt's cache, and every run is a fresh process. onnxsim and onnxslim get onnxruntime beside
them: both use it where it is installed, and fold more or faster with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import fetch

ONNX = "onnx==1.23.2"
ONNXRUNTIME = "onnxruntime==1.31.1"
TIMEOUT = 900.0  # seconds

Arguments = list[str | Path]

_MEASURE = """
import json, sys, time
def tell(**found):
    # Not getrusage: on Linux its peak is inherited from the process that started this one.
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    found["peak_bytes"] = int(lines["VmHWM"].split()[0]) * 1024
    with open(answer, "w") as file:
        json.dump(found, file)
answer, source, target = sys.argv[1:4]
"""

_IN_PROCESS = """
wall, cpu = time.perf_counter(), time.process_time()
job(source, target)
tell(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
"""

_COMMAND = """
import runpy
sys.argv = [*sys.argv[4:], source, target]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    tell()
"""

_SCRIPT = """
if __name__ == "__main__":
    import sys
    job(sys.argv[1], sys.argv[2])
"""

_ONNXRUNTIME = """
import onnxruntime
def job(source, target):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_{level}
    options.optimized_model_filepath = target
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
"""


@dataclass(frozen=True)
class Peer:
    """An optimiser: `source` defines `job(source, target)` after the imports that are not timed.

    `program` is the peer's own command; without one users write the script that `source` is.
    """

    name: str
    version: str
    packages: tuple[str, ...]
    source: str
    program: str = ""
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run in a fresh process.

    In process, `seconds` (wall) and `cpu_seconds` (all threads) are of load, optimise and save;
    of a command they are of the whole process. `error` says why there is no result, else "".
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    error: str = ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "onnxsim",
            "0.8.1",
            ("onnxsim==0.8.1", ONNX, ONNXRUNTIME),
            "import onnx, onnxsim\n"
            "def job(source, target):\n"
            "    onnx.save(onnxsim.simplify(source)[0], target)\n",
            "onnxsim",
        ),
        Peer(
            "onnxslim",
            "0.1.98",
            ("onnxslim==0.1.98", ONNX, ONNXRUNTIME),
            "import onnx, onnxslim, onnxslim.core, onnxruntime, colorama\n"
            "def job(source, target):\n"
            "    onnx.save(onnxslim.slim(source), target)\n",
            "onnxslim",
        ),
        Peer(
            "onnxscript",
            "0.7.2",
            ("onnxscript==0.7.2", ONNX),
            "import onnx, onnxscript.optimizer\n"
            "def job(source, target):\n"
            "    onnx.save(onnxscript.optimizer.optimize(onnx.load(source)), target)\n",
        ),
        Peer(
            "onnxoptimizer",
            "0.4.2",
            ("onnxoptimizer==0.4.2", ONNX),
            "import onnx, onnxoptimizer\n"
            "def job(source, target):\n"
            "    onnx.save(onnxoptimizer.optimize(onnx.load(source)), target)\n",
            "onnxoptimizer",
        ),
        Peer("ort-basic", "1.31.1", (ONNXRUNTIME,), _ONNXRUNTIME.format(level="BASIC")),
        Peer("ort-extended", "1.31.1", (ONNXRUNTIME,), _ONNXRUNTIME.format(level="EXTENDED")),
    )
}

GRAPHOPT = Peer(
    "graphopt",
    "",
    (),
    "import archspec.cpu, networkx, graphopt.api\n"
    "def job(source, target):\n"
    "    graphopt.api.optimize(source, target, validate=False)\n",
    "graphopt",
    ("optimize",),
)
"""graphopt as this interpreter finds it; its command validates, the timed job does not."""


def environment(peer: Peer) -> Path:
    """The peer's interpreter, whose environment is made if need be, from the package index.

    Raises CalledProcessError if the packages cannot be installed.
    """
    if not peer.packages:
        return Path(sys.executable)
    cache = fetch.cache_directory()
    cache = cache if "GRAPHOPT_CACHE" in os.environ else cache.parent
    # Peers of the same packages share an environment, which has the name of the first of them.
    folder = cache / "peers" / peer.packages[0].replace("==", "-")
    python = folder / "bin" / "python"
    complete = folder / "complete.txt"
    wanted = "\n".join(peer.packages)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock")):
        if not complete.exists() or complete.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip: Arguments = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            subprocess.run([*pip, *peer.packages], check=True)
            complete.write_text(wanted)
    return python


def run(peer: Peer, source: Path, target: Path, timeout: float = TIMEOUT) -> Run:
    """Optimise `source` into `target`, timing load, optimise and save but not the imports."""
    call: Arguments = [environment(peer), "-P", "-c", peer.source + _MEASURE + _IN_PROCESS]
    return _measured(call, source, target, timeout)


def command(peer: Peer, source: Path, target: Path, timeout: float = TIMEOUT) -> Run:
    """Optimise as users do: the peer's own command, or a script where it has none."""
    python = environment(peer)
    with tempfile.TemporaryDirectory() as folder:
        program = python.parent / peer.program
        if not peer.program:
            program = Path(folder) / "optimize.py"
            program.write_text(peer.source + _SCRIPT)
        call: Arguments = [python, "-P", "-c", _MEASURE + _COMMAND]
        return _measured(call, source, target, timeout, program, *peer.arguments)


def _measured(
    call: Arguments, source: Path, target: Path, timeout: float, *more: str | Path
) -> Run:
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        failure = _call([*call, answer, source, target, *more], timeout)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = {
            "seconds": seconds,
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak_bytes": 0,
            **(json.loads(answer.read_text()) if answer.exists() else {}),
        }
    if not failure and not target.exists():
        failure = "it wrote nothing"
    return Run(**found, error=failure)


def _call(arguments: Arguments, timeout: float) -> str:
    """Run a process to its end; what went wrong, "" for nothing."""
    # Into a file: what a peer prints of a large model would fill a pipe that nobody reads.
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        started = time.monotonic()
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        # Not wait(timeout), which looks only every 50 ms and would round the time up.
        late = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            code = process.wait()
        finally:
            late.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == -signal.SIGKILL and time.monotonic() - started >= timeout:
            return f"no end after {timeout:.0f} s"
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    if code < 0:
        return f"crash: {signal.Signals(-code).name}"
    return "" if code == 0 else (_reason(lines) or f"exit code {code}")[:300]


def _reason(lines: list[str]) -> str:
    """The exception that ended a traceback, else the last that was said."""
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (raised or lines or [""])[-1]


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Makes other processes that want the same environment wait."""
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*PEERS, "graphopt"]))
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    tools = {**PEERS, GRAPHOPT.name: GRAPHOPT}
    failed = False
    for name in arguments.names or PEERS:
        print(f"{name}: {environment(tools[name])}")
        if arguments.model is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for what, way in (("in process", run), ("command", command)):
                found = way(tools[name], arguments.model, Path(folder) / "out.onnx")
                failed |= bool(found.error)
                print(
                    f"  {what}: {found.error or 'ok'}, {found.seconds:.2f} s,"
                    f" {found.cpu_seconds:.2f} s of CPU, {found.peak_bytes / 1e6:.0f} MB"
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
