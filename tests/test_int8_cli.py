"""Int8 on the command line: one screen, exit codes, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from graphopt import cli
from graphopt.int8_report import Int8Record, RegionRecord
from graphopt.render.int8 import show_int8, show_sensitivity
from graphopt.report import Report, host
from graphopt.sensitivity import BlockRecord, SensitivityRecord
from tests.int8_runs import DATA, DIGITS, FEEDS, decide

CNN, MLP = DIGITS / "cnn.onnx", DIGITS / "mlp.onnx"


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 2.0)


def optimize(source: Path, output: Path, *arguments: object) -> Result:
    given = ["optimize", source, output, "--target", "ort-cpu", "--data", DATA, *arguments]
    return CliRunner().invoke(cli.app, [str(argument) for argument in given])


def flat(result: str) -> str:
    return " ".join(result.split())


# -- optimize --------------------------------------------------------------------------------------


def test_the_screen_says_what_was_kept_and_why(tmp_path: Path) -> None:
    out, decisions = tmp_path / "out.onnx", tmp_path / "d.json"
    result = optimize(CNN, out, "--int8", "static", "--decisions", decisions)
    assert (result.exit_code, result.stderr) == (0, "")
    screen = flat(result.stdout)
    assert "int8 kept: all on integers; the fastest candidate that is good enough" in screen
    assert "compared agreement " in screen
    assert "lost of 0.0100 that may be" in screen
    assert (
        "speed 2.00x (1.98-2.02) against the lossless model, 2.50x against the original; 1.25 ms "
        "-> 1.00 ms -> 0.500 ms"
    ) in screen
    assert f"calibrated on {FEEDS} feeds" in screen
    assert "region operators as before after SQNR" in screen
    assert "logits 11 Conv, 10 Relu, 4 Add, 3 others int8" in screen
    assert "lossless proved" in screen
    assert "decisions in /" in screen
    assert "written" in screen
    assert "parameters" not in screen
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines if not line.startswith("written")) <= 80
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.json", "out.onnx"]


def test_a_replay_on_the_screen(tmp_path: Path) -> None:
    first, second, decisions = (tmp_path / name for name in ("a.onnx", "b.onnx", "d.json"))
    assert optimize(MLP, first, "--int8", "dynamic", "--decisions", decisions).exit_code == 0
    result = optimize(MLP, second, "--replay", decisions)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "int8 replayed: dynamic; decided by graphopt" in flat(result.stdout)
    assert first.read_bytes() == second.read_bytes()
    result = optimize(CNN, second, "--replay", decisions)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: decisions {decisions}: made for another model")
    assert result.stderr.count("\n") == 1


def test_json_is_the_report(tmp_path: Path) -> None:
    saved = tmp_path / "r.json"
    result = optimize(
        MLP, tmp_path / "out.onnx", "--int8", "auto", "--json", "--report", saved, "--threads", 1
    )
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.model_validate_json(result.stdout)
    assert report == Report.model_validate_json(saved.read_text())
    assert report.int8 is not None
    assert report.int8.kept


def test_a_refusal_shows_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 0.5)
    out, saved = tmp_path / "out.onnx", tmp_path / "r.json"
    result = optimize(CNN, out, "--int8", "auto", "--report", saved)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: nothing written: int8 is not faster than the best lossless model here: 0.50x "
        "(0.49 to 0.51); --force writes the fastest good one all the same\n"
    )
    screen = flat(result.stdout)
    assert "int8 nothing kept: int8 is not faster than the best lossless model here" in screen
    assert "candidate compared good size to lossless" in screen
    assert "all on integers" in screen
    assert not out.exists()
    report = Report.model_validate_json(saved.read_text())
    assert report.int8 is not None
    assert not report.int8.kept

    result = optimize(CNN, out, "--int8", "auto", "--force")
    assert (result.exit_code, result.stderr) == (0, "")
    screen = flat(result.stdout)
    assert "int8 forced: all on integers; int8 is not faster" in screen
    assert "warning forced: int8 is not faster than the best lossless model here" in screen
    assert out.exists()


def test_a_refusal_as_json_keeps_stdout_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide(monkeypatch, 0.5)
    result = optimize(MLP, tmp_path / "out.onnx", "--int8", "dynamic", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: nothing written: int8 is not faster")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--int8", "static", "--metric", "m"], "metric m: write it as file.py:function"),
        (
            ["--force"],
            "force: it is for lossy steps; ask for one: int8='auto' (--int8 auto), or "
            "sparsity, nm, threshold, channels, low-rank or codebook",
        ),
        (["--int8", "auto", "--target", "portable"], "int8 is made for onnxruntime's CPU provider"),
        (["--int8", "auto", "--max-drop", "-1"], "max-drop -1.0: it is 0 or more"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = optimize(MLP, tmp_path / "out.onnx", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# The search says that it runs, then waits for the signal; everything is staged by then.
SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what shells put behind
import sys, time
from graphopt.compress import Compression
def wait(*_, **__):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
Compression.run = wait
from graphopt.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interruption_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    arguments = ["optimize", MLP, tmp_path / "out.onnx", "--target", "ort-cpu"]
    arguments += ["--int8", "auto", "--data", DATA, "--decisions", tmp_path / "d.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert list(scratch.glob("graphopt*")) == []


# -- the table of regions --------------------------------------------------------------------------


def drawn(draw: Any, record: Any) -> str:
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    draw(record, Console(file=stream, width=80))
    return stream.getvalue()


def region(root: str, operators: str, precision: Any = "int8", **fields: Any) -> RegionRecord:
    nodes = sum(int(part.split()[0]) for part in operators.split(", "))
    content = {"why": "cheaper on integers", "nodes": nodes, **fields}
    return RegionRecord(root=root, operators=operators, precision=precision, **content)


def test_many_regions_fit_one_screen() -> None:
    static = [
        region(f"r{place:02}", "2 Conv, 1 Add", ms_before=1.0 + place, ms_after=0.5, sqnr_db=30.0)
        for place in range(40)
    ]
    products = [region(f"p{n}", "1 MatMul", "dynamic int8", ms_before=2.0) for n in range(30)]
    left = [
        region("", f"{n} Softmax", "float", why=f"reason {n}", ms_before=1.0) for n in range(1, 10)
    ]
    record = Int8Record(
        mode="auto",
        kept=True,
        candidate="c",
        reason="r",
        max_drop=0.01,
        bytes_original=1,
        bytes_lossless=1,
        regions=[*static, *products, *left],
    )
    shown = drawn(show_int8, record)
    rows = [line.split() for line in shown.splitlines()]
    assert rows[2][:2] == ["30", "alike"]  # 60 ms together: first
    assert rows[2][-2:] == ["60.0", "ms"]
    assert rows[3][0] == "r39"
    assert rows[2 + 12][:6] == ["29", "more", "58", "Conv,", "29", "Add"]
    assert rows[2 + 13][:5] == ["the", "rest", "45", "Softmax", "float"]
    assert [" ".join(row) for row in rows if row[:1] == ["in"]] == [
        *(f"in floats reason {n}: {n} Softmax" for n in range(9, 3, -1)),
        "in floats for other reasons: 6 operators",
    ]
    assert len(rows) <= 30
    assert max(map(len, shown.splitlines())) <= 80


# -- sensitivity -----------------------------------------------------------------------------------


def test_sensitivity_lists_blocks() -> None:
    arguments = ["sensitivity", str(CNN), "--data", DATA, "--threads", "1"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    found = SensitivityRecord.model_validate_json(result.stdout)
    assert found.opset == 17
    assert len(found.blocks) == 12
    assert [b.noise for b in found.blocks] == sorted((b.noise for b in found.blocks), reverse=True)
    assert all(block.sqnr_db is not None and block.sqnr_db > 20 for block in found.blocks)
    assert "Gemm" in {block.operators for block in found.blocks}
    assert json.loads(result.stdout)["schema_version"] == 1


def test_sensitivity_on_the_screen() -> None:
    block = BlockRecord(root="y", operators="Conv", noise=1e-3, sqnr_db=31.0, gain_ms=-0.5)
    record = SensitivityRecord(
        host=host(),
        model={"path": "folder/m.onnx", "bytes": 3},  # type: ignore[arg-type]
        opset=17,
        threads=1,
        blocks=[block.model_copy(update={"root": f"y{n}"}) for n in range(25)],
        seconds=1.0,
    )
    shown = drawn(show_sensitivity, record)
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0] == ["m.onnx", "opset", "17"]
    assert ["y0", "Conv", "1.0e-03", "31", "dB", "-0.500", "ms"] in rows
    assert ["5", "more", "5.0e-03", "-2.50", "ms"] in rows
    empty = drawn(show_sensitivity, record.model_copy(update={"blocks": []}))
    assert "there is nothing in it that can be static int8" in empty


def test_sensitivity_needs_data() -> None:
    result = CliRunner().invoke(cli.app, ["sensitivity", str(MLP)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: sensitivity has to be measured on data: --data with some inputs\n"
    )
