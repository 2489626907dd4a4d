"""`optimize(..., sparsity=..., channels=...)`: what is written, refused, recorded and replayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import macs, search, selection
from graphopt.decisions import load_decisions, sha256
from graphopt.errors import RefusedError, UsageError
from graphopt.ir import Model
from graphopt.judging import Judge
from graphopt.prune_report import NO_SPEED, PruneRecord
from graphopt.pruning import SPARSITIES, Pruning
from graphopt.report import Report
from graphopt.runtime import Session
from tests.graphs import parsed
from tests.prune_runs import DATA, DIGITS, FEEDS, decide, timed, weighted, weights

CNN, MLP, VIT = (DIGITS / f"{name}.onnx" for name in ("cnn", "mlp", "vit"))
INTEGERS = {"DequantizeLinear", "DynamicQuantizeLinear", "MatMulIntegerToFloat", "QLinearConv"}


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 2.0)


def optimize(source: Any, output: Any = None, **options: Any) -> Report:
    return graphopt.optimize(source, output, **{"data": DATA, **options}).report


def pruned(source: Any, output: Any = None, **options: Any) -> PruneRecord:
    found = optimize(source, output, **options).prune
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def predictions(model: Path) -> Any:
    with np.load(DIGITS / "evaluation.npz") as data, Session(model) as session:
        return session.run({"image": data["image"][:100]})["logits"].argmax(1)


def zeros(path: Path) -> float:
    """The share of the elements of all matrices that are zero."""
    found = [array for array in weights(Model.load(path)).values() if array.ndim > 1]
    for array in found:
        assert not np.signbit(array[array == 0]).any()
    return sum(int((array == 0).sum()) for array in found) / sum(a.size for a in found)


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


# -- zeros -----------------------------------------------------------------------------------------


def test_zeros_are_written_as_such(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = optimize(MLP, out, sparsity=0.7)
    found = report.prune
    assert found is not None
    assert (found.mode, found.kept, found.forced, found.reason) == (
        "search",
        True,
        False,
        "it is smaller",
    )
    assert names(tmp_path) == ["out.onnx"]
    assert zeros(out) == pytest.approx(0.7, abs=1e-3)
    assert len(onnx.load(out).graph.sparse_initializer) == 2  # the third has too few zeros
    assert (predictions(out) == predictions(MLP)).mean() > 0.95
    assert report.target is not None
    assert found.bytes == report.target.bytes == out.stat().st_size
    assert found.bytes < 0.5 * found.bytes_lossless
    assert found.bytes_original == MLP.stat().st_size
    assert report.validation.verdict == "proved"
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_account_of_zeros() -> None:
    found = pruned(MLP, sparsity=0.7)
    assert (found.zeros, found.channels) == (True, False)
    assert (found.recovery, found.importance, found.feeds) == ("lsq", "obs", FEEDS - 1)
    assert found.notes == [NO_SPEED]
    assert found.macs_gone is None
    assert found.groups == []
    assert found.candidate == "70% zeros"
    (only,) = found.candidates
    assert (only.name, only.good) == ("70% zeros", True)
    assert only.share == pytest.approx(0.7, abs=1e-3)
    assert found.found == only.found
    assert found.found.startswith("agreement ")
    assert found.before == 1.0
    assert found.after == pytest.approx(1.0 - only.drop)
    assert len(found.layers) == 3
    for layer in found.layers:
        assert layer.error_after < layer.error_before
        assert layer.bytes_before == 4 * layer.total
        is_sparse = layer.kept < 0.5 * layer.total
        assert (layer.bytes_after < layer.bytes_before) == is_sparse
        assert layer.ridge > 0
        assert layer.ms_before is not None
    kept, total = (sum(getattr(x, n) for x in found.layers) for n in ("kept", "total"))
    assert kept / total == pytest.approx(0.3, abs=1e-3)
    assert {"profiling", "trying", "timing the fastest"} <= set(found.seconds)
    assert any(stage.startswith("pruning weights") for stage in found.seconds)


def test_without_data_nothing_is_fitted(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    found = pruned(MLP, out, sparsity=0.5, data=None, force=True)
    assert (found.recovery, found.importance, found.feeds) == ("none", "lamp", 0)
    assert found.layers == []
    assert zeros(out) == pytest.approx(0.5, abs=1e-3)
    before, after = ([a for a in weights(Model.load(p)).values() if a.ndim > 1] for p in (MLP, out))
    for one, other in zip(
        sorted(before, key=lambda a: a.size), sorted(after, key=lambda a: a.size), strict=True
    ):
        one = one if one.shape == other.shape else one.T
        assert (other[other != 0] == one[other != 0]).all()


def test_patterns_blocks_and_thresholds(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert pruned(MLP, out, nm="2:4").candidate == "2 of 4 weights"
    assert zeros(out) == 0.5
    found = pruned(MLP, out, sparsity=0.6, block="4x1")
    assert found.candidate == "60% zeros in blocks of 4x1"
    assert zeros(out) == pytest.approx(0.6, abs=0.02)
    found = pruned(MLP, out, threshold=0.15, force=True)
    assert found.candidate == "no weights below 0.15"
    assert found.zeros
    assert found.notes == [NO_SPEED]


def test_the_largest_share_that_is_good_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the largest is, the search finds it, in no more than four candidates."""
    judged = Judge.__call__
    for most in (0.3, 0.6, 0.9, 0.95):

        def verdict(self: Judge, candidate: Path, most: float = most) -> Any:
            found = judged(self, candidate)
            return dataclasses.replace(found, good=zeros(candidate) < most + 0.01)

        monkeypatch.setattr(Judge, "__call__", verdict)
        found = pruned(MLP, sparsity="auto", recover="none", importance="magnitude", force=True)
        assert found.candidate == f"{most:.0%} zeros"
        assert found.kept
        assert len(found.candidates) <= 4
        assert {c.share > most + 0.01 for c in found.candidates if not c.good} <= {True}
    assert most == max(SPARSITIES)


# -- channels --------------------------------------------------------------------------------------


def test_channels_are_gone(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = optimize(CNN, out, channels=0.3)
    found = report.prune
    assert found is not None
    assert (found.kept, found.reason) == (True, "it is faster")
    assert (found.zeros, found.channels, found.notes) == (False, True, [])
    assert found.importance == "obs"
    whole, left = (macs.count(onnx.load(p), {"image": (16, 1, 8, 8)}).total for p in (CNN, out))
    assert found.macs_gone == pytest.approx(1 - left / whole, abs=0.01)
    assert 0.25 < found.macs_gone < 0.35
    assert found.candidate == f"{found.macs_gone:.0%} of MACs less"
    assert not onnx.load(out).graph.sparse_initializer
    assert (predictions(out) == predictions(CNN)).mean() > 0.95
    gone = [group for group in found.groups if group.gone]
    assert gone
    for group in gone:
        assert 0 < group.gone < group.units
        assert group.text.startswith(f"remove {group.gone} of {group.units} channels of ")
        assert group.harm is not None
        assert group.harm > 0
    assert found.to_lossless is not None
    assert found.to_lossless.low > 1
    assert found.to_original is not None
    assert found.to_original.ratio == pytest.approx(found.to_lossless.ratio / 0.8)
    assert (found.ms_lossless, found.ms) == (1.0, pytest.approx(0.5))
    assert found.bytes == out.stat().st_size
    assert len(found.layers) == 12


def test_channels_then_zeros(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    found = pruned(MLP, out, channels=0.3, sparsity=0.5)
    assert (found.zeros, found.channels, found.notes) == (True, True, [NO_SPEED])
    first, second = found.candidates
    assert second.name == f"{first.name}, 50% zeros" == found.candidate
    assert found.macs_gone is not None
    assert 0.1 < found.macs_gone < 0.4
    assert [g.gone for g in found.groups if g.gone]
    assert zeros(out) == pytest.approx(0.5, abs=1e-3)
    sizes = sorted(a.size for a in weights(Model.load(out)).values())
    assert sizes < sorted(a.size for a in weights(Model.load(MLP)).values())


def test_channels_without_data(tmp_path: Path) -> None:
    found = pruned(MLP, tmp_path / "out.onnx", channels=0.2, data=None, force=True)
    assert (found.recovery, found.importance) == ("none", "l2")
    assert found.layers == []


def test_the_fastest_of_good_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judge.__call__

    def verdict(self: Judge, candidate: Path) -> Any:
        left = macs.count(onnx.load(candidate), {"image": (16, 1, 8, 8)}).total
        whole = macs.count(onnx.load(MLP), {"image": (16, 1, 8, 8)}).total
        return dataclasses.replace(judged(self, candidate), good=left > 0.6 * whole)

    monkeypatch.setattr(Judge, "__call__", verdict)
    found = pruned(MLP, channels="auto")
    good = [c for c in found.candidates if c.good]
    assert good
    assert len(good) < len(found.candidates)
    assert found.candidate in {c.name for c in good}
    assert len({c.name for c in found.candidates}) == len(found.candidates)


# -- with int8 -------------------------------------------------------------------------------------


def by_step(prune: float, int8: float) -> Callable[..., Any]:
    """Timing that differs between the steps."""

    def time_paired(models: Sequence[Path | bytes], feed: Any, **options: Any) -> Any:
        is_prune = Path(str(models[1])).parent.name == "prune"
        return timed(prune if is_prune else int8)(models, feed, **options)

    return time_paired


def both(output: Path, **options: Any) -> Report:
    return optimize(MLP, output, channels=0.3, int8="static", target="ort-cpu", **options)


def test_both_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = both(out)
    assert report.prune is not None
    assert report.int8 is not None
    assert report.prune.kept
    assert report.int8.kept
    assert report.warnings == []
    assert operators(out) & INTEGERS
    assert report.prune.bytes == report.int8.bytes == out.stat().st_size
    assert out.stat().st_size < 0.35 * MLP.stat().st_size


def test_int8_alone_where_pruning_comes_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "time_paired", by_step(0.9, 2.0))
    out, decisions = tmp_path / "out.onnx", tmp_path / "d.json"
    report = both(out, decisions=decisions)
    assert report.prune is not None
    assert report.int8 is not None
    assert (report.prune.kept, report.int8.kept) == (False, True)
    assert report.warnings == [
        "prune: it is not faster than the best lossless model here: 0.90x (0.89 to 0.91); "
        "--force writes the fastest good one all the same"
    ]
    assert operators(out) & INTEGERS
    shapes = {a.shape for a in weights(Model.load(out)).values() if a.ndim == 2}
    assert shapes == {a.shape for a in weights(Model.load(MLP)).values() if a.ndim == 2} or {
        s[::-1] for s in shapes
    } == {a.shape for a in weights(Model.load(MLP)).values() if a.ndim == 2}
    assert names(tmp_path) == ["d.json", "out.onnx"]  # there are no weights to keep
    again = tmp_path / "again.onnx"
    graphopt.optimize(MLP, again, target="ort-cpu", replay=decisions)
    assert again.read_bytes() == out.read_bytes()


def test_pruning_alone_where_int8_comes_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "time_paired", by_step(2.0, 0.9))
    out, decisions = tmp_path / "out.onnx", tmp_path / "d.json"
    report = both(out, decisions=decisions)
    assert report.prune is not None
    assert report.int8 is not None
    assert (report.prune.kept, report.int8.kept) == (True, False)
    (warning,) = report.warnings
    assert warning.startswith("int8: int8 is not faster than the best lossless model here: 0.90x")
    assert not operators(out) & INTEGERS
    again = tmp_path / "again.onnx"
    graphopt.optimize(MLP, again, target="ort-cpu", replay=decisions)
    assert again.read_bytes() == out.read_bytes()


def test_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 0.9)
    with pytest.raises(RefusedError) as caught:
        both(tmp_path / "out.onnx")
    assert str(caught.value).startswith("nothing written: prune: it is not faster than the best")
    assert "; int8: int8 is not faster than the best lossless model here" in str(caught.value)
    assert names(tmp_path) == []


# Masks by magnitude, nothing fitted: where it does not matter how weights were chosen.
QUICK: dict[str, Any] = {"importance": "magnitude", "recover": "none"}


# -- refusals --------------------------------------------------------------------------------------


def refused(output: Path, **options: Any) -> tuple[str, PruneRecord]:
    with pytest.raises(RefusedError) as caught:
        optimize(MLP, output, decisions=output.with_name("d.json"), **options)
    assert caught.value.exit_code == 1
    assert names(output.parent) == []
    report = caught.value.report
    assert report is not None
    assert report.target is None
    assert report.prune is not None
    assert not report.prune.kept
    assert report.prune.decisions is None
    return str(caught.value), report.prune


def forced(output: Path, reason: str, **options: Any) -> PruneRecord:
    report = optimize(MLP, output, decisions=output.with_name("d.json"), force=True, **options)
    assert names(output.parent) == ["d.json", "d.json.npz", "out.onnx"]
    assert report.prune is not None
    assert (report.prune.kept, report.prune.forced) == (True, True)
    assert report.warnings == [f"forced: {reason}"]
    assert report.prune.reason == reason
    return report.prune


def test_what_loses_too_much_is_refused(tmp_path: Path) -> None:
    out, options = tmp_path / "out.onnx", {"sparsity": 0.95, "recover": "none"}
    said, found = refused(out, **options)
    assert said.startswith(
        "nothing written: no candidate is good enough; the best of them, 95% zeros: agreement 0."
    )
    hint = "; --max-drop lets more be lost, --force writes the best of them all the same"
    assert said.endswith(hint)
    assert [c.good for c in found.candidates] == [False]
    assert found.notes == [NO_SPEED]
    reason = said.removeprefix("nothing written: ").removesuffix(hint)
    forced(out, reason, **options)
    assert zeros(out) == pytest.approx(0.95, abs=1e-3)


def test_what_is_not_smaller_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    reason = "it is not smaller than the best lossless model: too few zeros to store as such"
    said, found = refused(out, sparsity=0.2, **QUICK)
    assert said == (f"nothing written: {reason}; --force writes the fastest good one all the same")
    assert [c.good for c in found.candidates] == [True]
    forced(out, reason, sparsity=0.2, **QUICK)
    assert zeros(out) == pytest.approx(0.2, abs=1e-3)
    assert not onnx.load(out).graph.sparse_initializer


def test_what_is_not_faster_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 0.9)
    out = tmp_path / "out.onnx"
    reason = "it is not faster than the best lossless model here: 0.90x (0.89 to 0.91)"
    said, _ = refused(out, channels=0.3)
    assert said == f"nothing written: {reason}; --force writes the fastest good one all the same"
    found = forced(out, reason, channels=0.3)
    assert found.to_lossless is not None
    assert found.to_lossless.ratio == pytest.approx(0.9)


def test_nothing_is_slower_because_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros promise bytes: that they win no time is said, and no reason to refuse them."""
    decide(monkeypatch, 1.0)
    found = pruned(MLP, tmp_path / "out.onnx", sparsity=0.7)
    assert found.kept
    assert found.notes == [NO_SPEED]


def test_nothing_in_it_can_go(tmp_path: Path) -> None:
    model = parsed("g (float[2, 3] x) => (float[2, 3] y) { y = Tanh(x) }")
    for options in ({"channels": 0.5}, {"sparsity": 0.5}, {"channels": "auto", "sparsity": "auto"}):
        with pytest.raises(RefusedError) as caught:
            optimize(model, tmp_path / "out.onnx", data=None, **options)
        assert str(caught.value).startswith("nothing written: ")
        assert names(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(self: Pruning) -> Any:
        seen.append(names(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(Pruning, "run", run)
    with pytest.raises(KeyboardInterrupt):
        optimize(MLP, tmp_path / "out.onnx", sparsity=0.5, decisions=tmp_path / "d.json")
    assert len(seen[0]) == 2
    assert names(tmp_path) == []


# -- other ways to ask -----------------------------------------------------------------------------


def test_a_metric_and_signal_to_noise_count() -> None:
    metric = f"{DIGITS / 'score.py'}:accuracy"
    found = pruned(MLP, sparsity=0.7, metric=metric)
    assert found.metric == metric
    assert found.before is not None
    assert found.before > 0.9
    assert f"{found.after:.4f}, {found.before:.4f} before" in found.found
    with pytest.raises(RefusedError, match="no candidate is good enough"):
        pruned(MLP, sparsity=0.7, min_sqnr=60.0)
    assert pruned(MLP, sparsity=0.7, min_sqnr=5.0).kept


def test_without_an_output_the_result_has_it(tmp_path: Path) -> None:
    result = graphopt.optimize(MLP, sparsity=0.7, data=DATA)
    result.save(tmp_path / "saved.onnx")
    optimize(MLP, tmp_path / "written.onnx", sparsity=0.7)
    optimize(onnx.load(MLP), tmp_path / "proto.onnx", sparsity=0.7)
    saved = (tmp_path / "saved.onnx").read_bytes()
    assert saved == (tmp_path / "written.onnx").read_bytes()
    assert (predictions(tmp_path / "proto.onnx") == predictions(tmp_path / "saved.onnx")).all()


def test_in_place_and_with_weights_beside(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(MLP.read_bytes())
    found = pruned(model, model, sparsity=0.7, external="always")
    assert names(tmp_path)[0] == "model.onnx"
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert zeros(model) == pytest.approx(0.7, abs=1e-3)


def test_passes_without_any_judgement(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    text = "prune-weights{sparsity=0.6}, sparsify"
    report = graphopt.optimize(MLP, out, passes=text, validate=False).report
    assert report.prune is None
    assert zeros(out) == pytest.approx(0.6, abs=1e-3)
    assert out.stat().st_size < 0.7 * MLP.stat().st_size
    text = f"prune-channels{{share=0.3, importance=activation, data={DATA}}}"
    graphopt.optimize(MLP, out, passes=text, validate=False)
    left, whole = (macs.count(onnx.load(p), {"image": (16, 1, 8, 8)}).total for p in (out, MLP))
    assert 0.6 < left / whole < 0.8
    assert (predictions(out) == predictions(MLP)).mean() > 0.9


# -- decisions -------------------------------------------------------------------------------------

RECORDED: list[tuple[Path, dict[str, Any]]] = [
    (MLP, {"sparsity": 0.7}),
    (MLP, {"nm": "2:4"}),
    (MLP, {"channels": 0.3}),
    (VIT, {"channels": 0.2, "data": None, "force": True}),
    (MLP, {"channels": 0.3, "sparsity": 0.5}),
    (MLP, {"channels": 0.3, "int8": "static", "target": "ort-cpu"}),
    (MLP, {"sparsity": 0.7, "int8": "dynamic", "target": "ort-cpu"}),
]


def measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a replay measures nothing")

    for place, name in ((selection, "fastest"), (search, "time_paired"), (Pruning, "run")):
        monkeypatch.setattr(place, name, fail)


@pytest.mark.parametrize(("source", "options"), RECORDED)
def test_a_replay_gives_the_same_bytes(
    source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decisions = tmp_path / "d.json"
    first = optimize(source, tmp_path / "first.onnx", decisions=decisions, **options)
    measuring_fails(monkeypatch)
    target = {"target": options.get("target", "portable")}
    second = graphopt.optimize(source, tmp_path / "second.onnx", replay=decisions, **target).report
    written = (tmp_path / "first.onnx").read_bytes()
    assert written != source.read_bytes()
    assert (tmp_path / "second.onnx").read_bytes() == written
    assert names(tmp_path) == ["d.json", "d.json.npz", "first.onnx", "second.onnx"]
    one, other = first.prune, second.prune
    assert one is not None
    assert other is not None
    assert second.fingerprint == first.fingerprint
    assert (other.mode, other.kept, other.reason) == ("replay", True, "as it was decided")
    same = "candidate", "found", "bytes", "bytes_lossless", "zeros", "channels", "recovery"
    for name in (*same, "importance", "max_drop", "notes"):
        assert getattr(other, name) == getattr(one, name), name
    gone = [{g.root: g.gone for g in each.groups if g.gone} for each in (one, other)]
    assert gone[0] == gone[1]
    assert one.decisions == other.decisions == str(decisions)
    assert (second.int8 is None) == ("int8" not in options)


def test_what_the_file_says(tmp_path: Path) -> None:
    record = optimize(
        MLP, tmp_path / "o.onnx", channels=0.3, sparsity=0.5, decisions=tmp_path / "d.json"
    ).prune
    assert record is not None
    found = load_decisions(tmp_path / "d.json")
    assert found.pruning is not None
    assert found.weights == sha256([tmp_path / "d.json.npz"])
    assert found.candidate == found.pruning.candidate == record.candidate
    assert found.pruning.groups == {g.root: g.gone for g in record.groups if g.gone}
    asked = {"channels": 0.3, "sparsity": 0.5, "nm": None, "data": DATA, "force": False}
    assert asked.items() <= found.options.items()
    assert found.regions == []


def said(folder: Path, source: Path = MLP) -> str:
    with pytest.raises(UsageError) as caught:
        graphopt.optimize(source, folder / "second.onnx", replay=folder / "d.json")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (folder / "second.onnx").exists()
    return str(caught.value).removeprefix(f"decisions {folder / 'd.json'}: ")


def record_quickly(folder: Path) -> None:
    optimize(
        MLP, folder / "first.onnx", decisions=folder / "d.json", sparsity=0.5, max_drop=0.5, **QUICK
    )


def rewritten(folder: Path, **arrays: Any) -> None:
    """Other weights, of which the decisions say that they belong to them."""
    np.savez(folder / "d.json.npz", **arrays)
    content = json.loads((folder / "d.json").read_text())
    content["weights"] = sha256([folder / "d.json.npz"])
    (folder / "d.json").write_text(json.dumps(content))


def test_weights_that_are_missing_or_others(tmp_path: Path) -> None:
    record_quickly(tmp_path)
    assert said(tmp_path, CNN).startswith("made for another model (sha256 ")
    beside = tmp_path / "d.json.npz"
    whole = beside.read_bytes()
    beside.unlink()
    assert said(tmp_path) == "the weights d.json.npz: No such file or directory"
    beside.write_bytes(whole[:-100])
    wrong = "the weights d.json.npz: it is not the file that was written with them"
    assert said(tmp_path) == wrong
    beside.write_bytes(whole + b"x")
    assert said(tmp_path) == wrong


ONES = np.ones(3, np.float32)
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"prune/0/weights/nowhere": ONES}, "cannot be replayed: there are no weights 'nowhere'"),
    ({"prune/0/biases/nowhere": ONES}, "cannot be replayed: there is no layer 'nowhere'"),
    ({"prune/0/cut/nowhere": [1]}, "cannot be replayed: there is no group 'nowhere'"),
    ({"prune/0/other/x": ONES}, "the weights d.json.npz: 'other/x' is no part of a recipe"),
    ({"prune/1/weights/x": ONES}, "the weights d.json.npz: there are stages [1]"),
    ({"prune/x": ONES}, "the weights d.json.npz: "),
]


@pytest.mark.parametrize(("arrays", "message"), OTHERS)
def test_weights_of_something_else(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    record_quickly(tmp_path)
    rewritten(tmp_path, **arrays)
    assert said(tmp_path).startswith(message)


def test_no_file_of_arrays_at_all(tmp_path: Path) -> None:
    record_quickly(tmp_path)
    (tmp_path / "d.json.npz").write_bytes(b"nothing")
    content = json.loads((tmp_path / "d.json").read_text())
    content["weights"] = sha256([tmp_path / "d.json.npz"])
    (tmp_path / "d.json").write_text(json.dumps(content))
    assert said(tmp_path).startswith("the weights d.json.npz: ")


# -- mistakes --------------------------------------------------------------------------------------

SHARE = "it is a share above 0 and below 1, or 'auto'"
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 1.0}, f"sparsity 1.0: {SHARE}"),
    ({"sparsity": 0}, f"sparsity 0: {SHARE}"),
    ({"sparsity": float("nan")}, f"sparsity nan: {SHARE}"),
    ({"sparsity": "half"}, f"sparsity half: {SHARE}"),
    ({"channels": 1.5}, f"channels 1.5: {SHARE}"),
    ({"channels": "all"}, f"channels all: {SHARE}"),
    ({"sparsity": 0.5, "nm": "2:4"}, "sparsity and nm: say in one way how many weights go"),
    ({"nm": "2:4", "threshold": 0.1}, "nm and threshold: say in one way how many weights go"),
    ({"nm": "4:2"}, "pattern '4:2': write N:M, as 2:4, or a block, as 4x1"),
    ({"nm": "4x1"}, "nm '4x1': write N:M, as 2:4"),
    ({"sparsity": 0.5, "block": "2:4"}, "block '2:4': write ROWSxCOLUMNS, as 4x1"),
    ({"nm": "2:4", "block": "4x1"}, "block: how many go? sparsity (--sparsity) says it"),
    ({"threshold": -1.0}, "threshold -1.0: it is 0 or more"),
    (
        {"sparsity": 0.5, "importance": "l1"},
        "importance 'l1': there are magnitude, lamp, wanda, obs for this",
    ),
    (
        {"channels": 0.5, "importance": "lamp"},
        "importance 'lamp': there are obs, activation, l1, l2, apoz for this",
    ),
    (
        {"sparsity": 0.5, "importance": "obs", "data": None},
        "importance obs needs feeds: --data",
    ),
    (
        {"channels": 0.5, "importance": "apoz", "data": None},
        "importance apoz needs feeds: --data",
    ),
    ({"sparsity": 0.5, "recover": "magic"}, "recover 'magic': there are lsq, moments, none"),
    (
        {"sparsity": 0.5, "recover": "lsq", "data": None},
        "recover lsq needs feeds: --data with some inputs",
    ),
    *(
        (
            option,
            f"{next(iter(option))}: it is for lossy steps; ask for one: int8='auto' (--int8 auto),"
            " or sparsity, nm, threshold, channels, low-rank or codebook",
        )
        for option in ({"importance": "lamp"}, {"recover": "lsq"}, {"block": "4x1"})
    ),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        optimize(MLP, tmp_path / "out.onnx", **options)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


def test_shared_weights_and_branches_run_all_the_same(tmp_path: Path) -> None:
    model = weighted(
        "(float[n,64] x, float[64,64] w, float[64,4] w2) => (float[n,4] y)"
        " { h = MatMul(x, w) r = Relu(h) k = MatMul(r, w) y = MatMul(k, w2) }"
    )
    out = tmp_path / "out.onnx"
    optimize(model, out, data=None, sparsity=0.6, force=True)
    assert zeros(out) == pytest.approx(0.6, abs=1e-3)
    with Session(out) as session:
        assert session.run({"x": np.ones((3, 64), np.float32)})["y"].shape == (3, 4)
