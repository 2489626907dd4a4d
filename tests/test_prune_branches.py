"""Layers in the branches of an If: fitted where the data takes one branch, left alone elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.fitting import Recovery, Settings
from graphopt.passes.prune.branches import flattened, taken
from graphopt.passes.prune.weights import Sparsity, prune_weights
from graphopt.runtime import Session
from tests.prune_runs import weights

NET = """<ir_version: 9, opset_import: ["" : 17]>
g (float[n,16] x, bool[1] which) => (float[n,4] y) {
  h = Relu(x)
  y = If(which) <
    then_branch = a () => (float[n,4] t) { t1 = Gemm(h, w1, b1) t2 = Tanh(t1) t = Gemm(t2, w2) },
    else_branch = b () => (float[n,4] e) { e1 = MatMul(h, w3) e2 = Tanh(e1) e = MatMul(e2, w4) }
  >
}"""
SHAPES = {"w1": (16, 24), "b1": (24,), "w2": (24, 4), "w3": (16, 24), "w4": (24, 4)}


def net() -> onnx.ModelProto:
    made = onnx.parser.parse_model(NET)
    for name, shape in SHAPES.items():
        array = np.random.default_rng([*name.encode()]).standard_normal(shape) / 4
        made.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return made


def feeds(which: list[bool], seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((4, 16))
    found = []
    for each in which:
        x = rng.standard_normal((64, 4)) @ mixing + 0.1 * rng.standard_normal((64, 16))
        found.append({"x": x.astype(np.float32), "which": np.array([each])})
    return found


def pruned(which: list[bool], recovery: Recovery) -> Model:
    model = Model.load(net())
    given = feeds(which)
    how = Sparsity(0.6, importance="lamp")
    prune_weights(Model.load(net()), Editor(model), how, lambda: given, Settings(recovery))
    return model


def error(model: Model, which: bool) -> float:
    made = exporter.to_proto(model).SerializeToString()
    with Session(made) as found, Session(net().SerializeToString()) as whole:
        pairs = [(found.run(f)["y"], whole.run(f)["y"]) for f in feeds([which] * 3, seed=5)]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.square(a - b).mean() / b.var())


def test_the_branch_is_that_of_all_feeds() -> None:
    model = Model.load(net())
    assert taken(model, lambda: feeds([True] * 3), Settings()) == {"y": "then_branch"}
    assert taken(model, lambda: feeds([False] * 3), Settings()) == {"y": "else_branch"}
    assert taken(model, lambda: feeds([True, False]), Settings()) == {}


def test_the_copy_computes_the_same_without_an_if() -> None:
    model = Model.load(net())
    flat = flattened(model, {"y": "then_branch"})
    assert [node.op for node in flat.graph.nodes] == ["Relu", "Gemm", "Tanh", "Gemm"]
    assert [node.op for node in model.graph.nodes] == ["Relu", "If"]
    assert error(flat, True) < 1e-12


@pytest.mark.parametrize("which", [True, False])
def test_layers_of_the_branch_are_fitted(which: bool) -> None:
    fitted, plain = pruned([which] * 4, "lsq"), pruned([which] * 4, "none")
    assert error(fitted, which) < 0.5 * error(plain, which)
    for name in ("w1", "w2", "w3", "w4"):
        assert np.count_nonzero(weights(fitted)[name] == 0) > 0.2 * weights(fitted)[name].size
    other = ("w3", "w4") if which else ("w1", "w2")
    for name in other:  # masked, and nothing else
        kept = weights(fitted)[name] != 0
        original = weights(Model.load(net()))[name]
        np.testing.assert_array_equal(weights(fitted)[name][kept], original[kept])


def test_where_feeds_differ_branches_are_masked_only() -> None:
    fitted, plain = pruned([True, False], "lsq"), pruned([True, False], "none")
    for name in SHAPES:
        whole = weights(Model.load(net()))[name]
        for model in (fitted, plain):
            kept = weights(model)[name] != 0
            np.testing.assert_array_equal(weights(model)[name][kept], whole[kept])
