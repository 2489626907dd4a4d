"""Write the generated pages of this folder, or check that they are current.

python docs/generate.py [--check]
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from graphopt.passes.pipelines import LEVELS, PASSES
from graphopt.report import Report

HERE = Path(__file__).parent
COMMANDS = (
    "",
    "optimize",
    "validate",
    "inspect",
    "bench",
    "sensitivity",
    "ranks",
    "explain",
    "passes",
    "densify",
)


def commands() -> str:
    """Every command's help, at a fixed width."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    parts = ["# Commands", "Made by `python docs/generate.py` from the commands themselves."]
    for name in COMMANDS:
        call = [sys.executable, "-m", "graphopt", *filter(None, [name]), "--help"]
        text = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
        lines = "\n".join(line.rstrip() for line in text.stdout.strip().splitlines())
        parts.append(f"## {f'graphopt {name}'.strip()}\n\n```text\n{lines}\n```")
    return "\n\n".join(parts) + "\n"


def passes() -> str:
    """Every pass with its options, every level with its pipeline."""
    parts = ["# Passes", "Made by `python docs/generate.py` from the passes themselves."]
    for name, kind in PASSES.items():
        options = [
            f"`{field.name}` (default `{field.default!r}`)"
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]
        ]
        stated = f"\n\nOptions: {', '.join(options)}" if options else ""
        parts.append(f"## {name}\n\n{inspect.getdoc(kind)}{stated}")
    rows = "\n".join(f"| {level} | {text or 'round trip'} |" for level, text in LEVELS.items())
    parts.append(f"## Levels\n\n| level | pipeline |\n| --- | --- |\n{rows}")
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """File name to content."""
    schema = json.dumps(Report.model_json_schema(mode="serialization"), indent=1) + "\n"
    return {"commands.md": commands(), "passes.md": passes(), "report.schema.json": schema}


def main(check: bool) -> int:
    """Write the pages, or with `check` name those that are not current; the exit code."""
    stale = [n for n, text in pages().items() if not _equal(HERE / n, text)]
    if check:
        for name in stale:
            print(f"docs/{name} is not current: run python docs/generate.py")
        return bool(stale)
    for name in stale:
        (HERE / name).write_text(pages()[name])
    return 0


def _equal(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
