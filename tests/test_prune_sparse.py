"""Sparse initializers: what becomes one, what onnxruntime makes of it, back to dense to the bit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from graphopt import api, cli, exporter, inspection
from graphopt.edit import Editor
from graphopt.errors import ModelError, RuntimeFailure, UsageError
from graphopt.ir import Model, Weight
from graphopt.manager import run_pipeline
from graphopt.passes.prune.sparse import Sparsify
from graphopt.runtime import Session
from graphopt.storage import Store
from tests import goldens, graphs, int8_runs
from tests.graphs import node, value
from tests.optimized import operators

Array = NDArray[Any]
RNG_SHAPE = (64, 48)


def sparse_array(
    shape: tuple[int, ...] = RNG_SHAPE, dtype: Any = np.float32, zeros: float = 0.9
) -> Array:
    """That share of zeros, the others anything but zero."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, zeros)).encode()))
    flat = rng.integers(1, 100, int(np.prod(shape))).astype(np.float64)
    flat *= rng.choice([-1, 1], flat.size) if np.dtype(dtype).kind != "u" else 1
    flat[rng.permutation(flat.size)[: round(zeros * flat.size)]] = 0
    return flat.reshape(shape).astype(dtype)


def by_hand(
    array: Array, name: str = "w", *, coordinates: bool = False, change: Any = None
) -> onnx.SparseTensorProto:
    """The array as ONNX's own helpers would state it, indices of 8 bytes; `change` edits them."""
    where = np.flatnonzero(array)
    values = numpy_helper.from_array(array.reshape(-1)[where], name)
    if coordinates:
        where = np.stack(np.unravel_index(where, array.shape), axis=1)
    where = where if change is None else change(where)
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(where.astype(np.int64)), array.shape
    )


def with_sparse(
    proto: onnx.ModelProto, tensor: onnx.SparseTensorProto, *more: onnx.SparseTensorProto
) -> onnx.ModelProto:
    """The model with these in the place of the dense initializers of their names."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    names = {each.values.name for each in (tensor, *more)}
    kept = [each for each in made.graph.initializer if each.name not in names]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    made.graph.sparse_initializer.extend([tensor, *more])
    return made


def sparsified(proto: onnx.ModelProto, least: float = 0.0) -> onnx.ModelProto:
    made, _ = goldens.run(proto, f"sparsify{{least={least}}}")
    return made


def densified(proto: onnx.ModelProto) -> onnx.ModelProto:
    made, _ = goldens.run(proto, "densify")
    return made


def sparse_names(proto: onnx.ModelProto) -> list[str]:
    return [tensor.values.name for tensor in proto.graph.sparse_initializer]


def stored_bits(proto: onnx.ModelProto) -> dict[str, bytes]:
    """Dense initializers as they lie in memory."""
    return {t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer}


def bits(model: onnx.ModelProto, feed: dict[str, Any], level: Any = "off") -> list[bytes]:
    with Session(model.SerializeToString(), optimizations=level, threads=1) as session:
        return [np.asarray(found).tobytes() for found in session.run(feed).values()]


def matmul(array: Array | None = None) -> onnx.ModelProto:
    array = sparse_array() if array is None else array
    inputs = [value("x", ("n", array.shape[0]))]
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    outputs = [value("y", ("n", array.shape[1]))]
    return graphs.model(nodes, inputs, outputs, [numpy_helper.from_array(array, "w")])


def constant_model(array: Array, opset: int = 21) -> onnx.ModelProto:
    """What onnxruntime makes of the constant, as float."""
    cast = node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
    output = value("y", array.shape)
    return graphs.model([cast], [], [output], [numpy_helper.from_array(array, "w")], opset)


def pruned(name: str = "cnn", zeros: float = 0.9) -> onnx.ModelProto:
    """A digits model whose weights have lost their smallest elements."""
    proto = onnx.load(graphs.ROOT / "models" / "digits" / f"{name}.onnx")
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if array.ndim > 1 and array.dtype == np.float32:
            flat = array.reshape(-1)
            flat[np.argsort(np.abs(flat))[: int(zeros * flat.size)]] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


# -- what becomes sparse ---------------------------------------------------------------------------

TYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "bool": np.bool_,
}


@pytest.mark.parametrize("name", TYPES)
def test_every_type_runs_and_comes_back(name: str) -> None:
    proto = constant_model(sparse_array((64, 48), TYPES[name]))
    made = sparsified(proto)
    assert sparse_names(made) == ["w"]
    assert made.ByteSize() < proto.ByteSize()
    goldens.check(proto, made, "sparsify")
    assert bits(made, {}, "default") == bits(proto, {}, "default")
    assert stored_bits(densified(made)) == stored_bits(proto)


@pytest.mark.parametrize("name", ["float32", "float16", "int8"])
@pytest.mark.parametrize("zeros", [0.3, 0.45, 0.5, 0.6, 0.67, 0.7, 0.75, 0.8, 0.9, 1.0])
def test_sparse_where_that_is_smaller(name: str, zeros: float) -> None:
    array = sparse_array((128, 100), TYPES[name], zeros)
    proto = constant_model(array)
    made = sparsified(proto)
    kept = array.reshape(-1)[np.flatnonzero(array)]
    where = onnx.TensorProto(int64_data=np.flatnonzero(array).tolist()).ByteSize()
    saved = array.nbytes - kept.nbytes - where
    assert bool(sparse_names(made)) == (saved > 64)
    assert proto.ByteSize() - made.ByteSize() >= (saved - 64 if sparse_names(made) else 0)


@pytest.mark.parametrize("zeros", [0.79, 0.82])
def test_indices_of_four_bytes(zeros: float) -> None:
    """Above 2 M elements an index may take 4 bytes: int8 pays from 80 % zeros."""
    array = np.zeros(3_000_000, np.int8)
    array[round(zeros * array.size) :] = 1
    assert bool(sparse_names(sparsified(constant_model(array)))) == (zeros > 0.8)


def test_the_file_at_90_percent() -> None:
    proto = matmul(sparse_array((512, 512)))
    ratio = sparsified(proto).ByteSize() / proto.ByteSize()
    assert 0.17 < ratio < 0.18  # 4 B and a varint of 3; with indices of 8 B it would be 0.30
    assert with_sparse(proto, by_hand(sparse_array((512, 512)))).ByteSize() > 0.29 * (
        proto.ByteSize()
    )


@pytest.mark.parametrize("least", [0.0, 0.85, 0.95])
def test_least_is_the_share_of_zeros(least: float) -> None:
    assert bool(sparse_names(sparsified(matmul(), least))) == (least < 0.9)


@pytest.mark.parametrize("least", [-0.1, 1.5])
def test_least_is_a_share(least: float) -> None:
    with pytest.raises(UsageError, match="least is a share of zeros"):
        run_pipeline(Model.load(matmul()), [Sparsify(least)])


def test_indices_of_other_tools_become_shorter() -> None:
    proto = matmul()
    for coordinates in (False, True):
        given = with_sparse(proto, by_hand(sparse_array(), coordinates=coordinates))
        made = sparsified(given)
        assert made.ByteSize() < 0.7 * given.ByteSize()
        assert stored_bits(densified(made)) == stored_bits(proto)
        goldens.check(given, made, "sparsify")


def test_constant_nodes_and_shared_weights() -> None:
    constant = node("Constant", [], ["w"], value=numpy_helper.from_array(sparse_array(), "c"))
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "w"], ["b"])]
    inputs, outputs = [value("x", ("n", 64))], [value("y", ("n", 48))]
    proto = graphs.model([constant, *nodes, node("Add", ["a", "b"], ["y"])], inputs, outputs)
    made = sparsified(proto)
    assert sparse_names(made) == ["w"]
    assert [each.op_type for each in made.graph.node] == ["MatMul", "MatMul", "Add"]
    goldens.check(proto, made, "sparsify")


def test_one_dimension_no_elements_and_few() -> None:
    row = numpy_helper.from_array(sparse_array((48 * 20,)), "row")
    empty = numpy_helper.from_array(np.zeros((0, 960), np.float32), "empty")
    few = numpy_helper.from_array(np.zeros((256,), np.float32), "few")  # 1 KB: read for shapes
    nodes = [node("Add", ["x", "row"], ["a"]), node("Concat", ["a", "empty"], ["y"], axis=0)]
    nodes.append(node("Identity", ["few"], ["z"]))
    outputs = [value("y", (2, 960)), value("z", (256,))]
    proto = graphs.model(nodes, [value("x", (2, 960))], outputs, [row, empty, few])
    made = sparsified(proto)
    assert sparse_names(made) == ["row"]
    goldens.check(proto, made, "sparsify")


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_nothing_but_zeros(name: str) -> None:
    proto = constant_model(np.zeros(RNG_SHAPE, TYPES[name]))
    made = sparsified(proto)
    (tensor,) = made.graph.sparse_initializer
    assert (list(tensor.values.dims), list(tensor.indices.dims)) == ([0], [0])
    goldens.check(proto, made, "sparsify")  # the checker and onnxruntime take it
    assert stored_bits(densified(made)) == stored_bits(proto)


@pytest.mark.parametrize("size", [300, 20_000])  # values in the structure, and beside it
@pytest.mark.parametrize("width", [2, 4, 8])
def test_every_bit_comes_back(width: int, size: int) -> None:
    """-0.0 is no zero; payloads of NaNs, signalling ones too, denormals and infinities stay."""
    patterns = {
        2: [0x8000, 0x7E01, 0x7D55, 0xFC00, 0x0001],
        4: [0x80000000, 0x7FC01234, 0x7FA00001, 0xFF800000, 0x00000001],
        8: [1 << 63, 0x7FF8000000001234, 0x7FF4000000000001, 0xFFF << 52, 1],
    }[width]
    words = np.zeros(size * 10, f"u{width}")
    words[:: size // 5] = np.resize(patterns, len(words[:: size // 5]))
    array = words.view(f"f{width}")
    proto = constant_model(array)
    made = sparsified(proto)
    assert sparse_names(made) == ["w"]
    kept = numpy_helper.to_array(made.graph.sparse_initializer[0].values)
    assert kept.size == np.count_nonzero(words)
    assert stored_bits(densified(made)) == {"w": words.tobytes()}
    if width == 4:
        assert bits(made, {}) == bits(proto, {})


def test_files_before_sparse_tensors_stay() -> None:
    proto = matmul()
    proto.ir_version = 5
    loaded = Model.load(proto)
    edit = Editor(loaded)
    Sparsify().run(loaded, edit)
    assert exporter.to_proto(loaded) == proto
    assert [reason for _, _, reason in edit.rejections] == [
        "the file is of IR 5, sparse initializers need 6"
    ]


# -- where onnxruntime takes them ------------------------------------------------------------------


def _initializers(**arrays: Array) -> list[TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def _qdq(*middle: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
        *middle,
        node("QuantizeLinear", ["h", "sx", "zx"], ["yq"]),
        node("DequantizeLinear", ["yq", "sx", "zx"], ["y"]),
    ]


def _positions() -> Iterator[Any]:
    f32, i8 = np.float32, np.int8
    scale = {"sx": np.array(0.05, f32), "zx": np.array(120, np.uint8)}
    image, row = (1, 16, 9, 9), (4, 64)

    def case(
        name: str,
        nodes: list[onnx.NodeProto],
        x: tuple[int, ...],
        y: tuple[int, ...],
        kernel: str = "",
        **arrays: Array,
    ) -> Any:
        sparse = [n for n, array in arrays.items() if array.size > 300]
        proto = graphs.model(nodes, [value("x", x)], [value("y", y)], _initializers(**arrays))
        return pytest.param(proto, sparse, kernel, id=name)

    yield case("MatMul", [node("MatMul", ["x", "w"], ["y"])], row, (4, 48), w=sparse_array())
    yield case(
        "Gemm", [node("Gemm", ["x", "w", "b"], ["y"], transB=1)], row, (4, 48),
        w=sparse_array((48, 64)), b=sparse_array((48,)),
    )  # fmt: skip
    yield case(
        "Conv", [node("Conv", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], image, (1, 24, 7, 7),
        w=sparse_array((24, 16, 3, 3)),
    )  # fmt: skip
    yield case("Add", [node("Add", ["x", "w"], ["y"])], (64, 48), (64, 48), w=sparse_array())
    lstm = node("LSTM", ["x", "w", "r", "b"], ["y", "", ""], hidden_size=32)
    yield case(
        "LSTM", [lstm], (5, 2, 16), (5, 1, 2, 32),
        w=sparse_array((1, 128, 16)) / 99, r=sparse_array((1, 128, 32)) / 99,
        b=sparse_array((1, 256)) / 99,
    )  # fmt: skip
    half = [node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), node("MatMul", ["x", "f"], ["y"])]
    yield case("float16", half, row, (4, 48), w=sparse_array(dtype=np.float16))
    per_tensor = _qdq(
        node("DequantizeLinear", ["w", "sw", "zw"], ["d"]), node("MatMul", ["xd", "d"], ["h"])
    )
    yield case(
        "int8 per tensor", per_tensor, row, (4, 48), "QLinearMatMul",
        w=sparse_array(dtype=i8), sw=np.array(0.01, f32), zw=np.array(0, i8), **scale,
    )  # fmt: skip
    per_channel = _qdq(
        node("DequantizeLinear", ["w", "sw", "zw"], ["d"], axis=0),
        node("Conv", ["xd", "d"], ["h"]),
    )
    yield case(
        "int8 per channel", per_channel, image, (1, 24, 7, 7), "QLinearConv",
        w=sparse_array((24, 16, 3, 3), i8), sw=np.linspace(0.01, 0.02, 24, dtype=f32),
        zw=np.zeros(24, i8), **scale,
    )  # fmt: skip


@pytest.mark.parametrize(("proto", "sparse", "kernel"), list(_positions()))
def test_onnxruntime_computes_the_same(
    proto: onnx.ModelProto, sparse: list[str], kernel: str
) -> None:
    made = sparsified(proto)
    assert sparse_names(made) == sparse
    goldens.check(proto, made, "sparsify")
    (info,) = proto.graph.input
    shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    feed = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    assert bits(made, feed, "default") == bits(proto, feed, "default")
    assert operators(made) == operators(proto)  # every fusion happens all the same
    assert not kernel or operators(made)[kernel] == 1


def test_gather() -> None:
    inputs = [value("i", (3,), TensorProto.INT64)]
    table = _initializers(w=sparse_array())
    proto = graphs.model([node("Gather", ["w", "i"], ["y"])], inputs, [value("y", (3, 48))], table)
    made = sparsified(proto)
    assert sparse_names(made) == ["w"]
    feed = {"i": np.array([5, 0, 63])}
    assert bits(made, feed, "default") == bits(proto, feed, "default")


def _branch(name: str, weight: str, *initializers: TensorProto) -> onnx.GraphProto:
    product = node("MatMul", ["x", weight], [f"{name}_h"])
    relu = node("Relu", [f"{name}_h"], [name])
    return graphs.graph([product, relu], [], [value(name, None)], initializers, name)


def test_bodies_and_what_they_capture() -> None:
    own = numpy_helper.from_array(sparse_array(zeros=0.8), "own")
    inputs, outputs = [graphs.CONDITION, value("x", ("n", 64))], [value("y", ("n", 48))]
    choice = graphs.if_node(_branch("yes", "own", own), _branch("no", "w"), ["h"])
    nodes = [choice, node("Abs", ["h"], ["y"])]
    proto = graphs.model(nodes, inputs, outputs, _initializers(w=sparse_array()))
    made = sparsified(proto)
    assert sparse_names(made) == ["w"]
    body = next(a.g for a in made.graph.node[0].attribute if a.name == "then_branch")
    assert [tensor.values.name for tensor in body.sparse_initializer] == ["own"]
    assert [info.name for info in body.value_info] == ["yes_h"]
    assert list(made.graph.value_info) == [value("h", ("n", 48))]  # behind both bodies
    onnx.checker.check_model(made)
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for taken in (True, False):
        feed = {"c": np.array(taken), "x": x}
        assert bits(made, feed, "default") == bits(proto, feed, "default")
    back = densified(made)
    assert stored_bits(back) == stored_bits(proto)
    assert not any(a.g.sparse_initializer for a in back.graph.node[0].attribute)


def test_an_output_stays_dense_since_onnxruntime_gives_a_sparse_tensor_back() -> None:
    proto = matmul()
    proto.graph.output.append(value("w", RNG_SHAPE))
    assert sparse_names(sparsified(proto)) == []
    with Session(with_sparse(proto, by_hand(sparse_array())).SerializeToString()) as session:
        found = session.run({"x": np.ones((1, 64), np.float32)})["w"]
    assert not isinstance(found, np.ndarray)


def test_an_input_stays_dense_since_inference_refuses_the_model_else() -> None:
    proto = matmul()
    proto.graph.input.append(value("w", RNG_SHAPE))
    assert sparse_names(sparsified(proto)) == []
    onnx.shape_inference.infer_shapes(proto)
    with pytest.raises(onnx.shape_inference.InferenceError, match="type case mismatch"):
        onnx.shape_inference.infer_shapes(with_sparse(proto, by_hand(sparse_array())))


@pytest.mark.parametrize("kind", [ml_dtypes.int4, ml_dtypes.uint4], ids=["int4", "uint4"])
def test_four_bits_stay_dense_since_onnxruntime_refuses_them(kind: Any) -> None:
    array = (sparse_array(dtype=np.uint8) % 8).astype(kind)
    proto = constant_model(array)
    assert sparse_names(sparsified(proto)) == []
    bits(proto, {})
    with pytest.raises(RuntimeFailure):
        bits(with_sparse(proto, by_hand(array)), {})


def test_text_stays_dense() -> None:
    texts = numpy_helper.from_array(np.full((400,), "", object), "w")
    proto = graphs.model(
        [node("Identity", ["w"], ["y"])], [], [value("y", (400,), TensorProto.STRING)], [texts]
    )
    assert sparsified(proto) == proto


def test_dense_weights_beside_the_file(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])]
    arrays = {"w": sparse_array(), "v": sparse_array((48, 40), zeros=0.0)}
    proto = graphs.model(
        nodes, [value("x", (2, 64))], [value("y", (2, 40))], _initializers(**arrays)
    )
    expected = stored_bits(proto)
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data")
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    api.optimize(source, out, passes="sparsify")
    assert (tmp_path / "out.onnx.data").stat().st_size == arrays["v"].nbytes
    assert sparse_names(onnx.load(out)) == ["w"]
    api.optimize(out, tmp_path / "back.onnx", passes="densify")
    assert stored_bits(onnx.load(tmp_path / "back.onnx")) == expected


# -- what inference finds behind them --------------------------------------------------------------


def inferred(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Types that onnx's inference, not strict, finds or is told."""
    return {v.name: v.type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}


@pytest.mark.parametrize("name", ["cnn", "mlp", "gru", "vit"])
def test_inference_finds_what_it_found(name: str) -> None:
    proto = pruned(name)
    made = sparsified(proto)
    assert sparse_names(made)
    assert inferred(made) == inferred(proto)
    assert 0 < len(made.graph.value_info) < len(inferred(proto))  # no more than is needed
    del made.graph.value_info[:]
    assert (inferred(made) == inferred(proto)) == (name in ("cnn", "mlp"))  # only Conv and Gemm


def test_a_declared_weight_is_declared_no_more() -> None:
    proto = matmul()
    proto.graph.value_info.append(value("w", RNG_SHAPE))
    given = with_sparse(proto, by_hand(sparse_array()))
    with pytest.raises(onnx.shape_inference.InferenceError, match="type case mismatch"):
        onnx.shape_inference.infer_shapes(given)
    made = sparsified(proto)
    assert list(made.graph.value_info) == [value("h", ("n", 48))]
    goldens.check(proto, made, "sparsify")


def test_what_the_file_declares_stays() -> None:
    proto = matmul()
    proto.graph.value_info.append(value("h", ("n", 48)))
    assert sparsified(proto).graph.value_info == proto.graph.value_info


def test_a_declaration_is_taken_back() -> None:
    proto = matmul()
    proto.graph.value_info.extend([value("h", None), value("h", ("m", 48))])  # as it is said
    loaded = Model.load(proto)
    edit = Editor(loaded)
    edit.declare(loaded.graph.values["h"], helper.make_tensor_type_proto(TensorProto.FLOAT, [7]))
    edit.declare(loaded.graph.values["h"], None)
    assert list(exporter.to_proto(loaded).graph.value_info) == []
    edit.undo_to((1, 0))
    assert list(exporter.to_proto(loaded).graph.value_info) == [value("h", (7,))] * 2
    edit.undo_to((0, 0))
    assert exporter.to_proto(loaded) == proto


def test_sparse_weights_prove_types() -> None:
    """graphopt's own inference knows them, large ones by shape and small ones by value."""
    shape = np.array([1, 48 * 4], np.int64)
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Reshape", ["h", "s"], ["y"])]
    inputs, outputs = [value("x", (4, 64))], [value("y", (1, 192))]
    proto = graphs.model(nodes, inputs, outputs, _initializers(w=sparse_array(), s=shape))
    made = with_sparse(proto, by_hand(sparse_array()), by_hand(shape, "s"))
    loaded = Model.load(made)
    types = Editor(loaded).types
    assert str(types[loaded.graph.values["h"]]) == "float[4,48]"
    assert str(types[loaded.graph.values["y"]]) == "float[1,192]"


# -- back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [False, True], ids=["linear", "coordinates"])
def test_densify_reads_both_kinds_of_indices(coordinates: bool) -> None:
    array = sparse_array((6, 7, 8, 9))
    proto = constant_model(array)
    given = with_sparse(proto, by_hand(array, coordinates=coordinates))
    assert densified(given) == proto
    goldens.check(given, densified(given), "densify")


def test_densify_reads_constant_nodes() -> None:
    constant = node("Constant", [], ["c"], sparse_value=by_hand(sparse_array()))
    nodes = [constant, node("MatMul", ["x", "c"], ["y"])]
    proto = graphs.model(nodes, [value("x", (1, 64))], [value("y", (1, 48))])
    made = densified(proto)
    (attribute,) = made.graph.node[0].attribute
    assert attribute.name == "value"
    np.testing.assert_array_equal(numpy_helper.to_array(attribute.t), sparse_array())
    goldens.check(proto, made, "densify")


BROKEN: dict[str, tuple[bool, Callable[[Array], Array], str]] = {
    "unsorted": (False, lambda i: i[::-1], "its indices do not ascend"),
    "unsorted coordinates": (True, lambda i: i[::-1], "its indices do not ascend"),
    "twice": (False, lambda i: np.r_[i[1], i[1:]], "its indices do not ascend"),
    "negative": (False, lambda i: np.r_[-1, i[1:]], "an index lies outside of [64, 48]"),
    "beyond": (False, lambda i: np.r_[i[:-1], 64 * 48], "an index lies outside of [64, 48]"),
    "beyond a row": (True, lambda i: i + np.array([0, 1]), "an index lies outside of [64, 48]"),
    "negative column": (True, lambda i: i - np.array([0, 1]), "an index lies outside of [64, 48]"),
    "one too few": (False, lambda i: i[1:], "do not belong together"),
    "of another rank": (True, lambda i: np.c_[i, i], "do not belong together"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_onnx_does_not_allow_is_refused_in_one_line(case: str) -> None:
    coordinates, change, reason = BROKEN[case]
    array = np.ones(RNG_SHAPE, np.float32) if "row" in case or "column" in case else sparse_array()
    proto = with_sparse(matmul(), by_hand(array, coordinates=coordinates, change=change))
    with pytest.raises(ModelError) as caught:
        densified(proto)
    assert reason in str(caught.value)
    assert "sparse tensor 'w' cannot be decoded" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_one_is_left_by_sparsify() -> None:
    proto = with_sparse(matmul(), by_hand(sparse_array(), change=lambda i: i[::-1]))
    loaded = Model.load(proto)
    edit = Editor(loaded)
    Sparsify().run(loaded, edit)
    assert "its indices do not ascend" in edit.rejections[0][2]
    assert loaded.graph.values["w"].weight is not None
    assert exporter.to_proto(loaded).graph.sparse_initializer == proto.graph.sparse_initializer


def test_bytes_are_those_in_the_file() -> None:
    array = sparse_array()
    for tensor in (by_hand(array), sparsified(matmul()).graph.sparse_initializer[0]):
        weight = Weight(tensor, Store())
        data = len(tensor.values.raw_data) + 4 * len(tensor.values.float_data)
        where = len(tensor.indices.raw_data)
        if not where:
            where = onnx.TensorProto(int64_data=tensor.indices.int64_data).ByteSize() - 3
        assert abs(weight.nbytes - data - where) <= 3  # tag and length of the varints


# -- the command -----------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def sparse_file(tmp_path: Path) -> Path:
    return graphs.save(sparsified(matmul()), tmp_path / "in.onnx")


def test_the_command_says_what_it_did(sparse_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = invoke("densify", sparse_file, out)
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    assert line.startswith("1 sparse tensor made dense, weights 1.")
    assert "-> 12.3 kB; " in line
    assert str(out) in line
    assert line.endswith("; proved")
    assert stored_bits(onnx.load(out)) == stored_bits(matmul())


def test_the_command_in_place_and_without_sparse_tensors(sparse_file: Path) -> None:
    assert invoke("densify", sparse_file, sparse_file).exit_code == 0
    content = sparse_file.read_bytes()
    result = invoke("densify", sparse_file, sparse_file)
    assert result.exit_code == 0
    assert result.stdout.startswith("no sparse tensors: nothing to do; ")
    assert sparse_file.read_bytes() == content


def test_the_command_writes_what_cannot_be_run_here(tmp_path: Path) -> None:
    proto = sparsified(matmul())
    proto.graph.node[1].domain = "elsewhere"
    proto.opset_import.append(helper.make_opsetid("elsewhere", 1))
    source, out = graphs.save(proto, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    result = invoke("densify", source, out)
    assert result.exit_code == 0
    assert "; unproven" in result.stdout
    assert stored_bits(onnx.load(out)) == stored_bits(matmul())


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    broken = with_sparse(matmul(), by_hand(sparse_array(), change=lambda i: i[::-1]))
    source, out = graphs.save(broken, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    for arguments in ((source, out), (tmp_path / "missing.onnx", out)):
        result = invoke("densify", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert not out.exists()


# -- the rest of graphopt --------------------------------------------------------------------------


def test_inspect_counts_as_of_dense_weights(tmp_path: Path) -> None:
    proto = pruned()
    dense = inspection.inspect(graphs.save(proto, tmp_path / "dense.onnx"))
    sparse = inspection.inspect(graphs.save(sparsified(proto), tmp_path / "sparse.onnx"))
    assert sparse.stats.parameters == dense.stats.parameters
    assert sparse.macs.total == dense.macs.total
    assert sparse.macs.unknown == dense.macs.unknown
    assert sparse.sparse_initializers == len(sparse_names(sparsified(proto)))
    assert sparse.stats.weight_bytes < 0.3 * dense.stats.weight_bytes
    assert invoke("inspect", tmp_path / "sparse.onnx").exit_code == 0


def test_validate_and_bench_take_them(sparse_file: Path, tmp_path: Path) -> None:
    dense = graphs.save(matmul(), tmp_path / "dense.onnx")
    assert invoke("validate", dense, sparse_file).exit_code == 0
    result = invoke("bench", "--seconds", "0.1", dense, sparse_file)
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["cnn", "mlp", "gru", "vit"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_sparse_model_does_not_grow(name: str, level: int, tmp_path: Path) -> None:
    source = graphs.save(sparsified(pruned(name)), tmp_path / "in.onnx")
    report = api.optimize(source, tmp_path / "out.onnx", level=level).report
    assert report.validation.verdict == "proved"
    assert report.target is not None
    assert report.target.bytes <= report.source.bytes
    sparse, dense = (
        api.optimize(proto, level=level, validate=False).report.after.nodes
        for proto in (onnx.load(source), pruned(name))
    )
    assert sparse == dense  # every fusion reads them


def test_level_0_and_named_passes_leave_dense_what_is(tmp_path: Path) -> None:
    proto = with_sparse(matmul(), by_hand(sparse_array()))
    source = graphs.save(proto, tmp_path / "in.onnx")
    for options in ({"level": 0}, {"passes": "remove-dead"}):
        api.optimize(source, tmp_path / "out.onnx", **options)  # type: ignore[arg-type]
        assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


def test_what_is_folded_becomes_sparse_again() -> None:
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    inputs, outputs = [value("x", ("n", 48))], [value("y", ("n", 64))]
    proto = graphs.model(nodes, inputs, outputs, _initializers(w=sparse_array()))
    given = sparsified(proto)
    made = api.optimize(given).proto()
    assert [each.op_type for each in made.graph.node] == ["MatMul"]
    assert sparse_names(made) == ["t"]
    assert made.ByteSize() <= given.ByteSize()
    (tensor,) = densified(made).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), sparse_array().T)


@pytest.mark.parametrize("mode", ["static", "dynamic", "weights"])
def test_int8_takes_them(mode: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    int8_runs.decide(monkeypatch, 1.5)
    source = graphs.save(sparsified(pruned("mlp", 0.7)), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    api.optimize(source, out, target="ort-cpu", int8=mode, data=int8_runs.DATA, max_drop=0.2)
    expected = graphs.save(pruned("mlp", 0.7), tmp_path / "dense.onnx")
    dense = tmp_path / "dense_out.onnx"
    api.optimize(expected, dense, target="ort-cpu", int8=mode, data=int8_runs.DATA, max_drop=0.2)
    found, wanted, before = (
        sorted(each.op_type for each in onnx.load(file).graph.node) for file in (out, dense, source)
    )
    assert found == wanted != before
    assert sparse_names(onnx.load(out)) == []


# -- other tools: assertions that will tell when one of them learns --------------------------------


def test_checker_and_inference() -> None:
    made = sparsified(matmul())
    onnx.checker.check_model(made)
    with pytest.raises(onnx.shape_inference.InferenceError, match="wrong rank"):
        onnx.checker.check_model(made, full_check=True)
    with pytest.raises(onnx.shape_inference.InferenceError, match="wrong rank"):
        onnx.shape_inference.infer_shapes(made, strict_mode=True)


def test_reference_and_version_converter() -> None:
    made = sparsified(matmul())
    with pytest.raises(ValueError, match="data_location"):
        onnx.reference.ReferenceEvaluator(made)
    with pytest.raises(Exception, match="Input w is undefined"):
        onnx.version_converter.convert_version(made, 20)
    assert onnx.version_converter.convert_version(densified(made), 20).opset_import[0].version == 20


def test_graphsurgeon_reads_what_is_no_raw_data() -> None:
    """It looks at float_data and int64_data only, and makes float64 of float32."""
    array = sparse_array()
    for tensor, right in ((sparsified(matmul()), True), (by_hand(array), False)):
        proto = tensor if right else with_sparse(matmul(), tensor)
        weight = gs.import_onnx(proto).tensors()["w"]
        kept = gs.export_onnx(gs.import_onnx(proto))
        assert sparse_names(kept) == ["w"]
        assert np.array_equal(weight.values, array) == right
        assert weight.values.dtype == np.float64


def test_quantizers_of_onnxruntime(tmp_path: Path) -> None:
    from onnxruntime import quantization

    class Feeds(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{"x": np.ones((1, 64), np.float32)}] * 2)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    source = graphs.save(sparsified(matmul()), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    with pytest.raises(Exception, match="unknown initializers"):
        quantization.quantize_dynamic(source, out)
    quantization.quant_pre_process(source, out, skip_symbolic_shape=True)
    assert sparse_names(onnx.load(out)) == ["w"]
    with pytest.raises(AssertionError, match="not a DAG"):
        quantization.quantize_static(source, out, Feeds())
