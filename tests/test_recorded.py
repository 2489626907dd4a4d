"""Decisions that are recorded and replayed: the same bytes, and clear errors for anything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import compress, recorded, search, selection
from graphopt.compress import Compression, Mode, Outcome, Request
from graphopt.decisions import Decisions, load_decisions
from graphopt.errors import UsageError
from graphopt.passes.quantize.emission import Options
from graphopt.passes.quantize.recipe import STATIC, Recipe
from graphopt.report import Report
from tests.int8_runs import DATA, DIGITS, decide

CNN, MLP, VIT = (DIGITS / f"{name}.onnx" for name in ("cnn", "mlp", "vit"))
Content = dict[str, Any]


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, 2.0)


def record(source: Path, folder: Path, mode: Mode = "static", **options: Any) -> Report:
    return graphopt.optimize(
        source,
        folder / "first.onnx",
        target="ort-cpu",
        int8=mode,
        data=DATA,
        decisions=folder / "d.json",
        **options,
    ).report


def replay(source: Path, folder: Path, name: str = "second.onnx", **options: Any) -> Report:
    return graphopt.optimize(
        source, folder / name, target="ort-cpu", replay=folder / "d.json", **options
    ).report


def measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a replay measures nothing")

    for place, name in ((compress, "sweep"), (selection, "fastest"), (search, "time_paired")):
        monkeypatch.setattr(place, name, fail)
    monkeypatch.setattr(Compression, "run", fail)


# -- the same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "mode"), [(CNN, "static"), (VIT, "auto"), (MLP, "dynamic"), (CNN, "weights")]
)
def test_a_replay_gives_the_same_bytes(
    source: Path, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record(source, tmp_path, mode)
    measuring_fails(monkeypatch)
    second = replay(source, tmp_path)
    replay(source, tmp_path, "third.onnx", int8=mode, data=DATA, seed=5)
    written = (tmp_path / "first.onnx").read_bytes()
    assert written != source.read_bytes()
    assert (tmp_path / "second.onnx").read_bytes() == written
    assert (tmp_path / "third.onnx").read_bytes() == written
    assert first.int8 is not None
    assert second.int8 is not None
    assert second.fingerprint == first.fingerprint
    assert second.validation.verdict == "proved"
    assert second.warnings == []
    assert (second.int8.mode, second.int8.kept) == ("replay", True)
    assert second.int8.decisions == str(tmp_path / "d.json")
    assert second.int8.notes == []
    for name in ("candidate", "found", "counts", "bytes", "bytes_lossless", "max_drop"):
        assert getattr(second.int8, name) == getattr(first.int8, name), name


def test_a_replay_tells_the_same_of_static_regions(tmp_path: Path) -> None:
    first, second = record(VIT, tmp_path, "static"), replay(VIT, tmp_path)
    assert first.int8 is not None
    assert second.int8 is not None
    told = [
        [(r.root, r.operators, r.nodes, r.sqnr_db) for r in found.regions if r.precision == "int8"]
        for found in (first.int8, second.int8)
    ]
    assert told[0] == told[1]
    assert told[0]


def test_numbers_beyond_32_bits_are_rounded_before_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Compression.run

    def corrected(self: Compression) -> Outcome:
        outcome = run(self)
        trial = outcome.winner.trial
        assert trial is not None
        unit = next(u for u in outcome.candidates.chosen(trial.recipe) if u.weights is not None)
        size = unit.weights.weight.shape[0]  # type: ignore[union-attr]
        drawn = np.random.default_rng(0).normal(0, 0.1, size)
        recipe = dataclasses.replace(trial.recipe, corrections={unit.root: drawn})
        winner = dataclasses.replace(
            outcome.winner, trial=dataclasses.replace(trial, recipe=recipe)
        )
        return dataclasses.replace(outcome, recipe=recipe, winner=winner)

    record(CNN, tmp_path)
    plain = (tmp_path / "first.onnx").read_bytes()
    monkeypatch.setattr(Compression, "run", corrected)
    record(CNN, tmp_path)
    assert (tmp_path / "first.onnx").read_bytes() != plain
    assert len(load_decisions(tmp_path / "d.json").biases) == 1
    replay(CNN, tmp_path)
    assert (tmp_path / "second.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()


def test_the_file_holds_the_whole_recipe(tmp_path: Path) -> None:
    lossless = tmp_path / "lossless.onnx"
    graphopt.optimize(CNN, lossless, validate=False)
    request = Request(mode="static", data=DATA)
    outcome = Compression(CNN, lossless, request, tmp_path, lambda what, share: None).run()
    trial = outcome.kept
    assert trial is not None
    root = next(iter(trial.recipe.options))
    wanted = dataclasses.replace(
        trial.recipe,
        corrections={root: np.array([0.1, -1e-30, 3.0], np.float32)},
        weights=Options(bits=7, method="max"),
    )
    decisions = recorded.with_regions(
        recorded.blank_decisions("", "", {"level": 2}),
        outcome,
        dataclasses.replace(trial, recipe=wanted),
    )
    again = Decisions.model_validate_json(decisions.to_json())
    found = recorded.recipe_of(again, Path("d.json"))
    assert {field.name for field in dataclasses.fields(Recipe)} == {
        "options",
        "tensors",
        "corrections",
        "weights",
    }
    assert dict(found.options) == dict(wanted.options)
    assert dict(found.tensors) == dict(wanted.tensors)
    assert found.weights == wanted.weights
    assert list(found.corrections) == [root]
    assert found.corrections[root].tobytes() == wanted.corrections[root].tobytes()


def test_what_the_file_says(tmp_path: Path) -> None:
    report = record(VIT, tmp_path, "static", max_drop=0.05)
    decisions = load_decisions(tmp_path / "d.json")
    assert decisions.target == "ort-cpu"
    assert decisions.host == report.host
    assert decisions.features == report.host.features
    asked = {"int8": "static", "max_drop": 0.05, "data": DATA, "level": 2, "force": False}
    assert asked.items() <= decisions.options.items()
    static = [region for region in decisions.regions if region.option == STATIC]
    assert report.int8 is not None
    assert len(static) == report.int8.counts["static"]
    assert all(region.ms_before is not None for region in static)
    signatures = [region.signature for region in static]
    assert len(set(signatures)) < len(signatures)  # blocks repeat


def test_what_the_file_says_of_what_is_left(tmp_path: Path) -> None:
    report = record(CNN, tmp_path, "dynamic")
    decisions = load_decisions(tmp_path / "d.json")
    left = [region for region in decisions.regions if region.option == "original"]
    assert len(left) > 10
    assert report.int8 is not None
    assert {region.reason for region in left} == {
        r.why
        for r in report.int8.regions
        if r.precision == "float" and r.why != "no integer kernel"
    }
    by_root = [region.root for region in decisions.regions]
    assert len(by_root) == len(set(by_root))


# -- anything else ---------------------------------------------------------------------------------


def said(source: Path, folder: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        replay(source, folder, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (folder / "second.onnx").exists()
    return str(caught.value).removeprefix(f"decisions {folder / 'd.json'}: ")


def test_another_source(tmp_path: Path) -> None:
    record(MLP, tmp_path, "dynamic")
    assert said(CNN, tmp_path).startswith("made for another model (sha256 ")


def test_other_passes(tmp_path: Path) -> None:
    record(VIT, tmp_path, "dynamic", level=1)
    assert said(VIT, tmp_path) == (
        "the passes give another model here than what they were made for, by graphopt "
        f"{graphopt.optimize(MLP).report.graphopt} with level 1"
    )
    replay(VIT, tmp_path, level=1)
    assert (tmp_path / "second.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()


def _option(content: Content) -> None:
    content["regions"][0]["option"] = "int3"


def _root(content: Content) -> None:
    content["regions"][0]["root"] = "nowhere"


def _tensor(content: Content) -> None:
    del content["tensors"]["image"]


def _zero(content: Content) -> None:
    content["tensors"]["image"]["zero_point"] = 300


def _kind(content: Content) -> None:
    content["tensors"]["image"]["dtype"] = "float32"


def _weights(content: Content) -> None:
    del content["options"]["weights.bits"]


def _target(content: Content) -> None:
    content["target"] = "portable"


def _bias(content: Content) -> None:
    content["biases"] = {content["regions"][0]["root"]: [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_option, "cannot be replayed: there is no option 'int3'"),
        (_root, "cannot be replayed: there is no region 'nowhere'"),
        (_tensor, "cannot be replayed: 'image' is missing"),
        (_zero, "cannot be replayed: 'image': "),
        (_kind, "cannot be replayed: 'image': "),
        (_weights, "cannot be replayed: weights are stated by method"),
        (_target, "cannot be replayed: made for the target 'portable'"),
        (_bias, "cannot be replayed: operands could not be broadcast"),
    ],
)
def test_a_file_that_was_damaged(
    damage: Callable[[Content], None], message: str, tmp_path: Path
) -> None:
    record(CNN, tmp_path)
    file = tmp_path / "d.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    assert said(CNN, tmp_path).startswith(message)
    file.write_text("{")
    assert said(CNN, tmp_path).startswith("not JSON")


def test_another_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "has_vnni", lambda: True)
    record(MLP, tmp_path, "dynamic")
    written = (tmp_path / "first.onnx").read_bytes()
    monkeypatch.setattr(recorded, "has_vnni", lambda: False)
    report = replay(MLP, tmp_path)
    cpu = report.host.cpu
    assert report.warnings == [
        f"decisions {tmp_path / 'd.json'}: made for a CPU that multiplies 8-bit weights exactly "
        f"({cpu}); this one may saturate, so the result can be worse here"
    ]
    assert (tmp_path / "second.onnx").read_bytes() == written

    monkeypatch.setattr(compress, "has_vnni", lambda: False)
    record(MLP, tmp_path, "dynamic")
    assert replay(MLP, tmp_path).warnings == []
    monkeypatch.setattr(recorded, "has_vnni", lambda: True)
    report = replay(MLP, tmp_path)
    assert report.warnings == []
    assert report.int8 is not None
    assert report.int8.notes == [
        "made for a CPU without VNNI: weights have 7 bits, 8 would do here"
    ]


def test_another_version(tmp_path: Path) -> None:
    record(MLP, tmp_path, "dynamic")
    file = tmp_path / "d.json"
    content = json.loads(file.read_text())
    content["versions"]["onnxruntime"] = "1.2.3"
    file.write_text(json.dumps(content))
    report = replay(MLP, tmp_path)
    here = report.host.versions["onnxruntime"]
    assert report.int8 is not None
    assert report.int8.notes == [f"made with onnxruntime 1.2.3, here it is {here}"]
