"""`optimize(..., int8=...)`: what is written, what is refused, and what the report says."""

from __future__ import annotations

import dataclasses
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import lossy
from graphopt.compress import Compression, Mode, Request
from graphopt.errors import RefusedError, UsageError
from graphopt.int8_regions import NOISY, UNFUSED, _given_up
from graphopt.judging import Budget, Judge
from graphopt.passes.quantize.recipe import STATIC, Recipe
from graphopt.report import Report
from graphopt.runtime import Session
from graphopt.search import Trial, Verdict
from tests.int8_runs import DATA, DIGITS, FEEDS, decide

CNN, MLP, VIT = (DIGITS / f"{name}.onnx" for name in ("cnn", "mlp", "vit"))
INTEGERS = {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulIntegerToFloat"}


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 2.0)


def optimize(source: Any, output: Any = None, mode: Mode = "static", **options: Any) -> Report:
    options = {"data": DATA, "target": "ort-cpu", **options}
    return graphopt.optimize(source, output, int8=mode, **options).report


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def predictions(model: Path) -> Any:
    with np.load(DIGITS / "evaluation.npz") as data, Session(model) as session:
        return session.run({"image": data["image"][:60]})["logits"].argmax(1)


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "mode", "count"),
    [(CNN, "static", "static"), (MLP, "dynamic", "dynamic"), (VIT, "auto", "static")],
)
def test_what_pays_is_written(source: Path, mode: Mode, count: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = optimize(source, out, mode)
    found = report.int8
    assert found is not None
    assert found.kept
    assert not found.forced
    assert found.reason == "the fastest candidate that is good enough"
    assert found.counts[count] > 0
    assert found.mode == mode
    assert names(tmp_path) == ["out.onnx"]
    assert {node.op_type for node in onnx.load(out).graph.node} & INTEGERS
    assert (predictions(out) == predictions(source)).mean() > 0.95
    assert report.target is not None
    assert found.bytes == report.target.bytes == out.stat().st_size
    assert found.bytes_original == source.stat().st_size
    assert report.validation.verdict == "proved"
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_account_of_the_candidate_that_is_kept() -> None:
    found = optimize(CNN).int8
    assert found is not None
    (kept,) = (each for each in found.candidates if each.name == found.candidate)
    assert kept.good
    assert (kept.to_lossless, kept.to_original) == (found.to_lossless, found.to_original)
    assert found.to_lossless is not None
    assert found.to_lossless.low > 1
    assert found.to_original is not None
    assert found.to_original.ratio == pytest.approx(found.to_lossless.ratio / 0.8)
    assert found.ms_lossless == 1.0
    assert found.ms == pytest.approx(1 / found.to_lossless.ratio)
    assert found.ms_original == pytest.approx(1 / 0.8)
    assert found.feeds == FEEDS
    assert found.before == 1.0
    assert found.after == pytest.approx(1.0 - kept.drop)
    assert found.found == kept.found
    assert found.found.startswith("agreement ")
    assert list(found.sqnr_db) == ["logits"]
    assert {"calibrating", "trying", "profiling", "timing"} <= set(found.seconds)


@pytest.mark.parametrize(
    ("source", "mode"), [(CNN, "static"), (MLP, "dynamic"), (VIT, "auto"), (VIT, "dynamic")]
)
def test_every_operator_is_in_one_region(source: Path, mode: Mode) -> None:
    found = optimize(source, mode=mode).int8
    lossless = graphopt.optimize(source, validate=False).report.after
    assert found is not None
    stated = lossless.nodes - lossless.operators.get("Constant", 0)
    assert sum(region.nodes for region in found.regions) == stated
    by_name = sum(
        int(part.split()[0]) for r in found.regions if r.nodes for part in r.operators.split(", ")
    )
    assert by_name == stated
    assert all(region.why for region in found.regions)
    assert [r.root for r in found.regions if r.precision == "float"] == [""] * sum(
        r.precision == "float" for r in found.regions
    )


def test_a_score_counts_where_there_is_a_metric(tmp_path: Path) -> None:
    out, metric = tmp_path / "out.onnx", f"{DIGITS / 'score.py'}:accuracy"
    found = optimize(MLP, out, metric=metric).int8
    score = runpy.run_path(str(DIGITS / "score.py"))["score"]
    assert found is not None
    assert found.metric == metric
    assert found.before == pytest.approx(score(MLP))
    assert found.after == pytest.approx(score(out))
    assert f"{found.after:.4f}, {found.before:.4f} before" in found.found


def test_signal_to_noise_counts_as_well(tmp_path: Path) -> None:
    def judged(**budget: Any) -> tuple[bool, str]:
        lossless, request = tmp_path / "lossless.onnx", Budget(**budget)
        graphopt.optimize(CNN, lossless, validate=False)
        compression = Compression(
            CNN,
            lossless,
            Request(mode="static", data=DATA, budget=request),
            tmp_path,
            lambda what, share: None,
        )
        trial = compression.run().trials[0]
        assert trial.name == "all on integers"
        return trial.verdict.good, trial.verdict.text

    metric = f"{DIGITS / 'score.py'}:accuracy"
    good, text = judged(min_sqnr=20.0)
    assert good
    assert text.startswith("agreement ")
    assert not judged(min_sqnr=60.0)[0]
    assert judged(metric=metric)[0]
    good, text = judged(metric=metric, min_sqnr=20.0)
    assert good
    assert "before, SQNR " in text
    assert not judged(metric=metric, min_sqnr=60.0)[0]


def test_without_an_output_the_result_has_it(tmp_path: Path) -> None:
    result = graphopt.optimize(MLP, target="ort-cpu", int8="dynamic", data=DATA)
    result.save(tmp_path / "saved.onnx")
    optimize(MLP, tmp_path / "written.onnx", "dynamic")
    optimize(onnx.load(MLP), tmp_path / "proto.onnx", "dynamic")
    saved = (tmp_path / "saved.onnx").read_bytes()
    assert saved == (tmp_path / "written.onnx").read_bytes()
    assert predictions(tmp_path / "proto.onnx").tolist() == predictions(MLP).tolist()


def test_in_place_and_with_weights_beside(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(CNN.read_bytes())
    found = optimize(model, model, external="always", validate=False).int8
    assert found is not None
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert (predictions(model) == predictions(CNN)).mean() > 0.95


def test_weights_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    found = optimize(CNN, out, "weights").int8
    assert found is not None
    assert {"weights8", "half"} & set(found.counts)
    assert set(found.counts) <= {"weights8", "weights4", "int8-table", "half"}
    assert found.bytes is not None
    assert found.bytes < found.bytes_lossless
    assert any(region.precision == "float16" for region in found.regions)


def test_shapes_that_are_fixed(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    found = optimize(MLP, out, "auto", data=None, shapes={"image": [3, 1, 8, 8]}).int8
    assert found is not None
    assert onnx.load(out).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert found.notes == ["without --data nothing was calibrated: no static int8"]


# -- opsets ----------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.onnx"
    graphopt.optimize(MLP, path, level=0, opset=11, validate=False)
    return path


def test_an_old_model_is_raised(old: Path) -> None:
    report = optimize(old)
    assert (report.opsets_before[""], report.opsets[""]) == (11, 17)
    assert report.int8 is not None
    assert report.int8.notes == ["opset 11 became 17: int8 needs 13 to 27"]
    assert optimize(old, opset=13).opsets[""] == 13
    assert optimize(MLP).opsets == graphopt.optimize(MLP).report.opsets


def test_an_old_opset_that_is_asked_for(old: Path) -> None:
    with pytest.raises(UsageError) as caught:
        optimize(old, opset=11)
    assert str(caught.value) == "opset 11: static int8 needs 13 to 27; --opset 17 gives it that"
    report = optimize(old, mode="auto", opset=11)
    assert report.int8 is not None
    assert report.int8.counts == {"dynamic": 3}
    assert "opset 11: static int8 needs 13 to 27" in report.int8.notes


# -- refusals --------------------------------------------------------------------------------------


def test_what_is_not_faster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 0.9)
    out, decisions = tmp_path / "out.onnx", tmp_path / "d.json"
    with pytest.raises(RefusedError) as caught:
        optimize(CNN, out, decisions=decisions)
    assert str(caught.value) == (
        "nothing written: int8 is not faster than the best lossless model here: 0.90x (0.89 to "
        "0.91); --force writes the fastest good one all the same"
    )
    assert caught.value.exit_code == 1
    assert names(tmp_path) == []
    report = caught.value.report
    assert report is not None
    assert report.target is None
    assert report.int8 is not None
    assert not report.int8.kept
    assert report.int8.candidates
    assert report.int8.decisions is None

    report = optimize(CNN, out, decisions=decisions, force=True)
    assert names(tmp_path) == ["d.json", "out.onnx"]
    assert report.int8 is not None
    assert report.int8.forced
    assert report.int8.decisions == str(decisions)
    assert report.warnings == [
        "forced: int8 is not faster than the best lossless model here: 0.90x (0.89 to 0.91)"
    ]


def test_what_is_not_good_enough_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Judge.__call__
    monkeypatch.setattr(
        Judge, "__call__", lambda *given: dataclasses.replace(judged(*given), good=False)
    )
    out = tmp_path / "out.onnx"
    with pytest.raises(RefusedError) as caught:
        optimize(CNN, out)
    assert str(caught.value).startswith(
        "nothing written: no candidate is good enough; the best of them: agreement "
    )
    assert str(caught.value).endswith(
        "; --max-drop lets more be lost, --force writes the best of them all the same"
    )
    assert names(tmp_path) == []

    report = optimize(CNN, out, force=True)
    assert names(tmp_path) == ["out.onnx"]
    found = report.int8
    assert found is not None
    assert found.forced
    assert report.warnings[0].startswith("forced: no candidate is good enough; the best of them")
    least = min(each.drop for each in found.candidates)
    assert [c.drop for c in found.candidates if c.name == found.candidate] == [least]


def test_nothing_to_quantize(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> m (float[2, 3] x) => (float[2, 3] y) '
        "{ y = Tanh(x) }"
    )
    with pytest.raises(RefusedError) as caught:
        optimize(model, tmp_path / "out.onnx", "auto", data=None, force=True)
    assert str(caught.value) == "nothing written: there is nothing in it that can run on integers"
    assert names(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(self: Compression) -> Any:
        seen.append(names(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(Compression, "run", run)
    with pytest.raises(KeyboardInterrupt):
        optimize(MLP, tmp_path / "out.onnx", decisions=tmp_path / "d.json")
    assert len(seen[0]) == 2  # where the model and where the decisions are staged
    assert names(tmp_path) == []


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"target": "portable"},
        "int8 is made for onnxruntime's CPU provider: ask for that target as well, "
        "target='ort-cpu' (--target ort-cpu)",
    ),
    ({"int8": "int4"}, "int8 'int4': there are 'auto', 'static', 'dynamic', 'weights'"),
    ({"data": None}, "static int8 has to be calibrated: --data with some inputs"),
    ({"max_drop": -1.0}, "max-drop -1.0: it is 0 or more"),
    ({"max_drop": float("nan")}, "max-drop nan: it is 0 or more"),
    ({"min_sqnr": float("inf")}, "min-sqnr inf: it is a number of decibels"),
    ({"threads": -1}, "threads -1: 0 for all cores, or a number of them"),
    ({"metric": "nowhere.py:f"}, "metric nowhere.py:f: no such file: nowhere.py"),
    ({"decisions": "d", "replay": "r"}, "decisions are recorded, or replayed: give one of the two"),
    ({"decisions": str(MLP)}, f"decisions {MLP}: that is a model of this run"),
    ({"replay": "nowhere.json"}, "decisions nowhere.json: No such file or directory"),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES)
def test_mistakes_are_one_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"int8": "static", "target": "ort-cpu", "data": DATA, **options}
    with pytest.raises(UsageError) as caught:
        graphopt.optimize(MLP, tmp_path / "out.onnx", **given)
    assert str(caught.value) == said
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"metric": "m.py:f"}, "metric"),
        ({"min_sqnr": 20.0}, "min-sqnr"),
        ({"decisions": "d.json"}, "decisions"),
        ({"force": True}, "force"),
        ({"threads": 2}, "threads"),
        ({"max_drop": 0.1}, "max-drop"),
    ],
)
def test_options_that_need_int8(options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError) as caught:
        graphopt.optimize(MLP, target="ort-cpu", **options)
    assert str(caught.value) == (
        f"{name}: it is for lossy steps; ask for one: int8='auto' (--int8 auto), or sparsity, nm, "
        "threshold, channels, low-rank or codebook"
    )


# -- parts -----------------------------------------------------------------------------------------


def test_what_was_given_up_and_why() -> None:
    def trial(name: str, *static: str) -> Trial[Recipe]:
        recipe = Recipe(dict.fromkeys(static, STATIC))
        return Trial(name, recipe, Path(), Verdict(True, 0.0, ""))

    trials = [
        trial("a", "p", "q", "r", "s"),
        trial("b", "p"),
        trial("a, less 2", "p", "q", "r"),
        trial("a, less 2, less 1 that do not fuse", "p", "q"),
        trial("a, less 2, less 1 that do not fuse, stored in fewer bits", "p", "q"),
        trial("a, less 2, and dynamic", "p", "q", "r"),
    ]
    assert _given_up(trials, trials[0]) == {}
    assert _given_up(trials, trials[2]) == {"s": NOISY}
    assert _given_up(trials, trials[3]) == {"r": UNFUSED, "s": NOISY}
    assert _given_up(trials, trials[4]) == {"r": UNFUSED, "s": NOISY}
    assert _given_up(trials, trials[5]) == {"s": NOISY}


def test_stages_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    told: list[tuple[str, float | None]] = []
    clock = lossy._Clock(lambda what, share: told.append((what, share)), "int8")
    clock("calibrating, 1 feeds", None)
    clock("calibrating, 2 feeds", None)
    clock("trying a", None)
    clock("trying b", 0.5)
    clock("calibrating, 3 feeds", None)
    assert clock.stop() == {"calibrating": 2.0 + 4.0, "trying": 3.0}
    assert told[0] == ("int8: calibrating, 1 feeds", None)
    assert told[3] == ("int8: trying b", 0.5)


def test_progress_is_a_share_or_nothing() -> None:
    told: list[tuple[str, float | None]] = []
    optimize(MLP, mode="auto", progress=lambda what, share: told.append((what, share)))
    assert all(share is None or 0 <= share <= 1 for _, share in told)
    assert any(what.startswith("int8: calibrating") for what, _ in told)
