"""What the search for splits goes by: times of layers in their model, harm that errors do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import exporter, split_harm, split_times
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model
from graphopt.passes.fitting import Settings
from graphopt.passes.linear import linear_layers
from graphopt.passes.lowrank.options import AUTOMATIC
from graphopt.passes.lowrank.table import Ranks, tabulate
from graphopt.passes.work import sizes_wanted
from graphopt.split_harm import harms
from graphopt.split_times import SLACK, SplitTimes, arbitrary
from graphopt.statistics import sweep
from tests.prune_runs import DIGITS, correlated, feeds, weighted

WIDE = (
    "(float[n,3,24,24] x, float[64,3,3,3] w1, float[64,64,3,3] w2, float[64] b2, float[96,64] w3,"
    " float[96] b3) => (float[n,96] y) { a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a)"
    " c = Conv<pads=[1,1,1,1]>(b, w2, b2) d = Relu(c) p = GlobalAveragePool(d) f = Flatten(p)"
    " y = Gemm<transB=1>(f, w3, b3) }"
)


def table(path: Path, given: list[Any]) -> Ranks:
    model = Model.load(path)
    seen = sweep(path, given[:1], sizes_wanted(model))
    shapes = {v: seen.shape(v).first for v in seen.values if seen.has_shape(v)}
    return tabulate(model, shapes, AUTOMATIC, lambda: iter(given), Settings())


def saved(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    exporter.save(Model.load(weighted(text)), path)
    return path


# -- times -----------------------------------------------------------------------------------------


def measured(folder: Path, **options: Any) -> tuple[Ranks, SplitTimes]:
    path, given = saved(folder, WIDE), correlated((1, 3, 24, 24))
    ranks = table(path, given)
    shown: list[float] = []
    times = SplitTimes(path, ranks, given[0], 1, (), folder, shown.append)
    assert shown == sorted(shown)
    assert all(0 <= share <= 1 for share in shown)
    return ranks, times


def test_every_option_has_a_time(tmp_path: Path) -> None:
    ranks, times = measured(tmp_path)
    roots = [group.root for group in ranks.groups]
    assert roots == ["a", "c", "y"]
    assert set(times.dense) == set(roots)
    assert times.dense["c"] > 5 * times.dense["y"] > 0
    for group in ranks.groups:
        for option in ranks.options[group.root]:
            assert 0 < times.estimate(group.root, option) < 100
    # An eighth of the work does not take as long as all of it.
    group = ranks.groups[1]
    least = min(ranks.options["c"], key=lambda option: option.macs)
    assert least.macs < group.macs / 8
    assert times.estimate("c", least) < 0.8 * times.dense["c"]


def test_what_was_not_timed_lies_between_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_times, "_SECONDS", 1e-9)
    monkeypatch.setattr(split_times, "_LEAST", 0)
    ranks, times = measured(tmp_path)
    option = next(option for option in ranks.options["c"] if option.method is not None)
    assert times.estimate("c", option) == math.inf  # nothing was
    times._points[("c", "tucker")] = {1000: 1.0, 3000: 2.0}
    between = next(o for o in ranks.options["c"] if o.method == "tucker")
    assert times.estimate("c", replace(between, macs=2000)) == pytest.approx(1.5)
    assert times.estimate("c", replace(between, macs=3001)) == math.inf
    assert times.estimate("c", ranks.options["c"][0]) == times.dense["c"]


def test_slow_models_are_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_times, "_SECONDS", 1e-9)
    ranks, times = measured(tmp_path)
    options = [option for option in ranks.options["c"] if option.method is not None]
    known = [o for o in options if math.isfinite(times.estimate("c", o))]
    assert split_times._LEAST <= len(known) < len(options)


def test_what_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_times, "_SECONDS", 1e-9)
    ranks, times = measured(tmp_path)
    group, option = ranks.groups[1], ranks.options["c"][1]
    ratio = option.macs / group.macs
    times.dense["c"] = 2.0
    assert times.pays(group, option, 2.0 * (ratio + SLACK - 0.001))
    assert not times.pays(group, option, 2.0 * (ratio + SLACK + 0.001))
    times.dense["c"] = 0.0  # it was not seen to run
    assert not times.pays(group, option, 0.0)


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "cp"])
def test_arbitrary_numbers_in_the_right_shapes(method: Any) -> None:
    layer = linear_layers(Editor(Model.load(weighted(WIDE))))[1]
    split = arbitrary(layer, method, 8)
    assert split.effective.shape == layer.shape
    assert np.abs(split.effective).max() < 100


def test_options_come_in_an_order_that_is_spread() -> None:
    assert split_times._scattered(list("abcdefgh")) == list("aecgbfdh")  # type: ignore[arg-type,comparison-overlap]
    assert split_times._scattered([]) == []
    assert len(set(split_times._scattered(list(range(13))))) == 13  # type: ignore[arg-type]


# -- harm ------------------------------------------------------------------------------------------

TWO = (
    "(float[n,64] x, float[64,64] w1, float[64,64] w2, float[64,8] w3, float[64,8] w4)"
    " => (float[n,8] y) { a = MatMul(x, w1) b = MatMul(x, w2)"
    " c = MatMul(a, w3) d = MatMul(b, w4) y = Add(c, d) }"
)


def found_harms(path: Path, given: list[Any], folder: Path, **options: Any) -> dict[str, float]:
    return harms(
        path,
        table(path, given).probes,
        given,
        {"y": None},
        threads=1,
        custom_ops=(),
        folder=folder,
        progress=lambda share: None,
        **options,
    )


def test_harm_is_that_of_the_outputs(tmp_path: Path) -> None:
    proto = weighted(TWO)
    for tensor in proto.graph.initializer:
        if tensor.name == "w4":  # what comes through it counts a hundredth
            array = onnx.numpy_helper.to_array(tensor) * np.float32(0.1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w4"))
    path = tmp_path / "model.onnx"
    exporter.save(Model.load(proto), path)
    found = found_harms(path, correlated((32, 64)), tmp_path)
    assert list(found) == ["a", "b", "c", "d"]
    ratio = found["a"] / found["b"]
    assert ratio == pytest.approx(100**0.5, rel=0.35)  # of squares, drawn together
    assert found["c"] / found["d"] == pytest.approx(100**0.5, rel=0.35)


def test_a_layer_that_nothing_reads_does_least_harm(tmp_path: Path) -> None:
    path = saved(tmp_path, TWO.replace("y = Add(c, d)", "z = Sub(d, d) y = Add(c, z)"))
    found = found_harms(path, correlated((32, 64)), tmp_path)
    assert found["b"] == found["d"] == pytest.approx(split_harm._LEAST * max(found.values()))


def test_where_it_fails_the_harm_is_infinite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, given = saved(tmp_path, TWO), correlated((32, 64))
    real = split_harm.compare

    def compare(original: Any, candidate: Any, *rest: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeFailure("no")
        return real(original, candidate, *rest, **options)

    calls: list[int] = []
    monkeypatch.setattr(split_harm, "compare", compare)
    found = found_harms(path, given, tmp_path)
    assert found["b"] == math.inf
    assert all(math.isfinite(found[root]) for root in "acd")


def test_large_models_run_fewer_feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, given = saved(tmp_path, TWO), correlated((32, 64))
    used: list[int] = []
    real = split_harm.compare

    def compare(original: Any, candidate: Any, some: Any, **options: Any) -> Any:
        used.append(len(some))
        return real(original, candidate, some, **options)

    monkeypatch.setattr(split_harm, "compare", compare)
    found_harms(path, given, tmp_path)
    monkeypatch.setattr(split_harm, "_SECONDS", 0.0)
    found_harms(path, given, tmp_path)
    assert used == [len(given)] * 4 + [1] * 4


def test_a_real_model(tmp_path: Path) -> None:
    given = list(feeds())
    ranks = table(DIGITS / "vit.onnx", given)
    found = harms(
        DIGITS / "vit.onnx",
        ranks.probes,
        given,
        {},
        threads=1,
        custom_ops=(),
        folder=tmp_path,
        progress=lambda share: None,
    )
    assert set(found) == {group.root for group in ranks.groups}
    assert all(0 < harm < math.inf for harm in found.values())
