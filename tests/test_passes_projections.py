"""Products of one value with several weights, which become one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.fusion.merge_projections import MergeProjections
from graphopt.runtime import Session
from tests import goldens, graphs

_PASSES = "merge-projections, remove-dead"
_PLAIN = """p = MatMul (x, wq)  q = Add (p, bq)
            k = MatMul (x, wk)
            r = MatMul (x, wv)  v = Add (bv, r)"""
_HEADS = """p = MatMul (x, wq)  pb = Add (p, bq)  ph = Reshape (pb, two)
            q = Transpose <perm = [0, 2, 1, 3]> (ph)
            r = MatMul (x, wk)  rh = Reshape (r, two)
            k = Transpose <perm = [0, 2, 3, 1]> (rh)
            s = MatMul (x, wv)  sb = Add (s, bv)  sh = Reshape (sb, two)
            v = Transpose <perm = [0, 2, 1, 3]> (sh)"""
_WEIGHTS = """float[2,4] wq = {1, 2, 3, 4, 5, 6, 7, 8}, float[4] bq = {1, 2, 3, 4},
              float[2,4] wk = {1, 0, 1, 0, 0, 1, 0, 1},
              float[2,4] wv = {8, 7, 6, 5, 4, 3, 2, 1}, float[4] bv = {9, 8, 7, 6}"""
_TOGETHER = """float[2,12] "q/constant" =
               {1, 2, 3, 4, 1, 0, 1, 0, 8, 7, 6, 5, 5, 6, 7, 8, 0, 1, 0, 1, 4, 3, 2, 1},
               float[12] "q/constant_2" = {1, 2, 3, 4, 0, 0, 0, 0, 9, 8, 7, 6}"""


def model(
    nodes: str, weights: str = _WEIGHTS, outputs: str = "q, k, v", opset: int = 17, rank: int = 0
) -> onnx.ModelProto:
    """The nodes, between x and outputs of open shapes: of rank 4 where heads are taken apart."""
    dims = ",".join("?" * (rank or (4 if "two" in weights else 3)))
    ports = ", ".join(f"float[{dims}] {name.strip()}" for name in outputs.split(","))
    return graphs.parsed(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[n,3,2] x) => ({ports}) <{weights}> {{ {nodes} }}"""
    )


def heads(two: str, count: int = 4) -> str:
    return f"{_WEIGHTS}, int64[{count}] two = {{{two}}}"


def merged(original: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The model after the pass, which must compute the same, and what the pass told."""
    found, told = goldens.run(original, _PASSES)
    goldens.check(original, found, _PASSES)
    return found, [change for change in told if not change.startswith("remove-dead")]


def left_alone(before: onnx.ModelProto) -> None:
    assert goldens.run(before, "merge-projections")[1] == []


def test_a_split_gives_each_its_columns() -> None:
    expected = """["q/MatMul"] "q/MatMul" = MatMul (x, "q/constant")
                  ["q/Add"] "q/Add" = Add ("q/MatMul", "q/constant_2")
                  ["q/Split"] q, k, v = Split <axis: int = 2> ("q/Add", "q/constant_3")"""
    weights = f'{_TOGETHER}, int64[3] "q/constant_3" = {{4, 4, 4}}'
    made = model(expected, weights)
    told = ["merge-projections q"]
    found, what = merged(model(_PLAIN))
    assert onnx.printer.to_text(found) == onnx.printer.to_text(made)
    assert what == told


@pytest.mark.parametrize("rows", ["0, 0", "0, -1", "-1, 3", "0, 3"])
def test_heads_are_taken_apart_once(rows: str) -> None:
    expected = """["ph/MatMul"] "ph/MatMul" = MatMul (x, "ph/constant")
        ["ph/Add"] "ph/Add" = Add ("ph/MatMul", "ph/constant_2")
        ["ph/Reshape"] "ph/Reshape" = Reshape ("ph/Add", "ph/constant_3")
        ["ph/Split"] ph, rh, sh = Split <axis: int = 2> ("ph/Reshape", "ph/constant_4")
        q = Transpose <perm: ints = [0, 2, 1, 3]> (ph)
        k = Transpose <perm: ints = [0, 2, 3, 1]> (rh)
        v = Transpose <perm: ints = [0, 2, 1, 3]> (sh)"""
    together = _TOGETHER.replace("q/", "ph/")
    weights = f"""{together}, int64[4] "ph/constant_3" = {{{rows}, 6, 2}},
                  int64[3] "ph/constant_4" = {{2, 2, 2}}"""
    original = model(_HEADS, heads(f"{rows}, 2, 2"))
    found, told = merged(original)
    wanted = model(expected, weights + ", int64[1] two = {0}")
    del wanted.graph.initializer[-1]
    assert onnx.printer.to_text(found) == onnx.printer.to_text(wanted)
    assert told == ["merge-projections ph"]


@pytest.mark.parametrize("free", ["0, 0, -1, 2", "0, 0, 2, -1"])
def test_what_is_left_of_the_width(free: str) -> None:
    found, told = merged(model(_HEADS, heads(free)))
    assert told == ["merge-projections ph"]
    assert len(found.graph.node) == 7


def test_what_is_left_of_more_than_the_width() -> None:
    """The free size takes in a row, so the heads are not those of each product alone."""
    nodes = """p = MatMul (x, wq)  q = Reshape (p, two)  k0 = MatMul (x, wk)
               k = Reshape (k0, two)  v0 = MatMul (x, wv)  v = Reshape (v0, two)"""
    found, _ = merged(model(nodes, heads("0, 1, -1, 2")))
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Split", *["Reshape"] * 3]


def test_heads_that_nothing_moves() -> None:
    nodes = """p = MatMul (x, wq)  q = Reshape (p, two)  k0 = MatMul (x, wk)
               k = Reshape (k0, two)  v0 = MatMul (x, wv)  v = Reshape (v0, two)"""
    original = model(nodes, heads("0, 0, 2, 2"))
    found, _ = merged(original)
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Reshape", "Split"]


def test_other_numbers_of_heads() -> None:
    """As where several queries share a key."""
    weights = """float[2,6] wq = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12},
        float[2,2] wk = {1, 2, 3, 4}, float[2,2] wv = {4, 3, 2, 1},
        int64[4] three = {0, 0, 3, 2}, int64[4] one = {0, 0, 1, 2}, int64[1] two = {0}"""
    nodes = """q0 = MatMul (x, wq)  q = Reshape (q0, three)
               k0 = MatMul (x, wk)  k = Reshape (k0, one)
               v0 = MatMul (x, wv)  v = Reshape (v0, one)"""
    found, _ = merged(model(nodes, weights))
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Reshape", "Split"]


@pytest.mark.parametrize(
    ("target", "count"), [("0, 3, 4, 1", 4), ("3, 3, 2, 2", 4), ("0, 0, 1, 2, 2", 5)]
)
def test_whatever_the_target_says(target: str, count: int) -> None:
    """The numbers are those of the original, or it is split by columns."""
    nodes = """p = MatMul (x, wq)  q = Reshape (p, two)  k0 = MatMul (x, wk)
               k = Reshape (k0, two)  v0 = MatMul (x, wv)  v = Reshape (v0, two)"""
    assert merged(model(nodes, heads(target, count), rank=count))[1]


def test_before_opset_13() -> None:
    found, told = merged(model(_HEADS, heads("0, 0, 2, 2"), opset=11))
    assert told == ["merge-projections ph"]
    split = next(node for node in found.graph.node if node.op_type == "Split")
    assert len(split.input) == 1


def test_a_bias_of_one_number() -> None:
    weights = _WEIGHTS.replace("float[4] bq = {1, 2, 3, 4}", "float bq = {7}")
    assert merged(model(_PLAIN, weights))[1] == ["merge-projections q"]


def test_in_a_body() -> None:
    before = graphs.parsed(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (bool c, float[n,3,2] x) => (float[n,3,4] y) <{_WEIGHTS}> {{
        y = If (c) <then_branch = t () => (float[?,?,?] s) {{
        {_PLAIN} a = Add (q, k)  s = Add (a, v) }},
        else_branch = e () => (float[?,?,?] z) {{ z = MatMul (x, other) }}> }}""".replace(
            "bv = {9, 8, 7, 6}", "bv = {9, 8, 7, 6}, float[2,4] other = {1, 1, 1, 1, 1, 1, 1, 1}"
        )
    )
    assert merged(before)[1][0] == "merge-projections q"


# -- what stays as it is ---------------------------------------------------------------------------


def test_two_products_alone_would_be_as_many_nodes() -> None:
    left_alone(model("q = MatMul (x, wq)  k = MatMul (x, wk)", outputs="q, k"))


def test_a_weight_that_is_read_elsewhere_is_not_stored_twice() -> None:
    two = """q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wq)"""
    left_alone(model(two))


def test_weights_that_a_caller_replaces() -> None:
    original = model(_PLAIN)
    for tensor in original.graph.initializer:
        if len(tensor.dims) == 2:
            original.graph.input.append(graphs.value(tensor.name, tensor.dims))
    left_alone(original)


def test_products_with_what_is_computed() -> None:
    left_alone(model("a = Neg (wq)  q = MatMul (x, a)  k = MatMul (x, a)  v = MatMul (x, a)"))


def test_a_bias_that_is_not_by_column_stays_outside() -> None:
    weights = _WEIGHTS.replace("float[4] bq = {1, 2, 3, 4}", "float[3,1] bq = {1, 2, 3}")
    original = model(_PLAIN, weights)
    found, told = merged(original)
    assert told == ["merge-projections p"]
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Add", "Split", "Add"]


def test_what_is_needed_as_it_is_stays() -> None:
    """The first product is an output, so its bias is added to what Split gives."""
    assert merged(model(_PLAIN, outputs="p, q, k, v"))[1] == ["merge-projections p"]


def test_models_without_their_weights_are_left_alone() -> None:
    tensors = [onnx.TensorProto(name=n, data_type=1, dims=[64, 64]) for n in "abc"]
    nodes = [graphs.node("MatMul", ["x", n], [f"y{n}"]) for n in "abc"]
    ports = [graphs.value("x", (2, 64))], [graphs.value(f"y{n}", (2, 64)) for n in "abc"]
    left_alone(graphs.model(nodes, *ports, tensors))


def test_denied_merges_are_not_made() -> None:
    edit = Editor(Model.load(model(_PLAIN)), denied=[("merge-projections", "q")])
    MergeProjections().run(edit.model, edit)
    assert edit.changes == []


def test_weights_of_other_sizes() -> None:
    """Exactly the numbers that each product gives alone, at sizes that no tile divides."""
    rng = np.random.default_rng(0)
    sizes = (5, 1, 37)
    tensors = [
        onnx.numpy_helper.from_array(rng.integers(-8, 8, (17, size)).astype(np.float32), f"w{size}")
        for size in sizes
    ]
    nodes = [graphs.node("MatMul", ["x", f"w{size}"], [f"y{size}"]) for size in sizes]
    outputs = [graphs.value(f"y{size}", (2, 3, size)) for size in sizes]
    original = graphs.model(nodes, [graphs.value("x", (2, 3, 17))], outputs, tensors)
    found, _ = merged(original)
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Split"]
    x = rng.integers(-8, 8, (2, 3, 17)).astype(np.float32)
    session = Session(found.SerializeToString(), optimizations="off", threads=1)
    with session:
        results = session.run({"x": x})
    for size, tensor in zip(sizes, tensors, strict=True):
        wanted = x @ onnx.numpy_helper.to_array(tensor)
        np.testing.assert_array_equal(results[f"y{size}"], wanted)
