"""Products with weights of 8 and 4 bits: numbers, kernels, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.quantize.weights import BLOCKS, can_be_weight_only, make_weight_only
from tests import graphs
from tests.optimized import applied, nodes, noise_of_rounding, operators, run, sqnr, stored

Array = NDArray[Any]
RNG = np.random.default_rng(0)
K, N = 200, 48
W = RNG.normal(size=(K, N)).astype(np.float32)
B = RNG.normal(size=N).astype(np.float32)
X = RNG.normal(size=(32, K)).astype(np.float32)


def constant(name: str, array: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def product(
    opset: int = 21, weights: Array = W, bias: Array | None = B, size: int | str = "a"
) -> onnx.ModelProto:
    held = [constant("w", weights)]
    made = [graphs.node("MatMul", ["x", "w"], ["y" if bias is None else "p"])]
    if bias is not None:
        held.append(constant("b", bias))
        made.append(graphs.node("Add", ["p", "b"], ["y"]))
    inputs = [graphs.value("x", (size, len(weights)))]
    return graphs.model(made, inputs, [graphs.value("y", ("m", "n"))], held, opset=opset)


def quantized(before: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    def change(edit: Editor) -> None:
        for node in nodes(edit, "MatMul", "Gemm"):
            assert can_be_weight_only(node, edit) is None
            assert make_weight_only(edit, node, **options)

    made, edit = applied(before, change)
    assert {change.rule for change in edit.changes} == {"quantize-weights"}
    return made


def weights_of(made: onnx.ModelProto, rows: int = K) -> Array:
    """The matrix that the model's integers stand for, read as the operators define them."""
    held = stored(made)
    scales = held["w/scales"].astype(np.float64)
    packed = [name for name in held if name.startswith("w/packed")]
    if not packed:
        (q,) = (held[f"w/{kind}"] for kind in ("int4", "int8") if f"w/{kind}" in held)
        dequantize = next(n for n in made.graph.node if n.op_type == "DequantizeLinear")
        sizes = {a.name: a.i for a in dequantize.attribute}
        if sizes["axis"] == 1:
            return np.asarray(q.astype(np.float64) * scales)
        return np.asarray(
            [q[k].astype(int) * scales[k // sizes["block_size"]] for k in range(rows)]
        )
    node = next(n for n in made.graph.node if n.op_type == "MatMulNBits")
    stated = {a.name: a.i for a in node.attribute}
    columns, block, middle = stated["N"], stated["block_size"], 2 ** (stated["bits"] - 1)
    found = np.zeros((stated["K"], columns))
    for n in range(columns):
        for k in range(stated["K"]):
            part, at = held[packed[0]][n, k // block], k % block
            u = part[at] if stated["bits"] == 8 else (part[at // 2] >> 4 * (at % 2)) & 15
            found[k, n] = (int(u) - middle) * scales[n, k // block]
    return found


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 20, 21])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128, None])
def test_integers_are_near_the_weights(opset: int, bits: int, block: int | None) -> None:
    made = quantized(product(opset), bits=bits, block=block)
    near = weights_of(made)
    size = block or K
    for start in range(0, K, size):
        part = slice(start, start + size)
        step = np.abs(W[part]).max(axis=0) / (2 ** (bits - 1) - 1)
        if bits == 8:
            assert (np.abs(near[part] - W[part]) <= step / 2 * (1 + 1e-5)).all()
        # Clipping pays only where it loses less than rounding what is not clipped.
        assert ((near[part] - W[part]) ** 2).mean() <= (step**2).mean() / 12 * 1.1
    found = run(made, x=X)
    steps = np.ptp(X, axis=1, keepdims=True) / 255  # what activations lose, at most, by row
    lost = noise_of_rounding(X, steps) + ((near - W) ** 2).mean() / (W.astype(float) ** 2).mean()
    assert sqnr(X @ W + B, found) > -10 * np.log10(lost) - 1
    if bits == 8:
        assert sqnr(X @ W + B, found) > 30


@pytest.mark.parametrize("opset", [11, 21])
@pytest.mark.parametrize("rows", [1, 7, 16, 33])
@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_sizes(opset: int, rows: int, columns: int, bits: int) -> None:
    weights, x = W[:rows, :columns], X[:, :rows]
    before = product(opset, weights, None)
    made = quantized(before, bits=bits, block=16)
    expected = x @ weights_of(made, rows)
    np.testing.assert_allclose(run(made, "off", x=x), expected, atol=np.abs(expected).max() / 50)
    assert sqnr(expected, run(made, x=x)) > 30


@pytest.mark.parametrize("block", [32, None])
@pytest.mark.parametrize("opset", [17, 21])
def test_gptq_loses_less_on_inputs_alike(opset: int, block: int | None) -> None:
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(512, 12)) @ rng.normal(size=(12, K))).astype(np.float32)
    x += rng.normal(size=x.shape).astype(np.float32) / 8
    gram = x.T.astype(np.float64) @ x
    near = quantized(product(opset), bits=4, block=block)
    best = quantized(product(opset), bits=4, block=block, rounding="gptq", gram=gram)
    lost = [np.square(x @ (weights_of(made) - W)).sum() for made in (near, best)]
    assert lost[1] < lost[0] / 2


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 17, 21, 25])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [*BLOCKS, None])
@pytest.mark.parametrize("size", ["a", 8])
def test_one_kernel(opset: int, bits: int, block: int | None, size: int | str) -> None:
    made = quantized(product(opset, size=size), bits=bits, block=block)
    found = operators(made)
    assert found.pop("Add", 0) <= 1
    assert found == {"MatMulNBits": 1}
    by_column = opset >= 13 and bits == 8 and block is None
    contrib = {node.op_type for node in made.graph.node if node.domain}
    assert contrib == (set() if opset >= 21 or by_column else {"MatMulNBits"})


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("opset", [17, 21])
def test_gemm(trans: int, opset: int) -> None:
    held = [constant("w", W.T if trans else W), constant("b", B[None])]
    node = graphs.node("Gemm", ["x", "w", "b"], ["y"], transB=trans)
    inputs, outputs = [graphs.value("x", ("a", K))], [graphs.value("y", ("m", "n"))]
    before = graphs.model([node], inputs, outputs, held, opset=opset)
    made = quantized(before)
    found = operators(made)
    assert found["MatMulNBits"] == 1
    assert found["DequantizeLinear"] == found["Gemm"] == 0
    assert sqnr(X @ W + B, run(made, x=X)) > 30


@pytest.mark.parametrize("opset", [17, 21])
def test_weights_that_two_nodes_read_stay_one(opset: int) -> None:
    made = [graphs.node("MatMul", [x, "w"], [y]) for x, y in (("x", "y"), ("z", "v"))]
    inputs = [graphs.value(name, ("a", K)) for name in ("x", "z")]
    outputs = [graphs.value(name, ("m", "n")) for name in ("y", "v")]
    before = graphs.model(made, inputs, outputs, [constant("w", W)], opset=opset)
    after = quantized(before)
    assert operators(after) == {"MatMulNBits": 2}
    assert len(stored(after)) == 2
    assert sqnr(run(before, x=X, z=X), run(after, x=X, z=X)) > 30


@pytest.mark.parametrize("opset", [17, 21])
def test_inside_bodies(opset: int) -> None:
    branches = [
        graphs.graph(
            [
                graphs.node("Transpose", ["w"], [f"t{i}"]),
                graphs.node("MatMul", ["x", f"t{i}"], [f"y{i}"]),
            ],
            [],
            [graphs.value(f"y{i}", ("m", "n"))],
            name=f"branch{i}",
        )
        for i in range(2)
    ]
    inputs = [graphs.value("x", ("a", K)), graphs.CONDITION]
    outputs, held = [graphs.value("y", ("m", "n"))], [constant("w", W.T)]
    before = graphs.model([graphs.if_node(*branches)], inputs, outputs, held, opset=opset)
    after = quantized(before)
    assert operators(after) == {"If": 1, "MatMulNBits": 2}
    assert len(stored(after)) == 2
    assert sqnr(X @ W, run(after, x=X, c=np.array(True))) > 30


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("inner", [False, True])
def test_weights_of_one_body(opset: int, inner: bool) -> None:
    held = [constant("w", W)]
    branches = [
        graphs.graph(
            [graphs.node("MatMul", ["x", "w"], ["y0"])],
            [],
            [graphs.value("y0", ("m", "n"))],
            held if inner else [],
            name="one",
        ),
        graphs.graph(
            [graphs.node("Identity", ["z"], ["y1"])],
            [],
            [graphs.value("y1", ("m", "n"))],
            [],
            "two",
        ),
    ]
    inputs = [graphs.value("x", ("a", K)), graphs.value("z", ("a", N)), graphs.CONDITION]
    outputs = [graphs.value("y", ("m", "n"))]
    before = graphs.model(
        [graphs.if_node(*branches)], inputs, outputs, [] if inner else held, opset=opset
    )
    after = quantized(before)
    found = operators(after)
    assert found["MatMulNBits"] == 1
    assert found["DequantizeLinear"] == 0
    assert sqnr(X @ W, run(after, x=X, z=X[:, :N], c=np.array(True))) > 30


def test_four_bits_take_half_a_byte() -> None:
    for opset in (17, 21):
        made = quantized(product(opset, bias=None), bits=4, block=64)
        blocks = -(-K // 64)
        size = sum(len(t.raw_data) for t in made.graph.initializer)
        rows = K if opset >= 21 else blocks * 64
        assert size == N * rows // 2 + 4 * N * blocks
    assert stored(made)["w/int4"].dtype == ml_dtypes.int4


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    edit = Editor(Model.load(product()))
    (node,) = nodes(edit, "MatMul")
    with pytest.raises(ValueError, match="no kernel takes 5 bits in blocks of 32"):
        make_weight_only(edit, node, bits=5, block=32)
    with pytest.raises(ValueError, match="no kernel takes 8 bits in blocks of 48"):
        make_weight_only(edit, node, block=48)
    with pytest.raises(ValueError, match="GPTQ needs the Gram matrix"):
        make_weight_only(edit, node, rounding="gptq")
    add = nodes(edit, "Add")[0]
    assert can_be_weight_only(add, edit) == "it is no MatMul or Gemm"
    with pytest.raises(ValueError, match=r"Add .* cannot have weights of 8 bits: it is no MatMul"):
        make_weight_only(edit, add)
    assert edit.mark() == (0, 0)
    denied = Editor(edit.model, denied=[("quantize-weights", "y")])
    assert not make_weight_only(denied, node)
    assert denied.mark() == (0, 0)
