"""Indices that differ because two scores are as good as equal, and those that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from graphopt import ties
from graphopt.ir import Model
from graphopt.judge import OutputState
from graphopt.report import ValidationRecord
from graphopt.runtime import limits
from graphopt.ties import Settler
from graphopt.validate import validate_files
from tests.graphs import model, node, save, value

Array = NDArray[Any]
INT = TensorProto.INT64
CHOICES = 4
# Row 0: 0 and 2 tie to 4e-8; row 1: a clear winner, 3.
SCORES = np.array([[1.0, 0.1, 1.0 + 4e-8, -2.0], [0.0, 0.5, 0.2, 3.0]], np.float64)


def constant(name: str, values: Any, dtype: Any = np.float64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def picker(
    op: str, after: str = "", axis: int | None = -1, keepdims: int | None = None, ir: int = 10
) -> onnx.ModelProto:
    """Doubles scores, picks, and passes the indices on through more operators."""
    attributes = {name: n for name, n in (("axis", axis), ("keepdims", keepdims)) if n is not None}
    outputs = ["v", "i"] if op == "TopK" else ["i"]
    picked = ["s", "k"] if op == "TopK" else ["s"]
    nodes = [node("Mul", ["x", "two"], ["s"]), node(op, picked, outputs, **attributes)]
    element, last = INT, "i"
    for number, name in enumerate(after.split()):
        made = f"p{number}"
        if name == "Cast":
            nodes.append(node("Cast", [last], [made], to=TensorProto.INT32))
            element = TensorProto.INT32
        elif name == "ToFloat":
            nodes.append(node("Cast", [last], [made], to=TensorProto.FLOAT))
            element = TensorProto.FLOAT
        elif name in ("Squeeze", "Reshape"):
            nodes.append(node(name, [last, "flat" if name == "Reshape" else "at"], [made]))
        else:
            nodes.append(node(name, [last], [made]))
        last = made
    nodes[-1].output[-1] = "y"
    constants = [
        constant("two", 2.0),
        constant("k", [2], np.int64),
        constant("at", [1], np.int64),
        constant("flat", [-1], np.int64),
    ]
    inputs = [value("x", ("N", "C"), TensorProto.DOUBLE)]
    return model(nodes, inputs, [value("y", None, element)], constants, ir=ir)


def settled(
    proto: onnx.ModelProto,
    reference: Any,
    off: Any,
    default: Any = None,
    scores: Array = SCORES,
    tolerance: float = 1e-5,
    original_default: Any = None,
) -> bool:
    runs = {
        "original off": reference,
        "original default": reference if original_default is None else original_default,
        "candidate off": off,
        "candidate default": reference if default is None else default,
    }
    flat = {way: [[np.asarray(run)]] for way, run in runs.items()}
    state = OutputState("y", "tensor(int64)", True, ["g"], flat)
    return Settler(Model.load(proto), [{"x": scores}], (), tolerance).is_tie(state, 0)


REFERENCE, TIED, WRONG = [[0], [3]], [[2], [3]], [[1], [3]]


def test_equal_scores_excuse_and_others_do_not() -> None:
    assert settled(picker("ArgMax"), REFERENCE, TIED)
    assert not settled(picker("ArgMax"), REFERENCE, WRONG)
    assert settled(picker("ArgMax"), REFERENCE, REFERENCE, default=TIED)
    assert not settled(picker("ArgMax"), REFERENCE, REFERENCE, default=WRONG)
    assert not settled(picker("ArgMax"), REFERENCE, TIED, default=WRONG)


def test_arg_min_and_its_default_axis() -> None:
    assert settled(picker("ArgMin", axis=1), REFERENCE, TIED)
    columns = picker("ArgMin", axis=None)  # along axis 0
    assert settled(columns, [[0, 0, 0, 0]], [[1, 0, 0, 0]], scores=np.zeros((2, 4)))
    assert not settled(columns, [[0, 0, 0, 0]], [[1, 0, 0, 0]], scores=SCORES)
    tied_in_columns = np.array([[1.0, 5.0], [1.0, 9.0]])
    assert settled(columns, [[0, 0]], [[1, 0]], scores=tied_in_columns)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("keepdims", [None, 0, 1])
def test_axes_kept_or_not(axis: int, keepdims: int | None) -> None:
    shape = (2,) if keepdims == 0 else (2, 1)
    made = picker("ArgMax", axis=axis, keepdims=keepdims)
    reference, tied, wrong = (np.reshape(a, shape) for a in (REFERENCE, TIED, WRONG))
    assert settled(made, reference, tied)
    assert not settled(made, reference, wrong)


@pytest.mark.parametrize(
    ("after", "shape"),
    [
        ("Cast", (2, 1)),
        ("Squeeze", (2,)),
        ("Identity", (2, 1)),
        ("Reshape", (2,)),
        ("Cast Squeeze", (2,)),
        ("Flatten", (2, 1)),
    ],
)
def test_behind_operators_that_keep_every_element(after: str, shape: tuple[int, ...]) -> None:
    made = picker("ArgMax", after)
    reference, tied, wrong = (np.reshape(a, shape) for a in (REFERENCE, TIED, WRONG))
    assert settled(made, reference, tied)
    assert not settled(made, reference, wrong)


def test_indices_cast_to_floats() -> None:
    made = picker("ArgMax", "ToFloat")
    assert settled(made, np.array(REFERENCE, "f"), np.array(TIED, "f"))
    assert not settled(made, np.array(REFERENCE, "f"), np.array(WRONG, "f"))


def test_behind_arithmetic_nothing_is_known() -> None:
    assert not settled(picker("ArgMax", "Neg"), REFERENCE, TIED)
    assert not settled(picker("ArgMax", "Neg Cast"), REFERENCE, TIED)


def test_top_k_indices_are_judged_in_order() -> None:
    made = picker("TopK")
    reference = [[2, 0], [3, 1]]
    assert settled(made, reference, [[0, 2], [3, 1]])
    assert not settled(made, reference, [[0, 2], [1, 3]])
    assert not settled(made, reference, [[0, 1], [3, 1]])
    assert settled(picker("TopK", axis=None), reference, [[0, 2], [3, 1]])


def test_top_k_values_are_no_indices() -> None:
    made = picker("TopK")
    made.graph.node[-1].output[:] = ["y", "i"]
    assert not settled(made, [[2, 0], [3, 1]], [[0, 2], [3, 1]])


def suppression() -> onnx.ModelProto:
    nodes = [
        node("Mul", ["x", "two"], ["s"]),
        node("NonMaxSuppression", ["boxes", "s", "most"], ["y"]),
    ]
    corners = np.array([[i, i, i + 0.5, i + 0.5] for i in range(CHOICES)], np.float32)
    return model(
        nodes,
        [value("x", (1, 1, CHOICES))],
        [value("y", None, INT)],
        [
            constant("two", 2.0, np.float32),
            constant("boxes", corners[None], np.float32),
            constant("most", [2], np.int64),
        ],
    )


def test_suppressed_boxes_are_judged_by_their_scores() -> None:
    scores = np.array([[[1.0, 0.5, 1.0 + 1e-7, 0.2]]], np.float32)
    reference = [[0, 0, 2], [0, 0, 0]]
    assert settled(suppression(), reference, [[0, 0, 0], [0, 0, 2]], scores=scores)
    assert not settled(suppression(), reference, [[0, 0, 2], [0, 0, 1]], scores=scores)


def test_shapes_counts_and_positions_that_do_not_fit_are_wrong() -> None:
    made = picker("ArgMax")
    assert not settled(made, REFERENCE, [[2], [3], [0]])
    assert not settled(made, REFERENCE, [2, 3])
    assert not settled(made, REFERENCE, [[99], [3]])
    runs = {way: [[np.asarray(REFERENCE)]] for way in ("original off", "candidate off")}
    runs["candidate default"] = [[np.asarray(TIED), np.asarray(TIED)]]
    state = OutputState("y", "seq(tensor(int64))", True, ["g"], runs)
    assert not Settler(Model.load(made), [{"x": SCORES}], (), 1e-5).is_tie(state, 0)


def test_the_allowed_gap_is_the_tolerance_of_the_scores_deviation() -> None:
    """The scores are doubled before they are compared, and so is their deviation."""
    made = picker("ArgMax")
    for share, tied in ((0.9, True), (1.1, False)):
        scores = np.array([[1.0, 0.0, -1.0, 0.5]])
        for _ in range(9):  # the deviation depends on the score that depends on it
            scores[0, 3] = 1.0 - share * 1e-3 * scores.std()
        assert settled(made, [[0]], [[3]], scores=scores, tolerance=1e-3, default=[[0]]) is tied


def test_the_allowed_gap_grows_with_the_noise_of_the_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = picker("ArgMax")
    scores = np.array([[1.0, 0.0, -1.0, 0.9]])
    for noise, tied in ((0.026, True), (0.024, False)):
        pair = scores, np.add(scores, [[0, 0, noise, 0]])
        monkeypatch.setattr(Settler, "_scores", lambda *_, pair=pair: pair)
        assert settled(made, [[0]], [[3]], scores=scores) is tied


def test_the_noise_of_the_scores_is_that_of_both_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []

    class Recorded(ties.Session):
        def __init__(self, path: Path, **options: Any) -> None:
            levels.append(options["optimizations"])
            super().__init__(path, **options)

    monkeypatch.setattr(ties, "Session", Recorded)
    assert settled(picker("ArgMax"), REFERENCE, TIED)
    assert levels == ["off", "default"]


def test_scores_that_are_an_input() -> None:
    nodes = [node("ArgMax", ["x"], ["y"], axis=1)]
    direct = model(nodes, [value("x", ("N", CHOICES))], [value("y", None, INT)])
    assert settled(direct, REFERENCE, TIED, scores=SCORES.astype(np.float32))
    assert not settled(direct, REFERENCE, WRONG, scores=SCORES.astype(np.float32))


def test_scores_that_are_an_output_already() -> None:
    made = picker("ArgMax")
    made.graph.output.append(value("s", None, TensorProto.DOUBLE))
    assert settled(made, REFERENCE, TIED)


def test_scores_of_a_model_newer_than_the_runtime() -> None:
    made = picker("ArgMax", ir=limits().ir + 1)
    assert settled(made, REFERENCE, TIED)
    assert not settled(made, REFERENCE, WRONG)


def test_scores_that_cannot_be_had_excuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = picker("ArgMax")
    broken.graph.node[0].op_type = "Conv"
    assert not settled(broken, REFERENCE, TIED)
    monkeypatch.setattr(ties, "PICKS", {})
    assert not settled(picker("ArgMax"), REFERENCE, TIED)


def test_scores_with_a_nan_excuse_nothing() -> None:
    scores = SCORES.copy()
    scores[1, 1] = np.nan
    assert not settled(picker("ArgMax"), REFERENCE, TIED, scores=scores)


# -------------------------------------------------------------------------- through the whole proof


def classifier(gap: float) -> onnx.ModelProto:
    """The largest of two logits that lie `gap` apart, whichever the sign of the sum of x."""
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "b"], ["s"]),
        node("ArgMax", ["s"], ["y"], axis=1, keepdims=0),
    ]
    w = np.zeros((8, 3), np.float32)
    w[:, :2] = np.random.default_rng(0).normal(size=(8, 1))
    w[:, 2] = -w[:, 0]
    return model(
        nodes,
        [value("x", ("N", 8))],
        [value("y", None, INT)],
        [constant("w", w, np.float32), constant("b", [0.0, gap, 0.0], np.float32)],
    )


def proof(
    tmp_path: Path, original: onnx.ModelProto, candidate: onnx.ModelProto
) -> ValidationRecord:
    return validate_files(save(original, tmp_path / "a.onnx"), save(candidate, tmp_path / "b.onnx"))


def test_ties_are_accepted_and_differences_found(tmp_path: Path) -> None:
    near = proof(tmp_path, classifier(0.0), classifier(1e-9))
    assert near.verdict == "proved"
    tied = proof(tmp_path, classifier(-1e-7), classifier(1e-7))
    assert (tied.verdict, tied.outputs[0].used) == ("proved", 0.0)
    far = proof(tmp_path, classifier(-0.1), classifier(0.1))
    assert far.verdict == "failed"
    assert "integers differ on feed" in far.reason
