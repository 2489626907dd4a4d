"""lift-constants and fold-constants: what becomes a constant, and what must not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.canonicalize.fold_constants import FoldConstants
from graphopt.passes.pipelines import pipeline
from tests import goldens, graphs
from tests.graphs import node, value, weight


def lifted(before: str, expected: str, names: list[str], ir: int | None = None) -> None:
    told = [f"lift-constant {name}" for name in names]
    goldens.golden("lift-constants", before, expected, told, ir=ir)


def folded(before: str, expected: str, names: list[str], *, runs: bool = True) -> None:
    told = [f"fold-constant {name}" for name in names]
    goldens.golden("fold-constants", before, expected, told, runs=runs)


# -- lift-constants --------------------------------------------------------------------------------


def test_a_constant_becomes_an_initializer_of_its_name() -> None:
    lifted(
        """g (float[2] x) => (float[2] y)
        { c = Constant <value = float[2] {1.0, 2.0}> ()  y = Add (x, c) }""",
        "g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}> { y = Add (x, c) }",
        ["c"],
    )


@pytest.mark.parametrize(
    ("stated", "declared"),
    [
        ("value_int = 3", "int64 c = {3}"),
        ("value_ints = [3, 4]", "int64[2] c = {3, 4}"),
        ("value_float = 0.1", "float c = {0.1}"),
        ("value_floats = [0.1, 2.0]", "float[2] c = {0.1, 2.0}"),
        ('value_string = "a"', 'string c = {"a"}'),
        ('value_strings = ["a", "b"]', 'string[2] c = {"a", "b"}'),
    ],
)
def test_every_kind_of_constant(stated: str, declared: str) -> None:
    kind = declared.split(" ")[0]
    element = kind.split("[")[0]
    size = "2" if "[" in kind else ""
    shape = f"[{size}]" if size else "[1]"
    before = graphs.parsed(
        f"g () => ({element}{shape} y) {{ c = Constant <{stated}> ()  y = Identity (c) }}"
    )
    made, told = goldens.run(before, "lift-constants")
    expected = graphs.parsed(f"g () => ({element}{shape} y) <{declared}> {{ y = Identity (c) }}")
    (found,), (wanted,) = made.graph.initializer, expected.graph.initializer
    assert found.name == "c"
    assert found.data_type == wanted.data_type
    assert list(found.dims) == ([2] if size else [])
    assert numpy_helper.to_array(found).tolist() == numpy_helper.to_array(wanted).tolist()
    assert told == ["lift-constant c"]
    assert goldens.outputs(made, before) == goldens.outputs(before, before)


def test_sparse_constants_stay_sparse() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5.0], np.float32), "other"),
        numpy_helper.from_array(np.array([2], np.int64), "other_indices"),
        [4],
    )
    before = graphs.model(
        [node("Constant", [], ["c"], sparse_value=sparse), node("Add", ["x", "c"], ["y"])]
    )
    made, told = goldens.run(before, "lift-constants")
    assert told == ["lift-constant c"]
    assert [s.values.name for s in made.graph.sparse_initializer] == ["c"]
    assert goldens.outputs(made, before) == goldens.outputs(before, before)


def test_a_constant_that_is_an_output_stays() -> None:
    lifted("g () => (float[2] y) { y = Constant <value = float[2] {1.0, 2.0}> () }", "", [])


def test_initializers_that_would_have_to_be_inputs_are_not_made() -> None:
    lifted(
        """<ir_version: 3, opset_import: ["": 8]>
        g (float[2] x) => (float[2] y)
        { c = Constant <value = float[2] {1.0, 2.0}> ()  y = Add (x, c) }""",
        "",
        [],
        ir=3,
    )


def test_constants_in_bodies_are_lifted_where_they_are() -> None:
    lifted(
        """g (bool c, float[2] x) => (float[2] y) { y = If (c) <
        then_branch = t () => (float[2] u)
          { k = Constant <value = float[2] {1.0, 2.0}> ()  u = Add (x, k) },
        else_branch = e () => (float[2] v) { v = Constant <value = float[2] {3.0, 4.0}> () }> }""",
        """g (bool c, float[2] x) => (float[2] y) { y = If (c) <
        then_branch = t () => (float[2] u) <float[2] k = {1.0, 2.0}> { u = Add (x, k) },
        else_branch = e () => (float[2] v) { v = Constant <value = float[2] {3.0, 4.0}> () }> }""",
        ["k"],
    )


def test_large_constants_stay_ranges_of_the_file() -> None:
    stored = weight("other")
    before = graphs.matmul()
    del before.graph.initializer[:]
    before.graph.node.insert(0, node("Constant", [], ["w"], value=stored))
    loaded = Model.load(before)
    run_pipeline(loaded, pipeline(0, "lift-constants"))
    lifted_weight = loaded.graph.values["w"].weight
    assert lifted_weight is not None
    assert loaded.store.reference(lifted_weight.tensor) is not None
    made = exporter.to_proto(loaded)
    assert made.graph.initializer[0].name == "w"
    assert made.graph.initializer[0].raw_data == stored.raw_data


def test_declared_types_of_lifted_values_go() -> None:
    """The initializer says it itself, and what was declared may be wrong."""
    before = """g (float[2] x) => (float[2] y) <float[2] c, float[2] a>
        { c = Constant <value = float[2] {1.0, 2.0}> ()  a = Neg (x)  y = Add (a, c) }"""
    made, _ = goldens.run(graphs.parsed(before), "lift-constants")
    assert [info.name for info in made.graph.value_info] == ["a"]


# -- fold-constants --------------------------------------------------------------------------------


def test_what_depends_on_constants_only_is_computed() -> None:
    folded(
        """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 5.0}>
        { c = Add (a, b)  d = Mul (c, c)  y = Add (x, d) }""",
        """g (float[2] x) => (float[2] y)
        <float[2] a = {1.0, 2.0}, float[2] b = {3.0, 5.0}, float[2] d = {16.0, 49.0}>
        { y = Add (x, d) }""",
        ["d"],
    )


def test_constant_nodes_are_constants_too_and_an_output_stays_computed() -> None:
    folded(
        "g () => (float[2] y) { a = Constant <value_floats = [1.0, 2.0]> ()  y = Neg (a) }",
        """g () => (float[2] y) { a = Constant <value_floats = [1.0, 2.0]> ()
        [y] y = Constant <value = float[2] y {-1.0, -2.0}> () }""",
        ["y"],
    )


def test_several_outputs_of_which_one_is_read() -> None:
    folded(
        """g (float[1] x) => (float[1] y) <float[2] w = {1.0, 2.0}>
        { a, b = Split (w)  y = Add (x, b) }""",
        """g (float[1] x) => (float[1] y) <float[2] w = {1.0, 2.0}, float[1] b = {2.0}>
        { y = Add (x, b) }""",
        ["b"],
    )


@pytest.mark.parametrize(
    "op",
    [
        "RandomNormalLike (a)",
        "RandomUniformLike (a)",
        "Bernoulli (a)",
        "Dropout (a, half, live)",
    ],
)
def test_random_operators_are_never_computed(op: str) -> None:
    folded(
        f"""g (float[2] x) => (float[2] y)
        <float[2] a = {{1.0, 2.0}}, float half = {{0.5}}, bool live = {{1}}>
        {{ r = {op}  y = Add (x, r) }}""",
        "",
        [],
        runs=False,
    )


def test_random_operators_are_never_computed_in_bodies_or_after_constants() -> None:
    before = """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}>
        { b = Neg (a)  r = RandomUniformLike (b)  s = Neg (r)  y = Add (x, s) }"""
    made, told = goldens.run(graphs.parsed(before), "fold-constants")
    assert told == ["fold-constant b"]
    assert [n.op_type for n in made.graph.node] == ["RandomUniformLike", "Neg", "Add"]


@pytest.mark.parametrize("op", ["DequantizeLinear", "QuantizeLinear"])
def test_quantized_weights_stay_quantized(op: str) -> None:
    kinds = ("int8", "float") if op == "DequantizeLinear" else ("float", "int8")
    folded(
        f"""g (float[4] x) => (float[4] y)
        <{kinds[0]}[4] w = {{1, 2, 3, 4}}, float s = {{0.5}}, int8 z = {{0}}>
        {{ d = {op} (w, s, z)  e = Cast <to = 1> (d)  y = Add (x, e) }}""",
        "",
        [],
    )


def test_foreign_operators_and_functions_are_left_alone() -> None:
    folded(
        """<ir_version: 10, opset_import: ["": 17, "f": 1]>
        g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}> { b = f.Own (a)  y = Add (x, b) }
        <domain: "f", opset_import: ["": 17]> Own (p) => (q) { q = Neg (p) }""",
        "",
        [],
    )


def test_defaults_that_a_caller_replaces_are_no_constants() -> None:
    folded(
        """g (float[2] x, float[2] d) => (float[2] y) <float[2] d = {1.0, 2.0}>
        { e = Neg (d)  y = Add (x, e) }""",
        "",
        [],
    )


def test_shapes_that_a_caller_replaces_prove_nothing() -> None:
    """onnx's inference reads the default of an input as if it were fixed."""
    folded(
        """g (float[6] x, int64[2] s) => (int64[2] y) <int64[2] s = {2, 3}>
        { a = Reshape (x, s)  y = Shape (a) }""",
        "",
        [],
    )


def test_sequences_are_left_alone() -> None:
    folded(
        """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}, int64 i = {0}>
        { s = SequenceConstruct (a, a)  b = SequenceAt (s, i)  y = Add (x, b) }""",
        "",
        [],
    )


def test_a_node_that_fails_is_left_alone() -> None:
    """The other nodes of its session are computed all the same; a run may never take it."""
    made, told = goldens.run(
        graphs.parsed(
            """g (bool c, float[2] x) => (float[N] y)
            <float[2] a = {1.0, 2.0}, int64[1] s = {5}> {
            u = Neg (a)  v = Abs (u)
            y = If (c) <then_branch = t () => (float[N] p)
              { q = Reshape (a, s)  r = Exp (q) p = Add (r, q) },
            else_branch = e () => (float[N] w) { w = Add (x, v) }> }"""
        ),
        "fold-constants",
    )
    assert told == ["fold-constant v"]
    branch = made.graph.node[0].attribute[0].g
    assert [n.op_type for n in branch.node] == ["Reshape", "Exp", "Add"]


def test_types_without_a_kernel_are_left_alone() -> None:
    """onnxruntime has no Cosh of doubles: such a model can be optimised all the same."""
    before = """g (float[2] x) => (double[2] y, float[2] z)
        <double[2] a = {1, 2}, float[2] f = {1.0, 2.0}>
        { y = Cosh (a)  g1 = Neg (f)  z = Add (x, g1) }"""
    made, told = goldens.run(graphs.parsed(before), "fold-constants")
    assert told == ["fold-constant g1"]
    assert [n.op_type for n in made.graph.node] == ["Cosh", "Add"]


def test_bodies_are_folded_and_their_outputs_stay_theirs() -> None:
    folded(
        """g (bool c, float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}> { y = If (c) <
        then_branch = t () => (float[2] u) { k = Neg (a)  u = Add (x, k) },
        else_branch = e () => (float[2] v) { v = Abs (a) }> }""",
        """g (bool c, float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}> { y = If (c) <
        then_branch = t () => (float[2] u) <float[2] k = {-1.0, -2.0}> { u = Add (x, k) },
        else_branch = e () => (float[2] v)
        { [v] v = Constant <value = float[2] v {1.0, 2.0}> () }> }""",
        ["v", "k"],
    )


def large(
    op: str, *inputs: str, tensors: list[onnx.TensorProto], **attributes: object
) -> onnx.ModelProto:
    """x times a value of 1 MB that the operator computes from constants."""
    made = node(op, list(inputs), ["w"], **attributes)
    ports = [value("x", (1, 512))], [value("y", (1, 512))]
    return graphs.model([made, node("MatMul", ["x", "w"], ["y"])], *ports, tensors)


SHAPE = numpy_helper.from_array(np.array([512, 512], np.int64), "s")


def test_an_expanded_zero_folds_where_it_is_small_and_stays_where_it_is_not() -> None:
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "z")
    before = large("Expand", "z", "s", tensors=[zero, SHAPE])
    assert goldens.run(before, "fold-constants")[1] == []
    assert goldens.run(before, "fold-constants{budget=2000000}")[1] == ["fold-constant w"]
    folded(
        """g (float[3] x) => (float[3] y) <float[1] z = {0.0}, int64[1] s = {3}>
        { e = Expand (z, s)  y = Add (x, e) }""",
        """g (float[3] x) => (float[3] y)
        <float[1] z = {0.0}, int64[1] s = {3}, float[3] e = {0.0, 0.0, 0.0}> { y = Add (x, e) }""",
        ["e"],
    )


def test_a_weight_that_is_one_number_stays_one() -> None:
    before = large("ConstantOfShape", "s", tensors=[SHAPE])
    assert goldens.run(before, "fold-constants")[1] == []


def test_a_weight_that_is_stored_narrow_stays_narrow() -> None:
    """Neither the Cast alone nor what follows it may be folded."""
    stored = numpy_helper.from_array(np.ones((512, 512), np.int8), "q")
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "k")
    nodes = [
        node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "k"], ["w"]),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    before = graphs.model(nodes, [value("x", (1, 512))], [value("y", (1, 512))], [stored, scale])
    assert goldens.run(before, "fold-constants")[1] == []


def test_a_large_value_on_the_way_to_a_small_one_is_no_matter() -> None:
    axes = numpy_helper.from_array(np.array([0], np.int64), "a")
    nodes = [
        node("ConstantOfShape", ["s"], ["f"]),
        node("ReduceSum", ["f", "a"], ["w"]),
        node("Add", ["x", "w"], ["y"]),
    ]
    before = graphs.model(nodes, [value("x", (1, 512))], [value("y", (1, 512))], [SHAPE, axes])
    made, told = goldens.run(before, "fold-constants")
    assert told == ["fold-constant w"]
    assert [n.op_type for n in made.graph.node] == ["Add"]


def test_a_transposed_weight_takes_the_place_of_the_weight() -> None:
    before = large("Transpose", "v", tensors=[weight("v", (512, 512))], perm=[1, 0])
    assert goldens.run(before, "fold-constants")[1] == ["fold-constant w"]


def test_a_transposed_weight_that_is_read_elsewhere_too_would_be_stored_twice() -> None:
    before = large("Transpose", "v", tensors=[weight("v", (512, 512))], perm=[1, 0])
    before.graph.node.append(node("Gather", ["v", "i"], ["z"]))
    before.graph.input.append(value("i", (1,), TensorProto.INT64))
    before.graph.output.append(value("z", (1, 512)))
    assert goldens.run(before, "fold-constants")[1] == []


def test_two_forms_of_one_weight_would_be_stored_twice() -> None:
    before = large("Transpose", "v", tensors=[weight("v", (512, 512))], perm=[1, 0])
    before.graph.node.extend([node("Neg", ["v"], ["u"]), node("MatMul", ["x", "u"], ["z"])])
    before.graph.output.append(value("z", (1, 512)))
    assert goldens.run(before, "fold-constants")[1] == []


def test_parts_of_one_weight_take_its_place_together() -> None:
    before = graphs.model(
        [
            node("Split", ["v"], ["a", "b"], axis=0),
            node("MatMul", ["x", "a"], ["y"]),
            node("MatMul", ["x", "b"], ["z"]),
        ],
        [value("x", (1, 256))],
        [value("y", (1, 512)), value("z", (1, 512))],
        [weight("v", (512, 512))],
    )
    before.opset_import[0].version = 13
    made, told = goldens.run(before, "fold-constants, remove-dead")
    assert told == ["fold-constant a", "remove-dead-initializer v"]
    assert {t.name for t in made.graph.initializer} == {"a", "b"}
    for tensor, part in zip(made.graph.initializer, (slice(256), slice(256, 512)), strict=True):
        whole = numpy_helper.to_array(weight("v", (512, 512)))
        assert np.array_equal(numpy_helper.to_array(tensor), whole[part])


def test_results_of_ml_dtypes() -> None:
    folded(
        """g (float[2] x) => (bfloat16[2] y) <float[2] a = {1.0, 2.0}>
        { b = Cast <to = 16> (a)  c = Cast <to = 16> (x)  d = Cast <to = 1> (b)
        e = Cast <to = 1> (c)  f = Add (d, e)  y = Cast <to = 16> (f) }""",
        """g (float[2] x) => (bfloat16[2] y) <float[2] a = {1.0, 2.0}, float[2] d = {1.0, 2.0}>
        { c = Cast <to = 16> (x)  e = Cast <to = 1> (c)  f = Add (d, e)
        y = Cast <to = 16> (f) }""",
        ["d"],
    )


def test_denied_and_unpaid_folds_are_not_made() -> None:
    proto = graphs.parsed(
        """g (float[2] x) => (float[2] y) <float[2] a = {1.0, 2.0}>
        { b = Neg (a)  c = Exp (a)  d = Add (x, b)  y = Add (d, c) }"""
    )
    for how, expected in (
        ({"denied": [("fold-constant", "b")]}, ["c"]),
        ({"fuel": 1}, ["c"]),
        ({"fuel": 0}, []),
    ):
        edit = Editor(Model.load(proto), **how)  # type: ignore[arg-type]
        FoldConstants().run(edit.model, edit)
        assert [change.root for change in edit.changes] == expected


# -- sizes -----------------------------------------------------------------------------------------


def test_a_proven_shape_is_a_constant() -> None:
    folded(
        """g (float[2,3] x) => (float[N,M] y) { a = Neg (x)  s = Shape (a)  y = Expand (x, s) }""",
        """g (float[2,3] x) => (float[N,M] y) <int64[2] s = {2, 3}>
        { a = Neg (x)  y = Expand (x, s) }""",
        ["s"],
    )


def test_a_declared_shape_is_not() -> None:
    folded(
        """g (float[N] x) => (float[M] y) <float[3] a>
        { i = NonZero (x)  a = Cast <to = 1> (i)  s = Shape (a)  y = ConstantOfShape (s) }""",
        "",
        [],
    )


def test_a_proven_part_of_a_shape_is_a_constant() -> None:
    folded(
        """g (float[N,3] x) => (int64[1] y, int64 z)
        <int64[1] one = {1}, int64[1] two = {2}, int64 zero = {0}, int64 last = {-1}>
        { s = Shape (x)  y = Slice (s, one, two)  z = Gather (s, last)  u = Gather (s, zero) }""",
        """g (float[N,3] x) => (int64[1] y, int64 z)
        <int64[1] one = {1}, int64[1] two = {2}, int64 zero = {0}, int64 last = {-1}>
        { s = Shape (x)  [y] y = Constant <value = int64[1] y {3}> ()
        [z] z = Constant <value = int64 z {3}> ()  u = Gather (s, zero) }""",
        ["y", "z"],
    )


def test_proven_parts_survive_what_joins_them() -> None:
    folded(
        """g (float[N,3,5] x) => (int64[2] y) <int64 zero = {0}, int64[1] at = {0}, int64 one = {1},
        int64[1] first = {1}, int64[1] end = {3}>
        { s = Shape (x)  n = Gather (s, zero)  d = Gather (s, one)
        n1 = Unsqueeze (n, at)  d1 = Unsqueeze (d, at)
        j = Concat <axis = 0> (n1, d1, d1)  y = Slice (j, first, end) }""",
        """g (float[N,3,5] x) => (int64[2] y) <int64 zero = {0}, int64[1] at = {0}, int64 one = {1},
        int64[1] first = {1}, int64[1] end = {3}, int64 d = {3}, int64[1] d1 = {3}>
        { s = Shape (x)  n = Gather (s, zero)  n1 = Unsqueeze (n, at)
        j = Concat <axis = 0> (n1, d1, d1)  [y] y = Constant <value = int64[2] y {3, 3}> () }""",
        ["d", "d1", "y"],
    )


# -- what readers cannot take ----------------------------------------------------------------------


def test_a_constant_that_a_runtime_would_refuse_is_not_shown_to_it() -> None:
    """The branch is never taken with such a size, and onnxruntime only looks at constants."""
    folded(
        """g (bool c, float[2] x) => (float[N] y)
        <int64[1] two = {2}, int64[1] five = {5}> {
        s = Add (two, five)
        y = If (c) <
        then_branch = t () => (float[N] p) { p = Expand (x, s) },
        else_branch = e () => (float[N] q) { q = Neg (x) }> }""",
        "",
        [],
    )


def test_the_sizes_that_such_a_constant_follows_from_stay_too() -> None:
    """onnxruntime would compute the rest itself, and refuse the model as well."""
    folded(
        """g (bool c, float[2] x, float[2,3] z) => (float[N] y) <int64[1] one = {1}> {
        n = Size (z)  s = Reshape (n, one)
        y = If (c) <
        then_branch = t () => (float[N] p) { p = Expand (x, s) },
        else_branch = e () => (float[N] q) { q = Neg (x) }>
        }""",
        "",
        [],
    )
