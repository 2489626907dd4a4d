"""refute-branches: a branch that cannot be run to the end is not taken; any other may be."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.proofs import TensorType
from graphopt.runtime import Session
from tests import goldens, graphs

GUARD = """s = Shape <start = 2> (x)  c = Equal (s, one)
    v = If (c) <
    then_branch = t () => (float[B,2] p) { p = Squeeze (x, two) },
    else_branch = e () => (float[B,2,F] q) { q = Identity (x) }>"""
HEAD = """g (float[B,2,F] x) => (float[K,L,M,N] y)
    <int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0},
    float[1,8,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7},
    float[1,8,2] r = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}>"""


def left(text: str) -> tuple[list[str], list[str]]:
    """Operators of the main graph after the pass, and the rules that fired."""
    made, told = goldens.run(graphs.parsed(text), "refute-branches, remove-dead")
    return [n.op_type for n in made.graph.node], [t for t in told if "remove" not in t]


def test_only_one_branch_gives_the_rank_that_an_lstm_takes() -> None:
    text = f"{HEAD} {{ {GUARD}  u = Unsqueeze (v, zero)  y = LSTM <hidden_size = 2> (u, w, r) }}"
    assert left(text) == (["Squeeze", "Unsqueeze", "LSTM"], ["refute-branch v"])
    before, (after, _) = graphs.parsed(text), goldens.run(graphs.parsed(text), "refute-branches")
    for frames in (1, 3):
        found = []
        for proto in (before, after):
            session = Session(proto.SerializeToString(), optimizations="off", threads=1)
            feed = {"x": np.ones((2, 2, frames), np.float32)}
            try:
                found.append(session.run(feed)["y"].tolist())
            except RuntimeFailure:
                found.append("fails")
        assert found[0] == found[1]
        assert (found[0] == "fails") == (frames != 1)


def test_what_folds_once_a_branch_is_taken_counts() -> None:
    """Of two guards, the second asks for the rank that the first has left open."""
    head = HEAD.replace("int64[1] zero", "int64 flat = {2}, int64[1] zero")
    operators, told = left(
        f"""{head} {{ {GUARD}  vs = Shape (v)  rank = Size (vs)  b = Equal (rank, flat)
        u = If (b) <
        then_branch = t2 () => (float[B,2] p2) {{ p2 = Identity (v) }},
        else_branch = e2 () => (float[1,B,2,F] q2) {{ q2 = Unsqueeze (v, zero) }}>
        k = Unsqueeze (u, zero)  y = LSTM <hidden_size = 2> (k, w, r) }}"""
    )
    assert told[0] == "refute-branch v"
    assert operators[0] == "Squeeze"


@pytest.mark.parametrize(
    "nodes",
    [
        # nothing refuses a rank
        f"{GUARD}  y = Relu (v)",
        # both ranks are refused
        f"{GUARD}  a = Unsqueeze (v, zero)  u = Unsqueeze (a, zero)  "
        "y = LSTM <hidden_size = 2> (u, w, r)",
        # what refuses is not run, since nothing needs it
        f"{GUARD}  u = Unsqueeze (v, zero)  d = LSTM <hidden_size = 2> (u, w, r)  e = Relu (d)  "
        "y = Relu (v)",
        # both ranks lead to what it takes
        f"{GUARD}  n = ReduceSum <keepdims = 0> (v)  k = Transpose <perm = [0, 2, 1]> (x)  "
        "u = Add (k, n)  y = LSTM <hidden_size = 2> (u, w, r)",
        # what refuses is not always run
        f"""{GUARD}  u = Unsqueeze (v, zero)  y = If (c) <
        then_branch = t2 () => (float[K,L,M,N] p2) {{ p2 = LSTM <hidden_size = 2> (u, w, r) }},
        else_branch = e2 () => (float[K,L,M,N] q2) {{ q2 = Identity (u) }}>""",
    ],
)
def test_branches_that_may_be_taken_stay(nodes: str) -> None:
    assert left(f"{HEAD} {{ {nodes} }}")[1] == []


def test_supposing_leaves_no_trace() -> None:
    model = Model.load(graphs.parsed("g (float[N] x) => (float[N] y) { a = Neg (x)  y = Neg (a) }"))
    edit = Editor(model)
    before, known = fingerprint(model), str(edit.types[model.graph.values["a"]])
    with edit.supposing():
        a = model.graph.values["a"]
        edit.prove(a, TensorType(1, (5,)))
        edit.replace_uses(a, model.graph.values["x"])
        edit.record("try", "a", "", "")
        assert str(edit.types[a]) == "float[5]"
    assert fingerprint(model) == before
    assert str(edit.types[model.graph.values["a"]]) == known == "float[size(x, 0)]"
    assert edit.changes == []
