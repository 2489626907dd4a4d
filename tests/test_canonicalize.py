"""Cleanup passes: before and expected as text, and what holds on every model."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from graphopt import exporter
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import LEVELS, pipeline
from tests import goldens, graphs

IDENTITY_PASS = "canonicalize{rules=eliminate-identity}"
IDENTITY_RULE = "eliminate-identity"


def run(before: onnx.ModelProto | Path, passes: str) -> tuple[onnx.ModelProto, list[str]]:
    """The model after the passes, and the rules that fired with the names they stand on."""
    loaded = Model.load(before)
    runs = run_pipeline(loaded, pipeline(0, passes))
    assert not any(one.error for one in runs)
    told = [f"{change.rule} {change.root}" for one in runs for change in one.changes]
    return exporter.to_proto(loaded), told


def golden(passes: str, before: str, expected: str, told: list[str], **fields: int) -> None:
    """`expected` is the whole model after the passes; "" says that nothing changes."""
    protos = [graphs.parsed(text) for text in (before, expected or before)]
    for proto in protos:
        for field, number in fields.items():
            setattr(proto, field, number)
    made, found = run(protos[0], passes)
    assert onnx.printer.to_text(made) == onnx.printer.to_text(protos[1])
    assert found == told
    again, more = run(made, passes)
    assert again == made
    assert more == []


# -- eliminate-identity ----------------------------------------------------------------------------


def identity(before: str, expected: str, told: list[str]) -> None:
    golden(IDENTITY_PASS, before, expected, [f"{IDENTITY_RULE} {name}" for name in told])


def test_readers_read_what_the_identity_read() -> None:
    identity(
        """g (float[4] x) => (float[4] y) <float[4] a, float[4] b>
        { a = Neg (x)  b = Identity (a)  y = Add (b, b) }""",
        "g (float[4] x) => (float[4] y) <float[4] a> { a = Neg (x)  y = Add (a, a) }",
        ["b"],
    )


def test_a_chain_goes_in_one_run() -> None:
    identity(
        """g (float[4] x) => (float[4] y)
        { a = Identity (x)  b = Identity (a)  c = Identity (b)  y = Neg (c) }""",
        "g (float[4] x) => (float[4] y) { y = Neg (x) }",
        ["c", "b", "a"],  # readers before what they read
    )


def test_an_output_keeps_its_name_and_its_producer_takes_it() -> None:
    identity(
        """g (float[4] x) => (float[4] y) <float[4] a>
        { a = Neg (x)  y = Identity (a) }""",
        "g (float[4] x) => (float[4] y) { y = Neg (x) }",
        ["y"],
    )


def test_other_readers_follow_the_producer_to_the_name_of_the_output() -> None:
    identity(
        """g (float[4] x) => (float[4] y, float[4] z)
        { a = Neg (x)  b = Relu (a)  y = Identity (a)  z = Add (a, b) }""",
        """g (float[4] x) => (float[4] y, float[4] z)
        { y = Neg (x)  b = Relu (y)  z = Add (y, b) }""",
        ["y"],
    )


def test_a_chain_before_an_output() -> None:
    identity(
        "g (float[4] x) => (float[4] y) { a = Neg (x)  b = Identity (a)  y = Identity (b) }",
        "g (float[4] x) => (float[4] y) { y = Neg (x) }",
        ["y", "y"],
    )


def test_an_output_of_several_of_a_node() -> None:
    identity(
        """g (float[4] x) => (float[2] y, float[2] z)
        { a, b = Split (x)  y = Identity (b)  z = Neg (a) }""",
        "g (float[4] x) => (float[2] y, float[2] z) { a, y = Split (x)  z = Neg (a) }",
        ["y"],
    )


def test_of_two_outputs_of_one_value_one_stays_an_identity() -> None:
    identity(
        """g (float[4] x) => (float[4] y, float[4] z)
        { a = Neg (x)  y = Identity (a)  z = Identity (a) }""",
        "g (float[4] x) => (float[4] y, float[4] z) { z = Neg (x)  y = Identity (z) }",
        ["z"],
    )


def test_an_output_that_is_another_output_stays() -> None:
    identity("g (float[4] x) => (float[4] y, float[4] z) { y = Neg (x)  z = Identity (y) }", "", [])


def test_an_output_that_is_an_input_stays() -> None:
    identity("g (float[4] x) => (float[4] y) { y = Identity (x) }", "", [])


def test_an_output_that_is_an_initializer_stays() -> None:
    identity("g () => (float[4] y) <float[4] w = {1,2,3,4}> { y = Identity (w) }", "", [])


def test_an_identity_of_an_initializer_goes() -> None:
    identity(
        """g (float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}>
        { v = Identity (w)  y = Add (x, v) }""",
        "g (float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}> { y = Add (x, w) }",
        ["v"],
    )


def test_foreign_operators_of_that_name_stay() -> None:
    identity(
        """<ir_version: 10, opset_import: ["": 17, "f": 1]>
        g (float[4] x) => (float[4] y) { a = f.Identity (x)  y = Neg (a) }""",
        "",
        [],
    )


def test_bodies_read_through_an_outer_identity() -> None:
    identity(
        """g (bool c, float[4] x) => (float[4] y)
        { a = Identity (x)
          y = If (c) <then_branch = t () => (float[4] r) { r = Neg (a) },
                      else_branch = e () => (float[4] s) { s = Add (a, a) }> }""",
        """g (bool c, float[4] x) => (float[4] y)
        { y = If (c) <then_branch = t () => (float[4] r) { r = Neg (x) },
                      else_branch = e () => (float[4] s) { s = Add (x, x) }> }""",
        ["a"],
    )


def test_identities_inside_bodies() -> None:
    """The first goes, the second gives its name away; that of an outer value must stay."""
    identity(
        """g (bool c, float[4] x) => (float[4] y)
        { y = If (c) <then_branch = t () => (float[4] r)
                        { a = Identity (x)  b = Neg (a)  r = Identity (b) },
                      else_branch = e () => (float[4] s) { s = Identity (x) }> }""",
        """g (bool c, float[4] x) => (float[4] y)
        { y = If (c) <then_branch = t () => (float[4] r) { r = Neg (x) },
                      else_branch = e () => (float[4] s) { s = Identity (x) }> }""",
        ["r", "a"],
    )


def test_a_loop_that_passes_its_state_on() -> None:
    identity(
        """g (int64 n, bool c, float[4] x) => (float[4] y)
        { y = Loop (n, c, x) <body = b (int64 i, bool ci, float[4] a) => (bool co, float[4] z)
            { co = Identity (ci)  k = Identity (a)  z = Neg (k) }> }""",
        """g (int64 n, bool c, float[4] x) => (float[4] y)
        { y = Loop (n, c, x) <body = b (int64 i, bool ci, float[4] a) => (bool co, float[4] z)
            { co = Identity (ci)  z = Neg (a) }> }""",
        ["k"],
    )


def test_a_scan_output_computed_in_the_body() -> None:
    identity(
        """g (float[3,4] x) => (float[3,4] y)
        { y = Scan <num_scan_inputs = 1, body = b (float[4] a) => (float[4] z)
            { k = Neg (a)  z = Identity (k) }> (x) }""",
        """g (float[3,4] x) => (float[3,4] y)
        { y = Scan <num_scan_inputs = 1, body = b (float[4] a) => (float[4] z)
            { z = Neg (a) }> (x) }""",
        ["z"],
    )


def test_a_captured_name_gives_way_to_the_output() -> None:
    """Readers in bodies follow when the node that they capture takes the output's name."""
    identity(
        """g (bool c, float[4] x) => (float[4] y, float[4] z)
        { a = Neg (x)
          z = If (c) <then_branch = t () => (float[4] r) { r = Relu (a) },
                      else_branch = e () => (float[4] s) { s = Exp (a) }>
          y = Identity (a) }""",
        """g (bool c, float[4] x) => (float[4] y, float[4] z)
        { y = Neg (x)
          z = If (c) <then_branch = t () => (float[4] r) { r = Relu (y) },
                      else_branch = e () => (float[4] s) { s = Exp (y) }> }""",
        ["y"],
    )


def test_a_name_that_a_body_shadows_stays_out_of_it() -> None:
    """In the body `x` is another value: its reader of `a` cannot read the outer `x`."""
    identity(
        """g (bool c, float[4] x) => (float[4] y)
        { a = Identity (x)
          y = If (c) <then_branch = t () => (float[4] r) { x = Exp (a)  r = Add (x, a) },
                      else_branch = e () => (float[4] s) { s = Neg (a) }> }""",
        "",
        [],
    )


def test_an_output_name_that_a_body_shadows_stays_out_of_it() -> None:
    identity(
        """g (bool c, float[4] x) => (float[4] y, float[4] z)
        { a = Neg (x)
          z = If (c) <then_branch = t () => (float[4] r) { y = Exp (a)  r = Add (y, a) },
                      else_branch = e () => (float[4] s) { s = Neg (a) }>
          y = Identity (a) }""",
        "",
        [],
    )


def test_a_value_that_a_body_returns_keeps_its_name() -> None:
    """Its reader is the body's output, which names it."""
    identity(
        """g (bool c, float[4] x) => (float[4] y)
        { a = Neg (x)  b = Identity (a)
          y = If (c) <then_branch = t () => (float[4] b) { },
                      else_branch = e () => (float[4] s) { s = Neg (a) }> }""",
        "",
        [],
    )


def test_a_scale_that_an_annotation_names_keeps_its_name() -> None:
    proto = graphs.parsed(
        """g (float[4] x) => (float[4] y) <float[1] scale = {1}>
        { k = Identity (scale)  a = Mul (x, k)  y = Neg (a) }"""
    )
    proto.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="k"
    )
    assert run(proto, IDENTITY_PASS) == (proto, [])


def test_a_computed_scale_that_an_annotation_names_gives_its_name_to_no_output() -> None:
    proto = graphs.parsed("g (float[4] x) => (float[4] y) { k = Neg (x)  y = Identity (k) }")
    proto.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="k"
    )
    assert run(proto, IDENTITY_PASS) == (proto, [])


def test_a_body_cannot_rename_what_an_outer_node_computes() -> None:
    identity(
        """g (bool c, float[4] x) => (float[4] y)
        { a = Neg (x)
          y = If (c) <then_branch = t () => (float[4] r) { r = Identity (a) },
                      else_branch = e () => (float[4] s) { s = Exp (x) }> }""",
        "",
        [],
    )


def test_optional_and_sequence_identities_go_too() -> None:
    identity(
        """<ir_version: 10, opset_import: ["": 17]>
        g (seq(float[4]) x, int64 i) => (float[4] y)
        { a = Identity (x)  y = SequenceAt (a, i) }""",
        """<ir_version: 10, opset_import: ["": 17]>
        g (seq(float[4]) x, int64 i) => (float[4] y) { y = SequenceAt (x, i) }""",
        ["a"],
    )


# -- remove-dead -----------------------------------------------------------------------------------


def dead(before: str, expected: str, told: list[str], **fields: int) -> None:
    kinds = {"n": "remove-dead-node", "i": "remove-dead-initializer"}
    golden(
        "remove-dead",
        before,
        expected,
        [f"{kinds[kind]} {name}" for kind, _, name in (entry.partition(" ") for entry in told)],
        **fields,
    )


def test_a_dead_chain_goes_in_one_run_with_its_weights_and_declarations() -> None:
    dead(
        """g (float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}, float[4] v = {1,2,3,4},
                                          float[4] a, float[4] b>
        { a = Add (x, w)  b = Neg (a)  c = Relu (b)  y = Add (x, v) }""",
        """g (float[4] x) => (float[4] y) <float[4] v = {1,2,3,4}> { y = Add (x, v) }""",
        ["n c", "n b", "n a", "i w"],
    )


def test_a_node_of_which_one_output_lives_stays() -> None:
    dead("g (float[4] x) => (float[2] y) { y, b = Split (x) }", "", [])


def test_a_dead_branch_goes_with_what_it_captured() -> None:
    dead(
        """g (bool c, float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}>
        { a = Neg (x)
          b = If (c) <then_branch = t () => (float[4] r) { r = Add (a, w) },
                      else_branch = e () => (float[4] s) { s = Mul (a, w) }>
          y = Exp (x) }""",
        "g (bool c, float[4] x) => (float[4] y) { y = Exp (x) }",
        ["n b", "n a", "i w"],
    )


def test_what_a_living_body_reads_lives() -> None:
    dead(
        """g (bool c, float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}>
        { a = Neg (x)
          y = If (c) <then_branch = t () => (float[4] r) { r = Add (a, w) },
                      else_branch = e () => (float[4] s) { s = Exp (x) }> }""",
        "",
        [],
    )


def test_what_only_a_dead_node_of_a_body_reads_goes() -> None:
    dead(
        """g (bool c, float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}>
        { y = If (c) <then_branch = t () => (float[4] r) <float[4] k = {1,2,3,4}>
                        { a = Add (w, k)  b = Neg (a)  r = Relu (x) },
                      else_branch = e () => (float[4] s) { s = Exp (x) }> }""",
        """g (bool c, float[4] x) => (float[4] y)
        { y = If (c) <then_branch = t () => (float[4] r) { r = Relu (x) },
                      else_branch = e () => (float[4] s) { s = Exp (x) }> }""",
        ["n b", "n a", "i w", "i k"],
    )


def test_a_dead_node_of_a_deeper_body_frees_nodes_around() -> None:
    """Readers go first, wherever they are: one sweep is enough."""
    dead(
        """g (bool c, float[4] x) => (float[4] y)
        { a = Neg (x)
          y = If (c) <then_branch = t () => (float[4] r)
                { k = Neg (a)
                  r = If (c) <then_branch = u () => (float[4] r2) { m = Add (k, a)  r2 = Exp (x) },
                              else_branch = v () => (float[4] s2) { s2 = Neg (x) }> },
              else_branch = e () => (float[4] s) { s = Exp (x) }> }""",
        """g (bool c, float[4] x) => (float[4] y)
        { y = If (c) <then_branch = t () => (float[4] r)
                { r = If (c) <then_branch = u () => (float[4] r2) { r2 = Exp (x) },
                              else_branch = v () => (float[4] s2) { s2 = Neg (x) }> },
              else_branch = e () => (float[4] s) { s = Exp (x) }> }""",
        ["n m", "n k", "n a"],
    )


def test_random_operators_that_nobody_reads_go() -> None:
    dead(
        "g (float[4] x) => (float[4] y) { a = RandomNormalLike (x)  y = Neg (x) }",
        "g (float[4] x) => (float[4] y) { y = Neg (x) }",
        ["n a"],
    )


def test_foreign_operators_stay_with_what_they_read() -> None:
    """They may print or write files."""
    dead(
        """<ir_version: 10, opset_import: ["": 17, "com.example": 1]>
        g (float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}>
        { a = Add (x, w)  b = com.example.Print (a)  y = Neg (x) }""",
        "",
        [],
    )


def test_a_dead_branch_around_a_foreign_operator_stays() -> None:
    dead(
        """<ir_version: 10, opset_import: ["": 17, "com.example": 1]>
        g (bool c, float[4] x) => (float[4] y)
        { b = If (c) <then_branch = t () => (float[4] r) { r = com.example.Print (x) },
                      else_branch = e () => (float[4] s) { s = Exp (x) }>
          y = Neg (x) }""",
        "",
        [],
    )


def test_operators_of_microsoft_and_of_traditional_models_go() -> None:
    dead(
        """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1, "ai.onnx.ml": 3]>
        g (float[4] x) => (float[4] y)
        { a = com.microsoft.Gelu (x)  b = ai.onnx.ml.Normalizer (x)  y = Neg (x) }""",
        """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1, "ai.onnx.ml": 3]>
        g (float[4] x) => (float[4] y) { y = Neg (x) }""",
        ["n b", "n a"],
    )


FUNCTION = """<domain: "local", opset_import: ["": 17, "com.example": 1]>
F (a) => (b) {{ b = {op} (a) }}"""


@pytest.mark.parametrize(("op", "goes"), [("Neg", True), ("com.example.Print", False)])
def test_a_call_of_a_function_is_as_dead_as_its_body_is_pure(op: str, goes: bool) -> None:
    header = '<ir_version: 10, opset_import: ["": 17, "local": 1]>'
    kept = f"{header} g (float[4] x) => (float[4] y) {{ k = local.F (x)  y = Neg (x) }}"
    bare = f"{header} g (float[4] x) => (float[4] y) {{ y = Neg (x) }}"
    function = FUNCTION.format(op=op)
    told = ["n k"] if goes else []
    dead(f"{kept}\n{function}", f"{bare if goes else kept}\n{function}", told)


def test_a_node_without_any_output_stays() -> None:
    """It cannot be for its outputs that it is there."""
    proto = graphs.model([graphs.node("Neg", ["x"], []), graphs.node("Neg", ["x"], ["y"])])
    assert run(proto, "remove-dead") == (proto, [])


def test_an_output_that_is_an_initializer_lives() -> None:
    dead("g () => (float[4] w) <float[4] w = {1,2,3,4}> { }", "", [])


def test_unread_inputs_stay_with_their_defaults() -> None:
    """A caller may feed them: they are part of the interface."""
    dead("g (float[4] x, float[4] d = {1,2,3,4}) => (float[4] y) { y = Neg (x) }", "", [])


def test_below_ir_4_an_unread_initializer_goes_with_the_input_that_lists_it() -> None:
    dead(
        """g (float[4] x, float[4] d = {1,2,3,4}, float[4] e = {1,2,3,4}) => (float[4] y)
        { y = Add (x, e) }""",
        "g (float[4] x, float[4] e = {1,2,3,4}) => (float[4] y) { y = Add (x, e) }",
        ["i d"],
        ir_version=3,
    )


def test_scales_that_annotations_name_stay() -> None:
    proto = graphs.parsed(
        """g (float[4] x) => (float[4] y) <float[1] scale = {1}, float[1] other = {1}>
        { y = Neg (x) }"""
    )
    proto.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="scale"
    )
    made, told = run(proto, "remove-dead")
    assert [tensor.name for tensor in made.graph.initializer] == ["scale"]
    assert told == ["remove-dead-initializer other"]
    assert made.graph.quantization_annotation == proto.graph.quantization_annotation


def test_what_training_reads_stays() -> None:
    proto = graphs.parsed(
        """g (float[4] x) => (float[4] y) <float[1] rate = {1}, float[1] other = {1}>
        { loss = Exp (x)  unread = Exp (x)  y = Neg (x) }"""
    )
    info = proto.training_info.add()
    info.algorithm.node.append(graphs.node("Mul", ["loss", "rate"], ["step"]))
    made, told = run(proto, "remove-dead")
    assert [tensor.name for tensor in made.graph.initializer] == ["rate"]
    assert [n.output[0] for n in made.graph.node] == ["loss", "y"]
    assert told == ["remove-dead-node unread", "remove-dead-initializer other"]


def test_a_value_that_a_body_returns_lives() -> None:
    dead(
        """g (bool c, float[4] x) => (float[4] y)
        { a = Neg (x)
          y = If (c) <then_branch = t () => (float[4] a) { },
                      else_branch = e () => (float[4] s) { s = Neg (x) }> }""",
        "",
        [],
    )


def test_large_weights_go_from_the_file(tmp_path: Path) -> None:
    proto = graphs.matmul()
    proto.graph.initializer.append(graphs.weight("unused", (1000, 100)))
    path = graphs.save(proto, tmp_path / "m.onnx")
    loaded = Model.load(path)
    (one,) = run_pipeline(loaded, pipeline(0, "remove-dead"))
    (change,) = one.changes
    assert change.before == "unused [1000,100], 400000 B"
    exporter.save(loaded, tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == graphs.matmul()


# -- freeze-parameters -----------------------------------------------------------------------------


def freeze(before: str, expected: str, told: list[str], **fields: int) -> None:
    golden(
        "freeze-parameters",
        before,
        expected,
        [f"freeze-parameter {name}" for name in told],
        **fields,
    )


CONV = """g (float[1,1,4,4] x{listed}) => (float[1,1,4,4] y)
<{initializers}>
{{ a = Conv (x, w, b)  y = BatchNormalization (a, g1, g2, g3, g4) }}"""
NAMES = ("w", "b", "g1", "g2", "g3", "g4")


def _conv(listed: bool) -> onnx.ModelProto:
    proto = graphs.parsed(CONV.format(listed="", initializers="float[1] k = {1}"))
    del proto.graph.initializer[:]
    shapes = {"w": (1, 1, 1, 1)}
    for name in NAMES:
        tensor = graphs.weight(name, shapes.get(name, (1,)))
        proto.graph.initializer.append(tensor)
        if listed:
            proto.graph.input.append(graphs.value(name, tensor.dims))
    return proto


def test_weights_that_an_old_exporter_listed_are_frozen() -> None:
    made, told = run(_conv(listed=True), "freeze-parameters")
    assert made == _conv(listed=False)
    assert told == [f"freeze-parameter {name}" for name in NAMES]


@pytest.mark.parametrize("ir", [3])
def test_below_ir_4_the_list_has_to_stay(ir: int) -> None:
    proto = _conv(listed=True)
    proto.ir_version = ir
    assert run(proto, "freeze-parameters") == (proto, [])


def test_states_stay_feedable() -> None:
    """initial_h of a GRU (slot 5) is meant to be fed, R (slot 2) is not."""
    text = """g (float[3,1,4] x{listed}, float[1,1,2] h = {{1,2}}) => (float[1,1,2] y)
    <float[1,6,4] w = {{{w}}}{initializer}> {{ , y = GRU <hidden_size = 2> (x, w, r, , , h) }}"""
    zeros = ",".join(["0"] * 24), ",".join(["0"] * 12)
    before = graphs.parsed(
        text.format(listed="", initializer="", w=zeros[0]).replace("r,", "w,", 1)
    )
    before.graph.node[0].input[2] = "r"
    expected = graphs.parsed(
        text.format(listed="", initializer="", w=zeros[0]).replace("r,", "w,", 1)
    )
    expected.graph.node[0].input[2] = "r"
    r = graphs.weight("r", (1, 6, 2))
    for proto in (before, expected):
        proto.graph.initializer.append(r)
    before.graph.input.append(graphs.value("r", (1, 6, 2)))
    made, told = run(before, "freeze-parameters")
    assert made == expected
    assert told == ["freeze-parameter r"]


def test_inputs_with_a_default_elsewhere_stay() -> None:
    freeze(
        "g (float[4] x, float[4] d = {1,2,3,4}) => (float[4] y) { y = Add (x, d) }",
        "",
        [],
    )


def test_a_weight_that_also_serves_elsewhere_stays() -> None:
    freeze(
        """g (float[1,2] x, float[2,2] w = {1,2,3,4}) => (float[1,2] y, float[2,2] z)
        { y = MatMul (x, w)  z = Neg (w) }""",
        "",
        [],
    )


def test_a_weight_in_another_slot_of_the_same_node_stays() -> None:
    """The left operand of MatMul is data."""
    freeze(
        "g (float[2,2] w = {1,2,3,4}) => (float[2,2] y) { y = MatMul (w, w) }",
        "",
        [],
    )


def test_an_input_without_readers_or_that_is_an_output_stays() -> None:
    freeze(
        """g (float[1,2] x, float[2,2] d = {1,2,3,4}, float[2,2] w = {1,2,3,4})
           => (float[1,2] y, float[2,2] w)
        { y = MatMul (x, w) }""",
        "",
        [],
    )


def test_an_input_without_a_default_stays() -> None:
    freeze("g (float[1,2] x, float[2,2] w) => (float[1,2] y) { y = MatMul (x, w) }", "", [])


def test_a_parameter_read_in_a_body_is_frozen() -> None:
    text = """g (bool c, float[1,2] x{listed}) => (float[1,2] y) {initializer}
    {{ y = If (c) <then_branch = t () => (float[1,2] r) {{ r = MatMul (x, w) }},
                   else_branch = e () => (float[1,2] s) {{ s = Neg (x) }}> }}"""
    freeze(
        text.format(listed=", float[2,2] w = {1,2,3,4}", initializer=""),
        text.format(listed="", initializer="<float[2,2] w = {1,2,3,4}>"),
        ["w"],
    )


def test_foreign_operators_have_no_parameter_slots() -> None:
    freeze(
        """<ir_version: 10, opset_import: ["": 17, "f": 1]>
        g (float[1,2] x, float[2,2] w = {1,2,3,4}) => (float[1,2] y) { y = f.MatMul (x, w) }""",
        "",
        [],
    )


# -- on every model --------------------------------------------------------------------------------


def interface(proto: onnx.ModelProto) -> list[object]:
    """Inputs without a default and outputs, complete."""
    defaults = {tensor.name for tensor in proto.graph.initializer}
    inputs = [info for info in proto.graph.input if info.name not in defaults]
    return [[info.SerializeToString() for info in infos] for infos in (inputs, proto.graph.output)]


@pytest.mark.parametrize("level", [level for level in LEVELS if level])
@pytest.mark.parametrize("path", [*graphs.ARCHITECTURES, *graphs.DIGITS], ids=lambda p: p.stem)
def test_levels_are_idempotent_and_keep_the_interface(path: Path, level: int) -> None:
    first = Model.load(path)
    runs = run_pipeline(first, pipeline(level, None))
    assert not any(one.error for one in runs)
    made = exporter.to_proto(first)
    assert interface(made) == interface(onnx.load(path))
    second = Model.load(made)
    more = run_pipeline(second, pipeline(level, None))
    assert [change for one in more for change in one.changes] == []
    assert exporter.to_proto(second) == made
    assert len(made.graph.node) <= len(onnx.load(path).graph.node)
    unread = {i for n in second.nodes() for i in n.inputs}
    assert all(v in unread or v.is_output or v.is_input for v in second.graph.initializers)


def test_there_is_something_to_clean_in_architectures() -> None:
    """Else the test above would prove nothing."""
    fired = set()
    for path in graphs.ARCHITECTURES:
        for one in run_pipeline(Model.load(path), pipeline(2, None)):
            fired.update(change.rule for change in one.changes)
    assert IDENTITY_RULE in fired


def test_a_value_that_stands_for_two_outputs_of_a_split() -> None:
    """One of them is an output of the graph, and keeps its name: the other cannot have it too."""
    proto = graphs.parsed(
        """g (float[2] v) => (float[2] a, float[2] y) <int64[2] sizes = {2, 2}>
        { w = Neg (v)  j = Concat <axis = 0> (w, w)  a, b = Split (j, sizes)  y = Abs (b) }"""
    )
    made, _ = goldens.run(proto, "canonicalize")
    goldens.check(proto, made, "canonicalize")
