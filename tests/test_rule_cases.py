"""The generator of rule tests: it draws what it says, and what it draws notices wrong rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from graphopt.rules import Const, Ops, Rewrite, Rule, Var, absent, compile_rule, require
from tests.rule_cases import Choice, Unbuildable, draw
from tests.rule_choices import choices, opsets, pairwise, ways
from tests.rule_contexts import cases
from tests.rule_runs import batches, check, differs

SCALE = {"x": (2, 3), "w": (3, 4), "c": 0.5}


def right(op: Ops, x: Var, w: Const, c: Const) -> Rewrite:
    """MatMul(x, w) * c => MatMul(x, w*c), c one number."""
    product = op.MatMul(x, w)
    yield op.Mul(product, c)
    require(product.dtype.kind == "f", "the numbers are whole")
    require(c.values.size == 1 and c.values.ndim <= product.rank, "more than one number")
    return op.MatMul(x, w.values * c.scalar())


def wrong_number(op: Ops, x: Var, w: Const, c: Const) -> Rewrite:
    """MatMul(x, w) * c => MatMul(x, w*c), but for a small error."""
    product = op.MatMul(x, w)
    yield op.Mul(product, c)
    require(product.dtype.kind == "f", "the numbers are whole")
    require(c.values.size == 1 and c.values.ndim <= product.rank, "more than one number")
    return op.MatMul(x, w.values * c.scalar() * 1.0001)


def wrong_broadcast(op: Ops, x: Var, w: Const, c: Const) -> Rewrite:
    """MatMul(x, w) * c => MatMul(x, w*c), along whatever axis."""
    product = op.MatMul(x, w)
    yield op.Mul(product, c)
    require(product.dtype.kind == "f", "the numbers are whole")
    require(c.values.size in (1, w.values.shape[1]), "it does not fit")
    return op.MatMul(x, w.values * c.values.reshape(-1))


def too_shy(op: Ops, x: Var, w: Const, c: Const) -> Rewrite:
    """MatMul(x, w) * c => MatMul(x, w*c), if its weight is nobody elses."""
    product = op.MatMul(x, w)
    yield op.Mul(product, c)
    require(len(w.value.consumers) == 1, "somebody elses")  # type: ignore[attr-defined]
    return op.MatMul(x, w.values * c.scalar())


def made(function: Callable[..., Rewrite], **sample: object) -> Rule:
    return compile_rule(function.__name__, function, samples=[{**SCALE, **sample}])


def failures(rule: Rule) -> list[str]:
    return [failure.problem for batch in batches(cases(rule))[0] for failure in check(rule, batch)]


def test_a_right_rule_passes() -> None:
    assert failures(made(right)) == []


@pytest.mark.parametrize(
    ("function", "factor", "problem"),
    [
        (wrong_number, 0.5, "of the signal"),
        (wrong_broadcast, (4,), "of the signal"),
        (too_shy, 0.5, "does not fire"),
    ],
)
def test_a_wrong_rule_does_not(
    function: Callable[..., Rewrite], factor: object, problem: str
) -> None:
    assert any(problem in text for text in failures(made(function, c=factor)))


def test_pairs_of_everything() -> None:
    factors = [range(4), "ab", (True, False), range(3)]
    rows = pairwise(factors)
    assert len(rows) < 20  # of 48
    for i, j in itertools.combinations(range(len(factors)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(factors[i], factors[j]))


def clip(op: Ops, x: Var, low: Const = absent()) -> Rewrite:
    """Neg(Clip(x) or Abs(x)) => Neg(x)."""
    yield op.Neg(op.Clip(x, low) | op.Abs(x))
    return op.Neg(x)


def test_alternatives_opsets_and_optional_inputs() -> None:
    rule = compile_rule("clip", clip, samples=[{"x": (2,), "low": -1.0}])
    assert [list(options.values()) for _, options in ways(rule)] == [[0], [1]]
    assert opsets(rule) == [7, 11, 12, 13, 21]
    found = list(choices(rule))
    assert {(c.opset, tuple(c.options.values())) for c in found} == {
        (opset, (way,)) for opset in opsets(rule) for way in (0, 1)
    }
    (_, first), _ = ways(rule)
    assert list(draw(rule, Choice(21, first)).drawn[0].input) == ["x", "low"]
    left_out = Choice(21, first, left_out=frozenset({"low"}))
    assert list(draw(rule, left_out).drawn[0].input) == ["x"]
    with pytest.raises(Unbuildable, match="Clip with 2 inputs"):
        draw(rule, Choice(7, first))


def test_open_sizes_have_a_name_and_are_fed_with_different_numbers() -> None:
    rule = made(right, x=("n", "m"), w=(3, 4))
    draft = draw(rule, Choice(21, {}))
    assert draft.inputs["x_fed"].shape == (2, 3)
    [info, *_] = draft.proto().graph.input
    assert [dim.dim_param for dim in info.type.tensor_type.shape.dim] == ["n", "m"]


@pytest.mark.parametrize(
    ("wanted", "found", "problem"),
    [
        ([1.0, 2.0], [1.0, 2.0], ""),
        ([1.0, 2.0], [1.0, 2.000004], ""),
        ([1.0, 2.0], [1.0, 2.0001], "of the signal"),
        ([1000.0, 1001.0], [1000.0, 1001.001], "of the signal"),  # relative to what varies
        ([1.0, np.nan], [1.0, np.nan], ""),
        ([1.0, np.inf], [1.0, 2.0], "NaN or infinity in other places"),
        ([1.0, 2.0], [[1.0, 2.0]], "float32[1, 2] instead of float32[2]"),
        ([0.0, 0.0], [0.0, 0.1], "of the signal"),
        ([1, 2], [1, 3], "1 of 2 values differ"),
    ],
)
def test_what_counts_as_a_difference(wanted: object, found: object, problem: str) -> None:
    arrays = [np.asarray(each) for each in (wanted, found)]
    arrays = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays]
    text = differs(arrays[0], arrays[1], "float32")
    assert (problem in text) if problem else text == ""
