"""What `low_rank.py` measured, told as tables and judged against the bars."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import archspec.cpu
import onnxruntime

from benchmarks.evaluation.scores import METRICS
from benchmarks.lossless_tables import table

CNN: Final = "digits_cnn"
SCORED: Final = ("ppocr_rec_v4", "ppocr_cls_v2", "paraphrase_minilm_l3", "nudenet_yolov8n")
TIMED: Final = (*SCORED, "ppocr_det_v4", "resnet50_ts", "vit_small_ts")
NAMES: Final = {
    "digits": (CNN,),
    "models": SCORED,
    "time": TIMED,
    "cost": ("bert_base_ts",),
    "int8": ("paraphrase_minilm_l3", "ppocr_rec_v4"),
    "order": (CNN, "ppocr_rec_v4", "ppocr_cls_v2", "paraphrase_minilm_l3"),
}
SHARES: Final = {
    "digits": (0.6, 0.4, 0.25, 0.15),
    "models": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
}
DIGITS_BARS: Final = {0.6: 0.99, 0.4: 0.985, 0.25: 0.97, 0.15: 0.80}
TIMED_SHARES: Final = (0.7, 0.5)
COST_FEEDS: Final = 4
WAYS: Final = ("low rank", "int8", "low rank and int8")
ORDERS: Final = ("channels", "low rank")  # which goes first
LOSS_BAR, SLACK_BAR, SECONDS_BAR = 0.01, 0.10, 90.0

Cell = dict[str, Any]
Tables = dict[str, dict[str, Cell]]
Bar = tuple[bool, str, list[str]]


def key(*parts: object) -> str:
    """The name of a cell."""
    return " | ".join(map(str, parts))


@dataclass(frozen=True)
class Mean:
    """A score over seeds: its standard error has a part of the seeds and one of the samples."""

    score: float
    se: float
    left: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.score:.4f}"


class Scores:
    """The cells of one model in one table."""

    def __init__(self, cells: dict[str, Cell], name: str) -> None:
        self.cells, self.name = cells, name
        self.original = cells.get(key(name, "original"))

    def of(self, share: float, way: str) -> Mean | None:
        """The mean over seeds, None where nothing was measured."""
        start = key(self.name, share, way)
        found = [c for k, c in self.cells.items() if k.startswith(start) and "score" in c]
        if not found:
            return None
        n, scores = len(found), [cell["score"] for cell in found]
        mean = sum(scores) / n
        spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n) if n > 1 else 0.0
        samples = sum(cell["se"] for cell in found) / n
        left = sum(cell["left"] for cell in found) / n
        return Mean(mean, math.hypot(spread, samples), left, n)

    def loss(self, mean: Mean) -> float:
        """The share of the original's score that is lost."""
        assert self.original is not None
        return 1 - mean.score / float(self.original["score"])

    def largest(self, shares: tuple[float, ...]) -> str:
        """The fewest MACs down to which every step keeps the score."""
        best = "none"
        for share in shares:
            mean = self.of(share, "ours")
            if mean is None or self.loss(mean) > LOSS_BAR:
                break
            best = f"{mean.left:.0%} of MACs"
        return best


# -- bars ------------------------------------------------------------------------------------------


def bars(tables: Tables) -> Iterator[Bar]:
    """Whether each bar is met, what it is, and what misses it; nothing of what is not measured."""
    digits = Scores(tables.get("digits", {}), CNN)
    for share, bar in DIGITS_BARS.items():
        if (mean := digits.of(share, "ours")) is not None:
            text = f"digits, {share:.0%} of MACs: at least {bar:.1%}"
            yield mean.score >= bar, f"{text}: {mean.score:.2%} of {mean.seeds} seeds", []
    yield from _models_bars(tables)
    yield from _time_bars(tables)
    for name, cell in tables.get("cost", {}).items():
        if "seconds" in cell:
            text = f"{name}: spectra and allocation in at most {SECONDS_BAR:.0f} s"
            yield cell["seconds"] <= SECONDS_BAR, f"{text}: {cell['seconds']:.0f} s", []
    yield from _int8_bars(tables)


def _models_bars(tables: Tables) -> Iterator[Bar]:
    worse, vague, judged, lossy = [], [], 0, 0
    for name in SCORED:
        scores = Scores(tables.get("models", {}), name)
        for share in SHARES["models"]:
            found, plain = scores.of(share, "ours"), scores.of(share, "uniform")
            if found is None or plain is None:
                continue
            judged += 1
            told = f"{name}, {share:.0%}: {found.score:.4f}, {plain.score:.4f} by uniform SVD"
            worse += [told] if found.score < plain.score - found.se else []
            if scores.loss(plain) > LOSS_BAR:
                lossy += 1
                is_clear = found.score - plain.score > math.hypot(found.se, plain.se)
                vague += [] if is_clear else [told]
    if judged:
        text = "never worse than uniform SVD by more than a standard error"
        yield not worse, f"{text}: {judged} rows", worse
        text = f"clearly better wherever that loses {LOSS_BAR:.0%}"
        yield not vague, f"{text}: {lossy - len(vague)} of {lossy}", vague


def _time_bars(tables: Tables) -> Iterator[Bar]:
    cells = {k: c for k, c in tables.get("time", {}).items() if "layers" in c}
    if not cells:
        return
    slow = [
        f"{name}: {time:.2f} of the time for {macs:.2f} of the MACs"
        for name, cell in cells.items()
        for macs, time in cell["layers"]
        if time > macs + SLACK_BAR
    ]
    count = sum(len(cell["layers"]) for cell in cells.values())
    text = f"time of a split layer at most its share of MACs + {SLACK_BAR}: {count} layers"
    yield not slow, text, slow
    kept = {name: cell["ratio"] for name, cell in cells.items() if cell["kept"]}
    missed = [f"{n}: at most {ratio[2]:.2f}x" for n, ratio in kept.items() if ratio[2] < 1]
    yield not missed, f"no model that is kept is slower: {len(kept)} of {len(cells)} kept", missed


def _int8_bars(tables: Tables) -> Iterator[Bar]:
    cells = tables.get("int8", {})
    for name in NAMES["int8"]:
        found = [cells.get(key(name, way), {}) for way in WAYS]
        if not all("ratio" in cell for cell in found):
            continue
        split, int8, both = (cell["ratio"] or 0.0 for cell in found)
        text = f"{name}: both {both:.2f}x, low rank {split:.2f}x, int8 {int8:.2f}x"
        reasons = found[2].get("reasons", {"both": found[2].get("refused", "")})
        missed = [f"{step}: {reason}" for step, reason in reasons.items()]
        yield both > max(split, int8), f"faster than either alone: {text}", missed


# -- the page --------------------------------------------------------------------------------------

_HEAD = """# Low rank, measured

`python benchmarks/low_rank.py all` measures what is missing in `benchmarks/results/low_rank.json`
and writes this page; "-" was not measured. {machine}: compare within a table only.
Code: {versions}.

Every model is made lossless at level 2 first. "Left" is the share of the model's MACs. A score of
graphopt is the mean over seeds that draw what layers are fitted on; "SE" is its standard error over
seeds and evaluation samples.

- graphopt: as `--low-rank SHARE --data ...` splits, but whatever layers take
- without data: the same without `--data`
- uniform SVD: the plain SVD of each layer at one share of its MACs, without data
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
    told.append("\n## Digits\n\n`python benchmarks/low_rank.py digits`.\n\n")
    told.append(_scores(Scores(tables.get("digits", {}), CNN), SHARES["digits"]))
    told.append("\n## Models\n\n`python benchmarks/low_rank.py models`.\n")
    for name in SCORED:
        scores = Scores(tables.get("models", {}), name)
        before = scores.original["score"] if scores.original else math.nan
        metric = METRICS[name].name
        told.append(f"\n### {name}\n\nScore ({metric}) before: {before:.4f}. ")
        told.append(f"Within 1 % of it: {scores.largest(SHARES['models'])}.\n\n")
        told.append(_scores(scores, SHARES["models"]))
    told.append(
        "\n## Time\n\n`python benchmarks/low_rank.py time`: as many layers are split as are"
    )
    told.append(" faster for it, whatever the model loses.\n\n" + _time(tables.get("time", {})))
    told.append("\n## Cost\n\n`python benchmarks/low_rank.py cost`.\n\n")
    told.append(_cost(tables.get("cost", {})))
    told.append(
        "\n## With int8\n\n`python benchmarks/low_rank.py int8`: time of the original over "
    )
    told.append("that of the result, within 1 % of the score.\n\n" + _int8(tables.get("int8", {})))
    told.append(
        "\n## Order\n\n`python benchmarks/low_rank.py order`: scores with a fifth of the MACs "
    )
    told.append("gone with channels and a quarter of the rest by splits.\n\n")
    told.append(_order(tables.get("order", {})))
    return "".join(told)


def _order(cells: dict[str, Cell]) -> str:
    def lines() -> Iterator[list[str]]:
        for name in NAMES["order"]:
            found = [cells.get(key(name, first), {}) for first in ORDERS]
            if all("score" in cell for cell in found):
                told = [f"{c['score']:.4f} ± {c['se']:.4f}, {c['left']:.0%} left" for c in found]
                yield [name, *told]

    return table(["model", *(f"{first} first" for first in ORDERS)], lines())


def _scores(scores: Scores, shares: tuple[float, ...]) -> str:
    def lines() -> Iterator[list[str]]:
        for share in shares:
            means = [scores.of(share, way) for way in ("ours", "no data", "uniform")]
            first, _, plain = means
            left = [f"{mean.left:.0%}" if mean else "-" for mean in (first, plain)]
            errors = f"{first.se:.4f}" if first else "-"
            seeds = str(first.seeds) if first else "0"
            texts = [str(mean) if mean else "-" for mean in means]
            yield [f"{share:.0%}", left[0], texts[0], errors, seeds, texts[1], texts[2], left[1]]

    headings = [
        "asked",
        "left",
        "graphopt",
        "SE",
        "seeds",
        "without data",
        "uniform SVD",
        "its left",
    ]
    return table(headings, lines())


def _time(cells: dict[str, Cell]) -> str:
    def lines() -> Iterator[list[str]]:
        for name, cell in cells.items():
            if "layers" not in cell:
                yield [name, "", "", cell.get("reason", cell.get("error", "")), ""]
                continue
            low, high = cell["ratio"][1:]
            macs = sum(m for m, _ in cell["layers"]) / max(1, len(cell["layers"]))
            time = sum(t for _, t in cell["layers"]) / max(1, len(cell["layers"]))
            layers = f"{len(cell['layers'])}, {macs:.2f} of MACs, {time:.2f} of time"
            whole = f"{cell['ratio'][0]:.2f}x ({low:.2f} to {high:.2f})"
            yield [name, f"{cell['left']:.0%}", layers, whole, ", ".join(cell["forms"])]

    return table(["model, share asked", "left", "split layers, means", "whole", "forms"], lines())


def _cost(cells: dict[str, Cell]) -> str:
    def lines() -> Iterator[list[str]]:
        for name, cell in cells.items():
            if "seconds" in cell:
                weights = f"{cell['weights'] / 1e6:.0f} M"
                yield [name, str(cell["layers"]), weights, f"{cell['seconds']:.0f} s"]

    return table(["model", "layers", "weights", "spectra and allocation"], lines())


def _int8(cells: dict[str, Cell]) -> str:
    def lines() -> Iterator[list[str]]:
        for name, cell in cells.items():
            if "ratio" in cell:
                kept = ", ".join(cell.get("kept", [])) or cell.get("refused", "")
                score = f"{cell['score']:.4f}" if "score" in cell else "-"
                left = "" if cell.get("left") is None else f"{cell['left']:.0%}"
                speed = f"{cell['ratio']:.2f}x" if cell["ratio"] else "-"
                yield [name, kept, left, score, speed]

    return table(["model, asked", "kept", "MACs left", "score", "speed"], lines())
