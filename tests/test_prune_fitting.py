"""Layers fitted one after another: what that gains, what is left alone, and every geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import exporter, verify
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes import fitting
from graphopt.passes.fitting import Fitted, Recovery, Settings, fit, mask_layer
from graphopt.passes.linear import linear_layers
from graphopt.runtime import Session
from tests.prune_runs import NET, correlated, output_error, pair, weighted, weights

Array = NDArray[Any]
SHAPE = (16, 3, 8, 8)
LAYERS = ["c1", "c2", "c3", "g4", "g5", "q", "m"]


def random_masks(edit: Editor, kept: float = 0.5, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {layer.root: rng.random(layer.shape) < kept for layer in linear_layers(edit)}


def fitted(
    proto: onnx.ModelProto,
    feeds: list[dict[str, Array]],
    recovery: Recovery = "lsq",
    masks: dict[str, Array] | None = None,
    **options: Any,
) -> tuple[Editor, Fitted]:
    """The pruned model, sound and with what every layer came to."""
    dense, edit = pair(proto)
    masks = random_masks(edit) if masks is None else masks
    settings = Settings(recovery, threads=1, **options.pop("settings", {}))
    found = fit(dense, edit, masks, lambda: iter(feeds), settings, **options)
    edit.settle()
    assert verify.problems(edit.model) == []
    return edit, found


def matrices(edit: Editor) -> dict[str, Array]:
    return {layer.root: np.array(layer.matrix()) for layer in linear_layers(edit)}


# -- what nothing is taken from --------------------------------------------------------------------


@pytest.mark.parametrize("recovery", ["lsq", "moments", "none"])
def test_with_full_masks_nothing_changes(recovery: Recovery) -> None:
    proto = weighted(NET)
    edit, found = fitted(proto, correlated(SHAPE), recovery, masks={})
    before = matrices(pair(proto)[1])
    for root, matrix in matrices(edit).items():
        np.testing.assert_allclose(matrix, before[root], rtol=1e-3, atol=1e-4)
    assert output_error(edit, proto, correlated(SHAPE, seed=1)) < 1e-6
    assert [layer.root for layer in found.layers] == LAYERS
    for layer in found.layers:
        assert layer.kept == layer.total
        assert layer.error_before < 1e-6
        assert layer.error_after < 1e-6


def test_without_recovery_masks_are_all_that_happens() -> None:
    proto = weighted(NET)
    edit, found = fitted(proto, correlated(SHAPE), "none")
    masks, before = random_masks(edit), matrices(pair(proto)[1])
    for root, matrix in matrices(edit).items():
        np.testing.assert_array_equal(matrix, np.where(masks[root], before[root], 0))
    stored = weights(edit)
    for name, array in weights(Model.load(proto)).items():
        if array.ndim == 1:
            np.testing.assert_array_equal(stored[name], array)
    assert len(edit.model.graph.nodes) == len(Model.load(proto).graph.nodes)
    assert [layer.ridge for layer in found.layers] == [0.0] * len(LAYERS)


# -- what recovery gains ---------------------------------------------------------------------------


def test_recovery_lowers_the_error_of_outputs_on_other_feeds() -> None:
    proto, feeds, held = weighted(NET), correlated(SHAPE, 30), correlated(SHAPE, 10, seed=1)
    errors = {}
    for recovery in ("none", "moments", "lsq"):
        edit, _ = fitted(proto, feeds, recovery)  # type: ignore[arg-type]
        errors[recovery] = output_error(edit, proto, held)
    assert errors["lsq"] < 0.5 * errors["none"]
    assert errors["moments"] < 0.8 * errors["none"]


def test_recovery_lowers_the_error_of_each_layer() -> None:
    _, found = fitted(weighted(NET), correlated(SHAPE, 30))
    assert [layer.root for layer in found.layers] == LAYERS
    assert [layer.operator for layer in found.layers] == ["Conv"] * 3 + ["Gemm"] * 3 + ["MatMul"]
    assert found.feeds == 30
    for layer in found.layers:
        assert 0 <= layer.error_after < layer.error_before
        assert layer.ridge > 0
        assert 0.3 * layer.total < layer.kept < 0.7 * layer.total


@pytest.mark.parametrize("recovery", ["lsq", "moments"])
def test_what_is_masked_is_zero(recovery: Recovery) -> None:
    edit, _ = fitted(weighted(NET), correlated(SHAPE), recovery)
    masks = random_masks(edit)
    for root, matrix in matrices(edit).items():
        assert matrix.dtype == np.float32
        assert (matrix[~masks[root]] == 0).all()
        assert not np.signbit(matrix[~masks[root]]).any()
        assert (matrix[masks[root]] != 0).all()


def test_a_layer_makes_up_for_what_was_lost_before_it() -> None:
    """Only the first layer is masked; that the last is fitted too lowers what is left."""
    proto, feeds, held = weighted(NET), correlated(SHAPE, 30), correlated(SHAPE, 10, seed=1)
    masks = {"c2": random_masks(pair(proto)[1])["c2"]}
    alone, found = fitted(proto, feeds, masks=masks, only={"c2"})
    assert [layer.root for layer in found.layers] == ["c2"]
    after, _ = fitted(proto, feeds, masks=masks)
    assert output_error(after, proto, held) < output_error(alone, proto, held)
    before = matrices(pair(proto)[1])
    for root, matrix in matrices(alone).items():
        assert (matrix == before[root]).all() == (root != "c2")


def test_errors_are_those_of_the_layer_in_the_pruned_network() -> None:
    """Of the last layer, that nothing follows: what it gives is the output."""
    proto, feeds = weighted(NET), correlated(SHAPE, 20)
    masks = random_masks(pair(proto)[1])
    edit, found = fitted(proto, feeds, masks=masks)
    last = found.layers[-1]
    # Per output there, of all of them together here; the same mean square in other units.
    assert output_error(edit, proto, feeds) == pytest.approx(
        last.error_after * scale(proto, feeds), rel=1e-3
    )
    assert last.kept == int(masks["m"].sum())
    assert last.total == 120


def scale(proto: onnx.ModelProto, feeds: list[dict[str, Array]]) -> float:
    """The variance of each output around its own mean, over that of all around one mean."""
    with Session(proto.SerializeToString(), threads=1) as session:
        y = np.concatenate([session.run(feed)["y"] for feed in feeds]).astype(np.float64)
    return float(y.var(axis=0).mean() / y.var())


def test_scores_are_of_the_new_weights() -> None:
    def score(matrix: Array, gram: Array) -> Array:
        assert gram.shape == (matrix.shape[1],) * 2
        return np.asarray(np.abs(matrix))

    edit, found = fitted(weighted(NET), correlated(SHAPE), score=score)
    assert list(found.scores) == LAYERS
    for root, matrix in matrices(edit).items():
        np.testing.assert_allclose(found.scores[root], np.abs(matrix), rtol=1e-5)


def test_the_same_bytes_twice() -> None:
    made = [
        exporter.to_proto(fitted(weighted(NET), correlated(SHAPE), settings=memory)[0].model)
        for memory in ({}, {}, {"memory": 0})
    ]
    assert made[0].SerializeToString() == made[1].SerializeToString() == made[2].SerializeToString()


def test_progress_is_a_share() -> None:
    told: list[float] = []
    fitted(weighted(NET), correlated(SHAPE), progress=told.append)
    assert told == [number / 7 for number in range(7)]


# -- every geometry --------------------------------------------------------------------------------

ONE = {
    "conv": (
        "(float[n,6,9,8] x, float[4,6,3,2] w, float[4] b) => (float[a,c,d,e] y)"
        " { y = Conv<pads=[1,0,2,1],strides=[2,1],dilations=[1,2]>(x, w, b) }"
    ),
    "no bias": ("(float[n,6,9,8] x, float[4,6,3,3] w) => (float[a,c,d,e] y) { y = Conv(x, w) }"),
    "groups": (
        "(float[n,6,9,8] x, float[4,3,3,3] w) => (float[a,c,d,e] y) { y = Conv<group=2>(x, w) }"
    ),
    "depthwise": (
        "(float[n,6,9,8] x, float[12,1,3,3] w, float[12] b) => (float[a,c,d,e] y)"
        " { y = Conv<group=6>(x, w, b) }"
    ),
    "valid": (
        "(float[n,6,9,8] x, float[4,6,2,2] w) => (float[a,c,d,e] y)"
        ' { y = Conv<auto_pad="VALID">(x, w) }'
    ),
    "gemm": "(float[n,24] x, float[24,4] w, float[4] b) => (float[n,m] y) { y = Gemm(x, w, b) }",
    "gemm turned": "(float[n,24] x, float[4,24] w) => (float[n,m] y) { y = Gemm<transB=1>(x, w) }",
    "matmul": "(float[n,7,24] x, float[24,4] w) => (float[n,k,m] y) { y = MatMul(x, w) }",
    "matmul and add": (
        "(float[n,7,24] x, float[24,4] w, float[4] b) => (float[n,k,m] y)"
        " { h = MatMul(x, w) y = Add(b, h) }"
    ),
}


def one_shape(proto: onnx.ModelProto) -> tuple[int, ...]:
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    return (8, *(dim.dim_value for dim in dims[1:]))


@pytest.mark.parametrize("name", ONE)
def test_a_layer_is_fitted_as_well_as_numbers_allow(name: str) -> None:
    """Against one large lstsq over the rows of patches: a wrong row would show at once."""
    proto = weighted(ONE[name])
    feeds = correlated(one_shape(proto), 12)
    for feed in feeds:
        feed["x"] += 0.5  # means, for biases to make up for
    edit, found = fitted(proto, feeds, settings={"ridge": 1e-6})
    (layer,) = linear_layers(edit)
    (told,) = found.layers
    mask = random_masks(pair(proto)[1])[layer.root]
    rows, targets = patches_and_targets(proto, feeds)
    has_bias = name not in ("matmul",)
    lost = 0.0
    for part, x, y in zip(layer.parts(), rows, targets, strict=True):
        for row, target in zip(mask[part], y.T, strict=True):
            kept = x[:, row]
            kept = np.column_stack([kept, np.ones(len(kept))]) if has_bias else kept
            best = np.linalg.lstsq(kept, target, rcond=None)[0]
            lost += float(np.square(kept @ best - target).mean())
    signal = sum(float(y.var(axis=0).sum()) for y in targets)
    assert told.error_after == pytest.approx(lost / signal, rel=1e-2)
    assert told.error_after < told.error_before
    # What is accounted for is what the model really gives.
    assert output_error(edit, proto, feeds) == pytest.approx(
        told.error_after * signal / whole_variance(proto, feeds), rel=2e-2
    )


def whole_variance(proto: onnx.ModelProto, feeds: list[dict[str, Array]]) -> float:
    with Session(proto.SerializeToString(), threads=1) as session:
        y = np.concatenate([session.run(feed)["y"] for feed in feeds]).astype(np.float64)
    axis = 1 if y.ndim == 4 else -1
    return float(y.var() * y.shape[axis])


def patches_and_targets(
    proto: onnx.ModelProto, feeds: list[dict[str, Array]]
) -> tuple[list[Array], list[Array]]:
    """Rows and what belongs to them of each group, of the dense layer without its bias's Add."""
    (layer,) = linear_layers(pair(proto)[1])
    x = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)
    whole = np.asarray(layer.matrix(), np.float64)
    if layer.patches is None:
        rows = [x.reshape(-1, x.shape[-1])]
    else:
        parts = list(layer.patches.rows(x))
        rows = [np.concatenate([p[g] for p in parts]) for g in range(layer.groups)]
    return rows, [r @ whole[part].T for r, part in zip(rows, layer.parts(), strict=True)]


def test_a_layer_without_a_bias_gets_one() -> None:
    proto = weighted(ONE["no bias"])
    edit, _ = fitted(proto, correlated(one_shape(proto)))
    (layer,) = linear_layers(edit)
    assert layer.bias is not None
    assert layer.bias.value is not None
    assert layer.bias.value.name == "y/bias"
    assert layer.bias.value.weight.shape == (4,)  # type: ignore[union-attr]


def test_the_bias_behind_a_product_moves() -> None:
    proto = weighted(ONE["matmul and add"])
    feeds = correlated(one_shape(proto), 12)
    for feed in feeds:
        feed["x"] += 1.0
    edit, _ = fitted(proto, feeds)
    before, after = weights(Model.load(proto))["b"], weights(edit)["b"]
    assert np.abs(after - before).max() > 0.01
    with (
        Session(exporter.to_proto(edit.model).SerializeToString()) as new,
        Session(proto.SerializeToString()) as old,
    ):
        means = [
            np.concatenate([s.run(feed)["y"] for feed in feeds]).mean(axis=(0, 1))
            for s in (new, old)
        ]
    np.testing.assert_allclose(means[0], means[1], atol=1e-4)  # what a free bias is for


def test_settled_only_where_it_runs_is_left_alone() -> None:
    proto = weighted(
        "(float[n,6,9] x, float[6,6,3] w, float[4,6,3] w2) => (float[a,c,d] y)"
        ' { h = Conv<auto_pad="SAME_UPPER">(x, w) r = Relu(h) y = Conv(r, w2) }'
    )
    edit, found = fitted(proto, correlated((4, 6, 9)))
    assert [layer.root for layer in found.layers] == ["y"]
    np.testing.assert_array_equal(weights(edit)["w"], weights(Model.load(proto))["w"])


def test_weights_that_others_read_are_masked_only() -> None:
    proto = weighted(
        "(float[n,6] x, float[6,6] w, float[6,4] w2) => (float[n,m] y)"
        " { h = MatMul(x, w) r = Relu(h) k = MatMul(r, w) y = MatMul(k, w2) }"
    )
    mask = np.random.default_rng(0).random((6, 6)) < 0.5
    edit, found = fitted(proto, correlated((8, 6)), masks={"h": mask})
    assert [layer.root for layer in found.layers] == ["y"]
    before = weights(Model.load(proto))["w"]
    np.testing.assert_array_equal(weights(edit)["w"], np.where(mask.T, before, 0))


def test_a_bias_that_is_computed_is_no_part_of_what_weights_give() -> None:
    proto = weighted(
        "(float[n,32] x, float[32,6] w, float[6] k) => (float[n,6] y)"
        " { s = ReduceMean<keepdims=0>(x) z = Mul(s, k) y = Gemm(x, w, z) }"
    )
    edit = pair(proto)[1]
    (layer,) = linear_layers(edit)
    assert layer.is_own
    assert not layer.is_free
    masks = random_masks(edit)
    after, found = fitted(proto, correlated((16, 32)), masks=masks)
    assert found.layers == []
    np.testing.assert_array_equal(matrices(after)["y"], np.where(masks["y"], layer.matrix(), 0))


def test_bodies_are_left_alone() -> None:
    proto = weighted(
        "(float[n,6] x, bool c, float[6,6] w, float[6,4] w2, float[4,4] w3) => (float[n,m] y)"
        " { h = MatMul(x, w) r = Relu(h)"
        " k = If(c) <then_branch = t () => (float[n,m] u) { u = MatMul(r, w2) },"
        " else_branch = e () => (float[n,m] v) { q = MatMul(r, w2) v = Neg(q) }>"
        " y = MatMul(k, w3) }"
    )
    feeds = [{**feed, "c": np.array(n % 2 == 0)} for n, feed in enumerate(correlated((8, 6)))]
    edit, found = fitted(proto, feeds)
    assert [layer.root for layer in found.layers] == ["h", "y"]
    np.testing.assert_array_equal(weights(edit)["w2"], weights(Model.load(proto))["w2"])


# -- degenerate data -------------------------------------------------------------------------------


def test_inputs_that_are_always_zero_keep_the_bias() -> None:
    proto = weighted(ONE["conv"])
    feeds = [{"x": np.zeros((2, 6, 9, 8), np.float32)}]
    edit, found = fitted(proto, feeds)
    np.testing.assert_allclose(weights(edit)["b"], weights(Model.load(proto))["b"], rtol=1e-6)
    assert np.isfinite([found.layers[0].error_before, found.layers[0].error_after]).all()


def test_feeds_of_nothing_leave_the_masked_weights() -> None:
    proto = weighted(ONE["gemm"])
    edit, _ = fitted(proto, [{"x": np.zeros((0, 24), np.float32)}])
    mask = random_masks(edit)["y"]
    before = weights(Model.load(proto))
    np.testing.assert_array_equal(weights(edit)["w"], np.where(mask.T, before["w"], 0))
    np.testing.assert_array_equal(weights(edit)["b"], before["b"])


def test_numbers_that_are_not_finite_are_left_out() -> None:
    proto = weighted(ONE["conv"])
    feeds = correlated((8, 6, 9, 8), 12)
    feeds[3]["x"][2, 1, 4, 4] = np.nan
    feeds[5]["x"][0, 0, 0, 0] = np.inf
    edit, found = fitted(proto, feeds)
    assert all(np.isfinite(array).all() for array in weights(edit).values())
    assert found.layers[0].error_after < found.layers[0].error_before
    held = correlated((8, 6, 9, 8), 4, seed=1)
    whole = output_error(fitted(proto, correlated((8, 6, 9, 8), 12))[0], proto, held)
    assert output_error(edit, proto, held) == pytest.approx(whole, rel=0.02)


def test_some_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, held = weighted(NET), correlated(SHAPE, 10, seed=1)
    feeds = correlated(SHAPE, 60)
    whole = output_error(fitted(proto, feeds)[0], proto, held)
    monkeypatch.setattr(fitting, "_ROWS", 100)
    monkeypatch.setattr(fitting, "_ROWS_PER_FEATURE", 10)
    counted: list[int] = []
    regress = fitting.Statistics.regress

    def counting(self: Any, observer: Any, x: Array, y: Array, every: int = 1) -> None:
        counted.append(every)
        regress(self, observer, x, y, every)

    monkeypatch.setattr(fitting.Statistics, "regress", counting)
    some = output_error(fitted(proto, feeds)[0], proto, held)
    assert max(counted) > 10
    assert some != whole
    assert some < 2 * whole


def test_masking_writes_zeros_without_a_sign() -> None:
    proto = weighted(ONE["gemm"])
    _, edit = pair(proto)
    (layer,) = linear_layers(edit)
    mask = np.zeros(layer.shape, np.bool_)
    mask[1] = True
    mask_layer(edit, layer, mask)
    after = weights(edit)["w"]
    assert not np.signbit(after[:, [0, 2, 3]]).any()
    assert not after[:, [0, 2, 3]].any()
    np.testing.assert_array_equal(after[:, 1], weights(Model.load(proto))["w"][:, 1])
