"""What low rank keeps, gains and costs, one table each; writes docs/low-rank-results.md.

    python benchmarks/low_rank.py TABLE [NAME ...] [--sets FOLDER] [--seeds N] [--again]

Tables, `all` for every one of them:

    digits  accuracy of the digits' CNN by the share of MACs that is left
    models  scores of real models by the share of MACs that is left (NAME: which)
    time    what split layers take over what they took, and whole models (NAME: which)
    cost    seconds for spectra and allocation of a model of BERT's size, in a fresh process
    int8    low rank, int8 and both, each as fast as a score's loss of 1 % allows
    order   scores where channels go before layers are split, and after it, at one share of MACs

What was measured is kept in --json and skipped the next time, until the code or the sets change or
--again is given; --keep keeps what other commits measured. Sets are built from what Python packages
bring (see evaluation/build.py), or taken from --sets. Numerics run on one thread of BLAS: on busy
machines more are slower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import graphopt
from benchmarks import int8_steps, low_rank_tables
from benchmarks.low_rank_tables import SHARES, key
from benchmarks.prune import Bench, Results, benches
from graphopt.errors import RefusedError
from graphopt.ir import Model
from graphopt.judging import Budget
from graphopt.low_rank_search import LowRanking, LowRankRequest
from graphopt.passes.fitting import Settings
from graphopt.passes.lowrank.forms import Method, Split, split_of
from graphopt.passes.lowrank.options import AUTOMATIC, Splittable
from graphopt.passes.lowrank.table import Ranks, tabulate
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.passes.work import sizes_wanted
from graphopt.proposals import first_feed
from graphopt.pruning import PruneRequest, Pruning
from graphopt.report import Report
from graphopt.runtime import Feed
from graphopt.statistics import sweep

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "low_rank.json"
PAGE = ROOT / "docs" / "low-rank-results.md"
SEEDS = 3
EVERYTHING = Budget(max_drop=2.0)  # every candidate is good, so that it is timed
Cell = dict[str, Any]

_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.low_rank import spectra_alone
print(json.dumps(spectra_alone(*sys.argv[2:])))
"""
_METRIC = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from benchmarks.evaluation.scores import METRICS
from benchmarks.evaluation.sets import EvaluationSet


def score(run):
    found = EvaluationSet(Path({folder!r})).evaluation()
    return METRICS[{name!r}].score(run, found)
"""


# -- scores ----------------------------------------------------------------------------------------


def search_of(bench: Bench, data: Path | None) -> LowRanking:
    """A search that judges nothing to be bad; what ranks tell is measured once for all shares."""
    given = None if data is None else str(data)
    request = LowRankRequest(data=given, budget=EVERYTHING, holds_out=True)
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    return LowRanking(bench.source, bench.lossless, request, folder, lambda *_: None)


def ours(bench: Bench, search: Callable[[], LowRanking], share: float) -> Cell:
    """The score of what graphopt makes for a share of MACs."""
    trial = search().trial(share)
    if trial is None:
        raise LookupError("there are no layers in it that can be split")
    return bench.score_recipe(trial.recipe) | {"left": search().left(trial)}


def uniform(bench: Bench, ranks_of: Callable[[], Ranks], share: float) -> Cell:
    """The plain SVD of every layer at one share of its MACs, without data.

    Layers that it makes no smaller stay as they are: the others do not make up for them.
    """
    ranks = ranks_of()
    splits: dict[str, Split] = {}
    gone, ratio = 0.0, 1 - (1 - share) * ranks.total / sum(g.macs for g in ranks.groups)
    for group in ranks.groups:
        layer = group.first
        method: Method = "svd" if layer.taps == 1 else "channel"
        rank = max(1, int(ratio * layer.weight.size / sum(layer.shape)))
        if rank * sum(layer.shape) < layer.weight.size:
            splits[group.root] = split_of(layer, method, rank, layer.matrix(), None)
            gone += group.macs * (1 - rank * sum(layer.shape) / layer.weight.size)
    recipe = StagedRecipe((Stage(splits=splits),))
    return bench.score_recipe(recipe) | {"left": 1 - gone / ranks.total}


def bare_ranks(bench: Bench) -> Ranks:
    """What can be split in a model, at the shapes of its first feed; without forms."""
    data = None if bench.sets is None else str(bench.sets.calibration)
    feed = first_feed(bench.source, data=data)
    return tabulate(Model.load(bench.lossless), shapes(bench.lossless, feed), (), None, Settings())


def shapes(model: Path, feed: Feed) -> dict[str, tuple[int, ...]]:
    """Of what products read, on one feed."""
    seen = sweep(model, [feed], sizes_wanted(Model.load(model)))
    return {v: seen.shape(v).first for v in seen.values if seen.has_shape(v)}


def measure_scores(table: str, bench: Bench, seeds: int) -> None:
    """All shares of one model: of graphopt for every seed, and of what needs no data."""
    results, digest = bench.results, bench.digest

    def original() -> Cell:
        return bench.score(bench.source) | {"bytes": bench.lossless.stat().st_size}

    results.measured(table, key(bench.name, "original"), original, digest)
    ranks = functools.cache(lambda: bare_ranks(bench))
    for share in SHARES[table]:
        cell = functools.partial(uniform, bench, ranks, share)
        results.measured(table, key(bench.name, share, "uniform"), cell, digest)
    for way, seed in [*(("ours", seed) for seed in range(seeds)), ("no data", 0)]:
        data = bench.data(seed) if way == "ours" else None
        search = functools.cache(functools.partial(search_of, bench, data))
        for share in SHARES[table]:
            cell = functools.partial(ours, bench, search, share)
            results.measured(table, key(bench.name, share, way, seed), cell, digest)


# -- time, cost, int8 ------------------------------------------------------------------------------


def timed(bench: Bench, share: float) -> Cell:
    """A model with layers split that are faster for it, whatever it loses."""
    data = None if bench.sets is None else str(bench.sets.calibration)
    request = LowRankRequest(share=share, data=data, budget=EVERYTHING, force=True)
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    search = LowRanking(bench.source, bench.lossless, request, folder, lambda *_: None)
    found = search.run()
    trial = found.winner.trial
    if trial is None:
        return {"reason": found.reason}
    layers = [layer for layer in found.layers[trial.name] if layer.option.method is not None]
    ratio = found.winner.against_lossless[trial.name]
    return {
        "left": found.left[trial.name],
        "ratio": [round(x, 3) for x in (ratio.median, ratio.low, ratio.high)],
        "kept": not found.reason,
        "layers": [
            [x.option.macs / x.group.macs, (x.ms_after or 0.0) / (x.ms_before or 1.0)]
            for x in layers
        ],
        "forms": sorted({x.option.method or "" for x in layers}),
    }


def spectra_alone(lossless: str, count: str) -> Cell:
    """Options of a model on some proposed feeds, and what is chosen at several shares."""
    model = Path(lossless)
    feeds = [dict(first_feed(model, seed=seed)) for seed in range(int(count))]
    known = shapes(model, feeds[0])
    started = time.perf_counter()
    ranks = tabulate(Model.load(model), known, AUTOMATIC, lambda: iter(feeds), Settings())
    spectra = time.perf_counter() - started
    for share in (0.9, 0.7, 0.5, 0.3):
        ranks.allocated(share)
    return {
        "spectra": spectra,
        "seconds": time.perf_counter() - started,
        "layers": len(ranks.groups),
        "weights": sum(_size(group) for group in ranks.groups),
    }


def _size(group: Splittable) -> int:
    return int(group.first.weight.size)


def cost(bench: Bench, count: int) -> Cell:
    asked = (bench.lossless, str(count))
    return int8_steps.call(sys.executable, "-c", _WORKER, ROOT, *asked)


def together(bench: Bench, way: str) -> Cell:
    """The command with low rank, int8 or both, within 1 % of the score."""
    assert bench.sets is not None
    metric = bench.folder / f"{bench.name}_metric.py"
    told = {"root": str(ROOT), "folder": str(bench.sets.folder.resolve()), "name": bench.name}
    metric.write_text(_METRIC.format(**told))
    steps: dict[str, Any] = {}
    steps |= {"low_rank": "auto"} if "low rank" in way else {}
    steps |= {"int8": "auto"} if "int8" in way else {}
    before = float(bench.score(bench.source)["score"])
    target = bench.folder / f"{bench.name}-{way}.onnx"
    try:
        report = graphopt.optimize(
            bench.source,
            target,
            target="ort-cpu",
            data=str(bench.sets.calibration),
            metric=f"{metric}:score",
            max_drop=0.01 * before,
            threads=2,
            **steps,
        ).report
    except RefusedError as refused:
        return {"refused": str(refused), "ratio": 1.0}
    return _of(report) | bench.score(target) | {"bytes": target.stat().st_size}


def _of(report: Report) -> Cell:
    steps = {"low rank": report.low_rank, "int8": report.int8}
    asked = {name: step for name, step in steps.items() if step is not None}
    kept = [step for step in asked.values() if step.kept]
    last = kept[-1].to_original  # of the file that was written
    return {
        "kept": [name for name, step in asked.items() if step.kept],
        "reasons": {name: step.reason for name, step in asked.items()},
        "ratio": None if last is None else round(last.ratio, 3),
        "left": None if report.low_rank is None else report.low_rank.macs_left,
    }


def in_order(bench: Bench, first: str) -> Cell:
    """The score with a fifth of the MACs gone with channels and a quarter of the rest by splits."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    data, file, left = str(bench.data(0)), bench.lossless, 1.0
    for number, step in enumerate(("channels", "low rank", "channels")[first == "low rank" :][:2]):
        place = folder / str(number)
        place.mkdir()
        trial: Any
        if step == "channels":
            asked = PruneRequest(channels=0.2, data=data, budget=EVERYTHING, holds_out=True)
            pruning = Pruning(bench.source, file, asked, place, lambda *_: None)
            trial = pruning.trial(channels=0.2)
            left *= 1 - pruning.share(trial)
        else:
            request = LowRankRequest(data=data, budget=EVERYTHING, holds_out=True)
            search = LowRanking(bench.source, file, request, place, lambda *_: None)
            trial = search.trial(0.75)
            left *= search.left(trial)
        file = trial.file
    return bench.score(file) | {"left": left}


# -- the command -----------------------------------------------------------------------------------


def measure(table: str, given: argparse.Namespace, folder: Path, results: Results) -> None:
    """One table, of the models that are named or of all that it has."""
    names = [n for n in low_rank_tables.NAMES[table] if n in given.names or not given.names]
    for bench in benches(names, given, folder, results) if names else ():
        if table in ("digits", "models"):
            measure_scores(table, bench, given.seeds)
        elif table == "time":
            for share in low_rank_tables.TIMED_SHARES:
                cell = functools.partial(timed, bench, share)
                results.measured(table, key(bench.name, share), cell, bench.digest)
        elif table == "cost":
            cell = functools.partial(cost, bench, low_rank_tables.COST_FEEDS)
            results.measured(table, bench.name, cell)
        elif table == "int8":
            for way in low_rank_tables.WAYS:
                cell = functools.partial(together, bench, way)
                results.measured(table, key(bench.name, way), cell, bench.digest)
        elif table == "order":
            for first in low_rank_tables.ORDERS:
                cell = functools.partial(in_order, bench, first)
                results.measured(table, key(bench.name, first), cell, bench.digest)


def main() -> int:
    tables = list(low_rank_tables.NAMES)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=[*tables, "all", "page"], help="`page`: measure nothing")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sets", type=Path, metavar="FOLDER", help="take the sets from there")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--keep", action="store_true", help="keep what other commits measured")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    given = parser.parse_args()
    results = Results(given.json, given.again, given.keep)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        for table in (
            tables if given.table == "all" else [given.table] if given.table in tables else []
        ):
            measure(table, given, Path(folder), results)
    PAGE.write_text(low_rank_tables.page(results.tables))
    judged = list(low_rank_tables.bars(results.tables))
    for is_met, text, missed in judged:
        print("\n    ".join([f"{'met' if is_met else 'NOT MET'}: {text}", *missed]))
    return int(not all(is_met for is_met, _, _ in judged))


if __name__ == "__main__":
    sys.exit(main())
