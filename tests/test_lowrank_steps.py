"""Layers and embeddings split as passes: what is left, what is lost, and what is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphopt import exporter, macs
from graphopt.edit import Denial
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.manager import Pass, run_pipeline, to_text
from graphopt.passes.lowrank import embeddings, split
from graphopt.passes.lowrank.embeddings import SplitEmbeddings, spectrum_of_rows
from graphopt.passes.lowrank.forms import METHODS
from graphopt.passes.lowrank.steps import SplitLayers
from graphopt.passes.pipelines import pipeline
from graphopt.runtime import Session
from tests import graphs
from tests.optimized import applied
from tests.prune_runs import DIGITS, weighted

Array = NDArray[Any]
CALIBRATION = DIGITS / "calibration.npz"
EVALUATION = DIGITS / "evaluation.npz"


def ran(
    source: onnx.ModelProto | Path, steps: str | Sequence[Pass], denied: Sequence[Denial] = ()
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model after these passes, each sound, and what became of which root."""
    model = Model.load(source)
    chosen = pipeline(0, steps) if isinstance(steps, str) else steps
    runs = run_pipeline(model, chosen, denied=denied, verify_each=True)
    assert [run.error for run in runs if run.error] == []
    rules = (split.RULE, embeddings.RULE)
    changes = [change for run in runs for change in run.changes if change.rule in rules]
    return exporter.to_proto(model), {change.root: change.after for change in changes}


def outputs(proto: onnx.ModelProto, **feed: Array) -> Array:
    with Session(proto.SerializeToString(), optimizations="off", threads=1) as session:
        return np.asarray(next(iter(session.run(feed).values())))


def lost(expected: Array, found: Array) -> float:
    """The share of the sum of squares."""
    return float(np.sum((expected.astype(np.float64) - found) ** 2) / np.sum(expected**2.0))


def count(proto: onnx.ModelProto, **feed: Array) -> int:
    """MACs at the shapes that all values have on a feed."""
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    known = {v.name for v in whole.graph.output}
    made = (name for node in proto.graph.node for name in node.output if name not in known)
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    with Session(whole.SerializeToString(), optimizations="off", threads=1) as session:
        seen = {**feed, **session.run(feed)}
    return macs.count(proto, {name: np.shape(v) for name, v in seen.items()}).total


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def shapes(proto: onnx.ModelProto) -> list[tuple[int, ...]]:
    return sorted(tuple(tensor.dims) for tensor in proto.graph.initializer)


def tails(matrix: Array) -> Array:
    """The shares that are lost of a matrix at ranks 0, 1, ..."""
    squares = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2
    return np.asarray(np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum())


def written(path: Path, **arrays: Array) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


# -- layers: one product, and what linear algebra says ---------------------------------------------


def product(width: int = 40, height: int = 32, seed: int = 0) -> onnx.ModelProto:
    """y = x w, whose singular values fall."""
    rng = np.random.default_rng(seed)
    made = weighted(
        f"(float[n,{width}] x, float[{width},{height}] w) => (float[n,m] y) {{ y = MatMul(x, w) }}"
    )
    u, v = (np.linalg.qr(rng.standard_normal((n, height)))[0] for n in (width, height))
    array = (u * 0.8 ** np.arange(height)) @ v.T
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(array.astype(np.float32), "w"))
    return made


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_takes_the_least_rank_that_is_enough(energy: float) -> None:
    proto = product()
    w = numpy_helper.to_array(proto.graph.initializer[0])
    expected = tails(w)
    rank = int(np.argmax(expected <= 1 - energy))
    made, told = ran(proto, [SplitLayers(energy=energy)])
    assert told == {"y": f"svd ({rank},)"}
    assert shapes(made) == sorted([(40, rank), (rank, 32)])
    error = lost(w, outputs(made, x=np.eye(40, dtype=np.float32)))
    assert error == pytest.approx(expected[rank], rel=1e-4)
    assert expected[rank] <= 1 - energy < expected[rank - 1]


@pytest.mark.parametrize("energy", [0.6, 0.95, 0.999])
def test_energy_is_of_what_layers_give_on_data(energy: float, tmp_path: Path) -> None:
    """No two matrices of the rank could give what the layer gives more nearly: Eckart and Young."""
    proto, rng = product(), np.random.default_rng(1)
    x = (rng.standard_normal((600, 40)) * np.geomspace(1, 0.03, 40)[::-1]).astype(np.float32)
    y = outputs(proto, x=x)
    expected = tails(y)
    rank = int(np.argmax(expected <= 1 - energy))
    data = written(tmp_path / "x.npz", x=x)
    made, told = ran(proto, [SplitLayers(energy=energy, data=data)])
    assert told == {"y": f"svd ({rank},)"}
    assert lost(y, outputs(made, x=x)) == pytest.approx(expected[rank], rel=0.02)
    plain, _ = ran(proto, [SplitLayers(energy=energy)])
    assert shapes(plain) != shapes(made)


def test_a_bias_makes_up_for_the_mean(tmp_path: Path) -> None:
    """Of its variance 95 % are kept, however large the mean."""
    text = "(float[n,40] x, float[40,32] w, float[32] b) => (float[n,32] y) { y = Gemm(x, w, b) }"
    proto, rng = weighted(text), np.random.default_rng(2)
    scales = np.geomspace(1, 0.1, 40)
    x = (rng.standard_normal((500, 40)) * scales + 7).astype(np.float32)
    y = outputs(proto, x=x)
    expected = tails(y - y.mean(0))
    rank = int(np.argmax(expected <= 0.05))
    data = written(tmp_path / "x.npz", x=x)
    made, told = ran(proto, [SplitLayers(energy=0.95, data=data)])
    assert told == {"y": f"svd ({rank},)"}
    error = outputs(made, x=x) - y
    variance = np.sum((y - y.mean(0, dtype=np.float64)) ** 2)
    assert np.sum(error.astype(np.float64) ** 2) / variance == pytest.approx(
        expected[rank], rel=0.02
    )
    assert np.abs(error.mean(0)).max() < 1e-3 * np.abs(y).mean()


def test_what_saves_no_macs_is_not_split() -> None:
    proto = weighted("(float[n,40] x, float[40,32] w) => (float[n,32] y) { y = MatMul(x, w) }")
    w = numpy_helper.to_array(proto.graph.initializer[0])
    most = 40 * 32 // 72  # 17.8: the rank up to which it saves some
    at_most, beyond = 1 - tails(w)[most], 1 - tails(w)[most + 1]
    _, told = ran(proto, [SplitLayers(energy=at_most - 1e-6)])
    assert told == {"y": f"svd ({most},)"}
    made, told = ran(proto, [SplitLayers(energy=(at_most + beyond) / 2)])
    assert (made, told) == (proto, {})


def planted(rank: int, noise: float, shape: tuple[int, int] = (96, 64)) -> Array:
    rng = np.random.default_rng(3)
    signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return (signal + noise * rng.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_evbmf_finds_what_was_planted_and_leaves_noise(rank: int) -> None:
    text = (
        "(float[n,96] x, float[96,64] w1, float[64,96] w2) => (float[n,96] y)"
        " { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"
    )
    proto = weighted(text)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(planted(rank, 0.2), "w1"))
    _, told = ran(proto, "split-layers{evbmf=true}")
    assert told == {"h": f"svd ({rank},)"}


def test_evbmf_of_tucker_has_ranks_of_both_sides() -> None:
    proto = weighted(
        "(float[n,24,8,8] x, float[32,24,3,3] w) => (float[n,32,6,6] y) { y = Conv(x, w) }"
    )
    rng = np.random.default_rng(4)
    core = rng.standard_normal((4, 3, 3, 3))
    w = np.einsum(
        "pqhw,mp,cq->mchw", core, *(rng.standard_normal((n, r)) for n, r in ((32, 4), (24, 3)))
    )
    w += 0.01 * rng.standard_normal(w.shape)
    tensor = numpy_helper.from_array(w.astype(np.float32), "w")
    proto.graph.initializer[0].CopyFrom(tensor)
    made, told = ran(proto, [SplitLayers(evbmf=True, method="tucker")])
    assert told == {"y": "tucker (3, 4)"}
    x = rng.standard_normal((2, 24, 8, 8)).astype(np.float32)
    assert lost(outputs(proto, x=x), outputs(made, x=x)) < 1e-3


# -- layers: models --------------------------------------------------------------------------------

CONVOLUTION = (
    "(float[n,16,9,9] x, float[32,16,3,3] w1, float[32] b1, float[24,32,3,3] w2) =>"
    " (float[n,24,5,5] y) { h = Conv(x, w1, b1) r = Relu(h) y = Conv(r, w2) }"
)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_only_one(method: str) -> None:
    proto = weighted(CONVOLUTION)
    made, told = ran(proto, f"split-layers{{keep=0.6, method={method}}}")
    if method == "svd":  # of products, and there are none
        assert (made, told) == (proto, {})
        return
    assert told
    assert {after.split()[0] for after in told.values()} == {method}
    x = np.random.default_rng(0).standard_normal((2, 16, 9, 9)).astype(np.float32)
    assert count(made, x=x) <= 0.6 * count(proto, x=x)
    assert outputs(made, x=x).shape == (2, 24, 5, 5)


@pytest.mark.parametrize("data", ["", str(CALIBRATION)])
@pytest.mark.parametrize("keep", [0.7, 0.4])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_keep_is_the_share_of_macs_that_is_left(name: str, keep: float, data: str) -> None:
    path = DIGITS / f"{name}.onnx"
    made, told = ran(path, f"split-layers{{keep={keep}, data={data}}}")
    feed = {k: v[:2] for k, v in np.load(EVALUATION).items() if k != "label"}
    feed = {port: feed[port] for port in [v.name for v in onnx.load(path).graph.input]}
    left = count(made, **feed) / count(onnx.load(path), **feed)
    assert told
    assert keep - 0.1 < left <= keep


def test_where_so_few_cannot_be_left_as_many_go_as_can() -> None:
    """No layer of this model has a form that is cheaper than those that are taken."""
    path = DIGITS / "vit.onnx"
    most, told = ran(path, [SplitLayers(keep=0.01)])
    assert ran(path, [SplitLayers(keep=0.3)]) == (most, told)
    assert set(told.values()) == {"svd (8,)", "svd (1,)"}


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_data_makes_up_for_what_is_lost(name: str) -> None:
    path = DIGITS / f"{name}.onnx"
    feeds = np.load(EVALUATION)
    feed = {v.name: feeds[v.name][:200] for v in onnx.load(path).graph.input}
    expected = outputs(onnx.load(path), **feed)
    errors = [
        lost(expected, outputs(ran(path, [SplitLayers(keep=0.5, data=data)])[0], **feed))
        for data in ("", str(CALIBRATION))
    ]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("options", ["keep=0.5", "energy=0.7", "evbmf=true"])
def test_level_2_does_not_undo_it(name: str, options: str) -> None:
    path = DIGITS / f"{name}.onnx"
    text = f"split-layers{{{options}, data={CALIBRATION}}}"
    model = Model.load(path)
    run_pipeline(model, pipeline(2, None))
    level2 = exporter.to_proto(model)
    feeds = np.load(EVALUATION)
    feed = {v.name: feeds[v.name][:16] for v in level2.graph.input}
    once, told = ran(level2, text)
    assert told
    assert count(once, **feed) < count(level2, **feed)
    again = Model.load(once)
    run_pipeline(again, pipeline(2, None), verify_each=True)
    made = exporter.to_proto(again)
    assert count(made, **feed) <= count(once, **feed)
    assert len(made.graph.initializer) <= len(once.graph.initializer)
    np.testing.assert_allclose(outputs(made, **feed), outputs(once, **feed), rtol=0, atol=1e-4)


def test_projections_that_are_split_are_merged_as_parts() -> None:
    """Three first parts of one value become one product, each second part stays."""
    text = (
        "(float[2,5,64] x, float[64,64] w1, float[64,64] w2, float[64,64] w3) =>"
        " (float[2,5,64] y1, float[2,5,64] y2, float[2,5,64] y3)"
        " { y1 = MatMul(x, w1) y2 = MatMul(x, w2) y3 = MatMul(x, w3) }"
    )
    proto = weighted(text)
    once, told = ran(proto, [SplitLayers(keep=0.5)])
    assert len(told) == 3
    made, _ = ran(once, pipeline(2, None))
    assert Counter(operators(made)) == {"MatMul": 4, "Split": 1}
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    assert count(made, x=x) == count(once, x=x) <= 0.5 * count(proto, x=x)


def test_a_denied_layer_stays_and_others_take_its_place() -> None:
    proto = weighted(CONVOLUTION)
    _, told = ran(proto, [SplitLayers(keep=0.7)])
    assert "h" in told
    made, told = ran(proto, [SplitLayers(keep=0.7)], denied=[(split.RULE, "h")])
    assert set(told) == {"y"}
    assert made.graph.initializer[0] == proto.graph.initializer[0]
    made, told = ran(proto, [SplitLayers(keep=0.7)], denied=[(split.RULE, None)])
    assert (made, told) == (proto, {})


def test_it_leaves_no_trace_where_it_is_undone(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((8, 16, 9, 9)).astype(np.float32)
    step = SplitLayers(keep=0.5, data=written(tmp_path / "x.npz", x=x))
    made, edit = applied(weighted(CONVOLUTION), lambda edit: step.run(edit.model, edit))
    assert {change.rule for change in edit.changes} == {split.RULE}
    assert len(operators(made)) > 3


def test_a_model_without_layers_stays() -> None:
    proto = weighted("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    assert ran(proto, [SplitLayers(keep=0.5)]) == (proto, {})


def test_open_sizes_are_those_of_a_run() -> None:
    """The second layer is applied to a hundred times as many rows as the first."""
    text = (
        "(float[n,32] x, float[k,32] x2, float[32,32] w1, float[32,32] w2) =>"
        " (float[n,32] y, float[k,32] z) { y = MatMul(x, w1) z = MatMul(x2, w2) }"
    )
    feeds = {"x": np.ones((1, 32), np.float32), "x2": np.ones((100, 32), np.float32)}
    proto = weighted(text)
    proto.graph.initializer[1].CopyFrom(proto.graph.initializer[0])
    proto.graph.initializer[1].name = "w2"
    _, told = ran(proto, [SplitLayers(keep=0.9, data=f"{__file__}:rows")])
    assert count(proto, **feeds) == 101 * 32 * 32
    assert set(told) == {"z"}


def rows() -> list[dict[str, Array]]:
    """Feeds of the test above."""
    rng = np.random.default_rng(0)
    sizes = {"x": 1, "x2": 100}
    return [
        {name: rng.standard_normal((n, 32)).astype(np.float32) for name, n in sizes.items()}
        for _ in range(40)
    ]


@pytest.mark.parametrize("step", [SplitLayers(), SplitEmbeddings()])
def test_without_options_nothing_is_split(step: Pass) -> None:
    model = Model.load(product())
    run_pipeline(model, [step])
    assert not model.graph.edited


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            SplitLayers(keep=0.5, energy=0.5),
            "split-layers: say how far in one way: keep, energy or evbmf",
        ),
        (
            SplitLayers(keep=0.5, evbmf=True),
            "split-layers: say how far in one way: keep, energy or evbmf",
        ),
        (SplitLayers(keep=1.0), "keep 1.0: it is above 0 and below 1"),
        (SplitLayers(keep=-0.1), "keep -0.1: it is above 0 and below 1"),
        (SplitLayers(energy=1.5), "energy 1.5: it is above 0 and below 1"),
        (
            SplitLayers(keep=0.5, method="qr"),  # type: ignore[arg-type]
            "method 'qr': there are auto, svd, channel, spatial, tucker, cp",
        ),
        (
            SplitLayers(evbmf=True, method="cp"),
            "evbmf: it gives ranks of matrices, and cp has none",
        ),
        (
            SplitEmbeddings(keep=0.5, energy=0.5),
            "split-embeddings: say how far in one way: keep or energy",
        ),
        (SplitEmbeddings(keep=2.0), "keep 2.0: it is above 0 and below 1"),
        (SplitEmbeddings(energy=-1.0), "energy -1.0: it is above 0 and below 1"),
    ],
)
def test_options_that_contradict_are_refused(step: Pass, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        run_pipeline(Model.load(product()), [step])
    assert str(caught.value) == message


def test_pipelines_are_text_that_round_trips() -> None:
    text = "split-layers{keep=0.5}, split-embeddings{energy=0.9, data=a.npz}"
    steps = pipeline(2, text)
    assert steps == [SplitLayers(keep=0.5), SplitEmbeddings(energy=0.9, data="a.npz")]
    assert ", ".join(to_text(step) for step in steps) == text
    text = "split-layers{method=cp, energy=0.5}, split-layers{evbmf=true}"
    assert ", ".join(to_text(step) for step in pipeline(2, text)) == text


def test_who_does_not_split_does_not_wait_for_scipy() -> None:
    code = "import sys, graphopt.passes.pipelines; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- embeddings ------------------------------------------------------------------------------------

V, D = 200, 48


def table(rank: int = 12, noise: float = 0.3, size: int = V) -> Array:
    return planted(rank, noise, (size, D))


def lookup(
    array: Array, body: str = "y = Gather(t, x)", head: str = "int64[n] x", opset: int = 17
) -> onnx.ModelProto:
    """Rows of a table t."""
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> g ({head}) => (float y) {{ {body} }}'
    made = onnx.parser.parse_model(text)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    made.graph.initializer.append(numpy_helper.from_array(array, "t"))
    return made


def whole(proto: onnx.ModelProto, size: int = V) -> Array:
    """All rows as the model gives them."""
    return outputs(proto, x=np.arange(size))


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.1])
@pytest.mark.parametrize("size", [V, 90, 40])
def test_keep_is_the_share_of_numbers_that_is_left(keep: float, size: int, tmp_path: Path) -> None:
    array = table(size=size) if size >= D else np.tile(table(size=size), 3)
    width = array.shape[1]
    proto = lookup(array)
    made, told = ran(proto, f"split-embeddings{{keep={keep}}}")
    rank = int(keep * array.size / (size + width))
    assert told == {"y": f"rank {rank}"}
    assert shapes(made) == sorted([(size, rank), (rank, width)])
    numbers = sum(np.prod(shape) for shape in shapes(made))
    assert numbers <= keep * array.size < numbers + size + width
    assert lost(array, whole(made, size)) == pytest.approx(tails(array)[rank], rel=1e-3, abs=1e-9)
    sizes = []
    for each, name in ((proto, "a.onnx"), (made, "b.onnx")):
        exporter.save(Model.load(each), tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] - sizes[1] == pytest.approx(4 * (array.size - numbers), abs=400)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
def test_energy_of_a_table(energy: float) -> None:
    array = table()
    expected = tails(array)
    rank = int(np.argmax(expected <= 1 - energy))
    made, told = ran(lookup(array), [SplitEmbeddings(energy=energy)])
    assert told == {"y": f"rank {rank}"}
    assert lost(array, whole(made)) == pytest.approx(expected[rank], rel=1e-3)


INDICES = {
    "scalar": ("int64 x", np.array(7)),
    "vector": ("int64[n] x", np.array([3, -1, 0, -V, V - 1])),
    "matrix": ("int64[n,k] x", np.array([[1, 2, 3], [4, -5, 6]])),
    "int32": ("int32[n,k] x", np.array([[1, 2, 3], [4, -5, 6]], np.int32)),
    "nothing": ("int64[n] x", np.zeros(0, np.int64)),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("opset", [7, 13, 21])
def test_indices_of_any_shape(name: str, opset: int) -> None:
    head, x = INDICES[name]
    array = table(noise=0)
    proto = lookup(array, head=head, opset=opset)
    made, told = ran(proto, [SplitEmbeddings(keep=0.9)])
    assert told
    found = outputs(made, x=x)
    assert found.shape == (*x.shape, D)
    np.testing.assert_allclose(found, array[x], atol=1e-4)


def test_rows_count_as_often_as_they_are_looked_up_and_once_more(tmp_path: Path) -> None:
    """Nothing of that rank gives less error in the mean: Eckart and Young, rows scaled."""
    array = np.random.default_rng(5).standard_normal((V, D)).astype(np.float32)
    often, rng = np.arange(20), np.random.default_rng(6)
    feeds = np.concatenate([rng.choice(often, 4000), rng.integers(0, V, 500)])
    counts = np.bincount(feeds, minlength=V)
    step = SplitEmbeddings(keep=0.6, data=written(tmp_path / "x.npz", x=feeds))
    made, told = ran(lookup(array), [step])
    rank = int(0.6 * array.size / (V + D))
    assert told == {"y": f"rank {rank}"}
    scale = np.sqrt(counts + 1.0)[:, None]
    found = whole(made)
    assert lost(array * scale, found * scale) == pytest.approx(tails(array * scale)[rank], rel=1e-3)
    plain = whole(ran(lookup(array), [SplitEmbeddings(keep=0.6)])[0])
    assert lost(array[often], found[often]) < 0.3 * lost(array[often], plain[often])
    rare = np.flatnonzero(counts == 0)
    assert lost(array[rare], found[rare]) < 2 * lost(array[rare], plain[rare])


def test_lookups_are_counted_wherever_indices_come_from(tmp_path: Path) -> None:
    """Of an input, computed, constant, negative, and the same ones by two nodes."""
    body = (
        "c = Constant<value = int64[3] {7, 7, 190}>() o = Constant<value = int64 {1}>()"
        " i = Sub(x, o) a = Gather(t, x) b = Gather(t, i) d = Gather(t, c) e = Gather(t, x)"
        " y = Concat<axis=0>(a, b, d, e)"
    )
    array = table()
    x = np.array([0, 0, 5, -3, 100] * 30)
    counts = np.zeros(V)
    for each in (x, x, x - 1, np.array([7, 7, 190])):
        np.add.at(counts, each, 1)
    data = written(tmp_path / "x.npz", x=x)
    made, told = ran(lookup(array, body), [SplitEmbeddings(energy=0.9, data=data)])
    expected = spectrum_of_rows(array, counts)
    scale = np.sqrt(counts + 1)[:, None]
    errors = tails(array * scale)
    rank = int(np.argmax(errors <= 0.1))
    np.testing.assert_allclose(expected.errors(range(D)), errors[:D], atol=1e-9)
    assert told == {"a": f"rank {rank}"}
    assert Counter(operators(made))["MatMul"] == 4
    assert [s for s in shapes(made) if len(s) == 2] == sorted([(V, rank), (rank, D)])
    near = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    first, last = near["t/factor"], near["t/factor_2"]
    assert lost(array * scale, first @ last * scale) == pytest.approx(errors[rank], rel=1e-3)
    reads = np.concatenate([x, x - 1, [7, 7, 190], x])
    np.testing.assert_allclose(outputs(made, x=x), (first @ last)[reads], atol=1e-4)


def test_few_lookups_tell_little() -> None:
    """Three of them do not make the table forget the other rows."""
    array = table(noise=1)
    counts = np.zeros(V)
    counts[:3] = 1
    few, none = spectrum_of_rows(array, counts), spectrum_of_rows(array)
    ranks = [4, 12, 30]
    np.testing.assert_allclose(few.errors(ranks), none.errors(ranks), rtol=0.05)


STAY = {
    "a projection reads it": "a = Gather(t, x) b = Transpose(t) y = MatMul(a, b)",
    "another axis": "y = Gather<axis=1>(t, x)",
    "a row of it": "a = Gather(t, x) b = ReduceSum<keepdims=0>(t) y = Add(a, b)",
}


@pytest.mark.parametrize("name", STAY)
def test_tables_that_others_read_stay(name: str) -> None:
    proto = lookup(table(), STAY[name])
    assert ran(proto, [SplitEmbeddings(keep=0.5)]) == (proto, {})


def test_tables_that_callers_may_replace_or_read_stay() -> None:
    proto = lookup(table())
    proto.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, (V, D)))
    assert ran(proto, [SplitEmbeddings(keep=0.5)]) == (proto, {})
    proto = lookup(table())
    proto.graph.output.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, (V, D)))
    assert ran(proto, [SplitEmbeddings(keep=0.5)]) == (proto, {})


@pytest.mark.parametrize(
    "array",
    [
        table().astype(np.float64),
        table().astype(np.float16),
        table()[:80],
        np.where(np.arange(D) == 3, np.inf, table()).astype(np.float32),
        table().reshape(V, D // 2, 2),
    ],
    ids=["float64", "float16", "small", "infinite", "three axes"],
)
def test_tables_of_other_kinds_stay(array: Array) -> None:
    proto = lookup(array)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    proto.graph.output[0].type.tensor_type.elem_type = kind
    assert ran(proto, [SplitEmbeddings(keep=0.5)]) == (proto, {})


def test_ranks_that_save_nothing_are_not_taken() -> None:
    array = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
    most = (V * D - 1) // (V + D)
    kept = 1 - tails(array)
    _, told = ran(lookup(array), [SplitEmbeddings(energy=float(kept[most]) - 1e-6)])
    assert told == {"y": f"rank {most}"}
    proto = lookup(array)
    assert ran(proto, [SplitEmbeddings(energy=float(kept[most + 1]) - 1e-6)]) == (proto, {})
    assert ran(proto, [SplitEmbeddings(keep=0.02)]) == (proto, {})  # below one of rank 1
    denied = [(embeddings.RULE, "y")]
    assert ran(proto, [SplitEmbeddings(keep=0.5)], denied) == (proto, {})


def test_tied_tables_can_be_split_on_both_sides() -> None:
    """Once its projection reads factors of its own, only lookups are left."""
    body = "a = Gather(t, x) b = Tanh(a) k = Transpose<perm=[1,0]>(t) y = MatMul(b, k)"
    array, x = table(noise=0.01), np.arange(30)
    proto = lookup(array, body)
    middle, told = ran(proto, [SplitLayers(energy=0.99)])
    assert set(told) == {"y"}
    assert (V, D) in shapes(middle)
    made, told = ran(middle, [SplitEmbeddings(energy=0.99)])
    assert set(told) == {"a"}
    assert (V, D) not in shapes(made)
    assert sum(np.prod(s) for s in shapes(made)) < 0.7 * array.size
    assert lost(outputs(proto, x=x), outputs(made, x=x)) < 0.05


def test_lookups_in_bodies_are_split_too(tmp_path: Path) -> None:
    body = (
        "y = If(c) <then_branch = t1 () => (float u) { u = Gather(t, x) },"
        " else_branch = e1 () => (float v) { w = Gather(t, x) v = Neg(w) }>"
    )
    array = table(noise=0)
    proto = lookup(array, body, "int64[n] x, bool c")
    for node in proto.graph.node:
        for attribute in node.attribute:
            attribute.g.output[0].type.tensor_type.ClearField("shape")
    x = np.array([4, 60, -1])
    data = written(tmp_path / "x.npz", x=x[None], c=np.array([True]))
    for step in (SplitEmbeddings(keep=0.9), SplitEmbeddings(keep=0.9, data=data)):
        made, told = ran(proto, [step])
        assert len(told) == 1
        for given, sign in ((True, 1), (False, -1)):
            found = outputs(made, x=x, c=np.array(given))
            np.testing.assert_allclose(found, sign * array[x], atol=1e-4)


def test_old_files_list_their_tables_as_inputs() -> None:
    proto = lookup(table(noise=0), opset=8)
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, (V, D)))
    made, told = ran(proto, [SplitEmbeddings(keep=0.9)])
    assert told == {"y": "rank 34"}
    assert [info.name for info in made.graph.input] == ["x"]
    np.testing.assert_allclose(whole(made), table(noise=0), atol=1e-4)


def test_level_2_does_not_put_tables_together() -> None:
    body = (
        "p = Constant<value = int64[2] {5, 6}>() a = Gather(t, x) b = Mul(a, s)"
        " y = LayerNormalization<axis=-1>(b, g)"
    )
    array = table()
    proto = lookup(array, body)
    rng = np.random.default_rng(0)
    for name in "sg":
        tensor = numpy_helper.from_array(rng.standard_normal(D).astype(np.float32), name)
        proto.graph.initializer.append(tensor)
    once, told = ran(proto, [SplitEmbeddings(keep=0.5)])
    assert told
    made, _ = ran(once, pipeline(2, None))
    assert max(np.prod(shape) for shape in shapes(made)) == max(map(np.prod, shapes(once)))
    assert Counter(operators(made))["Gather"] == 1
    np.testing.assert_allclose(whole(made), whole(once), atol=1e-4)


def test_a_table_leaves_no_trace_where_it_is_undone() -> None:
    step = SplitEmbeddings(keep=0.5)
    proto = graphs.model(
        [helper.make_node("Gather", ["t", "x"], ["y"])],
        [graphs.value("x", (3,), TensorProto.INT64)],
        [graphs.value("y", (3, D))],
        [numpy_helper.from_array(table(), "t")],
    )
    made, edit = applied(proto, lambda edit: step.run(edit.model, edit))
    assert [change.rule for change in edit.changes] == [embeddings.RULE]
    assert operators(made) == ["Gather", "MatMul"]
