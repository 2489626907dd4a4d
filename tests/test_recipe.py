"""Recipes of pruning: what a search did, as numbers that do it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.fitting import Settings, fit
from graphopt.passes.prune.channels import column_masks, take_out
from graphopt.passes.prune.groups import groups_of
from graphopt.passes.prune.weights import Sparsity, prune_weights
from graphopt.passes.recipe import Stage, StagedRecipe
from tests import graphs
from tests.prune_runs import correlated, weighted, weights
from tests.test_prune_channels import CUT, NET, SHAPE

Array = NDArray[Any]


@pytest.fixture
def lossless(tmp_path: Path) -> Path:
    return graphs.save(weighted(NET), tmp_path / "lossless.onnx")


def stages(lossless: Path) -> tuple[tuple[Stage, ...], bytes]:
    """Channels, then weights, as the search does; and the model that came of it, all dense."""
    feeds = correlated(SHAPE)
    whole, edit = Model.load(lossless), Editor(Model.load(lossless))
    groups = groups_of(edit)
    fit(whole, edit, column_masks(edit, groups, CUT), lambda: iter(feeds), Settings(threads=1))
    first = Stage.between(whole, edit, CUT)
    take_out(edit, groups_of(edit), CUT)  # which have the bias that a layer got
    between = exporter.to_proto(edit.model)
    whole, again = Model.load(between), Editor(Model.load(between))
    prune_weights(whole, again, Sparsity(0.5), lambda: iter(feeds), Settings(threads=1))
    second = Stage.between(whole, again, {})
    return (first, second), exporter.to_proto(again.model).SerializeToString()


def test_a_recipe_makes_the_model_again(lossless: Path) -> None:
    found, made = stages(lossless)
    recipe = StagedRecipe(found)
    assert exporter.to_proto(recipe.dense(lossless)).SerializeToString() == made
    first, second = found
    assert (first.cut, second.cut) == (CUT, {})
    assert list(first.biases) == ["s"]  # a convolution without a bias
    assert second.weights
    assert not second.biases


def test_arrays_are_all_that_it_is(lossless: Path) -> None:
    recipe = StagedRecipe(stages(lossless)[0])
    again = StagedRecipe.of(recipe.arrays)
    assert all(array.dtype in (np.float32, np.int64) for array in recipe.arrays.values())
    assert [stage.cut for stage in again.stages] == [CUT, {}]
    for name, array in recipe.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    one, other = (exporter.to_proto(r.apply(lossless)) for r in (recipe, again))
    assert one.SerializeToString() == other.SerializeToString()


def test_names_with_slashes(lossless: Path) -> None:
    recipe = StagedRecipe((Stage({"a/b/c": np.ones(2, np.float32)}, {}, {"g/0": (1, 2)}),))
    again = StagedRecipe.of(recipe.arrays)
    assert list(again.stages[0].weights) == ["a/b/c"]
    assert again.stages[0].cut == {"g/0": (1, 2)}
    assert StagedRecipe.of({}) == StagedRecipe()


def test_zeros_are_stored_as_such_where_that_is_smaller(tmp_path: Path) -> None:
    text = "(float[n,64] x, float[64,64] w) => (float[n,64] y) { y = MatMul(x, w) }"
    lossless = graphs.save(weighted(text), tmp_path / "lossless.onnx")
    array = weights(Model.load(lossless))["w"].copy()
    array[np.abs(array) < 0.2] = 0
    recipe = StagedRecipe((Stage({"w": array}),))
    files = recipe.write(lossless, tmp_path / "pruned.onnx")
    assert files == [tmp_path / "pruned.onnx"]
    assert files[0].stat().st_size < 0.6 * lossless.stat().st_size
    np.testing.assert_array_equal(weights(Model.load(files[0]))["w"], array)
    assert not recipe.dense(lossless).graph.values["w"].weight.is_sparse  # type: ignore[union-attr]


def test_only_what_changed_is_held(lossless: Path) -> None:
    whole, edit = Model.load(lossless), Editor(Model.load(lossless))
    assert Stage.between(whole, edit, {}) == Stage()
    value = edit.model.graph.values["w1"]
    assert value.weight is not None
    same = np.array(value.weight.values)
    edit.set_weight(value, onnx.numpy_helper.from_array(same, "w1"))
    assert Stage.between(whole, edit, {}) == Stage()
    edit.set_weight(value, onnx.numpy_helper.from_array(same + 1, "w1"))
    assert list(Stage.between(whole, edit, {}).weights) == ["w1"]


ONES = np.ones(3, np.float32)
WRONG: list[tuple[Stage, type[Exception], str]] = [
    (Stage({"nowhere": ONES}), LookupError, "there are no weights 'nowhere'"),
    (Stage({"c": ONES}), LookupError, "there are no weights 'c'"),
    (Stage({"b1": ONES}), ValueError, r"'b1' has the shape \(16,\), not \(3,\)"),
    (Stage(biases={"nowhere": ONES}), LookupError, "there is no layer 'nowhere'"),
    (Stage(cut={"nowhere": (0,)}), LookupError, "there is no group 'nowhere'"),
    (Stage(cut={"c": (16,)}), ValueError, "of 16 units"),
    (Stage(cut={"c": tuple(range(16))}), ValueError, "of 16 units"),
    (Stage(cut={"c": (-1,)}), ValueError, "of 16 units"),
]


@pytest.mark.parametrize(("stage", "kind", "said"), WRONG)
def test_what_fits_another_model(
    stage: Stage, kind: type[Exception], said: str, lossless: Path
) -> None:
    with pytest.raises(kind, match=said):
        StagedRecipe((stage,)).dense(lossless)


@pytest.mark.parametrize(
    "name", ["weights/w", "0/weights", "x/weights/w", "0/other/w", "1/weights/w", "", "-1/cut/c"]
)
def test_arrays_of_something_else(name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whichever says it first
        StagedRecipe.of({name: ONES})
