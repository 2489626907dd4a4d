"""What `prune.py` measured, told as tables and judged against the bars."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import archspec.cpu
import onnxruntime

from benchmarks.evaluation.scores import METRICS
from benchmarks.lossless_tables import table

CNN: Final = "digits_cnn"
SCORED = (
    "ppocr_rec_v4",
    "ppocr_cls_v2",
    "paraphrase_minilm_l3",
    "magika_v3_3",
    "silero_vad_ifless_op18",
)
TIMED = (
    "ppocr_rec_v4",
    "ppocr_cls_v2",
    "ppocr_det_v4",
    "nudenet_yolov8n",
    "open_nsfw",
    "resnet50_ts",
    "mobilenetv3_large_ts",
)
NAMES: Final = {
    "digits": (CNN,),
    "models": SCORED,
    "latency": TIMED,
    "cost": ("paraphrase_minilm_l3", "ppocr_rec_v4"),
    "file": (CNN, "paraphrase_minilm_l3"),
}
COST_SHARES: Final = {"zeros": 0.8, "channels": 0.3}
COUNTS: Final = (64, 128, 256)
LATENCY_SHARE, FILE_SHARE = 0.3, 0.9
LOSS_BAR = 0.01  # of the original's score
SPEED_BAR, SECONDS_BAR, FLAT_BAR, FILE_BAR = 1.25, 120.0, 1.05, 0.31

Cell = dict[str, Any]
Tables = dict[str, dict[str, Cell]]
Bar = tuple[bool, str, list[str]]


def key(*parts: object) -> str:
    """The name of a cell."""
    return " | ".join(map(str, parts))


@dataclass(frozen=True)
class Row:
    """What goes: zeros, channels by their share of all MACs, or the same share of each group."""

    kind: str  # "zeros", "channels", "every group", "last stage" or "last hidden"
    share: float | None
    pattern: str = ""
    bar: float | None = None
    is_above: bool = False  # the bar itself is not enough

    @property
    def text(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%}"
        if self.kind == "zeros":
            return " ".join(part for part in (share, "zeros", self.pattern) if part)
        what = {"channels": "of MACs", "every group": "of channels"}
        return f"{share} {what.get(self.kind, f'of channels, {self.kind}')}"


DIGITS = (
    Row("zeros", 0.5),
    Row("zeros", 0.7),
    Row("zeros", 0.8, bar=0.99),
    Row("zeros", 0.9, bar=0.98),
    Row("zeros", 0.95, bar=0.73, is_above=True),
    Row("zeros", None, "2:4"),
    Row("zeros", None, "4:8"),
    Row("zeros", 0.5, "4x1"),
    Row("every group", 0.5),
    Row("every group", 0.75),
    Row("last stage", 0.5, bar=0.99),
    Row("last stage", 0.75, bar=0.98),
    Row("last hidden", 0.5, bar=0.99),
    Row("last hidden", 0.75, bar=0.98),
)
MODELS_ROWS = (
    *(Row("zeros", share) for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)),
    *(Row("channels", share) for share in (0.1, 0.2, 0.3, 0.4, 0.5)),
)


@dataclass(frozen=True)
class Mean:
    """A score over seeds: its standard error has a part of the seeds and one of the samples."""

    score: float
    seeds_se: float  # NaN for one seed
    samples_se: float
    seeds: int
    gone: float

    @property
    def se(self) -> float:
        return math.hypot(0.0 if math.isnan(self.seeds_se) else self.seeds_se, self.samples_se)

    def __str__(self) -> str:
        of = "" if self.seeds == 1 else f" ± {self.seeds_se:.4f}"
        return f"{self.score:.4f}{of}"


class Scores:
    """The cells of one model in one table."""

    def __init__(self, cells: dict[str, Cell], name: str) -> None:
        self.cells, self.name = cells, name
        self.original = cells.get(key(name, "original"))

    def seeds(self, row: Row) -> list[Cell]:
        """What was measured with recovery, a cell for each seed."""
        start = key(self.name, row.text, "lsq", "")
        return [c for k, c in self.cells.items() if k.startswith(start) and "score" in c]

    def of(self, row: Row, way: str) -> Mean | None:
        """ "lsq", "same" for its zeros or cut without fitting, or a way without seeds."""
        if way in ("lsq", "same"):
            found = self.seeds(row)
            scores = [cell["score" if way == "lsq" else "same"] for cell in found]
        else:
            cell = self.cells.get(key(self.name, row.text, way), {})
            found = [cell] if "score" in cell else []
            scores = [each["score"] for each in found]
        if not found:
            return None
        n, mean = len(scores), sum(scores) / len(scores)
        spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1)) if n > 1 else math.nan
        samples = sum(cell["se"] for cell in found) / n
        gone = sum(cell["gone"] for cell in found) / n
        return Mean(mean, spread / math.sqrt(n), samples, n, gone)

    def error(self, row: Row) -> str:
        start = key(self.name, row.text, "")
        return next(
            (c["error"] for k, c in self.cells.items() if k.startswith(start) and "error" in c), ""
        )

    def shown(self, rows: Sequence[Row], ways: dict[str, str]) -> str:
        def lines() -> Iterator[list[str]]:
            for row in rows:
                means = [self.of(row, way) for way in ways]
                first = means[0]
                texts = [str(mean or self.error(row) or "-") for mean in means]
                gone = f"{first.gone:.0%}" if first else "-"
                samples = f"{first.samples_se:.4f}" if first else "-"
                size = sum(cell["bytes"] for cell in self.seeds(row)) / max(1, len(self.seeds(row)))
                dense = (self.original or {}).get("bytes", 0)
                share = f"{size / dense:.2f}" if size and dense else "-"
                seeds = str(first.seeds if first else 0)
                yield [row.text, gone, *texts, samples, seeds, share]

        headings = ["what goes", "gone", *ways.values(), "SE of samples", "seeds", "file"]
        return table(headings, lines())

    def largest(self, rows: Sequence[Row], way: str) -> str:
        """The largest row up to which every one keeps the score."""
        best = "none"
        for row in rows:
            mean = self.of(row, way)
            if mean is None:
                return f"{best} (the next was not measured)"
            if not self.keeps(mean):
                break
            best = row.text
        return best

    def keeps(self, mean: Mean) -> bool:
        assert self.original is not None
        return mean.score >= (1 - LOSS_BAR) * float(self.original["score"])


ZERO_WAYS = {
    "lsq": "recovery",
    "same": "its zeros, unfitted",
    "lamp": "recovery none",
    "magnitude": "global magnitude",
}
CUT_WAYS = {"lsq": "recovery", "same": "its cut, unfitted", "l2": "l2, unfitted"}
_CUTS = ("channels", "every group", "last stage", "last hidden")


def _parts(rows: Sequence[Row]) -> Iterator[tuple[list[Row], dict[str, str]]]:
    yield [row for row in rows if row.kind not in _CUTS], ZERO_WAYS
    yield [row for row in rows if row.kind in _CUTS], CUT_WAYS


# -- bars ------------------------------------------------------------------------------------------


def bars(tables: Tables) -> Iterator[Bar]:
    """Whether each bar is met, what it is, and what misses it; nothing of what is not measured."""
    yield from _digits_bars(tables)
    yield from _models_bars(tables)
    yield from _latency_bars(tables)
    yield from _cost_bars(tables)
    sizes = {n: c for n, c in tables.get("file", {}).items() if "bytes" in c}
    if sizes:
        ratios = {n: cell["bytes"][1] / cell["bytes"][0] for n, cell in sizes.items()}
        missed = [f"{name}: {ratio:.3f}" for name, ratio in ratios.items() if ratio > FILE_BAR]
        yield (
            not missed,
            f"the file at most {FILE_BAR} of the dense one at {FILE_SHARE:.0%}",
            missed,
        )
        missed = [name for name, cell in sizes.items() if not cell["exact"]]
        yield not missed, "densify gives the same tensors bit for bit", missed


def _digits_bars(tables: Tables) -> Iterator[Bar]:
    scores = Scores(tables.get("digits", {}), CNN)
    for row in DIGITS:
        mean = scores.of(row, "lsq")
        if row.bar is None or mean is None:
            continue
        is_met = mean.score > row.bar if row.is_above else mean.score >= row.bar
        asked = f"{'above' if row.is_above else 'at least'} {row.bar:.0%}"
        yield is_met, f"digits, {row.text}: {asked}: {mean.score:.2%} of {mean.seeds} seeds", []


def _models_bars(tables: Tables) -> Iterator[Bar]:
    worse, vague, judged, lossy = [], [], 0, 0
    for name in SCORED:
        scores = Scores(tables.get("models", {}), name)
        for rows, ways in _parts(MODELS_ROWS):
            for row in rows:
                means = {way: scores.of(row, way) for way in ways}
                fitted, plain = means.pop("lsq"), means["magnitude" if "lamp" in ways else "l2"]
                if fitted is None:
                    continue
                judged += 1
                # The cut by l2 is another one: it is no judge of fitting.
                unfitted = {w: m for w, m in means.items() if m and w in ("same", "lamp")}
                for way, mean in unfitted.items():
                    if fitted.score < mean.score - fitted.se:
                        text = f"{fitted.score:.4f}, {mean.score:.4f} ({ways[way]})"
                        worse.append(f"{name}, {row.text}: {text}")
                if plain is None or scores.original is None or scores.keeps(plain):
                    continue
                lossy += 1
                if fitted.score - plain.score <= math.hypot(fitted.se, plain.se):
                    text = f"{fitted.score:.4f}, {plain.score:.4f} (by magnitude)"
                    vague.append(f"{name}, {row.text}: {text}")
    if judged:
        text = "recovery never worse than without by more than a standard error"
        yield not worse, f"{text}: {judged} rows", worse
        text = "better than magnitude beyond a standard error of the difference where that loses"
        yield not vague, f"{text} {LOSS_BAR:.0%}: {lossy - len(vague)} of {lossy}", vague


def _latency_bars(tables: Tables) -> Iterator[Bar]:
    known = {n: c["ratio"] for n, c in tables.get("latency", {}).items() if "ratio" in c}
    if known:
        missed = [f"{n}: {ratio[0]:.2f}x" for n, ratio in known.items() if ratio[0] < SPEED_BAR]
        yield not missed, f"{SPEED_BAR}x faster with {LATENCY_SHARE:.0%} of MACs gone", missed
        missed = [f"{n}: at most {ratio[2]:.2f}x" for n, ratio in known.items() if ratio[2] < 1]
        yield not missed, "never slower than the lossless model", missed


def _cost_bars(tables: Tables) -> Iterator[Bar]:
    cells = {k: c for k, c in tables.get("cost", {}).items() if "seconds" in c}
    if not cells:
        return
    slow = [f"{k}: {c['seconds']:.0f} s" for k, c in cells.items() if c["seconds"] > SECONDS_BAR]
    yield not slow, f"fitting takes at most {SECONDS_BAR:.0f} s", slow
    grown = []
    for name in NAMES["cost"]:
        for what in COST_SHARES:
            peaks = [cells.get(key(name, what, n), {}).get("peak") for n in COUNTS]
            if all(peaks) and max(peaks) > FLAT_BAR * min(peaks):
                told = ", ".join(f"{peak:.0f}" for peak in peaks)
                grown.append(f"{name}, {what}: {told} MB")
    text = f"peak memory of {COUNTS[-1]} samples at most {FLAT_BAR} of that of {COUNTS[0]}"
    yield not grown, text, grown


# -- the page --------------------------------------------------------------------------------------

_HEAD = """# Pruning, measured

`python benchmarks/prune.py all` measures what is missing in `benchmarks/results/prune.json` and
writes this page; "-" was not measured. {machine}: compare within a table only.
Code: {versions}.

Every model is made lossless at level 2 first. "Gone" is the share of weights, MACs or channels that
is really gone, "file" the bytes of the pruned file over those of the lossless one. A score is the
mean over seeds that draw what is fitted on, ± its standard error over these seeds, and "SE of
samples" that of one score by drawing evaluation samples again (of a share sqrt(p (1 - p) / n)).

- recovery: `importance="obs"`, `recover="lsq"`
- its zeros or its cut, unfitted: the same weights go, those that stay are the model's own
- recovery none: `importance="lamp"`, `recover="none"`, without data
- global magnitude: `importance="magnitude"`, `recover="none"`, without data
- l2, unfitted: `importance="l2"`, `recover="none"`, without data
"""


def page(tables: Tables) -> str:
    """Everything as markdown."""
    cells = [cell for part in tables.values() for cell in part.values()]
    versions = ", ".join(dict.fromkeys(cell["version"] for cell in cells if "version" in cell))
    cpu, cores = archspec.cpu.host().name, os.cpu_count()
    machine = f"{cpu}, {cores} cores that had other work to do, onnxruntime "
    machine += onnxruntime.__version__
    told = [_HEAD.format(machine=machine, versions=versions), "\n## Bars\n\n"]
    for is_met, text, missed in bars(tables):
        told.append(f"- {'met' if is_met else '**not met**'}: {text}\n")
        told += [f"  - {miss}\n" for miss in missed]
    told += _digits_page(tables)
    told += _models_page(tables)
    for name, make in (("latency", _latency), ("cost", _cost), ("file", _file)):
        told.append(f"\n## {name.capitalize()}\n\n`python benchmarks/prune.py {name}`. ")
        told.append(make(tables.get(name, {})))
    return "".join(told)


def _told(scores: Scores, rows: Sequence[Row]) -> Iterator[str]:
    metric, original = METRICS[scores.name], scores.original
    if original is None:
        yield "Not measured.\n"
        return
    n = f"{original['n']} {metric.sample}"
    score = f"{original['score']:.4f}, SE {original['se']:.4f}"
    yield f"{metric.name.capitalize()}; of the original {score}, of {n}.\n"
    for part, ways in _parts(rows):
        yield f"\n{scores.shown(part, ways)}"


def _digits_page(tables: Tables) -> Iterator[str]:
    yield "\n## Digits\n\n`python benchmarks/prune.py digits`. Fitted on 256 unlabelled training "
    yield "images. Of channels the same share goes of every group, of the last two groups (the "
    yield "last stage: one is the residual stream), or of the last two that one layer reads. "
    yield from _told(Scores(tables.get("digits", {}), CNN), DIGITS)


def _models_page(tables: Tables) -> Iterator[str]:
    yield "\n## Models\n\n`python benchmarks/prune.py models`. Fitted on a random half of the "
    yield f"calibration set. The largest step up to which all keep {1 - LOSS_BAR:.0%} of the "
    yield "original's score:\n\n"
    known = [Scores(tables.get("models", {}), name) for name in SCORED]
    known = [scores for scores in known if scores.original is not None]
    for rows, ways in _parts(MODELS_ROWS):
        lines = ([s.name, *(s.largest(rows, way) for way in ways)] for s in known)
        yield f"{table(['model', *ways.values()], lines)}\n"
    for name in SCORED:
        yield f"\n### {name}\n\n"
        yield from _told(Scores(tables.get("models", {}), name), MODELS_ROWS)


def _latency(cells: dict[str, Cell]) -> str:
    def rows() -> Iterator[list[str]]:
        for name in TIMED:
            cell = cells.get(name, {})
            if "ratio" not in cell:
                yield [name, cell.get("error", "-"), *["-"] * 4]
                continue
            middle, low, high = cell["ratio"]
            before, after = cell["ms"]
            macs, left = cell["macs"]
            size = f"{cell['bytes'][1] / cell['bytes'][0]:.2f}"
            faster = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            gone = f"{1 - left / macs:.0%}"
            yield [name, faster, f"{before:.2f} -> {after:.2f}", gone, size, cell["way"]]

    about = f"Channels worth {LATENCY_SHARE:.0%} of the MACs are asked for; the time of the "
    about += "lossless model over that of the pruned one, interleaved, 2 threads, 99 % interval; "
    about += "MACs are counted in the written files.\n\n"
    return about + table(["model", "speed", "ms", "MACs gone", "file", "way"], rows())


def _cost(cells: dict[str, Cell]) -> str:
    def rows() -> Iterator[list[str]]:
        for name in NAMES["cost"]:
            for what, share in COST_SHARES.items():
                found = [cells.get(key(name, what, count), {}) for count in COUNTS]
                times = [f"{c['seconds']:.0f}" if "seconds" in c else "-" for c in found]
                peaks = [f"{c['peak']:.0f}" if "peak" in c else "-" for c in found]
                yield [f"{name}, {share:.0%} {what}", *times, *peaks]

    about = "Fitting alone, each in a fresh process: `zeros` with all its rounds, `channels` once. "
    about += "Peak is of resident memory above that before it began; samples are given ones, again "
    about += "and again.\n\n"
    headings = [f"s, {n}" for n in COUNTS] + [f"peak MB, {n}" for n in COUNTS]
    return about + table(["samples", *headings], rows())


def _file(cells: dict[str, Cell]) -> str:
    def rows() -> Iterator[list[str]]:
        for name in NAMES["file"]:
            cell = cells.get(name, {})
            if "bytes" not in cell:
                yield [name, cell.get("error", "-"), *["-"] * 4]
                continue
            dense, sparse = cell["bytes"]
            shares = (f"{cell['gone']:.1%}", f"{cell['zeros']:.1%}")
            same = "yes" if cell["exact"] else "NO"
            yield [name, f"{dense:,}", f"{sparse:,}", f"{sparse / dense:.3f}", *shares, same]

    about = f"{FILE_SHARE:.0%} of the weights that can go are zeros (LAMP, unfitted); those of "
    about += "embeddings do not.\n\n"
    shares = ["zeros of what can go", "of all floats"]
    return about + table(["model", "dense", "sparse", "ratio", *shares, "same bits"], rows())
