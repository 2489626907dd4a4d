"""Random models through random pipelines, for as long as it is given; what fails is made small.

    python benchmarks/fuzz.py [--minutes 10] [--seed N] [--jobs 2] [--keep FOLDER]

Every model goes through level 1 and level 2, and now and then through a few passes in any order.
What must hold of the results is in tests/fuzzing/checks.py: sound, equal to the original wherever
that runs (open dimensions of 0 and 1 included), the same interface, never more nodes, the same
twice, done in one go, undone without a trace. A model on which something does not hold is made
smaller while it fails in the same way, and written to --keep as ONNX text. Exit 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphopt.errors import GraphoptError, RuntimeFailure
from graphopt.passes.pipelines import LEVELS, PASSES
from tests.fuzzing.bodies import KINDS
from tests.fuzzing.checks import Subject
from tests.fuzzing.drawing import Drawer
from tests.fuzzing.minimise import minimised

_SECONDS = 20  # for one model; then its process dies, which shows
_CONTEXT = multiprocessing.get_context("forkserver")  # what forks beside threads may hang
_NOT_ALONE = {"fix-shapes", "convert-opset", "graphsurgeon"}  # they do what a user asks for


@dataclass(frozen=True)
class Failure:
    """A model that fails, and what it is that fails on it."""

    seed: int
    pipeline: str
    problem: str
    model: bytes


def drawn(seed: int) -> tuple[onnx.ModelProto, list[tuple[str, bool]]]:
    """The model of a seed, and pipelines: the two levels, and some passes that need not settle."""
    rng = random.Random(seed)
    proto = Drawer(rng, KINDS).model(rng.randint(3, 25))
    pipelines = [(LEVELS[1], True), (LEVELS[2], True)]
    if rng.random() < 0.3:
        names = [name for name in PASSES if name not in _NOT_ALONE]
        pipelines.append((", ".join(rng.choices(names, k=rng.randint(1, 6))), False))
    return proto, pipelines


def problem_of(proto: onnx.ModelProto, pipeline: str, settles: bool) -> str:
    """What does not hold, "" if nothing or if the original does not run."""
    try:
        subject = Subject(proto)
    except RuntimeFailure:
        return ""
    try:
        return subject.problem(pipeline, settles=settles)
    except (AssertionError, GraphoptError) as error:
        return f"raises: {type(error).__name__}: {error}"


def case(seed: int) -> tuple[str, list[Failure]]:
    """How a seed went: refused or checked, and with which failures, each of them minimised."""
    logging.disable(logging.CRITICAL)
    signal.alarm(_SECONDS)
    proto, pipelines = drawn(seed)
    try:
        onnx.checker.check_model(proto)
        Subject(proto)
    except (onnx.checker.ValidationError, RuntimeFailure):
        signal.alarm(0)
        return "refused", []
    failures = []
    for pipeline, settles in pipelines:
        if found := problem_of(proto, pipeline, settles):
            kind = found.partition(":")[0]

            def fails(smaller: onnx.ModelProto, text: str = pipeline, way: bool = settles) -> bool:
                return problem_of(smaller, text, way).startswith(kind)  # noqa: B023

            signal.alarm(10 * _SECONDS)
            small = minimised(proto, fails)
            told = problem_of(small, pipeline, settles)
            failures.append(Failure(seed, pipeline, told, small.SerializeToString()))
            break  # the other level most likely fails of the same
    signal.alarm(0)
    return "failed" if failures else "checked", failures


def runs(seed: int) -> None:
    """Runs the original of a seed and nothing else."""
    signal.alarm(_SECONDS)
    with contextlib.suppress(RuntimeFailure):
        Subject(drawn(seed)[0])


def alone(seed: int) -> tuple[str, list[Failure]]:
    """A case whose process may die: of the original, which is not our fault, or of the result."""
    for work in (runs, case):
        with ProcessPoolExecutor(1, _CONTEXT) as pool:
            try:
                found = pool.submit(work, seed).result()
            except BrokenProcessPool:
                if work is runs:
                    return "refused", []
                proto, pipelines = drawn(seed)
                problem = "crash: the process dies, or takes too long"
                model = proto.SerializeToString()
                return "failed", [Failure(seed, pipelines[-1][0], problem, model)]
    assert found is not None
    return found


def outcomes(
    seeds: Iterator[int], jobs: int, seconds: float
) -> Iterator[tuple[str, list[Failure]]]:
    """Cases of the seeds until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pending: dict[Future[tuple[str, list[Failure]]], int] = {}
        with ProcessPoolExecutor(jobs, _CONTEXT) as pool:
            try:
                while time.monotonic() < end or pending:
                    while time.monotonic() < end and len(pending) < 2 * jobs:
                        seed = next(seeds)
                        pending[pool.submit(case, seed)] = seed
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        yield future.result()
                        del pending[future]
            except BrokenProcessPool:
                broken = list(pending.values())
            else:
                broken = []
        yield from map(alone, broken)


def told(failure: Failure) -> str:
    """The model as text, with a line that says what it found."""
    proto = onnx.load_from_string(failure.model)
    levels = {text: f"level {level}" for level, text in LEVELS.items() if level < 3}
    way = levels.get(failure.pipeline, failure.pipeline)
    problem = " ".join(failure.problem.split())
    return f"# {way}: {problem}\n{onnx.printer.to_text(proto)}\n"


def keep(failure: Failure, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{failure.seed}.onnx").write_bytes(failure.model)
    path = folder / f"{failure.seed}.txt"
    path.write_text(told(failure))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first one; they count on from it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write what fails there")
    given = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    started = time.monotonic()
    seeds = iter(range(given.seed, sys.maxsize))
    for verdict, failures in outcomes(seeds, given.jobs, 60 * given.minutes):
        counts[verdict] += 1
        for failure in failures:
            print(f"seed {failure.seed}: {told(failure)}", flush=True)
            if given.keep:
                keep(failure, given.keep)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{counts.total()} models from seed {given.seed} in {minutes:.1f} min "
        f"({counts.total() / minutes:.0f} a minute): {counts['checked']} sound, "
        f"{counts['failed']} failed, {counts['refused']} that onnxruntime does not run"
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
