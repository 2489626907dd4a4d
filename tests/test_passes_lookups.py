"""fold-lookups: functions of looked up rows become functions of the table, and only those."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from tests import goldens, graphs

HEADER = "g (int64[n, 2] i, float[4] x) => (float[n, 2, 4] y)"
ROWS = np.arange(-32, 32).reshape(16, 4) / 16
TABLE = f"float[16, 4] t = {{{', '.join(map(str, ROWS.ravel()))}}}"
LIST = "float[9] t = {1, 2, 3, 4, 5, 6, 7, 8, 9}"  # as many as the indices of a feed reach


def unchanged(graph: str, runs: bool = True) -> None:
    goldens.golden("fold-lookups", graph, "", [], runs=runs)


def test_a_function_of_several_operators_becomes_one_of_the_table() -> None:
    goldens.golden(
        "fold-lookups",
        f"""{HEADER}
        <{TABLE}, float[1, 1, 4] c = {{1, 2, 3, 4}}, float half = {{0.5}}>
        {{ r = Gather (t, i)  a = Add (r, c)  s = Mul (a, a)  b = Mul (half, s)  y = Neg (b) }}""",
        f"""{HEADER}
        <{TABLE}, float[1, 1, 4] c = {{1, 2, 3, 4}}, float half = {{0.5}},
        float[4] "c/row" = {{1, 2, 3, 4}}>
        {{ ["a/table"] "a/table" = Add (t, "c/row")
        ["s/table"] "s/table" = Mul ("a/table", "a/table")
        ["b/table"] "b/table" = Mul (half, "s/table")  ["y/table"] "y/table" = Neg ("b/table")
        ["y/Gather"] y = Gather ("y/table", i) }}""",
        ["fold-lookup y"],
    )


def test_what_folds_constants_goes_on_from_there() -> None:
    made, told = goldens.run(
        graphs.parsed(
            f"{HEADER} <{TABLE}> {{ r = Gather (t, i)  s = Mul (r, r)  y = Sigmoid (s) }}"
        ),
        "fold-lookups, fold-constants, remove-dead",
    )
    assert [node.op_type for node in made.graph.node] == ["Gather"]
    (table,) = map(numpy_helper.to_array, made.graph.initializer)
    np.testing.assert_allclose(table, 1 / (1 + np.exp(-(ROWS**2))), rtol=1e-6)
    assert told[0] == "fold-lookup y"


def test_the_last_value_that_all_goes_through_is_looked_up() -> None:
    goldens.golden(
        "fold-lookups",
        f"""{HEADER} <{TABLE}>
        {{ r = Gather (t, i)  a = Neg (r)  b = Exp (a)  c = Abs (a)  d = Add (b, x)
        y = Add (c, d) }}""",
        f"""{HEADER} <{TABLE}>
        {{ ["a/table"] "a/table" = Neg (t)  ["a/Gather"] a = Gather ("a/table", i)  b = Exp (a)
        c = Abs (a)  d = Add (b, x)  y = Add (c, d) }}""",
        ["fold-lookup a"],
    )


@pytest.mark.parametrize(
    "nodes",
    [
        "r = Gather (t, i)  a = Neg (r)  y = Add (a, r2)  r2 = Gather (t, i)",
        "r = Gather (t, i)  y = Add (r, x)",
        "r = Gather (t, i)  y = Softmax (r)",
        "r = Gather <axis = 1> (t, j)  y = Neg (r)",
        "r = Gather (t, i)  y = Add (r, two)",
        "r = Gather (t, i)  w = Add (r, wide)  y = ReduceMax <axes = [0], keepdims = 0> (w)",
    ],
    ids=["shared table", "no constant", "other operator", "other axis", "each index", "more axes"],
)
def test_what_is_no_function_of_rows_stays(nodes: str) -> None:
    lines = sorted(nodes.split("  "), key=lambda line: line.startswith("y"))
    unchanged(
        f"""{HEADER} <{TABLE}, int64[2, 4] j = {{0, 1, 2, 3, 0, 1, 2, 3}},
        float[2, 1] two = {{1, 2}}, float[1, 1, 1, 4] wide = {{1, 2, 3, 4}}>
        {{ {"  ".join(lines)} }}""",
        runs="axis = 1" not in nodes,
    )


def test_a_table_that_would_be_larger_stays() -> None:
    unchanged(
        f"""g (int64[n] i) => (double[n] y) <{LIST}>
        {{ r = Gather (t, i)  y = Cast <to = 11> (r) }}"""
    )


def test_a_table_that_a_caller_can_replace_stays() -> None:
    unchanged(f"g (int64[n] i, {LIST}) => (float[n] y) {{ r = Gather (t, i)  y = Neg (r) }}")


def test_rows_that_are_an_output_as_well_stay() -> None:
    unchanged(
        f"""g (int64[n] i) => (float[n] r, float[n] y) <{LIST}>
        {{ r = Gather (t, i)  y = Neg (r) }}"""
    )


def test_bodies_have_lookups_of_their_own() -> None:
    other = LIST.replace(" t ", " u ")
    goldens.golden(
        "fold-lookups",
        f"""g (int64[n] i, bool p) => (float[n] y) <{LIST}>
        {{ y = If (p) <then_branch = a () => (float[n] b) {{ r = Gather (t, i)  b = Neg (r) }},
        else_branch = c () => (float[n] d) <{other}> {{ s = Gather (u, i)  d = Exp (s) }}> }}""",
        f"""g (int64[n] i, bool p) => (float[n] y) <{LIST}>
        {{ y = If (p) <then_branch = a () => (float[n] b)
        {{ ["b/table"] "b/table" = Neg (t)  ["b/Gather"] b = Gather ("b/table", i) }},
        else_branch = c () => (float[n] d) <{other}>
        {{ ["d/table"] "d/table" = Exp (u)  ["d/Gather"] d = Gather ("d/table", i) }}> }}""",
        ["fold-lookup b", "fold-lookup d"],
    )
