"""`convert-opset`: the same results at another opset, or one line that names the operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import exporter, optimize, verify
from graphopt.errors import GraphoptError, RefusedError, RuntimeFailure, UsageError
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.canonicalize import opset_adapters
from graphopt.passes.canonicalize.convert_opset import ConvertOpset
from graphopt.runtime import Session
from graphopt.verify import Interface
from tests import graphs


def converted(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model at the opset: sound, with the same interface, and undone without a trace."""
    loaded = Model.load(proto)
    interface = Interface.of(loaded)
    (run,) = run_pipeline(loaded, [ConvertOpset(opset)], verify_each=True)
    assert run.error == ""
    assert verify.problems(loaded, interface) == []
    assert loaded.opsets[""] == opset
    return exporter.to_proto(loaded)


def feeds(proto: onnx.ModelProto, seed: int = 0) -> dict[str, Any] | None:
    rng = np.random.default_rng(seed)
    made = {}
    defaults = {tensor.name for tensor in proto.graph.initializer}
    for info in (i for i in proto.graph.input if i.name not in defaults):
        tensor = info.type.tensor_type
        if not tensor.elem_type:
            return None
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [dim.dim_value or 2 for dim in tensor.shape.dim]
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(1, 3, shape)
        made[info.name] = np.asarray(values).astype(dtype)
    return made


def run(proto: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, Any]:
    with Session(proto.SerializeToString(), optimizations="off", threads=1) as session:
        return session.run(feed)


def assert_same(proto: onnx.ModelProto, made: onnx.ModelProto) -> None:
    feed = feeds(proto)
    assert feed is not None
    wanted, found = run(proto, feed), run(made, feed)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def at(opset: int, text: str, ir: int = 8) -> onnx.ModelProto:
    return graphs.parsed(f'<ir_version: {ir}, opset_import: ["": {opset}]>\n{text}')


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.op_type != "Constant"]


# -- one operator at a time ------------------------------------------------------------------------

# Opset, opset to go to, the model, its operators afterwards.
CASES = {
    "reduce up": (
        *(13, 18, "g (float[2,3,4] x) => (float[2,1,4] y) { y = ReduceMean <axes = [1]> (x) }"),
        ["ReduceMean"],
    ),
    "reduce down": (
        *(18, 13, "g (float[2,3,4] x) => (float[2,1,4] y) <int64[1] a = {1}> {"),
        *(" y = ReduceMean (x, a) }", ["ReduceMean"]),
    ),
    "reduce down, folded": (
        *(18, 13, "g (float[2,3,4] x) => (float[2,1,4] y) <int64[1] a = {-1}> {"),
        *(" b = Neg (a) y = ReduceMean (x, b) }", ["ReduceMean"]),
    ),
    "reduce nothing": (
        *(18, 17, "g (float[2,3] x) => (float[2,3] y) {"),
        *(" y = ReduceMax <noop_with_empty_axes = 1> (x) }", ["Identity"]),
    ),
    "softmax up": (
        *(11, 13, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax <axis = 1> (x) }"),
        ["Shape", "Flatten", "Softmax", "Reshape"],
    ),
    "last softmax up": (
        *(11, 13, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax <axis = 2> (x) }"),
        ["Softmax"],
    ),
    "softmax down": (
        *(13, 11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = LogSoftmax <axis = 1> (x) }"),
        ["Transpose", "LogSoftmax", "Transpose"],
    ),
    "last softmax down": (
        *(13, 11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax (x) }"),
        ["Softmax"],
    ),
    "resize of old": (
        *(10, 19, "g (float[1,1,3,3] x) => (float[1,1,7,7] y) <float[4] s = {1, 1, 2.5, 2.5}> {"),
        *(' y = Resize <mode = "nearest"> (x, s) }', ["Resize"]),
    ),
    "linear resize of old": (
        *(10, 19, "g (float[1,1,4,4] x) => (float[1,1,2,8] y) <float[4] s = {1, 1, 0.5, 2}> {"),
        *(' y = Resize <mode = "linear"> (x, s) }', ["Resize"]),
    ),
    "upsample": (
        *(9, 13, "g (float[1,1,3,3] x) => (float[1,1,6,6] y) <float[4] s = {1, 1, 2, 2}> {"),
        *(" y = Upsample (x, s) }", ["Resize"]),
    ),
    "upsample by attribute": (
        *(7, 13, "g (float[1,1,3,3] x) => (float[1,1,6,6] y) {"),
        *(" y = Upsample <scales = [1.0, 1.0, 2.0, 2.0]> (x) }", ["Resize"]),
    ),
    "resize by sizes down": (
        *(13, 11, "g (float[1,1,3,3] x) => (float[1,1,6,6] y) <int64[4] s = {1, 1, 6, 6}> {"),
        *(" y = Resize (x, , , s) }", ["Resize"]),
    ),
    "uneven split down": (
        *(18, 13, "g (float[5] x) => (float[3] y, float[2] z) {"),
        *(" y, z = Split <num_outputs = 2> (x) }", ["Split"]),
    ),
    "split up": (
        *(11, 18, "g (float[4] x) => (float[2] y, float[2] z) { y, z = Split (x) }"),
        ["Split"],
    ),
    "gelu down": (
        *(20, 17, "g (float[2,3] x) => (float[2,3] y) { y = Gelu (x) }"),
        ["Div", "Erf", "Add", "Mul", "Mul"],
    ),
    "grid sample up": (
        *(16, 20, "g (float[1,1,4,4] x, float[1,2,2,2] p) => (float[1,1,2,2] y) {"),
        *(' y = GridSample <mode = "bicubic"> (x, p) }', ["GridSample"]),
    ),
    "grid sample down": (
        *(20, 16, "g (float[1,1,4,4] x, float[1,2,2,2] p) => (float[1,1,2,2] y) {"),
        *(' y = GridSample <mode = "cubic"> (x, p) }', ["GridSample"]),
    ),
    "groups": (
        *(18, 21, "g (float[2,4,3] x) => (float[2,4,3] y) <float[2] s = {1, 2}, float[2] b = "),
        *("{3, 4}> { y = GroupNormalization <num_groups = 2> (x, s, b) }",),
        [*["Reshape", "Expand", "Reshape"] * 2, "GroupNormalization"],
    ),
    "regions": (
        *(10, 16, "g (float[1,1,6,6] x, float[1,4] r) => (float[1,1,1,1] y)"),
        *(" <int64[1] b = {0}> { y = RoiAlign (x, r, b) }", ["RoiAlign"]),
    ),
    "clip up": (
        *(6, 13, "g (float[4] x) => (float[4] y) { y = Clip <max = 0.5, min = 0.0> (x) }"),
        ["Clip"],
    ),
    "a body": (
        *(11, 18, "g (float[2,3] x, bool c) => (float[2,1] y) { y = If (c) <"),
        *("then_branch = t () => (float[2,1] u) { u = ReduceSum <axes = [1]> (x) },",),
        *("else_branch = e () => (float[2,1] v) { v = ReduceMax <axes = [1]> (x) }> }", ["If"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_means_the_same_at_the_other_opset(name: str) -> None:
    source, target, *text, expected = CASES[name]
    proto = at(source, "".join(text))
    made = converted(proto, target)
    assert operators(made) == expected
    onnx.checker.check_model(made)
    assert_same(proto, made)


REFUSED = {
    "LayerNormalization 'y' cannot be converted from opset 17: there is no such operator in": (
        *(
            17,
            16,
            "g (float[2,3] x, float[3] s) => (float[2,3] y) { y = LayerNormalization (x, s) }",
        ),
    ),
    "ReduceSum 'y' cannot be converted from opset 13: its axes 'a' are not constant": (
        *(13, 12, "g (float[2,3] x, int64[1] a) => (float[2,1] y) { y = ReduceSum (x, a) }"),
    ),
    "Resize 'y' cannot be converted from opset 10: 'nearest' was never defined for scales below": (
        *(10, 11, "g (float[1,1,3,3] x, float[4] s) => (float[1,1,A,B] y) { y = Resize (x, s) }"),
    ),
    "Split 'y' cannot be converted from opset 18: the size of axis 0 of 'x' is not known": (
        *(18, 13, "g (float[N] x) => (float[A] y, float[B] z) {"),
        " y, z = Split <num_outputs = 2> (x) }",
    ),
    "Gelu 'y' cannot be converted from opset 20: the approximation by tanh": (
        *(20, 19, 'g (float[2] x) => (float[2] y) { y = Gelu <approximate = "tanh"> (x) }'),
    ),
    "AveragePool 'y' cannot be converted from opset 19: there is no attribute 'dilations' in 18": (
        *(19, 18, "g (float[1,1,5,5] x) => (float[1,1,A,B] y) {"),
        " y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x) }",
    ),
    "Dropout 'y' cannot be converted from opset 7: its mask became boolean": (
        *(7, 13, "g (float[2] x) => (float[2] y, float[2] m) { y, m = Dropout (x) }"),
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_converted_is_named(said: str) -> None:
    source, target, *text = REFUSED[said]
    with pytest.raises(UsageError) as error:
        optimize(at(source, "".join(text)), opset=target)
    assert f"opset {target}: {said}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("opset", [-1, 1000])
def test_an_opset_that_nobody_knows(opset: int) -> None:
    with pytest.raises(UsageError, match=rf"opset {opset}: onnx \S+ knows 1 to \d+"):
        optimize(graphs.matmul(), opset=opset)


def test_every_adapter_has_a_case() -> None:
    """An adapter is entered only where the operator's version changes, up or down."""
    for op, before, after in opset_adapters.ADAPTERS:
        versions = {
            s.since_version
            for s in onnx.defs.get_all_schemas_with_history()
            if s.name == op and s.domain == ""
        }
        assert max(before, after) in versions, op


# -- whole models ----------------------------------------------------------------------------------


def test_what_does_not_change_stays_to_the_byte() -> None:
    proto = graphs.matmul()
    proto.graph.node[0].doc_string = "kept"
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    proto.metadata_props.add(key="k", value="v")
    made = converted(proto, 20)
    made.opset_import[0].version = 17
    assert made == proto


def test_weights_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Conv of 36 KB, and a ReduceMean that onnx's converter rewrites."""
    nodes = [
        graphs.node("Conv", ["x", "w"], ["a"]),
        graphs.node("ReduceMean", ["a"], ["y"], axes=[2, 3]),
    ]
    inputs, outputs = [graphs.value("x", (1, 32, 8, 8))], [graphs.value("y", (1, 32, 1, 1))]
    proto = graphs.model(nodes, inputs, outputs, [graphs.weight("w", (32, 32, 3, 3))])
    seen = []
    convert = onnx.version_converter.convert_version

    def small(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        seen.append(model.ByteSize())
        return convert(model, version)

    monkeypatch.setattr("onnx.version_converter.convert_version", small)
    loaded = Model.load(proto)
    monkeypatch.setattr(type(loaded.store), "array", None)
    run_pipeline(loaded, [ConvertOpset(22)])
    monkeypatch.undo()
    assert max(seen) < 1000
    assert_same(proto, exporter.to_proto(loaded))


def test_names_stay_and_new_ones_are_derived() -> None:
    proto = at(13, "g (float[2,3] x) => (float[2,1] y) { y = ReduceMean <axes = [1]> (x) }")
    proto.graph.node[0].name, proto.graph.node[0].doc_string = "mean", "kept"
    constant, mean = converted(proto, 18).graph.node
    assert (mean.name, mean.doc_string) == ("mean", "kept")
    assert (constant.output[0], constant.name) == ("y/value", "y/Constant")


def test_old_models_keep_their_initializers_as_inputs() -> None:
    proto = at(
        *(
            9,
            "g (float[2,3] x, float[3] w) => (float[2,1] y) <float[3] w = {1, 2, 3}> {"
            " a = Add (x, w) y = ReduceSum <axes = [1]> (a) }",
        ),
        ir=3,
    )
    made = converted(proto, 13)
    assert made.ir_version == 3
    assert_same(proto, made)


def test_functions_are_inlined_before() -> None:
    proto = graphs.parsed(
        """<ir_version: 8, opset_import: ["": 13, "f": 1]>
        g (float[2,3] x) => (float[2,1] y) { y = f.mean (x) }
        <domain: "f", opset_import: ["": 13]>
        mean (a) => (b) { b = ReduceMean <axes = [1]> (a) }"""
    )
    made = converted(proto, 18)
    assert not made.functions
    assert operators(made) == ["ReduceMean"]
    assert_same(proto, made)


def with_function(body: str) -> onnx.ModelProto:
    """A function that stays, since it was written for another opset than the model imports."""
    return graphs.parsed(
        f"""<ir_version: 8, opset_import: ["": 13, "f": 1]>
        g (float[2,3] x) => (float[A,B] y) {{ y = f.call (x) }}
        <domain: "f", opset_import: ["": 12]> call (a) => (b) {{ {body} }}"""
    )


def test_functions_that_stay_must_not_change() -> None:
    made = converted(with_function("b = Floor (a)"), 20)
    assert made.functions[0].opset_import[0].version == 12
    changing = with_function("b = ReduceMean <axes = [1]> (a)")
    with pytest.raises(UsageError, match="ReduceMean in the function 'call' would have to change"):
        converted(changing, 20)
    taking = with_function("b = ReduceMean <axes : ints = @axes> (a)")
    with pytest.raises(UsageError, match="takes its settings from the call"):
        converted(taking, 20)


def test_foreign_operators_stay() -> None:
    proto = graphs.parsed(
        """<ir_version: 8, opset_import: ["": 13, "com.microsoft": 1]>
        g (float[2,3] x) => (float[2,1] y) {
            a = com.microsoft.Gelu (x)  y = ReduceMean <axes = [1]> (a) }"""
    )
    made = converted(proto, 18)
    assert operators(made) == ["Gelu", "ReduceMean"]
    assert_same(proto, made)


def test_a_wrong_conversion_is_found_and_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(site: opset_adapters.Site) -> list[onnx.NodeProto]:
        node = site.copy()
        node.op_type = "Abs"
        return [node]

    monkeypatch.setitem(opset_adapters.ADAPTERS, ("Relu", 13, 14), wrong)
    proto = at(13, "g (float[4] x) => (float[4] y) { a = Relu (x) b = Identity (a) y = Neg (b) }")
    with pytest.raises(RefusedError) as error:
        optimize(proto, opset=14)
    assert "that is what convert-opset{opset=14} does, without any further pass" in str(error.value)


def fails(proto: onnx.ModelProto, opset: int) -> str:
    try:
        made = converted(proto, opset)
    except UsageError:
        return "refused"
    feed = feeds(proto)
    try:
        wanted = run(proto, feed or {})
    except GraphoptError:
        return "not run"
    try:
        found = run(made, feed or {})
    except RuntimeFailure as failure:
        # kernels that onnxruntime has for newer versions only, and types it lacks in older ones
        lacks = any(text in str(failure) for text in ("implementation", "Failed to find kernel"))
        return "not run" if lacks else f"broken: {failure}"
    for name, value in wanted.items():
        if not isinstance(value, np.ndarray):
            continue
        other = found[name]
        alike = value.dtype == other.dtype and value.shape == other.shape
        if value.dtype.kind in "fiub":
            atol = 1e-2 if value.dtype.itemsize == 2 else 1e-6
            close: Callable[..., Any] = np.allclose
            alike = alike and close(value, other, rtol=1e-5, atol=atol, equal_nan=True)
        if not alike:
            return f"{name} differs"
    return "same"


@pytest.mark.slow
@pytest.mark.parametrize("kind", graphs.KINDS)
def test_onnxs_own_cases_mean_the_same_at_other_opsets(kind: str) -> None:
    counts: Counter[str] = Counter()
    broken = []
    for case in (case for case in graphs.onnx_cases() if case.kind == kind):
        proto = case.proto()
        if feeds(proto) is None or "" not in {entry.domain for entry in proto.opset_import}:
            continue
        for opset in (13, 17, 20, 23):
            verdict = fails(proto, opset)
            counts[verdict.partition(":")[0]] += 1
            if verdict not in ("same", "refused", "not run"):
                broken.append(f"{case.name} at {opset}: {verdict}")
    assert broken == []
    assert counts["same"] > {"node": 3000, "simple": 40}.get(kind, 90), counts
