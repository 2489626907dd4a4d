"""A model run piece by piece: the values of one session, every node once, nothing left behind."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import relay, runtime
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.prune.sparse import Sparsify
from graphopt.relay import Relay, Shelf, paired
from graphopt.runtime import Session
from tests import graphs
from tests.graphs import parsed
from tests.prune_runs import weighted

Array = NDArray[Any]

# A diamond whose sides are read again behind it, a node that nobody asks for, an inner body.
GRAPH = (
    "(float[n,6] x, float[n,6] x2, bool c, float[6,5] w1, float[6,5] w2, float[5,4] w3,"
    " float[4,5] w4) => (float[n,5] y, float[n,4] unread) {"
    " a = MatMul(x, w1) b = Tanh(a) l = MatMul(x2, w2) s = Add(b, l)"
    " d = If(c) <then_branch = t () => (float[n,5] u) { u = Relu(s) },"
    " else_branch = e () => (float[n,5] v) { v = Neg(l) }>"
    " k = MatMul(d, w3) o, p = Split<axis=1>(k) j = Concat<axis=1>(p, o)"
    " m = MatMul(j, w4) y = Add(m, b) unread = Exp(k) }"
)
NAMES = ("a", "b", "l", "s", "d", "k", "o", "p", "j", "m", "y")


def feeds(count: int = 3) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.standard_normal((2 + n, 6)).astype(np.float32),
            "x2": rng.standard_normal((2 + n, 6)).astype(np.float32),
            "c": np.array(n != 1),
        }
        for n in range(count)
    ]


def expected(proto: onnx.ModelProto, names: Iterable[str]) -> dict[str, list[Array]]:
    """The values by one plain session on the whole model."""
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    known = {v.name for v in whole.graph.output} | {v.name for v in whole.graph.input}
    whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    found: dict[str, list[Array]] = {}
    with Session(whole.SerializeToString(), optimizations="extended") as session:
        for feed in feeds():
            values = {**feed, **session.run(feed)}
            for name in dict.fromkeys(names):
                found.setdefault(name, []).append(values[name])
    return found


def compare(found: Iterable[Array], wanted: Sequence[Array]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [0, 100, relay.MEMORY])
@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ("s", "s", "b", "y"),
        ("y", "b", "l", "s"),  # what was computed on the way to another
        ("x", "k", "x", "x2"),
        ("p",),
        ("o", "p"),
        ("d", "m"),
    ],
)
def test_values_are_those_of_one_session(names: tuple[str, ...], memory: int) -> None:
    proto = weighted(GRAPH)
    model = Model.load(proto)
    wanted = expected(proto, names)
    values = [model.graph.values[name] for name in names]
    with Relay(model, feeds(), values, memory=memory, threads=1) as run:
        assert run.feeds == 3
        for name, value in zip(names, values, strict=True):
            compare(run.values(value), wanted[name])
        assert run._kept == set()  # nothing is held that nobody will ask for


class Counting(Session):
    """Counts what every piece computes, and how often it runs."""

    computed: Counter[str]

    def __init__(self, model: bytes, **options: Any) -> None:
        super().__init__(model, **options)
        nodes = onnx.load_from_string(model).graph.node
        self._outputs = [name for node in nodes for name in node.output]

    def run(self, feed: Any, outputs: Any = None) -> dict[str, Any]:
        self.computed.update(self._outputs)
        return super().run(feed, outputs)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    Counting.computed = Counter()
    monkeypatch.setattr(relay, "Session", Counting)
    return Counting.computed


def test_no_node_runs_twice_and_none_that_nobody_needs(computed: Counter[str]) -> None:
    model = Model.load(weighted(GRAPH))
    names = ("b", "s", "j", "s", "m")
    values = [model.graph.values[name] for name in names]
    with Relay(model, feeds(), values, threads=1) as run:
        for value in values:
            list(run.values(value))
    ran = {name for name in NAMES if name != "y"}
    assert computed == dict.fromkeys(ran, 3)  # once on each feed


def test_a_piece_is_only_what_is_not_known_yet(computed: Counter[str]) -> None:
    model = Model.load(weighted(GRAPH))
    s, k = (model.graph.values[name] for name in ("s", "k"))
    with Relay(model, feeds(), [s, k], threads=1) as run:
        list(run.values(s))
        assert computed == dict.fromkeys(("a", "b", "l", "s"), 3)
        computed.clear()
        list(run.values(k))
        assert computed == dict.fromkeys(("d", "k"), 3)


def test_weights_that_change_before_their_node_runs_count() -> None:
    proto = weighted(GRAPH)
    model = Model.load(proto)
    edit = Editor(model)
    values = [model.graph.values[name] for name in ("s", "k", "m")]
    new = np.full((5, 4), 0.5, np.float32)
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for tensor in changed.graph.initializer:
        if tensor.name == "w3":
            tensor.CopyFrom(onnx.numpy_helper.from_array(new, "w3"))
    with Relay(model, feeds(), values, threads=1) as run:
        compare(run.values(values[0]), expected(proto, ["s"])["s"])
        edit.set_weight(model.graph.values["w3"], onnx.numpy_helper.from_array(new, "w3"))
        for name, value in zip(("k", "m"), values[1:], strict=True):
            compare(run.values(value), expected(changed, [name])[name])


def test_a_bias_that_a_node_gets_meanwhile_counts() -> None:
    proto = weighted(
        "(float[n,3] x, float[3,4] w1, float[4,2] w2) => (float[n,2] y)"
        " { h = Relu(x) g = Gemm(h, w1) y = Gemm(g, w2) }"
    )
    model = Model.load(proto)
    edit = Editor(model)
    h, y = model.graph.values["h"], model.graph.values["y"]
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    with Relay(model, [{"x": x}], [h, y], threads=1) as run:
        (seen,) = run.values(h)
        assert y.producer is not None
        tensor = onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "new")
        edit.append_input(y.producer, edit.add_constant(model.graph, "new", tensor, -1.0))
        (found,) = run.values(y)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    np.testing.assert_allclose(found, seen @ stored["w1"] @ stored["w2"] + [1, 2], rtol=1e-5)


def test_files_go_with_the_relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Model.load(weighted(GRAPH))
    values = [model.graph.values[name] for name in ("s", "y")]

    def files() -> int:
        return len(list(tmp_path.glob("graphopt-*/*.npy")))

    with Relay(model, feeds(), values, memory=0, threads=1) as run:
        assert files() == 9  # x, x2 and c of three feeds
        list(run.values(values[0]))
        assert files() == 12  # c, b, l and s, which are still needed
        list(run.values(values[1]))
        assert files() == 0
    assert list(tmp_path.iterdir()) == []


def test_files_go_with_a_relay_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Model.load(weighted(GRAPH))
    y = model.graph.values["y"]
    bad = [*feeds(), {**feeds(1)[0], "x2": np.zeros((7, 6), np.float32)}]

    def run() -> None:
        with Relay(model, bad, [y], memory=0, threads=1) as going:
            for _ in going.values(y):
                assert list(tmp_path.iterdir())

    with pytest.raises(runtime.RuntimeFailure):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_shelf_holds_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shelf = Shelf(limit=100)
    arrays = [np.arange(10.0) + n for n in range(3)]  # 80 bytes each
    for number, array in enumerate(arrays):
        shelf["v", number] = array
    assert len(list(tmp_path.glob("*/*.npy"))) == 2
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(shelf["v", number], array)
    del shelf["v", 0]  # and makes room
    del shelf["v", 1]
    shelf["v", 1] = arrays[1]
    assert len(list(tmp_path.glob("*/*.npy"))) == 1
    np.testing.assert_array_equal(shelf["v", 1], arrays[1])
    shelf.close()
    assert list(tmp_path.iterdir()) == []


def test_two_models_side_by_side() -> None:
    model, other = Model.load(weighted(GRAPH)), Model.load(weighted(GRAPH, seed=1))
    values = model.graph.values["s"], other.graph.values["k"]
    with (
        Relay(model, feeds(), values[:1], threads=1) as first,
        Relay(other, feeds(), values[1:], threads=1) as second,
    ):
        found = list(paired(first, values[0], second, values[1]))
    compare([a for a, _ in found], expected(weighted(GRAPH), ["s"])["s"])
    compare([b for _, b in found], expected(weighted(GRAPH, seed=1), ["k"])["k"])


def test_what_is_no_tensor_is_a_mistake() -> None:
    text = (
        "g (seq(float[2]) x) => (float[2] y) { i = Constant<value_int=0>() y = SequenceAt(x, i) }"
    )
    model = Model.load(parsed(text))
    with pytest.raises(UsageError, match="input 'x' is no tensor"):
        Relay(model, [{"x": [np.zeros(2, np.float32)]}], [model.graph.values["y"]])


def test_what_nobody_gives_is_a_mistake() -> None:
    model = Model.load(weighted(GRAPH))
    x = model.graph.values["x"]
    given = [{"x2": np.zeros((1, 6), np.float32)}]
    said = "'x' is given by no node and no feed"
    with Relay(model, given, [x]) as run, pytest.raises(UsageError, match=said):
        next(run.values(x))


def test_a_failure_of_the_runtime_is_one() -> None:
    model = Model.load(weighted(GRAPH))
    y = model.graph.values["s"]
    bad = {**feeds(1)[0], "x2": np.zeros((7, 6), np.float32)}
    with Relay(model, [bad], [y], threads=1) as run, pytest.raises(runtime.RuntimeFailure):
        list(run.values(y))


def test_constants_and_sparse_weights_come_along() -> None:
    array = np.zeros((16, 32), np.float32)
    array[::3, ::5] = 1.5
    model = Model.load(graphs.matmul(onnx.numpy_helper.from_array(array, "w")))
    run_pipeline(model, [Sparsify()])
    value = model.graph.values["w"].weight
    assert value is not None
    assert value.is_sparse
    x = np.random.default_rng(0).standard_normal((1, 16)).astype(np.float32)
    with Relay(model, [{"x": x}], [model.graph.values["y"]], threads=1) as run:
        (found,) = run.values(model.graph.values["y"])
    np.testing.assert_allclose(found, x @ array, rtol=1e-5)


def test_a_constant_of_a_node_that_two_pieces_read() -> None:
    text = (
        "(float[n,6] x) => (float[n,6] y) {"
        " k = Constant<value = float {2}>() a = Mul(x, k) b = Mul(a, k) y = Neg(b) }"
    )
    model = Model.load(weighted(text))
    x = np.ones((3, 6), np.float32)
    a, b = model.graph.values["a"], model.graph.values["b"]
    with Relay(model, [{"x": x}], [a, b], threads=1) as run:
        found = [float(each.mean()) for value in (a, b) for each in run.values(value)]
    assert found == [2, 4]
