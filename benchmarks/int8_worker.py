"""What `int8.py` does to one file in a fresh process, in whichever environment runs the file.

    int8_worker.py score MODEL-NAME FILE SET ROWS.npy RUNTIME PRECISION
    int8_worker.py check ORIGINAL FILE FEED.npz
    int8_worker.py serve FEED.npz PRECISION=FILE ...

`score` writes the rows of the model's metric; `check` sees whether onnxruntime takes the file for
what the original is; `serve` loads files in OpenVINO and then times them as it is told on standard
input, a line `INDEX RUNS` each. All answer in lines of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.evaluation import scores, sets

THREADS = 2

Outputs = Mapping[str, Any]


def open_onnxruntime(file: Path) -> Callable[[dict[str, Any]], Outputs]:
    """Run the file in onnxruntime."""
    from graphopt.runtime import Session

    session = Session(file, threads=THREADS)
    known = {port.name for port in session.inputs}
    return lambda feed: session.run({name: feed[name] for name in feed if name in known})


def compile_openvino(file: Path, precision: str) -> Any:
    """The file compiled for the CPU; `precision` "" leaves the choice to OpenVINO."""
    import openvino  # type: ignore[import-not-found]

    asked = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        asked["INFERENCE_PRECISION_HINT"] = precision
    return openvino.Core().compile_model(file, "CPU", asked)


def in_openvino(compiled: Any) -> Callable[[dict[str, Any]], Outputs]:
    """Run a compiled file in OpenVINO."""
    known = {name for port in compiled.inputs for name in port.names}
    request = compiled.create_infer_request()

    def run(feed: dict[str, Any]) -> Outputs:
        found = request.infer({name: feed[name] for name in feed if name in known})
        return {port.any_name: np.array(found[port]) for port in compiled.outputs}

    return run


def score(name: str, file: str, folder: str, rows: str, runtime: str, precision: str) -> None:
    """Write the rows, tell the score, how many samples it is of, and the precision."""
    chosen = precision
    if runtime == "openvino":
        compiled = compile_openvino(Path(file), precision)
        run = in_openvino(compiled)
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    else:
        run = open_onnxruntime(Path(file))
    metric = scores.METRICS[name]
    found = metric.rows(run, sets.EvaluationSet(Path(folder)).evaluation())
    np.save(rows, found)
    tell(score=metric.value(found), n=len(found), precision=chosen)


def check(original: str, file: str, feed: str) -> None:
    """Tell why the file is no replacement of the original, "" if it is one."""
    from graphopt.errors import RuntimeFailure
    from graphopt.runtime import Session

    try:
        session = Session(Path(file), threads=THREADS)
        with np.load(feed) as given:
            known = {port.name for port in session.inputs}
            session.run({name: given[name] for name in given.files if name in known})
    except RuntimeFailure as error:
        tell(invalid=str(error))
        return
    with Session(Path(original), threads=THREADS) as other:
        same = [
            [(port.name, port.type) for port in left] == [(port.name, port.type) for port in right]
            for left, right in ((session.inputs, other.inputs), (session.outputs, other.outputs))
        ]
    tell(invalid="" if all(same) else "its inputs or outputs are others than the original's")


def serve(feed: str, *files: str) -> None:
    """Time files in OpenVINO on demand: the seconds of so many runs of one of them."""
    with np.load(feed) as given:
        arrays = dict(given)
    requests = []
    for file in files:
        precision, _, path = file.partition("=")
        compiled = compile_openvino(Path(path), precision)
        request = compiled.create_infer_request()
        known = {name for port in compiled.inputs for name in port.names}
        request.infer({name: arrays[name] for name in arrays if name in known})
        requests.append(request)
    tell(ready=True)
    for line in sys.stdin:
        index, runs = map(int, line.split())
        request = requests[index]
        request.infer()  # the other process has had the caches
        started = time.perf_counter()
        for _ in range(runs):
            request.infer()
        tell(seconds=time.perf_counter() - started)


def tell(**found: object) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    actions: dict[str, Callable[..., None]] = {"score": score, "check": check, "serve": serve}
    actions[sys.argv[1]](*sys.argv[2:])
