"""onnxruntime and OpenVINO in alternation: the same model, two runtimes, one machine that drifts.

    int8_pairs.py SECONDS FEED.npz OPENVINO-PYTHON RUNTIME=FILE RUNTIME=FILE ...

RUNTIME is `onnxruntime`, else the precision that OpenVINO is asked for, "" for its own choice. The
first file is the reference. onnxruntime runs in this process and OpenVINO in one of its own, which
sleeps until it is told to run; each takes its own time, so that the pipe between them is not in it.
Rounds and blocks are those of graphopt.timing: random order in a round, fresh sessions and a fresh
process in every block, one observation a block. One line of JSON tells ratios and milliseconds.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.int8_worker import THREADS
from graphopt.runtime import Session
from graphopt.timing import MIN_BLOCKS, MIN_ROUNDS, Times, summarise

WORKER = Path(__file__).parent / "int8_worker.py"
BATCH_SECONDS = 5e-3  # longer than in one process, where nobody has to be woken
MAX_BLOCKS = 20
WARM_RUNS = 5

Clock = Callable[[int], float]
"""The seconds that so many runs take."""


class Block:
    """A fresh session of every file, and the clocks that time them."""

    def __init__(self, python: str, feed: Path, files: list[tuple[str, str]]) -> None:
        with np.load(feed) as given:
            arrays = dict(given)
        theirs = [f"{runtime}={file}" for runtime, file in files if runtime != "onnxruntime"]
        command = [python, "-P", str(WORKER), "serve", str(feed), *theirs]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()
        self.sessions: list[Session] = []
        self.clocks: list[Clock] = []
        served = 0
        for runtime, file in files:
            if runtime == "onnxruntime":
                session = Session(Path(file), threads=THREADS)
                self.sessions.append(session)
                known = {port.name for port in session.inputs}
                self.clocks.append(_clock(session.bind({n: arrays[n] for n in known})))
            else:
                self.clocks.append(self._served(served))
                served += 1

    def _answer(self) -> Any:
        assert self.server.stdout is not None
        if not (line := self.server.stdout.readline()):
            raise RuntimeError(f"OpenVINO ended with exit code {self.server.wait()}")
        return json.loads(line)

    def _served(self, index: int) -> Clock:
        def clock(runs: int) -> float:
            assert self.server.stdin is not None
            self.server.stdin.write(f"{index} {runs}\n")
            self.server.stdin.flush()
            return float(self._answer()["seconds"])

        return clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()
        for session in self.sessions:
            session.close()


def _clock(run: Callable[[], Any]) -> Clock:
    def clock(runs: int) -> float:
        run()  # the other process has had the caches
        started = time.perf_counter()
        for _ in range(runs):
            run()
        return time.perf_counter() - started

    return clock


def time_block(block: Block, seconds: float, rng: random.Random) -> Times:
    """Milliseconds per run, shape (rounds, files), for about so many seconds."""
    once = [min(clock(WARM_RUNS), clock(WARM_RUNS)) / WARM_RUNS for clock in block.clocks]
    runs = [max(1, math.ceil(BATCH_SECONDS / duration)) for duration in once]
    round_seconds = sum(n * duration for n, duration in zip(runs, once, strict=True))
    rounds = max(MIN_ROUNDS, int(seconds / round_seconds))
    order = list(range(len(block.clocks)))
    result = np.empty((rounds, len(order)))
    for row in result:
        rng.shuffle(order)
        for index in order:
            row[index] = block.clocks[index](runs[index]) * 1000 / runs[index]
    return result


def main(seconds: float, feed: Path, python: str, files: list[tuple[str, str]]) -> None:
    rng = random.Random(0)
    blocks: list[Times] = []
    started = time.perf_counter()
    spent = 0.0
    while len(blocks) < MIN_BLOCKS or (len(blocks) < MAX_BLOCKS and spent < seconds):
        with Block(python, feed, files) as block:
            blocks.append(time_block(block, seconds / MAX_BLOCKS, rng))
        spent = (time.perf_counter() - started) * (len(blocks) + 1) / len(blocks)
    found = summarise(blocks, runs=sum(map(len, blocks)))
    ratios = [[round(x, 4) for x in (r.median, r.low, r.high)] for r in found.ratios]
    milliseconds = [float(f"{timing.ms:.4g}") for timing in found.models]
    print(json.dumps({"ratios": ratios, "ms": milliseconds, "blocks": len(blocks)}))


if __name__ == "__main__":
    pairs = [tuple(given.split("=", 1)) for given in sys.argv[4:]]
    main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], [(r, f) for r, f in pairs])
