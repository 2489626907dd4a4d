"""Means that rounding moves, and weights rounded for their inputs, against sums done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.kernels.affine import Affine, asymmetric, dequantize, fake, quantize
from graphopt.kernels.moments import unfold
from graphopt.passes.quantize.corrections import bias_corrections, gram_observer, rounded_weights
from graphopt.passes.quantize.emission import Emitter, Options, weight_affine
from graphopt.passes.quantize.units import Unit, Units
from graphopt.statistics import sweep
from tests.graphs import node
from tests.optimized import stored
from tests.quantized import Small, constant, normal, run

Array = NDArray[Any]
IMAGES, ROWS = {"x": (2, 4, 9, 7)}, {"x": (2, 5, 12)}
GEOMETRY: dict[str, Any] = {"pads": [2, 1, 0, 1], "strides": [2, 1], "dilations": [1, 2]}
CASES = {
    "conv": Small(
        [node("Conv", ["x", "w", "b"], ["a"], **GEOMETRY), node("Relu", ["a"], ["y"])],
        IMAGES,
        ["y"],
        [normal("w", 6, 4, 3, 3), normal("b", 6)],
    ),
    "no-bias": Small([node("Conv", ["x", "w"], ["y"])], IMAGES, ["y"], [normal("w", 6, 4, 3, 3)]),
    "depthwise": Small(
        [node("Conv", ["x", "w", "b"], ["y"], group=4, pads=[1, 1, 1, 1])],
        IMAGES,
        ["y"],
        [normal("w", 4, 1, 3, 3), normal("b", 4)],
    ),
    "groups": Small(
        [node("Conv", ["x", "w", "b"], ["y"], group=2)],
        IMAGES,
        ["y"],
        [normal("w", 6, 2, 3, 1), normal("b", 6)],
    ),
    "product": Small(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        ROWS,
        ["y"],
        [normal("w", 12, 6), normal("b", 6)],
    ),
    "gemm": Small(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        {"x": (6, 12)},
        ["y"],
        [normal("w", 5, 12), normal("b", 5)],
    ),
}
OPTIONS = Options(4, "max")  # so few bits that means move


def shifted(x: Array) -> Array:
    """The same with a mean, another for each channel of images."""
    means = np.linspace(-1, 2, x.shape[1]).reshape(1, -1, 1, 1) if x.ndim == 4 else 1.0
    return (x + means).astype(np.float32)


class Known:
    """The only unit with weights of a model, its input clipped to [-1, 2.5]."""

    def __init__(self, small: Small, count: int = 4) -> None:
        self.proto = small.proto()
        self.model = Model.load(self.proto)
        self.edit = Editor(self.model)
        self.units: list[Unit] = Units(self.edit).all
        (self.unit,) = (unit for unit in self.units if unit.weights is not None)
        self.feeds = [{name: shifted(x) for name, x in f.items()} for f in small.feeds(count)]
        self.input = asymmetric(-1.0, 2.5)
        self.tensors = {"x": self.input, "y": asymmetric(-40.0, 40.0)}
        self.held = stored(self.proto)
        self.affine = weight_affine(self.unit, self.held["w"], OPTIONS)

    def rows(self, x: Array) -> Array:
        """What each group of weights is multiplied with, [groups, rows, features]."""
        if self.unit.kind != "convolution":
            return x.reshape(1, -1, x.shape[-1])
        stated = {
            a.name: onnx.helper.get_attribute_value(a) for a in self.unit.node.proto.attribute
        }
        kernel = self.held["w"].shape[2:]
        stated.setdefault("group", 1)
        return unfold(x.astype(np.float64), kernel, **stated)

    def matrix(self, weights: Array) -> Array:
        """Weights as [groups, features, outputs of a group]."""
        if self.unit.kind == "convolution":
            groups = len(self.rows(self.feeds[0]["x"]))
            return weights.reshape(groups, len(weights) // groups, -1).swapaxes(1, 2)
        turned = self.unit.node.op == "Gemm"
        return np.asarray(weights.T if turned else weights)[None]

    def mean(self, inputs: list[Array], weights: Array) -> Array:
        """Of every output channel, over all positions."""
        rows = np.concatenate([self.rows(x) for x in inputs], axis=1)
        means: Array = (rows @ self.matrix(weights).astype(np.float64)).mean(axis=1).reshape(-1)
        return means

    def static(self, **options: Any) -> onnx.ModelProto:
        model = Model.load(self.proto)
        edit = Editor(model)
        Emitter(edit, self.tensors, OPTIONS, **options).emit(Units(edit).all)
        edit.settle()
        return exporter.to_proto(model)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("truncated", [False, True])
def test_corrections_are_what_the_mean_moves_by(name: str, truncated: bool) -> None:
    known = Known(CASES[name])
    before = fingerprint(known.model)
    q = quantize(known.held["w"], known.affine)
    if truncated:  # any integers, not the nearest
        q = np.trunc(known.held["w"] / known.affine.along(q.ndim)[0]).astype(np.int8)
    rounded = {known.unit.root: q} if truncated else None
    tensors = {"x": known.input}
    found = bias_corrections(
        known.edit, known.units, tensors, known.feeds, OPTIONS, rounded=rounded
    )
    assert list(found) == [known.unit.root]
    inputs = [feed["x"] for feed in known.feeds]
    exact = known.mean(inputs, known.held["w"])
    moved = known.mean([fake(x, known.input) for x in inputs], dequantize(q, known.affine))
    assert np.abs(exact - moved).max() > 0.05
    np.testing.assert_allclose(found[known.unit.root], exact - moved, rtol=1e-3, atol=1e-4)
    assert known.edit.mark() == (0, 0)
    assert fingerprint(known.model) == before


@pytest.mark.parametrize("name", [name for name in CASES if name != "conv"])  # Relu hides a mean
def test_a_corrected_model_keeps_its_means(name: str) -> None:
    known = Known(CASES[name])
    tensors = {"x": known.input}
    found = bias_corrections(known.edit, known.units, tensors, known.feeds, OPTIONS)

    def error(proto: onnx.ModelProto) -> float:
        axis = 1 if known.unit.kind == "convolution" else -1
        difference = [
            np.moveaxis(run(proto, "off", f)["y"] - run(known.proto, "off", f)["y"], axis, 0)
            for f in known.feeds
        ]
        means = [d.reshape(len(d), -1).mean(axis=1) for d in difference]
        return float(np.abs(np.mean(means, axis=0)).max())

    assert error(known.static(corrections=found)) < 0.25 * error(known.static())


def test_units_are_corrected_for_themselves_alone() -> None:
    """The second unit of a chain sees the first one's exact result."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"]),
        node("Add", ["p", "b"], ["h"]),
        node("MatMul", ["h", "v"], ["q"]),
        node("Add", ["q", "c"], ["y"]),
        node("MatMul", ["h", "u"], ["z"]),  # without a bias: left out
    ]
    held = [normal("w", 12, 8), normal("b", 8), normal("v", 8, 4), normal("c", 4)]
    small = Small(nodes, ROWS, ["y", "z"], [*held, normal("u", 8, 3)])
    edit, feeds = Editor(Model.load(small.proto())), small.feeds()
    tensors = {"x": asymmetric(-2.0, 1.0), "h": asymmetric(-3.0, 5.0)}
    found = bias_corrections(edit, Units(edit).all, tensors, feeds, Options(8, "max"))
    assert list(found) == ["h", "y"]
    w, b, v, _ = (onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in held)
    h = np.concatenate([feed["x"].reshape(-1, 12) for feed in feeds]) @ w + b
    moved = (h - fake(h, tensors["h"])) @ v
    np.testing.assert_allclose(found["y"], moved.mean(axis=0), atol=0.03)
    assert np.abs(found["y"]).max() > 0.2


def test_what_is_not_finite_is_not_corrected() -> None:
    known = Known(CASES["gemm"])
    known.feeds[0]["x"][0, 0] = np.inf
    tensors = {"x": known.input}
    assert bias_corrections(known.edit, known.units, tensors, known.feeds) == {}
    assert bias_corrections(known.edit, [], tensors, known.feeds) == {}


# -- GPTQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_rounded_weights_lose_less_of_the_outputs(name: str) -> None:
    known = Known(CASES[name], 20)
    observer = gram_observer(known.edit, known.unit)
    assert observer is not None
    statistics = sweep(known.model, known.feeds, [observer])
    q = rounded_weights(known.edit, known.unit, known.affine, statistics)
    w, nearest = known.held["w"], quantize(known.held["w"], known.affine)
    assert q.shape == w.shape
    assert q.dtype == np.dtype(np.int8)
    assert np.abs(q).max() <= 8
    rows = np.concatenate([known.rows(feed["x"]) for feed in known.feeds], axis=1)

    def loss(integers: Array) -> Array:
        difference = known.matrix(w - dequantize(integers, known.affine))
        return np.asarray(np.square(rows @ difference).sum(axis=1)).reshape(-1)

    assert (loss(q) <= loss(nearest) * (1 + 1e-6)).all()
    assert loss(q).sum() < 0.8 * loss(nearest).sum()


@pytest.mark.parametrize("name", CASES)
def test_the_emitter_stores_given_integers(name: str) -> None:
    known = Known(CASES[name])
    rng = np.random.default_rng(5)
    q = rng.integers(-8, 8, known.held["w"].shape).astype(np.int8)
    made = known.static(rounded={known.unit.root: q})
    assert any(a.dtype == np.int8 and np.array_equal(a, q) for a in stored(made).values())
    feed = known.feeds[0]
    moved = known.mean([fake(feed["x"], known.input)], dequantize(q, known.affine))
    y = run(made, "off", feed)["y"]
    if name != "conv":
        axis = 1 if known.unit.kind == "convolution" else -1
        y = np.moveaxis(y, axis, 0).reshape(len(moved), -1).mean(axis=1)
        expected = moved + known.held.get("b", np.zeros(len(moved)))
        np.testing.assert_allclose(y, expected, atol=0.2)


def test_integers_of_other_scales_are_not_stored() -> None:
    """A dead channel's scale grows until its bias fits: its integers would mean something else."""
    small = CASES["gemm"]
    w, b = (onnx.numpy_helper.to_array(tensor).copy() for tensor in small.held)
    w[2] *= 1e-12
    b[2] = 100.0
    dead = Small(small.nodes, small.inputs, ["y"], [constant("w", w), constant("b", b)])
    known = Known(dead)
    q = np.full(w.shape, 7, np.int8)
    made = known.static(rounded={known.unit.root: q})
    assert not any(a.dtype == np.int8 and np.array_equal(a, q) for a in stored(made).values())


def test_no_gram_matrix_no_rounding() -> None:
    padded = Small(
        [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER")],
        IMAGES,
        ["y"],
        [normal("w", 6, 4, 3, 3)],
    )
    known = Known(padded)
    assert gram_observer(known.edit, known.unit) is None
    empty = sweep(known.model, known.feeds, [])
    with pytest.raises(LookupError, match="no Gram matrix"):
        rounded_weights(known.edit, known.unit, known.affine, empty)
    known = Known(CASES["conv"])
    with pytest.raises(LookupError, match="not asked for"):
        rounded_weights(known.edit, known.unit, known.affine, empty)
    assert isinstance(known.affine, Affine)
