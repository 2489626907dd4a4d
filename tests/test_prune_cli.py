"""Pruning on the command line: one screen, exit codes, and nothing left behind."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from graphopt import cli
from graphopt.prune_report import NO_SPEED, PrunedGroup, PrunedLayer, PruneRecord
from graphopt.render.prune import show_prune
from graphopt.report import Report
from tests.prune_runs import DATA, DIGITS, FEEDS, decide

CNN, MLP = DIGITS / "cnn.onnx", DIGITS / "mlp.onnx"


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 2.0)


def optimize(source: Path, output: Path, *arguments: object) -> Result:
    given = ["optimize", source, output, "--data", DATA, *arguments]
    return CliRunner().invoke(cli.app, [str(argument) for argument in given])


def flat(result: str) -> str:
    return " ".join(result.split())


def test_the_screen_says_what_zeros_gained(tmp_path: Path) -> None:
    out, decisions = tmp_path / "out.onnx", tmp_path / "d.json"
    result = optimize(MLP, out, "--sparsity", "0.7", "--decisions", decisions)
    assert (result.exit_code, result.stderr) == (0, "")
    screen = flat(result.stdout)
    assert "prune kept: 70% zeros; it is smaller" in screen
    assert "compared agreement " in screen
    assert "lost of 0.0100 that may be" in screen
    assert "against the lossless model" in screen
    assert f"fitted on {FEEDS - 1} feeds, by lsq; compared on others" in screen
    assert f"note {NO_SPEED}" in screen
    assert "layer kept error fitted bytes bytes after" in screen
    assert "lossless proved" in screen
    assert "decisions in /" in screen
    assert "written" in screen
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines if not line.startswith("written")) <= 80
    assert sorted(f.name for f in tmp_path.iterdir()) == ["d.json", "d.json.npz", "out.onnx"]


def test_the_screen_says_what_channels_gained(tmp_path: Path) -> None:
    result = optimize(MLP, tmp_path / "out.onnx", "--channels", "0.3")
    assert (result.exit_code, result.stderr) == (0, "")
    screen = flat(result.stdout)
    assert "% of MACs less; it is faster" in screen
    assert (
        "speed 2.00x (1.98-2.02) against the lossless model, 2.50x against the original; "
    ) in screen
    assert "of MACs are gone; 1.25 ms -> 1.00 ms -> 0.500 ms" in screen
    assert "channels remove " in screen
    assert "layer kept error fitted ms ms after" in screen
    assert NO_SPEED not in screen


def test_a_replay_on_the_screen(tmp_path: Path) -> None:
    first, second, decisions = (tmp_path / name for name in ("a.onnx", "b.onnx", "d.json"))
    assert optimize(MLP, first, "--nm", "2:4", "--decisions", decisions).exit_code == 0
    result = optimize(MLP, second, "--replay", decisions)
    assert (result.exit_code, result.stderr) == (0, "")
    screen = flat(result.stdout)
    assert "prune replayed: 2 of 4 weights; as it was decided" in screen
    assert f"note {NO_SPEED}" in screen
    assert "decisions read from /" in screen
    assert first.read_bytes() == second.read_bytes()
    result = optimize(CNN, second, "--replay", decisions)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: decisions {decisions}: made for another model")
    assert result.stderr.count("\n") == 1


def test_json_is_the_report(tmp_path: Path) -> None:
    saved = tmp_path / "r.json"
    arguments = ["--sparsity", "0.5", "--block", "4x1", "--importance", "magnitude"]
    result = optimize(MLP, tmp_path / "o.onnx", *arguments, "--json", "--report", saved)
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.model_validate_json(result.stdout)
    assert report == Report.model_validate_json(saved.read_text())
    assert report.prune is not None
    assert report.prune.candidate == "50% zeros in blocks of 4x1"
    assert report.prune.importance == "magnitude"


def test_a_refusal_shows_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 0.5)
    out, saved = tmp_path / "out.onnx", tmp_path / "r.json"
    result = optimize(MLP, out, "--channels", "0.3", "--report", saved)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: nothing written: it is not faster than the best lossless model here: 0.50x "
        "(0.49 to 0.51); --force writes the fastest good one all the same\n"
    )
    assert "prune nothing kept: it is not faster than the best lossless" in flat(result.stdout)
    assert not out.exists()
    report = Report.model_validate_json(saved.read_text())
    assert report.prune is not None
    assert not report.prune.kept

    result = optimize(MLP, out, "--channels", "0.3", "--force")
    assert (result.exit_code, result.stderr) == (0, "")
    screen = flat(result.stdout)
    assert "prune forced: " in screen
    assert "warning forced: it is not faster than the best lossless model here" in screen
    assert out.exists()


def test_what_loses_too_much_is_shown(tmp_path: Path) -> None:
    arguments = ["--channels", "auto", "--max-drop", "0", "--recover", "none"]
    result = optimize(MLP, tmp_path / "o.onnx", *arguments, "--min-sqnr", "90")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: nothing written: no candidate is good enough; ")
    assert result.stderr.count("\n") == 1
    assert "candidate compared good size" in flat(result.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_as_json_keeps_stdout_empty(tmp_path: Path) -> None:
    result = optimize(
        MLP, tmp_path / "out.onnx", "--sparsity", "0.1", "--recover", "none", "--json"
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: nothing written: it is not smaller than the best")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparsity", "2"], "sparsity 2: it is a share above 0 and below 1, or 'auto'"),
        (["--sparsity", "much"], "sparsity much: it is a share above 0 and below 1, or 'auto'"),
        (["--channels", "1"], "channels 1: it is a share above 0 and below 1, or 'auto'"),
        (["--nm", "3"], "pattern '3': write N:M, as 2:4, or a block, as 4x1"),
        (["--nm", "2x4"], "nm '2x4': write N:M, as 2:4"),
        (["--block", "4x1"], "block: it is for lossy steps; ask for one: "),
        (["--nm", "2:4", "--block", "4x1"], "block: how many go? sparsity (--sparsity) says it"),
        (["--threshold", "-1"], "threshold -1.0: it is 0 or more"),
        (["--sparsity", "0.5", "--importance", "taste"], "importance 'taste': there are "),
        (["--sparsity", "0.5", "--recover", "tea"], "recover 'tea': there are lsq, moments, none"),
        (["--sparsity", "0.5", "--max-drop", "-1"], "max-drop -1.0: it is 0 or more"),
        (["--sparsity", "0.5", "--nm", "2:4"], "sparsity and nm: say in one way how many"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = optimize(MLP, tmp_path / "out.onnx", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {said}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- tables ----------------------------------------------------------------------------------------


def drawn(record: PruneRecord, **options: Any) -> list[str]:
    stream = StringIO()
    show_prune(record, Console(file=stream, width=80), **options)
    return stream.getvalue().splitlines()


def record(**fields: Any) -> PruneRecord:
    layers = [
        PrunedLayer(
            root=f"l{number}",
            operator="Conv",
            kept=(number + 1) * 40,
            total=(number + 1) * 100,
            error_before=0.5,
            error_after=0.1,
            ridge=0.01,
            bytes_before=4000,
            bytes_after=1000,
            ms_before=2.0,
            ms_after=1.0,
        )
        for number in range(20)
    ]
    whole = layers[0].model_copy(update={"root": "whole", "kept": 10**6, "total": 10**6})
    content = {
        "mode": "search",
        "kept": True,
        "candidate": "c",
        "reason": "r",
        "zeros": True,
        "channels": False,
        "recovery": "lsq",
        "importance": "obs",
        "max_drop": 0.01,
        "bytes_original": 10_000,
        "bytes_lossless": 8000,
        "bytes": 2000,
        "layers": [*layers, whole],
    }
    return PruneRecord(**{**content, **fields})


def test_many_layers_fit_one_screen() -> None:
    lines = drawn(record())
    rows = [line.split() for line in lines]
    assert rows[0] == ["layer", "kept", "error", "fitted", "bytes", "bytes", "after"]
    names = [row[0] for row in rows if row and row[0].startswith("l") and row[0][1:].isdigit()]
    assert names == [f"l{n}" for n in range(19, 7, -1)]  # the largest first
    assert ["8", "more", "40%"] in [row[:3] for row in rows]
    assert "whole" not in " ".join(lines)  # nothing went from it
    assert max(map(len, lines)) <= 80
    assert len([r for r in drawn(record(), every_candidate=True) if r.startswith("l")]) == 21


def test_time_where_channels_went_and_nothing_fitted_where_nothing_was() -> None:
    shown = " ".join(" ".join(drawn(record(channels=True))).split())
    assert "layer kept error fitted ms ms after" in shown
    assert "l19 40% 5.0e-01 1.0e-01 2.00 ms 1.00 ms" in shown
    assert "8 more 40% 16.0 ms 8.00 ms" in shown
    bare = drawn(record(recovery="none"))
    (row,) = (line for line in bare if line.startswith("l19"))
    assert "1.0e-01" not in row


def test_a_few_groups_and_how_many_more() -> None:
    groups = [
        PrunedGroup(root=f"g{n}", text=f"remove {n} of 10", units=10, gone=n) for n in range(8)
    ]
    shown = " ".join(" ".join(drawn(record(groups=groups))).split())
    for number in (7, 6, 5, 4):
        assert f"channels remove {number} of 10" in shown
    assert "remove 3 of 10" not in shown
    assert "and of 3 groups more" in shown
    assert "remove 0" not in shown
