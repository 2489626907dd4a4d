"""Ranges, what shares a scale, and parameters that are given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.affine import Affine, dequantize, quantize
from graphopt.passes.quantize.emission import Emitter, Options
from graphopt.passes.quantize.parameters import METHODS, Method, Ranges, affines, usable, wanted
from graphopt.passes.quantize.units import Unit, Units
from graphopt.statistics import Statistics
from tests.graphs import model, node, value
from tests.quantized import Small, constant, integers, make_static, normal, run, without

Array = NDArray[Any]
SHAPE = (1, 4, 6, 6)
RNG = np.random.default_rng(3)
W = normal("w", 4, 4, 1, 1)


class Known:
    """The units of a model, and ranges of them from numbers that are told."""

    def __init__(
        self,
        nodes: list[onnx.NodeProto],
        seen: Mapping[str, Any],
        held: list[onnx.TensorProto] | None = None,
        outputs: tuple[str, ...] = ("y",),
        method: Method = "min-max",
        inputs: tuple[str, ...] = ("x",),
    ) -> None:
        made = model(
            nodes,
            [value(name, SHAPE) for name in inputs],
            [value(name, None) for name in outputs],
            held or [],
        )
        self.model = Model.load(made)
        self.units = Units(Editor(self.model)).all
        statistics = Statistics(wanted(self.units))
        for name, numbers in seen.items():
            statistics.observe(name, np.asarray(numbers, np.float32))
        self.ranges = Ranges(self.units, statistics, method)

    def of(self, name: str) -> tuple[float, float] | None:
        return self.ranges.of(self.model.graph.values[name])

    def usable(self) -> list[str]:
        return [unit.root for unit in usable(self.units, self.ranges)]

    def affines(self, *roots: str) -> dict[str, Affine]:
        chosen = [unit for unit in self.units if not roots or unit.root in roots]
        return affines(chosen, self.ranges)


def conv(source: str, result: str) -> onnx.NodeProto:
    return node("Conv", [source, "w"], [result])


# -- ranges ----------------------------------------------------------------------------------------


def test_calibration_is_asked_for_all_that_units_read_or_give() -> None:
    nodes = [conv("x", "h"), node("Sigmoid", ["h"], ["s"]), node("Mul", ["h", "s"], ["y"])]
    known = Known(nodes, {}, [W])
    asked = wanted(known.units)
    assert {observer.value for observer in asked} == {"x", "h", "s", "y"}
    assert {observer.kind for observer in asked} == {"histogram"}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([-2.0, 3.0], (-2.0, 3.0)),
        ([1.0, 3.0], (0.0, 3.0)),
        ([-4.0, -1.0], (-4.0, 0.0)),
        ([0.0], (0.0, 0.0)),
        ([-np.inf, -1.0, 2.0], None),  # a mask, which no integer stands for
        ([np.nan, -1.0, 2.0], None),
    ],
)
def test_ranges_contain_zero(seen: list[float], expected: tuple[float, float] | None) -> None:
    assert Known([conv("x", "y")], {"x": seen, "y": [1.0]}, [W]).of("x") == expected


@pytest.mark.parametrize("method", METHODS)
def test_no_method_goes_beyond_what_was_seen(method: Method) -> None:
    seen = RNG.standard_cauchy(5000)
    found = Known([conv("x", "y")], {"x": seen, "y": [1.0]}, [W], method=method).of("x")
    assert found is not None
    low, high = found
    assert np.float32(seen.min()) <= low < 0 < high <= np.float32(seen.max())


def test_what_calibration_did_not_see_is_not_known() -> None:
    known = Known([conv("x", "h"), conv("h", "y")], {"x": [1.0], "h": [np.nan], "y": []}, [W])
    assert known.of("x") is not None
    assert known.of("h") is None
    assert known.of("y") is None
    assert known.usable() == []
    with pytest.raises(LookupError, match="calibration saw nothing of 'h'"):
        known.affines()


@pytest.mark.parametrize("op", ["Sigmoid", "HardSigmoid"])
def test_some_operators_say_their_range(op: str) -> None:
    assert Known([node(op, ["x"], ["y"])], {"x": [1.0], "y": [0.4]}).of("y") == (0.0, 1.0)


@pytest.mark.parametrize(("top", "expected"), [(6.0, 6.0), (20.0, 9.0)])
def test_clamps_end_ranges(top: float, expected: float) -> None:
    nodes = [conv("x", "h"), node("Clip", ["h", "low", "top"], ["y"])]
    held = [W, constant("low", 0.0), constant("top", top)]
    known = Known(nodes, {"x": [1.0], "y": [-1e-3, 9.0]}, held)
    assert known.of("y") == (0.0, expected)
    assert known.affines()["y"].zero_point == 0


@pytest.mark.parametrize(
    "readers", ["alone", "also a convolution", "also an output", "also floats"]
)
def test_what_only_hard_swish_reads_ends_at_its_knee(readers: str) -> None:
    nodes = [conv("x", "h"), node("HardSwish", ["h"], ["y"])]
    if readers == "also a convolution":
        nodes.append(conv("h", "z"))
    elif readers == "also floats":
        nodes.append(node("Tanh", ["h"], ["z"]))
    outputs = {"alone": ("y",), "also an output": ("y", "h")}.get(readers, ("y", "z"))
    seen = {"x": [1.0], "y": [1.0], "z": [1.0], "h": [-8.0, 5.0]}
    known = Known(nodes, seen, [W], outputs)
    assert known.of("h") == (-3.0 if readers == "alone" else -8.0, 5.0)


# -- groups ----------------------------------------------------------------------------------------

MOVED = [
    node("Reshape", ["x", "shape"], ["a"]),
    node("Transpose", ["a"], ["b"], perm=[1, 0]),
    node("Split", ["b"], ["c", "d"], axis=0),
    node("Sigmoid", ["c"], ["y"]),
    node("Sigmoid", ["d"], ["z"]),
]
FLAT = integers("shape", 4, -1)


def test_elements_that_only_move_keep_one_scale() -> None:
    seen = {"x": [-1.0, 2.0], "a": [2.0], "b": [-1.5], "c": [0.5], "d": [3.0], "y": [1], "z": [1]}
    known = Known(MOVED, seen, [FLAT], ("y", "z"))
    found = known.affines()
    assert len({found[name] for name in "xabcd"}) == 1
    low, high = found["x"].bounds
    assert low == pytest.approx(-1.5, abs=float(found["x"].scale) / 2)
    assert high == pytest.approx(3.0, abs=float(found["x"].scale) / 2)
    assert found["x"].dtype == np.uint8
    assert found["x"].axis is None


def test_what_is_not_chosen_joins_nothing() -> None:
    seen = {"x": [-1.0, 2.0], "a": [9.0], "b": [-1.5], "c": [0.5], "d": [3.0], "y": [1], "z": [1]}
    found = Known(MOVED, seen, [FLAT], ("y", "z")).affines("b", "y")
    assert found.keys() == {"a", "b", "c", "y"}
    assert found["a"] == found["b"] != found["c"]


def joined(first: list[float], second: list[float]) -> Known:
    nodes = [node("Concat", ["x", "u"], ["z"], axis=1), node("Sigmoid", ["z"], ["y"])]
    seen = {"x": first, "u": second, "z": [*first, *second], "y": [1.0]}
    return Known(nodes, seen, inputs=("x", "u"))


@pytest.mark.parametrize(
    ("second", "alike"),
    [([-1.0, 1.0], True), ([0.0, 7.9], True), ([0.0, 8.1], False), ([0.0, 0.5], True),
     ([0.0, 0.49], False), ([0.0], False)],
)  # fmt: skip
def test_concat_of_unlike_ranges_is_kept_apart(second: list[float], alike: bool) -> None:
    known = joined([-1.0, 1.0], second)
    assert known.usable() == (["z", "y"] if alike else ["y"])
    if alike:
        found = known.affines()
        assert found["x"] == found["u"] == found["z"]


@pytest.mark.parametrize(("top", "shares"), [(1.0, False), (2.0, True), (3.0, True)])
def test_a_clamp_keeps_its_top_beside_others(top: float, shares: bool) -> None:
    nodes = [
        conv("x", "h"),
        node("Clip", ["h", "low", "top"], ["r"]),
        conv("x", "k"),
        node("Relu", ["k"], ["s"]),
        node("Concat", ["s", "r"], ["y"], axis=1),
    ]
    held = [W, constant("low", 0.0), constant("top", top)]
    seen = {"x": [1.0], "r": [0.0, 1.0], "s": [0.0, 2.0], "y": [0.0, 2.0]}
    known = Known(nodes, seen, held)
    assert known.usable() == ["r", "s", "y"]
    found = known.affines()
    assert found["s"] == found["y"]
    assert (found["r"] == found["y"]) == shares


def test_clamps_keep_their_range_beside_others() -> None:
    """Relu's zero point stays 0 next to numbers that are negative; those share another range."""
    nodes = [
        conv("x", "h"),
        node("Relu", ["h"], ["r"]),
        conv("x", "k"),
        node("Reshape", ["r", "shape"], ["s"]),
        node("Concat", ["s", "k"], ["y"], axis=1),
    ]
    seen = {"x": [1.0], "r": [0.0, 2.0], "s": [0.0, 2.0], "k": [-1.0, 1.0], "y": [-1.0, 2.0]}
    known = Known(nodes, seen, [W, integers("shape", *SHAPE)])
    assert known.usable() == ["r", "k", "s", "y"]
    found = known.affines()
    assert found["r"] == found["s"] != found["y"] == found["k"]
    assert found["r"].zero_point == 0


# -- shifts ----------------------------------------------------------------------------------------


def shifted(factor: float, shift: float, seen: list[float], after: bool) -> Known:
    held = [
        constant(name, np.full(4, number))
        for name, number in {"g": factor, "b": shift, "m": 0.0, "v": 1.0}.items()
    ]
    normed = node("BatchNormalization", ["x", "g", "b", "m", "v"], ["n"], epsilon=0.0)
    nodes = [normed, node("Flatten", ["n"], ["f"]), node("Sigmoid", ["f"], ["y"])]
    result = [factor * number + shift for number in seen]
    known = Known(nodes, {"x": seen, "n": result, "f": result, "y": [1.0]}, held)
    assert known.usable() == ["n", "f", "y"]
    if not after:
        known.units = [unit for unit in known.units if unit.root != "f"]
    return known


@settings(max_examples=200)
@given(
    st.floats(0.01, 50),
    st.floats(-30, 30),
    st.floats(-20, 0),
    st.floats(0.1, 20),
    st.booleans(),
)
def test_shifts_are_whole_steps(
    factor: float, shift: float, low: float, high: float, after: bool
) -> None:
    """factor * x + shift is what the same integers read as, zero included, and nothing is cut."""
    found = shifted(factor, shift, [low, high], after).affines()
    x, y = found["x"], found["n"]
    moved = shift / factor
    every = np.arange(256, dtype=np.uint8)
    expected = factor * dequantize(every, x).astype(np.float64) + shift
    off = np.abs(dequantize(every, y) - expected).max()
    step = factor * float(x.scale)
    is_exact = abs(moved) >= float(x.scale) * (1 + 1e-6)
    # Less than a step goes to the nearest, none or one.
    assert off <= (1e-5 * (step * 256 + abs(shift)) if is_exact else step * (0.5 + 1e-4))
    for affine, ends in ((x, (low, high)), (y, (factor * low + shift, factor * high + shift))):
        for end in (*ends, 0.0):
            kept = dequantize(quantize(np.float32(end), affine), affine)
            within = 0.501 if is_exact or affine is x else 1.001
            assert abs(float(kept) - end) <= float(affine.scale) * within + 1e-6 * abs(end)
    if after:
        assert found["f"] == found["n"]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(0.2, 5), st.integers(-8, 8)), min_size=2, max_size=4))
def test_parts_that_are_shifts_of_others_join(maps: list[tuple[float, int]]) -> None:
    """All that is read from the same integers reads right, whichever way the parts are joined."""
    nodes, held = [], [constant("m", np.zeros(4)), constant("v", np.ones(4))]
    readings = {"x": (1.0, 0.0), "u": (1.0, 0.0)}
    for number, (factor, shift) in enumerate(maps):
        names = [f"g{number}", f"b{number}"]
        # One half goes on from the last, the other starts at an input of its own.
        source = "u" if number == len(maps) // 2 else (f"n{number - 1}" if number else "x")
        held += [constant(names[0], np.full(4, factor)), constant(names[1], np.full(4, shift))]
        inputs = [source, *names, "m", "v"]
        nodes.append(node("BatchNormalization", inputs, [f"n{number}"], epsilon=0.0))
        f, s = readings[source]
        readings[f"n{number}"] = (f * factor, s * factor + shift)
    first, last = f"n{len(maps) // 2 - 1}", f"n{len(maps) - 1}"
    nodes.append(node("Concat", [first, last], ["y"], axis=1))
    seen = {name: [f * x + s for x in (-1.0, 2.0)] for name, (f, s) in readings.items()}
    seen["y"] = [*seen[first], *seen[last]]
    known = Known(nodes, seen, held, inputs=("x", "u"))
    found = known.affines()
    assert found[first] == found[last] == found["y"]
    every = np.arange(256, dtype=np.uint8)
    for name, (f, s) in readings.items():
        source = "x" if int(name[1:] or 0) < len(maps) // 2 and name != "u" else "u"
        x, y = found[source], found[name]
        off = dequantize(every, y) - (f * dequantize(every, x).astype(np.float64) + s)
        assert np.abs(off).max() <= float(y.scale) * 1.01  # each of two shifts to the nearest
        for end in seen[name]:
            kept = float(dequantize(quantize(np.float32(end), y), y))
            # An end is within half a step, and so is a second shift.
            assert abs(kept - end) <= float(y.scale) * 1.001 + 1e-6 * abs(end)


def test_a_shift_does_not_move_a_clamp() -> None:
    """A Relu whose zero would no longer be the lowest integer stays; the shift stays floats."""
    norm = {"g": 1.0, "b": 2.0, "m": 0.0, "v": 1.0}
    held = [constant(name, np.full(4, number)) for name, number in norm.items()]
    nodes = [
        conv("x", "h"),
        node("Relu", ["h"], ["r"]),
        node("BatchNormalization", ["r", "g", "b", "m", "v"], ["y"], epsilon=0.0),
    ]
    known = Known(nodes, {"x": [1.0], "r": [0.0, 4.0], "y": [2.0, 6.0]}, [W, *held])
    assert known.usable() == ["r"]
    with pytest.raises(ValueError, match="'y' cannot share the range"):
        known.affines()


# -- any choice of what is usable ------------------------------------------------------------------


def rich() -> Small:
    """Clamps, a shift, movement and parts of several kinds, all of one scale at the end."""
    norm = [constant(n, np.full(4, a)) for n, a in zip("gbmv", (0.9, -0.4, 0.1, 0.9), strict=True)]
    nodes = [
        conv("x", "h"),
        node("Relu", ["h"], ["r"]),
        conv("x", "k0"),
        node("Clip", ["k0", "low", "top"], ["k"]),
        node("BatchNormalization", ["x", "g", "b", "m", "v"], ["n"]),
        node("HardSigmoid", ["n"], ["s"]),
        node("Transpose", ["n"], ["t"], perm=[0, 1, 3, 2]),
        node("Concat", ["r", "k", "s", "t", "n"], ["c"], axis=1),
        node("Split", ["c"], ["p", "q"], axis=1),
        node("Add", ["p", "q"], ["y"]),
    ]
    weights = normal("w", 4, 4, 1, 1, scale=0.8)
    held = [weights, *norm, constant("low", 0.0), constant("top", 0.7)]
    return Small(nodes, {"x": (1, 4, 6, 6)}, ["y"], held, spread=0.3)


def test_every_choice_of_usable_units_clamps_and_is_right() -> None:
    """What is chosen beside changes scales, and never what a value is, beyond its rounding."""
    small = rich()
    before, feeds = small.proto(), small.feeds()
    exact = run(before, "off", feeds[0])["y"]
    every = make_static(small).chosen
    assert every == ["r", "k", "n", "s", "t", "c", "p", "y"]
    for left in itertools.chain([()], itertools.combinations(every, 2)):
        static = make_static(before, feeds, choose=without(*left))
        found = run(static.after, "off", feeds[0])["y"]
        steps = sum(float(affine.scale) for affine in static.tensors.values())
        assert np.abs(found - exact).max() <= 2 * steps, left
        for unit in static.units:
            affine = static.tensors[unit.root]
            low, high = (float(end) for end in affine.bounds)
            bottom, top = (0.0, 1.0) if unit.kind == "hard-sigmoid" else unit.clamp
            assert low >= bottom, (unit.root, left)
            assert high <= top * (1 + 1e-6), (unit.root, left)


# -- given parameters ------------------------------------------------------------------------------


def emitted(before: onnx.ModelProto, tensors: Mapping[str, Affine], roots: list[str]) -> bytes:
    loaded = Model.load(before)
    edit = Editor(loaded)
    units: list[Unit] = [unit for unit in Units(edit) if unit.root in roots]
    Emitter(edit, tensors, Options(8, "max")).emit(units)
    edit.settle()
    return exporter.to_proto(loaded).SerializeToString()


def test_given_parameters_make_the_same_file_again() -> None:
    small = rich()
    static = make_static(small)
    made = [emitted(static.before, static.tensors, static.chosen) for _ in range(2)]
    assert made[0] == made[1]
    held = {t.name: onnx.numpy_helper.to_array(t) for t in static.after.graph.initializer}
    for name in ("x", "r", "k", "c"):
        assert held[f"{name}/scale"] == static.tensors[name].scale
        assert held[f"{name}/zero_point"] == static.tensors[name].zero_point


def test_parameters_of_more_than_is_chosen_serve_as_well() -> None:
    """As where regions are taken out of a recipe: what shared a range with them still has it."""
    small = rich()
    static = make_static(small)
    feed = static.feeds[0]
    exact = run(static.before, "off", feed)["y"]
    for root in static.chosen:
        left = [other for other in static.chosen if other != root]
        made = onnx.ModelProto.FromString(emitted(static.before, static.tensors, left))
        onnx.checker.check_model(made, full_check=True)
        steps = sum(float(affine.scale) for affine in static.tensors.values())
        assert np.abs(run(made, "default", feed)["y"] - exact).max() <= 2 * steps


# -- nothing in it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["activations", "weights", "both"])
def test_ranges_of_no_width(zero: str) -> None:
    weights = constant("w", np.zeros((4, 4, 1, 1))) if zero != "activations" else W
    nodes = [
        conv("x", "h"),
        node("Sigmoid", ["h"], ["s"]),
        node("Mul", ["h", "s"], ["m"]),
        node("Add", ["m", "k"], ["a"]),
        node("GlobalAveragePool", ["a"], ["y"]),
    ]
    held = [weights, constant("k", np.zeros((4, 1, 1)))]
    small = Small(nodes, {"x": (1, 4, 6, 6)}, ["y"], held)
    feeds = small.feeds()
    if zero != "weights":
        feeds = [{"x": np.zeros_like(feed["x"])} for feed in feeds]
    static = make_static(small.proto(), feeds)
    assert static.tensors["h"].scale == 1
    assert static.dequantized == []
    for level in ("off", "default"):
        np.testing.assert_array_equal(run(static.after, level, feeds[0])["y"], 0)
