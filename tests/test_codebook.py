"""Weights as tables and indices: the division of numbers, the rewrite, and the step."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from rich.console import Console

from graphopt import codebook_search, exporter, optimize
from graphopt.account import Remarks, Sizes
from graphopt.codebook import Codebook
from graphopt.codebook_report import NO_SPEED, CodebookDecision, CodebookRecord
from graphopt.codebook_search import BitsAsked
from graphopt.decisions import Decisions
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.judging import Budget
from graphopt.kernels.codebook import EXACT, codebook
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import pipeline
from graphopt.passes.prune.sparse import Sparsify
from graphopt.passes.quantize.codebook import CodebookRecipe, CodebookWeights, table_of
from graphopt.passes.quantize.weights import make_weight_only
from graphopt.recorded import blank_decisions
from graphopt.render.codebook import show_codebook
from graphopt.render.results import show_report
from graphopt.runtime import Session
from tests import graphs
from tests.optimized import applied, operators, run, sqnr, stored
from tests.prune_runs import DATA, DIGITS

Array = NDArray[Any]
RNG = np.random.default_rng(0)

# -- numbers ---------------------------------------------------------------------------------------


def least_error(x: Array, entries: int, weights: Array) -> float:
    """Of all divisions of the sorted numbers into ranges."""
    order = np.argsort(x)
    x, weights = x[order].astype(np.float64), weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), entries - 1):
        total = 0.0
        for first, end in itertools.pairwise((0, *cuts, len(x))):
            mass, part = weights[first:end], x[first:end]
            if mass.any():
                total += float((mass * (part - np.average(part, weights=mass)) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_few_numbers_are_divided_as_well_as_can_be(weighted: bool, offset: float) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        entries = int(rng.integers(2, 6))
        x = (rng.standard_normal(rng.integers(entries + 1, 12)) + offset).astype(np.float32)
        weights = rng.random(len(x)) * (rng.random(len(x)) > 0.2) if weighted else np.ones(len(x))
        weights[0] = 1.0
        found = codebook(x, entries, importance=weights if weighted else None)
        assert len(found.table) <= entries
        assert found.error <= least_error(x, entries, weights) * (1 + 1e-3) + 1e-9
        lost = weights * (x.astype(np.float64) - found.values) ** 2
        assert found.error == pytest.approx(float(lost.sum()))


@pytest.mark.parametrize("entries", [16, 256])
@pytest.mark.parametrize("outliers", [0, 3])
def test_many_numbers_are_divided_nearly_as_well_as_few(entries: int, outliers: int) -> None:
    """Lloyd's iterations from anywhere lose more; from quantiles some 5 dB at 256 entries."""
    x = RNG.standard_t(5, 40_000).astype(np.float32)
    x[:outliers] = [90.0, -70.0, 95.0][:outliers]
    found = codebook(x, entries)
    assert len(found.table) == entries
    line = np.sort(x).astype(np.float64)
    for start in (
        np.quantile(line, (np.arange(entries) + 0.5) / entries),
        np.linspace(line[0], line[-1], entries),
        RNG.choice(line, entries, replace=False),
    ):
        centres = np.sort(start)
        for _ in range(200):
            groups = np.searchsorted((centres[:-1] + centres[1:]) / 2, line)
            counts = np.bincount(groups, minlength=entries)
            sums = np.bincount(groups, line, entries)
            centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
        groups = np.searchsorted((centres[:-1] + centres[1:]) / 2, line)
        assert found.error <= ((line - centres[groups]) ** 2).sum() * 1.0001


@pytest.mark.parametrize("far", [(-7.5, -5.2), (8.0, 11.0, -9.0, 6.0)])
def test_far_outliers_do_not_share_an_entry(far: tuple[float, ...]) -> None:
    """As in MiniLM: 100 standard deviations away, where one entry for two loses 20 dB of all."""
    x = (RNG.standard_normal(500_000) * 0.045).astype(np.float32)
    x[: len(far)] = far
    found = codebook(x, 256)
    assert np.array_equal(found.values[: len(far)], x[: len(far)])
    assert 10 * np.log10(np.square(x, dtype=np.float64).sum() / found.error) > 41


def test_no_entry_can_be_moved_for_the_better() -> None:
    x = RNG.standard_normal(EXACT * 20).astype(np.float32)
    found = codebook(x, 16)
    assert (np.abs(x[:, None] - found.table).min(axis=1) == np.abs(x - found.values)).all()
    for entry, value in enumerate(found.table):
        assert value == pytest.approx(float(x[found.indices == entry].mean()), abs=1e-6)


def test_what_matters_is_kept_closer() -> None:
    x = RNG.standard_normal((64, 50)).astype(np.float32)
    importance = np.where(x > 1, 100.0, 1.0)
    plain, told = codebook(x, 16), codebook(x, 16, importance=importance)
    assert told.indices.shape == x.shape
    there = x > 1
    assert ((told.values - x)[there] ** 2).sum() < 0.5 * ((plain.values - x)[there] ** 2).sum()
    assert told.error < (importance * (plain.values - x) ** 2).sum()
    rows = np.arange(64.0)[:, None]  # it broadcasts, and may be none at all
    assert codebook(x, 16, importance=rows).error < (rows * (plain.values - x) ** 2).sum()
    nothing = codebook(x, 16, importance=np.zeros(1))
    assert np.array_equal(nothing.values, plain.values)


def test_few_distinct_numbers_lose_nothing() -> None:
    for count in (1, 2, 15, 16):
        numbers = RNG.standard_normal(count).astype(np.float32) * 1e-20
        x = RNG.choice(numbers, (7, 11))
        found = codebook(x, 16, importance=RNG.random((7, 11)))
        assert found.error == 0
        assert np.array_equal(found.values, x)
        assert len(found.table) == len(np.unique(x))
    assert np.array_equal(codebook(np.array([-0.0, 1.0, 0.0]), 2).values, [0.0, 1.0, 0.0])
    assert codebook(np.zeros((0, 3)), 16).indices.shape == (0, 3)


def test_numbers_that_do_not_matter_go_to_the_nearest() -> None:
    x = np.array([0.0, 1.0, 2.0, 9.0], np.float32)
    found = codebook(x, 2, importance=np.array([1.0, 0.0, 1.0, 0.0]))
    assert found.error == 0
    assert found.values.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_zeros_stay_zeros_where_that_is_asked() -> None:
    x = RNG.standard_normal(9000).astype(np.float32) + np.float32(0.05)
    x[::2] = 0
    assert 0 in codebook(x, 16, keep_zero=True).table
    found = codebook(x, 16, keep_zero=True)
    assert (found.values[::2] == 0).all()
    assert len(found.table) == 16


def test_the_same_numbers_give_the_same_table() -> None:
    x = RNG.standard_normal((300, 40)).astype(np.float32)
    one, two = codebook(x, 256), codebook(np.asfortranarray(x), 256)
    assert one.table.tobytes() == two.table.tobytes()
    assert np.array_equal(one.indices, two.indices)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="2 to 256 entries, not 257"):
        codebook(np.zeros(3), 257)
    with pytest.raises(ValueError, match="not finite"):
        codebook(np.array([1.0, np.nan]), 16)
    with pytest.raises(ValueError, match="importance is 0 or more"):
        codebook(np.ones(2), 16, importance=np.array([1.0, -1.0]))


# -- the rewrite -----------------------------------------------------------------------------------


def weights(*shape: int, seed: int = 0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) / 8).astype(np.float32)


def reading(op: str, opset: int = 21) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of one layer with weights w, and r of a recurrent one, and a feed."""
    held = {"w": weights(48, 32)}
    x: Array = RNG.standard_normal((4, 48)).astype(np.float32)
    more: dict[str, Any] = {}
    if op == "Gather":
        x = RNG.integers(0, 48, (3, 4))
    elif op in ("Conv", "ConvTranspose"):
        held, x = {"w": weights(16, 16, 3, 3)}, RNG.standard_normal((1, 16, 9, 9))
    elif op in ("LSTM", "GRU", "RNN"):
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
        held = {"w": weights(1, gates * 40, 32), "r": weights(1, gates * 40, 40)}
        x, more = RNG.standard_normal((6, 1, 32)), {"hidden_size": 40}
    x = x if op == "Gather" else x.astype(np.float32)
    element = TensorProto.INT64 if op == "Gather" else TensorProto.FLOAT
    inputs = ["w", "x"] if op == "Gather" else ["x", *held]
    ranks = {"Conv": 4, "ConvTranspose": 4, "Gather": 3, "LSTM": 4, "GRU": 4, "RNN": 4}
    made = graphs.model(
        [graphs.node(op, inputs, ["y"], **more)],
        [graphs.value("x", x.shape, element)],
        [graphs.value("y", [f"y{axis}" for axis in range(ranks.get(op, 2))])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
        opset=opset,
    )
    return made, {"x": x}


def coded(before: onnx.ModelProto, bits: int, least: int = 1024) -> tuple[onnx.ModelProto, Editor]:
    def change(edit: Editor) -> None:
        CodebookWeights(bits, least).run(edit.model, edit)

    return applied(before, change)


def substituted(before: onnx.ModelProto, bits: int, **zeros: bool) -> onnx.ModelProto:
    """The model with what tables keep of all its weights stored as floats."""
    made = onnx.ModelProto()
    made.CopyFrom(before)
    for tensor in made.graph.initializer:
        kept = codebook(numpy_helper.to_array(tensor), 1 << bits, **zeros).values
        tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
    return made


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "op", ["Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM", "GRU", "RNN"]
)
def test_layers_compute_what_they_do_with_the_tables_numbers(op: str, bits: int) -> None:
    before, feed = reading(op)
    made, edit = coded(before, bits)
    assert {change.rule for change in edit.changes} == {"store-codebook"}
    dense = substituted(before, bits)
    assert np.array_equal(run(made, **feed), run(dense, **feed))
    # Where nothing is folded, recurrent weights are not packed and sums taken in another order.
    assert np.allclose(run(made, "off", **feed), run(dense, "off", **feed), rtol=0, atol=1e-6)
    assert sqnr(run(before, **feed), run(made, **feed)) > {4: 12, 8: 35}[bits]
    assert operators(made) == operators(before)  # the runtime looks all of it up as it loads
    assert made.ByteSize() < before.ByteSize()


@pytest.mark.parametrize(("bits", "share"), [(8, 0.26), (4, 0.135)])
def test_files_shrink(bits: int, share: float) -> None:
    held = [numpy_helper.from_array(weights(512, 512, seed=i), f"w{i}") for i in range(2)]
    nodes = [graphs.node("MatMul", ["x", "w0"], ["h"]), graphs.node("MatMul", ["h", "w1"], ["y"])]
    ends = [graphs.value("x", (1, 512))], [graphs.value("y", (1, 512))]
    before = graphs.model(nodes, *ends, held, opset=21)
    made, _ = coded(before, bits)
    assert share - 0.012 < made.ByteSize() / before.ByteSize() < share
    kinds = {name: (a.dtype.name, a.shape) for name, a in stored(made).items()}
    assert kinds["w1/indices"] == (f"uint{bits}", (512, 512))
    assert kinds["w1/table"] == ("float32", (1 << bits,))
    assert {"w0", "w1"} <= {name for node in made.graph.node for name in node.output}


def test_the_lossless_passes_leave_large_ones_as_they_are() -> None:
    held = [numpy_helper.from_array(weights(256, 256), "w")]
    ends = [graphs.value("x", (1, 256))], [graphs.value("y", (1, 256))]
    nodes = [graphs.node("MatMul", ["x", "w"], ["y"])]
    for bits in (4, 8):
        made, _ = coded(graphs.model(nodes, *ends, held, opset=21), bits)
        model = Model.load(made)
        run_pipeline(model, pipeline(2, None))
        after = exporter.to_proto(model)
        assert sorted(n.op_type for n in after.graph.node) == ["Cast", "Gather", "MatMul"]
        assert after.ByteSize() <= made.ByteSize()


def test_weights_that_several_read_get_one_table() -> None:
    """A tied embedding: looked up, and multiplied with through a Transpose."""
    held = [numpy_helper.from_array(weights(100, 32), "w")]
    nodes = [
        graphs.node("Gather", ["w", "x"], ["e"]),
        graphs.node("Transpose", ["w"], ["t"], perm=[1, 0]),
        graphs.node("MatMul", ["e", "t"], ["y"]),
    ]
    inputs = [graphs.value("x", (5,), TensorProto.INT64)]
    before = graphs.model(nodes, inputs, [graphs.value("y", (5, 100))], held)
    made, edit = coded(before, 8)
    assert len(edit.changes) == 1
    assert set(stored(made)) == {"w/table", "w/indices"}
    feed = {"x": np.arange(5)}
    assert np.array_equal(run(made, **feed), run(substituted(before, 8), **feed))


def test_weights_inside_bodies_and_around_them() -> None:
    branches = [
        graphs.graph(
            [graphs.node("MatMul", ["x", name], [f"y{n}"])],
            [],
            [graphs.value(f"y{n}", ("a", "b"))],
            [numpy_helper.from_array(weights(48, 32, seed=n), "v")] if name == "v" else [],
            name=f"branch{n}",
        )
        for n, name in enumerate(["w", "v"])
    ]
    inputs = [graphs.value("x", ("n", 48)), graphs.CONDITION]
    held = [numpy_helper.from_array(weights(48, 32), "w")]
    before = graphs.model(
        [graphs.if_node(*branches)], inputs, [graphs.value("y", ("a", "b"))], held
    )
    made, _ = coded(before, 8)
    assert set(stored(made)) == {f"{name}/{part}" for name in "wv" for part in ("table", "indices")}
    x = RNG.standard_normal((2, 48)).astype(np.float32)
    for number, name in enumerate("wv"):
        table, indices = stored(made)[f"{name}/table"], stored(made)[f"{name}/indices"]
        expected = x @ table[indices]
        assert np.allclose(run(made, x=x, c=np.array(not number)), expected, atol=1e-5)
    assert set(operators(made)) <= {"If", "MatMul"}


def refused(before: onnx.ModelProto, bits: int = 8, least: int = 1024) -> dict[str, str]:
    """Why weights stay, by name; nothing is done."""
    made, edit = coded(before, bits, least)
    assert made == before
    return {name: reason for _, name, reason in edit.rejections}


def test_what_stays() -> None:
    plain, _ = reading("MatMul", opset=17)
    assert refused(plain, 4) == {"w": "4 bits take opset 21, not 17"}
    assert refused(plain, least=4000) == {"w": "it has fewer than 4000 elements"}
    many = weights(48, 32)
    many[RNG.random(many.shape) < 0.9] = 0
    for array, reason in (
        (weights(7, 32), "it would not be smaller"),
        (weights(48, 32).astype(np.float16), "it is float16"),
        (np.full((48, 32), np.inf, np.float32), "it is not finite"),
        (many, "it is smaller as a sparse tensor"),
    ):
        other = onnx.ModelProto()
        other.CopyFrom(plain)
        other.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
        other.graph.input[0].type.tensor_type.shape.dim[1].dim_value = len(array)
        kind = other.graph.initializer[0].data_type
        for info in (other.graph.input[0], other.graph.output[0]):
            info.type.tensor_type.elem_type = kind
        assert refused(other, least=64) == {"w": reason}
    overridable = onnx.ModelProto()
    overridable.CopyFrom(plain)
    overridable.graph.input.append(graphs.value("w", (48, 32)))
    assert refused(overridable) == {"w": "it is no initializer, or a caller may replace it"}
    with pytest.raises(UsageError, match="bits are 4 or 8, not 3"):
        coded(plain, 3)


def test_sparse_tensors_stay_and_zeros_stay_zeros() -> None:
    before, feed = reading("MatMul")
    half = weights(48, 32)
    half[RNG.random(half.shape) < 0.4] = 0
    before.graph.initializer[0].CopyFrom(numpy_helper.from_array(half, "w"))
    made, _ = coded(before, 4)
    held = stored(made)
    kept = held["w/table"][held["w/indices"].astype(int)]
    assert (kept[half == 0] == 0).all()
    assert np.array_equal(run(made, **feed), run(substituted(before, 4, keep_zero=True), **feed))
    many = np.where(RNG.random(half.shape) < 0.9, 0, half).astype(np.float32)
    before.graph.initializer[0].CopyFrom(numpy_helper.from_array(many, "w"))
    model = Model.load(before)
    run_pipeline(model, [Sparsify()])
    edit = Editor(model)
    CodebookWeights().run(model, edit)
    assert not edit.changes
    assert edit.rejections == [("store-codebook", "w", "it is sparse")]


def test_biases_and_other_constants_are_no_weights() -> None:
    held = [numpy_helper.from_array(weights(2048), name) for name in ("b", "s")]
    held.append(numpy_helper.from_array(weights(64, 2048), "w"))
    nodes = [
        graphs.node("Gemm", ["x", "w", "b"], ["g"]),
        graphs.node("Mul", ["g", "s"], ["y"]),
    ]
    ends = [graphs.value("x", (3, 64))], [graphs.value("y", (3, 2048))]
    made, edit = coded(graphs.model(nodes, *ends, held), 8)
    assert [change.root for change in edit.changes] == ["w"]
    again = refused(made, least=16)  # nor are tables and indices themselves
    assert again == {}


def test_weights_that_are_integers_already_stay() -> None:
    def change(edit: Editor) -> None:
        (node,) = [node for node in edit.model.graph.nodes if node.op == "MatMul"]
        assert make_weight_only(edit, node, block=None)

    made, _ = applied(reading("MatMul")[0], change)
    assert refused(made, least=16) == {}


def test_a_change_that_is_denied_is_not_made() -> None:
    before, _ = reading("MatMul")
    model = Model.load(before)
    edit = Editor(model, denied=[("store-codebook", "w")])
    CodebookWeights().run(model, edit)
    assert not edit.changes
    assert exporter.to_proto(model) == before


def test_a_recipe_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    before, _ = reading("LSTM")
    base = graphs.save(before, tmp_path / "base.onnx")
    recipe = CodebookRecipe({"w": 4, "r": 8})
    recipe.write(base, tmp_path / "one.onnx")
    arrays = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    recipe.write(base, tmp_path / "two.onnx", {("w", 4): table_of(arrays["w"], 4)})
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    kinds = {name: a.dtype.name for name, a in stored(onnx.load(tmp_path / "one.onnx")).items()}
    assert kinds["w/indices"] == "uint4"
    assert kinds["r/indices"] == "uint8"
    with pytest.raises(LookupError, match="no weight 'z' of a layer"):
        CodebookRecipe({"z": 8}).apply(base)
    small = graphs.save(reading("MatMul", opset=17)[0], tmp_path / "small.onnx")
    with pytest.raises(ValueError, match="'w' cannot be a table of 16 numbers: 4 bits take opset"):
        CodebookRecipe({"w": 4}).apply(small)


# -- the step --------------------------------------------------------------------------------------


@functools.cache
def lossless(name: str, opset: int | None) -> onnx.ModelProto:
    model = Model.load(DIGITS / f"{name}.onnx")
    run_pipeline(model, pipeline(2, None, opset=opset))
    return exporter.to_proto(model)


def digits(name: str, folder: Path, opset: int | None = 21) -> Path:
    """A model that reads digits, after the lossless passes."""
    return graphs.save(lossless(name, opset), folder / f"{name}.onnx")


def searched(
    base: Path,
    folder: Path,
    bits: BitsAsked = "auto",
    remarks: Remarks | None = None,
    *,
    data: str | None = DATA,
    force: bool = False,
    **budget: Any,
) -> tuple[CodebookRecord, Codebook]:
    common = {"data": data, "budget": Budget(**budget), "threads": 1, "force": force}
    step = Codebook(bits, common, remarks or Remarks())
    work = folder / f"work{len(list(folder.iterdir()))}"
    work.mkdir()
    sizes = Sizes(base.stat().st_size, base.stat().st_size)
    return step.search(DIGITS / base.name, base, work, sizes, lambda *_: None), step


def written(step: Codebook, base: Path, folder: Path) -> Path:
    """The model with what was decided."""
    target = folder / "coded.onnx"
    exporter.save(step.applied(base), target)
    return target


def decisions(**more: Any) -> Decisions:
    found = blank_decisions("0", "0", {}).model_copy(update=more)
    return found.model_copy(update={"created": "2026-01-01T00:00:00+00:00"})


def accuracy(model: Path) -> float:
    with np.load(DIGITS / "evaluation.npz") as data, Session(model) as session:
        found = session.run({"image": data["image"]})["logits"].argmax(1)
        return float((found == data["label"]).mean())


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_digits_in_four_bits(name: str, tmp_path: Path) -> None:
    base = digits(name, tmp_path)
    record, step = searched(base, tmp_path)
    assert record.kept
    assert [trial.name for trial in record.candidates] == ["4 bits"]
    assert record.weights[0].bits == 4
    assert 15 < (record.weights[0].sqnr_db or 0) < 25
    coded = written(step, base, tmp_path)
    assert record.bytes == coded.stat().st_size < 0.4 * base.stat().st_size
    assert accuracy(coded) > accuracy(base) - 0.02
    assert NO_SPEED in record.notes


def test_where_four_bits_lose_too_much_some_weights_take_eight(tmp_path: Path) -> None:
    base = digits("vit", tmp_path)
    record, step = searched(base, tmp_path, min_sqnr=26.0)
    assert record.kept
    assert step.recipe is not None
    assert set(step.recipe.bits.values()) == {4, 8}
    names = [trial.name for trial in record.candidates]
    assert names[:3] == ["4 bits", "8 bits", "4 bits, less 1"]
    assert record.candidate.startswith("4 bits, less")
    good = [trial.bytes for trial in record.candidates if trial.good]
    assert record.bytes == min(good) < max(good)
    assert not record.candidates[0].good


def test_where_eight_bits_lose_too_much_some_weights_stay(tmp_path: Path) -> None:
    base = digits("vit", tmp_path, None)
    whole, _ = searched(base, tmp_path)
    assert whole.candidate == "8 bits"
    assert whole.notes[0] == "4 bits were not tried: 4 bits take opset 21, not 17"
    record, step = searched(base, tmp_path, min_sqnr=50.0)
    assert record.kept
    assert record.candidate.startswith("8 bits, less")
    stays = [weight for weight in record.weights if weight.reason == "it does too much harm"]
    assert stays
    assert all(weight.bytes_after == weight.bytes_before for weight in stays)
    assert step.recipe is not None
    assert not {weight.name for weight in stays} & set(step.recipe.bits)


def test_what_comes_to_nothing(tmp_path: Path) -> None:
    base = digits("mlp", tmp_path, None)
    record, step = searched(base, tmp_path, 4)
    assert not record.kept
    assert record.reason == "4 bits take opset 21, not 17; --opset 21 gives it that"
    assert step.decided(decisions()) == decisions()
    assert not step.applied(base).graph.edited
    record, _ = searched(base, tmp_path, 8, min_sqnr=200.0)
    assert not record.kept
    assert record.reason.startswith("no candidate is good enough; the best of them, 8 bits")
    remarks = Remarks()
    record, step = searched(base, tmp_path, 8, remarks, force=True, min_sqnr=200.0)
    assert (record.kept, record.forced) == (True, True)
    assert remarks.warnings == [f"forced: {record.reason}"]
    _, step = searched(base, tmp_path, 8)
    (tmp_path / "coded").mkdir()
    coded = written(step, base, tmp_path).rename(tmp_path / "coded" / "mlp.onnx")
    again, _ = searched(coded, tmp_path, 8)
    assert not again.kept
    assert again.reason.startswith("no weight of a layer can be a table")


def test_what_is_not_smaller_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = digits("mlp", tmp_path)
    monkeypatch.setattr(codebook_search, "model_bytes", lambda _: 1)
    record, step = searched(base, tmp_path, 8)
    assert not record.kept
    assert record.reason == "it is not smaller than the model before"
    assert step.recipe is None


def test_without_data_four_bits_are_for_those_who_ask(tmp_path: Path) -> None:
    base = digits("mlp", tmp_path)
    record, _ = searched(base, tmp_path, data=None)
    assert record.candidate == "8 bits"
    assert "4 bits were not tried: one feed that is proposed" in record.notes[0]
    assert searched(base, tmp_path, 4, data=None)[0].candidate == "4 bits"


def test_decisions_replay_to_the_same_bytes(tmp_path: Path) -> None:
    base = digits("vit", tmp_path)
    _, step = searched(base, tmp_path, min_sqnr=26.0)
    text = step.decided(decisions()).to_json()
    coded = written(step, base, tmp_path).read_bytes()
    read = Decisions.model_validate_json(text)
    assert read.codebook is not None
    other = Codebook(None, {}, Remarks())
    other.read(read, {}, tmp_path / "d.json")
    (tmp_path / "replay").mkdir()
    assert other.is_wanted
    assert written(other, base, tmp_path / "replay").read_bytes() == coded
    sizes = Sizes(base.stat().st_size, base.stat().st_size)
    record = other.replayed(read, base, sizes)
    assert record is not None
    assert (record.mode, record.kept, record.bits) == ("replay", True, "4, 8")
    other.read(decisions(), {}, tmp_path / "d.json")
    assert not other.is_wanted


def test_tables_that_were_found_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.passes.quantize import codebook as rewrite

    base = digits("mlp", tmp_path)
    _, step = searched(base, tmp_path)
    again = CodebookRecipe(step.recipe.bits).apply(base) if step.recipe else None
    assert again is not None

    def fails(*_: Any) -> Any:
        raise AssertionError("it is k-means once more")

    monkeypatch.setattr(rewrite, "table_of", fails)
    assert exporter.to_proto(step.applied(base)) == exporter.to_proto(again)


def test_decisions_that_do_not_fit(tmp_path: Path) -> None:
    base = digits("mlp", tmp_path, None)
    for bits, message in (
        ({"gone": 8}, r"decisions d.json: cannot be replayed: the model has no weight 'gone'"),
        ({"1.weight": 4}, r"decisions d.json: cannot be replayed: '1.weight' cannot be a table"),
    ):
        decision = CodebookDecision(candidate="c", found="f", bits=bits)  # type: ignore[arg-type]
        step = Codebook(None, {}, Remarks())
        step.read(decisions(codebook=decision), {}, Path("d.json"))
        with pytest.raises(UsageError, match=message):
            step.applied(base)


def test_parameters_are_not_counted_where_they_are_indices(tmp_path: Path) -> None:
    """3.5 thousand floats instead of 46 would be true, and say nothing."""
    console = Console(width=80, record=True, file=(tmp_path / "screen").open("w"))
    report = optimize(DIGITS / "mlp.onnx", codebook=8, data=DATA).report
    show_report(report, console)
    assert "weights" in (shown := console.export_text())
    assert "parameters" not in shown


def test_the_screen(tmp_path: Path) -> None:
    base = digits("vit", tmp_path)
    record, _ = searched(base, tmp_path, min_sqnr=26.0)
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "screen").open("w"))
    show_codebook(record, console, every_candidate=True)
    shown = console.export_text()
    for part in (
        "codebook  kept: 4 bits, less",
        "26 dB have to be left",
        "against the model before",
        "it has fewer than 1024 elements",
        "nothing is faster and no memory is saved",
    ):
        assert part in shown
    assert shown.count("dB on 5 feeds") == len(record.candidates) + 1
