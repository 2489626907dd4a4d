"""The rule language and the matcher: what is a rule, and everything that a pattern fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import graphopt.passes.rules
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.rewrite import apply_rules
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
    rule,
)
from tests import graphs
from tests.graphs import node, value
from tests.rule_cases import Choice, draw
from tests.rule_choices import elements, opsets, ways
from tests.rule_contexts import Case
from tests.rule_runs import batches, check

assert graphopt.passes.rules.FAMILIES  # importing them registers their rules

# -- rules and graphs to match -------------------------------------------------------------------


def factor(op: Ops, x: Var, a: Const, b: Const) -> Rewrite:
    """x*a + x*b => x*(a + b)."""
    yield op.Add(op.Mul(x, a), op.Mul(x, b))
    return op.Mul(x, a.values + b.values)


def double_negation(op: Ops, x: Var) -> Rewrite:
    """Neg(Neg(x)) => x."""
    yield op.Neg(op.Neg(x))
    return x


def compiled(function: Callable[..., Rewrite], **limits: Any) -> Rule:
    return compile_rule(function.__name__, function, **limits)


def fired(
    rules: Rule | list[Rule], text: str, opset: int = 17, ir: int = 10
) -> list[tuple[str, str]]:
    """What fires on the graph, by rule and root."""
    header = f'<ir_version: {ir}, opset_import: ["": {opset}]>'
    edit = Editor(Model.load(onnx.parser.parse_model(f"{header}\n{text}")))
    apply_rules(rules if isinstance(rules, list) else [rules], edit)
    return [(change.rule, change.root) for change in edit.changes]


# -- completeness --------------------------------------------------------------------------------


@pytest.mark.parametrize("swaps", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("x", ["x", "k"])  # k: a constant could stand for x, a and b alike
def test_a_factor_is_found_in_every_operand_order(x: str, swaps: tuple[bool, ...]) -> None:
    first, second, outer = (("{1}, {0}" if swap else "{0}, {1}") for swap in swaps)
    text = f"""g (float[3] x) => (float[3] y) <float[3] k = {{1, 2, 3}}, float[3] a = {{4, 5, 6}},
        float[3] b = {{7, 8, 9}}>
        {{ p = Mul ({first.format(x, "a")})  q = Mul ({second.format(x, "b")})
           z = Add ({outer.format("p", "q")})  y = Abs (z) }}"""
    assert fired(compiled(factor), text) == [("factor", "z")]


@pytest.mark.parametrize("name", ["fuse-gelu", "fuse-layer-norm"])
def test_fires_on_every_alternative_in_every_operand_order(name: str) -> None:
    """More than the generated tests draw: the product of all of them."""
    found = RULES[name]
    opset = opsets(found)[-1]
    made = []
    for root, options in ways(found):
        swaps = [
            index
            for index in elements(found, root, options)[0]
            if found.nodes[index].op in ("Add", "Mul") and len(set(found.nodes[index].operands)) > 1
        ]
        for order in itertools.product((False, True), repeat=len(swaps)):
            swapped = frozenset(itertools.compress(swaps, order))
            choice = Choice(opset, options, root, swapped=swapped)
            made.append(Case(str(choice), draw(found, choice), True))
    assert len(made) >= 32
    prepared, refused = batches(made)
    assert not refused
    assert [failure for batch in prepared for failure in check(found, batch)] == []


def test_a_later_choice_is_tried_when_an_earlier_one_ends_in_nothing() -> None:
    def chain(op: Ops, x: Var, a: Const) -> Rewrite:
        """Neg(f(x) * a) => Neg(x)."""
        inner = op.Abs(op.Abs(x)) | op.Abs(x)
        yield op.Neg(op.Mul(inner, a))
        return op.Neg(x)

    text = "g (float[1] x) => (float[1] y) <float[1] a = {1}> { p = Abs (x)  %s  y = Neg (m) }"
    assert fired(compiled(chain), text % "m = Mul (a, p)") == [("chain", "y")]
    assert fired(compiled(chain), text % "q = Abs (p)  m = Mul (q, a)") == [("chain", "y")]


def test_one_name_stands_for_one_value() -> None:
    def square(op: Ops, x: Var) -> Rewrite:
        """Abs(x * x) => x * x."""
        yield op.Abs(op.Mul(x, x))
        return op.Mul(x, x)

    text = "g (float[3] x, float[3] z) => (float[3] y) { p = Mul (x, %s)  y = Abs (p) }"
    assert fired(compiled(square), text % "x") == [("square", "y")]
    assert fired(compiled(square), text % "z") == []


def test_two_random_draws_are_two_values() -> None:
    def square(op: Ops, x: Var) -> Rewrite:
        """r * r => Abs(r), r random."""
        draw = op.RandomNormalLike(x)
        yield op.Mul(draw, draw)
        return op.Abs(op.RandomNormalLike(x))

    text = """g (float[3] x) => (float[3] y)
        { r = RandomNormalLike (x)  s = RandomNormalLike (x)  y = Mul (r, %s) }"""
    assert fired(compiled(square), text % "s") == []
    assert fired(compiled(square), text % "r") == [("square", "y")]


def test_any_number_of_inputs() -> None:
    def nested(op: Ops, xs: Vars, ys: Vars) -> Rewrite:
        """Sum(xs) of one operand => that operand."""
        yield op.Sum(xs)
        require(len(xs) == 1, "it adds")
        return next(iter(xs))

    with pytest.raises(RuleError, match="unbound"):
        compiled(nested)

    def single(op: Ops, xs: Vars) -> Rewrite:
        """Sum(x) => x."""
        yield op.Sum(xs)
        require(len(xs) == 1, "it adds")
        return next(iter(xs))

    text = "g (float[3] x) => (float[3] y) { p = Abs (x)  q = Sum (p%s)  y = Neg (q) }"
    assert fired(compiled(single), text % "") == [("single", "q")]
    assert fired(compiled(single), text % ", x") == []


# -- what does not match -------------------------------------------------------------------------


def test_an_operator_of_another_domain_is_another_operator() -> None:
    found = graphs.model(
        [node("Neg", ["x"], ["p"], domain="com.microsoft"), node("Neg", ["p"], ["y"])],
        domains=["com.microsoft"],
    )
    edit = Editor(Model.load(found))
    apply_rules([compiled(double_negation)], edit)
    assert edit.changes == []


@pytest.mark.parametrize(
    ("rest", "outputs"),
    [
        ("y = Abs (q)", "float[3] y, float[3] p"),  # an output
        ("y = Add (q, p)", "float[3] y"),  # another reader
        (
            """y = If (c) <then_branch = t () => (float[3] a) { a = Add (q, p) },
            else_branch = e () => (float[3] b) { b = Abs (q) }>""",
            "float[3] y",
        ),  # a reader in a body
    ],
)
def test_interior_values_are_nobody_elses(rest: str, outputs: str) -> None:
    text = (
        f"g (bool c, float[3] x) => ({outputs}) {{ z = Abs (x) p = Neg (z)  q = Neg (p)  {rest} }}"
    )
    assert fired(compiled(double_negation), text) == []
    alone = rest.replace(", p)", ", q)")
    text = (
        f"g (bool c, float[3] x) => (float[3] y) {{ z = Abs (x) p = Neg (z) q = Neg (p) {alone} }}"
    )
    assert fired(compiled(double_negation), text) == [("double_negation", "q")]


def test_a_match_lies_in_one_graph() -> None:
    text = """g (bool c, float[3] x) => (float[3] y) {
        p = Neg (x)
        y = If (c) <then_branch = t () => (float[3] a) { a = Neg (p) },
                    else_branch = e () => (float[3] b) { b = Abs (x) }> }"""
    assert fired(compiled(double_negation), text) == []


# -- constants, numbers, attributes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "fits"),
    [
        ("float k = {0.1}", True),
        ("float[1] k = {0.1}", True),
        ("float[1,1] k = {0.1}", False),  # would add an axis to x
        ("float k = {0.1001}", False),
        ("float[2] k = {0.1, 0.1}", False),
        ("double k = {0.1}", True),
        ("int64 k = {0}", False),
    ],
)
def test_a_number_is_a_constant_of_one_element(stated: str, fits: bool) -> None:
    def tenth(op: Ops, x: Var) -> Rewrite:
        """x * 0.1 => Abs(x)."""
        yield op.Mul(x, 0.1)
        return op.Abs(x)

    kind = stated.partition(" ")[0].partition("[")[0]
    text = f"g ({kind}[2] x) => ({kind}[2] y) <{stated}> {{ y = Mul (k, x) }}"
    assert fired(compiled(tenth), text) == ([("tenth", "y")] if fits else [])


def test_a_number_with_axes_does_not_match_beside_an_unknown_rank() -> None:
    def one(op: Ops, x: Var) -> Rewrite:
        """x * 1 => Abs(x)."""
        yield op.Mul(x, 1.0)
        return op.Abs(x)

    text = "g (float[] x) => (float[] y) <%s k = {1}> { y = Mul (x, k) }"
    source = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 17]>\n{text % "float[1]"}'
    )
    for info in (*source.graph.input, *source.graph.output):
        info.type.tensor_type.ClearField("shape")
    edit = Editor(Model.load(source))
    apply_rules([compiled(one)], edit)
    assert edit.changes == []
    del source.graph.initializer[0].dims[:]
    edit = Editor(Model.load(source))
    apply_rules([compiled(one)], edit)
    assert len(edit.changes) == 1


def test_numbers_of_narrow_types_are_what_an_exporter_writes() -> None:
    def root_two(op: Ops, x: Var) -> Rewrite:
        """x / sqrt(2) => Abs(x)."""
        yield op.Div(x, 2**0.5)
        return op.Abs(x)

    for kind, dtype in ((TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64)):
        number = onnx.numpy_helper.from_array(np.asarray(2**0.5, dtype), "k")
        infos = [value(name, (3,), kind) for name in "xy"]
        found = graphs.model([node("Div", ["x", "k"], ["y"])], infos[:1], infos[1:], [number])
        edit = Editor(Model.load(found))
        apply_rules([compiled(root_two)], edit)
        assert len(edit.changes) == 1


def sums_over_rows(op: Ops, x: Var) -> Rewrite:
    """ReduceSum(x, axes=[1], keepdims=0) => ReduceSum(x, axes=[-1], keepdims=0), and Abs."""
    yield op.Abs(op.ReduceSum(x, axes=[-1], keepdims=0))
    return op.ReduceSum(op.Abs(x), axes=[-1], keepdims=0)


@pytest.mark.parametrize(
    ("opset", "stated", "fits"),
    [
        (11, "p = ReduceSum <axes = [1], keepdims = 0> (x)", True),
        (11, "p = ReduceSum <axes = [-1], keepdims = 0> (x)", True),
        (11, "p = ReduceSum <axes = [0], keepdims = 0> (x)", False),
        (11, "p = ReduceSum <axes = [1]> (x)", False),  # keepdims is 1 by default
        (13, "p = ReduceSum <keepdims = 0> (x, one)", True),
        (13, "p = ReduceSum <keepdims = 0> (x, last)", True),
        (13, "p = ReduceSum <keepdims = 0> (x, zero)", False),
        (13, "p = ReduceSum <keepdims = 0> (x)", False),  # all axes by default
        (13, "p = ReduceSum <keepdims = 0> (x, fed)", False),
    ],
)
def test_attributes_by_value_wherever_the_opset_states_them(
    opset: int, stated: str, fits: bool
) -> None:
    text = f"""g (float[2, 2] x, int64[1] fed) => (float[2] y)
        <int64[1] one = {{1}}, int64[1] last = {{-1}}, int64[1] zero = {{0}}>
        {{ {stated}  y = Abs (p) }}"""
    assert bool(fired(compiled(sums_over_rows), text, opset)) is fits


def test_negative_axes_fit_without_a_rank_only_where_they_are_spelled_alike() -> None:
    text = """g (float[N, M] x, int64[K] s) => (float[A] y) {
        r = Reshape (x, s)  p = ReduceSum <axes = [%s], keepdims = 0> (r)  y = Abs (p) }"""
    assert fired(compiled(sums_over_rows), text % "-1", 11) == [("sums_over_rows", "y")]
    assert fired(compiled(sums_over_rows), text % "1", 11) == []


def test_axes_of_unsqueeze_count_in_the_result() -> None:
    def widen(op: Ops, x: Var) -> Rewrite:
        """Abs(Unsqueeze(x, last axis)) => Unsqueeze(Abs(x))."""
        yield op.Abs(op.Unsqueeze(x, axes=[-1]))
        return op.Unsqueeze(op.Abs(x), axes=[-1])

    text = """g (float[2, 3] x) => (float[A, B, C] y) <int64[1] k = {%s}>
        { p = Unsqueeze (x, k)  y = Abs (p) }"""
    assert fired(compiled(widen), text % "2") == [("widen", "y")]
    assert fired(compiled(widen), text % "1") == []


def test_an_attribute_that_came_later_had_its_default_before() -> None:
    def plain(op: Ops, x: Var) -> Rewrite:
        """Abs(Cast(x)) => Abs(x)."""
        cast = op.Cast(x, to=TensorProto.FLOAT, saturate=1)
        yield op.Abs(cast)
        assert cast.attr("saturate") == 1
        return op.Abs(x)

    text = "g (float[2] x) => (float[2] y) { p = Cast <to = 1%s> (x)  y = Abs (p) }"
    assert fired(compiled(plain), text % "", 13) == [("plain", "y")]
    assert fired(compiled(plain), text % "", 19) == [("plain", "y")]
    assert fired(compiled(plain), text % ", saturate = 0", 19) == []


# -- versions ------------------------------------------------------------------------------------


def test_softmax_means_something_else_from_opset_13_on() -> None:
    def last(op: Ops, x: Var) -> Rewrite:
        """Abs(Softmax(x)) => Softmax(x)."""
        soft = op.Softmax(x)
        yield op.Abs(soft)
        assert soft.attr("axis") == -1
        return op.Softmax(x)

    def flat(op: Ops, x: Var) -> Rewrite:
        """Abs(Softmax(x)) => Softmax(x), over all axes from the second on."""
        soft = op.Softmax(x)
        yield op.Abs(soft)
        assert soft.attr("axis") == 1
        return op.Softmax(x)

    rules = [compiled(last, min_opset=13), compiled(flat, max_opset=12)]
    text = "g (float[2, 3, 4] x) => (float[2, 3, 4] y) { p = Softmax (x)  y = Abs (p) }"
    assert fired(rules, text, 12) == [("flat", "y")]
    assert fired(rules, text, 13) == [("last", "y")]


def test_more_outputs_than_the_pattern_knows_of() -> None:
    def still(op: Ops, x: Var) -> Rewrite:
        """Dropout(x) => x."""
        yield op.Dropout(x)
        return x

    text = "g (float[2] x) => (float[2] y%s) { p = Abs (x)  q, m = Dropout (p)  y = Abs (q) }"
    assert fired(compiled(still), text % "") == [("still", "q")]
    assert fired(compiled(still), text % ", bool[2] m") == []


# -- errors of definition ------------------------------------------------------------------------


def branching(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    yield op.Abs(x) if x.rank == 2 else op.Neg(x)
    return x


def asking(op: Ops, x: Var, b: Var = absent()) -> Rewrite:
    """Clip(x, b) => x."""
    yield op.Clip(x) if b.is_absent else op.Clip(x, b)
    return x


def truthy(op: Ops, x: Var, b: Var = absent()) -> Rewrite:
    """Clip(x, b) => x."""
    yield op.Clip(x, b) if b else op.Clip(x)
    return x


def reading(op: Ops, x: Var, w: Const) -> Rewrite:
    """x * w => x."""
    yield op.Mul(x, float(w.values))
    return x


def unbound(op: Ops, x: Var, a: Const) -> Rewrite:
    """x or x * a => x."""
    yield op.Abs(x | op.Mul(x, a))
    return x


def without_yield(op: Ops, x: Var) -> Any:
    """Abs(x) => x."""
    return x


def early_end(op: Ops, x: Var) -> Rewrite:
    """Abs(x) => x."""
    if x is not None:
        return x
    yield op.Abs(x)


def without_arrow(op: Ops, x: Var) -> Rewrite:
    """Removes Abs."""
    yield op.Abs(x)
    return x


def second_output(op: Ops, x: Var) -> Rewrite:
    """Split(x) => x."""
    _, second = op.Split(x, outputs=2)
    yield second
    return x


def parameter_root(op: Ops, x: Var) -> Rewrite:
    """x => x."""
    yield x
    return x


def other_default(op: Ops, x: Var, b: Var = None) -> Rewrite:  # type: ignore[assignment]
    """Clip(x, b) => x."""
    yield op.Clip(x, b)
    return x


def array_operand(op: Ops, x: Var) -> Rewrite:
    """x + [1, 2] => x."""
    yield op.Add(x, [1, 2])
    return x


def untyped(op: Ops, x: int) -> Rewrite:
    """Abs(x) => x."""
    yield op.Abs(x)
    return x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (branching, "only names are used before the yield"),
        (asking, "only names are used before the yield"),
        (truthy, "neither true nor false"),
        (reading, "only names are used before the yield"),
        (unbound, "some alternative leaves a unbound"),
        (without_yield, "no yield"),
        (early_end, "ends without its yield"),
        (without_arrow, "starts with its equation"),
        (second_output, "or all of its outputs"),
        (parameter_root, "the yield gives one operator's output"),
        (other_default, r"the default of b can only be absent\(\)"),
        (array_operand, "cannot stand in a pattern"),
        (untyped, "x is Var, Const or Vars"),
    ],
)
def test_a_rule_that_is_written_wrongly_is_refused(
    function: Callable[..., Rewrite], message: str
) -> None:
    with pytest.raises(RuleError, match=message):
        compiled(function)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({}, "the sample lacks x"),
        ([], "without a sample nothing tests it"),
        ({"x": (2,), "y": (2,)}, "'y' is no parameter"),
        ({"x": (2,), "other.axis": 1}, "calls no operator 'other'"),
        ({"x": (2,), "inner.": 1}, "'inner.' is no parameter"),
    ],
)
def test_samples_are_checked_where_the_rule_is_defined(sample: Any, message: str) -> None:
    before = dict(RULES)
    with pytest.raises(RuleError, match=message):
        rule("test-samples", sample=sample)(double_negation)
    with pytest.raises(RuleError, match="no parameter"):
        rule("test-samples", sample={"x": (2,)}, refuses=[{"z": 1}])(double_negation)
    assert before == RULES


def test_samples_state_what_differs_from_the_first() -> None:
    made = compile_rule(
        "made",
        double_negation,
        samples=[{"x": (2,), "Neg.axis": 1}, {"x": (3,)}],
        refuses=[{"Neg.axis": 2}],
    )
    assert made.samples == ({"x": (2,), "Neg.axis": 1}, {"x": (3,), "Neg.axis": 1})
    assert made.refuses == ({"x": (2,), "Neg.axis": 2},)


def test_a_name_is_given_once() -> None:
    taken = next(iter(RULES))
    with pytest.raises(RuleError, match="defined twice"):
        rule(taken, sample={"x": (2,)})(double_negation)
