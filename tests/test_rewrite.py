"""Firing rules: what is written in place of a match, what must not be, and what comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import graphopt.passes.rules
from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.rewrite import Tally, apply_rules
from graphopt.rules import (
    RULES,
    Const,
    Ops,
    Rewrite,
    Rule,
    RuleError,
    Var,
    Vars,
    absent,
    compile_rule,
    require,
)
from graphopt.runtime import Session
from tests import graphs
from tests.graphs import node, value
from tests.rule_runs import differs

assert graphopt.passes.rules.FAMILIES  # importing them registers their rules

# -- helpers -------------------------------------------------------------------------------------


def compiled(function: Callable[..., Rewrite], **limits: Any) -> Rule:
    return compile_rule(function.__name__, function, **limits)


def load(text: str, opset: int = 17) -> Model:
    header = f'<ir_version: 10, opset_import: ["": {opset}]>'
    return Model.load(onnx.parser.parse_model(f"{header}\n{text}"))


def rewritten(rules: Rule | list[Rule], model: Model) -> tuple[onnx.ModelProto, Editor]:
    edit = Editor(model)
    apply_rules(rules if isinstance(rules, list) else [rules], edit)
    made = exporter.to_proto(model)
    onnx.checker.check_model(made)
    return made, edit


def same(before: onnx.ModelProto, after: onnx.ModelProto, feed: dict[str, Any]) -> None:
    one, other = (
        Session(proto.SerializeToString(), optimizations="off").run(feed)
        for proto in (before, after)
    )
    for name, wanted in one.items():
        assert differs(wanted, other[name], "float32") == ""


def ops(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


def negate_twice(op: Ops, x: Var) -> Rewrite:
    """Neg(Neg(x)) => x."""
    yield op.Neg(op.Neg(x))
    return x


# -- hostile graphs ------------------------------------------------------------------------------


def test_a_sum_that_spreads_the_normalised_value_is_not_fused() -> None:
    """A skip fusion takes two values of one shape; here the sum has twice the rows."""

    def fuse_skip(op: Ops, x: Var, r: Var, gamma: Const) -> Rewrite:
        """LayerNormalization(x) + r => LayerNormalization(x), as if r were of its shape."""
        normed = op.LayerNormalization(x, gamma)
        yield op.Add(normed, r)
        return op.LayerNormalization(x, gamma, **normed.attrs)

    text = """g (float[1, 5, 8] x, float[%s, 5, 8] r) => (float[%s, 5, 8] y)
        <float[8] k = {1, 1, 1, 1, 1, 1, 1, 1}> {
        n = LayerNormalization (x, k)  s = Add (n, r)  y = Abs (s) }"""
    _, edit = rewritten(compiled(fuse_skip), load(text % (2, 2)))
    assert edit.changes == []
    [(_, _, reason)] = edit.rejections
    assert reason == "'s' would turn from float[2,5,8] into float[1,5,8]"
    _, edit = rewritten(compiled(fuse_skip), load(text % (1, 1)))
    assert len(edit.changes) == 1


@pytest.mark.parametrize(("shape", "fuses"), [((4, 1, 1), True), ((4,), False), ((4, 1), False)])
@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_a_vector_as_long_as_channels_and_width(
    op: str, shape: tuple[int, ...], fuses: bool
) -> None:
    weights = [graphs.weight("w", (4, 3, 1, 1), 1), graphs.weight("c", shape, 2)]
    nodes = [
        node("Conv", ["x", "w"], ["p"]),
        node(op, ["p", "c"], ["q"]),
        node("Abs", ["q"], ["y"]),
    ]
    infos = [value("x", (2, 3, 4, 4))], [value("y", (2, 4, 4, 4))]
    before = graphs.model(nodes, *infos, weights)
    after, _ = rewritten(RULES[f"fuse-conv-{op.lower()}"], Model.load(before))
    assert (op not in ops(after)) is fuses
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)}
    same(before, after, feed)


@pytest.mark.parametrize(
    ("shape", "fed"),
    [
        ((2, 3, 4), (2, 3, 4)),
        (("a", "b", "c"), (2, 3, 4)),
        (("a", "b", "c"), (4, 3, 2)),
        (("a", "b", "c"), (6, 2, 2)),
        ((2, "b", "b"), (2, 6, 4)),
    ],
)
@pytest.mark.parametrize("target", [(0, -1), (-1, 0), (0, 0), (0, 1, -1)])
def test_zeros_of_a_reshape_copy_from_its_own_input(
    shape: tuple[int | str, ...], fed: tuple[int, ...], target: tuple[int, ...]
) -> None:
    """One zero in the first Reshape, others in the second, whose input has other sizes."""
    consts = [("s", (-1, fed[0])), ("t", target)]
    tensors = [onnx.numpy_helper.from_array(np.asarray(v, np.int64), n) for n, v in consts]
    nodes = [node("Transpose", ["x"], ["p"], perm=[2, 0, 1])]
    nodes += [node("Reshape", ["p", "s"], ["q"]), node("Reshape", ["q", "t"], ["r"])]
    nodes.append(node("Abs", ["r"], ["y"]))
    out = [value("y", [None] * len(target))]
    before = graphs.model(nodes, [value("x", shape)], out, tensors)
    after, _ = rewritten(list(RULES.values()), Model.load(before))
    same(before, after, {"x": np.random.default_rng(0).normal(size=fed).astype(np.float32)})


def test_a_constant_with_two_meanings_stays_for_the_other() -> None:
    """`c` scales a convolution that takes it in, and is the bias of another."""
    weights = [graphs.weight("w", (4, 4, 1, 1), 1), graphs.weight("c", (4, 1, 1), 2)]
    nodes = [
        node("Conv", ["x", "w"], ["p"]),
        node("Mul", ["p", "c"], ["q"]),
        node("Conv", ["q", "w"], ["r"]),
        node("Add", ["c", "r"], ["s"]),
        node("Abs", ["c"], ["z"]),
        node("Abs", ["s"], ["y"]),
    ]
    infos = [value("x", (1, 4, 5, 6))], [value("y", (1, 4, 5, 6)), value("z", (4, 1, 1))]
    before = graphs.model(nodes, *infos, weights)
    rules = [RULES["fuse-conv-mul"], RULES["fuse-conv-add"]]
    after, edit = rewritten(rules, Model.load(before))
    assert [change.rule for change in edit.changes] == ["fuse-conv-add", "fuse-conv-mul"]
    same(before, after, {"x": np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype("f")})


@pytest.mark.parametrize("condition", [True, False])
def test_a_weight_of_both_branches(condition: bool) -> None:
    """Each branch changes its own copy; the shared one stays, and is stored once."""
    bodies = []
    for name in ("then", "else"):
        scale = graphs.weight(f"{name}_c", (4, 1, 1), len(name))
        inner = [
            node("Conv", ["x", "w"], [f"{name}_p"]),
            node("Mul" if name == "then" else "Add", [f"{name}_p", f"{name}_c"], [f"{name}_q"]),
            node("Abs", [f"{name}_q"], [f"{name}_y"]),
        ]
        bodies.append(graphs.graph(inner, [], [value(f"{name}_y", (1, 4, 5, 6))], [scale]))
    nodes = [graphs.if_node(*bodies), node("Conv", ["x", "w"], ["z"])]
    infos = [graphs.CONDITION, value("x", (1, 4, 5, 6))]
    outputs = [value("y", (1, 4, 5, 6)), value("z", (1, 4, 5, 6))]
    before = graphs.model(nodes, infos, outputs, [graphs.weight("w", (4, 4, 1, 1), 1)])
    rules = [RULES["fuse-conv-mul"], RULES["fuse-conv-add"]]
    after, edit = rewritten(rules, Model.load(before))
    assert sorted(change.root for change in edit.changes) == ["else_q", "then_q"]
    assert [t.name for t in after.graph.initializer] == ["w"]
    assert list(after.graph.initializer) == list(before.graph.initializer)
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    same(before, after, {"x": x, "c": np.asarray(condition)})


# -- what is written -----------------------------------------------------------------------------


def test_the_root_keeps_its_name_and_what_is_new_derives_from_it() -> None:
    def lower(op: Ops, x: Var) -> Rewrite:
        """Softplus(x) => Log(Exp(x) + 1)."""
        yield op.Softplus(x)
        return op.Log(op.Add(op.Exp(x), 1.0))

    model = load("g (float[2] x) => (float[2] y) { p = Softplus (x)  y = Abs (p) }")
    made, edit = rewritten(compiled(lower), model)
    assert [list(n.output) for n in made.graph.node] == [["p/Exp"], ["p/Add"], ["p"], ["y"]]
    assert [t.name for t in made.graph.initializer] == ["p/constant"]
    assert {n.outputs[0].name: n.rule for n in model.nodes() if n.outputs[0]} == {
        "p/Exp": "lower",
        "p/Add": "lower",
        "p": "lower",
        "y": "",
    }
    [change] = edit.changes
    assert (change.rule, change.root) == ("lower", "p")
    assert change.before == "p = Softplus (x)"


def test_attributes_and_inputs_by_the_opset() -> None:
    def clip(op: Ops, x: Var) -> Rewrite:
        """Relu(x) => Squeeze(Unsqueeze(Clip(x, 0, 9)))."""
        yield op.Relu(x)
        return op.Squeeze(op.Unsqueeze(op.Clip(x, min=0.0, max=9.0), axes=[0]), axes=[0])

    text = "g (float[2] x) => (float[2] y) { y = Relu (x) }"
    for opset, inputs in ((10, (1, 1, 1)), (11, (3, 1, 1)), (13, (3, 2, 2))):
        made, _ = rewritten(compiled(clip), load(text, opset))
        assert ops(made) == ["Clip", "Unsqueeze", "Squeeze"]
        assert tuple(len(n.input) for n in made.graph.node) == inputs
        feed = {"x": np.asarray([-3.0, 20.0], np.float32)}
        [found] = Session(made.SerializeToString()).run(feed).values()
        assert found.tolist() == [0.0, 9.0]


def test_what_an_opset_cannot_say_is_rejected() -> None:
    def newer(op: Ops, x: Var) -> Rewrite:
        """Relu(x) => Gelu(x), where there is one."""
        yield op.Relu(x)
        return op.Gelu(x)

    def stating(op: Ops, x: Var) -> Rewrite:
        """Relu(x) => Cast(x, saturate=0), where there is that."""
        yield op.Relu(x)
        return op.Cast(x, to=TensorProto.FLOAT, saturate=0)

    for function, opset in ((newer, 20), (stating, 19)):
        text = "g (float[2] x) => (float[2] y) { p = Abs (x) q = Relu (p) y = Abs (q) }"
        assert len(rewritten(compiled(function), load(text, opset))[1].changes) == 1
        _, edit = rewritten(compiled(function), load(text, opset - 1))
        assert edit.changes == []
        assert f"in opset {opset - 1}" in edit.rejections[0][2]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)]
)
def test_new_constants_have_the_type_of_what_is_rewritten(kind: int, dtype: type) -> None:
    def scale(op: Ops, x: Var, c: Const) -> Rewrite:
        """Abs(x * c) => x * (c * 1000)."""
        yield op.Abs(op.Mul(x, c))
        assert c.values.dtype == (np.float64 if c.dtype == np.float64 else np.float32)
        return op.Mul(x, c.values * 1000)

    for factor, fires in ((2.0, True), (1e300, False), (600.0, kind == TensorProto.DOUBLE)):
        if factor > 1e4 and kind == TensorProto.FLOAT16:
            continue
        tensor = onnx.numpy_helper.from_array(np.asarray(factor, dtype), "c")
        nodes = [node("Mul", ["x", "c"], ["p"]), node("Abs", ["p"], ["y"])]
        infos = [value(name, (2,), kind) for name in "xy"]
        model = Model.load(graphs.model(nodes, infos[:1], infos[1:], [tensor]))
        made, edit = rewritten(compiled(scale), model)
        fires = fires or factor == 1e300  # 1e303 is a double
        assert bool(edit.changes) is fires
        if fires:
            new = next(t for t in made.graph.initializer if t.name != "c")
            assert (new.data_type, onnx.numpy_helper.to_array(new)) == (kind, factor * 1000)
        else:
            assert edit.rejections[0][2] == "a new constant is not finite as float16"


def test_what_an_operator_does_not_take_is_rejected() -> None:
    """onnx's inference gives such nodes a type; onnxruntime refuses the whole model."""

    def gate(op: Ops, x: Var) -> Rewrite:
        """Abs(Neg(x)) => HardSigmoid(x), of numbers of any kind."""
        yield op.Abs(op.Neg(x))
        return op.HardSigmoid(x)

    def halve(op: Ops, x: Var) -> Rewrite:
        """Abs(Neg(x)) => x * 0.5, of numbers of any kind."""
        yield op.Abs(op.Neg(x))
        return op.Mul(x, 0.5)

    for function, reason in (
        (gate, "HardSigmoid does not take int64"),
        (halve, "Mul takes no float beside int64"),
    ):
        text = "g (int64[2] x) => (int64[2] y) { p = Neg (x)  y = Abs (p) }"
        _, edit = rewritten(compiled(function), load(text))
        assert [rejection[2] for rejection in edit.rejections] == [reason]
        _, edit = rewritten(compiled(function), load(text.replace("int64", "float")))
        assert len(edit.changes) == 1


def test_an_optional_input_that_is_left_out_reads_as_its_default() -> None:
    seen = []

    def bias(op: Ops, x: Var, w: Const, b: Const = absent(0.0)) -> Rewrite:
        """Abs(Conv(x, w, b)) => Conv(x, w, b)."""
        conv = op.Conv(x, w, b)
        yield op.Abs(conv)
        seen.append((b.is_absent, b.values.tolist()))
        return op.Conv(x, w, b, **conv.attrs)

    text = """g (float[1, 1, 3] x) => (float[1, 1, 3] y) <float[1, 1, 1] w = {1}, float[1] b = {5}>
        { p = Conv (x, w%s)  y = Abs (p) }"""
    for stated, inputs in (("", 2), (", b", 3)):
        made, _ = rewritten(compiled(bias), load(text % stated))
        assert len(made.graph.node[0].input) == inputs
    assert seen == [(True, 0.0), (False, [5.0])]


def test_several_outputs_are_replaced_together() -> None:
    def split_of_concat(op: Ops, xs: Vars) -> Rewrite:
        """Split(Concat(xs)) => xs."""
        split = op.Split(op.Concat(xs, axis=0), outputs=None)
        yield split
        require(len(split) == len(xs), "another number of parts")
        return list(xs)

    text = """g (float[2] a, float[%s] b) => (float[2] y, float[N] z) {
        p = Abs (a)  q = Abs (b)  c = Concat <axis = 0> (p, q)  s, t = Split (c)
        y = Neg (s)  z = Neg (t) }"""
    made, _ = rewritten(compiled(split_of_concat), load(text % 2, 11))
    assert ops(made) == ["Abs", "Abs", "Neg", "Neg"]
    made, edit = rewritten(compiled(split_of_concat), load(text % 4, 11))
    assert edit.changes == []
    assert "would turn from float[3] into float[2]" in edit.rejections[0][2]


def test_an_output_that_nobody_needs_goes_with_its_node() -> None:
    def still(op: Ops, x: Var) -> Rewrite:
        """Dropout(x) => Abs(x)."""
        yield op.Dropout(x)
        return op.Abs(x)

    model = load("g (float[2] x) => (float[2] y) { q, m = Dropout (x)  y = Neg (q) }")
    before = exporter.to_proto(model)
    made, edit = rewritten(compiled(still), model)
    assert ops(made) == ["Abs", "Neg"]
    assert "m" not in model.graph.values
    edit.undo_to((0, 0))
    assert exporter.to_proto(model) == before


# -- the order of things -------------------------------------------------------------------------


def test_what_a_rewrite_makes_possible_is_found() -> None:
    """Three operators up: the reader of a reader of what has changed is looked at again."""

    def lower(op: Ops, x: Var) -> Rewrite:
        """Softplus(x) => Exp(x)."""
        yield op.Softplus(x)
        return op.Exp(x)

    def deep(op: Ops, x: Var) -> Rewrite:
        """Neg(Neg(Abs(Exp(x)))) => Tanh(x)."""
        yield op.Neg(op.Neg(op.Abs(op.Exp(x))))
        return op.Tanh(x)

    text = "g (float[2] x) => (float[2] y) { p = Softplus (x) q = Abs (p) r = Neg (q) y = Neg (r) }"
    made, _ = rewritten([compiled(lower), compiled(deep)], load(text))
    assert ops(made) == ["Tanh"]


def test_what_loses_a_reader_is_looked_at_again() -> None:
    def forget(op: Ops, x: Var) -> Rewrite:
        """x * 0 => ConstantOfShape(Shape(other))."""
        yield op.Mul(x, 0.0)
        return op.Add(1.0, [1.0, 2.0])

    text = """g (float[2] x) => (float[2] y, float[2] z) <float k = {0}>
        { p = Neg (x)  y = Neg (p)  z = Mul (p, k) }"""
    made, edit = rewritten([compiled(negate_twice), compiled(forget)], load(text))
    assert [change.root for change in edit.changes] == ["z"]
    text = """g (float[2] x) => (float[2] y, float[2] z) <float k = {0}>
        { a = Abs (x) p = Neg (a)  y = Neg (p)  z = Mul (p, k) }"""
    made, edit = rewritten([compiled(negate_twice), compiled(forget)], load(text))
    assert [change.root for change in edit.changes] == ["z", "y"]
    assert ops(made) == ["Abs", "Add"]


def test_rules_that_undo_one_another_end_in_an_error() -> None:
    def one(op: Ops, x: Var) -> Rewrite:
        """Neg(x) => Abs(x)."""
        yield op.Neg(x)
        return op.Abs(x)

    def other(op: Ops, x: Var) -> Rewrite:
        """Abs(x) => Neg(x)."""
        yield op.Abs(x)
        return op.Neg(x)

    model = load("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    before = exporter.to_proto(model)
    edit = Editor(model)
    with pytest.raises(RuleError, match="undo one another without end"):
        apply_rules([compiled(one), compiled(other)], edit)
    edit.undo_to((0, 0))
    assert exporter.to_proto(model) == before


def test_what_is_denied_is_not_done_and_what_is_rejected_is_told() -> None:
    def refuse(op: Ops, x: Var) -> Rewrite:
        """Abs(x) => x, never."""
        yield op.Abs(x)
        require(False, "the reason")
        return x

    text = "g (float[2] x) => (float[2] y) { a = Abs (x) b = Neg (a) c = Neg (b) y = Sqrt (c) }"
    edit = Editor(load(text), denied={("negate_twice", "c")})
    tally = apply_rules([compiled(negate_twice), compiled(refuse)], edit, Tally())
    assert edit.changes == []
    assert tally.rejected == {("refuse", "the reason"): 1}
    assert edit.rejections == [("refuse", "Abs 'a'", "the reason")]


# -- rules that fail on a match ------------------------------------------------------------------


def twice(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    yield op.Abs(x)
    yield op.Abs(x)


def nothing(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    yield op.Abs(x)


def branches(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    yield op.Neg(x) if STATE else op.Abs(x)
    return x


def attributes_of_a_parameter(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    yield op.Abs(x)
    return op.Neg(x, **x.attrs)


def unknown_attribute(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    yield op.Abs(x)
    return op.Cast(x, to=1, colour="red")


STATE: list[int] = []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (twice, "yields twice"),
        (nothing, "does not return the value that takes the root's place"),
        (branches, "draws another pattern on a match: it branches"),
        (attributes_of_a_parameter, "only operators have attributes"),
        (unknown_attribute, "Cast has no attribute colour"),
    ],
)
def test_a_rule_that_is_written_wrongly_shows_when_it_fires(
    function: Callable[..., Rewrite], message: str
) -> None:
    found = compiled(function)
    STATE.append(1)
    try:
        with pytest.raises(RuleError, match=message):
            apply_rules([found], Editor(load("g (float[2] x) => (float[2] y) { y = Abs (x) }")))
    finally:
        STATE.clear()
