"""Sessions, and the facts about onnxruntime that graphopt relies on: each has a test here."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import probe as probe_module
from graphopt import trace
from graphopt.census import census
from graphopt.errors import RuntimeFailure
from graphopt.probe import probe
from graphopt.runtime import Port, Session, failure, limits

FLOAT = TensorProto.FLOAT
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def value(name: str, shape: Any = None, element: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def build(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto] | None = None,
    *,
    ir: int = 10,
    opset: int = 21,
) -> bytes:
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers or [])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = ir
    serialized: bytes = model.SerializeToString()
    return serialized


def const(name: str, array: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, dtype), name)


def node(op: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


RELU = build([node("Relu", "x", "y")], [value("x", ["N", 4])], [value("y")])
BAD_RESHAPE = build(
    [node("Reshape", "x s", "y", "flat")],
    [value("x", ["N", 4])],
    [value("y")],
    [const("s", [7], np.int64)],
)


# ---------------------------------------------------------------------------------- sessions


def test_ports_and_run_by_name() -> None:
    model = build(
        [node("Neg", "x", "a"), node("Abs", "x", "b")],
        [value("x", ["N", 4])],
        [value("a", ["N", 4]), value("b", ["N", 4])],
    )
    with Session(model) as session:
        assert session.inputs == (Port("x", "tensor(float)", ("N", 4)),)
        assert [port.name for port in session.outputs] == ["a", "b"]
        assert session.inputs[0].dtype == np.float32
        assert session.inputs[0].is_tensor
        both = session.run({"x": X})
        assert list(both) == ["a", "b"]
        np.testing.assert_array_equal(both["a"], -X)
        assert list(session.run({"x": X}, ["b"])) == ["b"]
        assert session.run({"x": X}, []) == {}  # onnxruntime itself would run all outputs


def test_model_from_a_path(tmp_path: Path) -> None:
    file = tmp_path / "relu.onnx"
    file.write_bytes(RELU)
    with Session(file) as session:
        np.testing.assert_array_equal(session.run({"x": -X})["y"], 0 * X)


def test_scalars_are_arrays_of_rank_0() -> None:
    model = build([node("Neg", "x", "y")], [value("x", [])], [value("y")])
    with Session(model) as session:
        assert session.run({"x": np.float32(3)})["y"] == -3
        assert session.run({"x": X[1, 0]})["y"] == -4


def test_inputs_with_a_default_are_overridable() -> None:
    model = build(
        [node("Add", "x w", "y")],
        [value("x", ["N", 4]), value("w", [4])],
        [value("y")],
        [const("w", np.ones(4))],
    )
    with Session(model) as session:
        assert [port.name for port in session.inputs] == ["x"]
        assert [port.name for port in session.overridable] == ["w"]
        np.testing.assert_array_equal(session.run({"x": X})["y"], X + 1)
        np.testing.assert_array_equal(
            session.run({"x": X, "w": np.full(4, 7, np.float32)})["y"], X + 7
        )


def test_sequences_are_lists() -> None:
    model = build(
        [node("ConcatFromSequence", "s", "y", axis=0), node("SequenceInsert", "s y", "t")],
        [helper.make_tensor_sequence_value_info("s", FLOAT, None)],
        [value("y"), helper.make_tensor_sequence_value_info("t", FLOAT, None)],
    )
    with Session(model) as session:
        assert session.inputs[0].type == "seq(tensor(float))"
        assert session.inputs[0].dtype is None
        assert not session.inputs[0].is_tensor
        result = session.run({"s": [X, X]})
        assert result["y"].shape == (4, 4)
        assert [array.shape for array in result["t"]] == [(2, 4), (2, 4), (4, 4)]


def test_optional_inputs_may_be_none() -> None:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(FLOAT, [4]))
    model = build(
        [node("OptionalHasElement", "x", "y")],
        [helper.make_value_info("x", kind)],
        [value("y", None, TensorProto.BOOL)],
    )
    with Session(model) as session:
        assert not session.run({"x": None})["y"]
        assert session.run({"x": X[0]})["y"]


@pytest.mark.parametrize("element", [TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_empty_optional_outputs_are_none(element: int) -> None:
    kind = helper.make_tensor_type_proto(FLOAT, [2])
    model = build(
        [node("Optional", "", "y", type=kind), node("Cast", "x", "z", to=element)],
        [value("x", ["N", 4])],
        [
            helper.make_value_info("y", helper.make_optional_type_proto(kind)),
            value("z", [], element),
        ],
    )
    with Session(model) as session:
        result = session.run({"x": X})
    assert result["y"] is None
    assert result["z"].shape == (2, 4)


def test_strings_and_zero_sizes() -> None:
    model = build(
        [node("Identity", "x", "y")],
        [value("x", ["N"], TensorProto.STRING)],
        [value("y", None, TensorProto.STRING)],
    )
    with Session(model) as session:
        assert session.inputs[0].dtype == object
        assert session.run({"x": np.array(["a", "ß"])})["y"].tolist() == ["a", "ß"]
    with Session(RELU) as session:
        assert session.run({"x": X[:0]})["y"].shape == (0, 4)


def test_a_closed_session_says_so() -> None:
    session = Session(RELU)
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        session.run({"x": X})


def test_external_data_of_bytes_may_be_any_range_of_any_file(tmp_path: Path) -> None:
    """The hollow models of storage.py: weights stay where they are inside the original file."""
    weights = np.arange(4096, dtype=np.float32)
    start = 4099  # neither a page nor a multiple of the element size
    (tmp_path / "some.file").write_bytes(b"\xff" * start + weights.tobytes() + b"\xff" * 64)
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4096])
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": "some.file", "offset": start, "length": weights.nbytes}.items():
        tensor.external_data.add(key=key, value=str(text))
    model = build([node("Add", "x w", "y")], [value("x", [1])], [value("y")], [tensor])
    with Session(model, folder=tmp_path) as session:
        result = session.run({"x": np.ones(1, np.float32)})["y"]
    np.testing.assert_array_equal(result, weights + 1)
    counted = census(model, folder=tmp_path)
    assert counted.counts == {"Add": 1}
    feed = {"x": np.ones(1, np.float32)}
    assert trace.profile(model, feed, folder=tmp_path)[0].op == "Add"
    assert trace.first_run_peak(model, feed, folder=tmp_path)


def test_idle_sessions_do_not_spin() -> None:
    def setting(session: Session) -> str:
        options = session._open().get_session_options()
        entry: str = options.get_session_config_entry("session.intra_op.allow_spinning")
        return entry

    assert setting(Session(RELU)) == "0"
    assert setting(Session(RELU, spinning=True)) == "1"


# -------------------------------------------------------------- types that numpy does not have

FOREIGN = {
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    TensorProto.INT4: ml_dtypes.int4,
    TensorProto.UINT4: ml_dtypes.uint4,
}
foreign = pytest.mark.parametrize(
    ("element", "dtype"), FOREIGN.items(), ids=[np.dtype(d).name for d in FOREIGN.values()]
)
ODD = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 5]], np.float32)  # 4-bit elements end mid-byte


@foreign
def test_foreign_outputs(element: int, dtype: Any) -> None:
    model = build(
        [node("Cast", "x", "y", to=element), node("Neg", "x", "z")],
        [value("x", ["N", 3])],
        [value("y", None, element), value("z")],
    )
    with Session(model) as session:
        result = session.run({"x": ODD})
        assert result["y"].dtype == dtype
        np.testing.assert_array_equal(result["y"].astype(np.float32), ODD)
        np.testing.assert_array_equal(result["z"], -ODD)
        assert session.run({"x": ODD[:0]})["y"].shape == (0, 3)
        assert list(session.run({"x": ODD}, ["z"])) == ["z"]


@foreign
def test_foreign_inputs(element: int, dtype: Any) -> None:
    model = build(
        [node("Cast", "x", "c", to=FLOAT), node("Add", "c b", "y")],
        [value("x", ["N", 3], element), value("b", [])],
        [value("y")],
    )
    feed = {"x": ODD.astype(dtype), "b": np.float32(1)}
    with Session(model) as session:
        assert session.inputs[0].dtype == dtype
        np.testing.assert_array_equal(session.run(feed)["y"], ODD + 1)
        transposed = {**feed, "x": feed["x"].T}  # not contiguous
        np.testing.assert_array_equal(session.run(transposed)["y"], ODD.T + 1)
        assert len(session.bind(feed)()) == 1
        with pytest.raises(RuntimeFailure, match="input 'x' is float32, the model wants"):
            session.run({**feed, "x": ODD})
        with pytest.raises(RuntimeFailure, match="Invalid input name: q"):
            session.run({**feed, "q": ODD})


def test_numpys_own_types_are_not_foreign() -> None:
    assert Port("x", "tensor(bfloat16)", ()).foreign
    for name in ("float", "float16", "double", "int8", "uint64", "bool", "string"):
        assert not Port("x", f"tensor({name})", ()).foreign


def test_foreign_types_beside_sequences_or_strings_are_refused_clearly() -> None:
    bfloat16 = TensorProto.BFLOAT16
    model = build(
        [node("Cast", "x", "y", to=bfloat16), node("Identity", "s", "t")],
        [value("x", [1]), value("s", [1], TensorProto.STRING)],
        [value("y", None, bfloat16), value("t", None, TensorProto.STRING)],
    )
    with Session(model) as session, pytest.raises(RuntimeFailure, match=r"mixes tensor\(string\)"):
        session.run({"x": X[0, :1], "s": np.array(["a"])})
    model = build(
        [node("Cast", "x", "y", to=bfloat16), node("SequenceConstruct", "x", "t")],
        [value("x", [1])],
        [value("y", None, bfloat16), helper.make_tensor_sequence_value_info("t", FLOAT, None)],
    )
    with Session(model) as session, pytest.raises(RuntimeFailure, match="cannot return seq"):
        session.run({"x": X[0, :1]})


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"not a model", "Failed to load model because protobuf parsing failed."),
        (build([], [], [], ir=99), "Unsupported model IR version: 99, max supported IR version"),
        (build([], [], [], opset=99), "Opset 99 is under development"),
        (
            build([node("Foo", "x", "y")], [value("x")], [value("y")]),
            "This is an invalid model. In Node",
        ),
    ],
)
def test_load_errors_are_one_clean_line(model: bytes, message: str) -> None:
    with pytest.raises(RuntimeFailure) as caught:
        Session(model)
    assert message in str(caught.value)
    assert_clean(str(caught.value))


@pytest.mark.parametrize(
    ("model", "feed", "message"),
    [
        (RELU, {"x": X[:, :3]}, "Got invalid dimensions for input: x"),
        (RELU, {"x": X[0]}, "Invalid rank for input: x Got: 1 Expected: 2"),
        (RELU, {"x": X.astype(np.float64)}, "Unexpected input data type."),
        (RELU, {"x": X, "z": X}, "Invalid input name: z"),
        (RELU, {}, "Required inputs (['x']) are missing"),
        (RELU, {"x": None}, "Relu node '' failed: Missing Input: x"),
        (
            BAD_RESHAPE,
            {"x": X},
            "Reshape node 'flat' failed: input_shape_size == requested_shape_size was false. "
            "The input tensor cannot be reshaped to the requested shape. "
            "Input shape:{2,4}, requested shape:{7}",
        ),
    ],
)
def test_run_errors_are_one_clean_line(model: bytes, feed: Any, message: str) -> None:
    with Session(model) as session, pytest.raises(RuntimeFailure) as caught:
        session.run(feed)
    assert str(caught.value).startswith(message)
    assert_clean(str(caught.value))


def assert_clean(text: str) -> None:
    assert "\n" not in text
    for noise in ("ONNXRuntimeError", "/onnxruntime", ".cc:", ".h:", "onnxruntime::", "  "):
        assert noise not in text


def test_missing_files_are_failures(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="File doesn't exist"):
        Session(tmp_path / "missing.onnx")
    with pytest.raises(RuntimeFailure, match="Failed to load library"):
        Session(RELU, custom_ops=[tmp_path / "missing.so"])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : plain text", "plain text"),
        ("/build/core/graph/model.cc:256 onnxruntime::Model::Model(int&&, f(g)) Bad IR", "Bad IR"),
        (r"D:\a\_work\1\s\core\graph\model.cc:256 onnxruntime::Model::Model Bad IR", "Bad IR"),
        (
            "/a/b.h:45 const T* onnxruntime::C::I(int) const [with T = ns::X] Missing: x",
            "Missing: x",
        ),
        (
            "Exception during initialization: /a/s.cc:9 ns::common::Status ns::Save("
            "const std::vector<int>&, ns::F&&) a.Max() > -1 was false. Text (x::y).",
            "Exception during initialization: a.Max() > -1 was false. Text (x::y).",
        ),
        ("/a/b.cc:1 ns::F::<lambda(int)>::operator()(int) const Text (x)", "Text (x)"),
        (
            "Outer /a/b.cc:1 void ns::f(int) inner /a/c.h:2 ns::g<A>(std::vector<int>) cause",
            "Outer inner cause",
        ),
        ("two\n lines\n", "two lines"),
        ("weights.h:12 is no C++ file (really)", "is no C++ file (really)"),
        ("", "ValueError"),
    ],
)
def test_failure_strips_cpp(raw: str, clean: str) -> None:
    assert str(failure(ValueError(raw))) == clean


def test_nothing_is_printed(tmp_path: Path) -> None:
    """Not even warnings: unused initializers, and (through the default logger) unknown domains."""
    noisy = build(
        [node("Reshape", "x s", "y")],
        [value("x", ["N", 4])],
        [value("y", [9, 9])],
        [const("s", [7], np.int64), const("unused", [1])],
    )
    (tmp_path / "noisy.onnx").write_bytes(noisy)
    lines = [
        "from pathlib import Path; import numpy as np",
        "from graphopt.runtime import Session, RuntimeFailure",
        f"session = Session(Path({str(tmp_path / 'noisy.onnx')!r}))",
        "try: session.run({'x': np.ones((2, 4), np.float32)})",
        "except RuntimeFailure: raise SystemExit(7)",
    ]
    ran = run_python(lines)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "", "")
    severity = "import onnxruntime; onnxruntime.set_default_logger_severity({})"
    raw = f"onnxruntime.InferenceSession({str(tmp_path / 'noisy.onnx')!r})"
    # There is something to silence; the default logger is silenced, and each session besides.
    assert "unused" in run_python([severity.format(2), raw]).stderr
    assert run_python(["import graphopt.runtime, onnxruntime", raw]).stderr == ""
    ran = run_python([lines[0], lines[1], severity.format(2), *lines[2:]])
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "", "")


def run_python(lines: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_limits_are_the_newest_that_load() -> None:
    def load(ir: int = 10, opset: int = 21) -> None:
        nodes = [node("Relu", "x", "y")]
        Session(build(nodes, [value("x", [1])], [value("y", [1])], ir=ir, opset=opset)).close()

    newest = limits()
    load(ir=newest.ir, opset=newest.opset)
    assert newest.ir >= 13
    assert newest.opset >= 26
    if newest.ir < onnx.IR_VERSION:
        with pytest.raises(RuntimeFailure, match="Unsupported model IR version"):
            load(ir=newest.ir + 1)
    if newest.opset < onnx.defs.onnx_opset_version():
        with pytest.raises(RuntimeFailure, match="under development"):
            load(opset=newest.opset + 1)


# --------------------------------------------------------------------------------- the profile


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; nothing may be left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def looping(then_op: str = "Exp") -> bytes:
    then = helper.make_graph([node(then_op, "x", "t", "then")], "then", [], [value("t")])
    other = helper.make_graph([node("Neg", "x", "e", "else")], "else", [], [value("e")])
    body = helper.make_graph(
        [node("Identity", "go", "more", "again"), node("MatMul", "v w", "v2", "step")],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("v")],
        [value("more", [], TensorProto.BOOL), value("v2")],
    )
    return build(
        [
            node("If", "c", "y", "choice", then_branch=then, else_branch=other),
            helper.make_node("Loop", ["n", "", "y"], ["z"], name="loop", body=body),
        ],
        [value("x", [64, 64]), value("c", [], TensorProto.BOOL)],
        [value("z")],
        [const("w", np.eye(64)), const("n", 3, np.int64)],
    )


LOOP_FEED = {"x": np.ones((64, 64), np.float32), "c": np.array(True)}


def test_profile_lists_the_nodes_that_ran(temporary: Path) -> None:
    times = {time.name: time for time in trace.profile(looping(), LOOP_FEED, runs=4)}
    assert {name: (t.op, t.calls) for name, t in times.items()} == {
        "then": ("Exp", 1),
        "choice": ("If", 1),
        "step": ("MatMul", 3),
        "again": ("Identity", 3),
        "loop": ("Loop", 1),
    }
    assert times["step"].output_bytes == 64 * 64 * 4
    assert all(time.ms >= 0 for time in times.values())
    listed = [time.ms for time in trace.profile(looping(), LOOP_FEED)]
    assert listed == sorted(listed, reverse=True)
    assert not list(temporary.iterdir())


def test_a_bodys_time_is_not_counted_twice() -> None:
    def event(name: str, ts: int, dur: int) -> dict[str, Any]:
        return {"name": name, "ts": ts, "dur": dur}

    events = [
        event("a", 0, 10),
        event("inner1", 22, 5),
        event("innermost", 31, 3),
        event("inner2", 30, 8),
        event("loop", 20, 20),
        event("b", 40, 7),
    ]
    own = {e["name"]: time for e, time in trace._own_times(events)}
    assert own == {"a": 10, "inner1": 5, "innermost": 3, "inner2": 5, "loop": 7, "b": 7}


def test_profile_averages_over_runs_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(number: int, microseconds: int) -> list[dict[str, Any]]:
        arguments = {"op_name": "Conv", "node_index": "0"}
        return [
            {
                "name": "c_kernel_time",
                "ts": 100_000 * number,
                "dur": microseconds,
                "args": arguments,
            }
        ]

    cold = [run(0, 50_000), run(1, 9_000)]
    monkeypatch.setattr(trace, "_trace", lambda *_, runs, **__: [*cold, run(2, 1000), run(3, 3000)])
    assert trace.profile(RELU, {}, runs=2) == [trace.OpTime("c", "Conv", 2.0, 1.0, None)]


def test_by_operator_sums() -> None:
    times = [
        trace.OpTime("a", "Conv", 1.0, 1, None),
        trace.OpTime("b", "Gemm", 2.5, 1, None),
        trace.OpTime("c", "Conv", 2.0, 1, None),
    ]
    assert list(trace.by_operator(times).items()) == [("Conv", 3.0), ("Gemm", 2.5)]


# ----------------------------------------------------------------------------------- memory

MEGABYTE = 1 << 20
FLOATS = MEGABYTE // 4  # in a megabyte


def chain(length: int) -> bytes:
    """Exp (never in place) `length` times on 4 MB, then MatMul with 16 MB of weights."""
    names = ["x", *(f"h{i}" for i in range(length))]
    nodes = [node("Exp", a, b) for a, b in itertools.pairwise(names)]
    nodes.append(node("MatMul", f"{names[-1]} w", "y"))
    weights = const("w", np.zeros((2048, 2048)))
    return build(nodes, [value("x", [512, 2048])], [value("y")], [weights])


def test_first_run_memory_is_the_live_set(temporary: Path) -> None:
    feed = {"x": np.zeros((512, 2048), np.float32)}
    short, long = (trace.first_run_memory(chain(n), feed, threads=1) for n in (1, 5))
    assert short is not None
    assert long is not None
    assert long.held >= 16 * MEGABYTE  # the weights
    # Two values of 4 MB are live at a time, however long the chain is.
    assert 8 * MEGABYTE <= long.activations <= 8.1 * MEGABYTE
    assert short.activations == long.activations
    assert trace.first_run_peak(chain(5), feed, threads=1) == long.activations
    assert not list(temporary.iterdir())


def test_only_the_first_run_shows_what_is_live() -> None:
    """From the second on, the planned block lies beside what the first run left."""
    feed = {"x": np.zeros((512, 2048), np.float32)}

    def peaks(**options: Any) -> list[int]:
        runs = trace._trace(chain(5), feed, runs=2, threads=1, **options)
        return [max(int(e["args"]["mem_in_use_peak"]) for e in run) for run in runs]

    first, second = peaks()
    assert second > first
    first, second = peaks(memory_pattern=False)
    assert second == first


def test_memory_reuse_holds_a_buffer_for_its_next_user() -> None:
    """A value of the same shape takes over the buffer, which stays allocated until then."""
    nodes = [
        node("Exp", "x", "early"),  # 1 MB, dead after the sum
        node("ReduceSum", "early", "sum", keepdims=1),
        node("Expand", "sum large", "wide"),
        node("Exp", "wide", "wider"),  # the peak: 2 x 4 MB
        node("ReduceSum", "wider", "total", keepdims=1),
        node("Expand", "total small", "late"),  # 1 MB, the shape of "early"
        node("ReduceSum", "late", "y"),
    ]
    sizes = [const("large", [4 * FLOATS], np.int64), const("small", [FLOATS], np.int64)]
    model = build(nodes, [value("x", [FLOATS])], [value("y")], sizes)
    feed = {"x": np.zeros(FLOATS, np.float32)}
    held = trace.first_run_peak(model, feed, optimizations="off")
    freed = trace.first_run_peak(model, feed, optimizations="off", memory_reuse=False)
    assert held is not None
    assert freed is not None
    assert 9 * MEGABYTE <= held < 9.1 * MEGABYTE
    assert 8 * MEGABYTE <= freed < 8.1 * MEGABYTE


def test_memory_is_none_where_it_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_trace", lambda *_, **__: [[{"args": {"op_name": "Relu"}}]])
    assert trace.first_run_memory(RELU, {"x": X}) is None
    assert trace.first_run_peak(RELU, {"x": X}) is None


def test_run_order_is_that_of_the_file_only_if_asked() -> None:
    """Default: whole branches, the last of the file first. Priority: exactly the file."""
    nodes = [
        node("Exp", "x", "a1", "a1"),
        node("Sin", "x", "b1", "b1"),
        node("Exp", "a1", "a2", "a2"),
        node("Sin", "b1", "b2", "b2"),
        node("Add", "a2 b2", "y", "sum"),
    ]
    model = build(nodes, [value("x", ["N", 4])], [value("y")])

    def order(**options: Any) -> list[str]:
        run = trace._trace(model, {"x": X}, runs=1, optimizations="off", **options)[0]
        return [event["name"].removesuffix("_kernel_time") for event in run]

    assert order() == ["b1", "b2", "a1", "a2", "sum"]
    assert order(order="priority") == ["a1", "b1", "a2", "b2", "sum"]


def test_memory_follows_the_order() -> None:
    """Two branches, each wide for a moment: in the file's order both are wide at once."""
    nodes = [
        node("Expand", "x size", "a"),
        node("Expand", "x size", "b"),
        node("ReduceSum", "a", "a1"),
        node("ReduceSum", "b", "b1"),
        node("Add", "a1 b1", "y"),
    ]
    size = const("size", [4 * FLOATS], np.int64)
    model = build(nodes, [value("x", [1])], [value("y")], [size])
    feed = {"x": np.zeros(1, np.float32)}

    def peak(**options: Any) -> float:
        found = trace.first_run_peak(
            model, feed, optimizations="off", memory_reuse=False, **options
        )
        return (found or 0) / MEGABYTE

    assert 4 <= peak() < 4.1
    assert 8 <= peak(order="priority") < 8.1


# ------------------------------------------------------------------------------------ probe


def test_probe_measures_a_fresh_process(tmp_path: Path) -> None:
    file = tmp_path / "chain.onnx"
    file.write_bytes(chain(2))
    feed = {"x": np.zeros((512, 2048), np.float32)}
    ballast = np.ones(400 * MEGABYTE, np.uint8)  # a parent's peak must not count
    result = probe(file, feed, threads=1)
    del ballast
    assert result.load_s > 0
    assert result.first_run_s > 0
    assert 20 * MEGABYTE < result.rss_peak_bytes < 300 * MEGABYTE
    assert result.mem_in_use_peak is not None
    assert 24 * MEGABYTE <= result.mem_in_use_peak <= 26 * MEGABYTE


def test_probe_counts_from_after_the_feed(tmp_path: Path) -> None:
    """Reading the feed takes twice its size for a moment: neither that nor the feed counts."""
    file = tmp_path / "sum.onnx"
    file.write_bytes(build([node("ReduceSum", "x", "y")], [value("x", ["N"])], [value("y")]))
    result = probe(file, {"x": np.ones(200 * FLOATS, np.float32)}, threads=1)
    assert result.rss_peak_bytes < 60 * MEGABYTE


def test_probe_takes_every_kind_of_value(tmp_path: Path) -> None:
    file = tmp_path / "cast.onnx"
    inputs = [value("x", [2], TensorProto.BFLOAT16)]
    file.write_bytes(build([node("Cast", "x", "y", to=FLOAT)], inputs, [value("y")]))
    assert probe(file, {"x": np.ones(2, ml_dtypes.bfloat16)}).first_run_s > 0


def test_probe_reports_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "relu.onnx"
    file.write_bytes(RELU)
    with pytest.raises(RuntimeFailure, match="Required inputs"):
        probe(file, {})
    with pytest.raises(RuntimeFailure, match="did not load and run in"):
        probe(file, {"x": X}, timeout=1e-3)
    crash = tmp_path / "graphopt"
    crash.mkdir()
    (crash / "__init__.py").touch()
    (crash / "probe.py").write_text("import os; os._exit(9)")
    monkeypatch.setattr(probe_module, "_env", lambda: {"PYTHONPATH": str(tmp_path)})
    with pytest.raises(RuntimeFailure, match="ended with code 9"):
        probe(file, {"x": X})
