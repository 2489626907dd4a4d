"""Channels: which are chosen, what they are worth, and a model without them that still runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import graphopt
from graphopt import exporter, macs, verify
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model, Node
from graphopt.manager import run_pipeline
from graphopt.passes.fitting import Settings
from graphopt.passes.linear import linear_layers
from graphopt.passes.prune.channels import (
    Choice,
    choose,
    column_masks,
    power_law,
    prune_channels,
    steps,
    take_out,
)
from graphopt.passes.prune.costs import Work
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.importance import (
    UNIT_IMPORTANCES,
    UnitImportance,
    observed,
    ranking,
    unit_scores,
)
from graphopt.passes.prune.steps import PruneChannels
from graphopt.runtime import Session
from graphopt.statistics import Statistics, sweep
from tests.prune_runs import DATA, DIGITS, correlated, output_error, pair, weighted, weights

Array = NDArray[Any]
SHAPE = (8, 3, 6, 6)

# Two groups of channels: c of the first convolution, d of the second and of the sum.
NET = (
    "(float[n,3,6,6] x, float[16,3,3,3] w1, float[16] b1, float[8,16,3,3] w2, float[8] b2,"
    " float[8,16,1,1] w3, float[8,5] w4) => (float[n,5] y) {"
    " c = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(c)"
    " d = Conv<pads=[1,1,1,1]>(r, w2, b2) s = Conv(r, w3) a = Add(d, s) k = Relu(a)"
    " p = GlobalAveragePool(k) f = Flatten(p) y = MatMul(f, w4) }"
)


def sizes(proto: onnx.ModelProto, feed: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shapes of all values on a feed."""
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    known = {v.name for v in whole.graph.output}
    for node in proto.graph.node:
        whole.graph.output.extend(
            onnx.ValueInfoProto(name=n) for n in node.output if n not in known
        )
    with Session(whole.SerializeToString(), optimizations="off") as session:
        return {name: v.shape for name, v in {**session.run(feed), **feed}.items()}


def ready(text: str = NET, shape: tuple[int, ...] = SHAPE) -> tuple[Editor, dict[str, Group], Work]:
    proto = weighted(text)
    edit = Editor(Model.load(proto))
    groups = groups_of(edit)
    work = Work(edit, groups, sizes(proto, correlated(shape, 1)[0]))
    return edit, {group.root: group for group in groups}, work


def count(proto: onnx.ModelProto, shape: tuple[int, ...] = SHAPE) -> int:
    return macs.count(proto, {"x": shape}).total


# -- what units are worth --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [{}, {"c": (0,)}, {"c": (1, 2, 15)}, {"d": (0, 7)}, {"c": tuple(range(8)), "d": (3,)}]
)
def test_macs_are_those_that_are_left_once_units_are_out(cut: dict[str, tuple[int, ...]]) -> None:
    edit, groups, work = ready()
    expected = count(weighted(NET))
    assert work.total == expected
    take_out(edit, groups.values(), cut)
    found = work.macs({root: len(units) for root, units in cut.items()})
    assert found == pytest.approx(count(exporter.to_proto(edit.model)))
    assert (found < expected) == bool(cut)


def test_what_is_saved_is_the_difference_of_costs() -> None:
    edit, _, work = ready()
    ms: dict[Node, float] = {node: 1.0 + place for place, node in enumerate(edit.model.graph.nodes)}
    for times in (None, ms):
        for taken in ({"c": 0, "d": 0}, {"c": 3, "d": 2}):
            for root, more in (("c", 8), ("d", 4)):
                after = {**taken, root: more}
                saved = work.saved(taken, root, more, times)
                assert saved == pytest.approx(work.cost(taken, times) - work.cost(after, times))
                assert saved > 0
    assert work.cost({}, None) == work.total
    assert work.cost({}, ms) == pytest.approx(sum(ms.values()))


def test_sizes_that_are_open_count_nothing() -> None:
    edit = Editor(Model.load(weighted(NET)))
    assert Work(edit, groups_of(edit), {}).total == 0


# -- how many may go -------------------------------------------------------------------------------


def wide(units: int, per: int = 1) -> Group:
    """A group of so many hidden units, each of several features."""
    text = (
        f"(float[n,3,4,4] x, float[{units},3,1,1] w1, float[4,{units},1,1] w2)"
        " => (float[a,b,c,d] y) { r = Conv(x, w1) y = Conv(r, w2) }"
    )
    (group,) = groups_of(Editor(Model.load(weighted(text))))
    assert group.units == units
    return group


@given(st.integers(2, 130))
def test_steps_leave_whole_blocks(units: int) -> None:
    found = steps(wide(units))
    assert found == sorted(set(found))
    assert all(0 < n < units for n in found)
    if found:
        assert max(found) <= 0.875 * units
    block = 16 if units >= 48 else 8 if units >= 16 else 1
    for gone in found:
        assert (units - gone) % block == 0
    if units >= 16:
        assert found  # something may go


def test_steps_by_hand() -> None:
    assert steps(wide(64)) == [16, 32, 48]
    assert steps(wide(50)) == [2, 18, 34]
    assert steps(wide(32)) == [8, 16, 24]
    assert steps(wide(20)) == [4, 12]
    assert steps(wide(8)) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(wide(2)) == [1]


def test_heads_go_one_by_one() -> None:
    edit = Editor(Model.load(DIGITS / "vit.onnx"))
    heads = [
        group
        for group in groups_of(edit)
        if any((units >= 0).sum() / group.units >= 8 for _, units in group.axes.values())
    ]
    assert heads
    for group in heads:
        assert steps(group)[0] == max(1, group.units // 16)
        assert steps(group) == list(range(1, math.floor(0.875 * group.units) + 1))


# -- which are chosen ------------------------------------------------------------------------------


def choices(groups: Mapping[str, Group], harms: Mapping[str, Any]) -> list[Choice]:
    return [
        Choice(groups[root], range(1, groups[root].units), harm, range(groups[root].units))
        for root, harm in harms.items()
    ]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.7])
def test_the_share_is_reached_as_nearly_as_steps_allow(share: float) -> None:
    _, groups, work = ready()
    cut = choose(choices(groups, {"c": lambda n: n, "d": lambda n: n}), work, share)
    taken = {root: len(cut.get(root, ())) for root in groups}
    left, goal = work.macs(taken), (1 - share) * work.total
    largest = max(work.saved({}, root, 1, None) for root in groups)
    assert left < work.total
    assert abs(left - goal) <= max(largest / 2, 0 if sum(taken.values()) > 1 else largest)
    assert all(units == tuple(range(len(units))) for units in cut.values())


def test_one_step_goes_even_if_it_goes_too_far() -> None:
    _, groups, work = ready()
    coarse = [Choice(groups["c"], [8, 12], lambda n: n, range(16))]
    assert len(choose(coarse, work, 0.01)["c"]) == 8
    far = work.saved({}, "c", 8, None) / work.total
    near = work.saved({}, "c", 12, None) / work.total
    for part, count in ((0.3, 8), (0.7, 12)):
        assert len(choose(coarse, work, far + part * (near - far))["c"]) == count


def test_what_does_least_harm_for_its_time_goes() -> None:
    edit, groups, work = ready()

    def chosen(harms: Mapping[str, Any], ms: Any = None) -> set[str]:
        return set(choose(choices(groups, harms), work, 0.1, ms))

    assert chosen({"c": lambda n: n, "d": lambda n: 1e6 * n}) == {"c"}
    assert chosen({"c": lambda n: 1e6 * n, "d": lambda n: n}) == {"d"}
    # Harm is the same: time says which, against MACs.
    producers = {name: edit.model.graph.values[name].producer for name in ("c", "y")}
    slow: dict[Any, float] = {producers["y"]: 100.0, producers["c"]: 0.001}
    same = {"c": lambda n: n, "d": lambda n: n}
    assert chosen(same, slow) == {"d"}
    slow = {producers["c"]: 100.0, producers["y"]: 0.001}
    assert chosen(same, slow) == {"c"}


def test_the_order_says_which_units() -> None:
    _, groups, work = ready()
    order = [5, 3, 14, *(n for n in range(16) if n not in (5, 3, 14))]
    choice = Choice(groups["c"], [3], lambda n: n, order)
    assert choose([choice], work, 0.1) == {"c": (3, 5, 14)}


def test_what_wins_no_time_stays() -> None:
    edit, groups, work = ready()
    ms: dict[Node, float] = dict.fromkeys(edit.model.graph.nodes, 0.0)
    assert choose(choices(groups, {"c": lambda n: n}), work, 0.5, ms) == {}


def test_where_no_units_are_left_the_cut_is_what_there_was() -> None:
    _, groups, work = ready()
    few = [Choice(groups["d"], [1, 2], lambda n: n, range(8))]
    assert choose(few, work, 0.99) == {"d": (0, 1)}
    assert choose([], work, 0.5) == {}
    assert choose(few, work, 0.0) == {}


def test_a_curve_through_two_measurements() -> None:
    law = power_law((0.25, 0.02), (0.5, 0.08))
    assert law(0.25) == pytest.approx(0.02)
    assert law(0.5) == pytest.approx(0.08)
    assert law(1.0) == pytest.approx(0.32)  # f^2
    steep, flat = power_law((0.25, 1e-9), (0.5, 1.0)), power_law((0.25, 0.5), (0.5, 0.6))
    assert steep(1.0) == pytest.approx(16.0)  # f^4 at most
    assert flat(0.25) == pytest.approx(0.3)  # f at least, so that it is convex
    assert power_law((0.5, 0.1), (0.5, 0.1))(0.5) == pytest.approx(0.1)
    zero = power_law((0.25, 0.0), (0.5, 0.0))
    assert 0 < zero(0.25) < zero(0.5) < 1e-8


# -- importance ------------------------------------------------------------------------------------

HAND = (
    "(float[n,2,4,4] x, float[4,2,1,1] w1, float[4] b1, float[3,4,1,1] w2)"
    " => (float[n,3,4,4] y) { a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2) }"
)


def scores(proto: onnx.ModelProto, importance: UnitImportance, feeds: Any = None) -> Array:
    edit = Editor(Model.load(proto))
    (group,) = groups_of(edit)
    seen: Statistics | None = None
    if feeds is not None and (wanted := observed([group], importance)):
        seen = sweep(edit.model, feeds, wanted)
    return unit_scores(edit, group, importance, seen)


def replaced(proto: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        if tensor.name in arrays:
            array = np.asarray(arrays[tensor.name], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return proto


@pytest.mark.parametrize("importance", UNIT_IMPORTANCES)
def test_a_dead_channel_scores_lowest(importance: UnitImportance) -> None:
    proto = weighted(HAND)
    stored = weights(Model.load(proto))
    w1, b1 = stored["w1"].copy(), np.ones(4, np.float32)
    w1[2] = 0.01 * w1[2]
    b1[2] = -5.0  # its Relu is never open
    found = scores(replaced(proto, w1=w1, b1=b1), importance, correlated((4, 2, 4, 4)))
    assert found.shape == (4,)
    assert ranking(found)[0] == 2
    assert (found[2] < 0.1 * np.delete(found, 2)).all()


def test_scores_by_hand() -> None:
    w1 = np.array([[1, 2], [3, -4], [0, 1], [-1, 1]], np.float32).reshape(4, 2, 1, 1)
    w2 = np.arange(12, dtype=np.float32).reshape(3, 4, 1, 1)
    proto = replaced(weighted(HAND), w1=w1, b1=[0, 0, 0, 0], w2=w2)
    assert scores(proto, "l1").tolist() == [3, 7, 1, 2]
    np.testing.assert_allclose(scores(proto, "l2") ** 2, [5, 25, 1, 2])
    # x is (1, -1) everywhere on one half of the positions and (0, 1) on the other.
    x = np.zeros((1, 2, 4, 4), np.float32)
    x[:, 0, :2], x[:, 1, :2], x[:, 1, 2:] = 1, -1, 1
    feeds = [{"x": x}]
    # r: [0, 2], [7, 0], [0, 1], [0, 1]
    assert scores(proto, "apoz", feeds).tolist() == [0.5, 0.5, 0.5, 0.5]
    energy = np.array([4, 49, 1, 1]) / 2
    readers = np.square(w2.reshape(3, 4)).sum(axis=0)
    np.testing.assert_allclose(scores(proto, "activation", feeds), energy * readers, rtol=1e-6)


def test_readers_that_were_not_seen_count_by_their_weights() -> None:
    proto = weighted(HAND)
    w2 = weights(Model.load(proto))["w2"].astype(np.float64)
    np.testing.assert_allclose(scores(proto, "activation"), np.square(w2).sum(axis=(0, 2, 3)))


def test_a_ranking_is_stable() -> None:
    assert ranking(np.array([2.0, 1.0, 2.0, 1.0])) == (1, 3, 0, 2)


def test_what_has_to_be_observed() -> None:
    _, groups, _ = ready()
    assert observed(groups.values(), "l1") == observed(groups.values(), "l2") == set()
    assert {(o.value, o.kind) for o in observed(groups.values(), "activation")} == {
        ("r", "moments"),
        ("f", "moments"),
    }
    assert {o.kind for o in observed(groups.values(), "apoz")} == {"nonzero"}


# -- masks, and models without the channels --------------------------------------------------------


def test_readers_learn_to_do_without_what_goes() -> None:
    edit, groups, _ = ready()
    masks = column_masks(edit, list(groups.values()), {"c": (1, 5), "d": (7,)})
    assert set(masks) == {"d", "s", "y"}
    by_root = {layer.root: layer for layer in linear_layers(edit)}
    for root in ("d", "s"):
        mask = masks[root].reshape(8, 16, -1)
        assert mask.shape[2] == by_root[root].taps
        assert not mask[:, [1, 5]].any()
        assert np.delete(mask, [1, 5], axis=1).all()
    assert masks["y"].shape == (5, 8)
    assert np.flatnonzero(~masks["y"].all(axis=0)).tolist() == [7]
    assert column_masks(edit, list(groups.values()), {}) == {}


# All layers have a bias: none has to be given one.
BIASED = NET.replace("w3, float[8,5]", "w3, float[8] b3, float[8,5]").replace(
    "(r, w3)", "(r, w3, b3)"
)
CUT = {"c": (1, 4, 6, 9, 12, 15), "d": (0, 5, 6)}


def cut_out(
    cut: Any = CUT, data: Any = None, recovery: Any = "lsq", text: str = BIASED
) -> tuple[Editor, list[Any]]:
    dense, edit = pair(weighted(text))
    feeds = None if data is None else lambda: iter(data)
    found = prune_channels(dense, edit, cut, feeds, Settings(recovery, threads=1))
    assert verify.problems(edit.model) == []
    return edit, found


def test_a_model_without_channels_runs_with_the_same_interface() -> None:
    proto = weighted(BIASED)
    for data in (None, correlated(SHAPE)):
        edit, found = cut_out(data=data)
        made = exporter.to_proto(edit.model)
        onnx.checker.check_model(made, full_check=True)
        for part in ("input", "output"):
            assert getattr(made.graph, part) == getattr(proto.graph, part)
        assert count(made) < 0.6 * count(proto)
        shapes = sorted(a.shape for a in weights(edit).values() if a.ndim == 4)
        assert shapes == [(5, 10, 1, 1), (5, 10, 3, 3), (10, 3, 3, 3)]
        assert len(found) == (0 if data is None else 4)
        with Session(made.SerializeToString()) as session:
            (y,) = session.run(correlated(SHAPE, 1)[0]).values()
        assert y.shape == (8, 5)
        names = {v.name for node in edit.model.graph.nodes for v in node.outputs if v is not None}
        assert not {"c", "r", "d"} & names  # what is cut has another name


def test_recovered_is_better_than_not() -> None:
    proto, data, held = weighted(BIASED), correlated(SHAPE, 20), correlated(SHAPE, 8, seed=1)
    errors = {
        recovery: output_error(cut_out(data=data, recovery=recovery)[0], proto, held)
        for recovery in ("none", "moments", "lsq")
    }
    errors["no data"] = output_error(cut_out()[0], proto, held)
    assert errors["none"] == pytest.approx(errors["no data"], rel=1e-4)
    assert errors["lsq"] < 0.5 * errors["none"]
    assert errors["lsq"] < errors["moments"] < errors["none"]


def test_no_cut_is_no_change() -> None:
    edit, found = cut_out({})
    assert found == []
    assert exporter.to_proto(edit.model) == weighted(BIASED)


def test_a_layer_that_gets_a_bias_on_the_way() -> None:
    edit, _ = cut_out(data=correlated(SHAPE), text=NET)
    with Session(exporter.to_proto(edit.model).SerializeToString()) as session:
        (y,) = session.run(correlated(SHAPE, 1)[0]).values()
    assert y.shape == (8, 5)


def test_a_group_that_is_not_there() -> None:
    with pytest.raises(LookupError, match="there is no group 'nowhere'"):
        cut_out({"nowhere": (0,)})


# -- as a pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "importance"), [("cnn", "activation"), ("mlp", "apoz"), ("vit", "l2")]
)
def test_a_pass_takes_the_share_and_fits(
    name: str, importance: UnitImportance, tmp_path: Path
) -> None:
    path = tmp_path / "lossless.onnx"
    graphopt.optimize(DIGITS / f"{name}.onnx", path, validate=False)
    whole = macs.count(onnx.load(path), {"image": (16, 1, 8, 8)}).total
    with np.load(DIGITS / "evaluation.npz") as data, Session(path) as session:
        images = data["image"][:100]
        expected = session.run({"image": images})["logits"]
    lost = {}
    for recover in ("none", "lsq"):
        model = Model.load(path)
        step = PruneChannels(0.3, importance, recover, DATA)  # type: ignore[arg-type]
        (run,) = run_pipeline(model, [step])
        assert run.error == ""
        made = exporter.to_proto(model)
        left = macs.count(made, {"image": (16, 1, 8, 8)}).total / whole
        assert 0.62 < left < 0.78
        with Session(made.SerializeToString()) as session:
            found = session.run({"image": images})["logits"]
        assert found.shape == expected.shape
        lost[recover] = float(np.square(found - expected).mean() / expected.var())
    assert lost["lsq"] < 0.6 * lost["none"]


def test_a_pass_without_data_prunes_what_has_fixed_shapes() -> None:
    model = Model.load(weighted(NET.replace("float[n,3,6,6] x", "float[2,3,6,6] x")))
    run_pipeline(model, [PruneChannels(0.3)])
    shape = (2, 3, 6, 6)
    left = count(exporter.to_proto(model), shape) / count(weighted(NET), shape)
    assert left == pytest.approx(0.5, abs=0.01)  # half of `c`: there is no smaller step of it


def test_a_pass_of_nothing_and_of_too_much() -> None:
    model = Model.load(weighted(NET))
    (run,) = run_pipeline(model, [PruneChannels()])
    assert not run.changes
    edit = Editor(model)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError) as caught:
            PruneChannels(share).run(model, edit)
        assert str(caught.value) == f"share {share}: it is 0 or more, and below 1"
