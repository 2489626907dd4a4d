"""Channels made alike: exact in floats, cheaper to round, left alone where it would not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.affine import asymmetric, channel_affine, fake
from graphopt.passes.quantize.channels import channels_of
from graphopt.passes.quantize.equalize import EQUALIZE, SMOOTH, Rescaled, equalize, observed, smooth
from graphopt.passes.quantize.units import Units
from graphopt.statistics import sweep
from tests.graphs import graph as body
from tests.graphs import if_node, node, value
from tests.optimized import applied, sqnr
from tests.quantized import Small, constant, integers, make_static, normal, run, values_of

Array = NDArray[Any]
Method = Callable[..., list[Rescaled]]
SPREAD = np.geomspace(0.02, 20.0, 8)  # how much louder one channel is than another
X = {"x": (4, 3, 12, 12)}


def loud(name: str, *shape: int, axis: int = 0) -> onnx.TensorProto:
    """Weights whose output channels are as unequal as `SPREAD`."""
    along = [1] * len(shape)
    along[axis] = -1
    array = onnx.numpy_helper.to_array(normal(name, *shape))
    return constant(name, array * SPREAD[: shape[axis]].reshape(along))


def quiet(name: str, *shape: int, axis: int = 1) -> onnx.TensorProto:
    """Weights whose input channels make up for it."""
    along = [1] * len(shape)
    along[axis] = -1
    array = onnx.numpy_helper.to_array(normal(name, *shape))
    return constant(name, array / SPREAD[: shape[axis]].reshape(along))


FIRST = node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1])
HELD = [loud("w1", 8, 3, 3, 3), loud("b1", 8), quiet("w2", 4, 8, 3, 3), normal("b2", 4)]
LAST = node("Conv", ["r", "w2", "b2"], ["y"])
SUMS = [
    FIRST,
    node("Relu", ["a"], ["r"]),
    node("Conv", ["r", "w3"], ["c"], pads=[1, 1, 1, 1]),
    node("Add", ["r", "c"], ["s"]),
    node("Conv", ["s", "w2", "b2"], ["y"]),
    node("Conv", ["c", "w2"], ["z"]),
]
GATE = [
    FIRST,
    node("Relu", ["a"], ["r"]),
    node("GlobalAveragePool", ["r"], ["p"]),
    node("Conv", ["p", "w4"], ["q"]),
    node("HardSigmoid", ["q"], ["g"]),
    node("Mul", ["g", "r"], ["s"]),
    node("Conv", ["s", "w2", "b2"], ["y"]),
]
BOTH = constant(
    "w3",
    onnx.numpy_helper.to_array(quiet("w3", 8, 8, 3, 3)) * SPREAD[:, None, None, None],
)
DEPTH = [
    FIRST,
    node("LeakyRelu", ["a"], ["k"], alpha=0.1),
    node("Conv", ["k", "wd"], ["d"], group=8),
    node("Relu", ["d"], ["e"]),
    node("MaxPool", ["e"], ["r"], kernel_shape=[2, 2], strides=[2, 2]),
    LAST,
]
POOLED = [
    FIRST,
    node("Relu", ["a"], ["r"]),
    node("GlobalAveragePool", ["r"], ["p"]),
    node("Reshape", ["p", "rows"], ["f"]),
    node("Gemm", ["f", "wg", "bg"], ["y"], transB=1),
]
GROUPS = [FIRST, node("Relu", ["a"], ["r"]), node("Conv", ["r", "w2g"], ["y"], group=2)]
PRODUCTS = [
    node("MatMul", ["x", "m1"], ["a"]),
    node("Add", ["a", "mb"], ["b"]),
    node("Relu", ["b"], ["r"]),
    node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
    node("Mul", ["t", "half"], ["h"]),
    node("Transpose", ["h"], ["u"], perm=[0, 2, 1]),
    node("MatMul", ["u", "m2"], ["y"]),
]
CASES = {
    "relu": Small([FIRST, node("Relu", ["a"], ["r"]), LAST], X, ["y"], HELD),
    "nothing-between": Small([FIRST, node("Conv", ["a", "w2"], ["y"])], X, ["y"], HELD[:3]),
    "depthwise": Small(DEPTH, X, ["y"], [*HELD, loud("wd", 8, 1, 3, 3)]),
    "groups": Small(GROUPS, X, ["y"], [*HELD[:2], quiet("w2g", 4, 4, 1, 1)]),
    "pooled": Small(
        POOLED,
        {"x": (64, 3, 6, 6)},
        ["y"],
        [*HELD[:2], quiet("wg", 5, 8), normal("bg", 5), integers("rows", 64, 8)],
    ),
    "sum": Small(SUMS, X, ["y", "z"], [*HELD, BOTH]),
    "gate": Small(GATE, X, ["y"], [*HELD, quiet("w4", 8, 8, 1, 1)]),
    "products": Small(
        PRODUCTS,
        {"x": (8, 10, 6)},
        ["y"],
        [
            loud("m1", 6, 8, axis=1),
            loud("mb", 8),
            quiet("m2", 8, 4, axis=0),
            constant("half", 0.5),
        ],
    ),
}
SETS = {"depthwise": 2}  # one before it and one behind it


def rescaled(
    before: onnx.ModelProto,
    feeds: list[dict[str, Array]],
    method: Method = equalize,
    **options: Any,
) -> tuple[onnx.ModelProto, list[Rescaled], Editor]:
    model = Model.load(before)
    statistics = sweep(model, feeds, observed(Editor(model)))
    found: list[Rescaled] = []

    def change(edit: Editor) -> None:
        found.extend(method(edit, Units(edit).all, statistics, **options))

    after, edit = applied(before, change)
    return after, found, edit


@pytest.mark.parametrize("name", CASES)
def test_equalized_models_compute_the_same_and_round_better(name: str) -> None:
    before, feeds = CASES[name].proto(), CASES[name].feeds(8)
    after, found, edit = rescaled(before, feeds)
    assert len(found) == SETS.get(name, 1)
    assert [(c.rule, c.root) for c in edit.changes[::-1]] == [(EQUALIZE, r.root) for r in found]
    plain, even = (make_static(model, feeds).after for model in (before, after))
    for output in CASES[name].outputs:
        expected, floats, rough, fine = (
            np.concatenate([run(m, "off", feed)[output].ravel() for feed in feeds])
            for m in (before, after, plain, even)
        )
        np.testing.assert_allclose(floats, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert sqnr(expected, fine) > sqnr(expected, rough) + 3


@pytest.mark.parametrize("name", CASES)
def test_values_are_divided_by_the_factors_and_have_new_names(name: str) -> None:
    before, feeds = CASES[name].proto(), CASES[name].feeds(1)
    after, found, _ = rescaled(before, feeds)
    old, new = values_of(before, feeds[0]), values_of(after, feeds[0])
    renamed = {before for change in found for before in change.values}
    assert not renamed & set(new)
    axes = {v.name: a for c in channels_of(Editor(Model.load(before))) for v, a in c.axes.items()}
    for change in found:
        for was, now in change.values.items():
            shape = [1] * old[was].ndim
            shape[axes[was]] = -1
            expected = old[was] / change.factors.reshape(shape)
            largest = np.abs(expected).max()
            np.testing.assert_allclose(new[now], expected, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("name", ["depthwise", "sum"])
def test_the_same_bytes_come_of_it_again(name: str) -> None:
    first, second = (rescaled(CASES[name].proto(), CASES[name].feeds())[0] for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_what_all_readers_take_is_scaled_once() -> None:
    after, found, _ = rescaled(CASES["sum"].proto(), CASES["sum"].feeds())
    (change,) = found
    assert list(change.values) == ["a", "r", "c", "s"]
    assert len([n for n in after.graph.node if n.op_type == "Conv"]) == 4
    assert len(after.graph.node) == len(SUMS)


def with_body() -> Small:
    branch = body([node("Relu", ["r"], ["o"])], [], [value("o", None)])
    other = body([node("Identity", ["r"], ["o2"])], [], [value("o2", None)])
    condition = constant("c", True, np.bool_)
    nodes = [FIRST, node("Relu", ["a"], ["r"]), LAST]
    test = if_node(branch, other, ["z"])
    return Small([*nodes, test], X, ["y", "z"], [*HELD, condition])


def between(*nodes: onnx.NodeProto, held: tuple[onnx.TensorProto, ...] = ()) -> Small:
    return Small([FIRST, *nodes, LAST], X, ["y"], [*HELD, *held])


HOSTILE = {
    "hard-swish": between(node("HardSwish", ["a"], ["r"])),
    "clip": between(node("Clip", ["a", "", "six"], ["r"]), held=(constant("six", 6.0),)),
    "silu": between(node("Sigmoid", ["a"], ["s"]), node("Mul", ["a", "s"], ["r"])),
    "square": between(node("Mul", ["a", "a"], ["r"])),
    "number-added": between(node("Add", ["a", "one"], ["r"]), held=(constant("one", 1.0),)),
    "row-added": between(node("Add", ["a", "row"], ["r"]), held=(normal("row", 12),)),
    "map-added": between(node("Add", ["a", "map"], ["r"]), held=(normal("map", 8, 12, 12),)),
    "input-added": between(
        node("Conv", ["x", "w5"], ["i"], pads=[1, 1, 1, 1]),
        node("HardSwish", ["i"], ["j"]),
        node("Add", ["a", "j"], ["r"]),
        held=(normal("w5", 8, 3, 3, 3),),
    ),
    "rows-read": Small(
        [
            FIRST,
            node("Transpose", ["a"], ["r"], perm=[0, 2, 1, 3]),
            node("Conv", ["r", "wt"], ["y"]),
        ],
        X,
        ["y"],
        [*HELD[:2], normal("wt", 4, 12, 1, 1)],
    ),
    "output": Small([FIRST, node("Relu", ["a"], ["r"]), LAST], X, ["y", "r"], HELD),
    "body": with_body(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_done_where_a_factor_does_not_pass(name: str) -> None:
    small = HOSTILE[name]
    before = small.proto()
    model = Model.load(before)
    edit = Editor(model)
    statistics = sweep(model, small.feeds(), observed(edit))
    assert equalize(edit, Units(edit).all, statistics) == []
    assert smooth(edit, Units(edit).all, statistics) == []
    assert edit.mark() == (0, 0)


def test_weights_that_others_use_too_stay() -> None:
    nodes = [FIRST, node("Relu", ["a"], ["r"]), LAST, node("Conv", ["v", "w2", "b2"], ["z"])]
    small = Small(nodes, {**X, "v": (1, 8, 5, 5)}, ["y", "z"], HELD)
    before, feeds = small.proto(), small.feeds()
    after, found, _ = rescaled(before, feeds)
    assert len(found) == 1
    for output in ("y", "z"):
        expected = run(before, "off", feeds[0])[output]
        got = run(after, "off", feeds[0])[output]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_largest_of_a_few_values_is_not_believed() -> None:
    """Each channel of a pooled value was seen once an image."""
    pooled = CASES["pooled"]
    before = pooled.proto()
    assert rescaled(before, pooled.feeds(7))[1] == []  # 448 images
    assert len(rescaled(before, pooled.feeds(8))[1]) == 1


def test_even_channels_denied_changes_and_the_unseen_are_left_alone() -> None:
    small = CASES["relu"]
    flat = [constant("w1", np.ones((8, 3, 3, 3))), constant("b1", np.ones(8))]
    flat += [constant("w2", np.ones((4, 8, 3, 3))), constant("b2", np.ones(4))]
    even = Small(small.nodes, X, ["y"], flat)
    assert rescaled(even.proto(), even.feeds())[1] == []
    model = Model.load(small.proto())
    statistics = sweep(model, small.feeds(), observed(Editor(model)))
    edit = Editor(model, denied=[(EQUALIZE, "a")])
    assert equalize(edit, Units(edit).all, statistics) == []
    edit = Editor(model)
    assert equalize(edit, [], statistics) == []
    assert equalize(edit, Units(edit).all, sweep(model, small.feeds(), [])) == []
    assert edit.mark() == (0, 0)


# -- LayerNormalization ----------------------------------------------------------------------------

WIDE = 32
GAMMA = np.where(np.arange(WIDE) % 11 == 0, 30.0, 1.0)  # a few channels are far out
NORM = node("LayerNormalization", ["x", "gamma", "beta"], ["n"], axis=-1)
HEADS = [
    NORM,
    node("MatMul", ["n", "q"], ["y"]),
    node("MatMul", ["n", "k"], ["p"]),
    node("Add", ["p", "kb"], ["z"]),
]
NORMALISED = [
    constant("gamma", GAMMA),
    normal("beta", WIDE),
    normal("q", WIDE, 16),
    normal("k", WIDE, 24),
    normal("kb", 24),
]
TOKENS = {"x": (8, 24, WIDE)}
SMOOTHED = {
    "before": Small(HEADS, TOKENS, ["y", "z"], NORMALISED),
    "behind": Small(
        [*HEADS, node("Add", ["n", "x"], ["sum"])], TOKENS, ["y", "z", "sum"], NORMALISED
    ),
    "output": Small(HEADS, TOKENS, ["y", "z", "n"], NORMALISED),
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_is_exact_and_rounds_better(name: str) -> None:
    small = SMOOTHED[name]
    before, feeds = small.proto(), small.feeds(6)
    after, (change,), edit = rescaled(before, feeds, smooth)
    assert [(c.rule, c.root) for c in edit.changes] == [(SMOOTH, "n")]
    count = sum(n.op_type == "LayerNormalization" for n in after.graph.node)
    assert count == (1 if name == "before" else 2)  # others go on reading what they read
    (now,) = change.values.values()
    assert change.factors.shape == (WIDE,)
    products = {n.input[0] for n in after.graph.node if n.op_type == "MatMul"}
    assert products == {now}
    plain, even = (make_static(model, feeds).after for model in (before, after))
    for output in small.outputs:
        expected, floats, rough, fine = (
            np.concatenate([run(m, "off", feed)[output].ravel() for feed in feeds])
            for m in (before, after, plain, even)
        )
        np.testing.assert_allclose(floats, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        if output in "yz":
            assert sqnr(expected, fine) > sqnr(expected, rough) + 3


def test_the_alpha_of_least_error_is_chosen() -> None:
    before, feeds = SMOOTHED["before"].proto(), SMOOTHED["before"].feeds(6)
    _, (best,), _ = rescaled(before, feeds, smooth)
    each = [rescaled(before, feeds, smooth, alpha=a)[1] for a in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    assert best.error == min(change.error for (change,) in each)
    assert len({change.error for (change,) in each}) == 6


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_the_expected_error_is_what_rounding_loses(alpha: float) -> None:
    small = SMOOTHED["before"]
    before, feeds = small.proto(), small.feeds(20)
    after, (change,), _ = rescaled(before, feeds, smooth, alpha=alpha)

    def loss(proto: onnx.ModelProto, value: str) -> float:
        """Noise to signal of both products, ranges symmetric as the estimate supposes."""
        x = np.concatenate([values_of(proto, feed)[value].reshape(-1, WIDE) for feed in feeds])
        step = asymmetric(-np.abs(x).max() / 2, np.abs(x).max() / 2).scale
        rounded = np.rint(x / step) * step
        total = 0.0
        model = Model.load(proto)
        for made in model.graph.nodes:
            if made.op == "MatMul":
                weight = constant_of(made.inputs[1], model.store)
                assert weight is not None
                w = np.asarray(weight.values)
                exact = x @ w
                noise = np.square(rounded @ fake(w, channel_affine(w, 1)) - exact).mean()
                total += float(noise / np.square(exact).mean())
        return total

    (now,) = change.values.values()
    assert change.error == pytest.approx(loss(after, now) / loss(before, "n"), rel=0.35)
