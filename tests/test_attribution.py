"""Where the time of a model goes: all of it must be found, in the model's own names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphopt.api import optimize
from graphopt.attribution import NodeCosts, attribute, node_costs
from graphopt.data import given_feeds
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model
from graphopt.marked import MarkedCopy
from graphopt.runtime import Session
from graphopt.trace import OpTime
from models import fetch
from tests import graphs
from tests.graphs import node, value

IMAGES = graphs.ROOT / "models" / "digits" / "calibration.npz"


def names_of(model: Path | bytes) -> set[str]:
    loaded = Model.load(onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model)
    return {value.name for n in loaded.nodes() for value in n.outputs if value is not None}


def check(costs: NodeCosts, names: set[str]) -> None:
    attributed = sum(costs.values.values()) + costs.converting
    assert attributed >= 0.97 * costs.total
    assert costs.total > 0
    assert set(costs.values) <= names
    assert all(c.value for c in costs.conversions)
    covered = [name for values in costs.computed.values() for name in values]
    assert len(covered) == len(set(covered))  # no value is computed twice
    assert set(costs.values) <= set(covered)
    assert costs.of(names) == pytest.approx(sum(costs.values.values()))
    assert costs.of([]) == 0


@pytest.mark.parametrize("file", graphs.DIGITS, ids=lambda file: file.stem)
def test_all_time_of_the_digits_models_is_found(file: Path) -> None:
    with Session(file) as session:
        feed = next(given_feeds(str(IMAGES), session))
    costs = node_costs(file, feed, 1, runs=3)
    check(costs, names_of(file))
    assert costs.unattributed == 0


def test_the_residual_network_is_told_apart_by_convolution() -> None:
    """Every Conv takes its BatchNormalization, and the activation or sum behind it."""
    (file,) = [file for file in graphs.DIGITS if file.stem == "cnn"]
    with Session(file) as session:
        feed = next(given_feeds(str(IMAGES), session))
    costs = node_costs(file, feed, 1, runs=1)
    loaded = Model.load(file)
    convolutions = [n.outputs[0].name for n in loaded.nodes() if n.op == "Conv" and n.outputs[0]]
    groups = [set(values) for values in costs.computed.values()]
    holding = [sum(name in convolutions for name in group) for group in groups]
    assert sum(holding) == len(convolutions) == 11
    assert max(holding) == 1
    sums = [n.outputs[0].name for n in loaded.nodes() if n.op == "Add" and n.outputs[0]]
    for group, count in zip(groups, holding, strict=True):
        assert count == 1 or not group & set(sums)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"), [("nudenet_yolov8n", (1, 3, 320, 320)), ("ppocr_rec_v4", (1, 3, 48, 320))]
)
def test_all_time_of_real_models_is_found(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    result = tmp_path / "result.onnx"
    optimize(fetch.fetch(name), result, validate=False)
    for file in (fetch.fetch(name), result):
        with Session(file) as session:
            (port,) = session.inputs
        costs = node_costs(file, {port.name: np.zeros(shape, np.float32)}, 2, runs=1)
        check(costs, names_of(file))
        assert costs.unattributed <= 0.001 * costs.total


def looping() -> bytes:
    body = helper.make_graph(
        [node("Identity", ["go"], ["more"]), node("MatMul", ["v", "w"], ["v2"])],
        "body",
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("v", None)],
        [value("more", (), TensorProto.BOOL), value("v2", None)],
    )
    nodes = [node("Exp", ["x"], ["e"]), node("Loop", ["n", "", "e"], ["y"], body=body)]
    count = onnx.numpy_helper.from_array(np.array(3, np.int64), "n")
    weights = [graphs.weight("w", (64, 64)), count]
    made = graphs.model(nodes, [value("x", (64, 64))], [value("y", None)], weights)
    return bytes(made.SerializeToString())


def test_bodies_are_attributed_to_their_own_values() -> None:
    costs = node_costs(looping(), {"x": np.zeros((64, 64), np.float32)}, 1, runs=2)
    check(costs, names_of(looping()))
    assert {"e", "v2", "y"} <= set(costs.values)


def test_times_are_added_up_by_root() -> None:
    """On made-up times: a sum, a conversion, and a node that nobody knows."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Exp", ["b"], ["y"]),
    ]
    image, weight = value("x", (1, 16, 8, 8)), graphs.weight("w", (16, 16, 3, 3))
    model = graphs.model(nodes, [image], [value("y", None)], [weight])
    with MarkedCopy(model.SerializeToString()) as copy:
        graph = copy.executed(threads=1)
    times = [OpTime(n.name, n.op, 1.0, 1, None) for n in graph.nodes]
    costs = attribute(graph, [*times, OpTime("strange", "Abs", 0.5, 1, None)])
    assert costs.values == {"b": 1.0, "y": 1.0}
    assert costs.computed == {"b": ("a", "b"), "y": ("y",)}
    made = {(conversion.op, conversion.value) for conversion in costs.conversions}
    assert made == {("ReorderInput", "x"), ("ReorderOutput", "b")}
    assert (costs.unattributed, costs.total) == (0.5, 4.5)
    assert costs.of(["a"]) == costs.of(["b"]) == costs.of(["a", "b"]) == 1.0


def test_a_feed_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeFailure):
        node_costs(looping(), {"x": np.zeros((3, 3), np.float32)}, 1)
