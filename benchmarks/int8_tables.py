"""What `int8.py` measured, told as tables and judged against the bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.evaluation.scores import METRICS
from benchmarks.int8_costs import COMMAND_MODEL, MEMORY_MODEL, MEMORY_SAMPLES
from benchmarks.int8_tools import ENTROPY, ORIGINAL, OURS, RIVALS, TOOLS
from benchmarks.lossless_tables import table

SCORE_BAR = 0.01
SPEED_BAR = 2.0
BYTES_BAR = 0.30
DOMINANT = 0.9  # the share of weights in a file from which they dominate it
MEMORY_BAR = 1.1
COMMAND_BAR = 3.0

Models = dict[str, dict[str, Any]]
Bar = tuple[bool, str, list[str]]


def score_of(model: dict[str, Any], tool: str) -> float | None:
    found: float | None = model["tools"].get(tool, {}).get("score", {}).get("score")
    return found


def speed_of(model: dict[str, Any], tool: str) -> list[float] | None:
    """time(original in onnxruntime) / time(the tool's), with its interval."""
    for part in ("latency", "openvino"):
        found: list[float] | None = model.get(part, {}).get("ratios", {}).get(tool)
        if found:
            return found
    return None


def _interval(ratio: list[float] | None, show: str) -> str:
    if not ratio:
        return ""
    middle, low, high = (format(value, show) for value in ratio)
    return f"{middle} ({low} to {high})"


def _state(cell: dict[str, Any]) -> str:
    made = cell.get("make", {})
    if not made:
        return ""
    if made.get("error"):
        return "failed"
    if made.get("refused"):
        return "refused: lossless counts"
    if cell.get("invalid"):
        return "invalid"
    return "does not run" if cell.get("score", {}).get("error") else "yes"


def model_table(model: dict[str, Any]) -> str:
    """One row for every tool on one model."""

    def rows() -> Iterator[list[str]]:
        for name in TOOLS:
            cell = model["tools"].get(name, {})
            scored = cell.get("score", {})
            score = f"{scored['score']:.4f}" if "score" in scored else ""
            size = f"{cell['bytes'] / model['bytes']:.2f}" if "bytes" in cell else ""
            if precision := scored.get("precision"):
                name += f" ({precision})"
            speed = _interval(speed_of(model, name.split(" ")[0]), ".2f")
            drop = _interval(scored.get("drop"), "+.4f")
            yield [name, score, drop, _state(cell), size, speed]

    return table(["", "score", "drop (95 %)", "valid", "bytes", "speed (99 %)"], rows())


def summary_table(models: Models) -> str:
    """Score and speed of every tool on every model, as one table."""

    def show(model: dict[str, Any], tool: str) -> str:
        cell = model["tools"].get(tool, {})
        if tool != ORIGINAL and (state := _state(cell)) in ("failed", "invalid", "does not run"):
            return state
        score, speed = score_of(model, tool), speed_of(model, tool)
        found = "" if score is None else f"{score:.3f}"
        found += f", {speed[0]:.2f}x" if speed else ""
        return found + (" (refused)" if cell.get("make", {}).get("refused") else "")

    rows = ([name, *(show(model, tool) for tool in TOOLS)] for name, model in models.items())
    return table(["model", *TOOLS], rows)


def memory_table(models: Models) -> str:
    """Peak memory of the tools that calibrate; one that failed had taken as much until then."""
    found = models.get(MEMORY_MODEL, {}).get("memory", {})

    def show(cell: dict[str, Any]) -> str:
        return "" if not cell else f"{cell['peak_bytes'] / 1e6:.0f}{cell['error'] and ' failed'}"

    rows = (
        [tool, *(show(cell.get(str(count), {})) for count in MEMORY_SAMPLES)]
        for tool, cell in found.items()
    )
    return table(["", *(f"{count} samples" for count in MEMORY_SAMPLES)], rows)


def failures(models: Models) -> Iterator[str]:
    """One line for every tool that has no valid file of a model, with the reason."""
    for name, model in models.items():
        for tool in TOOLS:
            cell = model["tools"].get(tool, {})
            made = cell.get("make", {})
            reason = made.get("error") or made.get("refused") or cell.get("invalid")
            if reason := reason or cell.get("score", {}).get("error"):
                yield f"{name}, {tool}: {_state(cell)}: {reason}"


def bars(models: Models) -> Iterator[Bar]:
    """Whether each bar is met, what it is, and what misses it."""
    yield from _each(
        models, f"score within {SCORE_BAR:.0%} of fp32", lambda model: _score_miss(model)
    )
    yield from _each(models, "never slower than the lossless file", _lossless_miss)
    for rival in RIVALS:
        yield from _each(
            models, f"faster than {rival} at an equal or better score", _rival_miss(rival)
        )
    real = [model for name, model in models.items() if not name.startswith("digits_")]
    speeds = [speed[0] for model in real if (speed := speed_of(model, OURS))]
    if speeds:
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        text = f"{SPEED_BAR}x the original's speed, geometric mean of {len(speeds)} models"
        yield mean >= SPEED_BAR, f"{text}: {mean:.2f}x", []
    heavy = {n: m for n, m in models.items() if m.get("weights", 0) >= DOMINANT}
    yield from _each(
        heavy, f"at most {BYTES_BAR} of the bytes where weights are {DOMINANT:.0%}", _bytes_miss
    )
    yield from _cost_bars(models)


def _each(models: Models, text: str, miss: Callable[[dict[str, Any]], str | None]) -> Iterator[Bar]:
    """A bar that every model has to meet; `miss` is "" for met, None where nothing is known."""
    judged = {name: miss(model) for name, model in models.items()}
    known = {name: reason for name, reason in judged.items() if reason is not None}
    missed = [f"{name}: {reason}" for name, reason in known.items() if reason]
    if known:
        yield not missed, f"{text}: {len(known) - len(missed)} of {len(known)}", missed


def _score_miss(model: dict[str, Any]) -> str | None:
    reference, ours = score_of(model, ORIGINAL), score_of(model, OURS)
    if reference is None or not (state := _state(model["tools"].get(OURS, {}))):
        return None
    if ours is None:
        return f"not scored ({state})"
    return "" if ours >= (1 - SCORE_BAR) * reference else f"{ours:.4f}, fp32 {reference:.4f}"


def _lossless_miss(model: dict[str, Any]) -> str | None:
    found = model.get("latency", {})
    if OURS not in found.get("ratios", {}):
        return None
    ratio = found.get("to_lossless")
    return "" if not ratio or ratio[2] >= 1 else f"{_interval(ratio, '.3f')} of its speed"


def _rival_miss(rival: str) -> Callable[[dict[str, Any]], str | None]:
    def miss(model: dict[str, Any]) -> str | None:
        ours, theirs = speed_of(model, OURS), speed_of(model, rival)
        if not ours or not theirs:
            return None
        reasons = []
        scored = model["tools"][rival].get("score", {})
        if ours[0] <= theirs[0]:
            at = f" at {scored['score']:.3f}" if "score" in scored else ""
            reasons.append(f"{ours[0]:.2f}x, theirs {theirs[0]:.2f}x{at}")
        # An interval that holds 0 cannot tell two scores apart; and nobody is worse for keeping
        # fp32's score where a fault happens to raise it.
        lost = model["tools"][OURS].get("score", {}).get("drop", [0.0, 0.0, 0.0])
        below = scored.get("below_ours", [0.0, 0.0, 0.0])
        if below[2] < 0 < lost[1]:
            reasons.append(f"theirs scores {-below[0]:.4f} more")
        return "; ".join(reasons)

    return miss


def _bytes_miss(model: dict[str, Any]) -> str | None:
    cell = model["tools"].get(OURS, {})
    if "bytes" not in cell:
        return None
    share = cell["bytes"] / model["bytes"]
    return "" if share <= BYTES_BAR else f"{share:.2f}"


def _cost_bars(models: Models) -> Iterator[Bar]:
    found = models.get(MEMORY_MODEL, {}).get("memory", {}).get(OURS, {})
    counts = [str(count) for count in MEMORY_SAMPLES]
    if all(found.get(count, {}).get("peak_bytes") for count in counts):
        few, many = (found[count]["peak_bytes"] for count in (counts[0], counts[-1]))
        text = f"memory at {counts[-1]} samples at most {MEMORY_BAR} of that at {counts[0]}"
        yield many <= MEMORY_BAR * few, f"{text}: {many / few:.2f}", []
    seconds = models.get(COMMAND_MODEL, {}).get("command", {}).get("seconds", {})
    if OURS in seconds and ENTROPY.name in seconds:
        ratio = seconds[OURS] / seconds[ENTROPY.name]
        text = f"the whole command at most {COMMAND_BAR}x onnxruntime's with entropy calibration"
        told = f"{ratio:.2f}x, {seconds[OURS]:.0f} s against {seconds[ENTROPY.name]:.0f} s"
        yield ratio <= COMMAND_BAR, f"{text}: {told}", []


_HEAD = """# int8: graphopt and its peers

`python benchmarks/int8.py --markdown docs/int8.md` measures what is missing in
`benchmarks/results/int8.json` and writes this page. Every run is a fresh process.

Speed is the time of the original in onnxruntime over that of the file, at 2 threads on one sample:
files that onnxruntime runs in one interleaved measurement, OpenVINO's in alternation with it. In
brackets is the precision in which OpenVINO says that it computes floats; `openvino` is what it
chooses itself. A file is valid if onnxruntime loads and runs it with the inputs and outputs of the
original. The drop is from fp32, its interval a paired bootstrap over the samples.

- `lossless` is graphopt's file without int8, `graphopt` that of `{options}`; where that refuses,
  the lossless file counts
- `ort-default` is `quantize_static` as it comes
- `ort-u8s8` is `quantize_static` with u8 activations and s8 weights per channel, after
  `quant_pre_process` (without symbolic shapes where those fail, at opset 13 where it is older)
- `ort-dynamic` is `quantize_dynamic` with s8 weights per channel, after `quant_pre_process` where
  it fails without
- `nncf` is NNCF's ONNX backend at opset 13 or newer, `nncf-prepared` the same after
  `quant_pre_process`; `openvino-int8` is NNCF's OpenVINO backend
"""


def page(models: Models, options: str) -> str:
    """Everything as markdown; parts that were not measured are left out."""
    told = [_HEAD.format(options=options), "\n## Bars\n\n"]
    for is_met, text, missed in bars(models):
        told.append(f"- {'met' if is_met else '**not met**'}: {text}\n")
        told += [f"  - {miss}\n" for miss in missed]
    told.append(f"\n## Score and speed\n\n{summary_table(models)}")
    for name, model in models.items():
        n = model["tools"].get(ORIGINAL, {}).get("score", {}).get("n")
        metric = METRICS[name]
        of = f" of {n} {metric.sample}" if n else ""
        told.append(f"\n## {name}: {metric.name}{of}\n\n{model_table(model)}")
    if MEMORY_MODEL in models and "memory" in models[MEMORY_MODEL]:
        told.append(f"\n## Peak megabytes on {MEMORY_MODEL}\n\n{memory_table(models)}")
    if wrong := [f"- {line}\n" for line in failures(models)]:
        told.append("\n## Files that are missing or do not run\n\n" + "".join(wrong))
    return "".join(told)
