"""Layers split: every form of every layer computes what its factors amount to, and stays split."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import graphopt
from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.lowrank import weighted_error
from graphopt.passes.linear import Layer, linear_layers
from graphopt.passes.lowrank.forms import FORMS, METHODS, Method, Split, split_of
from graphopt.passes.lowrank.options import splittable
from graphopt.passes.lowrank.split import RULE, by_weights, parts_of, split_layers
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.runtime import Level, Session
from tests import graphs
from tests.optimized import applied, stored
from tests.prune_runs import weighted

Array = NDArray[Any]
LEVELS: tuple[Level, ...] = ("off", "default")
WORK = ("Conv", "Gemm", "MatMul")

# -- layers of every kind --------------------------------------------------------------------------

GEOMETRIES = {  # what is read, the weights, and what the convolution states
    "one tap": ((2, 6, 9, 8), (8, 6, 1, 1), ""),
    "one tap with strides and pads": ((2, 6, 9, 8), (8, 6, 1, 1), "strides=[2,3],pads=[1,0,2,1]"),
    "one tap of one axis": ((2, 6, 9), (8, 6, 1), ""),
    "3x3": ((2, 6, 9, 8), (8, 6, 3, 3), ""),
    "padded": ((2, 6, 9, 8), (8, 6, 3, 3), "pads=[1,1,1,1]"),
    "5x3 with other pads on each side": ((2, 6, 9, 8), (8, 6, 5, 3), "pads=[2,0,1,3]"),
    "strides": ((2, 6, 9, 8), (8, 6, 3, 3), "strides=[3,2],pads=[1,1,1,1]"),
    "dilations": ((2, 6, 9, 8), (8, 6, 3, 2), "dilations=[2,3]"),
    "all": ((2, 6, 11, 9), (8, 6, 2, 3), "dilations=[3,2],strides=[1,2],pads=[3,1,0,2]"),
    "valid": ((2, 6, 9, 8), (8, 6, 2, 3), 'auto_pad="VALID",strides=[2,1]'),
    "3x1": ((2, 6, 9, 8), (8, 6, 3, 1), "pads=[1,0,1,0]"),
    "one channel": ((2, 1, 9, 8), (8, 1, 3, 3), "pads=[1,1,1,1]"),
    "one axis": ((2, 6, 13), (8, 6, 4), "strides=[2],pads=[3,1],dilations=[2]"),
    "three axes": ((2, 4, 5, 6, 5), (6, 4, 2, 3, 2), "strides=[1,2,1],pads=[0,1,1,1,0,0]"),
}
PRODUCTS = {  # h is what the layer gives, [.., 8] from [.., 12]
    "gemm": "(float[5,12] x, float[12,8] w) => { h = Gemm(x, w) }",
    "gemm with a bias": "(float[5,12] x, float[12,8] w, float[8] b) => { h = Gemm(x, w, b) }",
    "gemm turned": "(float[5,12] x, float[8,12] w) => { h = Gemm<transB=1>(x, w) }",
    "gemm turned with a bias": (
        "(float[5,12] x, float[8,12] w, float[8] b) => { h = Gemm<transB=1>(x, w, b) }"
    ),
    "gemm with a matrix added": (
        "(float[5,12] x, float[8,12] w, float[5,8] b) => { h = Gemm<transB=1>(x, w, b) }"
    ),
    "gemm, transposed": (
        "(float[5,12] x, float[8,12] w) => { t = Transpose<perm=[1,0]>(w) h = Gemm(x, t) }"
    ),
    "gemm turned, transposed": (
        "(float[5,12] x, float[12,8] w, float[8] b) =>"
        " { t = Transpose(w) h = Gemm<transB=1>(x, t, b) }"
    ),
    "matmul": "(float[5,12] x, float[12,8] w) => { h = MatMul(x, w) }",
    "matmul of a row": "(float[12] x, float[12,8] w) => { h = MatMul(x, w) }",
    "matmul of three axes": "(float[2,5,12] x, float[12,8] w) => { h = MatMul(x, w) }",
    "matmul of four axes": "(float[2,3,5,12] x, float[12,8] w) => { h = MatMul(x, w) }",
    "matmul, transposed": (
        "(float[2,5,12] x, float[8,12] w) => { t = Transpose<perm=[1,0]>(w) h = MatMul(x, t) }"
    ),
    "matmul, transposed by default": (
        "(float[2,5,12] x, float[8,12] w) => { t = Transpose(w) h = MatMul(x, t) }"
    ),
}


def convolutions() -> dict[str, str]:
    """Every geometry, with and without a bias, by itself and between others."""
    found = {}
    for (name, (read, kernel, stated)), bias in itertools.product(GEOMETRIES.items(), (0, 1)):
        inputs = f"float{list(read)} x, float{list(kernel)} w"
        inputs += f", float[{kernel[0]}] b" if bias else ""
        sizes = ",".join(f"n{axis}" for axis in range(len(read)))
        conv = f"Conv<{stated}>" if stated else "Conv"
        op, end = f"{conv}(r, w{', b' if bias else ''})", "biased" if bias else "plain"
        alone = f"({inputs}) => (float[{sizes}] y) {{ y = {op.replace('(r', '(x')} }}"
        chain = f"({inputs}) => (float[{sizes}] y) {{ r = Relu(x) h = {op} s = Relu(h)"
        found[f"{name}, {end}"] = alone
        found[f"{name}, {end}, in a chain"] = f"{chain} y = Add(h, s) }}"
    return found


def products() -> dict[str, str]:
    """Every product, what it gives being an output, read by two, and with a bias added."""
    found = {}
    for name, text in PRODUCTS.items():
        rank = text.split("]")[0].count(",") + 1
        sizes = ",".join(f"n{axis}" for axis in range(rank))
        head, body = text.split("=>")
        biased = head.rstrip().removesuffix(")") + ", float[8] b2)"
        body = body.strip().removesuffix("}")
        found[name] = f"{head} => (float[{sizes}] h) {body} }}"
        found[f"{name}, read twice"] = (
            f"{head} => (float[{sizes}] y) {body} s = Relu(h) y = Add(h, s) }}"
        )
        found[f"{name}, then Add"] = f"{biased} => (float[{sizes}] y) {body} y = Add(h, b2) }}"
    return found


LAYERS = convolutions() | products()


def layer_of(source: onnx.ModelProto | Editor) -> Layer:
    """The only one."""
    edit = source if isinstance(source, Editor) else Editor(Model.load(source))
    (layer,) = linear_layers(edit)
    return layer


def forms_of(layer: Layer) -> list[Method]:
    return [method for method in METHODS if FORMS[method].fits(layer)]


CASES = [
    pytest.param(text, method, id=f"{name}: {method}")
    for name, text in LAYERS.items()
    for method in forms_of(layer_of(weighted(text)))
]


def arbitrary(layer: Layer, method: Method, rank: int = 3, seed: int = 0) -> Split:
    """Factors with numbers of no meaning."""
    rng = np.random.default_rng(seed)
    shapes = FORMS[method].shapes(layer, rank)
    factors = (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes)
    return Split(method, tuple(np.asarray(factor, np.float32) for factor in factors))


def split_all(edit: Editor, splits: dict[str, Split]) -> None:
    """Split layers by the root of the first that reads their weights."""
    groups = {layers[0].root: layers for layers in by_weights(linear_layers(edit))}
    for root, split in splits.items():
        assert split_layers(edit, groups[root], split)


def with_effective(proto: onnx.ModelProto, splits: dict[str, Split]) -> onnx.ModelProto:
    """The same model with the weights that the factors amount to."""
    edit = Editor(Model.load(proto))
    for layer in linear_layers(edit):
        if layer.root in splits:
            array = layer.stored(splits[layer.root].effective.astype(np.float32))
            tensor = onnx.numpy_helper.from_array(array, layer.weights.name)
            edit.set_weight(layer.weights, tensor)
    return exporter.to_proto(edit.model)


def inputs_of(proto: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Random numbers of the stated shapes."""
    rng, found = np.random.default_rng(seed), {}
    known = {tensor.name for tensor in proto.graph.initializer}
    for info in proto.graph.input:
        kind = info.type.tensor_type
        shape = [dim.dim_value or 3 for dim in kind.shape.dim]
        if info.name not in known:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            found[info.name] = rng.standard_normal(shape).astype(dtype)
    return found


def assert_same(found: onnx.ModelProto, expected: onnx.ModelProto, limit: float = 1e-5) -> None:
    """Both give the same, up to a share of the largest element, at both levels of onnxruntime."""
    feed = inputs_of(expected)
    for level in LEVELS:
        one, other = (
            Session(proto.SerializeToString(), optimizations=level, threads=1).run(feed)
            for proto in (found, expected)
        )
        assert one.keys() == other.keys()
        for name, array in other.items():
            assert one[name].shape == array.shape
            if array.size:
                assert np.abs(one[name] - array).max() <= limit * np.abs(array).max(), level


def operators(proto: onnx.ModelProto) -> Counter[str]:
    """How many nodes do the work."""
    return Counter(node.op_type for node in proto.graph.node if node.op_type in WORK)


def unread(proto: onnx.ModelProto) -> set[str]:
    """Initializers and results of nodes that nothing reads."""
    read = {name for node in proto.graph.node for name in node.input}
    read |= {info.name for info in proto.graph.output}
    for node in proto.graph.node:
        for attribute in node.attribute:
            read |= {name for inner in attribute.g.node for name in inner.input}
    made = {tensor.name for tensor in proto.graph.initializer}
    made |= {name for node in proto.graph.node for name in node.output}
    return made - read


def names(proto: onnx.ModelProto) -> set[str]:
    """What nodes give."""
    return {name for node in proto.graph.node for name in node.output}


@pytest.mark.parametrize(("text", "method"), CASES)
def test_a_split_layer_gives_what_its_factors_amount_to(text: str, method: Method) -> None:
    proto = weighted(text)
    layer = layer_of(proto)
    split = arbitrary(layer, method)
    made, edit = applied(proto, lambda edit: split_all(edit, {layer.root: split}))
    assert_same(made, with_effective(proto, {layer.root: split}))
    parts = FORMS[method].parts
    assert operators(made).total() == operators(proto).total() - 1 + parts
    assert unread(made) == set()
    assert names(proto) - {"t"} <= names(made)  # t: transposed weights
    added = [layer.root, *parts_of(layer.root)[1:parts]]
    assert names(made) == (names(proto) - {"t"}) | set(added)
    whole = sum(array.size for array in stored(proto).values())
    kept = sum(array.size for array in stored(made).values())
    assert kept == whole - layer.weight.size + split.size
    (change,) = edit.changes
    assert (change.rule, change.root) == (RULE, layer.root)


WHOLE = PRODUCTS.keys() | {f"{name}, plain" for name in GEOMETRIES}
FULL = [case for case in CASES if str(case.id).split(": ")[0] in WHOLE]


@pytest.mark.parametrize(("text", "method"), FULL)
def test_at_full_rank_nothing_is_lost(text: str, method: Method) -> None:
    proto = weighted(text)
    layer = layer_of(proto)
    form, matrix = FORMS[method], np.asarray(layer.matrix(), np.float64)
    rank = form.most(layer)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * layer.shape[1], layer.shape[1]))
    for gram in (None, x.T @ x):
        split = split_of(layer, method, rank, matrix, gram)
        assert [f.shape for f in split.factors] == form.shapes(layer, rank)
        assert {f.dtype for f in split.factors} == {np.dtype(np.float32)}
        assert weighted_error(matrix, split.effective, None) < (1e-12 if method != "cp" else 1e-5)
    limit = 1e-5 if method != "cp" else 1e-2
    assert_same(applied(proto, lambda edit: split_all(edit, {layer.root: split}))[0], proto, limit)


# -- weights that others read too ------------------------------------------------------------------

SHARED = {  # two layers of one weight, p and q
    "matmul": "(float[5,12] x, float[5,12] x2, float[12,8] w) => (float[a,b] p, float[c,d] q)"
    " { p = MatMul(x, w) q = MatMul(x2, w) }",
    "matmul, one after another": "(float[5,8] x, float[8,8] w) => (float[a,b] q)"
    " { p = MatMul(x, w) r = Relu(p) q = MatMul(r, w) }",
    "gemm with biases": (
        "(float[5,12] x, float[5,12] x2, float[12,8] w, float[8] b, float[8] b2)"
        " => (float[a,b] p, float[c,d] q) { p = Gemm(x, w, b) q = Gemm(x2, w, b2) }"
    ),
    "gemm with one bias": (
        "(float[5,12] x, float[5,12] x2, float[12,8] w, float[8] b)"
        " => (float[a,b] p, float[c,d] q) { p = Gemm(x, w, b) q = Gemm(x2, w, b) }"
    ),
    "a Transpose before both": (
        "(float[5,12] x, float[5,12] x2, float[8,12] w) => (float[a,b] p, float[c,d] q)"
        " { t = Transpose(w) p = MatMul(x, t) q = MatMul(x2, t) }"
    ),
    "a Transpose before each": (
        "(float[5,12] x, float[5,12] x2, float[8,12] w) => (float[a,b] p, float[c,d] q)"
        " { t = Transpose(w) p = MatMul(x, t) t2 = Transpose(w) q = MatMul(x2, t2) }"
    ),
    "a Transpose before one": (
        "(float[5,12] x, float[5,12] x2, float[12,8] w) => (float[a,b] p, float[c,d] q)"
        " { p = Gemm(x, w) t = Transpose(w) q = Gemm<transB=1>(x2, t) }"
    ),
    "conv": (
        "(float[2,6,9,8] x, float[2,6,5,5] x2, float[8,6,3,3] w, float[8] b)"
        " => (float[a,b1,c,d] p, float[e,f,g,h] q)"
        " { p = Conv<pads=[1,0,2,1]>(x, w, b) q = Conv<pads=[1,0,2,1]>(x2, w) }"
    ),
}
SHARING = [
    pytest.param(text, method, id=f"{name}: {method}")
    for name, text in SHARED.items()
    for method in forms_of(linear_layers(Editor(Model.load(weighted(text))))[0])
]


@pytest.mark.parametrize(("text", "method"), SHARING)
def test_layers_of_one_weight_share_their_factors(text: str, method: Method) -> None:
    proto = weighted(text)
    edit = Editor(Model.load(proto))
    layers = linear_layers(edit)
    assert [tuple(each) for each in by_weights(layers)] == [tuple(layers)]
    split = arbitrary(layers[0], method)
    splits = {layer.root: split for layer in layers}
    made, edit = applied(proto, lambda edit: split_all(edit, {"p": split}))
    assert_same(made, with_effective(proto, splits))
    assert unread(made) == set()
    parts = FORMS[method].parts
    assert operators(made).total() == 2 * parts
    assert set(stored(made)) & {"w", "t"} == set()
    held = [a for name, a in stored(made).items() if not name.startswith("b")]
    assert len(held) == parts  # each once in the file
    assert sum(a.size for a in held) == split.size
    assert len(edit.changes) == 1


READ = {  # w is read by others as well, in some way: y, y2, .. are what the layer h leads to
    "its values": "(float[a,b] h, float[c,d] z) { h = Gemm(x, w) z = Relu(w) }",
    "twice by another": "(float[a,b] h, float[c,d] z) { h = Gemm(x, w) z = Add(w, w) }",
    "given out": "(float[a,b] h, float[8,8] w) { h = Gemm(x, w) }",
    "given out, transposed": "(float[a,b] h, float[c,d] t) { t = Transpose(w) h = Gemm(x, t) }",
    "transposed, by another": (
        "(float[a,b] h, float[c,d] z) { t = Transpose(w) h = Gemm(x, t) z = Relu(t) }"
    ),
    "before a Transpose": (
        "(float[a,b] h, float[c,d] z) { t = Transpose(w) h = Gemm(x, t) z = Relu(w) }"
    ),
    "as an embedding": (
        "(float[a,b] h, float[c,d] z) <int64[2] i = {3, 1}>"
        " { z = Gather(w, i) t = Transpose(w) h = MatMul(x, t) }"
    ),
    "in a body": (
        "(float[a,b] h, float[c,d] z) { h = Gemm(x, w) z = If(c) <"
        "then_branch = g1 () => (float[e,f] o) { o = Relu(w) },"
        "else_branch = g2 () => (float[e,f] o) { o = Neg(w) }> }"
    ),
    "bodies, transposed": (
        "(float[a,b] h, float[c,d] z) { t = Transpose(w) h = Gemm(x, t) z = If(c) <"
        "then_branch = g1 () => (float[e,f] o) { o = Relu(t) },"
        "else_branch = g2 () => (float[e,f] o) { o = Neg(t) }> }"
    ),
    "layers in another way": "(float[a,b] h, float[c,d] z) { h = Gemm(x, w) z = MatMul(x, w) }",
}


@pytest.mark.parametrize("name", READ)
def test_weights_that_others_read_stay(name: str) -> None:
    condition = ", bool c" if "bod" in name else ""
    proto = weighted(f"(float[5,8] x, float[8,8] w{condition}) => {READ[name]}")
    if condition:
        (kept,) = [tensor for tensor in proto.graph.initializer if tensor.name == "w"]
        assert kept.dims == [8, 8]
    before = stored(proto)["w"]
    edit = Editor(Model.load(proto))
    layer = next(layer for layer in linear_layers(edit) if layer.root == "h")
    split = arbitrary(layer, "svd")

    def change(edit: Editor) -> None:
        layer = next(layer for layer in linear_layers(edit) if layer.root == "h")
        assert split_layers(edit, [layer], split)

    made, edit = applied(proto, change)
    np.testing.assert_array_equal(stored(made)["w"], before)
    assert unread(made) == set()
    feed = inputs_of(proto)
    with Session(made.SerializeToString(), threads=1) as session:
        found = session.run(feed)
    with Session(proto.SerializeToString(), threads=1) as session:
        expected = session.run(feed)
    expected["h"] = feed["x"] @ split.effective.T
    for each, array in expected.items():
        np.testing.assert_allclose(found[each], array, rtol=1e-4, atol=1e-5)


OTHERS = {  # one weight that layers read in several ways
    "another operator": "(float[5,8] x, float[8,8] w) => (float[a,b] p, float[c,d] q)"
    " { p = MatMul(x, w) q = Gemm(x, w) }",
    "turned": "(float[5,8] x, float[8,8] w) => (float[a,b] p, float[c,d] q)"
    " { p = Gemm(x, w) q = Gemm<transB=1>(x, w) }",
    "other strides": "(float[1,8,9,9] x, float[32,8,3,3] w) => (float[a,b,c,d] p, float[e,f,g,h] q)"
    " { p = Conv(x, w) q = Conv<strides=[2,2]>(x, w) }",
    "groups": "(float[1,8,9,9] x, float[1,16,9,9] x2, float[32,8,3,3] w)"
    " => (float[a,b,c,d] p, float[e,f,g,h] q) { p = Conv(x, w) q = Conv<group=2>(x2, w) }",
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_layers_read_in_several_ways_stay_whole(name: str) -> None:
    edit = Editor(Model.load(weighted(OTHERS[name])))
    assert len(linear_layers(edit)) == 2
    assert by_weights(linear_layers(edit)) == []
    assert splittable(edit, {}) == []  # as a recipe has it, which knows roots alone


GROUPED = {
    "grouped": "(float[2,8,9,8] x, float[16,4,3,3] w) => (float[a,b,c,d] y)"
    " { y = Conv<group=2>(x, w) }",
    "depthwise": "(float[2,32,9,8] x, float[32,1,3,3] w) => (float[a,b,c,d] y)"
    " { y = Conv<group=32>(x, w) }",
    "grouped, one tap": "(float[2,64,9,8] x, float[64,32,1,1] w) => (float[a,b,c,d] y)"
    " { y = Conv<group=2>(x, w) }",
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_left_alone(name: str) -> None:
    edit = Editor(Model.load(weighted(GROUPED[name])))
    layer = layer_of(edit)
    assert layer.groups > 1
    assert forms_of(layer) == []
    assert splittable(edit, {}) == []


# -- what is refused -------------------------------------------------------------------------------

REFUSING = {
    "conv": "(float[2,6,9,8] x, float[8,6,3,3] w) => (float[a,b,c,d] y) { y = Conv(x, w) }",
    "tap": "(float[2,6,9,8] x, float[8,6,1,1] w) => (float[a,b,c,d] y) { y = Conv(x, w) }",
    "gemm": "(float[5,12] x, float[12,8] w) => (float[a,b] y) { y = Gemm(x, w) }",
}
REFUSED = [
    pytest.param(text, method, id=f"{name}: {method}")
    for name, text in REFUSING.items()
    for method in forms_of(layer_of(weighted(text)))
]


def damaged(split: Split) -> list[Split]:
    """Factors of other layers, and of none."""
    found = []
    for number, factor in enumerate(split.factors):
        others = [factor.astype(np.float64), factor[0], factor[..., None], factor[:0]]
        others += [np.asarray(np.float32(3)), factor.reshape(-1)]
        others += [np.repeat(factor, 2, axis=axis) for axis in range(factor.ndim)]
        for other in others:
            factors = list(split.factors)
            factors[number] = other
            found.append(Split(split.method, tuple(factors)))
    last = len(split.factors) - 1  # all of rank 0
    none = (f[:0] if n < last else f[:, :0] for n, f in enumerate(split.factors))
    found.append(Split(split.method, tuple(none)))
    found.append(Split(split.method, split.factors[:-1]))
    found.append(Split(split.method, (*split.factors, split.factors[-1])))
    found.append(Split(split.method, ()))
    return found


@pytest.mark.parametrize(("text", "method"), REFUSED)
def test_factors_of_other_layers_are_refused(text: str, method: Method) -> None:
    proto = weighted(text)
    edit = Editor(Model.load(proto))
    layer = layer_of(edit)
    for split in damaged(arbitrary(layer, method)):
        with pytest.raises(ValueError, match=r"^y: "):
            split_layers(edit, [layer], split)
    assert edit.mark() == (0, 0)
    assert exporter.to_proto(edit.model) == proto


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*REFUSING, *GROUPED])
def test_forms_that_do_not_fit_are_refused(name: str, method: Method) -> None:
    edit = Editor(Model.load(weighted((REFUSING | GROUPED)[name])))
    layer = layer_of(edit)
    if FORMS[method].fits(layer):
        return
    c, (m, k) = layer.shape[1] // layer.taps, layer.shape
    kernel = () if layer.patches is None else layer.patches.kernel
    height, width = (*kernel, 1, 1)[:2]
    shapes = {
        "svd": [(3, c, *kernel), (m, 3)],
        "channel": [(3, c, *kernel), (m, 3)],
        "spatial": [(3, c, height), (m, 3, width)],
        "tucker": [(3, c), (2, 3, *kernel), (m, 2)],
        "cp": [(3, c), (3, *kernel), (m, 3)],
    }[method]
    split = Split(method, tuple(np.ones(shape, np.float32) for shape in shapes))
    assert split.effective.shape == (m, k)  # which alone does not tell
    with pytest.raises(ValueError, match=r"^y: "):
        split_layers(edit, [layer], split)
    assert edit.mark() == (0, 0)


@pytest.mark.parametrize(
    ("denied", "fuel"), [([(RULE, "p")], None), ([(RULE, None)], None), ([], 0)]
)
def test_what_is_denied_is_not_done(denied: list[Any], fuel: int | None) -> None:
    proto = weighted(SHARED["matmul"])
    edit = Editor(Model.load(proto), denied, fuel)
    layers = linear_layers(edit)
    assert not split_layers(edit, layers, arbitrary(layers[0], "svd"))
    assert edit.mark() == (0, 0)
    assert exporter.to_proto(edit.model) == proto


def test_layers_of_one_weight_are_one_change() -> None:
    edit = Editor(Model.load(weighted(SHARED["matmul"])), fuel=1)
    layers = linear_layers(edit)
    assert split_layers(edit, layers, arbitrary(layers[0], "svd"))
    assert not edit.is_overspent
    (change,) = edit.changes
    assert (change.root, change.after) == ("p", "svd (3,)")
    assert "2" in change.before


# -- versions, names -------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 17, 21])
@pytest.mark.parametrize(
    "name", ["gemm with a bias", "gemm turned with a bias", "matmul", "3x3, biased", "valid, plain"]
)
def test_every_opset(name: str, opset: int) -> None:
    proto = weighted(LAYERS[name], opset)
    layer = layer_of(proto)
    for method in forms_of(layer):
        split = arbitrary(layer, method)
        made, _ = applied(proto, lambda edit, split=split: split_all(edit, {layer.root: split}))  # type: ignore[misc]
        assert_same(made, with_effective(proto, {layer.root: split}))


@pytest.mark.parametrize("name", ["gemm with a bias", "matmul", "3x3, biased"])
def test_where_weights_have_to_be_inputs_too(name: str) -> None:
    """Before IR 4: what is new can be no initializer."""
    proto = weighted(LAYERS[name], 9)
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(info)
    layer = layer_of(proto)
    for method in forms_of(layer):
        split = arbitrary(layer, method)
        made, _ = applied(proto, lambda edit, split=split: split_all(edit, {layer.root: split}))  # type: ignore[misc]
        assert_same(made, with_effective(proto, {layer.root: split}))
        assert operators(made).total() == FORMS[method].parts
        assert "w" not in stored(made)
        assert "w" not in {info.name for info in made.graph.input}
        assert unread(made) == set()


def test_names_that_are_taken() -> None:
    text = (
        "(float[5,12] x, float[12,8] w) => (float[a,b] y, float[c,d] z)"
        " { y = MatMul(x, w) z = Relu(y) }"
    )
    proto = weighted(text)
    taken = {"z": parts_of("y")[1]}
    proto.graph.node[1].output[0] = proto.graph.output[1].name = taken["z"]
    proto.graph.node[1].name = "y/factor"
    layer = layer_of(proto)
    split = arbitrary(layer, "svd")
    made, _ = applied(proto, lambda edit: split_all(edit, {"y": split}))
    assert_same(made, with_effective(proto, {"y": split}))
    assert len(names(made)) == len(made.graph.node)


# -- nothing puts them together again --------------------------------------------------------------

NET = (
    "(float[1,8,10,9] x, float[16,8,3,3] w1, float[16] b1, float[16,16,1,1] w2, float[16] b2,"
    " float[16,16,3,3] w3, float[16] g, float[16] s, float[16] m, float[16] v,"
    " float[16,24] w4, float[24] b4, float[24,10] w5, float[10] b5) => (float[1,10] y) {"
    " c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1)"
    " c2 = Conv(r1, w2, b2) a2 = Add(c2, r1) r2 = Relu(a2)"
    " v1 = Abs(v) c3 = Conv<strides=[2,2]>(r2, w3) n3 = BatchNormalization(c3, g, s, m, v1)"
    " r3 = HardSigmoid(n3) p = GlobalAveragePool(r3) f = Flatten(p)"
    " h4 = MatMul(f, w4) a4 = Add(h4, b4) r4 = Tanh(a4) y = Gemm(r4, w5, b5) }"
)
CHOSEN: dict[Method, dict[str, Method]] = {
    "channel": {"c1": "channel", "c2": "svd", "c3": "channel", "h4": "svd", "y": "svd"},
    "spatial": {"c1": "spatial", "c2": "svd", "c3": "spatial", "h4": "svd"},
    "tucker": {"c1": "tucker", "c3": "tucker", "y": "svd"},
    "cp": {"c1": "cp", "c2": "svd", "c3": "cp"},
}


def splits_of(proto: onnx.ModelProto, chosen: dict[str, Method], rank: int = 4) -> dict[str, Split]:
    layers = {layer.root: layer for layer in linear_layers(Editor(Model.load(proto)))}
    return {
        root: split_of(layers[root], method, rank, layers[root].matrix(), None)
        for root, method in chosen.items()
    }


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("level", [1, 2])
def test_optimising_again_leaves_layers_split(method: Method, level: int) -> None:
    proto = weighted(NET)
    split, _ = applied(proto, lambda edit: split_all(edit, splits_of(proto, CHOSEN[method])))
    result = graphopt.optimize(split, level=level)
    found = result.proto()
    assert operators(found).total() == operators(split).total() > operators(proto).total()
    sizes = (sum(a.size for a in stored(each).values()) for each in (found, split))
    assert next(sizes) <= next(sizes)
    assert_same(found, split, 1e-4)


# -- recipes ---------------------------------------------------------------------------------------

CHAIN = (
    "(float[1,8,9,8] x, float[16,8,3,3] w1, float[16,16,1,1] w2, float[16] b2, float[16,8] w3)"
    ' => (float[1,8] y) {{ {0} = Conv<auto_pad="VALID",strides=[1,2]>(x, w1)'
    " {1} = Conv({0}, w2, b2) p = GlobalAveragePool({1}) f = Flatten(p) y = MatMul(f, w3) }}"
)


def named(first: str = "first", second: str = "second") -> onnx.ModelProto:
    """The chain with other names of what its convolutions give."""
    proto = weighted(CHAIN.format("first", "second"))
    for node in proto.graph.node:
        for names_of in (node.input, node.output):
            for slot, name in enumerate(names_of):
                names_of[slot] = {"first": first, "second": second}.get(name, name)
    return proto


def through_a_file(recipe: StagedRecipe, folder: Path) -> StagedRecipe:
    np.savez(folder / "arrays.npz", allow_pickle=False, **recipe.arrays)
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        return StagedRecipe.of(dict(arrays))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "svd"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("first", "second"),
        ("/model.0/conv/Conv_output_0", "model/model.1/conv/Conv_output_0"),
        ("svd.0/x", "svd.1/x"),
        ("0/cp.0/a.npy", "weights/ä b"),
        ("/", "//"),
        (".", "cut"),
    ],
)
def test_splits_survive_a_file(method: Method, first: str, second: str, tmp_path: Path) -> None:
    lossless = graphs.save(named(first, second), tmp_path / "lossless.onnx")
    layers = {layer.root: layer for layer in linear_layers(Editor(Model.load(lossless)))}
    splits = {
        first: arbitrary(layers[first], method),
        second: arbitrary(layers[second], "svd"),
        "y": arbitrary(layers["y"], "svd", 2),
    }
    bias = np.arange(16, dtype=np.float32)
    other = np.ones((16, 16, 1, 1), np.float32)
    stages = (Stage({"w2": other}), Stage(biases={first: bias}, splits=splits))
    recipe = StagedRecipe(stages)
    again = through_a_file(recipe, tmp_path)
    assert len(again.stages) == 2
    assert again.stages[0].splits == {}
    found = again.stages[1].splits
    assert found.keys() == splits.keys()
    for root, split in splits.items():
        assert (found[root].method, found[root].ranks) == (split.method, split.ranks)
        for one, two in zip(found[root].factors, split.factors, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, two)
    made = exporter.to_proto(again.apply(lossless))
    assert made == exporter.to_proto(recipe.apply(lossless))
    onnx.checker.check_model(made, full_check=True)
    expected = with_effective(onnx.load(lossless), splits)
    expected.graph.node[0].input.append("bias")
    expected.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    assert_same(made, expected)
    assert unread(made) == set()


def test_a_split_stands_for_all_layers_of_its_weights(tmp_path: Path) -> None:
    proto = weighted(SHARED["conv"])
    lossless = graphs.save(proto, tmp_path / "lossless.onnx")
    layers = linear_layers(Editor(Model.load(proto)))
    split = arbitrary(layers[0], "tucker")
    made = exporter.to_proto(StagedRecipe((Stage(splits={"p": split}),)).apply(lossless))
    assert_same(made, with_effective(proto, {"p": split, "q": split}))
    with pytest.raises(LookupError, match="there is no layer 'q'"):
        StagedRecipe((Stage(splits={"q": split}),)).apply(lossless)


@pytest.mark.parametrize("root", ["nowhere", "w1", "x", "f", "First", ""])
def test_layers_that_are_missing(root: str, tmp_path: Path) -> None:
    lossless = graphs.save(named(), tmp_path / "lossless.onnx")
    layer = linear_layers(Editor(Model.load(lossless)))[0]
    recipe = StagedRecipe((Stage(splits={root: arbitrary(layer, "cp")}),))
    with pytest.raises(LookupError, match=f"there is no layer {root!r}"):
        recipe.apply(lossless)


def test_layers_are_split_once(tmp_path: Path) -> None:
    """What a stage made of a layer is another one for the next, under the same name."""
    lossless = graphs.save(named(), tmp_path / "lossless.onnx")
    layer = linear_layers(Editor(Model.load(lossless)))[0]
    stage = Stage(splits={"first": arbitrary(layer, "channel")})
    with pytest.raises(ValueError, match="'channel'"):
        StagedRecipe((stage, stage)).apply(lossless)


@pytest.mark.parametrize("method", METHODS)
def test_damaged_arrays(method: Method, tmp_path: Path) -> None:
    lossless = graphs.save(named(), tmp_path / "lossless.onnx")
    layers = {layer.root: layer for layer in linear_layers(Editor(Model.load(lossless)))}
    root = "second" if method == "svd" else "first"
    split = arbitrary(layers[root], method)
    for other in (each for each in damaged(split) if each.factors):  # without, it is no split
        with pytest.raises(ValueError, match=root):
            StagedRecipe.of(StagedRecipe((Stage(splits={root: other}),)).arrays).apply(lossless)
    arrays = StagedRecipe((Stage(splits={root: split}),)).arrays
    for key, array in arrays.items():
        rest = {name: each for name, each in arrays.items() if name != key}
        wrong = [rest, rest | {key.replace(method, "qr"): array}, arrays | {f"{key[:-1]}x": array}]
        wrong += [rest | {key.replace(".", ".-"): array}, rest | {key.replace(".", ""): array}]
        for each in wrong:
            with pytest.raises(ValueError):  # noqa: PT011 - whichever says it first
                StagedRecipe.of(each)


def test_two_splits_of_one_layer() -> None:
    layer = linear_layers(Editor(Model.load(named())))[0]
    one, two = (Stage(splits={"first": arbitrary(layer, m)}) for m in ("channel", "cp"))
    with pytest.raises(ValueError, match="two ways"):
        Stage.of(one.arrays | two.arrays)


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("cut/g", np.ones((2, 2), np.int64)),
        ("cut/g", np.array(3)),
        ("cut/g", np.ones(2, np.float32)),
        ("weights", np.ones(2, np.float32)),
        ("svd.0", np.ones((2, 2), np.float32)),
    ],
)
def test_arrays_of_no_stage(key: str, array: Array) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whichever says it first
        Stage.of({key: array})


@pytest.mark.parametrize(
    "stage",
    [
        Stage({"w1": np.ones((16, 8, 3, 3))}),
        Stage({"w1": np.ones((16, 8, 3, 3), np.int64)}),
        Stage(biases={"first": np.ones(16)}),
        Stage(biases={"first": np.ones(1, np.float32)}),
        Stage(biases={"first": np.ones((16, 1), np.float32)}),
    ],
)
def test_numbers_of_another_type_or_shape(stage: Stage, tmp_path: Path) -> None:
    lossless = graphs.save(named(), tmp_path / "lossless.onnx")
    with pytest.raises(ValueError, match=r"w1|first"):
        StagedRecipe((stage,)).apply(lossless)


def test_weights_of_split_layers_are_not_held() -> None:
    proto = weighted(SHARED["conv"].replace("q = Conv", "r = Conv<strides=[2,2]>(p, w2) q = Conv"))
    proto.graph.initializer.append(graphs.weight("w2", (5, 8, 3, 3)))
    before, edit = Model.load(proto), Editor(Model.load(proto))
    layers = {layer.root: layer for layer in linear_layers(edit)}
    assert layers.keys() == {"p", "q", "r"}
    for value in list(edit.model.graph.initializers):
        assert value.weight is not None
        tensor = onnx.numpy_helper.from_array(value.weight.values + 1, value.name)
        edit.set_weight(value, tensor)
    split = arbitrary(layers["p"], "channel")
    assert Stage.between(before, edit).weights.keys() == {"w", "w2", "b"}
    stage = Stage.between(before, edit, splits={"p": split})
    assert stage.weights.keys() == {"w2", "b"}
    assert stage.splits == {"p": split}
    assert Stage.between(before, edit, splits={"r": split}).weights.keys() == {"w", "b"}
