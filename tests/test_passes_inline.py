"""inline-if and inline-functions: nodes that move keep their meaning, and names stay apart."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.canonicalize.inline_functions import InlineFunctions
from graphopt.passes.canonicalize.inline_if import InlineIf
from graphopt.runtime import Session
from tests import goldens, graphs
from tests.graphs import node, value


def chosen(before: str, expected: str, names: list[str], *, ir: int | None = None) -> None:
    told = [f"inline-if {name}" for name in names]
    goldens.golden("inline-if", before, expected, told, ir=ir)


def inlined(before: str, expected: str, told: list[str], *, runs: bool = True) -> None:
    goldens.golden("inline-functions", before, expected, told, runs=runs)


# -- inline-if -------------------------------------------------------------------------------------

BRANCHES = """<
        then_branch = t () => (float[2] u) <float[2] k = {1.0, 2.0}>
          { a = Neg (x)  u = Add (a, k) },
        else_branch = e () => (float[2] v) <float[2] k = {3.0, 4.0}>
          { a = Exp (x)  v = Mul (a, k) }>"""


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("1", "<bool c = {1}, float[2] k = {1.0, 2.0}> { a = Neg (x)  y = Add (a, k) }"),
        ("0", "<bool c = {0}, float[2] k = {3.0, 4.0}> { a = Exp (x)  y = Mul (a, k) }"),
    ],
)
def test_the_branch_that_is_taken_takes_the_place_of_the_if(condition: str, expected: str) -> None:
    chosen(
        f"g (float[2] x) => (float[2] y) <bool c = {{{condition}}}> {{ y = If (c) {BRANCHES} }}",
        f"g (float[2] x) => (float[2] y) {expected}",
        ["y"],
    )


def test_conditions_that_are_not_constant_stay() -> None:
    chosen(f"g (bool c, float[2] x) => (float[2] y) {{ y = If (c) {BRANCHES} }}", "", [])
    chosen(
        f"g (float[2] x, bool c) => (float[2] y) <bool c = {{1}}> {{ y = If (c) {BRANCHES} }}",
        "",
        [],
    )


def test_names_that_others_have_are_not_taken() -> None:
    """Both conditionals compute an `a` from a `k`; so may the graph around them."""
    chosen(
        f"""g (float[2] x) => (float[2] z) <bool c = {{1}}>
        {{ y = If (c) {BRANCHES}  w = If (c) {BRANCHES}  z = Add (y, w) }}""",
        """g (float[2] x) => (float[2] z)
        <bool c = {1}, float[2] k_2 = {1.0, 2.0}, float[2] k = {1.0, 2.0}>
        { a_2 = Neg (x)  y = Add (a_2, k_2)  a = Neg (x)  w = Add (a, k)  z = Add (y, w) }""",
        ["y", "w"],
    )


def test_conditionals_within_the_branch_are_looked_at_too() -> None:
    chosen(
        """g (float[2] x, bool d) => (float[2] y) <bool c = {1}> { y = If (c) <
        then_branch = t () => (float[2] u) { a = Neg (x)  u = If (c) <
          then_branch = tt () => (float[2] p) { p = Exp (a) },
          else_branch = te () => (float[2] q) { q = Abs (a) }> },
        else_branch = e () => (float[2] v) { v = If (d) <
          then_branch = et () => (float[2] r) { r = Sin (x) },
          else_branch = ee () => (float[2] s) { s = Cos (x) }> }> }""",
        "g (float[2] x, bool d) => (float[2] y) <bool c = {1}> { a = Neg (x)  y = Exp (a) }",
        ["y", "y"],
    )


def test_a_constant_condition_within_a_body_that_stays() -> None:
    chosen(
        """g (float[2] x, bool d) => (float[2] y) <bool c = {1}> { y = If (d) <
        then_branch = t () => (float[2] u) { a = If (c) <
          then_branch = tt () => (float[2] p) { p = Exp (x) },
          else_branch = te () => (float[2] q) { q = Abs (x) }>  u = Neg (a) },
        else_branch = e () => (float[2] v) { v = Sin (x) }> }""",
        """g (float[2] x, bool d) => (float[2] y) <bool c = {1}> { y = If (d) <
        then_branch = t () => (float[2] u) { a = Exp (x)  u = Neg (a) },
        else_branch = e () => (float[2] v) { v = Sin (x) }> }""",
        ["a"],
    )


def test_a_weight_that_is_an_output_of_the_branch() -> None:
    chosen(
        """g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}>
        { y, z = If (c) <
        then_branch = t () => (float[2] k, float[2] a) <float[2] k = {1.0, 2.0}> { a = Neg (x) },
        else_branch = e () => (float[2] p, float[2] q) { p = Exp (x)  q = Sin (x) }> }""",
        """g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}, float[2] k = {1.0, 2.0}>
        { z = Neg (x)  ["y/Identity"] y = Identity (k) }""",
        ["y"],
    )


def test_a_value_that_is_two_outputs_of_the_branch() -> None:
    """onnxruntime leaves one of the two uninitialised, so it is no oracle: its run of the result
    is compared with what the outputs have to be."""
    made = goldens.golden(
        "inline-if",
        """g (float[2] x) => (float[2] z, float[2] w) <bool c = {1}>
        { z, w = If (c) <
        then_branch = t () => (float[2] a, float[2] a) { a = Neg (x) },
        else_branch = e () => (float[2] q, float[2] r) { q = Sin (x)  r = Cos (x) }> }""",
        """g (float[2] x) => (float[2] z, float[2] w) <bool c = {1}>
        { z = Neg (x)  ["w/Identity"] w = Identity (z) }""",
        ["inline-if z"],
        runs=False,
    )
    x = np.array([1.5, -2.5], np.float32)
    with Session(made.SerializeToString(), optimizations="off") as session:
        found = session.run({"x": x})
    np.testing.assert_array_equal(found["z"], -x)
    np.testing.assert_array_equal(found["w"], -x)


def test_bodies_read_the_new_names_and_declared_types_move_along() -> None:
    before = graphs.parsed(
        f"""g (float[2] x, bool d) => (float[2] z, float[2] o) <bool c = {{1}}>
        {{ y = If (c) <
        then_branch = t () => (float[2] u) <float[2] a> {{ a = Neg (x)  u = If (d) <
          then_branch = tt () => (float[2] p) {{ p = Exp (a) }},
          else_branch = te () => (float[2] q) {{ q = Abs (a) }}> }},
        else_branch = e () => (float[2] v) {{ v = Sin (x) }}>
        o = If (d) {BRANCHES}
        z = Cos (y) }}"""
    )
    made, told = goldens.run(before, "inline-if")
    assert told == ["inline-if y"]
    neg, conditional, *_ = made.graph.node
    assert neg.output[0] == "a_2"
    assert [a.g.node[0].input[0] for a in conditional.attribute] == ["a_2", "a_2"]
    assert [info.name for info in made.graph.value_info] == ["a_2"]
    goldens.check(before, made, "inline-if")


def test_weights_of_a_branch_stay_where_they_would_have_to_be_inputs() -> None:
    chosen(
        """<ir_version: 3, opset_import: ["": 8]>
        g (float[2] x, bool c) => (float[2] y) <bool c = {1}> { y = If (c) <
        then_branch = t () => (float[2] u) { u = Neg (x) },
        else_branch = e () => (float[2] v) { v = Sin (x) }> }""",
        """<ir_version: 3, opset_import: ["": 8]>
        g (float[2] x, bool c) => (float[2] y) <bool c = {1}> { y = Neg (x) }""",
        ["y"],
        ir=3,
    )


def test_sequences_and_what_a_dead_branch_read() -> None:
    chosen(
        """g (float[2] x) => (float[2] z) <bool c = {0}, int64 i = {0}, float[2] k = {1.0, 2.0}>
        { s = If (c) <
        then_branch = t () => (seq(float[2]) p) { p = SequenceConstruct (x, k) },
        else_branch = e () => (seq(float[2]) q) { q = SequenceConstruct (x) }>
        z = SequenceAt (s, i) }""",
        """g (float[2] x) => (float[2] z) <bool c = {0}, int64 i = {0}, float[2] k = {1.0, 2.0}>
        { s = SequenceConstruct (x)  z = SequenceAt (s, i) }""",
        ["s"],
    )


def test_a_branch_whose_shape_readers_cannot_take_stays_hidden() -> None:
    """onnxruntime runs a Range to a vector of one element while it does not see that it is one."""
    chosen(
        """g (int64 n) => (int64[N] y) <bool c = {1}, int64 zero = {0}, int64 one = {1}> {
        e = If (c) <
        then_branch = t () => (int64[1] p) { p = Constant <value = int64[1] {4}> () },
        else_branch = e () => (int64 q) { q = Neg (n) }>
        y = Range (zero, e, one) }""",
        "",
        [],
    )


def test_denied_branches_stay() -> None:
    loaded = Model.load(
        graphs.parsed(
            f"g (float[2] x) => (float[2] y) <bool c = {{1}}> {{ y = If (c) {BRANCHES} }}"
        )
    )
    edit = Editor(loaded, denied=[("inline-if", "y")])
    InlineIf().run(loaded, edit)
    assert edit.changes == []


# -- inline-functions ------------------------------------------------------------------------------

HEAD = '<ir_version: 10, opset_import: ["": 17, "f": 1]>'
PLAIN = '<ir_version: 10, opset_import: ["": 17]>'


def test_calls_are_expanded_each_under_names_of_its_own() -> None:
    inlined(
        f"""{HEAD} g (float[2] x) => (float[2] y) {{ a = f.Twice (x)  y = f.Twice (a) }}
        <domain: "f", opset_import: ["": 17]> Twice (p) => (q)
        {{ two = Constant <value_float = 2.0> ()  q = Mul (p, two) }}""",
        f"""{PLAIN} g (float[2] x) => (float[2] y)
        {{ "a/two" = Constant <value_float = 2.0> ()  a = Mul (x, "a/two")
        "y/two" = Constant <value_float = 2.0> ()  y = Mul (a, "y/two") }}""",
        ["inline-function a", "inline-function y", "remove-function f/Twice/"],
    )


def test_attributes_come_from_the_call_or_the_default_or_nowhere() -> None:
    inlined(
        f"""{HEAD} g (float[2] x) => (float[2] y, float[2] z)
        {{ y = f.Leaky <alpha = 0.5> (x)  z = f.Leaky (x) }}
        <domain: "f", opset_import: ["": 17]> Leaky <alpha: float = 0.25, beta> (p) => (q)
        {{ r = LeakyRelu <alpha: float = @alpha> (p)  q = Elu <alpha: float = @beta> (r) }}""",
        f"""{PLAIN} g (float[2] x) => (float[2] y, float[2] z)
        {{ "y/r" = LeakyRelu <alpha = 0.5> (x)  y = Elu ("y/r")
        "z/r" = LeakyRelu <alpha = 0.25> (x)  z = Elu ("z/r") }}""",
        ["inline-function y", "inline-function z", "remove-function f/Leaky/"],
    )


def test_functions_that_call_functions() -> None:
    before = graphs.parsed(
        f"""{HEAD} g (float[2] x) => (float[2] y) {{ y = f.Outer (x) }}
        <domain: "f", opset_import: ["": 17, "f": 1]> Outer (p) => (q)
        {{ a = f.Inner (p)  q = f.Inner (a) }}
        <domain: "f", opset_import: ["": 17]> Inner (p) => (q) {{ a = Neg (p)  q = Exp (a) }}"""
    )
    made, _ = goldens.run(before, "inline-functions")
    assert [n.op_type for n in made.graph.node] == ["Neg", "Exp", "Neg", "Exp"]
    assert len({name for n in made.graph.node for name in n.output}) == 4
    assert not made.functions
    goldens.check(before, made, "inline-functions")


def function(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[str],
    outputs: list[str],
    opset: int = 17,
    overload: str = "",
) -> onnx.FunctionProto:
    made = helper.make_function("f", name, inputs, outputs, nodes, [helper.make_opsetid("", opset)])
    made.overload = overload
    return made


def called(
    functions: list[onnx.FunctionProto], nodes: list[onnx.NodeProto], outputs: int = 1
) -> onnx.ModelProto:
    ports = [value("x", (2,))], [value(f"y{i}", (2,)) for i in range(outputs)]
    made = graphs.model(nodes, *ports, domains=["f"])
    made.functions.extend(functions)
    return made


def kept_as_it_was(before: onnx.ModelProto, *, runs: bool = True) -> None:
    made, told = goldens.run(before, "inline-functions")
    assert made == before
    assert told == []
    goldens.check(before, made, "inline-functions", runs=runs)


def test_overloads_are_functions_of_their_own() -> None:
    both = [
        function("F", [node(op, ["p"], ["q"])], ["p"], ["q"], overload=op) for op in ("Neg", "Exp")
    ]
    nodes = [
        node("F", ["x"], ["y0"], domain="f", overload="Exp"),
        node("F", ["x"], ["y1"], domain="f", overload="Neg"),
    ]
    made, _ = goldens.run(called(both, nodes, 2), "inline-functions")
    assert [n.op_type for n in made.graph.node] == ["Exp", "Neg"]


def test_inputs_that_are_left_out() -> None:
    clip = function("F", [node("Clip", ["p", "lo", "hi"], ["q"])], ["p", "lo", "hi"], ["q"])
    for given in (["x"], ["x", ""], ["x", "", ""]):
        before = called([clip], [node("F", given, ["y0"], domain="f")])
        made, told = goldens.run(before, "inline-functions")
        assert told == ["inline-function y0", "remove-function f/F/"]
        assert [list(n.input) for n in made.graph.node] == [["x", "", ""]]
        goldens.check(before, made, "inline-functions")


def test_outputs_that_are_left_out_or_handed_through() -> None:
    split = function(
        "F",
        [node("Neg", ["p"], ["a"]), node("Exp", ["p"], ["b"])],
        ["p"],
        ["a", "b", "p"],
    )
    before = called([split], [node("F", ["x"], ["", "y0", "y1"], domain="f")], 2)
    made, _ = goldens.run(before, "inline-functions")
    assert [(n.op_type, list(n.output)) for n in made.graph.node] == [
        ("Neg", ["y0/a"]),
        ("Exp", ["y0"]),
        ("Identity", ["y1"]),
    ]
    goldens.check(before, made, "inline-functions", runs=False)


def test_functions_for_another_opset_stay() -> None:
    """Softmax of opset 12 is not that of opset 13."""
    softmax = function("F", [node("Softmax", ["p"], ["q"], axis=0)], ["p"], ["q"], opset=12)
    before = called([softmax], [node("F", ["x"], ["y0"], domain="f")])
    kept_as_it_was(before, runs=False)
    loaded = Model.load(before)
    edit = Editor(loaded)
    InlineFunctions().run(loaded, edit)
    assert edit.rejections == [("inline-function", "F 'y0'", "it imports version 12 of 'ai.onnx'")]


def test_functions_that_runtimes_have_kernels_for_stay() -> None:
    gelu = function("Gelu", [node("Neg", ["p"], ["q"])], ["p"], ["q"])
    gelu.domain = "com.microsoft"
    before = graphs.model(
        [node("Gelu", ["x"], ["y"], domain="com.microsoft")], domains=["com.microsoft"]
    )
    before.functions.append(gelu)
    kept_as_it_was(before, runs=False)


def test_functions_that_nothing_calls_go_and_their_domain_with_them() -> None:
    before = called(
        [function("F", [node("Neg", ["p"], ["q"])], ["p"], ["q"])], [node("Exp", ["x"], ["y0"])]
    )
    made, told = goldens.run(before, "inline-functions")
    assert told == ["remove-function f/F/"]
    assert [entry.domain for entry in made.opset_import] == [""]
    goldens.check(before, made, "inline-functions")


def test_calls_in_bodies_and_bodies_in_functions() -> None:
    """Names in a body of a function must not be those of the graph that it comes to."""
    out = value("x2", (2,))
    branches = [graphs.graph([node(op, ["p"], ["x2"])], (), [out]) for op in ("Neg", "Exp")]
    choose = function("F", [graphs.if_node(*branches, ["q"])], ["p", "c"], ["q"])
    inner = [
        graphs.graph([node("F", ["x2", "c"], [o], domain="f")], (), [value(o, (2,))]) for o in "uv"
    ]
    nodes = [
        node("Abs", ["x"], ["x2"]),
        graphs.if_node(*inner, ["m"]),
        node("F", ["m", "c"], ["y0"], domain="f"),
    ]
    before = called([choose], nodes)
    before.graph.input.append(graphs.CONDITION)
    made, told = goldens.run(before, "inline-functions")
    assert sorted(told) == [
        "inline-function u",
        "inline-function v",
        "inline-function y0",
        "remove-function f/F/",
    ]
    goldens.check(before, made, "inline-functions")


def test_large_tensors_of_a_function_and_names_of_its_nodes() -> None:
    tensor = numpy_helper.from_array(np.arange(600, dtype=np.float32), "any")
    nodes = [
        node("Constant", [], ["k"], name="n", value=tensor),
        node("ReduceSum", ["k"], ["s"], name="m", keepdims=0),
        node("Add", ["p", "s"], ["q"], name="m2"),
    ]
    calls = [node("F", ["x"], ["a"], domain="f", name="one"), node("F", ["a"], ["y0"], domain="f")]
    before = called([function("F", nodes, ["p"], ["q"])], calls)
    made, _ = goldens.run(before, "inline-functions")
    assert [n.name for n in made.graph.node] == [
        "one/n",
        "one/m",
        "one/m2",
        "y0/n",
        "y0/m",
        "y0/m2",
    ]
    goldens.check(before, made, "inline-functions")


def test_a_function_that_calls_itself_is_left_to_the_checker() -> None:
    recursive = function("F", [node("F", ["p"], ["q"], domain="f")], ["p"], ["q"])
    recursive.opset_import.add(domain="f", version=1)
    kept_as_it_was(called([recursive], [node("F", ["x"], ["y0"], domain="f")]), runs=False)


def test_what_the_model_says_of_itself_stays() -> None:
    before = called(
        [function("F", [node("Neg", ["p"], ["q"])], ["p"], ["q"])],
        [node("F", ["x"], ["y0"], domain="f")],
    )
    before.doc_string, before.producer_name = "doc", "me"
    before.metadata_props.add(key="a", value="b")
    before.graph.metadata_props.add(key="c", value="d")
    before.functions[0].node[0].doc_string = "why"
    before.functions[0].node[0].metadata_props.add(key="e", value="f")
    loaded = Model.load(before)
    InlineFunctions().run(loaded, Editor(loaded))
    made = exporter.to_proto(loaded)
    assert (made.doc_string, made.producer_name) == ("doc", "me")
    assert made.metadata_props == before.metadata_props
    assert made.graph.metadata_props == before.graph.metadata_props
    assert made.graph.node[0].doc_string == "why"
    assert made.graph.node[0].metadata_props[0].value == "f"
    assert made.graph.node[0].op_type == "Neg"
    assert made.graph.output[0].type == before.graph.output[0].type
