"""merge-duplicates: what is equal becomes one, and what only looks equal does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from graphopt.edit import Editor
from graphopt.ir import Model, Weight
from graphopt.passes.canonicalize.merge_duplicates import MergeDuplicates
from tests import goldens, graphs
from tests.graphs import node, value, weight


def merged(before: str | onnx.ModelProto, expected: str, told: list[str], **how: bool) -> None:
    """`told` names merged values: those of initializers with a leading `=`."""
    rules = [
        f"merge-initializers {name[1:]}" if name.startswith("=") else f"merge-nodes {name}"
        for name in told
    ]
    goldens.golden("merge-duplicates", before, expected, rules, **how)  # type: ignore[arg-type]


# -- nodes -----------------------------------------------------------------------------------------


def test_equal_nodes_and_then_their_readers() -> None:
    merged(
        """g (float[2] x) => (float[2] y)
        { a = Neg (x)  b = Neg (x)  c = Exp (a)  d = Exp (b)  y = Add (c, d) }""",
        "g (float[2] x) => (float[2] y) { a = Neg (x)  c = Exp (a)  y = Add (c, c) }",
        ["b", "d"],
    )


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Neg (x)  b = Abs (x)",
        "a = Add (x, k)  b = Add (k, x)",
        "a = Sub (x, k)  b = Sub (k, x)",
        "a = LeakyRelu <alpha = 0.1> (x)  b = LeakyRelu <alpha = 0.2> (x)",
        "a = Clip (x, lo)  b = Clip (x, , lo)",
        "a = RandomNormalLike (x)  b = RandomNormalLike (x)",
        "a = RandomNormalLike <seed = 1.0> (x)  b = RandomNormalLike <seed = 1.0> (x)",
        "a = Bernoulli (x)  b = Bernoulli (x)",
        "a = Dropout (x, lo, live)  b = Dropout (x, lo, live)",
    ],
)
def test_nodes_that_differ_and_random_ones_stay(nodes: str) -> None:
    merged(
        f"""g (float[2] x) => (float[2] y)
        <float[2] k = {{3.0, 4.0}}, float lo = {{0.25}}, bool live = {{1}}>
        {{ {nodes}  y = Add (a, b) }}""",
        "",
        [],
        runs="Random" not in nodes and "Bernoulli" not in nodes and "live" not in nodes,
    )


def test_a_dequantizer_of_each_reader_stays() -> None:
    merged(
        """g (float[2] x) => (float[2] y) <int8[2] q = {3, 4}, float s = {0.25}>
        { a = DequantizeLinear (q, s)  b = DequantizeLinear (q, s)
        c = Add (x, a)  y = Mul (c, b) }""",
        "",
        [],
    )


def test_foreign_operators_may_be_random() -> None:
    merged(
        """<ir_version: 10, opset_import: ["": 17, "f": 1]>
        g (float[2] x) => (float[2] y) { a = f.Own (x)  b = f.Own (x)  y = Add (a, b) }""",
        "",
        [],
        runs=False,
    )


def test_an_output_takes_over_what_is_not_one() -> None:
    merged(
        """g (float[2] x) => (float[2] y, float[2] z)
        { a = Neg (x)  y = Neg (x)  b = Exp (a)  z = Exp (y) }""",
        "g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x)  z = Exp (y) }",
        ["y", "z"],
    )


def test_two_outputs_stay_two() -> None:
    merged("g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x)  z = Neg (x) }", "", [])


def test_later_duplicates_of_what_became_an_output() -> None:
    merged(
        """g (float[2] x) => (float[2] y, float[2] z)
        { a = Neg (x)  e = Exp (a)  y = Neg (x)  b = Neg (x)  f = Exp (b)  z = Add (e, f) }""",
        "g (float[2] x) => (float[2] y, float[2] z) { y = Neg (x)  e = Exp (y)  z = Add (e, e) }",
        ["y", "b", "f"],
    )


def test_several_outputs_all_or_none() -> None:
    merged(
        """g (float[2] x) => (float[1] y, float[1] z)
        { a, b = Split (x)  c, d = Split (x)  y = Add (a, d)  z = Sub (c, b) }""",
        """g (float[2] x) => (float[1] y, float[1] z)
        { a, b = Split (x)  y = Add (a, b)  z = Sub (a, b) }""",
        ["c"],
    )
    merged(
        "g (float[2] x) => (float[1] y, float[1] z) { a, y = Split (x)  c, z = Split (x) }", "", []
    )


def test_outputs_that_are_left_out_make_a_difference() -> None:
    merged(
        """g (float[1,1,4] x) => (float[1,1,3] y)
        { a = MaxPool <kernel_shape = [2]> (x)  b, i = MaxPool <kernel_shape = [2]> (x)
        f = Cast <to = 1> (i)  c = Add (a, b)  y = Add (c, f) }""",
        "",
        [],
    )


def test_bodies_read_what_is_computed_before_them() -> None:
    merged(
        """g (bool c, float[2] x) => (float[2] y, float[2] z) { a = Neg (x)  y = If (c) <
        then_branch = t () => (float[2] u) { b = Neg (x)  u = Exp (b) },
        else_branch = e () => (float[2] v) { v = Neg (x) }>  d = Abs (y)  z = Mul (a, d) }""",
        """g (bool c, float[2] x) => (float[2] y, float[2] z) { a = Neg (x)  y = If (c) <
        then_branch = t () => (float[2] u) { u = Exp (a) },
        else_branch = e () => (float[2] v) { v = Neg (x) }>  d = Abs (y)  z = Mul (a, d) }""",
        ["b"],
    )


def test_bodies_do_not_share_and_nothing_outside_reads_a_body() -> None:
    merged(
        """g (bool c, float[2] x) => (float[2] z) { y = If (c) <
        then_branch = t () => (float[2] u) { b = Neg (x)  u = Exp (b) },
        else_branch = e () => (float[2] v) { d = Neg (x)  v = Abs (d) }>
        a = Neg (x)  z = Mul (a, y) }""",
        "",
        [],
    )


def test_nodes_with_bodies_stay() -> None:
    body = """<then_branch = t () => (float[2] u{0}) {{ u{0} = Exp (x) }},
        else_branch = e () => (float[2] v{0}) {{ v{0} = Abs (x) }}>"""
    merged(
        f"""g (bool c, float[2] x) => (float[2] y)
        {{ a = If (c) {body.format(1)}  b = If (c) {body.format(2)}  y = Add (a, b) }}""",
        "",
        [],
    )


# -- initializers ----------------------------------------------------------------------------------


def test_equal_initializers_and_then_their_readers() -> None:
    merged(
        """g (float[2] x) => (float[2] y) <float[2] k = {1.0, 2.0}, float[2] l = {1.0, 2.0}>
        { a = Add (x, k)  b = Add (x, l)  y = Mul (a, b) }""",
        """g (float[2] x) => (float[2] y) <float[2] k = {1.0, 2.0}>
        { a = Add (x, k)  y = Mul (a, a) }""",
        ["=l", "b"],
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("float[2] k = {1.0, 2.0}", "float[2] l = {1.0, 3.0}"),
        ("float[1,2] k = {1.0, 2.0}", "float[2] l = {1.0, 2.0}"),
        ("float k = {0.0}", "float l = {-0.0}"),
    ],
)
def test_initializers_that_differ_stay(first: str, second: str) -> None:
    merged(
        f"""g (float[2] x) => (float[N,M] y) <{first}, {second}>
        {{ a = Add (x, k)  b = Div (x, l)  c = Mul (a, b)  z = Neg (c)  y = Flatten (z) }}""",
        "",
        [],
    )


def test_equal_bytes_of_another_type_stay() -> None:
    merged(
        """g (float[1] x) => (float[1] y) <int32[1] k = {1}, uint32[1] l = {1}>
        { a = Cast <to = 1> (k)  b = Cast <to = 1> (l)  c = Add (x, a)  y = Add (c, b) }""",
        "",
        [],
    )


def test_not_a_number_equals_itself_by_its_bits() -> None:
    tensors = [numpy_helper.from_array(np.array([np.nan, 1], np.float32), n) for n in "kl"]
    nodes = [node("Add", ["x", "k"], ["a"]), node("Sub", ["a", "l"], ["y"])]
    before = graphs.model(nodes, [value("x", (2,))], [value("y", (2,))], tensors)
    made, told = goldens.run(before, "merge-duplicates")
    assert told == ["merge-initializers l"]
    assert made.graph.node[1].input == ["a", "k"]


def test_the_encoding_of_a_weight_makes_no_difference() -> None:
    values = np.arange(8, dtype=np.float32)
    raw = numpy_helper.from_array(values, "k")
    listed = onnx.helper.make_tensor("l", TensorProto.FLOAT, [8], values.tolist())
    nodes = [node("Add", ["x", "k"], ["a"]), node("Sub", ["a", "l"], ["y"])]
    before = graphs.model(nodes, [value("x", (8,))], [value("y", (8,))], [raw, listed])
    made, told = goldens.run(before, "merge-duplicates")
    assert told == ["merge-initializers l"]
    assert goldens.outputs(made, before) == goldens.outputs(before, before)


def test_strings() -> None:
    merged(
        """g (string[2] x) => (bool[2] y, bool[2] z)
        <string[2] k = {"a", "bc"}, string[2] l = {"a", "bc"}, string[2] m = {"ab", "c"}>
        { y = Equal (x, k)  a = Equal (x, l)  b = Equal (x, m)  z = And (a, b) }""",
        """g (string[2] x) => (bool[2] y, bool[2] z)
        <string[2] k = {"a", "bc"}, string[2] m = {"ab", "c"}>
        { y = Equal (x, k)  b = Equal (x, m)  z = And (y, b) }""",
        ["=l", "a"],
        runs=False,
    )


def test_weights_of_bodies_are_those_around_them_but_not_of_each_other() -> None:
    merged(
        """g (bool c, float[2] x) => (float[2] y) <float[2] k = {1.0, 2.0}> { a = Add (x, k)
        y = If (c) <
        then_branch = t () => (float[2] u) <float[2] l = {1.0, 2.0}, float[2] m = {5.0, 6.0}>
        { b = Mul (a, l)  u = Add (b, m) },
        else_branch = e () => (float[2] v) <float[2] n = {5.0, 6.0}> { v = Mul (a, n) }> }""",
        """g (bool c, float[2] x) => (float[2] y) <float[2] k = {1.0, 2.0}> { a = Add (x, k)
        y = If (c) <
        then_branch = t () => (float[2] u) <float[2] m = {5.0, 6.0}>
        { b = Mul (a, k)  u = Add (b, m) },
        else_branch = e () => (float[2] v) <float[2] n = {5.0, 6.0}> { v = Mul (a, n) }> }""",
        ["=l"],
    )


def test_defaults_that_a_caller_replaces_stay() -> None:
    merged(
        """g (float[2] x, float[2] l) => (float[2] y)
        <float[2] k = {1.0, 2.0}, float[2] l = {1.0, 2.0}>
        { a = Add (x, k)  y = Sub (a, l) }""",
        "",
        [],
    )


def test_weights_that_old_files_list_as_inputs_are_merged() -> None:
    made, told = goldens.run(
        graphs.parsed(
            """<ir_version: 3, opset_import: ["": 8]>
            g (float[2] x, float[2] k, float[2] l) => (float[2] y)
            <float[2] k = {1.0, 2.0}, float[2] l = {1.0, 2.0}> { a = Add (x, k)  y = Sub (a, l) }"""
        ),
        "merge-duplicates",
    )
    assert told == ["merge-initializers l"]
    assert [info.name for info in made.graph.input] == ["x", "k"]


def test_large_weights_that_differ_in_one_byte_in_the_middle() -> None:
    one, two = weight("k", (64, 64)), weight("l", (64, 64))
    data = bytearray(two.raw_data)
    data[8000] ^= 1
    two.raw_data = bytes(data)
    nodes = [node("MatMul", ["x", "k"], ["a"]), node("MatMul", ["a", "l"], ["y"])]
    ports = [value("x", (1, 64))], [value("y", (1, 64))]
    assert goldens.run(graphs.model(nodes, *ports, [one, two]), "merge-duplicates")[1] == []
    two.raw_data = one.raw_data
    made, told = goldens.run(graphs.model(nodes, *ports, [one, two]), "merge-duplicates")
    assert told == ["merge-initializers l"]
    assert [t.name for t in made.graph.initializer] == ["k"]


def test_weights_without_an_equal_in_shape_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Weight.values.fget
    assert original is not None

    def values(self: Weight) -> object:
        read.append(self.tensor.name)
        return original(self)

    monkeypatch.setattr(Weight, "values", property(values))
    tensors = [
        weight("k", (64, 64)),
        weight("l", (64, 32)),
        weight("m", (32, 64)),
        weight("n", (32, 64), 1),
    ]
    nodes = [node("MatMul", ["x", "k"], ["a"]), node("MatMul", ["a", "l"], ["b"])]
    nodes += [node("MatMul", ["b", "m"], ["c"]), node("MatMul", ["b", "n"], ["d"])]
    nodes.append(node("Add", ["c", "d"], ["y"]))
    loaded = Model.load(graphs.model(nodes, [value("x", (1, 64))], [value("y", (1, 64))], tensors))
    MergeDuplicates().run(loaded, Editor(loaded))
    assert set(read) == {"m", "n"}


def test_models_without_their_weights_are_left_alone() -> None:
    tensors = [onnx.TensorProto(name=n, data_type=1, dims=[64, 64]) for n in "kl"]
    nodes = [node("MatMul", ["x", "k"], ["a"]), node("MatMul", ["a", "l"], ["y"])]
    before = graphs.model(nodes, [value("x", (1, 64))], [value("y", (1, 64))], tensors)
    assert goldens.run(before, "merge-duplicates, fold-constants")[1] == []


def test_denied_merges_are_not_made() -> None:
    proto = graphs.parsed(
        """g (float[2] x) => (float[2] y) <float[2] k = {1.0, 2.0}, float[2] l = {1.0, 2.0}>
        { a = Add (x, k)  b = Add (x, l)  c = Add (x, k)  d = Mul (a, b)  y = Mul (d, c) }"""
    )
    edit = Editor(Model.load(proto), denied=[("merge-initializers", "l"), ("merge-nodes", "c")])
    MergeDuplicates().run(edit.model, edit)
    assert edit.changes == []
