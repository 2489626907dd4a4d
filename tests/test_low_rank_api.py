"""`optimize(..., low_rank=...)`: what is split, written, refused, recorded, replayed, combined."""

from __future__ import annotations

import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

import graphopt
from graphopt import lossy, macs, search
from graphopt.decisions import load_decisions, sha256
from graphopt.edit import Editor
from graphopt.errors import RefusedError, UsageError
from graphopt.ir import Model
from graphopt.judging import Judge
from graphopt.low_rank_report import LowRankRecord
from graphopt.low_rank_search import SHARES
from graphopt.passes.linear import linear_layers
from graphopt.passes.lowrank.options import Option, Splittable
from graphopt.render.results import show_report
from graphopt.report import Report
from graphopt.runtime import Session
from graphopt.search import Verdict
from tests.low_rank_runs import decide_layers, follows_macs
from tests.prune_runs import DATA, DIGITS, FEEDS, decide, timed, weighted

CNN, MLP, VIT = (DIGITS / f"{name}.onnx" for name in ("cnn", "mlp", "vit"))
METHODS = ("svd", "channel", "spatial", "tucker", "cp")


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 2.0)
    decide_layers(monkeypatch)


def optimize(source: Any, output: Any = None, **options: Any) -> Report:
    return graphopt.optimize(source, output, **{"data": DATA, **options}).report


def split(source: Any, output: Any = None, **options: Any) -> LowRankRecord:
    found = optimize(source, output, **options).low_rank
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def work(path: Path) -> int:
    return macs.count(onnx.load(path), {"image": (1, 1, 8, 8)}).total


def accuracy(path: Path) -> float:
    with np.load(DIGITS / "evaluation.npz") as data, Session(path) as session:
        found = session.run({"image": data["image"]})["logits"].argmax(1)
        return float((found == data["label"]).mean())


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "least"), [(0.6, 0.99), (0.4, 0.985)])
def test_the_share_of_macs_is_left(share: float, least: float, tmp_path: Path) -> None:
    lossless, out = tmp_path / "lossless.onnx", tmp_path / "out.onnx"
    optimize(CNN, lossless, data=None)
    found = split(CNN, out, low_rank=share, max_drop=0.2)
    assert found.kept
    assert found.reason == "it is faster"
    assert found.macs_left is not None
    assert found.macs_left == pytest.approx(work(out) / work(lossless))
    assert share - 0.08 < found.macs_left <= share
    assert operators(out)["Conv"] > operators(lossless)["Conv"]
    assert accuracy(out) >= least
    assert found.bytes == out.stat().st_size < lossless.stat().st_size
    assert (found.feeds, found.held_out) == (FEEDS - 1, True)


def test_the_account_of_layers(tmp_path: Path) -> None:
    report = optimize(CNN, tmp_path / "out.onnx", low_rank=0.5, max_drop=0.2)
    found = report.low_rank
    assert found is not None
    assert Report.model_validate_json(report.model_dump_json()) == report
    layers = [layer for layer in found.layers if layer.method]
    assert layers
    assert {layer.method for layer in layers} <= {"svd", "channel", "spatial", "tucker"}
    for layer in found.layers:
        assert bool(layer.ranks) == bool(layer.method)
        assert layer.macs_after <= layer.macs_before
        assert (layer.macs_after < layer.macs_before) == bool(layer.method)
        assert (layer.error > 0) == bool(layer.method)
        assert layer.ms_before == pytest.approx(layer.macs_before / 1e6)
        assert layer.ms_after == pytest.approx(layer.macs_after / 1e6)
        assert layer.degeneracy is None
    (only,) = found.candidates
    assert only.left == found.macs_left
    assert found.candidate == only.name == f"{found.macs_left:.0%} of MACs"
    assert {"fitting layers", "trying", "timing the fastest"} <= set(found.seconds)


@pytest.mark.parametrize("method", METHODS)
def test_one_form_where_it_fits(method: str) -> None:
    found = split(CNN, low_rank=0.7, low_rank_method=method, max_drop=1.0, force=True)
    used = {layer.method for layer in found.layers} - {""}
    assert used <= {"svd", method}
    convolutions = [layer for layer in found.layers if layer.inputs > layer.outputs]
    assert method == "svd" or any(layer.method == method for layer in convolutions)
    assert all((layer.degeneracy is not None) == (layer.method == "cp") for layer in found.layers)


def test_without_data_nothing_is_fitted(tmp_path: Path) -> None:
    found = split(CNN, tmp_path / "out.onnx", low_rank=0.8, data=None, max_drop=1.0)
    assert (found.feeds, found.held_out) == (0, False)
    with_data = split(CNN, low_rank=0.8, max_drop=1.0)
    assert (with_data.feeds, with_data.held_out) == (FEEDS - 1, True)
    fitted = [layer.error for layer in with_data.layers if layer.method]
    plain = [layer.error for layer in found.layers if layer.method]
    assert max(plain) > 2 * max(fitted)  # of the weights themselves, not of what layers give


def test_as_few_macs_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = split(CNN, low_rank="auto", max_drop=0.02)
    left = [trial.left for trial in found.candidates]
    good = [trial.left for trial in found.candidates if trial.good]
    bad = [trial.left for trial in found.candidates if not trial.good]
    assert 1 < len(left) <= 4
    assert found.macs_left in good
    assert not bad or max(bad) < min(good) + 0.1
    # A judge to whom all is good: the fewest that there are.
    monkeypatch.setattr(Judge, "__call__", lambda *_: Verdict(True, 0.0, "fine"))
    least = split(CNN, low_rank="auto", max_drop=0.02)
    assert least.macs_left is not None
    assert least.candidates[-1].left <= SHARES[-1]


def test_layers_that_are_not_faster_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "/7/second/second.1/BatchNormalization_output_0"

    def price(group: Splittable, option: Option) -> float:
        if option.method is not None and (group.root == slow or option.method == "tucker"):
            return follows_macs(group, group.dense) * 0.99
        return follows_macs(group, option)

    decide_layers(monkeypatch, price)
    found = split(CNN, low_rank=0.6, max_drop=1.0)
    (one,) = (layer for layer in found.layers if layer.root == slow)
    assert not one.method
    assert {layer.method for layer in found.layers} - {""} <= {"channel", "spatial", "svd"}
    everything = split(CNN, low_rank=0.01, max_drop=2.0, force=True)
    assert everything.notes == [
        f"{everything.macs_left:.0%} of the MACs are left, not 1%: other layers are not faster "
        "when they are split"
    ]


def test_what_turns_out_slow_in_company_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it is faster, all together one form is not: others take its place."""
    calls = itertools.count()

    def price(group: Splittable, option: Option) -> float:
        return follows_macs(group, option)

    decide_layers(monkeypatch, price)
    from graphopt import low_rank_search

    plain = low_rank_search.SplitTimes.chosen

    def chosen(self: Any, chosen: Any, rounds: int = 1) -> dict[str, float]:
        next(calls)
        found = plain(self, chosen, rounds)
        return {r: 9e9 if chosen[r].method == "tucker" else ms for r, ms in found.items()}

    monkeypatch.setattr(low_rank_search.SplitTimes, "chosen", chosen)
    found = split(CNN, low_rank=0.3, max_drop=2.0, force=True)
    assert "tucker" not in {layer.method for layer in found.layers}
    assert next(calls) > 1


def test_a_layer_given_up_at_last_takes_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import low_rank_search

    plain = low_rank_search.SplitTimes.chosen
    slow = "/7/second/second.1/BatchNormalization_output_0"

    def chosen(self: Any, chosen: Any, rounds: int = 1) -> dict[str, float]:
        found = plain(self, chosen, rounds)
        return found if chosen[slow].method is None else {**found, slow: 9e9}

    monkeypatch.setattr(low_rank_search, "_CHECKS", 1)
    monkeypatch.setattr(low_rank_search.SplitTimes, "chosen", chosen)
    found = split(CNN, low_rank=0.3, max_drop=2.0, force=True)
    (one,) = (layer for layer in found.layers if layer.root == slow)
    assert (one.method, one.ms_after) == ("", one.ms_before)
    assert any(layer.method for layer in found.layers)


def test_layers_whose_harm_is_infinite_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the model fails with other weights in them."""
    from graphopt import low_rank_search

    roots = {layer.root for layer in split(CNN, low_rank=0.6, max_drop=2.0, force=True).layers}
    for fatal in sorted(roots):
        monkeypatch.setattr(low_rank_search, "harms", lambda *_, x=fatal, **__: {x: math.inf})
        found = split(CNN, low_rank=0.7, max_drop=2.0, force=True)
        assert fatal in {layer.root for layer in found.layers if not layer.method}
        assert sum(bool(layer.method) for layer in found.layers) > 1


# -- what is not -----------------------------------------------------------------------------------


def test_what_is_not_faster_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 0.9)
    with pytest.raises(RefusedError) as caught:
        optimize(CNN, tmp_path / "out.onnx", low_rank=0.5, max_drop=0.5)
    assert str(caught.value).startswith(
        "nothing written: it is not faster than the best lossless model here: 0.90x"
    )
    assert names(tmp_path) == []
    report = optimize(CNN, tmp_path / "out.onnx", low_rank=0.5, max_drop=0.5, force=True)
    assert report.low_rank is not None
    assert (report.low_rank.kept, report.low_rank.forced) == (True, True)
    assert report.warnings[0].startswith("forced: it is not faster")


def test_what_loses_too_much_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        optimize(CNN, tmp_path / "out.onnx", low_rank=0.1, max_drop=0.0001)
    assert "no candidate is good enough; the best of them, " in str(caught.value)
    assert names(tmp_path) == []


def test_of_all_that_agree_the_one_with_least_noise_is_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"low_rank": "auto", "min_sqnr": 90.0}
    with pytest.raises(RefusedError) as caught:
        optimize(CNN, tmp_path / "out.onnx", **options)
    found = split(CNN, **options, force=True)
    tried = {trial.left: trial.name for trial in found.candidates if trial.drop == 0}
    assert len(tried) > 1
    assert found.candidate == tried[max(tried)]
    assert str(caught.value).startswith(
        f"nothing written: no candidate is good enough; the best of them, {found.candidate}: "
    )
    assert "; a lower --min-sqnr lets more be lost, " in str(caught.value)


def test_no_layer_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide_layers(monkeypatch, lambda group, option: 1.0)
    with pytest.raises(RefusedError) as caught:
        optimize(CNN, tmp_path / "out.onnx", low_rank=0.5)
    said = "nothing written: there are no layers in it that are faster here when they are split"
    assert str(caught.value) == said
    report = caught.value.report
    assert isinstance(report, Report)
    assert report.low_rank is not None
    assert report.low_rank.layers == []
    assert report.low_rank.notes == []  # no others are left either


def test_no_layers_at_all(tmp_path: Path) -> None:
    model = weighted("(float[n,64] x) => (float[n,64] y) { y = Relu(x) }")
    with pytest.raises(RefusedError, match="there are no layers"):
        optimize(model, tmp_path / "out.onnx", low_rank=0.5, data=None)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"low_rank": 0}, "low-rank 0: it is a share above 0 and below 1, or 'auto'"),
    ({"low_rank": 1.0}, "low-rank 1.0: it is a share above 0 and below 1, or 'auto'"),
    ({"low_rank": "half"}, "low-rank half: it is a share above 0 and below 1, or 'auto'"),
    (
        {"low_rank_method": "svd"},
        "low-rank-method svd: how much is to be left? low-rank (--low-rank)",
    ),
    (
        {"low_rank": 0.5, "low_rank_method": "qr"},
        "low-rank-method 'qr': there are auto, svd, channel, spatial, tucker, cp",
    ),
    ({"codebook": 5}, "codebook 5: there are auto, 8, 4"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        optimize(CNN, tmp_path / "out.onnx", **options)
    assert str(caught.value) == message
    assert names(tmp_path) == []


# -- decisions -------------------------------------------------------------------------------------

ASKED: list[dict[str, Any]] = [
    {"low_rank": 0.5, "max_drop": 0.2},
    {"low_rank": 0.5, "low_rank_method": "cp", "max_drop": 1.0, "force": True},
    {"low_rank": 0.7, "channels": 0.2, "max_drop": 0.5},
    {"low_rank": 0.7, "channels": 0.1, "sparsity": 0.5, "max_drop": 1.0, "force": True},
    {"low_rank": 0.6, "int8": "static", "target": "ort-cpu", "max_drop": 0.3},
    {"low_rank": 0.6, "codebook": 8, "max_drop": 0.3},
    {"codebook": 8, "max_drop": 0.1},
    {"int8": "static", "target": "ort-cpu", "codebook": 8, "max_drop": 0.3},
]


@pytest.mark.parametrize("options", ASKED, ids=lambda o: " ".join(o))
def test_decisions_replay_to_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    decisions = tmp_path / "d.json"
    first = optimize(CNN, tmp_path / "first.onnx", decisions=decisions, **options)
    target = options.get("target", "portable")
    second = optimize(CNN, tmp_path / "second.onnx", replay=decisions, target=target)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    for name in ("prune", "low_rank", "int8", "codebook"):
        one, other = getattr(first, name), getattr(second, name)
        if one is None or not one.kept:
            assert other is None or not other.kept
            continue
        assert (other.mode, other.kept) == ("replay", True)
        for field in ("found", "bytes", "max_drop", "decisions"):
            assert getattr(other, field) == getattr(one, field), (name, field)
    found = load_decisions(decisions)
    beside = tmp_path / "d.json.npz"
    assert found.weights == (sha256([beside]) if beside.exists() else "")
    assert {k: v for k, v in options.items() if k != "target"}.items() <= found.options.items()


def test_what_the_file_says(tmp_path: Path) -> None:
    record = split(CNN, tmp_path / "o.onnx", low_rank=0.5, max_drop=0.2, decisions=tmp_path / "d")
    found = load_decisions(tmp_path / "d").low_rank
    assert found is not None
    assert (found.candidate, found.found) == (record.candidate, record.found)
    assert found.macs_left == record.macs_left
    told = {layer.root: (layer.method, layer.ranks, layer.error) for layer in found.layers}
    assert told == {x.root: (x.method, x.ranks, x.error) for x in record.layers if x.method}


def test_factors_of_something_else(tmp_path: Path) -> None:
    options: dict[str, Any] = {"low_rank": 0.5, "max_drop": 0.2}
    optimize(CNN, tmp_path / "first.onnx", decisions=tmp_path / "d.json", **options)
    text = (tmp_path / "d.json").read_text()
    before = load_decisions(tmp_path / "d.json").weights

    def said(**arrays: Any) -> str:
        np.savez(tmp_path / "d.json.npz", **arrays)
        (tmp_path / "d.json").write_text(text.replace(before, sha256([tmp_path / "d.json.npz"])))
        with pytest.raises(UsageError) as caught:
            optimize(CNN, tmp_path / "second.onnx", replay=tmp_path / "d.json")
        assert not (tmp_path / "second.onnx").exists()
        return str(caught.value).removeprefix(f"decisions {tmp_path / 'd.json'}: ")

    ones = np.ones((2, 3), np.float32)
    root = "low_rank/0/svd.{}/nowhere"
    pair = {root.format(0): ones, root.format(1): ones.T}
    assert said(**pair) == "cannot be replayed: there is no layer 'nowhere'"
    assert said(**{root.format(0): ones}).startswith("the weights d.json.npz: 'nowhere' has")
    pair = {name.replace("nowhere", "logits"): array for name, array in pair.items()}
    message = said(**pair)
    assert message.startswith("cannot be replayed: logits: factors of [(2, 3), (3, 2)] are not"), (
        message
    )


def test_decisions_leave_the_data_alone(tmp_path: Path) -> None:
    data = tmp_path / "calibration.npz"
    shutil.copy(DIGITS / "calibration.npz", data)
    before = data.read_bytes()
    for place, folder in ((tmp_path / "calibration", data), (tmp_path / "d.json", tmp_path)):
        with pytest.raises(UsageError, match=r"decisions .*: they would "):
            optimize(CNN, data=str(folder), low_rank=0.5, max_drop=0.2, decisions=place)
    assert data.read_bytes() == before
    assert names(tmp_path) == ["calibration.npz"]


def test_other_versions_are_told(tmp_path: Path) -> None:
    decisions = tmp_path / "d.json"
    optimize(CNN, low_rank=0.5, max_drop=0.2, decisions=decisions)
    found = load_decisions(decisions)
    other = {**found.versions, "onnxruntime": "0.1"}
    found.model_copy(update={"versions": other}).save(decisions)
    notes = split(CNN, replay=decisions).notes
    assert [n.partition(",")[0] for n in notes] == ["made with onnxruntime 0.1"]


def test_decisions_without_their_factors(tmp_path: Path) -> None:
    decisions = tmp_path / "d.json"
    optimize(CNN, low_rank=0.5, max_drop=0.2, decisions=decisions)
    text = decisions.read_text()
    decisions.write_text(text.replace(load_decisions(decisions).weights, ""))
    with pytest.raises(UsageError, match="there are no factors in it"):
        optimize(CNN, tmp_path / "out.onnx", replay=decisions)


def test_what_came_in_sparse_is_written_sparse(tmp_path: Path) -> None:
    source, out, again = (tmp_path / f"{name}.onnx" for name in ("source", "out", "again"))
    optimize(CNN, source, sparsity=0.9, max_drop=2.0)
    options: dict[str, Any] = {"low_rank": 0.9, "max_drop": 2.0, "decisions": tmp_path / "d.json"}
    found = split(source, out, **options)
    assert any(not layer.method for layer in found.layers)
    assert len(onnx.load(out).graph.sparse_initializer) > 0
    assert found.bytes == out.stat().st_size < CNN.stat().st_size
    optimize(source, again, replay=tmp_path / "d.json")
    assert out.read_bytes() == again.read_bytes()


# -- together --------------------------------------------------------------------------------------


def by_folder(**speeds: float) -> Callable[..., Any]:
    """Timing by the name of the folder that the candidates lie in, and of the one above it."""

    def time_paired(models: Sequence[Path | bytes], feed: Any, **options: Any) -> Any:
        place = Path(str(models[1])).parent
        ratio = speeds.get(place.name, speeds.get(place.parent.name, 1.0))
        return timed(ratio)(models, feed, **options)

    return time_paired


def both(**options: Any) -> Report:
    asked: dict[str, Any] = {"low_rank": 0.6, "int8": "static", "target": "ort-cpu"}
    return optimize(CNN, **asked, max_drop=0.5, **options)


def test_low_rank_and_int8_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "time_paired", by_folder(low_rank=2.0, int8=2.0))
    out = tmp_path / "out.onnx"
    report = both(output=out)
    assert report.low_rank is not None
    assert report.int8 is not None
    assert report.low_rank.kept
    assert report.int8.kept
    assert operators(out)["DequantizeLinear"] > 0
    assert operators(out)["Conv"] > 11
    assert "fitting layers" in report.low_rank.seconds
    assert "calibrating" in report.int8.seconds


def test_int8_alone_where_that_is_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The candidates of int8 on the whole model lie in the folder that is made last.
    monkeypatch.setattr(search, "time_paired", by_folder(low_rank=1.2, **{"0": 1.1, "1": 3.0}))
    report = both(output=tmp_path / "out.onnx")
    assert report.low_rank is not None
    assert report.int8 is not None
    assert (report.low_rank.kept, report.int8.kept) == (False, True)
    assert report.low_rank.reason.startswith("int8 alone is faster: ")
    assert report.warnings == [f"low rank: {report.low_rank.reason}"]  # nothing to be forced
    assert operators(tmp_path / "out.onnx")["Conv"] == 11
    # What was forced and then left out after all is not said to be forced.
    monkeypatch.setattr(search, "time_paired", by_folder(low_rank=0.9, **{"0": 0.8, "1": 3.0}))
    report = both(output=tmp_path / "out.onnx", force=True)
    assert report.low_rank is not None
    assert not report.low_rank.kept
    assert not any(warning.startswith("forced") for warning in report.warnings)


def test_low_rank_alone_where_int8_comes_to_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = by_folder(low_rank=2.0, **{"0": 0.9, "1": 0.9, "2": 0.9})
    monkeypatch.setattr(search, "time_paired", speeds)
    report = both(output=tmp_path / "out.onnx")
    assert report.low_rank is not None
    assert report.int8 is not None
    assert (report.low_rank.kept, report.int8.kept) == (True, False)
    assert operators(tmp_path / "out.onnx")["DequantizeLinear"] == 0


def test_the_size_is_told_once(tmp_path: Path) -> None:
    """By the last step that is kept: it is that of the file."""
    report = optimize(CNN, tmp_path / "b.onnx", low_rank=0.6, codebook=8, max_drop=0.3)
    console = Console(width=100, record=True, file=(tmp_path / "screen").open("w"))
    show_report(report, console)
    shown = console.export_text()
    assert shown.count("against the model before") == 1
    assert " %) against the lossless model" not in shown
    alone = optimize(CNN, low_rank=0.6, max_drop=0.3)
    show_report(alone, console)
    assert " %) against the lossless model" in console.export_text()


def test_tables_after_low_rank(tmp_path: Path) -> None:
    alone = split(CNN, tmp_path / "a.onnx", low_rank=0.6, max_drop=0.3)
    report = optimize(CNN, tmp_path / "b.onnx", low_rank=0.6, codebook="auto", max_drop=0.3)
    assert report.codebook is not None
    assert report.codebook.kept
    assert alone.bytes is not None
    assert report.codebook.bytes == (tmp_path / "b.onnx").stat().st_size < 0.75 * alone.bytes
    assert operators(tmp_path / "b.onnx")["Gather"] > 0


def test_no_step_writes_over_what_it_reads(tmp_path: Path) -> None:
    """Weights are ranges of the file before: written over, it would be lost while it is read."""

    class Doubling:
        def __init__(self, name: str) -> None:
            self.name = name

        def applied(self, base: Path) -> Model:
            edit = Editor(Model.load(base))
            layer = linear_layers(edit)[-1]
            doubled = onnx.numpy_helper.from_array(2 * layer.weight.values, layer.weights.name)
            edit.set_weight(layer.weights, doubled)
            return edit.model

    first = lossy._file(Doubling("low_rank"), MLP, tmp_path)  # type: ignore[arg-type]
    before = first.read_bytes()
    second = lossy._file(Doubling("int8"), first, tmp_path)  # type: ignore[arg-type]
    assert first.read_bytes() == before
    assert second.read_bytes() != before
