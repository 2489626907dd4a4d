"""hoist-invariants: what a loop computes anew in every round is computed before it, once."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import exporter
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import pipeline
from graphopt.runtime import Session
from tests import goldens, graphs

LOOP = """g (float[2,3] x, float[2,3] k, int64 n, bool go) => (float[2,3] y)
    <int64 three = {{3}}, bool yes = {{1}}, bool no = {{0}}, float[3] w = {{1.0, 2.0, 3.0}}> {{
    {before}
    y = Loop ({trips}, {goes}, x) <body = b (int64 i, bool c, float[2,3] s)
        => (bool d, float[2,3] t) <float half = {{0.5}}> {{ {nodes} d = Identity (c) }}> }}"""
TWICE = "a = Abs (k)  m = Mul (a, half)  t = Add (s, m)"


def hoisted(nodes: str, trips: str = "three", goes: str = "yes", before: str = "") -> list[str]:
    """Operators before the loop after the pass; what they compute stays the same bits."""
    text = LOOP.format(nodes=nodes, trips=trips, goes=goes, before=before)
    original = graphs.parsed(text)
    made, _ = goldens.run(original, "hoist-invariants")
    goldens.check(original, made, "hoist-invariants")
    return [node.op_type for node in made.graph.node if node.op_type != "Loop"]


def test_chains_move_with_the_small_constants_that_they_read() -> None:
    assert hoisted(TWICE) == ["Abs", "Mul"]


@pytest.mark.parametrize(
    ("trips", "goes", "moved"),
    [
        ("three", "", ["Abs", "Mul"]),
        ("n", "yes", ["Abs"]),
        ("three", "go", ["Abs"]),
        ("three", "no", ["Abs"]),
    ],
)
def test_only_what_cannot_fail_moves_where_there_may_be_no_round(
    trips: str, goes: str, moved: list[str]
) -> None:
    assert hoisted(TWICE, trips, goes) == moved


def test_what_a_round_changes_stays() -> None:
    assert hoisted("a = Abs (s)  m = Mul (a, k)  t = Add (s, m)") == []
    assert hoisted("a = Cast <to = 1> (i)  t = Add (s, a)") == []


def test_outputs_of_the_body_stay() -> None:
    assert hoisted("t = Abs (k)") == []


def test_constants_alone_and_random_nodes_stay() -> None:
    assert hoisted("a = Abs (half)  t = Mul (s, a)") == []
    original = graphs.parsed(
        LOOP.format(
            nodes="r = RandomNormalLike (k)  t = Add (s, r)", trips="three", goes="yes", before=""
        )
    )
    assert goldens.run(original, "hoist-invariants")[1] == []


def test_nodes_in_a_branch_stay() -> None:
    nodes = """t = If (c) <then_branch = p () => (float[2,3] u) { a = Abs (k)  u = Add (s, a) },
        else_branch = q () => (float[2,3] v) { v = Neg (s) }>"""
    assert hoisted(nodes) == []


def test_out_of_two_loops() -> None:
    nodes = """t = Loop (three, yes, s) <body = e (int64 j, bool f, float[2,3] o)
        => (bool h, float[2,3] z) { a = Abs (k)  b = Abs (s)  r = Add (a, b)
        z = Add (o, r)  h = Identity (f) }>"""
    assert hoisted(nodes) == ["Abs"]


def test_no_round_that_would_fail_still_does_not() -> None:
    """The reshape fits no input that is fed: only a round would tell."""
    text = """g (float[N] x, int64 n) => (float[N] y) <bool yes = {1}, int64[2] shape = {7, 5}> {
        y = Loop (n, yes, x) <body = b (int64 i, bool c, float[N] s) => (bool d, float[M] t) {
            r = Reshape (x, shape)  m = ReduceSum <keepdims = 0> (r)  t = Add (s, m)
            d = Identity (c) }> }"""
    original = graphs.parsed(text)
    made, told = goldens.run(original, "hoist-invariants")
    assert told == []
    feed = {"x": np.ones(4, np.float32), "n": np.array(0, np.int64)}
    (y,) = Session(made.SerializeToString()).run(feed).values()
    assert np.array_equal(y, feed["x"])


@pytest.mark.parametrize(("size", "moved"), [("5", ["Mul"]), ("N", []), ("0", [])])
def test_a_scan_runs_as_often_as_what_it_scans_is_long(size: str, moved: list[str]) -> None:
    text = f"""g (float[{size},3] x, float[3] k, float[3] w) => (float[3] y, float[A,3] ys) {{
        y, ys = Scan (k, x) <num_scan_inputs = 1, body = b (float[3] s, float[3] e)
            => (float[3] t, float[3] z) {{ m = Mul (k, w)  t = Add (s, e)  z = Add (t, m) }}> }}"""
    original = graphs.parsed(text)
    made, _ = goldens.run(original, "hoist-invariants")
    goldens.check(original, made, "hoist-invariants", runs=size == "5")
    assert [node.op_type for node in made.graph.node if node.op_type != "Scan"] == moved


def test_the_levels_use_it() -> None:
    model = Model.load(graphs.parsed(LOOP.format(nodes=TWICE, trips="n", goes="go", before="")))
    run_pipeline(model, pipeline(1, None), verify_each=True)
    assert [node.op_type for node in exporter.to_proto(model).graph.node] == ["Abs", "Loop"]
