"""Coupled groups of every model, and whether one unit of each can go.

    python benchmarks/prune_groups.py [--models NAME ...] [--level N ...] [--share S]

Of each model, as it is (level 0) and optimised, the groups are found and one unit of every group,
or a share of them, is removed. The rest has to run, give outputs of the same shapes, and be equal
to the model in which the readers' weights of these units are zero: within 1e-5 of the largest
output, or four times what the runtime's own optimisations change. A feed on which these change
more than a percent shows nothing; `effect` is how far the units' weights move the outputs, which
tells that it would show.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

from graphopt import verify
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure
from graphopt.exposed import write_exposed
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import pipeline
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.remove import remove, silence
from graphopt.proposals import Kind, Proposer, Sizes
from graphopt.runtime import Level, Session
from models import digits, fetch

HEADINGS = ["model", "level", "groups", "units", "removed", "error", "noise", "effect"]
HEADINGS += ["s-find", "s-remove", "runs"]
KINDS: Final[tuple[Kind, ...]] = ("normal", "large", "larger")
TOLERANCE: Final = 1e-5
QUIET: Final = 1e-2


@dataclass(frozen=True)
class Row:
    """What came of one model at one level."""

    name: str
    level: int
    groups: int
    units: int
    removed: int  # groups that were cut
    error: float  # largest differences of an output, by its largest magnitude
    noise: float
    effect: float
    seconds: tuple[float, float]
    problem: str

    @property
    def cells(self) -> list[str]:
        times = [f"{seconds:.2f}" for seconds in self.seconds]
        counts = [str(n) for n in (self.level, self.groups, self.units, self.removed)]
        errors = [f"{error:.1e}" for error in (self.error, self.noise, self.effect)]
        return [self.name, *counts, *errors, *times, self.problem or "yes"]


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


def some_of_each(groups: Sequence[Group], share: float, seed: int) -> list[list[int]]:
    """That share of the units of every group, but one at least and never all."""
    random = np.random.default_rng(seed)
    counts = [min(max(1, int(share * group.units)), group.units - 1) for group in groups]
    return [
        random.choice(group.units, count, replace=False).tolist()
        for group, count in zip(groups, counts, strict=True)
    ]


class Feeds:
    """Feeds that the model runs on."""

    def __init__(self, path: Path) -> None:
        with Session(path, optimizations="off") as session:
            proposer = Proposer(Model.load(path), session, {})
            sizes: Sizes = proposer.sizes(1)[0]
            self.feeds = [proposer.feed(sizes, kind, 3) for kind in KINDS]

    def run(self, model: Model, level: Level = "off") -> list[dict[str, Any]]:
        """Outputs of the model, feed by feed."""
        with tempfile.TemporaryDirectory() as folder:
            path = write_exposed(model, Path(folder) / "model.onnx")
            with Session(path, optimizations=level) as session:
                return [session.run(feed) for feed in self.feeds]


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest of any output, by its largest magnitude; inf for another shape or another NaN."""
    worst = 0.0
    for name, expected in wanted.items():
        if np.shape(expected) != np.shape(found[name]):
            return float("inf")
        if np.asarray(expected).dtype.kind != "f" or not np.size(expected):
            continue
        if not np.array_equal(np.isnan(expected), np.isnan(found[name])):
            return float("inf")
        scale = max(float(np.nanmax(np.abs(expected))), 1e-30)
        gap = np.abs(np.asarray(expected, np.float64) - found[name]) / scale
        worst = max(worst, float(np.nanmax(gap)))
    return worst


Errors = tuple[float, float, float]
"""Error, noise and effect."""


def judged(wanted: Model, found: Model, original: Model, feeds: Feeds) -> Errors:
    """Error, noise and effect on the feed with the largest error beyond what is allowed."""
    runs = [feeds.run(wanted), feeds.run(found), feeds.run(wanted, "default"), feeds.run(original)]
    rows: list[Errors] = []
    for right, candidate, again, before in zip(*runs, strict=True):
        noise = difference(right, again)
        if noise <= QUIET:
            rows.append((difference(right, candidate), noise, difference(right, before)))
    return max(rows, key=lambda row: row[0] / allowed(row[1])) if rows else (np.inf, np.inf, 0.0)


def allowed(noise: float) -> float:
    """The error that may be."""
    return max(TOLERANCE, 4 * noise)


def measure(name: str, path: Path, level: int, feeds: Feeds, share: float = 0.0) -> Row:
    """Find groups, take units of each, compare with the model that does not read them."""
    silenced = Editor(loaded(path, level))
    groups = groups_of(silenced)
    for group, units in zip(groups, some_of_each(groups, share, 0), strict=True):
        silence(silenced, group, units)
    edit = Editor(loaded(path, level))
    interface = verify.Interface.of(edit.model)
    started = time.perf_counter()
    groups = groups_of(edit)
    middle = time.perf_counter()
    chosen = some_of_each(groups, share, 0)
    removed = sum(remove(edit, group, units) for group, units in zip(groups, chosen, strict=True))
    seconds = middle - started, time.perf_counter() - middle
    edit.settle()
    errors: Errors = (0.0, 0.0, 0.0)
    found = verify.problems(edit.model, interface)
    problem = found[0] if found else ""
    try:
        errors = judged(silenced.model, edit.model, loaded(path, level), feeds)
    except RuntimeFailure as failure:
        problem = str(failure)[:300]
    if not problem and errors[0] > allowed(errors[1]):
        problem = "differs"
    total = sum(group.units for group in groups)
    return Row(name, level, len(groups), total, removed, *errors, seconds, problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--level", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--share", type=float, default=0.0)
    arguments = parser.parse_args()
    every = [*fetch.names(), *digits.FLOORS, *fetch.architectures()]
    table, failed = Table(box=None), 0
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in arguments.models or every:
        path = path_of(name)
        feeds = Feeds(path)
        for level in arguments.level:
            row = measure(name, path, level, feeds, arguments.share)
            print(*row.cells, sep="\t", file=sys.stderr, flush=True)
            table.add_row(*row.cells)
            failed += bool(row.problem)
    Console(width=140).print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
