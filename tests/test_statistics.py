"""Statistics of calibration: against numpy on all the data at once, and by their laws."""

from __future__ import annotations

import itertools
import logging
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

import graphopt
from graphopt import exposed, observers
from graphopt.errors import DataError, RuntimeFailure, UsageError
from graphopt.ir import Model
from graphopt.kernels.moments import unfold
from graphopt.kernels.ranges import Histogram
from graphopt.runtime import Session
from graphopt.statistics import BUDGET, Observer, Patches, Shapes, Statistics, sweep
from tests import graphs
from tests.graphs import node, parsed, value

Array = NDArray[Any]
W = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)


def small() -> Model:
    """y = Relu(x w) on x [N, 4, 6], with x w called "h"."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    x, y = value("x", ("N", 4, 6)), value("y", ("N", 4, 5))
    return Model.load(graphs.model(nodes, [x], [y], [numpy_helper.from_array(W, "w")]))


def feeds(count: int = 7, batch: int = 2, seed: int = 0) -> list[dict[str, Array]]:
    """Whose scale grows, so that ranges have to widen."""
    rng = np.random.default_rng(seed)
    return [
        {"x": (rng.normal(size=(batch, 4, 6)) * 1.5**n).astype(np.float32)} for n in range(count)
    ]


def every(name: str, axis: int) -> list[Observer]:
    return [
        Observer(name, "histogram"),
        Observer(name, "moving-average"),
        Observer(name, "moments", axis),
        Observer(name, "maximum", axis),
        Observer(name, "gram", axis),
    ]


def mergeable(name: str, axis: int) -> list[Observer]:
    return [observer for observer in every(name, axis) if observer.kind != "moving-average"]


def check(found: Statistics, name: str, arrays: list[Array], axis: int) -> None:
    """Everything that is known of a value, against numpy on all its arrays at once."""
    whole = np.concatenate([np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in arrays])
    whole = whole.astype(np.float64)
    histogram = found.histogram(name)
    assert (histogram.minimum, histogram.maximum) == pytest.approx((whole.min(), whole.max()), 1e-5)
    assert histogram.count == whole.size
    moments = found.moments(name, axis)
    assert moments.count == len(whole)
    np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance, whole.var(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.maximum(name, axis), abs(whole).max(axis=0), rtol=1e-5)
    rows = np.concatenate([whole, np.ones((len(whole), 1))], axis=1)
    np.testing.assert_allclose(found.gram(name, axis).matrix, rows.T @ rows, rtol=1e-4, atol=1e-2)


def test_one_sweep_feeds_all_observers_of_inputs_inner_values_and_outputs() -> None:
    data = feeds()
    names = ("x", "h", "y")
    found = sweep(small(), iter(data), [o for name in names for o in every(name, -1)])
    xs = [feed["x"] for feed in data]
    hs = [x @ W for x in xs]
    check(found, "x", xs, -1)
    check(found, "h", hs, -1)
    check(found, "y", [np.maximum(h, 0) for h in hs], -1)
    assert found.feeds == 7
    assert found.unseen == {}
    assert found.nonfinite == {}
    assert found.shape("h") == Shapes((2, 4, 5), True)
    low = hs[0].min()
    for h in hs[1:]:
        low += 0.01 * (h.min() - low)
    assert found.moving_average("h").range[0] == pytest.approx(low, 1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_any_axis_holds_the_channels(axis: int) -> None:
    data = feeds()
    check(sweep(small(), data, every("h", axis)), "h", [feed["x"] @ W for feed in data], axis)


def test_bins_hold_what_they_say() -> None:
    data = feeds()
    histogram = sweep(small(), data, [Observer("x", "histogram")]).histogram("x")
    whole = np.concatenate([feed["x"].ravel() for feed in data]).astype(np.float64)
    inside = histogram.edges[1:-1]
    at = np.searchsorted(inside, whole, side="right")
    np.testing.assert_array_equal(histogram.counts, np.bincount(at, minlength=len(inside) + 1))


def test_a_constant_is_observed_once() -> None:
    found = sweep(small(), feeds(), every("w", 0))
    check(found, "w", [W], 0)
    assert found.feeds == 7


# -- convolutions ----------------------------------------------------------------------------------


GEOMETRIES = [
    (Patches((3, 3)), 1),
    (Patches((3, 2), (2, 1), (1, 0, 2, 1)), 1),
    (Patches((2, 3), (1, 2), (0, 2, 1, 0), (2, 1), 2), 2),
    (Patches((3, 3), pads=(1, 1, 1, 1), group=4), 4),
    (Patches((1, 1), (2, 2)), 1),
]


@pytest.mark.parametrize(("patches", "group"), GEOMETRIES)
@pytest.mark.parametrize("unfolded", [1, 1000, 1 << 22])
def test_a_gram_of_patches_gives_the_second_moments_of_the_convolution(
    patches: Patches, group: int, unfolded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of y = W r, rows r by rows, the sum of y y' is W (sum of r r') W'; in any strips."""
    monkeypatch.setattr(observers, "_UNFOLDED", unfolded)
    rng = np.random.default_rng(2)
    w = rng.normal(size=(8, 4 // group, *patches.kernel)).astype(np.float32)
    attributes = {name: list(getattr(patches, name)) for name in ("strides", "pads", "dilations")}
    conv = node("Conv", ["x", "w"], ["y"], group=group, **attributes)
    x, y = value("x", ("N", 4, "H", "W")), value("y", None)
    model = Model.load(graphs.model([conv], [x], [y], [numpy_helper.from_array(w, "w")]))
    data = [{"x": rng.normal(size=(n, 4, 9, 8)).astype(np.float32)} for n in (1, 3)]
    wanted = [Observer("x", "gram", patches=patches), Observer("y", "gram", 1)]
    found = sweep(model, data, wanted)
    of_y = found.gram("y", 1)
    outputs = 8 // group
    for at, gram in enumerate(found.grams("x", patches)):
        part = w.reshape(group, outputs, -1)[at].astype(np.float64)
        mine = slice(at * outputs, (at + 1) * outputs)
        expected = of_y.matrix[mine, mine]
        np.testing.assert_allclose(part @ gram.matrix[:-1, :-1] @ part.T, expected, rtol=1e-4)
        np.testing.assert_allclose(part @ gram.matrix[:-1, -1], of_y.matrix[mine, -1], atol=1e-3)
        assert gram.count == of_y.count


def test_strips_are_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one and in three dimensions too; the parts of a sample are in order."""
    monkeypatch.setattr(observers, "_UNFOLDED", 1)
    rng = np.random.default_rng(3)
    for patches, shape in (
        (Patches((3,), (2,), (1, 2), (2,)), (2, 3, 11)),
        (Patches((2, 1, 3), (1, 2, 1), (1, 0, 0, 0, 0, 2)), (2, 2, 4, 5, 6)),
    ):
        x = rng.normal(size=shape)
        parts = np.concatenate(list(patches.rows(x)), axis=1)
        whole = unfold(x, patches.kernel, patches.strides, patches.pads, patches.dilations)
        np.testing.assert_array_equal(parts, whole)


def test_geometries_that_are_the_same_are_equal() -> None:
    assert Patches((3, 3)) == Patches((3, 3), (1, 1), (0, 0, 0, 0), (1, 1))
    assert hash(Observer("x", "gram", patches=Patches((3,)))) == hash(
        Observer("x", "gram", patches=Patches((3,), (1,)))
    )


# -- what cannot be seen ---------------------------------------------------------------------------

BRANCHES = """
agraph (float[2] x, bool c) => (float[2] y) {
  h = Neg(x)
  y = If (c) <
    then_branch = a () => (float[2] p) { q = Abs(h) p = Exp(q) },
    else_branch = b () => (float[2] r) { r = Abs(h) }
  >
}
"""


def test_values_in_bodies_are_listed() -> None:
    model = Model.load(parsed(BRANCHES))
    data = [{"x": np.array([1, -2], np.float32), "c": np.array(True)}]
    found = sweep(model, data, [Observer(name, "histogram") for name in ("q", "h", "y")])
    assert found.unseen == {"q": "it lies in the body of an If, Loop or Scan"}
    assert found.histogram("h").maximum == 2
    with pytest.raises(LookupError, match="no histogram of 'q': it lies in the body"):
        found.histogram("q")


MIXED = """
agraph (float[N] x, int64[K] i, string[1] s) => (float[M] y, seq(float[N]) t) {
  t = SequenceConstruct(x, x)
  n = Shape(x)
  b = Cast<to = 9>(x)
  g = Gather(x, i)
  y = Abs(g)
}
"""


def test_only_floats_are_observed_and_inputs_of_numbers() -> None:
    names = ("x", "i", "s", "t", "n", "b", "g")
    data = [{"x": np.arange(4, dtype=np.float32), "i": np.array([3, 1]), "s": np.array(["a"])}]
    found = sweep(Model.load(parsed(MIXED)), data, [Observer(n, "histogram") for n in names])
    assert found.unseen == {
        "s": "it is no tensor of numbers",
        "t": "its type is seq(tensor(float))",
        "n": "its type is tensor(int64)",
        "b": "its type is tensor(bool)",
    }
    assert found.histogram("i").maximum == 3
    assert found.histogram("g").minimum == 1
    integer = graphs.model(
        [node("Add", ["x", "k"], ["y"])],
        [value("x", (2,), TensorProto.INT64)],
        [value("y", (2,), TensorProto.INT64)],
        [numpy_helper.from_array(np.array([1, 2]), "k")],
    )
    found = sweep(Model.load(integer), [{"x": np.array([1, 2])}], [Observer("k", "histogram")])
    assert found.unseen == {"k": "it is a constant of type int64"}


def test_what_the_model_does_not_have_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="model: there is no value 'nothing' to observe"):
        sweep(small(), feeds(), [Observer("nothing", "histogram")])
    found = sweep(small(), feeds(), [Observer("h", "moments", 1)])
    with pytest.raises(LookupError, match="no histogram of 'h': not asked for"):
        found.histogram("h")
    with pytest.raises(LookupError, match="the shape of 'y' is not known: not asked for"):
        found.shape("y")


def test_no_feeds_is_a_mistake() -> None:
    with pytest.raises(DataError, match="there are no feeds"):
        sweep(small(), [], [Observer("h", "histogram")])


def test_a_model_that_does_not_load_blames_no_value() -> None:
    broken = graphs.model([node("MatMul", ["x", "x"], ["y"])], [value("x", (2, 3))], [value("y")])
    with pytest.raises(RuntimeFailure):
        sweep(Model.load(broken), [], [Observer("y", "histogram")])


def test_a_value_that_cannot_be_an_output_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = exposed._expose

    def expose(graph: onnx.GraphProto, names: Any) -> None:
        real(graph, ["nowhere" if name == "h" else name for name in names])

    monkeypatch.setattr(exposed, "_expose", expose)
    found = sweep(small(), feeds(), [*every("h", 1), *every("y", 1), *every("x", 1)])
    assert list(found.unseen) == ["h"]
    assert found.unseen["h"].startswith("it cannot be an output: ")
    check(found, "y", [np.maximum(feed["x"] @ W, 0) for feed in feeds()], 1)


def test_nothing_but_not_a_number() -> None:
    data = [{"x": np.full((2, 4, 6), np.nan, np.float32)}]
    found = sweep(small(), data, every("x", 1))
    assert found.nonfinite == {"x": 48}
    with pytest.raises(LookupError, match="no moments of 'x': there was no finite number in it"):
        found.moments("x", 1)
    assert Observer("x", "moments", 1) not in found


def test_numbers_that_are_not_finite_are_counted_and_left_out() -> None:
    """Moments and Gram matrices leave the whole row out, others only the number."""
    data = feeds()
    spoilt = data[3]["x"]
    spoilt[0, 1, 2], spoilt[1, 3, 0], spoilt[1, 3, 1] = np.nan, np.inf, -np.inf
    found = sweep(small(), data, mergeable("x", -1))
    assert found.nonfinite == {"x": 3}
    rows = np.concatenate([feed["x"].reshape(-1, 6) for feed in data]).astype(np.float64)
    finite = np.isfinite(rows)
    assert found.histogram("x").count == finite.sum()
    assert found.histogram("x").maximum == rows[finite].max()
    np.testing.assert_array_equal(found.maximum("x", -1), abs(np.where(finite, rows, 0)).max(0))
    rows = rows[finite.all(axis=1)]
    assert found.moments("x", -1).count == found.gram("x", -1).count == len(rows)
    np.testing.assert_allclose(found.moments("x", -1).mean, rows.mean(axis=0))
    np.testing.assert_allclose(found.gram("x", -1).matrix[:-1, :-1], rows.T @ rows)


def test_rows_of_a_convolution_with_what_is_not_finite_are_left_out() -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    x[0, 0, 4] = np.inf
    found = Statistics([Observer("x", "gram", patches=Patches((2,)))])
    found.observe("x", x)
    rows = np.array([[0, 1], [1, 2], [2, 3]])
    gram = found.gram("x", Patches((2,)))
    np.testing.assert_array_equal(gram.matrix[:2, :2], rows.T @ rows)
    assert gram.count == 3


def test_sizes_may_change_where_no_channels_lie() -> None:
    data = [*feeds(2, batch=2), *feeds(2, batch=3)]
    found = sweep(small(), data, [*every("h", 1), Observer("h", "moments", 0)])
    check(found, "h", [feed["x"] @ W for feed in data], 1)
    assert found.shape("h") == Shapes((2, 4, 5), False)
    reason = "axis 0 holds 2 elements on one feed, 3 on another"
    assert found.unseen == {"h": f"no moments: {reason}"}
    with pytest.raises(LookupError, match=reason):
        found.moments("h", 0)


def test_channels_that_are_not_there() -> None:
    patches = Patches((9, 9))
    wanted = [Observer("h", "gram", 3), Observer("x", "gram", patches=patches)]
    wanted += [Observer("y", "gram", patches=Patches((1,), group=3)), Observer("y", "histogram")]
    found = sweep(small(), feeds(), wanted)
    assert found.unseen == {
        "h": "no gram: a shape of [2, 4, 5] has no axis 3",
        "x": "no gram: a kernel of 2 axes reads no shape [2, 4, 6]",
        "y": "no gram: 3 groups do not divide 4 channels",
    }
    assert found.histogram("y").count == 7 * 2 * 4 * 5
    assert Patches((3,), dilations=(3,)).misfit((1, 1, 6)) == "the kernel does not fit"
    assert Patches((3,), dilations=(3,)).misfit((1, 1, 7)) == ""


def test_an_input_with_a_default() -> None:
    model = parsed(
        """
        agraph (float[2] x, float[1] d) => (float[2] y) <float[1] d = {3}> {
          h = Mul(x, d)
          y = Neg(h)
        }
        """
    )
    x = np.array([1, 2], np.float32)
    data = [{"x": x}, {"x": x, "d": np.array([-5], np.float32)}]
    found = sweep(Model.load(model), data, [Observer(n, "histogram") for n in ("d", "h")])
    assert (found.histogram("d").minimum, found.histogram("d").maximum) == (-5, 3)
    assert (found.histogram("h").minimum, found.histogram("h").maximum) == (-10, 6)


def test_optional_inputs_may_be_empty() -> None:
    model = parsed(
        """
        agraph (float[2] x, optional(float[2]) o) => (float[2] h, bool y) {
          h = Neg(x)
          y = OptionalHasElement(o)
        }
        """.replace("agraph", '<ir_version: 8, opset_import: ["": 18]>\nagraph')
    )
    data = [{"x": np.array([1, 2], np.float32), "o": None}]
    found = sweep(Model.load(model), data, [Observer(n, "histogram") for n in ("o", "h")])
    assert found.unseen == {"o": "it was left out on every feed"}
    assert found.histogram("h").minimum == -2


def test_integers_are_exact() -> None:
    model = parsed("agraph (int64[1] i) => (int64[1] y) { y = Neg(i) }")
    data = [{"i": np.array([2**24 + 1])}]
    found = sweep(Model.load(model), data, [Observer("i", "histogram")])
    assert found.histogram("i").maximum == 2**24 + 1


def test_names_of_shapes_do_not_collide() -> None:
    """Nor does a model need to import the standard operators for its shapes to be asked for."""
    made = graphs.model(
        [
            node("QuickGelu", ["x"], ["h"], domain="com.microsoft"),
            node("QuickGelu", ["h"], ["h.shape"], domain="com.microsoft"),
            node("QuickGelu", ["h.shape"], ["y"], domain="com.microsoft"),
        ],
        domains=["com.microsoft"],
    )
    del made.opset_import[0]
    assert [entry.domain for entry in made.opset_import] == ["com.microsoft"]
    data = [{"x": np.arange(4, dtype=np.float32)}]
    found = sweep(Model.load(made), data, [Observer(n, "histogram") for n in ("h", "h.shape", "y")])
    assert found.unseen == {}
    assert found.histogram("h").maximum > found.histogram("h.shape").maximum > 2


def test_narrow_and_wide_floats_and_batches_of_nothing() -> None:
    model = parsed(
        """
        agraph (float[N] x) => (float[N] y) {
          h = Cast<to = 10>(x)
          b = Cast<to = 16>(x)
          d = Cast<to = 11>(x)
          y = Cast<to = 1>(h)
        }
        """
    )
    data = [{"x": np.array([], np.float32)}, {"x": np.array([0.1, -2], np.float32)}]
    found = sweep(Model.load(model), data, [Observer(n, "histogram") for n in ("h", "b", "d")])
    assert found.histogram("h").maximum == np.float16(0.1)
    assert found.histogram("b").minimum == -2
    assert found.histogram("b").maximum == pytest.approx(0.1, 1e-2)
    assert found.histogram("d").maximum == np.float32(0.1)
    assert found.shape("h") == Shapes((0,), False)


# -- budget and memory -----------------------------------------------------------------------------


def chain(length: int, size: int) -> Model:
    """x + 1 + 1 + ..., values v0, v1, ... of `size` float32 each."""
    names = ["x", *(f"v{n}" for n in range(length))]
    nodes = [node("Add", [a, "one"], [b]) for a, b in itertools.pairwise(names)]
    one = numpy_helper.from_array(np.float32(1), "one")
    x, last = value("x", ("N",)), value(names[-1], ("N",))
    return Model.load(graphs.model(nodes, [x], [last], [one]))


@pytest.mark.parametrize(("budget", "runs"), [(10, 8), (4000, 8), (8000, 4), (12001, 3), (1e9, 1)])
def test_a_budget_splits_the_values_of_a_feed(
    budget: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = Session.run

    def run(self: Session, feed: Any, outputs: Any = None) -> dict[str, Any]:
        found = real(self, feed, outputs)
        taken.append(sum(array.nbytes for array in found.values()))
        return found

    opened = 0
    real_init = Session.__init__

    def init(self: Session, *arguments: Any, **options: Any) -> None:
        nonlocal opened
        opened += 1
        real_init(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", run)
    monkeypatch.setattr(Session, "__init__", init)
    data = [{"x": np.full(1000, n, np.float32)} for n in range(3)]
    found = sweep(
        chain(8, 1000), data, [Observer(f"v{n}", "histogram") for n in range(8)], budget=int(budget)
    )
    sizes, *swept = taken
    assert sizes == 8 * 8  # shapes only
    assert len(swept) == 3 * runs
    assert max(swept) <= max(budget, 4000)
    # whether it loads, types, and sizes; then one that stays open, or never two at once
    assert opened == 3 + (1 if runs == 1 else 3 * runs)
    for n in range(8):
        histogram = found.histogram(f"v{n}")
        assert (histogram.minimum, histogram.maximum, histogram.count) == (n + 1, n + 3, 3000)


@pytest.mark.parametrize(("budget", "most"), [(BUDGET, 0), (400_000, 1)])
def test_memory_does_not_grow_with_the_feeds(
    budget: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No output of a run is alive in the next one, or of several runs of a feed the last that was
    handed out; the rest of the memory peaks the same over 5 and over 60 feeds of 100 KB.
    """
    model = chain(8, 25_000)
    wanted = [Observer(f"v{n}", "histogram") for n in range(8)] + [Observer("x", "moments", 0)]
    outputs: list[weakref.ref[Array]] = []
    alive: list[int] = []
    real = Session.run

    def run(self: Session, feed: Any, names: Any = None) -> dict[str, Any]:
        outputs[:] = [output for output in outputs if output() is not None]
        alive.append(len(outputs))
        found = real(self, feed, names)
        outputs.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(Session, "run", run)

    def peak(count: int) -> int:
        outputs.clear()
        data = ({"x": np.full(25_000, n % 3, np.float32)} for n in range(count))
        tracemalloc.start()
        try:
            sweep(model, data, wanted, budget=budget)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # imports and caches
    assert peak(60) < peak(5) + 50_000
    assert max(alive) == most


# -- faithful --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", graphs.DIGITS, ids=lambda path: path.stem)
def test_exposing_all_values_changes_none(path: Path, tmp_path: Path) -> None:
    """Each value as onnxruntime gives it alone, nothing optimised; the same for the outputs."""
    model = Model.load(path)
    names = [v.name for n in model.graph.nodes for v in n.outputs if v is not None]
    port = Session(path).inputs[0]
    shape = [size if isinstance(size, int) else 2 for size in port.shape]
    feed = {port.name: np.random.default_rng(4).random(shape).astype(np.float32)}
    written = exposed.write_exposed(model, tmp_path / "model.onnx", external="always")
    with exposed.Exposure(model, written, names, budget=1 << 30) as exposure:
        together = dict(exposure.values(feed))
        assert len(together) + len(exposure.refused) == len(names)
    sample = {name: together[name] for name in [*list(together)[::5], model.graph.outputs[0].name]}
    for name, array in sample.items():
        alone = exposed.write_exposed(model, tmp_path / "alone.onnx", [name])
        with Session(alone, optimizations="off") as session:
            expected = session.run(feed, [name])[name]
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_statistics_hold_for_a_rewrite_that_keeps_the_names(name: str) -> None:
    """On every name that survives optimisation, both models tell the same."""
    path = next(path for path in graphs.DIGITS if path.stem == name)
    original = Model.load(path)
    rewritten = graphopt.optimize(onnx.load(path)).model
    kept = [
        v.name
        for n in rewritten.graph.nodes
        for v in n.outputs
        if v is not None and v.name in original.graph.values
    ]
    assert kept
    port = Session(path).inputs[0]
    shape = [size if isinstance(size, int) else 2 for size in port.shape]
    rng = np.random.default_rng(5)
    data = [{port.name: rng.random(shape).astype(np.float32)} for _ in range(3)]
    wanted = [Observer(name, "histogram") for name in kept]
    before, after = sweep(path, data, wanted), sweep(rewritten, data, wanted)
    assert len(before.unseen) < len(kept)
    for name in kept:
        if name not in before.unseen:
            a, b = before.histogram(name), after.histogram(name)
            assert a.count == b.count
            scale = max(-a.minimum, a.maximum)
            assert a.minimum == pytest.approx(b.minimum, abs=1e-5 * scale)
            assert a.maximum == pytest.approx(b.maximum, abs=1e-5 * scale)


# -- merging and files -----------------------------------------------------------------------------


def content(found: Statistics) -> Any:
    """All that the answers show, for comparison."""
    answers: dict[Observer, Any] = {}
    for observer in found.observers:
        states = found._states.get(observer, [])
        answers[observer] = [
            [np.asarray(getattr(state, slot)).tolist() for slot in type(state).__slots__]
            for state in states
        ]
    return answers, found.feeds, found.unseen, found.nonfinite, found._shapes, found._dropped


WANTED = [
    *(o for name in ("x", "h", "w") for o in mergeable(name, 1)),
    Observer("x", "gram", patches=Patches((2,), group=2)),
    Observer("h", "moments", 7),
]


def test_parts_merged_are_the_whole() -> None:
    data = feeds()
    data[5]["x"][0, 0, 0] = np.nan
    wanted = [observer for observer in WANTED if observer.value != "w"]
    whole = sweep(small(), data, wanted)
    merged = sweep(small(), data[:3], wanted)
    merged.merge(sweep(small(), data[3:], wanted))
    for name in ("x", "h"):
        one, other = whole.histogram(name), merged.histogram(name)
        np.testing.assert_array_equal(one.counts, other.counts)
        assert (one.minimum, one.maximum, one.count) == (other.minimum, other.maximum, other.count)
        np.testing.assert_array_equal(whole.maximum(name, 1), merged.maximum(name, 1))
        for kind in ("mean", "variance"):
            a, b = getattr(whole.moments(name, 1), kind), getattr(merged.moments(name, 1), kind)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(whole.gram(name, 1).matrix, merged.gram(name, 1).matrix)
    patches = Patches((2,), group=2)
    for a, b in zip(whole.grams("x", patches), merged.grams("x", patches), strict=True):
        np.testing.assert_allclose(a.matrix, b.matrix)
    assert merged.feeds == 7
    assert (merged.unseen, merged.nonfinite) == (whole.unseen, whole.nonfinite)
    assert merged.shape("h") == whole.shape("h")


def test_merging_into_an_empty_store_gives_all_of_it() -> None:
    wanted = [*every("h", 0), *every("q", 0)]
    wanted = [observer for observer in wanted if observer.kind != "moving-average"]
    data = [{"x": np.array([np.nan, -2], np.float32), "c": np.array(True)}]
    found = sweep(Model.load(parsed(BRANCHES)), data, wanted)
    merged = Statistics(wanted)
    merged.merge(found)
    assert content(merged) == content(found)
    assert merged.unseen


def test_merging_with_other_sizes() -> None:
    wanted = [Observer("h", "moments", 0), Observer("h", "moments", 1)]
    merged = sweep(small(), feeds(2, batch=2), wanted)
    merged.merge(sweep(small(), feeds(2, batch=3), wanted))
    assert merged.shape("h") == Shapes((2, 4, 5), False)
    assert Observer("h", "moments", 0) not in merged
    assert merged.moments("h", 1).count == 2 * 5 * (2 + 3)


def test_what_cannot_be_merged_is_left_as_it_was() -> None:
    one = sweep(small(), feeds(), every("h", 1))
    before = content(one)
    with pytest.raises(UsageError, match="the moving average of 'h' depends on the order"):
        one.merge(sweep(small(), feeds(), every("h", 1)))
    with pytest.raises(UsageError, match="statistics of different observers cannot be merged"):
        one.merge(sweep(small(), feeds(), every("x", 1)))
    assert content(one) == before


def test_a_file_gives_back_all_of_it(tmp_path: Path) -> None:
    data = feeds()
    data[1]["x"][1, 1, 1] = np.inf
    wanted = [*WANTED, Observer("h", "moving-average"), Observer("y", "histogram")]
    found = sweep(small(), data[:4], wanted)
    found.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype.kind in "fiU" for name in archive.files)
    loaded = Statistics.load(tmp_path / "s.npz")
    assert content(loaded) == content(found)
    assert [o in loaded for o in wanted] == [o in found for o in wanted]
    assert loaded.moving_average("h").range == found.moving_average("h").range
    for statistics in (found, loaded):  # and goes on where it was
        for feed in data[4:]:
            statistics.observe("x", feed["x"])
            statistics.observe("h", feed["x"] @ W)
    assert content(loaded) == content(found)


def test_a_file_of_nothing_seen(tmp_path: Path) -> None:
    Statistics([Observer("x", "histogram")]).save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert loaded.observers == [Observer("x", "histogram")]
    assert loaded.observers[0] not in loaded


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"statistics .*s\.npz: cannot be read"):
        Statistics.load(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(DataError, match="cannot be read"):
        Statistics.load(path)
    np.savez(path, content=np.array('{"format": 99}'))
    with pytest.raises(DataError, match="format 99, not 1"):
        Statistics.load(path)


# -- cache -----------------------------------------------------------------------------------------


def untouchable() -> Iterator[dict[str, Array]]:
    raise AssertionError("the data is read")
    yield {}


def test_a_cache_answers_without_running(tmp_path: Path) -> None:
    cache = tmp_path / "statistics"
    found = sweep(small(), feeds(), WANTED, cache=cache, data_key="a")
    again = sweep(small(), untouchable(), reversed(WANTED), cache=cache, data_key="a")  # type: ignore[arg-type]
    assert dict(content(again)[0].items()) == content(found)[0]
    assert content(again)[1:] == content(found)[1:]


def test_a_cache_keeps_apart_what_differs(tmp_path: Path) -> None:
    def run(model: Model, wanted: list[Observer], key: str) -> None:
        sweep(model, feeds(1), wanted, cache=tmp_path, data_key=key)

    large = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    models = []
    for other in (0.0, 1.0):  # weights that lie at the same place in the file
        weights = large.copy()
        weights[3, 100] += other
        made = onnx.ModelProto()
        made.CopyFrom(small().proto)
        made.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
        made.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 300
        models.append(made)
    run(Model.load(models[0]), [Observer("h", "histogram")], "a")
    run(Model.load(models[0]), [Observer("h", "histogram")], "a")
    assert len(list(tmp_path.iterdir())) == 1
    run(Model.load(models[1]), [Observer("h", "histogram")], "a")
    assert len(list(tmp_path.iterdir())) == 2
    run(Model.load(models[0]), [Observer("h", "histogram")], "b")
    run(Model.load(models[0]), [Observer("h", "moments", 1)], "a")
    run(Model.load(models[0]), [Observer("h", "moments", 2)], "a")
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_entry_is_gathered_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = sweep(small(), feeds(), WANTED, cache=tmp_path, data_key="a")
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        again = sweep(small(), feeds(), WANTED, cache=tmp_path, data_key="a")
    assert "gathered anew" in caplog.text
    assert content(again) == content(found)
    assert content(Statistics.load(entry)) == content(found)


def test_a_cache_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a cache of statistics needs a key of the data"):
        sweep(small(), feeds(), WANTED, cache=tmp_path)


def test_progress_counts_feeds_and_a_path_is_a_model(tmp_path: Path) -> None:
    path = graphs.save(small().proto, tmp_path / "model.onnx")
    told: list[int] = []
    found = sweep(path, feeds(3), [Observer("h", "histogram")], threads=1, progress=told.append)
    assert told == [1, 2, 3]
    assert isinstance(found.histogram("h"), Histogram)


def test_an_observer_states_what_its_kind_needs() -> None:
    for wrong in (
        lambda: Observer("x", "moments"),
        lambda: Observer("x", "histogram", 1),
        lambda: Observer("x", "gram"),
        lambda: Observer("x", "gram", 1, Patches((3,))),
        lambda: Patches((3, 3), (1,)),
    ):
        with pytest.raises(AssertionError):
            wrong()


# -- shares of what is not zero, and regressions ---------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_shares_of_what_is_not_zero(axis: int) -> None:
    data = feeds()
    found = sweep(small(), data, [Observer("y", "nonzero", axis)])
    rows = [np.moveaxis(np.maximum(f["x"] @ W, 0), axis, -1) for f in data]
    whole = np.concatenate([a.reshape(-1, a.shape[-1]) for a in rows])
    share = found.nonzero("y", axis)
    np.testing.assert_allclose(share, (whole != 0).mean(axis=0))
    assert ((share > 0) & (share < 1)).all()


def test_shares_of_parts_merged_are_those_of_the_whole() -> None:
    data = feeds()
    wanted = [Observer("y", "nonzero", -1)]
    whole, merged = sweep(small(), data, wanted), sweep(small(), data[:2], wanted)
    merged.merge(sweep(small(), data[2:], wanted))
    np.testing.assert_array_equal(whole.nonzero("y", -1), merged.nonzero("y", -1))
    assert content(whole) == content(merged)


def test_what_is_not_finite_counts_as_zero() -> None:
    found = Statistics([Observer("v", "nonzero", 1)])
    found.observe("v", np.array([[np.nan, 1, 0, 2], [np.inf, 0, 0, 2]], np.float32))
    assert found.nonzero("v", 1).tolist() == [0.0, 0.5, 0.0, 1.0]
    with pytest.raises(LookupError, match="no nonzero of 'v': not asked for"):
        found.nonzero("v", 0)


def direct(x: Array, y: Array) -> tuple[Array, Array, Array]:
    rows = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    y = y.astype(np.float64)
    return rows.T @ rows, rows.T @ y, np.square(y).sum(axis=0)


def test_regressions_of_rows_along_an_axis() -> None:
    observer = Observer("x", "regression", -1, target="h")
    found = Statistics([observer])
    assert observer not in found
    xs = [feed["x"] for feed in feeds(4)]
    for x in xs:
        found.regress(observer, x, x @ W)
    (state,) = found.regressions(observer)
    rows = np.concatenate([x.reshape(-1, 6) for x in xs])
    for one, other in zip(
        (state.matrix, state.cross, state.energy), direct(rows, rows @ W), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)
    assert state.count == len(rows)


@pytest.mark.parametrize(("patches", "group"), GEOMETRIES)
@pytest.mark.parametrize("unfolded", [1, 1 << 22])
@pytest.mark.parametrize("every", [1, 3, 7])
def test_regressions_of_patches(
    patches: Patches, group: int, unfolded: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of patches meet what the convolution gives there; in strips, and some of them only."""
    monkeypatch.setattr(observers, "_UNFOLDED", unfolded)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 4, 9, 8)).astype(np.float32)
    w = rng.normal(size=(group, 2, patches.features(4)))
    rows = unfold(x, patches.kernel, patches.strides, patches.pads, patches.dilations, group)
    results = [r.astype(np.float64) @ v.T for r, v in zip(rows, w, strict=True)]
    out = patches.out(x.shape)
    y = np.concatenate([r.reshape(3, *out, 2) for r in results], axis=-1)
    observer = Observer("x", "regression", patches=patches, target="y")
    found = Statistics([observer])
    found.regress(observer, x, np.moveaxis(y, -1, 1), every)
    states = found.regressions(observer)
    assert len(states) == group
    for state, r, v in zip(states, rows, results, strict=True):
        matrix, cross, energy = direct(r[::every], v[::every])
        assert state.count == len(r[::every])
        np.testing.assert_allclose(state.matrix, matrix, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(state.cross, cross, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(state.energy, energy, rtol=1e-5)


def test_rows_that_are_not_finite_are_left_out_of_regressions() -> None:
    observer = Observer("x", "regression", -1, target="h")
    found = Statistics([observer])
    x = np.random.default_rng(0).normal(size=(6, 4))
    y = x[:, :2].copy()
    x[1, 2], y[4, 1] = np.nan, np.inf
    found.regress(observer, x, y)
    (state,) = found.regressions(observer)
    left = [0, 2, 3, 5]
    np.testing.assert_allclose(state.matrix, direct(x[left], y[left])[0])
    np.testing.assert_allclose(state.cross, direct(x[left], y[left])[1])


def test_regressions_in_a_file(tmp_path: Path) -> None:
    along = Observer("x", "regression", -1, target="h")
    patched = Observer("v", "regression", patches=Patches((3,), group=2), target="u")
    found = Statistics([along, patched])
    rng = np.random.default_rng(0)
    found.regress(along, rng.normal(size=(5, 6)), rng.normal(size=(5, 2)))
    found.regress(patched, rng.normal(size=(2, 4, 7)), rng.normal(size=(2, 6, 5)))
    found.save(tmp_path / "s.npz")
    assert content(Statistics.load(tmp_path / "s.npz")) == content(found)


def test_a_regression_that_does_not_fit() -> None:
    observer = Observer("x", "regression", patches=Patches((3, 3)), target="y")
    found = Statistics([observer])
    with pytest.raises(ValueError, match="the kernel does not fit"):
        found.regress(observer, np.zeros((1, 2, 2, 9)), np.zeros((1, 2, 1, 1)))
    with pytest.raises(LookupError, match="no regression of 'x'"):
        found.regressions(observer)
    for wrong in (
        lambda: Observer("x", "regression", 1),
        lambda: Observer("x", "gram", 1, target="y"),
        lambda: Observer("x", "nonzero"),
    ):
        with pytest.raises(AssertionError):
            wrong()
