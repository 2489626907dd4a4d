"""Optimise every real model, digits model and architecture, and tabulate what came out.

    python benchmarks/optimize_all.py [--models NAME ...] [--level N] [--markdown FILE]

Models of the catalogue are fetched, architectures filled, once, into the cache. Each runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from graphopt.report import Report
from models import digits, fetch

ONE = """
import resource, sys
from graphopt.cli import main
try:
    main()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak * 1024, file=sys.stderr)
"""


@dataclass(frozen=True)
class Row:
    """One model's outcome."""

    name: str
    code: int
    report: Report | None
    peak_bytes: int
    message: str

    def cells(self) -> list[str]:
        if self.report is None:
            return [self.name, *[""] * 8, f"exit {self.code}: {self.message}"]
        proof = self.report.validation
        nodes = f"{self.report.before.nodes} -> {self.report.after.nodes}"
        return [
            self.name,
            nodes,
            f"{self.report.source.bytes / 1e6:.1f}",
            f"{self.report.target.bytes / 1e6:.1f}" if self.report.target else "",
            f"{proof.noise:.1e}",
            f"{proof.error:.1e}",
            f"{sum(o.feeds for o in proof.outputs)}/{len(proof.feeds) * len(proof.outputs)}",
            f"{self.report.seconds:.1f}",
            f"{self.peak_bytes / 1e6:.0f}",
            proof.verdict,
        ]


HEADINGS = ["model", "nodes", "MB", "MB-out", "noise", "error"]
HEADINGS += ["proving", "s", "peak-MB", "verdict"]


def sources(wanted: list[str]) -> dict[str, Path]:
    """Models by name: those wanted, by default all."""
    every = [*fetch.names(), *digits.FLOORS, *fetch.architectures()]
    found = {}
    for name in wanted or every:
        if name in digits.FLOORS:
            found[f"digits_{name}"] = digits.path(name)
        else:
            is_real = name in fetch.names()
            found[name] = fetch.fetch(name) if is_real else fetch.architecture(name)
    return found


def optimize(name: str, path: Path, level: int) -> Row:
    """Run the command as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        output, report = Path(folder) / "out.onnx", Path(folder) / "report.json"
        call = ["optimize", str(path), str(output), "--level", str(level), "--report", str(report)]
        run = subprocess.run([sys.executable, "-c", ONE, *call], capture_output=True, text=True)
        lines = run.stderr.strip().splitlines()
        parsed = Report.model_validate(json.loads(report.read_text())) if report.exists() else None
        return Row(name, run.returncode, parsed, int(lines[-1]), " ".join(lines[:-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    models = sources(arguments.models)
    rows = [
        optimize(name, path, arguments.level)
        for name, path in track(models.items(), "optimising", console=Console(stderr=True))
    ]
    table = Table(box=None)
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(*row.cells())
    Console(width=120).print(table)
    if arguments.markdown:
        lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
        text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        arguments.markdown.write_text(text)
    return int(any(row.code for row in rows))


if __name__ == "__main__":
    sys.exit(main())
