"""Coupled groups of every model, and whether one unit of each can go.

    python benchmarks/prune_groups.py [--models NAME ...] [--level N ...]

Of each model, as it is (level 0) and optimised, the groups are found and one unit of every group
is removed. The rest has to run, give outputs of the same shapes, and be equal to the model in
which the readers' weights of these units are zero, up to what rounding does to it: half a percent
of how much an output varies, or 1e-4 where that is less.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

from graphopt import verify
from graphopt.edit import Editor
from graphopt.exposed import write_exposed
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import pipeline
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.remove import remove, silence
from graphopt.proposals import Proposer, Sizes
from graphopt.runtime import Session
from models import digits, fetch

HEADINGS = ["model", "level", "groups", "units", "removed", "error", "s-find", "s-remove", "runs"]


@dataclass(frozen=True)
class Row:
    """What came of one model at one level."""

    name: str
    level: int
    groups: int
    units: int
    removed: int
    error: float  # largest difference of an output, by how much it varies
    seconds: tuple[float, float]
    problem: str

    @property
    def cells(self) -> list[str]:
        times = [f"{seconds:.2f}" for seconds in self.seconds]
        counts = [str(n) for n in (self.level, self.groups, self.units, self.removed)]
        return [self.name, *counts, f"{self.error:.1e}", *times, self.problem or "yes"]


def path_of(name: str) -> Path:
    """The file of a model, of this repository or of the catalogue."""
    if name in digits.FLOORS:
        return digits.path(name)
    return fetch.fetch(name) if name in fetch.names() else fetch.architecture(name)


def loaded(path: Path, level: int) -> Model:
    """The model after the passes of a level."""
    model = Model.load(path)
    if level:
        run_pipeline(model, pipeline(level, None))
    return model


def one_of_each(groups: Sequence[Group], seed: int) -> list[int]:
    """A unit of every group."""
    random = np.random.default_rng(seed)
    return [int(random.integers(group.units)) for group in groups]


class Feeds:
    """Two feeds that the model runs on."""

    def __init__(self, path: Path) -> None:
        with Session(path, optimizations="off") as session:
            proposer = Proposer(Model.load(path), session, {})
            self.sizes: Sizes = proposer.sizes(1)[0]
            self.feeds = [proposer.feed(self.sizes, kind, 3) for kind in ("normal", "smooth")]

    def run(self, model: Model) -> list[dict[str, Any]]:
        """Outputs of the model, without optimisations of the runtime."""
        with tempfile.TemporaryDirectory() as folder:
            path = write_exposed(model, Path(folder) / "model.onnx")
            with Session(path, optimizations="off") as session:
                return [session.run(feed) for feed in self.feeds]


def compare(wanted: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> float:
    """The largest difference, by the largest magnitude of each output; inf for another shape."""
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        for name, expected in a.items():
            if np.shape(expected) != np.shape(b[name]):
                return float("inf")
            if np.asarray(expected).dtype.kind != "f" or not np.size(expected):
                continue
            scale = max(float(np.nanmax(np.abs(expected))), 1e-12)
            gap = np.abs(np.asarray(expected, np.float64) - b[name]) / scale
            if not np.array_equal(np.isnan(expected), np.isnan(b[name])):
                return float("inf")
            worst = max(worst, float(np.nanmax(gap)))
    return worst


def measure(name: str, path: Path, level: int, feeds: Feeds, seed: int = 0) -> Row:
    """Find groups, take one unit of each, compare with the model that does not read it."""
    silenced = Editor(loaded(path, level))
    groups = groups_of(silenced)
    for group, unit in zip(groups, one_of_each(groups, seed), strict=True):
        silence(silenced, group, [unit])
    edit = Editor(loaded(path, level))
    interface = verify.Interface.of(edit.model)
    started = time.perf_counter()
    groups = groups_of(edit)
    middle = time.perf_counter()
    units = one_of_each(groups, seed)
    removed = sum(remove(edit, g, [unit]) for g, unit in zip(groups, units, strict=True))
    seconds = middle - started, time.perf_counter() - middle
    edit.settle()
    problem, error = "", 0.0
    found = verify.problems(edit.model, interface)
    try:
        error = compare(feeds.run(silenced.model), feeds.run(edit.model))
        problem = found[0] if found else "differs" if error > 1e-3 else ""
    except Exception as failure:  # the row says what happened, the table goes on
        problem = " ".join(str(failure).split())[:300]
    total = sum(group.units for group in groups)
    return Row(name, level, len(groups), total, removed, error, seconds, problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--level", type=int, nargs="*", default=[0, 2])
    arguments = parser.parse_args()
    every = [*fetch.names(), *digits.FLOORS, *fetch.architectures()]
    table, failed = Table(box=None), 0
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in arguments.models or every:
        path = path_of(name)
        feeds = Feeds(path)
        for level in arguments.level:
            row = measure(name, path, level, feeds)
            print(*row.cells, sep="\t", file=sys.stderr, flush=True)
            table.add_row(*row.cells)
            failed += bool(row.problem)
    Console(width=140).print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
