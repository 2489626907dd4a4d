"""What `lossless.py` measured: kept as JSON, told as tables, judged against the bars."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OURS = "graphopt"
RIVALS = ("onnxsim", "onnxslim", "onnxscript", "onnxoptimizer", "ort-basic")
"""The peers that set bars. ort-extended does not: nearly all its results have foreign operators."""
TOOLS = (*RIVALS, "ort-extended", OURS)
BYTES_BAR = 1.02
TIME_BARS = {"onnxslim": 0.5, "onnxsim": 0.7}

Cell = dict[str, Any]


class Results:
    """Measured cells by model and tool, in a file that is written after every step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def start(self, name: str, sha256: str) -> dict[str, Any]:
        """The model's record, empty where the model is another one than before."""
        if self.models.get(name, {}).get("sha256") != sha256:
            self.models[name] = {"sha256": sha256, "tools": {}}
        return self.models[name]

    def model(self, name: str) -> dict[str, Any]:
        return self.models[name]

    def cell(self, name: str, tool: str) -> Cell:
        found: Cell = self.models[name]["tools"].setdefault(tool, {})
        return found

    def save(self) -> None:
        lines = (f"{json.dumps(n)}: {json.dumps(m)}" for n, m in self.models.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        draft.replace(self.path)


def is_valid(cell: Cell) -> bool:
    """The tool wrote a model that was proved equal to the original."""
    return bool(cell.get("proof", {}).get("verdict") == "proved")


def least(model: dict[str, Any], what: str) -> tuple[int, str] | None:
    """The smallest number of nodes or bytes among the valid results of rivals, and whose."""
    cells = ((name, model["tools"].get(name, {})) for name in RIVALS)
    return min(((cell[what], name) for name, cell in cells if is_valid(cell)), default=None)


def table(headings: list[str], rows: Iterator[list[str]]) -> str:
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def nodes_table(models: dict[str, dict[str, Any]]) -> str:
    """Nodes of every tool's result, and what ours is above the least valid one."""
    rows = (
        [
            name,
            str(model["nodes"]),
            *(_count(model["tools"].get(tool, {}), "nodes") for tool in TOOLS),
            _difference(model),
        ]
        for name, model in models.items()
    )
    return table(["model", "original", *TOOLS, "to the least"], rows)


def _count(cell: Cell, what: str, show: Callable[[int], str] = str) -> str:
    if "run" not in cell:
        return ""
    if what not in cell:
        return "failed"
    verdict = cell.get("proof", {}).get("verdict", "unchecked")
    mark = {"proved": "", "failed": " wrong", "unproven": " ?", "unchecked": " -"}[verdict]
    return show(cell[what]) + mark + (" foreign" if cell.get("foreign") else "")


def _difference(model: dict[str, Any]) -> str:
    ours, best = model["tools"].get(OURS, {}), least(model, "nodes")
    return f"{ours['nodes'] - best[0]:+d}" if best and "nodes" in ours else ""


def bytes_table(models: dict[str, dict[str, Any]]) -> str:
    """Megabytes of every tool's result."""

    def show(count: int) -> str:
        return f"{count / 1e6:.2f}"

    rows = (
        [
            name,
            show(model["bytes"]),
            *(_count(model["tools"].get(tool, {}), "bytes", show) for tool in TOOLS),
        ]
        for name, model in models.items()
    )
    return table(["model", "original", *TOOLS], rows)


def runs_table(models: dict[str, dict[str, Any]], run: str, what: str, unit: float = 1.0) -> str:
    """Seconds or peak memory of every tool, in process (`run`) or as a `command`."""

    def show(cell: Cell) -> str:
        found = cell.get(run, {})
        return "" if not found else "failed" if found["error"] else f"{found[what] / unit:.3g}"

    rows = (
        [name, *(show(model["tools"].get(tool, {})) for tool in TOOLS)]
        for name, model in models.items()
        if any(run in cell for cell in model["tools"].values())
    )
    return table(["model", *TOOLS], rows)


def times_table(models: dict[str, dict[str, Any]]) -> str:
    """Median seconds in process, wall and CPU, of runs that took turns."""
    tools = [OURS, *TIME_BARS]

    def cells(timed: dict[str, Any]) -> Iterator[str]:
        for tool in tools:
            if found := timed.get(tool):
                yield f"{found['seconds']:.3f} / {found['cpu_seconds']:.3f}"
            else:
                yield "failed"
        for tool in TIME_BARS:
            ratio = _time_ratio(timed, tool, "seconds")
            yield f"{ratio:.2f}" if ratio else ""

    rows = ([n, *cells(m["times"]["tools"])] for n, m in models.items() if "times" in m)
    return table(["model", *tools, *(f"to {tool}" for tool in TIME_BARS)], rows)


def _time_ratio(timed: dict[str, Any], tool: str, what: str) -> float | None:
    if OURS not in timed or tool not in timed:
        return None
    return float(timed[OURS][what] / timed[tool][what])


def latency_table(models: dict[str, dict[str, Any]]) -> str:
    """Speed of valid results over the original, above 1 is faster; the interval of ours."""

    def cells(found: dict[str, Any]) -> Iterator[str]:
        for tool in TOOLS[:-1]:
            yield f"{found['ratios'][tool][0]:.3f}" if tool in found["ratios"] else ""
        yield _interval(found["ratios"].get(OURS))
        yield f"{_interval(found['against_best'])} of {found['best']}" if "best" in found else ""

    rows = ([n, *cells(m["latency"])] for n, m in models.items() if "latency" in m)
    return table(["model", *TOOLS, "ours to the best peer's"], rows)


def _interval(ratio: list[float] | None) -> str:
    return f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})" if ratio else ""


def failures(models: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each result that does not count, with the reason."""
    for name, model in models.items():
        for tool in TOOLS:
            cell = model["tools"].get(tool, {})
            proof = cell.get("proof", {})
            if error := cell.get("run", {}).get("error"):
                yield f"{name}, {tool}: {error}"
            elif proof and proof["verdict"] != "proved":
                yield f"{name}, {tool}: {proof['verdict']}: {proof['reason']}"


def bars(models: dict[str, dict[str, Any]]) -> Iterator[tuple[bool, str, list[str]]]:
    """Whether each bar is met, what it is, and the models that miss it."""
    for what, factor in (("nodes", 1.0), ("bytes", BYTES_BAR)):
        compared, missed = 0, []
        for name, model in models.items():
            ours, best = model["tools"].get(OURS, {}), least(model, what)
            if best is None or what not in ours:
                continue
            compared += 1
            if not is_valid(ours) or ours[what] > factor * best[0]:
                with_foreign = " with foreign operators" if _is_foreign(model, best[1]) else ""
                missed.append(
                    f"{name} ({ours[what]:,} against {best[0]:,} of {best[1]}{with_foreign})"
                )
        if compared:
            limit = "the least" if factor == 1 else f"{factor} x the least"
            text = f"{what} at most {limit} of valid peers: {compared - len(missed)} of {compared}"
            yield not missed, text, missed
    for tool, bar in TIME_BARS.items():
        means = [_mean_ratio(models, tool, what) for what in ("seconds", "cpu_seconds")]
        if means[0]:
            text = f"in-process time, geometric mean, {means[0]:.2f} x {tool} (bar {bar})"
            yield means[0] <= bar, f"{text}, of CPU {means[1]:.2f} x", []


def _is_foreign(model: dict[str, Any], tool: str) -> bool:
    return bool(model["tools"][tool].get("foreign"))


def _mean_ratio(models: dict[str, dict[str, Any]], tool: str, what: str) -> float:
    timed = (model["times"]["tools"] for model in models.values() if "times" in model)
    logs = [math.log(ratio) for found in timed if (ratio := _time_ratio(found, tool, what))]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


_HEAD = """# Lossless optimisation: graphopt and its peers

`python benchmarks/lossless.py --markdown docs/lossless.md` measures what is missing in
`benchmarks/results/lossless.json` and writes this page. Every run is a fresh process.

Marks: "wrong" failed graphopt's comparison with the original, "?" could not be proved, "-" was not
compared, "failed" gave no model; "foreign" has nodes whose operators are not ONNX's own, so that
only onnxruntime runs it. Only proved results set a bar; ort-extended sets none, since it is foreign
nearly always.
"""


def page(models: dict[str, dict[str, Any]]) -> str:
    """Everything as markdown; parts that were not measured are left out."""
    parts = [("Nodes", nodes_table(models)), ("Megabytes", bytes_table(models))]
    parts += [("Seconds in process (wall / CPU, medians of turns)", times_table(models))]
    parts += [
        (title, runs_table(models, run, what, unit))
        for title, run, what, unit in (
            ("Seconds in process, one run, imports not counted", "run", "seconds", 1),
            ("Peak megabytes in process, imports included", "run", "peak_bytes", 1e6),
            ("Seconds of the command (graphopt's validates)", "command", "seconds", 1),
            ("Peak megabytes of the command (graphopt's validates)", "command", "peak_bytes", 1e6),
        )
    ]
    parts += [("Speed in onnxruntime, original = 1", latency_table(models))]
    told = [f"\n## {title}\n\n{text}" for title, text in parts if text.count("\n") > 2]
    summary = []
    for is_met, text, missed in bars(models):
        summary.append(f"- {'met' if is_met else '**not met**'}: {text}\n")
        summary += [f"  - {miss}\n" for miss in missed]
    wrong = [f"- {line}\n" for line in failures(models)]
    if summary:
        told.insert(0, "\n## Bars\n\n" + "".join(summary))
    if wrong:
        told.append("\n## Results that do not count\n\n" + "".join(wrong))
    return _HEAD + "".join(told)
