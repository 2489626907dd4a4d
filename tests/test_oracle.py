"""What running the original can tell: randomness, foreign operators, types, dead inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import oracle
from graphopt.ir import Model
from tests.graphs import CONDITION, graph, if_node, model, node, parsed, value

F16, BF16, FLOAT, DOUBLE = (
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
)


def constant(name: str, values: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def obstacle(proto: onnx.ModelProto, has_custom_ops: bool = False) -> str:
    return oracle.obstacle(Model.load(proto), has_custom_ops)


# -------------------------------------------------------------------------------------- randomness


def dropout(mode: str, opset: int = 13) -> onnx.ModelProto:
    inputs = ["x", "r"] if mode == "left out" else ["x", "r", "t"]
    nodes = [node("Dropout", inputs, ["y"], name="drop")]
    constants, ports = [constant("r", 0.5)], [value("x")]
    truth = mode in ("true", "Constant true")
    if mode in ("true", "false"):
        constants.append(constant("t", truth, bool))
    elif mode.startswith("Constant"):
        nodes.insert(0, node("Constant", [], ["t"], value=constant("", truth, bool)))
    elif mode == "input":
        ports.append(value("t", (), TensorProto.BOOL))
    elif mode == "default":
        ports.append(value("t", (), TensorProto.BOOL))
        constants.append(constant("t", False, bool))
    return model(nodes, ports, ["y"], constants, opset=opset)


@pytest.mark.parametrize("opset", [12, 13, 22])
@pytest.mark.parametrize(
    ("mode", "live"),
    [
        ("left out", False),
        ("false", False),
        ("true", True),
        ("Constant false", False),
        ("Constant true", True),
        ("input", True),
        ("default", True),
    ],
)
def test_dropout_is_random_unless_provably_off(mode: str, live: bool, opset: int) -> None:
    found = obstacle(dropout(mode, opset))
    expected = "Dropout drop draws random numbers: two runs of the original differ"
    assert found == (expected if live else "")


@pytest.mark.parametrize(("attributes", "live"), [({"is_test": 0}, True), ({"is_test": 1}, False)])
def test_old_dropout_says_it_in_an_attribute(attributes: dict[str, int], live: bool) -> None:
    old = model([node("Dropout", ["x"], ["y"], **attributes)], opset=6, ir=3)
    assert bool(obstacle(old)) is live
    assert obstacle(model([node("Dropout", ["x"], ["y"])], opset=10)) == ""


@pytest.mark.parametrize(
    "op", ["RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"]
)
def test_random_operators(op: str) -> None:
    assert obstacle(model([node(op, ["x"], ["y"])])).startswith(f"{op} 'y' draws random numbers")


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniform"])
def test_random_operators_without_inputs(op: str) -> None:
    nodes = [node(op, [], ["r"], shape=[4]), node("Add", ["x", "r"], ["y"])]
    assert obstacle(model(nodes)).startswith(f"{op} 'r' draws random numbers")


def test_random_but_dead_is_fine() -> None:
    nodes = [node("RandomNormalLike", ["x"], ["dead"]), node("Relu", ["x"], ["y"])]
    assert obstacle(model(nodes)) == ""
    alive = model(nodes, outputs=["y", "dead"])
    assert obstacle(alive)


def test_random_in_a_body_and_behind_one() -> None:
    taken = graph([node("RandomNormalLike", ["x"], ["t"])], [], ["t"], name="t")
    other = graph([node("Identity", ["x"], ["e"])], [], ["e"], name="e")
    assert obstacle(model([if_node(taken, other)], [CONDITION, "x"]))
    captured = graph([node("Identity", ["r"], ["t"])], [], ["t"], name="t")
    nodes = [node("RandomNormalLike", ["x"], ["r"]), if_node(captured, other)]
    assert obstacle(model(nodes, [CONDITION, "x"]))


def test_bodies_may_leave_inputs_out() -> None:
    taken = graph([node("Clip", ["x", "", "m"], ["t"])], [], ["t"], name="t")
    other = graph([node("Identity", ["x"], ["e"])], [], ["e"], name="e")
    clipped = model([if_node(taken, other)], [CONDITION, "x"], ["y"], [constant("m", 1.0)])
    assert obstacle(clipped) == ""
    assert depends(clipped)


def test_same_names_in_other_domains_are_not_random() -> None:
    foreign = model([node("RandomNormalLike", ["x"], ["y"], domain="own")], domains=["own"])
    assert "random" not in obstacle(foreign)


# --------------------------------------------------------------------------------- foreign domains


def test_foreign_domains_need_their_library() -> None:
    nodes = [
        node("A", ["x"], ["a"], domain="own.b"),
        node("B", ["a"], ["y"], domain="own.a"),
    ]
    foreign = model(nodes, domains=["own.a", "own.b"])
    assert obstacle(foreign) == (
        "operators of domain own.a, own.b need their library: --custom-ops lib.so"
    )
    assert obstacle(foreign, has_custom_ops=True) == ""


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "ai.onnx", ""])
def test_domains_of_every_runtime_need_none(domain: str) -> None:
    op = {"com.microsoft": "Gelu", "ai.onnx.ml": "Binarizer"}.get(domain, "Relu")
    known = model([node(op, ["x"], ["y"], domain=domain)], domains=[domain] if domain else [])
    assert obstacle(known) == ""


def test_foreign_domains_in_bodies_count() -> None:
    taken = graph([node("A", ["x"], ["t"], domain="own")], [], ["t"], name="t")
    other = graph([node("Identity", ["x"], ["e"])], [], ["e"], name="e")
    assert "domain own" in obstacle(
        model([if_node(taken, other)], [CONDITION, "x"], domains=["own"])
    )


def with_function(inner: str = "Relu", inner_domain: str = "") -> onnx.ModelProto:
    made = model([node("Mine", ["x"], ["y"], domain="own")], domains=["own", "other"])
    body = [node(inner, ["a"], ["b"], domain=inner_domain)]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("other", 1)]
    made.functions.append(helper.make_function("own", "Mine", ["a"], ["b"], body, imports))
    return made


def test_functions_of_the_model_are_known() -> None:
    assert obstacle(with_function()) == ""
    assert obstacle(with_function("Relu", "ai.onnx")) == ""


def test_functions_may_need_a_library_themselves() -> None:
    assert "domain other" in obstacle(with_function("Theirs", "other"))


# ------------------------------------------------------------------------- dependence on the inputs


def depends(proto: onnx.ModelProto, output: str = "y") -> bool:
    return oracle.depends_on_values(Model.load(proto), output)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Relu (x)", True),
        ("y = Shape (x)", False),
        ("y = Size (x)", False),
        ("s = Shape (x) y = ConstantOfShape (s)", False),
        ("s = Shape (x) r = ConstantOfShape (s) y = Add (r, x)", True),
        ("y = Neg (w)", False),
        ("c = Constant <value_float = 1.0> () y = Neg (c)", False),
    ],
)
def test_outputs_depend_on_what_inputs_hold(text: str, expected: bool) -> None:
    proto = parsed(f"agraph (float[N] x) => (float[M] y) {{ {text} }}")
    proto.graph.initializer.append(constant("w", [1.0]))
    assert depends(proto) is expected


def test_an_input_with_a_default_is_an_input() -> None:
    assert depends(model([node("Neg", ["x"], ["y"])], initializers=[constant("x", [1.0] * 4)]))
    old = model([node("Neg", ["x"], ["y"])], initializers=[constant("x", [1.0] * 4)], ir=3, opset=8)
    assert not depends(old)


def test_an_output_that_is_an_input() -> None:
    assert depends(model([], ["x"], ["x"]), "x")
    assert depends(model([node("Neg", ["x"], ["y"])]), "no such output")


def loop(start: str) -> onnx.ModelProto:
    body = graph(
        [node("Identity", ["go"], ["again"]), node("Add", ["a", "one"], ["b"])],
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("a", ())],
        [value("again", (), TensorProto.BOOL), value("b", ())],
        name="body",
    )
    constants = [constant("n", 3, np.int64), constant("c", True, bool), constant("z", 0.0)]
    nodes = [node("Loop", ["n", "c", start], ["y"], body=body)]
    return model(nodes, [value("x", ())], [value("y", ())], [*constants, constant("one", 1.0)])


def test_inputs_of_a_body_are_not_inputs_of_the_model() -> None:
    assert not depends(loop("z"))
    assert depends(loop("x"))


def test_what_a_body_captures_counts() -> None:
    taken = graph([node("Neg", ["x"], ["t"])], [], ["t"], name="t")
    other = graph([node("Identity", ["w"], ["e"])], [], ["e"], name="e")
    weights = [constant("w", [1.0] * 4), constant("c", True, bool)]
    assert depends(model([if_node(taken, other)], ["x"], ["y"], weights))
    assert not depends(model([if_node(other, other)], ["x"], ["y"], weights))
    assert depends(model([if_node(other, other)], ["x", CONDITION], ["y"], weights[:1]))


# ------------------------------------------------------------------------------------------- types


def narrowest(proto: onnx.ModelProto) -> str:
    return oracle.narrowest_float(Model.load(proto))


@pytest.mark.parametrize(
    ("element", "name"),
    [
        (DOUBLE, "float64"),
        (FLOAT, "float32"),
        (F16, "float16"),
        (BF16, "bfloat16"),
        (TensorProto.FLOAT8E4M3FN, "float8"),
        (TensorProto.FLOAT8E5M2, "float8"),
        (TensorProto.INT8, "float64"),
    ],
)
def test_declared_types_count(element: int, name: str) -> None:
    shaped = [value("x", (4,), element)], [value("y", (4,), element)]
    assert narrowest(model([node("Identity", ["x"], ["y"])], *shaped)) == name


def test_the_narrowest_wins_wherever_it_is() -> None:
    nodes = [node("Cast", ["x"], ["h"], to=F16), node("Cast", ["h"], ["y"], to=FLOAT)]
    assert narrowest(model(nodes)) == "float16"
    inner = graph(nodes, [], ["y"], name="t")
    other = graph([node("Identity", ["x"], ["e"])], [], ["e"], name="e")
    assert narrowest(model([if_node(inner, other, ["z"])], ["x", CONDITION], ["z"])) == "float16"
    bf16 = model([node("Relu", ["h"], ["y"])], [value("h", (4,), F16), value("b", (4,), BF16)])
    assert narrowest(bf16) == "bfloat16"


def stored(readers: list[onnx.NodeProto], form: str, declared: bool) -> onnx.ModelProto:
    """Half precision weights "w" as an initializer or in a Constant node, read by these nodes."""
    weights = constant("w", [1, 2, 3, 4], np.float16)
    held = [] if form == "initializer" else [node("Constant", [], ["w"], value=weights)]
    made = model(
        [*held, *readers],
        ["x"],
        ["y"],
        [weights] if form == "initializer" else [],
        opset=21,
    )
    if declared:
        made.graph.value_info.append(value("w", (4,), F16))
    return made


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("form", ["initializer", "Constant"])
def test_storage_that_is_widened_when_read_does_not_count(form: str, declared: bool) -> None:
    widen = [node("Cast", ["w"], ["f"], to=FLOAT), node("Add", ["x", "f"], ["y"])]
    assert narrowest(stored(widen, form, declared)) == "float32"
    like = [node("CastLike", ["w", "x"], ["f"]), node("Add", ["x", "f"], ["y"])]
    assert narrowest(stored(like, form, declared)) == "float32"


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("form", ["initializer", "Constant"])
def test_storage_that_is_computed_with_counts(form: str, declared: bool) -> None:
    computed = [node("Neg", ["w"], ["n"]), node("CastLike", ["n", "x"], ["y"])]
    assert narrowest(stored(computed, form, declared)) == "float16"
    both = [node("Cast", ["w"], ["f"], to=FLOAT), *computed]
    assert narrowest(stored(both, form, declared)) == "float16"
    target = [node("CastLike", ["x", "w"], ["y"])]
    assert narrowest(stored(target, form, declared)) == "float16"


def test_the_scale_of_a_dequantize_linear_is_what_it_computes_in() -> None:
    """Its result has the scale's type; what it dequantizes is storage."""
    made = model(
        [node("DequantizeLinear", ["q", "w"], ["h"]), node("CastLike", ["h", "x"], ["y"])],
        initializers=[constant("q", [1, 2], np.int8), constant("w", 0.5, np.float16)],
        opset=21,
    )
    assert narrowest(made) == "float16"
    float8 = helper.make_tensor("q", TensorProto.FLOAT8E4M3FN, [2], b"\x38\x38", raw=True)
    made = model(
        [node("DequantizeLinear", ["q", "w"], ["h"]), node("Add", ["h", "x"], ["y"])],
        initializers=[float8, constant("w", 0.5)],
        opset=21,
    )
    assert narrowest(made) == "float32"


def test_types_newer_than_onnx_are_no_floats() -> None:
    made = model([node("Relu", ["x"], ["y"])])
    made.graph.value_info.append(value("y2", (4,)))
    made.graph.value_info[0].type.tensor_type.elem_type = 9999
    made.graph.value_info[0].name = "x"
    assert narrowest(made) == "float32"


def test_constants_of_plain_numbers_have_no_narrow_type() -> None:
    nodes = [node("Constant", [], ["c"], value_float=1.0), node("Add", ["x", "c"], ["y"])]
    assert narrowest(model(nodes)) == "float32"


def test_half_precision_weights_that_are_an_output_count() -> None:
    weights = constant("w", [1, 2, 3, 4], np.float16)
    made = model([node("Relu", ["x"], ["y"])], ["x"], ["y", value("w", (4,), F16)], [weights])
    assert narrowest(made) == "float16"


def test_weights_read_in_bodies_count() -> None:
    taken = graph([node("Neg", ["w"], ["t"])], [], [value("t", (4,), FLOAT)], name="t")
    other = graph([node("Neg", ["w"], ["e"])], [], [value("e", (4,), FLOAT)], name="e")
    weights = [constant("w", [1, 2, 3, 4], np.float16)]
    assert narrowest(model([if_node(taken, other)], [CONDITION], ["y"], weights)) == "float16"


def test_decibels() -> None:
    assert oracle.decibels(0.0) is None
    assert oracle.decibels(0.1) == pytest.approx(20)
    assert oracle.decibels(1e-5) == pytest.approx(100)
    assert oracle.decibels(math.inf) == -math.inf
