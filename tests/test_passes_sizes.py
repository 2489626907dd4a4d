"""Sizes as terms, what is proven of them, and the shapes that need not be computed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import size_terms
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.canonicalize.proven_sizes import prove_sizes
from graphopt.proofs import Proofs, TensorType
from graphopt.runtime import Session
from graphopt.size_terms import Open, Size, Term
from tests import goldens, graphs

A, B = size_terms.atom("a"), size_terms.atom("b")

# -- terms -----------------------------------------------------------------------------------------


@st.composite
def sizes(draw: st.DrawFn) -> tuple[Size, int]:
    """A size, and its value where a is 5 and b is 7."""
    size, value = draw(st.sampled_from([(A, 5), (B, 7), (0, 0), (3, 3), (-2, -2)]))
    for _ in range(draw(st.integers(0, 4))):
        other, number = draw(st.sampled_from([(A, 5), (B, 7), (1, 1), (4, 4), (-3, -3)]))
        if draw(st.booleans()):
            size, value = size_terms.add(size, other), value + number
        else:
            size, value = size_terms.multiply(size, other), value * number
    return size, value


def valued(size: Size) -> int:
    if isinstance(size, int):
        return size
    known = {"a": 5, "b": 7}
    return sum(
        count * int(np.prod([known[str(each)] ** power for each, power in monomial], dtype=int))
        for monomial, count in size.parts
    )


@given(sizes(), sizes())
def test_arithmetic(first: tuple[Size, int], second: tuple[Size, int]) -> None:
    (a, x), (b, y) = first, second
    assert valued(a) == x
    assert valued(size_terms.subtract(a, b)) == x - y
    assert size_terms.subtract(size_terms.add(a, b), b) == a
    assert size_terms.multiply(a, b) == size_terms.multiply(b, a)
    found = size_terms.quotient(a, b)
    if found is not None:
        assert size_terms.multiply(found, b) == a
    assert not isinstance(a, Term) or hash(size_terms.add(a, 0)) == hash(a)


def test_quotients() -> None:
    rows = size_terms.multiply(A, size_terms.multiply(B, 64))
    assert size_terms.quotient(rows, size_terms.multiply(B, 16)) == size_terms.multiply(A, 4)
    assert size_terms.quotient(rows, 3) is None
    assert size_terms.quotient(A, B) is None
    assert size_terms.quotient(size_terms.add(A, B), size_terms.add(B, A)) == 1
    assert size_terms.quotient(A, 0) is None


def test_what_is_never_negative() -> None:
    element = size_terms.atom(Open("v", 0, is_size=False))
    assert size_terms.multiply(A, 3).is_size  # type: ignore[union-attr]
    assert not size_terms.multiply(A, -3).is_size  # type: ignore[union-attr]
    assert not size_terms.subtract(A, 1).is_size  # type: ignore[union-attr]
    assert not element.is_size
    assert size_terms.atom(Open("v", 0, is_size=True)).is_size


def test_what_is_never_zero() -> None:
    product = size_terms.multiply(A, B)
    assert size_terms.is_nonzero(3, ())
    assert not size_terms.is_nonzero(0, "ab")
    assert size_terms.is_nonzero(product, "ab")
    assert not size_terms.is_nonzero(product, "a")
    assert size_terms.is_nonzero(size_terms.add(product, A), "a")
    assert size_terms.is_nonzero(size_terms.add(B, 1), ())
    assert not size_terms.is_nonzero(size_terms.subtract(A, B), "ab")
    assert not size_terms.is_nonzero(size_terms.subtract(A, 1), "a")


def test_equal_sizes_have_one_name() -> None:
    one = size_terms.add(size_terms.multiply(A, B), size_terms.multiply(A, A))
    other = size_terms.multiply(size_terms.add(B, A), A)
    assert isinstance(one, Term)
    assert isinstance(other, Term)
    assert size_terms.spelled(one) == size_terms.spelled(other) == "a*b+a^2"
    assert size_terms.spelled(size_terms.atom(Open("v", 0, is_size=True))) is None


def test_what_is_never_zero_goes_by_later_names() -> None:
    x = Model.load(graphs.model([graphs.node("Relu", ["x"], ["y"])])).graph.values["x"]
    proofs = Proofs(before={x: TensorType(1, ("open__0",))}, nonzero={"open__0"})
    later = proofs.dim(size_terms.multiply(A, size_terms.multiply(B, 4)))
    proofs.settle({x: TensorType(1, (later,))})
    assert proofs.is_nonzero("a")
    assert proofs.is_nonzero("b")
    assert proofs.is_nonzero(later)
    assert not proofs.is_nonzero("c")
    assert not proofs.is_nonzero(None)
    assert not Proofs().is_nonzero(later)


# -- what is proven --------------------------------------------------------------------------------


def proven(text: str, name: str) -> str:
    model = Model.load(graphs.parsed(text))
    edit = Editor(model)
    prove_sizes(model, edit)
    return str(edit.types[model.graph.values[name]])


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("s = Shape (x)  y = Reshape (x, s)", "float[size(x, 0),4,6]"),
        (
            """s = Shape <end = 1> (x)  t = Concat <axis = 0> (s, free)  y = Reshape (x, t)""",
            "float[size(x, 0),24]",
        ),
        (
            """n = Size (x)  n1 = Unsqueeze (n, zero)  y = Reshape (x, n1)""",
            "float[24*size(x, 0)]",
        ),
        ("s = Shape (x)  y = ConstantOfShape (s)", "float[size(x, 0),4,6]"),
        ("s = Shape (x)  y = Expand (one, s)", "float[size(x, 0),4,6]"),
        (
            """s = Shape <end = 1> (x)  n = Squeeze (s)  r = Range (first, n, step)
            y = Cast <to = 1> (r)""",
            "float[size(x, 0)]",
        ),
        ("s = Shape <end = 1> (x)  y = Slice (x, zero, s, zero)", "float[size(x, 0),4,6]"),
        (
            """s = Shape <end = 1> (x)  d = Add (s, s)  t = Concat <axis = 0> (d, free)
            y = Reshape (x, t)""",
            "float[2*size(x, 0),12]",
        ),
    ],
)
def test_sizes_that_inference_does_not_find(nodes: str, expected: str) -> None:
    text = f"""g (float[N,4,6] x) => (float[] z)
    <int64[1] free = {{-1}}, int64[1] zero = {{0}}, float one = {{1.0}}, int64 first = {{0}},
    int64 step = {{1}}> {{ {nodes}  z = ReduceSum <keepdims = 0> (y) }}"""
    assert proven(text, "y") == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", "size(x, 2),size(x, 3)"),
        ("kernel_shape = [3, 1], pads = [2, 0, 2, 0], dilations = [2, 1]", "size(x, 2),size(x, 3)"),
        ("kernel_shape = [2, 2], pads = [1, 1, 1, 0]", "1+size(x, 2),size(x, 3)"),
        ("kernel_shape = [3, 3]", "open__0,open__1"),
        ("kernel_shape = [1, 1], strides = [2, 1]", "open__0,size(x, 3)"),
        ('kernel_shape = [3, 3], auto_pad = "SAME_UPPER"', "open__0,open__1"),
    ],
)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "Conv"])
def test_sizes_of_windows(op: str, attributes: str, expected: str) -> None:
    text = f"""g (float[1,4,H,W] x, float[6,4,K,L] w) => (float[] z)
    {{ y = {op} <{attributes}> (x{", w" if op == "Conv" else ""})
    z = ReduceSum <keepdims = 0> (y) }}"""
    kernel = attributes.partition("[")[2].partition("]")[0]
    text = text.replace("K,L", kernel.replace(" ", ""))
    if op == "AveragePool" and "dilations" in attributes:
        text = '<ir_version: 10, opset_import: ["": 19]>\n' + text
    channels = 6 if op == "Conv" else 4
    assert proven(text, "y") == f"float[1,{channels},{expected}]"


def test_equal_names_of_dims_prove_nothing() -> None:
    text = """g (float[N] x, float[N] w) => (float[] z)
    { s = Shape (w)  y = Expand (x, s)  z = ReduceSum <keepdims = 0> (y) }"""
    assert proven(text, "y") == "float[open__0]"


# -- simplify-shapes -------------------------------------------------------------------------------


def simplified(text: str) -> tuple[onnx.ModelProto, list[str]]:
    """The model after the pass and the rules that fired; sound, and the same in onnxruntime."""
    before = graphs.parsed(text)
    made, told = goldens.run(before, "simplify-shapes, remove-dead")
    sessions = [
        Session(proto.SerializeToString(), optimizations="off", threads=1)
        for proto in (before, made)
    ]
    rng = np.random.default_rng(0)
    for open_size in (1, 2, 5):
        feed = {
            info.name: rng.normal(
                size=[
                    d.dim_value if d.HasField("dim_value") else open_size
                    for d in info.type.tensor_type.shape.dim
                ]
            ).astype(np.float32)
            for info in before.graph.input
        }
        results = [session.run(feed) for session in sessions]
        for name, found in results[0].items():
            np.testing.assert_array_equal(found, results[1][name], strict=True)
    return made, [entry for entry in told if "remove-dead" not in entry]


def targets(made: onnx.ModelProto) -> list[list[int] | None]:
    """Targets of the Reshapes, None for one that is computed."""
    constants = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in made.graph.initializer}
    return [constants.get(n.input[1]) for n in made.graph.node if n.op_type == "Reshape"]


HEADS = """s = Shape (x)  b = Slice (s, zero, one)  n = Slice (s, one, two)"""
CONSTANTS = """<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4},
    int64[1] six = {6}, int64[1] free = {-1}, int64[1] last = {24}>"""


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("b, n, four, six", [0, 0, 4, 6]),
        ("b, n, last", [0, 0, 24]),
        ("b, free, four, six", [0, -1, 4, 6]),
        ("n, b, last", None),  # two sizes that follow from nothing
        ("b, four, n, six", None),  # the free size would stand beside one that may be zero
    ],
)
def test_targets_read_off_the_input(parts: str, expected: list[int] | None) -> None:
    made, told = simplified(
        f"""g (float[B,N,24] x) => (float[] y) {CONSTANTS} {{ {HEADS}
        t = Concat <axis = 0> ({parts})  r = Reshape (x, t)  y = ReduceSum <keepdims = 0> (r) }}"""
    )
    assert targets(made) == [expected]
    assert told[-1:] == ([] if expected is None else ["reshape-by-constant r"])


def test_a_free_size_beside_numbers() -> None:
    made, told = simplified(
        f"""g (float[B,N,24] x) => (float[] y) {CONSTANTS} {{ {HEADS}  m = Mul (b, n)
        t = Concat <axis = 0> (m, four, six)  r = Reshape (x, t)
        y = ReduceSum <keepdims = 0> (r) }}"""
    )
    assert targets(made) == [[-1, 4, 6]]
    assert told == ["reshape-by-constant r"]


def test_a_size_that_is_not_zero_wherever_the_model_runs() -> None:
    """The first Reshape fails for an empty batch, so that the second may as well."""
    made, _ = simplified(
        f"""g (float[B,N,24] x) => (float[] y) {CONSTANTS} {{ {HEADS}
        first = Concat <axis = 0> (b, free)  a = Reshape (x, first)
        t = Concat <axis = 0> (b, four, n, six)  r = Reshape (x, t)
        u = ReduceSum <keepdims = 0> (a)  v = ReduceSum <keepdims = 0> (r)  y = Add (u, v) }}"""
    )
    assert targets(made) == [[0, -1], [0, 4, -1, 6]]


def test_what_is_not_run_proves_nothing() -> None:
    made, told = goldens.run(
        graphs.parsed(
            f"""g (float[B,N,24] x) => (float[] y) {CONSTANTS} {{ {HEADS}
            first = Concat <axis = 0> (b, free)  a = Reshape (x, first)  unused = Relu (a)
            t = Concat <axis = 0> (b, four, n, six)  r = Reshape (x, t)
            y = ReduceSum <keepdims = 0> (r) }}"""
        ),
        "simplify-shapes",
    )
    assert targets(made) == [[0, -1], None]
    assert told == ["reshape-by-constant a"]


def test_zeros_that_are_sizes_are_not_turned_into_copies() -> None:
    made, told = simplified(
        f"""g (float[B,0,24] x) => (float[] y) {CONSTANTS} {{ {HEADS}
        t = Concat <axis = 0> (n, b)  r = Reshape <allowzero = 1> (x, t)
        y = ReduceSum <keepdims = 0> (r) }}"""
    )
    assert targets(made) == [None]
    assert told == []


def test_equal_sizes_are_computed_once() -> None:
    made, told = simplified(
        """g (float[B,3] x) => (int64[1] y, int64[1] z) <int64[1] zero = {0}, int64[1] one = {1}>
        { a = Relu (x)  s = Shape (x)  y = Slice (s, zero, one)
        t = Shape (a)  u = Slice (t, zero, one)  z = Add (u, one) }"""
    )
    assert told == ["merge-sizes t", "merge-sizes u"]
    assert [node.op_type for node in made.graph.node] == ["Shape", "Slice", "Add"]


def test_sizes_that_only_have_one_name_stay_apart() -> None:
    _, told = simplified(
        """g (float[B] x, float[B] w) => (int64[1] y, int64[1] z)
        { y = Shape (x)  z = Shape (w) }"""
    )
    assert told == []


# -- merge-concats ---------------------------------------------------------------------------------


def joined(before: str, expected: str, told: list[str]) -> None:
    goldens.golden("merge-concats", before, expected, told)


def test_concats_of_concats() -> None:
    joined(
        """g (float[2,3] x, float[2,4] w) => (float[2,N] y)
        { a = Concat <axis = 1> (x, w)  b = Concat <axis = -1> (w, a)
        y = Concat <axis = 1> (b, x, x) }""",
        """g (float[2,3] x, float[2,4] w) => (float[2,N] y)
        { y = Concat <axis = 1> (w, x, w, x, x) }""",
        ["merge-concats b", "merge-concats y"],
    )


@pytest.mark.parametrize(
    ("inner", "outer", "more"),
    [
        ("<axis = 0>", "<axis = 1>", ""),
        ("<axis = 1>", "<axis = 1>", "z = Neg (a)"),
    ],
)
def test_concats_that_stay(inner: str, outer: str, more: str) -> None:
    joined(
        f"""g (float[2,2] x) => (float[M,N] y, float[K,L] z)
        {{ a = Concat {inner} (x, x)  w = Concat <axis = 0> (x, x)  {more or "z = Neg (x)"}
        y = Concat {outer} (a, {"w" if "0" in inner else "x"}) }}""".replace(
            "w = Concat <axis = 0> (x, x)", "w = Concat <axis = 0> (x, x)" if "0" in inner else ""
        ),
        "",
        [],
    )


def test_parts_that_are_joined_again_are_the_whole() -> None:
    joined(
        """g (float[2,6] x, float[2,3] w) => (float[2,M] y, float[2,2] z)
        { a, b, c = Split <axis = -1> (x)
        y = Concat <axis = 1> (w, a, b, c, a)  z = Neg (b) }""",
        """g (float[2,6] x, float[2,3] w) => (float[2,M] y, float[2,2] z)
        { a, b, c = Split <axis = -1> (x)
        y = Concat <axis = 1> (w, x, a)  z = Neg (b) }""",
        ["join-parts y"],
    )


@pytest.mark.parametrize(
    ("axis", "parts"), [(1, "a, c, b"), (1, "a, b"), (1, "b, c, a"), (0, "a, b, c")]
)
def test_parts_that_are_joined_otherwise_stay(axis: int, parts: str) -> None:
    joined(
        f"""g (float[2,6] x, float[2,2] w) => (float[M,N] y)
        {{ a, b, c = Split <axis = 1> (x)
        y = Concat <axis = {axis}> (w, {parts}) }}""",
        "",
        [],
    )


# -- drop-zero-states ------------------------------------------------------------------------------

RECURRENT = {"RNN": ("x, w, r, , , h", 1), "GRU": ("x, w, r, , , h", 3)}
RECURRENT["LSTM"] = ("x, w, r, , , h, h, p", 4)


@pytest.mark.parametrize("op", RECURRENT)
@pytest.mark.parametrize("kind", ["zeros", "ones", "filled"])
def test_initial_states_of_zeros(op: str, kind: str) -> None:
    given, gates = RECURRENT[op]
    state = {
        "zeros": "h = Constant <value = float[1,1,2] {0.0, 0.0}> ()",
        "ones": "h = Constant <value = float[1,1,2] {1.0, 0.0}> ()",
        "filled": "h = ConstantOfShape (s)",
    }[kind]
    numbers = ", ".join(["0.5"] * 2 * 2 * gates)
    before = graphs.parsed(
        f"""g (float[3,1,2] x) => (float[3,1,1,2] y)
        <float[1,{2 * gates},2] w = {{{numbers}}}, float[1,{2 * gates},2] r = {{{numbers}}},
        float[1,6] p = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6}}, int64[3] s = {{1, 1, 2}}>
        {{ {state}  y = {op} <hidden_size = 2> ({given}) }}"""
    )
    made, told = goldens.run(before, "drop-zero-states")
    left = ["" if name == "h" and kind != "ones" else name for name in before.graph.node[-1].input]
    assert list(made.graph.node[-1].input) == left
    assert len(told) == list(before.graph.node[-1].input).count("h") * (kind != "ones")
    goldens.check(before, made, "drop-zero-states")
