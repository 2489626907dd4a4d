"""MACs against published and hand-made numbers, and what `inspect` says about a model."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper
from onnx.backend.test.case.node import collect_testcases

from graphopt import macs
from graphopt.assumptions import choose_sizes
from graphopt.errors import ModelError, UsageError
from graphopt.inspection import Inspection, inspect
from graphopt.operators import MACS
from graphopt.sizes import walk
from graphopt.storage import Store

ARCHITECTURES = Path(__file__).parent.parent / "models" / "architectures"


def bert(layers: int, length: int, hidden: int = 768, inner: int = 3072) -> int:
    """Projections, scores and mixture, feed-forward; without embeddings and pooler."""
    projections = 4 * hidden * hidden * length
    attention = 2 * length * length * hidden
    return layers * (projections + attention + 2 * hidden * inner * length)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", 4_089_184_256),  # torchvision's table: 4.09 G
        ("mobilenetv3_large", 216_589_760),  # torchvision's table: 0.22 G
        ("efficientnet_b0", 385_814_752),  # torchvision's table: 0.39 G
        ("bert_base", bert(12, 128) + 768 * 768),
        ("distilbert", bert(6, 128) + 768 * 768 + 768 * 2),
    ],
)
def test_macs_of_known_networks(name: str, expected: int) -> None:
    exports = sorted(ARCHITECTURES.glob(f"{name}_*.onnx"))
    assert len(exports) >= 2  # whatever the exporter made of the network
    for path in exports:
        found = inspect(path).macs
        assert (found.total, found.unknown) == (expected, 0), path.name


def test_macs_follow_the_given_shape() -> None:
    path = ARCHITECTURES / "bert_base_ts.onnx"
    found = inspect(path, {"input_ids": [2, 64]}).macs
    assert found.total == 2 * (bert(12, 64) + 768 * 768)
    assert found.shapes["attention_mask"] == [2, 64]  # its dims have the same names
    assert found.assumed == []


X = (2, 6, 10, 12)
FORMULAS: list[tuple[str, str, Sequence[Any], Sequence[int], Mapping[str, Any], int]] = [
    # domain, operator, input shapes (None: left out), output shape, attributes, MACs
    ("", "Conv", [X, (8, 3, 3, 5)], (2, 8, 8, 8), {"group": 2}, 2 * 8 * 8 * 8 * 3 * 3 * 5),
    ("", "ConvInteger", [X, (8, 6, 1, 1)], (2, 8, 10, 12), {}, 2 * 8 * 10 * 12 * 6),
    ("", "ConvTranspose", [X, (6, 4, 2, 2)], (2, 4, 20, 24), {}, 2 * 6 * 10 * 12 * 4 * 4),
    ("", "DeformConv", [X, (8, 6, 3, 3), X], (2, 8, 8, 10), {}, 2 * 8 * 8 * 10 * 6 * 9),
    ("", "Einsum", [(2, 3, 4), (2, 4, 5)], (2, 3, 5), {"equation": "bij,bjk->bik"}, 120),
    ("", "Einsum", [(7, 3, 4), (4, 5)], (7, 3, 5), {"equation": "...j,jk->...k"}, 7 * 3 * 4 * 5),
    ("", "Einsum", [(3, 4)], (4, 3), {"equation": "ij->ji"}, 0),
    ("", "LSTM", [(5, 2, 3), (2, 16, 3), (2, 16, 4)], (5, 2, 2, 4), {}, 5 * 2 * 2 * 16 * 7),
    ("", "GRU", [(5, 2, 3), (1, 12, 3), (1, 12, 4)], (5, 1, 2, 4), {}, 5 * 2 * 12 * 7),
    ("", "RNN", [(5, 2, 3), (1, 4, 3), (1, 4, 4)], (5, 1, 2, 4), {}, 5 * 2 * 4 * 7),
    ("", "Gemm", [(3, 4), (4, 5)], (3, 5), {}, 60),
    ("", "Gemm", [(4, 3), (5, 4)], (3, 5), {"transA": 1, "transB": 1}, 60),
    ("", "MatMul", [(2, 1, 3, 4), (7, 4, 5)], (2, 7, 3, 5), {}, 2 * 7 * 3 * 4 * 5),
    ("", "MatMul", [(4,), (4,)], (), {}, 4),
    ("", "MatMulInteger", [(3, 4), (4, 5)], (3, 5), {}, 60),
    ("", "QLinearConv", [X, (), (), (8, 6, 3, 3)], (2, 8, 8, 10), {}, 2 * 8 * 8 * 10 * 54),
    ("", "QLinearMatMul", [(3, 4), (), (), (4, 5)], (3, 5), {}, 60),
    # two key heads serve four query heads; three keys are cached
    ("", "Attention", [(1, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)], (1, 4, 5, 6), {}, 4 * 5 * 7 * 14),
    (
        "",
        "Attention",
        [(1, 5, 32), (1, 7, 16), (1, 7, 16), None, (1, 2, 3, 8), (1, 2, 3, 8)],
        (1, 5, 32),
        {"q_num_heads": 4, "kv_num_heads": 2},
        5 * 32 * 2 * (7 + 3),
    ),
    ("com.microsoft", "Attention", [(2, 5, 16), (16, 48)], (2, 5, 16), {}, 10 * 16 * 48 + 2 * 800),
    ("com.microsoft", "QAttention", [(2, 5, 16), (16, 48)], (2, 5, 16), {}, 10 * 16 * 48 + 1600),
    ("com.microsoft", "MultiHeadAttention", [(1, 5, 16), (1, 7, 16)], (1, 5, 16), {}, 5 * 32 * 7),
    ("com.microsoft", "MultiHeadAttention", [(1, 5, 4, 3, 4)], (1, 5, 16), {}, 5 * 32 * 5),
    ("com.microsoft", "GroupQueryAttention", [(1, 5, 16), (1, 5, 8)], (1, 5, 16), {}, 5 * 32 * 5),
    ("com.microsoft", "MatMulNBits", [(2, 3, 32)], (2, 3, 64), {"K": 32, "N": 64}, 6 * 32 * 64),
    ("com.microsoft", "MatMulBnb4", [(3, 32)], (3, 64), {"K": 32, "N": 64}, 3 * 32 * 64),
    ("com.microsoft", "FusedConv", [X, (8, 6, 3, 3)], (2, 8, 8, 10), {}, 2 * 8 * 8 * 10 * 54),
    ("com.microsoft", "QLinearConv", [X, (), (), (8, 6, 1, 1)], (2, 8, 10, 12), {}, 11520),
    ("com.microsoft", "FusedMatMul", [(4, 3), (4, 5)], (3, 5), {"transA": 1}, 60),
    ("com.microsoft", "TransposeMatMul", [(4, 3), (4, 5)], (3, 5), {"transA": 1}, 60),
    ("com.microsoft", "FusedGemm", [(3, 4), (5, 4)], (3, 5), {"transB": 1}, 60),
    ("com.microsoft", "QGemm", [(3, 4), (), (), (4, 5)], (3, 5), {}, 60),
    ("com.microsoft", "GemmFastGelu", [(3, 4), (4, 5)], (3, 5), {}, 60),
    ("com.microsoft", "DynamicQuantizeMatMul", [(3, 4), (4, 5)], (3, 5), {}, 60),
    ("com.microsoft", "MatMulIntegerToFloat", [(3, 4), (4, 5)], (3, 5), {}, 60),
    ("com.microsoft", "DynamicQuantizeLSTM", [(5, 2, 3), (1, 3, 16), (1, 4, 16)], (5,), {}, 1120),
    ("com.microsoft", "ConvTransposeWithDynamicPads", [X, (6, 4, 2, 2)], (2, 4, 20, 24), {}, 23040),
    ("com.microsoft.nchwc", "Conv", [X, (8, 6, 3, 3)], (2, 8, 8, 10), {}, 2 * 8 * 8 * 10 * 54),
]


def one_node(
    domain: str,
    operator: str,
    inputs: Sequence[Any],
    output: Sequence[int] | None,
    attributes: Mapping[str, Any],
) -> onnx.ModelProto:
    names = ["" if shape is None else f"x{i}" for i, shape in enumerate(inputs)]
    node = helper.make_node(operator, names, ["y"], domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(names, inputs, strict=True)
        if name
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    graph = helper.make_graph([node], "one", infos, [result])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets)


@pytest.mark.parametrize("case", FORMULAS, ids=lambda case: f"{case[0]}.{case[1]}")
def test_formula(case: Any) -> None:
    domain, operator, inputs, output, attributes, expected = case
    found = macs.count(one_node(domain, operator, inputs, output, attributes), {})
    assert (found.nodes, found.unknown) == (1, 0)
    assert found.total == expected


def test_every_counted_operator_has_a_case() -> None:
    assert {(case[0], case[1]) for case in FORMULAS} == set(MACS)


def test_a_node_of_unknown_shape_is_counted_as_unknown() -> None:
    model = one_node("com.microsoft", "FusedMatMul", [(3, None), (None, 5)], None, {})
    found = macs.count(model, {})
    assert (found.nodes, found.unknown, found.total) == (1, 1, 0)


CONTROL = """
<ir_version: 8, opset_import: ["": 17]>
control (bool c, float[4, 4] x, int64 trips) => (float[4, 4] y, float[4, 4] z, float[n, 4, 4] all)
<float[4, 4] w, float[4, 2] v> {
    y = If (c) <
        then_branch = small () => (float[4, 4] a) { a = MatMul(x, x) },
        else_branch = large () => (float[4, 4] b) { t = MatMul(x, x)  b = MatMul(t, t) }
    >
    z, all = Loop (trips, , x) <
        body = turn (int64 i, bool go, float[4, 4] s) => (bool on, float[4, 4] r, float[4, 4] e) {
            on = Identity(go)
            r = MatMul(s, s)
            e = Identity(r)
        }
    >
    last = MatMul(all, all)
}
"""


def test_the_larger_branch_and_one_iteration_count() -> None:
    model = onnx.parser.parse_model(CONTROL.replace("<float[4, 4] w, float[4, 2] v> ", ""))
    found = macs.count(model, {})
    # two of the larger branch, one of the loop; how long `all` is, only the run knows
    assert found.total == 3 * 64
    assert (found.nodes, found.unknown) == (4, 1)
    assert found.has_loop


def test_a_constant_condition_and_trip_count_are_followed() -> None:
    text = CONTROL.replace("<float[4, 4] w, float[4, 2] v> ", "<bool c = {1}, int64 trips = {5}> ")
    text = text.replace("bool c, float[4, 4] x, int64 trips", "float[4, 4] x")
    found = macs.count(onnx.parser.parse_model(text), {})
    assert found.total == 64 + 64 + 5 * 64
    assert found.unknown == 0


def test_inferred_sizes_are_those_of_onnx_own_tests() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    compared = 0
    for case in cases:
        feed, expected = case.data_sets[0]
        names = [info.name for info in case.model.graph.input]
        if len(feed) != len(names) or not all(isinstance(v, np.ndarray) for v in feed):
            continue
        for info in case.model.graph.output:  # what is inferred must not come from here
            info.type.tensor_type.ClearField("shape")
        inputs = {name: value.shape for name, value in zip(names, feed, strict=True)}
        found = {
            name: size
            for call in walk(case.model, inputs, {})
            for name, size in zip(call.node.output, call.outputs, strict=True)
        }
        for info, value in zip(case.model.graph.output, expected, strict=True):
            if isinstance(value, np.ndarray) and found.get(info.name) is not None:
                assert found[info.name] == value.shape, case.name
                compared += 1
    assert compared > 1500


def test_functions_are_counted_inside() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17, "mine": 1]>
        f (float[2, 3] x, float[3, 4] w) => (float[2, 4] y) { y = mine.Product(x, w) }
        <domain: "mine", opset_import: ["": 17]>
        Product (a, b) => (c) { c = MatMul(a, b) }
    """)
    assert macs.count(model, {}).total == 24


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (["batch", 3, "h", "w"], (1, 3, 224, 224)),
        ([None, None, None, None], (1, 3, 224, 224)),
        (["n", "h", "w", 3], (1, 224, 224, 3)),
        (["batch", 12, "past", 64], (1, 12, 128, 64)),
        ([1, 4, "s16", 64], (1, 4, 128, 64)),
        (["batch", "sequence"], (1, 128)),
        (["batch", "sequence + 1"], (1, 128)),
        (["batch"], (1,)),
        ([], ()),
        ([2, 80, 3000], (2, 80, 3000)),
    ],
)
def test_usual_sizes_fill_free_dims(dims: list[Any], expected: tuple[int, ...]) -> None:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    chosen = choose_sizes([info], {})
    assert chosen.inputs == {"x": expected}
    assert chosen.assumed == ([] if all(isinstance(dim, int) for dim in dims) else ["x"])


def test_one_name_has_one_size_and_sums_follow() -> None:
    make = helper.make_tensor_value_info
    infos = [
        make("ids", TensorProto.INT64, ["batch", "seq"]),
        make("past", TensorProto.FLOAT, ["batch", 8, "past", 64]),
        make("mask", TensorProto.INT64, ["batch", "past + seq"]),
    ]
    chosen = choose_sizes(infos, {"ids": [3, 7]})
    assert chosen.inputs == {"ids": (3, 7), "past": (3, 8, 128, 64), "mask": (3, 135)}
    assert chosen.assumed == ["past", "mask"]


@pytest.mark.parametrize("shape", [[1, 3], [1, 4, 8, 8]])
def test_a_shape_that_does_not_fit_is_refused(shape: list[int]) -> None:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    with pytest.raises(UsageError, match="does not fit n,3,8,8"):
        choose_sizes([info], {"x": shape})
    with pytest.raises(UsageError, match="no such input; there are: x"):
        choose_sizes([info], {"nope": shape})


def write(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


ODD = """
<ir_version: 8, opset_import: ["": 17, "com.odd": 1, "mine": 1], producer_name: "hand">
odd (float[batch, 3] x, seq(float[2]) s, float[3] start) => (float[batch, 3] y, int64 n)
<float[3] start = {0, 0, 0}, float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}> {
    noise = RandomNormalLike(x)
    a = com.odd.Mystery(noise)
    b = mine.Twice(a)
    c = MatMul(b, w)
    k = Constant <value = float[3] {1, 2, 3}> ()
    d = Add(c, k)
    y = Add(d, start)
    n = SequenceLength(s)
}
<domain: "mine", opset_import: ["": 17]>
Twice (a) => (b) { r = RandomUniformLike(a)  t = Add(a, a)  b = Add(t, r) }
"""


def test_inspection_of_an_odd_model(tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "odd.onnx", ODD))
    assert found.stats.nodes == 8
    assert {o.operator: o.nodes for o in found.operators}["Add"] == 2
    assert sum(o.share for o in found.operators) == pytest.approx(1)
    assert found.stats.parameters == 3 + 9 + 3
    assert [(w.type, w.tensors, w.elements, w.bytes) for w in found.weights] == [
        ("float32", 3, 15, 60)
    ]
    assert found.producer == "hand"
    assert found.opsets == {"": 17, "com.odd": 1, "mine": 1}
    assert [(p.name, p.type, p.shape) for p in found.inputs] == [
        ("x", "float32", ["batch", 3]),
        ("s", "seq(float32)", None),
    ]
    assert [port.name for port in found.overridable] == ["start"]
    assert found.free_dims == ["batch"]
    assert found.functions == ["mine::Twice"]
    assert found.foreign_domains == ["com.odd"]
    assert {(doubt.kind, doubt.subject) for doubt in found.doubts} == {
        ("random", "RandomNormalLike"),
        ("random", "RandomUniformLike"),
        ("foreign-domain", "com.odd"),
        ("input-type", "s"),
    }
    assert found.macs.nodes == 1
    assert Inspection.model_validate_json(found.model_dump_json()) == found


def test_versions_beyond_the_runtime_are_doubts(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> f (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    model.ir_version = 99
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "new.onnx")
    found = inspect(tmp_path / "new.onnx")
    assert {doubt.kind for doubt in found.doubts} == {"opset", "ir-version"}


def test_a_plain_model_has_no_doubts() -> None:
    assert inspect(ARCHITECTURES / "resnet50_ts.onnx").doubts == []


def test_external_and_sparse_weights(tmp_path: Path) -> None:
    big = np.zeros((64, 64), np.float32)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        f (float[2, 64] x) => (float[2, 64] y) { y = MatMul(x, w) }
    """)
    model.graph.initializer.append(onnx.numpy_helper.from_array(big, "w"))
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [3])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    found = inspect(path)
    assert [Path(file).name for file in found.external_files] == ["w.bin"]
    assert found.file.bytes == path.stat().st_size + (tmp_path / "w.bin").stat().st_size
    assert found.sparse_initializers == 1
    assert found.stats.parameters == 64 * 64 + 8
    assert found.macs.total == 2 * 64 * 64


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 1 << 20
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        f (float[2, {rows}] x) => (float[2, 256] y) {{ y = MatMul(x, w) }}
    """)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, 256])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "m.onnx")
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(4 * rows * 256)  # 1 GB that takes no space on disk

    def refuse(self: Store, tensor: TensorProto) -> None:
        raise AssertionError(f"{tensor.name} was read")

    monkeypatch.setattr(Store, "array", refuse)
    assert inspect(tmp_path / "m.onnx").macs.total == 2 * rows * 256


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(ModelError, match=name):
            inspect(tmp_path / name)


def test_total_is_the_sum_of_the_operators() -> None:
    found = inspect(ARCHITECTURES / "vit_small_ts.onnx")
    assert sum(o.macs for o in found.operators) == found.macs.total
    assert math.isclose(found.macs.total, 4.6e9, rel_tol=0.01)  # timm: 4.6 G
