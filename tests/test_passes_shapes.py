"""`fix-shapes`: sizes of inputs that are declared, enforced, seen by the rest, and proved at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from graphopt import Result, optimize
from graphopt.edit import Editor
from graphopt.errors import DataError, UsageError
from graphopt.fixed import FixedSession, note
from graphopt.ir import Model
from graphopt.manager import parse_pipeline, run_pipeline, to_text
from graphopt.passes.canonicalize.fix_shapes import FixShapes
from graphopt.passes.pipelines import PASSES, fixed_shapes, pipeline
from graphopt.runtime import RuntimeFailure, Session
from graphopt.validate import validate_files
from tests import goldens, graphs

OPEN = """g (float[N,C,8] x, float[N,4] m) => (float[N,A] y, float[N,4] z) {
    s = Shape (x)
    zero = Constant <value = int64[1] {0}> ()
    n = Gather (s, zero)
    rest = Constant <value = int64[1] {-1}> ()
    to = Concat <axis = 0> (n, rest)
    y = Reshape (x, to)
    z = Relu (m)
}"""


def dims(info: onnx.ValueInfoProto) -> list[int | str]:
    return [
        d.dim_value if d.HasField("dim_value") else d.dim_param
        for d in info.type.tensor_type.shape.dim
    ]


def fixed(shapes: dict[str, tuple[int, ...]], proto: onnx.ModelProto | None = None) -> Result:
    return optimize(proto or graphs.parsed(OPEN), shapes=shapes)


# -- what it does ----------------------------------------------------------------------------------


def test_sizes_are_declared_and_the_other_types_follow() -> None:
    text = to_text(FixShapes.of({"x": (2, 3, -1)}))
    made = goldens.golden(
        text,
        OPEN,
        OPEN.replace("float[N,C,8] x", "float[2,3,8] x").replace("float[N,A] y", "float[2,24] y"),
        ["fix-shapes x"],
        runs=False,  # feeds of other sizes would be drawn
    )
    assert [dims(info) for info in made.graph.input] == [[2, 3, 8], ["N", 4]]
    assert [dims(info) for info in made.graph.output] == [[2, 24], ["N", 4]]


def test_arithmetic_on_shapes_folds_and_onnxruntime_enforces_them() -> None:
    result = fixed({"x": (2, 3, 8)})
    made = result.proto()
    assert sorted(node.op_type for node in made.graph.node) == ["Relu", "Reshape"]
    assert result.report.validation.verdict == "proved"
    assert result.report.validation.notes == ["compared at x:2x3x8"]
    assert {tuple(feed.shapes["x"]) for feed in result.report.validation.feeds} == {(2, 3, 8)}
    assert len({tuple(feed.shapes["m"]) for feed in result.report.validation.feeds}) > 1
    feed = {"x": np.zeros((1, 3, 8), np.float32), "m": np.zeros((1, 4), np.float32)}
    with Session(made.SerializeToString()) as session, pytest.raises(RuntimeFailure):
        session.run(feed)


def test_a_declared_size_that_contradicts_is_made_true_everywhere() -> None:
    proto = graphs.parsed(
        """g (float[N,4] x, bool c) => (float[1,4] y) <float[A,9] t> {
        t = Neg (x)
        y = If (c) <then_branch = t1 () => (float[1,4] u) { u = Relu (t) },
                    else_branch = e1 () => (float[1,4] v) { v = Abs (t) }> }"""
    )
    loaded = Model.load(proto)
    (run,) = run_pipeline(loaded, [FixShapes.of({"x": (3, -1)})], verify_each=True)
    assert run.error == ""
    graph = loaded.graph.proto
    assert [dims(info) for info in (*graph.output, *graph.value_info)] == [[3, 4], [3, 4]]
    bodies = [attribute.g for attribute in graph.node[1].attribute]
    assert [dims(body.output[0]) for body in bodies] == [[3, 4], [3, 4]]


def test_an_unknown_rank_is_declared() -> None:
    proto = graphs.model([graphs.node("Relu", ["x"], ["y"])], [graphs.value("x", None)])
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    made = fixed({"x": (2, -1)}, proto).proto()
    assert dims(made.graph.input[0]) == [2, ""]
    scalar = fixed({"x": ()}, proto).proto().graph.input[0].type.tensor_type
    assert scalar.HasField("shape")
    assert not scalar.shape.dim


def test_nothing_changes_where_the_sizes_are_as_stated() -> None:
    proto = graphs.matmul()
    loaded = Model.load(proto)
    (run,) = run_pipeline(loaded, [FixShapes.of({"x": (1, -1)})])
    assert run.changes == ()
    assert graphs.exported(loaded) == proto


def test_denied_or_out_of_fuel_it_does_nothing() -> None:
    step = FixShapes.of({"x": (2, 3, 8)})
    for given in ({"denied": [("fix-shapes", "x")]}, {"fuel": 0}):
        loaded = Model.load(graphs.parsed(OPEN))
        (run,) = run_pipeline(loaded, [step], **given)  # type: ignore[arg-type]
        assert (run.changes, run.error) == ((), "")
        assert dims(loaded.graph.proto.input[0]) == ["N", "C", 8]


# -- what it refuses -------------------------------------------------------------------------------

WITH_DEFAULT = """<ir_version: 10, opset_import: ["": 17]>
g (float[N] x, float[M] w) => (float[N] y) <float[2] w = {1, 2}> { y = Add (x, w) }"""


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"q": (1,)}, "shape of 'q': there is no such input; there are 'x', 'm'"),
        ({"x": (1, 3)}, "shape of 'x': 1x3 has 2 sizes, the input is float[N,C,8]"),
        ({"x": (1, 3, 9)}, "shape of 'x': axis 2 is 8 in the model, not 9"),
        ({"x": (0, 3, 8)}, "shape of 'x': 0x3x8 has the size 0; sizes are positive, -1 keeps"),
        ({"x": (-2, 3, 8)}, "has the size -2"),
        ({"x": ()}, "a scalar has 0 sizes"),
    ],
)
def test_mistakes_are_one_line(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(UsageError) as error:
        fixed(shapes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_input_with_a_default_keeps_to_it() -> None:
    with pytest.raises(UsageError, match="axis 0 is 2 in the model, not 3"):
        fixed({"w": (3,)}, graphs.parsed(WITH_DEFAULT))
    made = optimize(
        graphs.parsed(WITH_DEFAULT), shapes={"w": (2,)}, keep_overridable=True, level=0
    ).proto()
    assert dims(made.graph.input[1]) == [2]
    frozen = graphs.parsed(WITH_DEFAULT.replace("10", "3"))
    with pytest.raises(UsageError, match="no such input; there are 'x'"):
        fixed({"w": (2,)}, frozen)


def test_an_input_that_is_no_tensor_has_no_shape() -> None:
    sequence = onnx.helper.make_tensor_sequence_value_info("x", onnx.TensorProto.FLOAT, None)
    proto = graphs.model([graphs.node("SequenceLength", ["x"], ["y"])], [sequence])
    with pytest.raises(UsageError, match="the input is no tensor"):
        fixed({"x": (1,)}, proto)


# -- as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "a:0", "a b", "a,b;c{d}%e", "ü", "/m/in.1", "x=1", "1x2"])
@pytest.mark.parametrize("sizes", [(1, -1, 3), (7,), ()])
def test_a_pipeline_round_trips(name: str, sizes: tuple[int, ...]) -> None:
    steps = pipeline(1, None, shapes={name: sizes, "other": (4,)})
    text = ", ".join(map(to_text, steps))
    again = parse_pipeline(text, PASSES)
    assert again == steps
    assert fixed_shapes(again) == {name: sizes, "other": (4,)}


@pytest.mark.parametrize("text", ["x", "x:1x", "x:a", "x:1xx2"])
def test_text_that_is_no_shape(text: str) -> None:
    with pytest.raises(UsageError, match="fix-shapes: cannot read"):
        optimize(graphs.parsed(OPEN), passes=f"fix-shapes{{shapes={text}}}")


def test_a_run_replays_from_its_report() -> None:
    first = fixed({"x": (2, 3, 8)})
    again = optimize(graphs.parsed(OPEN), passes=first.report.pipeline)
    assert again.report.fingerprint == first.report.fingerprint
    assert again.report.validation.notes == ["compared at x:2x3x8"]


# -- the proof -------------------------------------------------------------------------------------


def test_only_what_was_asked_for_may_change_the_interface() -> None:
    narrow = graphs.parsed(OPEN.replace("float[N,C,8] x", "float[2,3,8] x"))

    @dataclasses.dataclass(frozen=True)
    class Narrow:
        name: ClassVar[str] = "narrow"

        def run(self, model: Model, edit: Editor) -> None:
            edit.adopt(Model.load(narrow))

    (run,) = run_pipeline(Model.load(graphs.parsed(OPEN)), [Narrow()], verify_each=True)
    assert "the declared type of 'x', one of the inputs, changed" in run.error


def test_data_of_other_shapes_is_a_mistake(tmp_path: Path) -> None:
    source = graphs.save(graphs.parsed(OPEN), tmp_path / "in.onnx")
    rng = np.random.default_rng(0)
    for batch, fits in ((2, True), (3, False)):
        x = rng.standard_normal((batch, 3, 8)).astype(np.float32)
        m = rng.standard_normal((batch, 4)).astype(np.float32)
        folder = tmp_path / str(batch)
        folder.mkdir()
        for number in range(3):
            np.savez(folder / f"{number}.npz", x=x * (number + 1), m=m * (number + 1))
        if fits:
            proof = optimize(source, shapes={"x": (2, 3, 8)}, data=str(folder)).report.validation
            assert proof.verdict == "proved"
        else:
            with pytest.raises(DataError, match="input 'x' is 3x3x8, fixed to 2x3x8"):
                optimize(source, shapes={"x": (2, 3, 8)}, data=str(folder))


def test_files_are_compared_at_given_shapes(tmp_path: Path) -> None:
    a = graphs.save(graphs.parsed(OPEN), tmp_path / "a.onnx")
    fixed({"x": (2, 3, 8)}).save(tmp_path / "b.onnx")
    assert validate_files(a, tmp_path / "b.onnx").verdict == "failed"
    assert validate_files(a, tmp_path / "b.onnx", shapes={"x": (2, 3, 8)}).verdict == "proved"


def test_a_fixed_session_states_and_enforces(tmp_path: Path) -> None:
    path = graphs.save(graphs.parsed(OPEN), tmp_path / "a.onnx")
    with FixedSession(path, {"x": (2, -1, 8)}) as session:
        assert {port.name: port.shape for port in session.inputs} == {
            "x": (2, "C", 8),
            "m": ("N", 4),
        }
        feed = {"x": np.zeros((2, 5, 8), np.float32), "m": np.zeros((1, 4), np.float32)}
        assert session.run(feed)["y"].shape == (2, 40)
        feed["x"] = np.zeros((1, 5, 8), np.float32)
        with pytest.raises(RuntimeFailure, match=r"input 'x' is 1x5x8, fixed to 2x\?x8"):
            session.run(feed)
    assert note({}) == ""
    assert note({"x": (2, -1)}) == "compared at x:2x?"
