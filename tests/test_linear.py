"""Linear layers: as matrices they give what onnxruntime gives; nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.linear import Layer, layer_of, linear_layers
from graphopt.passes.prune.sparse import Sparsify
from graphopt.runtime import Session
from graphopt.statistics import Statistics
from tests.prune_runs import weighted

Array = NDArray[Any]


def layers(text: str, opset: int = 17) -> tuple[onnx.ModelProto, Editor, list[Layer]]:
    proto = weighted(text, opset)
    edit = Editor(Model.load(proto))
    return proto, edit, linear_layers(edit)


SEEN = {
    "conv": (
        "(float[2,6,9,8] x, float[4,6,3,2] w, float[4] b) => (float[a,c,d,e] y)"
        " { y = Conv<pads=[1,0,2,1],strides=[2,1],dilations=[1,2]>(x, w, b) }"
    ),
    "groups": (
        "(float[2,6,9,8] x, float[4,3,3,3] w, float[4] b) => (float[a,c,d,e] y)"
        " { y = Conv<group=2>(x, w, b) }"
    ),
    "depthwise": (
        "(float[2,6,9,8] x, float[12,1,3,3] w) => (float[a,c,d,e] y) { y = Conv<group=6>(x, w) }"
    ),
    "valid": (
        "(float[2,6,9,8] x, float[4,6,2,2] w) => (float[a,c,d,e] y)"
        ' { y = Conv<auto_pad="VALID",strides=[3,2]>(x, w) }'
    ),
    "one axis": (
        "(float[2,6,9] x, float[4,6,3] w) => (float[a,c,d] y) { y = Conv<pads=[2,1]>(x, w) }"
    ),
    "gemm": "(float[5,6] x, float[6,4] w, float[4] b) => (float[n,m] y) { y = Gemm(x, w, b) }",
    "gemm turned": "(float[5,6] x, float[4,6] w) => (float[n,m] y) { y = Gemm<transB=1>(x, w) }",
    "matmul": "(float[2,5,6] x, float[6,4] w) => (float[n,k,m] y) { y = MatMul(x, w) }",
    "matmul of a row": "(float[6] x, float[6,4] w) => (float[m] y) { y = MatMul(x, w) }",
    "matmul and add": (
        "(float[2,5,6] x, float[6,4] w, float[4] b) => (float[n,k,m] y)"
        " { h = MatMul(x, w) y = Add(h, b) }"
    ),
    "add and matmul": (
        "(float[2,5,6] x, float[6,4] w, float[4] b) => (float[n,k,m] y)"
        " { h = MatMul(x, w) y = Add(b, h) }"
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_matrix_and_rows_give_what_the_layer_gives(name: str) -> None:
    """By the regression of what the layer gives on the rows that it reads: matrix and bias fit."""
    proto, _, (layer,) = layers(SEEN[name])
    m, k = layer.shape
    matrix = layer.matrix()
    assert matrix.shape == (m, k)
    assert layer.root == layer.node.outputs[0].name  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(exported_shape(proto)).astype(np.float32)
    if layer.result.name != "y":
        proto.graph.output.append(onnx.ValueInfoProto(name=layer.result.name))
    with Session(proto.SerializeToString(), threads=1) as session:
        result = session.run({"x": x})[layer.result.name]
    assert result.shape[layer.channel_axis] == m
    bias = np.zeros(m)
    if layer.bias is not None and layer.bias.value is not None and not layer.bias.is_apart:
        bias = layer.bias.value.weight.values  # type: ignore[union-attr]
    observer = layer.observer("regression")
    seen = Statistics([observer])
    seen.regress(observer, x, result)
    found = seen.regressions(observer)
    assert len(found) == layer.groups
    for part, sums in zip(layer.parts(), found, strict=True):
        whole = np.column_stack([matrix[part], bias[part]])
        assert whole.shape[1] == len(sums.matrix)
        expected = whole @ sums.matrix
        np.testing.assert_allclose(sums.cross.T, expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(
            sums.energy, np.einsum("mk,mk->m", expected, whole), rtol=1e-4, atol=1e-3
        )


def exported_shape(proto: onnx.ModelProto) -> list[int]:
    return [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", SEEN)
def test_a_matrix_is_stored_as_it_was_read(name: str) -> None:
    _, _, (layer,) = layers(SEEN[name])
    stored = layer.stored(layer.matrix())
    np.testing.assert_array_equal(stored, layer.weight.values)
    assert stored.flags["C_CONTIGUOUS"]
    numbers = np.arange(layer.weight.size).reshape(layer.weight.shape)
    np.testing.assert_array_equal(layer.stored(layer.matrix(numbers)), numbers)


@pytest.mark.parametrize(
    ("name", "taps", "groups"),
    [("conv", 6, 1), ("groups", 9, 2), ("depthwise", 9, 6), ("gemm", 1, 1), ("matmul", 1, 1)],
)
def test_taps_and_groups(name: str, taps: int, groups: int) -> None:
    _, _, (layer,) = layers(SEEN[name])
    assert (layer.taps, layer.groups) == (taps, groups)


@pytest.mark.parametrize(
    ("name", "node", "slot", "value", "is_apart"),
    [
        ("conv", "Conv", 2, "b", False),
        ("depthwise", "Conv", 2, None, False),
        ("gemm", "Gemm", 2, "b", False),
        ("gemm turned", "Gemm", 2, None, False),
        ("matmul and add", "Add", 1, "b", True),
        ("add and matmul", "Add", 0, "b", True),
    ],
)
def test_where_the_bias_is(
    name: str, node: str, slot: int, value: str | None, is_apart: bool
) -> None:
    _, _, (layer,) = layers(SEEN[name])
    assert layer.bias is not None
    found = layer.bias.value
    assert (layer.bias.node.op, layer.bias.slot, layer.bias.is_apart) == (node, slot, is_apart)
    assert (found.name if found is not None else None) == value


HEAD = "(float[5,6] x, float[5,4] x2, float[6,4] w, float[4] b, float[1] one, float[1,4] row)"
UNBIASED = {
    "nothing behind": "(float[n,m] y) { y = MatMul(x, w) }",
    "an activation": "(float[n,m] y) { h = MatMul(x, w) y = Add(h, x2) }",
    "too short": "(float[n,m] y) { h = MatMul(x, w) y = Add(h, one) }",
    "a matrix": "(float[n,m] y) { h = MatMul(x, w) y = Add(h, row) }",
    "read twice": "(float[n,m] y, float[n,m] z) { h = MatMul(x, w) y = Add(h, b) z = Relu(h) }",
    "an output": "(float[n,m] y, float[n,m] h) { h = MatMul(x, w) y = Add(h, b) }",
    "a bias of two": "(float[n,m] y, float[4] z) { h = MatMul(x, w) y = Add(h, b) z = Relu(b) }",
    "a bias given out": "(float[n,m] y, float[4] b) { h = MatMul(x, w) y = Add(h, b) }",
    "another operator": "(float[n,m] y) { h = MatMul(x, w) y = Mul(h, b) }",
    "gemm's, a matrix": "(float[n,m] y) { y = Gemm(x, w, row) }",
    "gemm's, of two": "(float[n,m] y, float[4] z) { y = Gemm(x, w, b) z = Relu(b) }",
    "gemm's, no constant": "(float[n,m] y) { y = Gemm(x, w, x2) }",
}


@pytest.mark.parametrize("name", UNBIASED)
def test_what_is_no_bias_that_can_be_set(name: str) -> None:
    _, _, (layer,) = layers(f"{HEAD} => {UNBIASED[name]}")
    assert layer.bias is None


NONE = {
    "same padding": (
        "(float[2,6,9] x, float[4,6,3] w) => (float[a,c,d] y)"
        ' { y = Conv<auto_pad="SAME_UPPER">(x, w) }'
    ),
    "no constant": "(float[5,6] x, float[6,4] x2) => (float[n,m] y) { y = MatMul(x, x2) }",
    "constant first": "(float[6,4] x, float[5,6] w) => (float[n,m] y) { y = MatMul(w, x) }",
    "a stack": "(float[3,5,6] x, float[3,6,4] w) => (float[s,n,m] y) { y = MatMul(x, w) }",
    "a vector": "(float[5,6] x, float[6] w) => (float[n] y) { y = MatMul(x, w) }",
    "scaled": "(float[5,6] x, float[6,4] w) => (float[n,m] y) { y = Gemm<alpha=0.5>(x, w) }",
    "a scaled bias": (
        "(float[5,6] x, float[6,4] w, float[4] b) => (float[n,m] y) { y = Gemm<beta=2.0>(x, w, b) }"
    ),
    "turned input": "(float[6,5] x, float[6,4] w) => (float[n,m] y) { y = Gemm<transA=1>(x, w) }",
    "transposed": (
        "(float[2,6,9] x, float[6,4,3] w) => (float[a,c,d] y) { y = ConvTranspose(x, w) }"
    ),
    "two constants": (
        "(float[5,4] x, float[5,6] v, float[6,4] w) => (float[n,m] y)"
        " { h = MatMul(v, w) y = Add(h, x) }"
    ),
    "nobody asks": "(float[5,6] x, float[6,4] w) => (float[n,m] y) { y = Relu(x) }",
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_linear_layer(name: str) -> None:
    assert layers(NONE[name])[2] == []


def test_weights_of_other_types_and_places() -> None:
    text = SEEN["matmul"]
    proto = weighted(text)
    tensor = proto.graph.initializer[0]
    array = onnx.numpy_helper.to_array(tensor)

    def found(*, sparse: bool = False) -> int:
        return len(linear_layers(Editor(Model.load(proto)), sparse=sparse))

    assert found() == 1
    proto.graph.input.append(  # anybody may give another one
        onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, array.shape)
    )
    assert found() == 0
    proto.graph.input.pop()
    tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64), "w"))
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert found() == 0


def test_sparse_weights_where_they_are_asked_for() -> None:
    proto = weighted("(float[5,64] x, float[64,64] w) => (float[n,m] y) { y = MatMul(x, w) }")
    array = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array[np.abs(array) < 0.3] = 0
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    model = Model.load(proto)
    run_pipeline(model, [Sparsify()])
    edit = Editor(Model.load(exporter.to_proto(model)))
    assert linear_layers(edit) == []
    (layer,) = linear_layers(edit, sparse=True)
    np.testing.assert_array_equal(layer.matrix(), array.T)
    assert layer.weight.nbytes < array.nbytes


def test_who_shares_weights_does_not_own_them() -> None:
    _, _, found = layers(
        "(float[5,6] x, float[6,6] w) => (float[n,m] y) { h = MatMul(x, w) y = MatMul(h, w) }"
    )
    assert [layer.is_own for layer in found] == [False, False]
    _, _, (layer,) = layers(
        "(float[5,6] x, float[6,6] w) => (float[n,m] y, float[6,6] w) { y = MatMul(x, w) }"
    )
    assert not layer.is_own
    _, _, (layer,) = layers(SEEN["conv"])
    assert layer.is_own


def test_bodies_have_no_layers() -> None:
    _, edit, found = layers(
        "(float[5,6] x, bool c, float[6,4] w, float[6,4] w2) => (float[n,m] y) { h = MatMul(x, w)"
        " y = If(c) <then_branch = t () => (float[n,m] u) { u = MatMul(x, w2) },"
        " else_branch = e () => (float[n,m] v) { v = Relu(h) }> }"
    )
    assert [layer.root for layer in found] == ["h"]
    assert [layer_of(edit, node) is None for node in edit.model.graph.nodes] == [False, True]
