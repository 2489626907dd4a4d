"""What can be chosen for layers, what is chosen, and how well the factors of that fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import exporter, macs
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.lowrank import weighted_error
from graphopt.passes.fitting import Settings, each_moments
from graphopt.passes.linear import Layer, linear_layers
from graphopt.passes.lowrank.allocation import allocate, hull
from graphopt.passes.lowrank.factor import Factored, factor
from graphopt.passes.lowrank.forms import FORMS, METHODS, Extent, Method, Split, split_of
from graphopt.passes.lowrank.options import RATIOS, Option, Splittable, pooled, splittable
from graphopt.passes.lowrank.table import Ranks, tabulate
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.runtime import Session
from tests import graphs
from tests.prune_runs import weighted
from tests.test_lowrank_split import arbitrary, assert_same, split_all, stored, with_effective

Array = NDArray[Any]
SETTINGS = Settings(threads=1)

# -- what options cost -----------------------------------------------------------------------------

CONV = "(float[2,24,14,13] x, float[32,24,{k}] w) => (float[a,b,c,d] y) {{ y = Conv<{s}>(x, w) }}"
COSTS = {
    "one tap": CONV.format(k="1,1", s="strides=[2,2]"),
    "padded tap": CONV.format(k="1,1", s="pads=[1,2,0,1]"),
    "3x3": CONV.format(k="3,3", s="pads=[1,1,1,1]"),
    "other strides": CONV.format(k="5,3", s="strides=[1,2],pads=[2,0,1,1],dilations=[1,2]"),
    "narrow": "(float[1,2,20,20] x, float[64,2,3,3] w) => (float[a,b,c,d] y) { y = Conv(x, w) }",
    "wide": "(float[1,64,9,9] x, float[2,64,2,2] w) => (float[a,b,c,d] y) { y = Conv(x, w) }",
    "one axis": (
        "(float[2,24,30] x, float[32,24,5] w) => (float[a,b,c] y) { y = Conv<strides=[3]>(x, w) }"
    ),
    "three axes": (
        "(float[1,12,5,6,7] x, float[16,12,2,3,2] w) => (float[a,b,c,d,e] y)"
        " { y = Conv<strides=[1,2,1]>(x, w) }"
    ),
    "gemm": "(float[5,40] x, float[40,24] w, float[24] b) => (float[a,b2] y) { y = Gemm(x, w, b) }",
    "matmul": "(float[2,3,5,40] x, float[40,70] w) => (float[a,b,c,d] y) { y = MatMul(x, w) }",
    "matmul of a row": "(float[40] x, float[40,24] w) => (float[a] y) { y = MatMul(x, w) }",
    "shared": (
        "(float[2,5,40] x, float[7,40] x2, float[40,32] w) => (float[a,b,c] y, float[d,e] z)"
        " { y = MatMul(x, w) z = MatMul(x2, w) }"
    ),
    "shared conv": (
        "(float[1,16,12,12] x, float[32,16,3,3] w, float[16,32,1,1] v)"
        " => (float[a,b,c,d] y, float[e,f,g,h] z)"
        " { y = Conv<pads=[1,1,1,1]>(x, w) r = Conv(y, v) z = Conv<pads=[1,1,1,1]>(r, w) }"
    ),
}
SIZES = [
    pytest.param(name, method, id=f"{name}: {method}")
    for name, text in COSTS.items()
    for method in METHODS
    if FORMS[method].fits(linear_layers(Editor(Model.load(weighted(text))))[0])
]


def group_of(proto: onnx.ModelProto) -> Splittable:
    """The first."""
    return splittable(Editor(Model.load(proto)), {})[0]


def macs_of(proto: onnx.ModelProto) -> int:
    """Of the whole model, at the shapes that it states."""
    inputs = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in proto.graph.input
    }
    found = macs.count(proto, inputs)
    assert not found.unknown
    return found.total


def split_model(proto: onnx.ModelProto, splits: dict[str, Split]) -> onnx.ModelProto:
    edit = Editor(Model.load(proto))
    split_all(edit, splits)
    edit.settle()
    return exporter.to_proto(edit.model)


@pytest.mark.parametrize(("name", "method"), SIZES)
def test_options_cost_what_the_split_model_does(name: str, method: Method) -> None:
    proto = weighted(COSTS[name])
    group, form = group_of(proto), FORMS[method]
    rest = macs_of(proto) - group.macs  # of layers between those that are split
    assert rest == (16 * 32 * 144 if name == "shared conv" else 0)
    assert (group.dense.macs, group.dense.cost, group.dense.error) == (group.macs, group.macs, 0)
    assert group.dense.size == group.first.weight.size
    found = group.ranks(method)
    assert found or name in ("narrow", "wide", "padded tap", "one tap", "matmul of a row", "gemm")
    some = [*found][:2] + [*found][-2:]
    for rank in {*some, form.most(group.first)}:
        split = arbitrary(group.first, method, rank)
        made = split_model(proto, {group.root: split})
        cost = sum(form.macs(group.first, extent, rank) for extent in group.extents)
        assert macs_of(made) - rest == cost
        assert cost == found.get(rank, cost)
        floats = sum(a.size for name, a in stored(made).items() if "factor" in name)
        assert split.size == form.size(group.first, rank) == floats
        if method != "cp":
            near = split_of(group.first, method, rank, group.first.matrix(), None)
            assert [f.shape for f in near.factors] == form.shapes(group.first, rank)


@pytest.mark.parametrize(("name", "method"), SIZES)
def test_ranks_worth_a_try(name: str, method: Method) -> None:
    group, form = group_of(weighted(COSTS[name])), FORMS[method]
    most = form.most(group.first)
    step = 16 if most >= 64 else 8 if most >= 32 else 2 if most >= 16 else 1
    found = group.ranks(method)
    assert list(found) == sorted(found)
    for rank, cost in found.items():
        assert rank < most
        assert rank % step == 0
        assert cost < 0.95 * group.macs
        assert form.size(group.first, rank) < group.first.weight.size
    every = {
        rank: sum(form.macs(group.first, extent, rank) for extent in group.extents)
        for rank in range(step, most, step)
        if form.size(group.first, rank) < group.first.weight.size
    }
    every = {rank: cost for rank, cost in every.items() if cost < 0.95 * group.macs}
    assert bool(every) == bool(found)
    for ratio in RATIOS if every else ():  # one that is as near as any
        near = min(abs(cost / group.macs - ratio) for cost in every.values())
        assert near == min(abs(cost / group.macs - ratio) for cost in found.values())
    assert {rank for rank in every if rank % 64 == 0} <= set(found)


def test_wide_layers_take_the_ranks_that_runtimes_like() -> None:
    proto = weighted(
        "(float[1,512] x, float[512,512] w) => (float[a,b] y) { y = MatMul(x, w) }", seed=1
    )
    found = group_of(proto).ranks("svd")
    assert {64, 128, 192} <= set(found)
    assert all(rank % 16 == 0 for rank in found)
    assert max(found) == 224  # nearest to 0.9 of the work


LEFT = {
    "few weights": "(float[3,15] x, float[15,17] w) => (float[a,b] y) { y = MatMul(x, w) }",
    "one output": "(float[3,300] x, float[300,1] w) => (float[a,b] y) { y = MatMul(x, w) }",
    "one input": "(float[3,1] x, float[1,300] w) => (float[a,b] y) { y = MatMul(x, w) }",
    "groups": (
        "(float[1,64,9,9] x, float[64,32,3,3] w) => (float[a,b,c,d] y) { y = Conv<group=2>(x, w) }"
    ),
    "no constant": "(float[8,32] x, float[32,32] x2) => (float[a,b] y) { y = MatMul(x, x2) }",
}


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_are_left_out(name: str) -> None:
    assert splittable(Editor(Model.load(weighted(LEFT[name]))), {}) == []


def test_the_smallest_that_is_not() -> None:
    text = "(float[3,16] x, float[16,16] w) => (float[a,b] y) { y = MatMul(x, w) }"
    assert len(splittable(Editor(Model.load(weighted(text))), {})) == 1


OPEN = (
    "(float[n,8,h,v] x, float[16,8,3,3] w, float[16,32] u) => (float[m,32] y)"
    " { c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) y = MatMul(f, u) }"
)


def test_extents_are_those_of_a_run() -> None:
    edit = Editor(Model.load(weighted(OPEN)))
    one, two = splittable(edit, {"x": (4, 8, 10, 7), "f": (4, 16)})
    assert one.extents == (Extent(4, (10, 7), (8, 5)),)
    assert two.extents == (Extent(4),)
    assert one.macs == 4 * 8 * 5 * 16 * 72


def test_layers_of_which_nothing_is_known_are_applied_once() -> None:
    model = Model.load(weighted(OPEN))
    one, two = splittable(Editor(model), {})
    assert one.extents == (Extent(1, (1, 1), (1, 1)),)
    assert two.extents == (Extent(1),)
    ranks = tabulate(model, {}, METHODS, None, SETTINGS)
    assert ranks.total == one.macs + two.macs == 16 * 72 + 16 * 32
    assert ranks.left({g.root: ranks.options[g.root][-1] for g in ranks.groups}) > 0


# -- what options lose -----------------------------------------------------------------------------

LOSSES = {
    "conv": (
        "(float[8,12,9,8] x, float[16,12,3,3] w, float[16] b) => (float[a,b1,c,d] y)"
        " { y = Conv<strides=[2,1]>(x, w, b) }",
        True,
    ),
    "conv without a bias": (  # which may get one
        "(float[8,12,9,8] x, float[16,12,3,3] w) => (float[a,b,c,d] y) { y = Conv(x, w) }",
        True,
    ),
    "tap": (
        "(float[8,24,9,8] x, float[20,24,1,1] w, float[20] b) => (float[a,b1,c,d] y)"
        " { y = Conv(x, w, b) }",
        True,
    ),
    "tall": ("(float[200,24] x, float[24,64] w) => (float[a,b] y) { y = Gemm(x, w) }", True),
    "wide": ("(float[200,64] x, float[64,24] w) => (float[a,b] y) { y = Gemm(x, w) }", True),
    "matmul": (
        "(float[9,30,40] x, float[40,24] w) => (float[a,b,c] y) { y = MatMul(x, w) }",
        False,
    ),
    "tall matmul": (
        "(float[9,30,24] x, float[24,40] w) => (float[a,b,c] y) { y = MatMul(x, w) }",
        False,
    ),
    "read by others": (
        "(float[200,40] x, float[40,24] w, float[24] b) => (float[a,b1] y, int64[2] k)"
        " { y = Gemm(x, w, b) k = Shape(w) }",
        False,
    ),
    "shared": (
        "(float[90,40] x, float[60,40] x2, float[40,24] w, float[24] b, float[24] b2)"
        " => (float[a,c] y, float[d,e] z) { y = Gemm(x, w, b) z = Gemm(x2, w, b2) }",
        False,
    ),
}


def feed_of(proto: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Numbers with a mean, whose features few directions make up."""
    rng, found = np.random.default_rng(seed), {}
    for info in proto.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        axis = 1 if len(shape) == 4 else len(shape) - 1
        size = shape[axis]
        mixing = np.random.default_rng(size).standard_normal((size, size))
        mixing *= np.exp(-0.3 * np.arange(size))[:, None]
        x = rng.standard_normal([*(s for i, s in enumerate(shape) if i != axis), size]) @ mixing
        x += np.random.default_rng(size + 1).uniform(0, 1.5, size) + 0.01 * rng.standard_normal(
            size
        )
        found[info.name] = np.moveaxis(x, -1, axis).astype(np.float32)
    return found


def outputs_of(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    """Rows of each output, float64."""
    with Session(proto.SerializeToString(), threads=1) as session:
        found = list(session.run(feed).values())
    rows = [np.moveaxis(a, 1, -1) if a.ndim == 4 else a for a in found]
    return [a.reshape(-1, a.shape[-1]).astype(np.float64) for a in rows]


def measured(
    proto: onnx.ModelProto, other: onnx.ModelProto, feed: Mapping[str, Array], *, centred: bool
) -> float:
    """What is lost, in all outputs together, of the variance of what the first model gives."""
    lost = signal = 0.0
    for whole, found in zip(outputs_of(proto, feed), outputs_of(other, feed), strict=True):
        mean = (found - whole).mean(0) if centred else 0.0
        lost += float(np.square(found - whole - mean).sum())
        signal += float(np.square(whole - whole.mean(0)).sum())
    return lost / signal


def table(
    proto: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]] | None, methods: Any = METHODS
) -> Ranks:
    given = None if feeds is None else lambda: iter(feeds)
    return tabulate(Model.load(proto), shapes_of(proto), methods, given, SETTINGS)


def shapes_of(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Those of all values that are stated, or follow."""
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    infos = [*inferred.graph.input, *inferred.graph.value_info]
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos}
    return {name: shape for name, shape in shapes.items() if all(shape)}


@pytest.mark.parametrize("name", LOSSES)
def test_options_lose_what_the_split_model_does(name: str) -> None:
    text, is_centred = LOSSES[name]
    proto = weighted(text)
    feed = feed_of(proto)
    ranks = table(proto, [feed])
    (group,) = ranks.groups
    assert group.is_centred == is_centred
    roots = {layer.root for layer in group.layers}
    moments = dict(each_moments(Model.load(proto), roots, lambda: iter([feed]), SETTINGS))
    assert moments.keys() == roots
    assert ranks.moments.keys() == (roots if name in ("shared", "read by others") else set())
    gram = pooled(group, moments)
    dense, *options = ranks.options[group.root]
    assert (dense.method, dense.error) == (None, 0.0)
    assert {option.method for option in options} == {
        method for method in METHODS if FORMS[method].fits(group.first)
    }
    for option in options:
        assert option.method is not None
        assert option.cost == option.macs
        split = split_of(group.first, option.method, option.rank, group.first.matrix(), gram)
        made = split_model(proto, {group.root: split})
        found = measured(proto, made, feed, centred=is_centred)
        assert found == pytest.approx(option.error, rel=1e-3, abs=1e-9), option.text
        assert split.size == option.size


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("has_feeds", [False, True])
def test_less_is_lost_at_higher_ranks(name: str, has_feeds: bool) -> None:
    proto = weighted(LOSSES[name][0])
    ranks = table(proto, [feed_of(proto)] if has_feeds else None)
    (options,) = ranks.options.values()
    by_method: dict[Any, list[Option]] = {}
    for option in options[1:]:
        by_method.setdefault(option.method, []).append(option)
    for method, found in by_method.items():
        slack = 1.02 if method == "cp" else 1 + 1e-9  # which is found by iteration
        assert [o.rank for o in found] == sorted({o.rank for o in found})
        for less, more in itertools.pairwise(found):
            assert less.macs <= more.macs
            assert more.error <= slack * less.error
        assert found[-1].error < found[0].error or len(found) == 1
        if not has_feeds:
            (group,) = ranks.groups
            matrix = group.first.matrix()
            for option in found:
                split = split_of(group.first, method, option.rank, matrix, None)
                assert weighted_error(matrix, split.effective, None) == pytest.approx(option.error)
    assert bool(ranks.probes) == has_feeds


def test_without_a_response_nothing_is_lost() -> None:
    proto = weighted("(float[9,40] x, float[40,24] w) => (float[a,b] y) { y = MatMul(x, w) }")
    ranks = table(proto, [{"x": np.zeros((9, 40), np.float32)}])
    assert all(np.isfinite(option.error) for option in ranks.options["y"])


def test_other_weights() -> None:
    proto = weighted(LOSSES["tap"][0])
    group = group_of(proto)
    weights = np.random.default_rng(0).standard_normal((20, 4)) @ np.ones((4, 24))
    for option in group.options(["svd"], None, weights):
        assert option.error < 1e-12  # of rank one
    assert list(group.options(["cp", "spatial"], None)) == []  # do not fit


# -- what is chosen --------------------------------------------------------------------------------


def options_of(pairs: Sequence[tuple[float, float]]) -> list[Option]:
    """A dense one, and others by cost and error."""
    return [
        Option("svd" if error else None, number, int(cost), 1, error, cost)
        for number, (cost, error) in enumerate(pairs)
    ]


def random_table(seed: int) -> dict[str, list[Option]]:
    """Small whole numbers, so that many are alike."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(int(rng.integers(1, 5))):
        count = int(rng.integers(1, 6))
        costs, errors = rng.integers(1, 15, count), rng.integers(0, 12, count)
        scale = float(rng.choice([1.0, 0.25]))
        others = [(float(c), scale * float(e)) for c, e in zip(costs, errors, strict=True)]
        found[f"layer {layer}"] = options_of([(10.0, 0.0), *others])
    return found


def cost_of(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def error_of(chosen: Mapping[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


@pytest.mark.parametrize("seed", range(60))
def test_nothing_of_that_cost_loses_less(seed: int) -> None:
    options = random_table(seed)
    choices = [
        dict(zip(options, each, strict=True)) for each in itertools.product(*options.values())
    ]
    costs = sorted({cost_of(each) for each in choices})
    for wanted in [*costs, costs[0] - 1]:
        chosen = allocate(options, lambda some: cost_of(some) <= wanted)  # noqa: B023
        assert chosen.keys() == options.keys()
        best = min(error_of(each) for each in choices if cost_of(each) <= cost_of(chosen))
        assert error_of(chosen) == pytest.approx(best)
        if wanted >= costs[0]:
            assert cost_of(chosen) <= wanted
        else:
            assert cost_of(chosen) == costs[0]  # the cheapest, if it never is enough


@pytest.mark.parametrize("seed", range(60))
def test_hulls(seed: int) -> None:
    for options in random_table(seed).values():
        found = hull(options)
        assert found[0].error == min(option.error for option in options)
        assert found[-1].cost == min(option.cost for option in options)
        for dear, cheap in itertools.pairwise(found):
            assert dear.cost > cheap.cost
            assert dear.error < cheap.error
        slopes = [(b.error - a.error) / (a.cost - b.cost) for a, b in itertools.pairwise(found)]
        assert slopes == sorted(set(slopes))  # and none on a line between others
        costs, errors = [o.cost for o in found[::-1]], [o.error for o in found[::-1]]
        for option in options:
            assert option.error >= np.interp(option.cost, costs, errors) - 1e-9


def test_what_is_enough_at_once() -> None:
    options = random_table(3)
    assert error_of(allocate(options, lambda _: True)) == 0
    assert allocate({}, lambda _: False) == {}


# -- tables ----------------------------------------------------------------------------------------

NET = (
    "(float[6,8,10,9] x, float[24,8,3,3] w1, float[16,24,1,1] w2, float[16] b2,"
    " float[16,4,3,3] w3, float[16,32] w4, float[32] b4, float[32,20] w5) => (float[6,20] y) {"
    " c1 = Conv<pads=[1,1,1,1],strides=[2,1]>(x, w1) r1 = Relu(c1)"
    " c2 = Conv(r1, w2, b2) r2 = Relu(c2) c3 = Conv<group=4>(r2, w3) r3 = Relu(c3)"
    " p = GlobalAveragePool(r3) f = Flatten(p)"
    " h4 = MatMul(f, w4) a4 = Add(h4, b4) r4 = Tanh(a4) y = MatMul(r4, w5) }"
)
FEEDS = 8


def net() -> tuple[onnx.ModelProto, list[dict[str, Array]]]:
    proto = weighted(NET)
    return proto, [feed_of(proto, seed) for seed in range(FEEDS)]


def test_what_a_choice_leaves() -> None:
    proto, feeds = net()
    ranks = table(proto, feeds[:2])
    assert [group.root for group in ranks.groups] == ["c1", "c2", "h4", "y"]
    assert ranks.total == macs_of(proto)
    assert ranks.left({}) == 1
    assert ranks.left({root: options[0] for root, options in ranks.options.items()}) == 1
    rng = np.random.default_rng(0)
    for _ in range(5):
        chosen = {
            r: options[int(rng.integers(len(options)))] for r, options in ranks.options.items()
        }
        splits = {
            group.root: arbitrary(group.first, option.method, option.rank)
            for group in ranks.groups
            if (option := chosen[group.root]).method is not None
        }
        made = macs_of(split_model(proto, splits))
        assert ranks.left(chosen) == pytest.approx(made / macs_of(proto), rel=1e-12)
        gone = ranks.groups[0].macs - chosen.pop("c1").macs  # what is not named stays whole
        assert ranks.left(chosen) == pytest.approx((made + gone) / macs_of(proto), rel=1e-12)


def test_shares_that_are_asked_for() -> None:
    proto, feeds = net()
    ranks = table(proto, feeds[:2], ("svd", "channel", "spatial", "tucker"))
    hulls = {root: hull(options) for root, options in ranks.options.items()}
    steps = [a.macs - b.macs for each in hulls.values() for a, b in itertools.pairwise(each)]
    least = ranks.left({root: each[-1] for root, each in hulls.items()})
    assert least < 0.4
    lost = -1.0
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, least, 0.9 * least, 0.0):
        chosen = ranks.allocated(share)
        left = ranks.left(chosen)
        assert left <= max(share, least) + 1e-12
        assert left > min(share, 1.0) - max(steps) / ranks.total or left == least
        assert error_of(chosen) >= lost
        lost = error_of(chosen)
    fixed = {root: options[:1] for root, options in ranks.options.items()}
    assert ranks.left(ranks.allocated(0.1, fixed)) == 1
    some = fixed | {"c1": ranks.options["c1"]}
    chosen = ranks.allocated(0.8, some)
    assert [root for root, option in chosen.items() if option.method is not None] == ["c1"]


def test_the_order_of_groups_is_that_of_computation() -> None:
    """Though one is not known before the last layer that reads its weights."""
    proto = weighted(
        "(float[9,24] x, float[24,24] w, float[24,24] v, float[24,24] u) => (float[a,b] y)"
        " { p = MatMul(x, w) q = MatMul(p, v) r = MatMul(q, w) y = MatMul(r, u) }"
    )
    for feeds in (None, [feed_of(proto)]):
        ranks = table(proto, feeds, ["svd"])
        assert [group.root for group in ranks.groups] == ["p", "q", "y"]
        assert list(ranks.options) == ["p", "q", "y"]
        assert ranks.moments.keys() == (set() if feeds is None else {"p", "r"})
        assert ranks.total == macs_of(proto) == sum(group.macs for group in ranks.groups)


@pytest.mark.parametrize("name", LOSSES)
def test_probes_lose_what_they_tell(name: str) -> None:
    proto = weighted(LOSSES[name][0])
    feed = feed_of(proto)
    ranks = table(proto, [feed])
    (probe,) = ranks.probes.values()
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    for tensor in other.graph.initializer:
        if tensor.name == probe.weights:
            assert probe.stored.shape == tuple(tensor.dims)
            assert probe.stored.dtype == np.float32
            tensor.CopyFrom(onnx.numpy_helper.from_array(probe.stored, tensor.name))
    assert measured(proto, other, feed, centred=False) == pytest.approx(probe.error, rel=1e-3)


# -- factors ---------------------------------------------------------------------------------------


def chosen_of(ranks: Ranks, wanted: Mapping[str, tuple[Method, int]]) -> dict[str, Option]:
    return {root: Option(*each, 0, 0, 0.0, 0.0) for root, each in wanted.items()}


def factored(
    proto: onnx.ModelProto,
    wanted: Mapping[str, tuple[Method, int]],
    feeds: Sequence[Mapping[str, Array]] | None,
    folder: Path,
) -> tuple[onnx.ModelProto, Factored, Editor]:
    """The split model, which gives what the fitted one does, and what led to it."""
    ranks = table(proto, feeds, ["svd"])
    dense, edit = Model.load(proto), Editor(Model.load(proto))
    told: list[float] = []
    found = factor(
        dense,
        edit,
        ranks.groups,
        chosen_of(ranks, wanted),
        None if feeds is None else lambda: iter(feeds),
        SETTINGS,
        known=ranks.moments,
        progress=told.append,
    )
    assert found.splits.keys() == found.errors.keys() == wanted.keys()
    assert told == sorted(told)
    assert all(0 <= each < 1 for each in told)
    lossless = graphs.save(proto, folder / "lossless.onnx")
    stage = Stage.between(dense, edit, splits=found.splits)
    made = exporter.to_proto(StagedRecipe((stage,)).apply(lossless))
    feed = feed_of(proto, 99)
    whole = np.concatenate([a.ravel() for a in outputs_of(made, feed)])
    fitted = np.concatenate([a.ravel() for a in outputs_of(exporter.to_proto(edit.model), feed)])
    assert np.abs(whole - fitted).max() < 1e-4 * np.abs(fitted).max()
    return made, found, edit


WANTED: list[dict[str, tuple[Method, int]]] = [
    {"c1": ("channel", 6), "c2": ("svd", 5), "h4": ("svd", 4), "y": ("svd", 8)},
    {"c1": ("tucker", 4), "y": ("svd", 6)},
    {"c1": ("spatial", 8), "h4": ("svd", 3)},
    {"c1": ("cp", 24), "c2": ("svd", 4)},
]


def layers_of(proto: onnx.ModelProto) -> dict[str, Layer]:
    return {layer.root: layer for layer in linear_layers(Editor(Model.load(proto)))}


@pytest.mark.parametrize("wanted", WANTED)
def test_without_data_factors_are_plain(
    wanted: dict[str, tuple[Method, int]], tmp_path: Path
) -> None:
    proto, _ = net()
    made, found, _ = factored(proto, wanted, None, tmp_path)
    layers = layers_of(proto)
    plain = {
        root: split_of(layers[root], method, rank, layers[root].matrix(), None)
        for root, (method, rank) in wanted.items()
    }
    for root, split in plain.items():
        for one, other in zip(found.splits[root].factors, split.factors, strict=True):
            np.testing.assert_array_equal(one, other)
        lost = weighted_error(layers[root].matrix(), split.effective, None)
        assert found.errors[root] == pytest.approx(lost)
    assert found.fitted.layers == []
    assert_same(made, with_effective(proto, plain))


@pytest.mark.parametrize("wanted", WANTED)
def test_fitted_factors_lose_less_than_plain_ones(
    wanted: dict[str, tuple[Method, int]], tmp_path: Path
) -> None:
    """Than the factors of each layer by itself, weighed by what it reads in the dense network."""
    proto, feeds = net()
    made, found, _ = factored(proto, wanted, feeds, tmp_path)
    layers = layers_of(proto)
    roots = set(wanted)
    moments = dict(each_moments(Model.load(proto), roots, lambda: iter(feeds), SETTINGS))
    groups = {group.root: group for group in splittable(Editor(Model.load(proto)), {})}
    plain, bare = (
        {
            root: split_of(
                layers[root],
                method,
                rank,
                layers[root].matrix(),
                pooled(groups[root], moments) if is_weighed else None,
            )
            for root, (method, rank) in wanted.items()
        }
        for is_weighed in (True, False)
    )
    for seed in (0, 1, 50, 51):  # seen, and not
        feed = feed_of(proto, seed)
        error = measured(proto, made, feed, centred=False)
        for splits in (plain, bare):
            other = measured(proto, split_model(proto, splits), feed, centred=False)
            assert error < other
    assert [layer.root for layer in found.fitted.layers] == ["c1", "c2", "c3", "h4", "y"]
    for layer in found.fitted.layers:
        assert layer.error_after <= layer.error_before + 1e-9 or layer.root in wanted
    assert found.fitted.feeds == FEEDS


TWO = (
    "(float[300,24] x, float[24,20] w, float[20] b, float[20,16] v, float[16] e)"
    " => (float[a,d] y) { h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, e) }"
)


@pytest.mark.parametrize("rank", [3, 8, 16])
def test_a_layer_makes_up_for_those_before_it(rank: int, tmp_path: Path) -> None:
    """To what nothing of its rank comes nearer: reduced-rank regression, in closed form."""
    proto = weighted(TWO)
    feed = feed_of(proto)
    made, found, edit = factored(proto, {"h": ("svd", 4), "y": ("svd", rank)}, [feed], tmp_path)
    (whole,) = outputs_of(proto, feed)
    damaged = onnx.ModelProto()
    damaged.CopyFrom(exporter.to_proto(edit.model))
    damaged.graph.output[0].name = "r"
    (x,) = outputs_of(damaged, feed)
    # The best of all weights and biases of the rank for what the second layer reads now.
    z, t = x - x.mean(0), whole - whole.mean(0)
    free = np.linalg.lstsq(z, t, rcond=None)[0]
    best = free @ (basis := np.linalg.svd(z @ free)[2][:rank].T) @ basis.T
    least = float(np.square(z @ best - t).sum())
    (gives,) = outputs_of(made, feed)
    lost = float(np.square(gives - whole).sum())
    assert least * (1 - 1e-6) <= lost <= 1.05 * least  # the ridge pulls towards what it was
    dense = layers_of(proto)["y"]
    near = split_of(dense, "svd", rank, dense.matrix(), z.T @ z).effective
    plain = x @ near.T + stored(proto)["e"] - whole
    assert lost < float(np.square(plain).sum())
    after = found.fitted.layers[1].error_after
    assert after == pytest.approx(lost / float(np.square(t).sum()), rel=1e-2)


def test_layers_that_stay_whole_make_up_too(tmp_path: Path) -> None:
    proto = weighted(TWO)
    feed = feed_of(proto)
    made, found, _ = factored(proto, {"h": ("svd", 4)}, [feed], tmp_path)
    split = split_model(proto, {"h": found.splits["h"]})
    assert measured(proto, made, feed, centred=False) < 0.9 * measured(
        proto, split, feed, centred=False
    )
    assert found.fitted.layers[1].error_after < found.fitted.layers[1].error_before


SHARED = (
    "(float[300,24] x, float[300,24] x2, float[24,24] w, float[24] b, float[24] b2, float[24,16] v)"
    " => (float[a,d] y) { p = Gemm(x, w, b) q = Gemm(x2, w, b2) r = Tanh(p) s = Tanh(q)"
    " m = Mul(r, s) y = Gemm(m, v) }"
)


def test_shared_weights_are_weighed_by_what_all_layers_read(tmp_path: Path) -> None:
    proto = weighted(SHARED)
    feed = feed_of(proto)
    feed["x2"] = 0.3 * feed["x2"][:, ::-1].copy()
    made, found, _ = factored(proto, {"p": ("svd", 6), "y": ("svd", 8)}, [feed], tmp_path)
    assert [layer.root for layer in found.fitted.layers] == ["y"]
    x = np.concatenate([feed["x"], feed["x2"]]).astype(np.float64)
    layer = layers_of(proto)["p"]
    best = split_of(layer, "svd", 6, layer.matrix(), x.T @ x)
    gives, near = (
        x @ (found.splits["p"].effective - m).T for m in (layer.matrix(), best.effective)
    )
    assert np.square(near).sum() < 1e-6 * np.square(gives).sum()
    whole = np.square(x @ layer.matrix().T.astype(np.float64)).sum()
    assert found.errors["p"] == pytest.approx(np.square(gives).sum() / whole, rel=1e-4)
    assert sum(a.size for n, a in stored(made).items() if n.startswith("p/factor")) == 2 * 6 * 24


TIED = {
    "directly": "h = MatMul(x, w) k = Relu(w)",
    "behind a Transpose": "t = Transpose(w) h = MatMul(x, t) k = Relu(w)",
    "from a Transpose": "t = Transpose<perm=[1,0]>(w) h = Gemm(x, t) k = Relu(t)",
    "two layers": "h0 = Gemm(x, w) t = Transpose(w) h = Gemm<transB=1>(h0, t) k = Relu(w)",
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("has_feeds", [False, True])
def test_who_else_reads_weights_reads_them_whole(
    name: str, has_feeds: bool, tmp_path: Path
) -> None:
    """Or layers behind it would be fitted to make up for what is not lost."""
    proto = weighted(
        f"(float[200,24] x, float[24,24] w, float[24,16] v) => (float[a,b] y, float[c,d] k)"
        f" {{ {TIED[name]} m = MatMul(x, k) s = Add(h, m) y = Gemm(s, v) }}"
    )
    feed = feed_of(proto)
    root = "h0" if name == "two layers" else "h"
    wanted: dict[str, tuple[Method, int]] = {root: ("svd", 6)}
    made, _, edit = factored(proto, wanted, [feed] if has_feeds else None, tmp_path)
    before = outputs_of(proto, feed)[1]
    for model in (made, exporter.to_proto(edit.model)):
        np.testing.assert_array_equal(outputs_of(model, feed)[1], before)
    np.testing.assert_array_equal(stored(made)["w"], stored(proto)["w"])
