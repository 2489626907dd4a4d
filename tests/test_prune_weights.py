"""Weights that become zero: how many, which, where, and that the rest makes up for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import verify
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.kernels import saliency
from graphopt.manager import run_pipeline
from graphopt.passes.fitting import Settings
from graphopt.passes.linear import Layer, linear_layers
from graphopt.passes.prune import weights as module
from graphopt.passes.prune.steps import PruneWeights
from graphopt.passes.prune.weights import Pattern, Pruned, Sparsity, prune_weights
from tests.prune_runs import DATA, DIGITS, NET, correlated, output_error, pair, weighted, weights

Array = NDArray[Any]
SHAPE = (8, 3, 8, 8)
MATRICES = ("w1", "w2", "w3", "w4", "w5", "w6", "w5t")
TOTAL = 216 + 288 + 72 + 96 + 120 + 120 + 120


def pruned(
    how: Sparsity,
    proto: onnx.ModelProto | None = None,
    data: list[dict[str, Array]] | None = None,
    recovery: Any = "lsq",
) -> tuple[Editor, Pruned]:
    dense, edit = pair(proto or weighted(NET))
    feeds = None if data is None else lambda: iter(data)
    found = prune_weights(dense, edit, how, feeds, Settings(recovery, threads=1))
    edit.settle()
    assert verify.problems(edit.model) == []
    for array in weights(edit).values():
        assert not np.signbit(array[array == 0]).any()  # only +0.0 is stored as nothing
    return edit, found


def zeros(edit: Editor) -> dict[str, int]:
    stored = weights(edit)
    return {name: int((stored[name] == 0).sum()) for name in MATRICES}


def layers(edit: Editor) -> list[Layer]:
    return linear_layers(edit)


# -- how many --------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["magnitude", "lamp"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_exactly_the_share_of_all_goes(share: float, importance: Any) -> None:
    edit, found = pruned(Sparsity(share, importance=importance))
    gone = int(share * TOTAL + 1e-9)
    assert sum(zeros(edit).values()) == gone
    assert (found.total, found.kept, found.feeds) == (TOTAL, TOTAL - gone, 0)
    assert found.layers == []


@pytest.mark.parametrize("importance", ["magnitude", "lamp", "wanda", "obs"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_exactly_the_share_goes_where_the_rest_is_fitted(share: float, importance: Any) -> None:
    edit, found = pruned(Sparsity(share, importance=importance), data=correlated(SHAPE))
    gone = int(share * TOTAL + 1e-9)
    assert sum(zeros(edit).values()) == gone
    assert found.kept == TOTAL - gone
    assert found.feeds == 6
    assert sum(layer.kept for layer in found.layers) == found.kept
    assert sum(layer.total for layer in found.layers) == found.total


@pytest.mark.parametrize("data", [None, correlated(SHAPE)])
def test_each_layer_loses_the_share(data: Any) -> None:
    edit, _ = pruned(Sparsity(0.6, scope="layer"), data=data)
    sizes = {name: array.size for name, array in weights(edit).items()}
    assert zeros(edit) == {name: int(0.6 * sizes[name] + 1e-9) for name in MATRICES}


def test_lamp_shares_out_what_magnitude_takes_from_one_layer() -> None:
    proto = weighted(NET)
    for tensor in proto.graph.initializer:
        if tensor.name == "w4":
            array = 0.001 * onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w4"))
    by_magnitude = zeros(pruned(Sparsity(0.3, importance="magnitude"), proto)[0])
    by_lamp = zeros(pruned(Sparsity(0.3), proto)[0])
    assert by_magnitude["w4"] == 96
    assert 0 < by_lamp["w4"] < 60


def test_the_smallest_go_by_magnitude() -> None:
    edit, _ = pruned(Sparsity(0.5, importance="magnitude"))
    before, after = weights(Model.load(weighted(NET))), weights(edit)
    every = np.concatenate([np.abs(before[name]).ravel() for name in MATRICES])
    bound = np.sort(every)[TOTAL // 2]
    for name in MATRICES:
        np.testing.assert_array_equal(after[name] != 0, np.abs(before[name]) >= bound)
        kept = after[name] != 0
        np.testing.assert_array_equal(after[name][kept], before[name][kept])


@pytest.mark.parametrize("score", [saliency.wanda, saliency.obs])
def test_scores_of_what_is_read_decide(score: Any) -> None:
    proto = weighted("(float[n,8] x, float[8,6] w) => (float[n,m] y) { y = MatMul(x, w) }")
    data = correlated((16, 8))
    for feed in data:
        feed["x"][:, [2, 5]] *= 1e-4
    edit, _ = pruned(Sparsity(0.25, importance=score.__name__), proto, data, "none")
    gone = weights(edit)["w"] == 0
    x = np.concatenate([feed["x"] for feed in data]).astype(np.float64)
    scores = score(weights(Model.load(proto))["w"].T, x.T @ x).T
    assert gone.sum() == 12
    assert scores[gone].max() < scores[~gone].min()
    assert gone[[2, 5]].all() == (score is saliency.wanda)
    by_magnitude = weights(pruned(Sparsity(0.25, importance="magnitude"), proto)[0])["w"] == 0
    assert (by_magnitude != gone).any()


def test_a_threshold() -> None:
    edit, found = pruned(Sparsity(threshold=0.1))
    before, after = weights(Model.load(weighted(NET))), weights(edit)
    for name in MATRICES:
        np.testing.assert_array_equal(after[name] != 0, np.abs(before[name]) >= np.float32(0.1))
    assert 0 < found.kept < TOTAL
    assert np.abs(after["b2"] - before["b2"]).max() == 0
    edit, found = pruned(Sparsity(threshold=0.0))
    assert found.kept == TOTAL


# -- where -----------------------------------------------------------------------------------------


def by_channel(layer: Layer) -> Array:
    """What each output weighs, [M, taps, input channels]."""
    matrix = layer.matrix() != 0
    return matrix.reshape(len(matrix), -1, layer.taps).transpose(0, 2, 1)


@pytest.mark.parametrize("data", [None, correlated(SHAPE)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)])
def test_n_of_m_input_channels_are_left_in_every_layer(n: int, m: int, data: Any) -> None:
    edit, _ = pruned(Sparsity(pattern=Pattern(n, m)), data=data)
    found = {}
    for layer in layers(edit):
        kept = by_channel(layer)
        whole = kept.shape[2] // m * m
        groups = kept[..., :whole].reshape(*kept.shape[:2], -1, m)
        assert (groups.sum(axis=-1) == n).all()
        assert kept[..., whole:].all()  # 3 channels, or 1 of a depthwise convolution
        found[layer.root] = float(kept.mean())
    assert found["c3"] == 1.0
    assert found["g4"] == found["g5"] == n / m


def test_the_largest_of_neighbouring_channels_are_left() -> None:
    dense, edit = pair(weighted(NET))
    whole = {layer.root: layer for layer in linear_layers(Editor(dense))}
    prune_weights(dense, edit, Sparsity(pattern=Pattern(2, 4)), None, Settings())
    for layer in layers(edit):
        if layer.shape[1] // layer.taps % 4:
            continue
        before = np.abs(whole[layer.root].matrix()).reshape(layer.shape[0], -1, layer.taps)
        groups = before.transpose(0, 2, 1).reshape(layer.shape[0], layer.taps, -1, 4)
        kept = by_channel(layer).reshape(groups.shape)
        least = np.where(kept, groups, np.inf).min(axis=-1)
        most = np.where(kept, 0, groups).max(axis=-1)
        assert (least >= most).all()


def test_the_largest_blocks_are_left() -> None:
    dense, edit = pair(weighted(NET))
    (first, *_) = [layer for layer in linear_layers(Editor(dense)) if layer.taps > 1]
    how = Sparsity(0.5, pattern=Pattern(rows=4), importance="magnitude", scope="layer")
    prune_weights(dense, edit, how, None, Settings())
    (after, *_) = [layer for layer in layers(edit) if layer.taps > 1]
    energy = np.square(first.matrix()).reshape(-1, 4, first.shape[1]).sum(axis=1)
    kept = (after.matrix() != 0).reshape(-1, 4, first.shape[1]).all(axis=1)
    assert kept.mean() == 0.5
    assert energy[kept].min() >= energy[~kept].max()


@pytest.mark.parametrize("data", [None, correlated(SHAPE)])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 4), (2, 2)])
def test_blocks_go_as_a_whole(rows: int, columns: int, scope: Any, data: Any) -> None:
    edit, found = pruned(
        Sparsity(0.5, pattern=Pattern(0, 0, rows, columns), scope=scope), data=data
    )
    for layer in layers(edit):
        kept = by_channel(layer).reshape(layer.shape)
        for i in range(0, kept.shape[0], rows):
            for j in range(0, kept.shape[1], columns):
                block = kept[i : i + rows, j : j + columns]
                assert block.all() or not block.any()
    assert 0.4 < found.kept / found.total < 0.6


# -- what else holds weights -----------------------------------------------------------------------

OTHERS = {
    "lstm": (
        "(float[s,2,6] x, float[1,32,6] w, float[1,32,8] r, float[1,64] bias)"
        " => (float[a,b,c,d] y) { y = LSTM<hidden_size=8>(x, w, r, bias) }"
    ),
    "transposed": (
        "(float[n,6,5] x, float[6,4,3] w, float[4] bias) => (float[a,c,d] y)"
        " { y = ConvTranspose(x, w, bias) }"
    ),
    "same": (
        "(float[n,6,5] x, float[4,6,3] w, float[4] bias) => (float[a,c,d] y)"
        ' { y = Conv<auto_pad="SAME_LOWER">(x, w, bias) }'
    ),
    "stack": (
        "(float[n,3,5,6] x, float[3,6,4] w, float[4] bias) => (float[a,b,c,d] y)"
        " { h = MatMul(x, w) y = Add(h, bias) }"
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("has_data", [False, True])
def test_other_weights_are_masked(name: str, has_data: bool) -> None:
    proto = weighted(OTHERS[name])
    shape = {"lstm": (4, 2, 6), "stack": (2, 3, 5, 6)}.get(name, (4, 6, 5))
    edit, found = pruned(Sparsity(0.5), proto, correlated(shape) if has_data else None)
    before, after = weights(Model.load(proto)), weights(edit)
    matrices = [array for array in ("w", "r") if array in before]
    total = sum(before[n].size for n in matrices)
    assert (found.total, found.kept) == (total, total - total // 2)
    assert sum(int((after[n] == 0).sum()) for n in matrices) == total // 2
    for n in matrices:
        kept = after[n] != 0
        np.testing.assert_array_equal(after[n][kept], before[n][kept])
    np.testing.assert_array_equal(after["bias"], before["bias"])


def test_tables_and_numbers_that_are_computed_with_stay() -> None:
    proto = weighted(
        "(float[n,6] x, float[6,6] w, float[6,6] scale, float[6,6] out) =>"
        " (float[n,m] y, float[6,6] out) { h = MatMul(x, w) k = Mul(scale, out) y = MatMul(h, k) }"
    )
    edit, found = pruned(Sparsity(0.5), proto)
    before, after = weights(Model.load(proto)), weights(edit)
    assert found.total == 36
    assert (after["w"] == 0).sum() == 18
    for name in ("scale", "out"):
        np.testing.assert_array_equal(after[name], before[name])


def test_nothing_that_can_go() -> None:
    proto = weighted("(float[n,6] x) => (float[n,6] y) { y = Relu(x) }")
    for data in (None, correlated((4, 6))):
        _, found = pruned(Sparsity(0.5), proto, data)
        assert (found.kept, found.total) == (0, 0)


# -- recovery --------------------------------------------------------------------------------------


def test_each_step_recovers_more() -> None:
    proto, data = weighted(NET), correlated((16, 3, 8, 8), 20)
    held = correlated((16, 3, 8, 8), 8, seed=1)
    errors = {}
    for recovery in ("none", "lsq"):
        edit, _ = pruned(Sparsity(0.6), proto, data, recovery)
        errors[recovery] = output_error(edit, proto, held)
    assert errors["lsq"] < 0.5 * errors["none"]


def test_rounds_halve_what_is_left() -> None:
    def shares(share: float, **more: Any) -> list[float]:
        return [each.share or 0.0 for each in module._rounds(Sparsity(share, **more))]

    assert shares(0.3) == [0.3]
    assert shares(0.5) == [0.5]
    assert shares(0.75) == pytest.approx([0.5, 0.75])
    assert len(shares(0.9)) == 4
    found = shares(0.9)
    left = np.array([1.0, *(1 - np.array(found))])
    np.testing.assert_allclose(left[1:] / left[:-1], 0.1**0.25)
    assert found[-1] == 0.9
    assert module._rounds(Sparsity(threshold=0.1)) == [Sparsity(threshold=0.1)]
    with_pattern = Sparsity(pattern=Pattern(2, 4))
    assert module._rounds(with_pattern) == [with_pattern]


def test_progress_grows_over_all_rounds() -> None:
    told: list[float] = []
    dense, edit = pair(weighted(NET))
    feeds = correlated(SHAPE, 2)
    prune_weights(dense, edit, Sparsity(0.75), lambda: iter(feeds), Settings(), told.append)
    assert told == sorted(told)
    assert len(told) == 14
    assert told[7] == 0.5
    assert max(told) < 1


def test_it_is_recorded() -> None:
    edit, _ = pruned(Sparsity(0.5))
    (change,) = edit.changes
    assert change.rule == "prune-weights"
    assert (change.before, change.after) == (f"{TOTAL} weights", f"{TOTAL // 2} weights")


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["wanda", "obs"])
def test_scores_of_what_is_read_need_feeds(importance: Any) -> None:
    with pytest.raises(UsageError) as caught:
        pruned(Sparsity(0.5, importance=importance))
    assert str(caught.value) == f"importance {importance}: it needs feeds: --data"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"share": 1.0}, "sparsity 1.0: it is 0 or more, and below 1"),
    ({"share": -0.1}, "sparsity -0.1: it is 0 or more, and below 1"),
    ({"share": float("nan")}, "sparsity nan: it is 0 or more, and below 1"),
    ({"threshold": -1.0}, "threshold -1.0: it is 0 or more"),
    ({"threshold": float("nan")}, "threshold nan: it is 0 or more"),
    ({}, "what is to be pruned? a share, a threshold or N:M"),
    ({"pattern": Pattern(rows=4)}, "what is to be pruned? a share, a threshold or N:M"),
    (
        {"share": 0.5, "importance": "luck"},
        "importance 'luck': there are magnitude, lamp, wanda, obs",
    ),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES)
def test_mistakes(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sparsity(**options)
    assert str(caught.value) == said


def test_patterns_as_text() -> None:
    assert Pattern.of("2:4") == Pattern(2, 4)
    assert Pattern.of("16x1") == Pattern(rows=16)
    assert Pattern.of("1x4") == Pattern(columns=4)
    for wrong in (
        "",
        "2",
        "4:4",
        "0:4",
        "5:4",
        "0x4",
        "4x0",
        "2:0",
        "-2:4",
        "2:4 ",
        "axb",
        "2:4x1",
    ):
        with pytest.raises(UsageError) as caught:
            Pattern.of(wrong)
        assert str(caught.value) == f"pattern {wrong!r}: write N:M, as 2:4, or a block, as 4x1"


# -- as a pass -------------------------------------------------------------------------------------


def test_a_pass_prunes_and_fits() -> None:
    found = {}
    for data in ("", DATA):
        model = Model.load(DIGITS / "mlp.onnx")
        (run,) = run_pipeline(model, [PruneWeights(0.8, data=data)])
        assert run.error == ""
        stored = {n: a for n, a in weights(model).items() if a.ndim == 2}
        assert sum((a == 0).sum() for a in stored.values()) == int(
            0.8 * sum(a.size for a in stored.values())
        )
        found[data] = stored
    one = next(iter(found[DATA]))
    kept = (found[""][one] != 0) & (found[DATA][one] != 0)
    assert (found[""][one][kept] != found[DATA][one][kept]).mean() > 0.5


def test_a_pass_of_nothing_does_nothing() -> None:
    model = Model.load(weighted(NET))
    (run,) = run_pipeline(model, [PruneWeights()])
    assert not run.changes
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, weights(Model.load(weighted(NET)))[name])


def test_a_pass_with_a_pattern_and_with_a_threshold() -> None:
    model = Model.load(weighted(NET))
    run_pipeline(model, [PruneWeights(nm="2:4")])
    assert ((weights(model)["w4"] != 0).reshape(2, 4, 12).sum(axis=1) == 2).all()
    model = Model.load(weighted(NET))
    run_pipeline(model, [PruneWeights(threshold=0.1)])
    left = weights(model)["w4"]
    assert np.abs(left[left != 0]).min() >= 0.1
