"""What pruning keeps, gains and costs, one table each; writes docs/pruning-results.md.

    python benchmarks/prune.py TABLE [NAME ...] [--sets FOLDER] [--seeds N] [--again]

Tables, `all` for every one of them:

    digits   accuracy of the digits' CNN by zeros, patterns and channels that are gone
    models   scores of real models by zeros and by the share of MACs that is gone (NAME: which)
    latency  time of the lossless model over that of one with 30 % of the MACs gone (NAME: which)
    cost     seconds and peak memory of fitting, each in a fresh process
    file     the file at 90 % zeros, and whether it comes back bit for bit

What was measured is kept in --json and skipped the next time, until the code of pruning or the sets
change or --again is given; scores are kept by the hash of the file. Sets are built from what Python
packages bring (see evaluation/build.py), or taken from --sets as int8.py takes them. With --check a
set's own eval.py scores the original as well.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx

import graphopt
from benchmarks import int8_steps, lossless, prune_tables
from benchmarks.evaluation import build
from benchmarks.evaluation.scores import METRICS
from benchmarks.evaluation.sets import EvaluationSet
from benchmarks.int8 import cache
from benchmarks.prune_tables import CNN, Cell, Row, Tables, key
from graphopt import exporter, macs
from graphopt.data import given_feeds
from graphopt.edit import Editor
from graphopt.errors import GraphoptError
from graphopt.ir import Model
from graphopt.judging import Budget
from graphopt.manager import run_pipeline
from graphopt.passes.fitting import Settings, fit, grams
from graphopt.passes.prune import importance as units_by
from graphopt.passes.prune.channels import Cut, column_masks, prune_channels
from graphopt.passes.prune.groups import groups_of
from graphopt.passes.prune.sparse import Densify
from graphopt.passes.prune.weights import Pattern, Sparsity, prune_weights
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.proposals import first_feed
from graphopt.pruning import PruneRequest, Pruning
from graphopt.runtime import Feed, Session
from graphopt.statistics import sweep
from graphopt.timing import time_paired

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prune.json"
PAGE = ROOT / "docs" / "pruning-results.md"
SOURCES = ("graphopt", "passes", "kernels")  # what decides the numbers
IMAGES, BATCH = 256, 64
DRAWS = 500  # of the samples, for the standard error of a score
SEEDS = 3
NEVER = Budget(max_drop=-1.0)  # no candidate is good, so that none is timed

_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.prune import fit_alone
print(json.dumps(fit_alone(*sys.argv[2:])))
"""


class Results:
    """Measured cells by table and key, and scores by file, written after every one of them."""

    def __init__(self, path: Path, again: bool, keep: bool = False) -> None:
        self.path, self.again, self.keep, self.version = path, again, keep, version()
        self.tables: Tables = json.loads(path.read_text()) if path.exists() else {}

    def measured(self, table: str, name: str, make: Callable[[], Cell], sets: str = "") -> None:
        """Measure a cell unless this code has measured it on these sets."""
        cells = self.tables.setdefault(table, {})
        made_by = {"version": self.version, "sets": sets}
        known = cells.get(name, {})
        if not self.again and (made_by.items() <= known.items() or (self.keep and known)):
            return
        print(f"{table}: {name}", file=sys.stderr, flush=True)
        try:
            found = make()
        except (GraphoptError, LookupError) as error:
            found = {"error": int8_steps.plain(f"{type(error).__name__}: {error}")}
        cells[name] = made_by | int8_steps.rounded(found)
        self.save()

    def save(self) -> None:
        parts = (
            f"{json.dumps(table)}: {{\n"
            + ",\n".join(f"{json.dumps(k)}: {json.dumps(cell)}" for k, cell in cells.items())
            + "\n}"
            for table, cells in self.tables.items()
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        draft.replace(self.path)


def version() -> str:
    """The commit of the code that is measured, and a hash of what is not committed."""

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(ROOT), *arguments, "--", *SOURCES]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout

    commit, changed = git("log", "-1", "--format=%h").strip(), git("diff", "HEAD")
    return commit + (f"+{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else "")


@dataclass(frozen=True)
class Bench:
    """One model: its file and its lossless one, the set that scores it, a folder for its files."""

    name: str
    source: Path
    folder: Path
    results: Results
    sets: EvaluationSet | None = None
    searches: dict[Any, Pruning] = field(default_factory=dict)

    def search(self, request: PruneRequest) -> Pruning:
        """A search of its own, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return Pruning(self.source, self.lossless, request, folder, lambda *_: None)

    @functools.cached_property
    def lossless(self) -> Path:
        path = self.folder / f"{self.name}-lossless.onnx"
        graphopt.optimize(self.source, path)
        return path

    @functools.cached_property
    def digest(self) -> str:
        return "" if self.sets is None else self.sets.digest()

    @functools.cached_property
    def evaluation(self) -> dict[str, Any]:
        if self.name == CNN:
            with np.load(ROOT / "models" / "digits" / "evaluation.npz") as archive:
                return dict(archive)
        assert self.sets is not None
        return self.sets.evaluation()

    def data(self, seed: int) -> Path:
        """Samples drawn without labels: training images, or half of the calibration set."""
        target = self.folder / f"{self.name}-{seed}"
        rng = np.random.default_rng(seed)
        if self.name == CNN:
            from models.digits.data import split

            images = split().train_image
            chosen = images[rng.choice(len(images), IMAGES, replace=False)]
            target.mkdir(exist_ok=True)
            for start in range(0, IMAGES, BATCH):
                np.savez(target / f"{start:03}.npz", image=chosen[start : start + BATCH])
            return target
        assert self.sets is not None
        with np.load(self.sets.calibration) as archive:
            arrays = dict(archive)
        count = len(next(iter(arrays.values())))
        drawn = np.sort(rng.choice(count, count // 2, replace=False))
        np.savez(target.with_suffix(".npz"), **{n: array[drawn] for n, array in arrays.items()})
        return target.with_suffix(".npz")

    def score(self, file: Path) -> Cell:
        """The score of a file, the standard error of it by drawing samples again, and their n."""
        content = hashlib.sha256(file.read_bytes()).hexdigest()[:20]
        known = self.results.tables.setdefault("scores", {})
        name = key(self.name, self.digest, content)
        if name not in known:
            metric = METRICS[self.name]
            with Session(file, threads=2) as session:
                ports = {port.name for port in session.inputs}
                rows = metric.rows(
                    lambda feed: session.run({n: feed[n] for n in feed if n in ports}),
                    self.evaluation,
                )
            rng = np.random.default_rng(0)
            draws = [
                metric.value(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(DRAWS)
            ]
            se = float(np.nanstd(draws, ddof=1))
            found = {"score": metric.value(rows), "se": se, "n": len(rows)}
            known[name] = int8_steps.rounded(found)
        return known[name]

    def score_recipe(self, recipe: StagedRecipe) -> Cell:
        target = self.folder / f"{self.name}-scored.onnx"
        recipe.write(self.lossless, target)
        return self.score(target) | {"bytes": target.stat().st_size}


# -- pruning: the ways that are compared -----------------------------------------------------------


def pruned(
    bench: Bench, row: Row, data: Path | None, importance: str, recover: str
) -> tuple[StagedRecipe, float]:
    """What graphopt makes of the model, good or not, and the share that is really gone."""
    asked: dict[str, Any] = {"data": None if data is None else str(data), "budget": NEVER}
    if row.kind == "channels":
        asked |= {"channels": row.share, "unit_importance": importance}
    else:
        pattern = Pattern.of(row.pattern) if row.pattern else Pattern()
        asked |= {"sparsity": row.share, "pattern": pattern, "importance": importance}
    request = PruneRequest(recovery=recover, force=True, **asked)  # type: ignore[arg-type]
    if row.kind != "channels":
        search = bench.search(request)
        trial = search.trial(sparsity=row.share)
    else:  # what channels tell is measured once for all shares
        way = data, importance, recover
        search = bench.searches.setdefault(way, bench.search(request))
        trial = search.trial(channels=row.share)
    if trial is None:
        raise LookupError("there are no channels in it that can go")
    return trial.recipe, search.share(trial)


def cut_evenly(
    bench: Bench, row: Row, data: Path, importance: units_by.UnitImportance, recover: str
) -> tuple[StagedRecipe, float]:
    """The same share of each group, or of the last two; and the share of all their channels."""
    dense, edit = Model.load(bench.lossless), Editor(Model.load(bench.lossless))
    groups = groups_of(edit)
    if row.kind == "last stage":
        groups = groups[-2:]
    elif row.kind == "last hidden":
        groups = [group for group in groups if len(group.readers) == 1][-2:]
    feeds = functools.partial(_feeds, bench.lossless, str(data))
    wanted = units_by.observed(groups, importance)
    seen = sweep(bench.lossless, feeds(), wanted) if wanted else None
    roots = units_by.readers_of(edit, groups, importance)
    known = grams(dense, roots, feeds, Settings()) if roots else {}
    cut: dict[str, tuple[int, ...]] = {}
    for group in groups:
        order = units_by.ranking(units_by.unit_scores(edit, group, importance, seen, known))
        cut[group.root] = tuple(sorted(order[: round(row.share * group.units)]))
    share = sum(map(len, cut.values())) / sum(group.units for group in groups)
    if recover == "none":
        return StagedRecipe((Stage(cut=cut),)), share
    # The stage is of the model before channels are out, `prune_channels` takes them out as well.
    return StagedRecipe((_fitted(dense, edit, cut, feeds),)), share


def _fitted(dense: Model, edit: Editor, cut: Cut, feeds: Callable[[], Iterator[Feed]]) -> Stage:
    fit(dense, edit, column_masks(edit, groups_of(edit), cut), feeds, Settings())
    return Stage.between(dense, edit, cut)


def _feeds(model: Path, data: str) -> Iterator[dict[str, Any]]:
    with Session(model) as session:
        yield from given_feeds(data, session)


def unfitted(recipe: StagedRecipe, lossless: Path) -> StagedRecipe:
    """The same zeros and the same cut, with the weights that the model came with."""
    (stage,) = recipe.stages
    if stage.cut:
        return StagedRecipe((Stage(cut=stage.cut),))
    values, weights = Model.load(lossless).graph.values, {}
    for name, array in stage.weights.items():
        weight = values[name].weight
        if weight is not None and array.ndim > 1:  # the others are biases
            weights[name] = np.where(array != 0, weight.values, np.float32(0))
    return StagedRecipe((Stage(weights),))


def measure_row(bench: Bench, table: str, row: Row, seeds: int) -> None:
    """A row: with recovery for every seed, and the ways that need no data."""
    even = row.kind in ("every group", "last stage", "last hidden")
    make: Any = cut_evenly if even else pruned
    is_cut = even or row.kind == "channels"

    def fitted(seed: int) -> Cell:
        importance = "obs"
        recipe, gone = make(bench, row, bench.data(seed), importance, "lsq")
        same = bench.score_recipe(unfitted(recipe, bench.lossless))["score"]
        return bench.score_recipe(recipe) | {"gone": gone, "same": same}

    def plain(importance: str) -> Cell:
        data = bench.data(0) if even else None
        recipe, gone = make(bench, row, data, importance, "none")
        return bench.score_recipe(recipe) | {"gone": gone}

    ways = ("l2",) if is_cut else ("lamp", "magnitude")
    for way in ways:
        cell = functools.partial(plain, way)
        bench.results.measured(table, key(bench.name, row.text, way), cell, bench.digest)
    for seed in range(seeds):
        cell = functools.partial(fitted, seed)
        bench.results.measured(table, key(bench.name, row.text, "lsq", seed), cell, bench.digest)


def measure_scores(table: str, bench: Bench, given: argparse.Namespace) -> None:
    """All rows of one model."""

    def original() -> Cell:
        return bench.score(bench.source) | {"bytes": bench.lossless.stat().st_size}

    bench.results.measured(table, key(bench.name, "original"), original, bench.digest)
    if given.check and bench.sets is not None and bench.sets.script.exists():
        command = [sys.executable, str(bench.sets.script), str(bench.source)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ours = bench.score(bench.source)["score"]
        theirs = float(re.findall(r"\d+\.\d+", said)[0])
        print(f"{bench.name}: {ours} here, {said.strip()}", file=sys.stderr)
        assert abs(ours - theirs) < 1e-3, "the set's own script scores the original otherwise"
    for row in prune_tables.DIGITS if table == "digits" else prune_tables.MODELS_ROWS:
        measure_row(bench, table, row, given.seeds)


# -- latency, cost, file ---------------------------------------------------------------------------


def latency(bench: Bench, seconds: float) -> Cell:
    """The time of the lossless model over that of the pruned one, and the MACs that are left."""
    data = None if bench.sets is None else bench.sets.calibration
    ways = ("l2", "none")  # what weights are left makes no difference to the time
    recipe, _ = pruned(bench, Row("channels", prune_tables.LATENCY_SHARE), None, *ways)
    target = bench.folder / f"{bench.name}-cut.onnx"
    recipe.write(bench.lossless, target)
    feed = first_feed(bench.source, data=None if data is None else str(data))
    timed = time_paired([bench.lossless, target], feed, seconds=seconds, threads=2)
    shapes = {name: np.shape(array) for name, array in feed.items()}
    before, after = (macs.count(onnx.load(f), shapes).total for f in (bench.lossless, target))
    ratio = timed.ratios[1]
    return {
        "ratio": [round(x, 3) for x in (ratio.median, ratio.low, ratio.high)],
        "ms": [round(model.ms, 3) for model in timed.models],
        "macs": [before, after],
        "bytes": [f.stat().st_size for f in (bench.lossless, target)],
        "way": " ".join(ways),
    }


def fit_alone(what: str, lossless: str, data: str, count: str) -> Cell:
    """Fit layers on so many feeds, given ones again and again: seconds, and peak MB of it."""

    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 1024

    samples = list(_feeds(Path(lossless), data))
    dense, edit = Model.load(Path(lossless)), Editor(Model.load(Path(lossless)))

    def feeds() -> Iterator[Feed]:
        return itertools.islice(itertools.cycle(samples), int(count))

    share, before, started = prune_tables.COST_SHARES[what], peak(), time.perf_counter()
    if what == "zeros":
        prune_weights(dense, edit, Sparsity(share), feeds, Settings())
    else:
        cut = {g.root: tuple(range(round(share * g.units))) for g in groups_of(edit)}
        prune_channels(dense, edit, cut, feeds, Settings())
    return {"seconds": time.perf_counter() - started, "peak": peak() - before}


def cost(bench: Bench, what: str, count: int) -> Cell:
    assert bench.sets is not None
    asked = (what, bench.lossless, bench.sets.calibration, str(count))
    return int8_steps.call(sys.executable, "-c", _WORKER, ROOT, *asked)


def file_size(bench: Bench) -> Cell:
    """Bytes of the sparse file and of the dense one, and whether `densify` gives that back."""
    recipe, gone = pruned(bench, Row("zeros", prune_tables.FILE_SHARE), None, "lamp", "none")
    sparse, dense = (bench.folder / f"{bench.name}-{kind}.onnx" for kind in ("sparse", "dense"))
    recipe.write(bench.lossless, sparse)
    exporter.save(recipe.dense(bench.lossless), dense)
    back = Model.load(sparse)
    run_pipeline(back, [Densify()])
    tensors = [
        {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        for proto in (onnx.load(dense), exporter.to_proto(back))
    ]
    bits = [{n: (a.dtype, a.shape, a.tobytes()) for n, a in each.items()} for each in tensors]
    floats = [array for array in tensors[0].values() if array.dtype == np.float32]
    zeros = sum(int((array == 0).sum()) for array in floats)
    return {
        "bytes": [dense.stat().st_size, sparse.stat().st_size],
        "gone": gone,
        "zeros": zeros / sum(array.size for array in floats),
        "exact": bits[0] == bits[1],
    }


# -- the command -----------------------------------------------------------------------------------


def benches(names: list[str], given: argparse.Namespace, folder: Path, results: Results) -> Any:
    for name, source in lossless.sources(names).items():
        sets = None
        if name in METRICS and name != CNN:
            place = given.sets / name if given.sets else build.built(name, source, cache() / "sets")
            sets = EvaluationSet(place)
        yield Bench(name, source, folder, results, sets)


def measure(table: str, given: argparse.Namespace, folder: Path, results: Results) -> None:
    """One table, of the models that are named or of all that it has."""
    names = [n for n in prune_tables.NAMES[table] if n in given.names or not given.names]
    for bench in benches(names, given, folder, results) if names else ():
        if table in ("digits", "models"):
            measure_scores(table, bench, given)
        elif table == "latency":
            cell = functools.partial(latency, bench, given.seconds)
            results.measured(table, bench.name, cell, bench.digest)
        elif table == "cost":
            for what, count in itertools.product(prune_tables.COST_SHARES, prune_tables.COUNTS):
                cell = functools.partial(cost, bench, what, count)
                results.measured(table, key(bench.name, what, count), cell, bench.digest)
        else:
            results.measured(table, bench.name, functools.partial(file_size, bench))


def main() -> int:
    tables = list(prune_tables.NAMES)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=[*tables, "all", "page"], help="`page`: measure nothing")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sets", type=Path, metavar="FOLDER", help="take the sets from there")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--check", action="store_true", help="compare with the sets' own eval.py")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--keep", action="store_true", help="keep what other commits measured")
    parser.add_argument("--seconds", type=float, default=40, help="of `latency` (default: 40)")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    given = parser.parse_args()
    results = Results(given.json, given.again, given.keep)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        for table in (
            tables if given.table == "all" else [given.table] if given.table in tables else []
        ):
            measure(table, given, Path(folder), results)
    PAGE.write_text(prune_tables.page(results.tables))
    judged = list(prune_tables.bars(results.tables))
    for is_met, text, missed in judged:
        print("\n    ".join([f"{'met' if is_met else 'NOT MET'}: {text}", *missed]))
    return int(not all(is_met for is_met, _, _ in judged))


if __name__ == "__main__":
    sys.exit(main())
