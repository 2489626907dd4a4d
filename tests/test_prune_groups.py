"""Coupled groups: which channels go together, which have to stay, and removal that is exact.

Where the readers' weights of a unit are zero its removal changes nothing: every case takes half
of the units of every group and compares with the model in which nothing reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray

from benchmarks import prune_groups
from graphopt import exporter, macs, verify
from graphopt.edit import Editor
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.passes.prune.costs import costs
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.remove import REMOVE, remove, silence
from graphopt.runtime import Level, Port, Session
from tests.optimized import applied
from tests.random_channels import Chain

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A graph in text: inputs other than x, x2, ... are weights. `units` are those of each group.

    `{name}` are constants of integers.
    """

    text: str
    units: tuple[int, ...]
    opset: int = 17
    integers: Mapping[str, Any] | None = None

    def proto(self) -> onnx.ModelProto:
        """The model with its weights."""
        header = f'<ir_version: 9, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>'
        made = onnx.parser.parse_model(f"{header} g {self.text}")
        weights = [info for info in made.graph.input if not info.name.startswith("x")]
        for info in weights:
            shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            rng = np.random.default_rng([*info.name.encode()])
            array = rng.normal(size=shape) * 0.4
            if info.name.startswith("var"):
                array = np.abs(array) + 0.5
            made.graph.initializer.append(
                onnx.numpy_helper.from_array(array.astype(np.float32), info.name)
            )
            made.graph.input.remove(info)
        for name, numbers in (self.integers or {}).items():
            made.graph.initializer.append(
                onnx.numpy_helper.from_array(np.asarray(numbers, np.int64), name)
            )
        return made


CONV = "float[8,3,3,3] w1, float[8] b1"
X = "float[2,3,6,6] x"
FIRST = "a = Conv<pads=[1,1,1,1]>(x, w1, b1)"
LAST = "float[4,8,1,1] w2"


def between(nodes: str, weights: str = "", last: str = LAST, read: str = "r") -> str:
    """Nodes between two convolutions: from 8 channels `a` to the 8 of `r`."""
    more = f", {weights}" if weights else ""
    inputs = f"({X}, {CONV}, {last}{more})"
    return f"{inputs} => (float[n,c,h,w] y) {{ {FIRST} {nodes} y = Conv({read}, w2) }}"


CASES = {
    # element by element and broadcast
    "unary": Case(between("r = Relu(a)"), (8,)),
    "nothing": Case(between("", read="a"), (8,)),
    "cast": Case(between("h = Cast<to=11>(a) d = Sqrt(h) f = Cast<to=1>(h) r = Tanh(f)"), (8,)),
    "clip": Case(between("r = Clip(a, l, h)", "float l, float h"), (8,)),
    "prelu": Case(between("r = PRelu(a, s)", "float[8,1,1] s"), (8,)),
    "dropout": Case(between("r = Dropout(a)"), (8,)),
    "channel constants": Case(
        between("m = Mul(a, s) r = Sub(t, m)", "float[1,8,1,1] s, float[8,1,1] t"), (8,)
    ),
    "one number": Case(
        between("m = Mul(a, s) r = Max(m, t)", "float[1] s, float[1,1,1,1] t"), (8,)
    ),
    "gate": Case(between("s = Sigmoid(a) r = Mul(a, s)"), (8,)),
    "where": Case(between("c = Greater(a, s) r = Where(c, a, t)", "float[8,1,1] s, float t"), (8,)),
    "sum": Case(
        between(
            "c = Conv(a, w3) d = Conv(x, w4) e = Sum(a, c, d) r = Relu(e)",
            "float[8,8,1,1] w3, float[8,3,1,1] w4",
        )
        .replace("pads=[1,1,1,1]", "pads=[0,0,0,0]")
        .replace("float[8,3,3,3]", "float[8,3,1,1]"),
        (8,),
    ),
    "squeeze and excite": Case(
        between(
            "p = GlobalAveragePool(a) q = Conv(p, w3) k = Relu(q) g = Conv(k, w4)"
            " h = HardSigmoid(g) r = Mul(h, a)",
            "float[2,8,1,1] w3, float[8,2,1,1] w4",
        ),
        (8, 2),
    ),
    # normalisation, pooling, reduction
    "batch normalisation": Case(
        between(
            "r = BatchNormalization(a, g, b, m, var)",
            "float[8] g, float[8] b, float[8] m, float[8] var",
        ),
        (8,),
    ),
    "instance normalisation": Case(
        between("r = InstanceNormalization(a, g, b)", "float[8] g, float[8] b"), (8,)
    ),
    "pools": Case(
        between("m = MaxPool<kernel_shape=[2,2]>(a) r = AveragePool<kernel_shape=[2,2]>(m)"), (8,)
    ),
    "resize to a size": Case(between("r = Resize(a, , , s)"), (8,), integers={"s": [2, 8, 12, 12]}),
    "resize": Case(
        between("r = Resize(a, , s)", "").replace(
            "{ ", "{ s = Constant<value_floats=[1.0,1.0,2.0,2.0]>() ", 1
        ),
        (8,),
    ),
    "softmax over positions": Case(between("r = Softmax<axis=3>(a)"), (8,)),
    "reduce positions": Case(
        f"({X}, {CONV}, float[8,5] w2) => (float[n,c] y)"
        f" {{ {FIRST} r = ReduceMean<axes=[2,3], keepdims=0>(a) y = MatMul(r, w2) }}",
        (8,),
    ),
    # convolutions
    "depthwise": Case(
        between("d = Conv<group=8>(a, w3, b3) r = Relu(d)", "float[8,1,3,3] w3, float[8] b3"), (8,)
    ),
    "depthwise with a multiplier": Case(
        between(
            "r = Conv<group=8>(a, w3, b3)", "float[16,1,3,3] w3, float[16] b3", "float[4,16,1,1] w2"
        ),
        (8,),
    ),
    "groups read": Case(
        f"({X}, {CONV}, float[4,4,1,1] w2) => (float[n,c,h,w] y)"
        f" {{ {FIRST} r = Relu(a) y = Conv<group=2>(r, w2) }}",
        (4,),
    ),
    "groups read and give": Case(
        between("r = Conv<group=2>(a, w3)", "float[6,4,1,1] w3", "float[4,6,1,1] w2"), (4, 3)
    ),
    "transposed": Case(
        between(
            "r = ConvTranspose<strides=[2,2]>(a, w3, b3)",
            "float[8,6,2,2] w3, float[6] b3",
            "float[4,6,1,1] w2",
        ),
        (8, 6),
    ),
    "transposed depthwise": Case(
        between("r = ConvTranspose<group=8>(a, w3)", "float[8,1,2,2] w3"), (8,)
    ),
    # movement
    "concat": Case(
        between(
            "c = Conv(x, w3) r = Concat<axis=1>(a, c, x)", "float[5,3,1,1] w3", "float[4,16,1,1] w2"
        ),
        (13,),
    ),
    "split stated": Case(
        between(
            "p, q = Split<axis=1>(a, {s}) k = Sigmoid(q) r = Concat<axis=1>(k, p)".replace(
                "{s}", "s"
            )
        ),
        (8,),
        integers={"s": [3, 5]},
    ),
    "split by attribute": Case(
        between("p, q = Split<axis=1, split=[3,5]>(a) r = Concat<axis=1>(q, p)"), (8,), opset=11
    ),
    "split in equal parts": Case(
        between("p, q = Split<axis=1>(a) s = Sigmoid(q) r = Mul(p, s)", "", "float[4,4,1,1] w2"),
        (4,),
    ),
    "slice": Case(
        between("p = Slice(a, i0, i4, i1) q = Slice(a, i4, huge, i1) r = Concat<axis=1>(q, p)"),
        (8,),
        integers={"i0": [0], "i1": [1], "i4": [4], "huge": [2**62]},
    ),
    "slice from the end": Case(
        between("p = Slice(a, m4, huge, i1) r = Concat<axis=1>(a, p)", "", "float[4,12,1,1] w2"),
        (8,),
        integers={"m4": [-4], "huge": [2**62], "i1": [1]},
    ),
    "gather": Case(
        between("r = Gather<axis=1>(a, o)"), (8,), integers={"o": [7, 0, 2, -3, 1, 3, 6, 4]}
    ),
    "pad positions": Case(between("r = Pad(a, p)"), (8,), integers={"p": [0, 0, 1, 1, 0, 0, 1, 1]}),
    "pad channels": Case(
        between("r = Pad(a, p)", "", "float[4,11,1,1] w2"),
        (8,),
        integers={"p": [0, 2, 0, 0, 0, 1, 0, 0]},
    ),
    "transpose": Case(
        f"({X}, {CONV}, float[8,5] w2, float[8] s) => (float[n,c,h,w] y)"
        f" {{ {FIRST} t = Transpose<perm=[0,2,3,1]>(a) r = Mul(t, s) y = MatMul(r, w2) }}",
        (8,),
    ),
    "squeeze": Case(
        f"({X}, {CONV}, float[8,5] w2) => (float[n,c] y) {{ {FIRST} p = GlobalMaxPool(a)"
        " q = Squeeze(p, i) u = Unsqueeze(q, j) r = Squeeze(u, j) y = MatMul(r, w2) }",
        (8,),
        integers={"i": [2, 3], "j": [-1]},
    ),
    "tile": Case(
        between("r = Tile(a, t)", "", "float[4,16,1,1] w2"), (8,), integers={"t": [1, 2, 1, 1]}
    ),
    "expand": Case(
        between("p = GlobalAveragePool(a) r = Expand(p, t)"), (8,), integers={"t": [2, 8, 5, 5]}
    ),
    "expand a constant": Case(
        between("e = Expand(c, t) r = Add(a, e)", "float[1,1,1,1] c"),
        (8,),
        integers={"t": [1, 8, 1, 1]},
    ),
    "constant of a shape": Case(
        between("c = ConstantOfShape(t) r = Max(a, c)"), (8,), integers={"t": [1, 8, 1, 1]}
    ),
    "of the shape of weights": Case(
        f"({X}, float[8,3,1,1] w1, {LAST}, float c) => (float[n,k,h,w] y) {{ s = Shape<end=1>(w1)"
        " e = Expand(c, s) a = Conv(x, w1, e) r = Relu(a) y = Conv(r, w2) }",
        (8,),
    ),
    # reshapes
    "flatten": Case(
        f"({X}, {CONV}, float[288,5] w2) => (float[n,c] y)"
        f" {{ {FIRST} r = Flatten(a) y = MatMul(r, w2) }}",
        (8,),
    ),
    "flatten by reshape": Case(
        f"({X}, {CONV}, float[5,288] w2, float[5] b2) => (float[n,c] y)"
        f" {{ {FIRST} r = Reshape(a, s) y = Gemm<transB=1>(r, w2, b2) }}",
        (8,),
        integers={"s": [2, 288]},
    ),
    "positions as one": Case(
        between("f = Reshape(a, s) k = Relu(f) r = Reshape(k, t)"),
        (8,),
        integers={"s": [0, 8, -1], "t": [0, 0, 6, 6]},
    ),
    "measured and literal": Case(
        between(
            "m = Shape(a) n0 = Gather(m, i) s = Concat<axis=0>(n0, c8, m1) f = Reshape(a, s)"
            " t = Concat<axis=0>(n0, c8, c66) r = Reshape(f, t)"
        ),
        (8,),
        integers={"i": [0], "c8": [8], "m1": [-1], "c66": [6, 6]},
    ),
    "measured channels": Case(
        between(
            "m = Shape(a) n1 = Slice(m, i0, i2) s = Concat<axis=0>(n1, m1) f = Reshape(a, s)"
            " k = Relu(f) r = Reshape(k, m)"
        ),
        (8,),
        integers={"i0": [0], "i2": [2], "m1": [-1]},
    ),
    "channel shuffle": Case(
        between(
            "s = Reshape(a, i) t = Transpose<perm=[0,2,1,3,4]>(s) u = Reshape(t, j)"
            " r = Conv<group=2>(u, w3)",
            "float[4,4,1,1] w3",
            "float[4,4,1,1] w2",
        ),
        (2, 2),
        integers={"i": [2, 2, 4, 6, 6], "j": [2, 8, 6, 6]},
    ),
    "group normalisation by groups": Case(
        between(
            "s = Reshape(a, i) t = InstanceNormalization(s, g, b) u = Reshape(t, j) r = Mul(u, m)",
            "float[4] g, float[4] b, float[8,1,1] m",
        ),
        (4,),
        integers={"i": [0, 4, -1], "j": [2, 8, 6, 6]},
    ),
    # products
    "gemm": Case(
        "(float[3,6] x, float[6,8] w1, float[8] b1, float[5,8] w2, float[1,5] b2) => (float[n,c] y)"
        " { a = Gemm(x, w1, b1) r = Relu(a) y = Gemm<transB=1, alpha=0.5>(r, w2, b2) }",
        (8,),
    ),
    "gemm from the left": Case(
        "(float[6,3] x, float[6,8] w1, float[8,1] b1, float[8,5] w2) => (float[n,c] y)"
        " { a = Gemm<transA=1>(w1, x, b1) r = Relu(a) y = Gemm<transA=1>(r, w2) }",
        (8,),
    ),
    "products of any rank": Case(
        "(float[2,3,4,6] x, float[6,8] w1, float[8] b1, float[8,5] w2) => (float[n,m,k,c] y)"
        " { a = MatMul(x, w1) b = Add(a, b1) r = Relu(b) y = MatMul(r, w2) }",
        (8,),
    ),
    "weights on the left": Case(
        "(float[2,6,3] x, float[8,6] w1, float[5,8] w2) => (float[n,m,k] y)"
        " { a = MatMul(w1, x) r = Relu(a) y = MatMul(w2, r) }",
        (8,),
    ),
    "weights turned and passed on": Case(
        "(float[3,6] x, float[8,6] w1, float[5,8] w2) => (float[n,c] y) { t = Transpose(w1)"
        " a = MatMul(x, t) r = Relu(a) i = Identity(w2) u = Transpose<perm=[1,0]>(i)"
        " y = MatMul(r, u) }",
        (8,),
    ),
    "embedding": Case(
        "(int64[2,4] xi, float[10,8] w1, float[4,8] p, float[8,5] w2) => (float[n,m,c] y)"
        " { e = Gather(w1, xi) r = Add(e, p) y = MatMul(r, w2) }",
        (8,),
    ),
    "fused": Case(
        "(float[3,6] x, float[6,8] w1, float[8] b1, float[8,5] w2) => (float[n,c] y)"
        " { a = MatMul(x, w1) g = com.microsoft.BiasGelu(a, b1) h = com.microsoft.QuickGelu(g)"
        " y = MatMul(h, w2) }",
        (8,),
    ),
    "a biased sum of tokens": Case(
        "(float[2,3,6] x, float[6] g0, float[6] b0, float[6,8] w1, float[8,6] w2)"
        " => (float[n,m,c] y) { n0 = LayerNormalization(x, g0, b0) a = MatMul(n0, w1) r = Gelu(a)"
        " o = MatMul(r, w2) y = Add(o, x) }",
        (8,),
        opset=20,
    ),
    # heads
    "attention": Case(
        "(float[2,5,6] x, float[6,8] wq, float[6,8] wk, float[6,12] wv, float[12,6] wo)"
        " => (float[n,m,c] y) {"
        " q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
        " q4 = Reshape(q, s2) k4 = Reshape(k, s2) v4 = Reshape(v, s3)"
        " qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,3,1]>(k4)"
        " vt = Transpose<perm=[0,2,1,3]>(v4) l = MatMul(qt, kt) p = Softmax<axis=-1>(l)"
        " o = MatMul(p, vt) ot = Transpose<perm=[0,2,1,3]>(o) of = Reshape(ot, s12)"
        " y = MatMul(of, wo) }",
        (4,),
        integers={"s2": [0, 0, 4, 2], "s3": [2, 5, -1, 3], "s12": [2, 5, 12]},
    ),
    "heads in one axis with the batch": Case(
        "(float[2,5,6] x, float[6,8] wq, float[6,8] wk, float[6,8] wv, float[8,6] wo)"
        " => (float[n,m,c] y) {"
        " q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
        " q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s)"
        " qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,3,1]>(k4)"
        " vt = Transpose<perm=[0,2,1,3]>(v4) qb = Reshape(qt, b) kb = Reshape(kt, bt)"
        " vb = Reshape(vt, b) l = MatMul(qb, kb) p = Softmax<axis=-1>(l) ob = MatMul(p, vb)"
        " o = Reshape(ob, h) ot = Transpose<perm=[0,2,1,3]>(o) of = Reshape(ot, j)"
        " y = MatMul(of, wo) }",
        (4,),
        integers={
            "s": [2, 5, 4, 2],
            "b": [8, 5, 2],
            "bt": [-1, 2, 5],
            "h": [2, 4, 5, 2],
            "j": [2, 5, 8],
        },
    ),
    "packed attention": Case(
        "(float[2,5,6] x, float[6,24] wqkv, float[24] b, float[8,6] wo) => (float[n,m,c] y) {"
        " a = MatMul(x, wqkv) ab = Add(a, b) r = Reshape(ab, s) t = Transpose<perm=[2,0,3,1,4]>(r)"
        " q = Gather<axis=0>(t, i0) k = Gather<axis=0>(t, i1) v = Gather<axis=0>(t, i2)"
        " kt = Transpose<perm=[0,1,3,2]>(k) l = MatMul(q, kt) p = Softmax<axis=-1>(l)"
        " o = MatMul(p, v) ot = Transpose<perm=[0,2,1,3]>(o) of = Reshape(ot, j)"
        " y = MatMul(of, wo) }",
        (4,),
        integers={"s": [2, 5, 3, 4, 2], "j": [2, 5, 8], "i0": 0, "i1": 1, "i2": 2},
    ),
    "shared heads of keys": Case(
        "(float[2,5,6] x, float[6,8] wq, float[6,4] wk, float[6,4] wv, float[8,6] wo)"
        " => (float[n,m,c] y) {"
        " q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
        " q4 = Reshape(q, sq) k4 = Reshape(k, sk) v4 = Reshape(v, sk)"
        " qt = Transpose<perm=[0,2,1,3]>(q4) k5 = Unsqueeze(k4, i3) ke = Expand(k5, se)"
        " kr = Reshape(ke, sq) kt = Transpose<perm=[0,2,3,1]>(kr) v5 = Unsqueeze(v4, i3)"
        " ve = Expand(v5, se) vr = Reshape(ve, sq) vt = Transpose<perm=[0,2,1,3]>(vr)"
        " l = MatMul(qt, kt) p = Softmax<axis=-1>(l) o = MatMul(p, vt)"
        " ot = Transpose<perm=[0,2,1,3]>(o) of = Reshape(ot, so) y = MatMul(of, wo) }",
        (2,),
        integers={
            "sq": [2, 5, 4, 2],
            "sk": [2, 5, 2, 2],
            "i3": [3],
            "se": [2, 5, 2, 2, 2],
            "so": [2, 5, 8],
        },
    ),
    "Attention of rows": Case(
        "(float[2,5,6] x, float[6,8] wq, float[6,8] wk, float[6,12] wv, float[12,6] wo)"
        " => (float[n,m,c] y) { q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
        " o = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v) y = MatMul(o, wo) }",
        (4,),
        opset=23,
    ),
    "Attention of rows with shared heads": Case(
        "(float[2,5,6] x, float[6,8] wq, float[6,4] wk, float[6,4] wv, float[8,6] wo)"
        " => (float[n,m,c] y) { q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
        " o = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) y = MatMul(o, wo) }",
        (2,),
        opset=23,
    ),
    # recurrent
    "lstm": Case(
        "(float[4,2,6] x, float[1,32,6] w, float[1,32,8] r, float[1,64] b, float[1,1,8] h0,"
        " float[1,2,8] c0, float[1,24] p, float[8,5] w2) => (float[t,n,c] y) {"
        " s, h, c = LSTM<hidden_size=8>(x, w, r, b, , z, c0, p) q = Squeeze(s, i)"
        " y = MatMul(q, w2) }".replace(", z, c0", ", , c0"),
        (8,),
        integers={"i": [1]},
    ),
    "bidirectional gru": Case(
        "(float[4,2,6] x, float[2,24,6] w, float[2,24,8] r, float[2,48] b, float[16,5] w2)"
        ' => (float[t,n,c] y) { s = GRU<hidden_size=8, direction="bidirectional",'
        " linear_before_reset=1>(x, w, r, b) u = Transpose<perm=[0,2,1,3]>(s) v = Reshape(u, i)"
        " y = MatMul(v, w2) }",
        (8,),
        integers={"i": [0, 0, -1]},
    ),
    "rnn, and what it reads": Case(
        "(float[4,2,6] x, float[6,7] w0, float[1,8,7] w, float[1,8,8] r, float[8,5] w2)"
        " => (float[n,c] y) { a = MatMul(x, w0) k = Relu(a) s, h = RNN<hidden_size=8>(k, w, r)"
        " q = Squeeze(h, i) y = MatMul(q, w2) }",
        (7, 8),
        integers={"i": [0]},
    ),
}


def runs(proto: onnx.ModelProto, level: Level) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    with Session(proto.SerializeToString(), optimizations=level, threads=1) as session:
        feed = {
            port.name: rng.integers(0, 9, sizes_of(port))
            if port.type == "tensor(int64)"
            else rng.normal(size=sizes_of(port)).astype(np.float32)
            for port in session.inputs
        }
        return session.run(feed)


def sizes_of(port: Port) -> list[int]:
    return [size for size in port.shape if isinstance(size, int)]


def gap(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    assert {name: array.shape for name, array in a.items()} == {n: v.shape for n, v in b.items()}
    sizes = {name: max(float(np.abs(array).max()), 1e-6) for name, array in a.items()}
    return max(float(np.abs(a[name] - b[name]).max()) / size for name, size in sizes.items())


def some(group: Group) -> list[int]:
    """Half of the units, no neighbours but the last two."""
    return sorted({*range(0, group.units - 1, 3), group.units - 1})[: max(1, group.units - 1)]


def cut(edit: Editor) -> None:
    for group in groups_of(edit):
        assert remove(edit, group, some(group))


def mute(edit: Editor) -> None:
    for group in groups_of(edit):
        silence(edit, group, some(group))


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_and_their_removal_is_exact(name: str) -> None:
    case = CASES[name]
    proto = case.proto()
    assert tuple(group.units for group in groups_of(Editor(Model.load(proto)))) == case.units
    muted, _ = applied(proto, mute)
    made, edit = applied(proto, cut)
    assert [change.rule for change in edit.changes] == [REMOVE] * len(case.units)
    before = runs(proto, "off")
    for level in ("off", "default"):
        wanted = runs(muted, level)
        assert gap(wanted, runs(made, level)) < 2e-6
        assert gap(wanted, before) > 1e-3  # what is removed is not nothing
    assert sum(np.prod(t.dims) for t in made.graph.initializer) < sum(
        np.prod(t.dims) for t in proto.graph.initializer
    )


# With as many groups as channels in each, others go together than before.
REGROUPED = "channel shuffle"


@pytest.mark.parametrize("name", [name for name in CASES if name != REGROUPED])
def test_what_is_left_is_a_group_with_fewer_units(name: str) -> None:
    made, _ = applied(CASES[name].proto(), cut)
    left = groups_of(Editor(Model.load(made)))
    expected = [g.units - len(some(g)) for g in groups_of(Editor(Model.load(CASES[name].proto())))]
    assert [group.units for group in left] == [count for count in expected if count > 1]


@pytest.mark.parametrize("name", CASES)
def test_values_with_fewer_channels_have_other_names(name: str) -> None:
    proto = CASES[name].proto()
    loaded = Model.load(proto)
    edit = Editor(loaded)
    changed = {value.name for group in groups_of(edit) for value in group.axes}
    cut(edit)
    assert changed
    assert changed.isdisjoint(loaded.graph.values)


# -- what has to stay --------------------------------------------------------------------------

R = "r = Relu(a)"
Y = "=> (float[n,c,h,w] y)"


def with_input(nodes: str, stated: str) -> str:
    """As `between`, with another input."""
    return between(nodes).replace("(float", f"({stated}, float", 1)


HOSTILE = {
    "is an output": Case(between(R).replace(Y, "=> (float[n,c,h,w] y, float[n,k,h,w] r)"), ()),
    "a sum with it is an output": Case(
        between(f"{R} s = Add(r, a)").replace(Y, "=> (float[n,c,h,w] y, float[n,k,h,w] s)"), ()
    ),
    "an input joins": Case(
        between("r = Add(a, x2)").replace("(float", "(float[2,8,6,6] x2, float", 1), ()
    ),
    "an unknown operator reads": Case(
        between(f"{R} s = com.microsoft.Trilu(a)").replace(
            Y, "=> (float[n,c,h,w] y, float[n,k,h,w] s)"
        ),
        (),
    ),
    "an operator without a handler": Case(between("r = LRN<size=3>(a)"), ()),
    "its size is a number": Case(
        between("s = Shape(a) t = Gather(s, i) f = Cast<to=1>(t) r = Div(a, f)"),
        (),
        integers={"i": 1},
    ),
    "its size is an output": Case(
        between(f"{R} s = Shape(a)").replace(Y, "=> (float[n,c,h,w] y, int64[4] s)"), ()
    ),
    "its size is the shape of another": Case(
        between(
            "s = Shape(a) c = ConstantOfShape(s) t = Mul(c, x2) u = ReduceMax(t) r = Add(a, u)"
        ).replace("(float", "(float[2,8,6,6] x2, float", 1),
        (),
    ),
    "a target that is computed": Case(
        between("s = Shape(a) z = Add(i, s) t = Sub(z, i) r = Reshape(a, t)"),
        (),
        integers={"i": [0, 1, 2, 3]},
    ),
    "a literal beside what is computed": Case(
        between(
            "m = Shape(x) n0 = Gather(m, i0) k0 = Mul(n0, i1) n8 = Add(k0, i6)"
            " s = Concat<axis=0>(n0, n8, m1) r = Reshape(a, s) u = Unsqueeze(r, i3)".replace(
                "r = Reshape", "f = Reshape"
            ).replace("u = Unsqueeze(r, i3)", "k = Relu(f) r = Reshape(k, q)")
        ),
        (),
        integers={"i0": [0], "i1": [1], "i6": [6], "m1": [-1], "q": [2, 8, 6, 6]},
    ),
    "over channels: mean": Case(between("m = ReduceMean<axes=[1]>(a) r = Sub(a, m)"), ()),
    "over channels: softmax": Case(between("r = Softmax<axis=1>(a)"), ()),
    "over channels: softmax as it was": Case(between("r = Softmax<axis=1>(a)"), (), opset=11),
    "over channels: maximum": Case(
        between("m = ArgMax<axis=1>(a) f = Cast<to=1>(m) r = Mul(a, f)"), ()
    ),
    "over channels: layer normalisation": Case(
        between("r = LayerNormalization<axis=1>(a, s)", "float[8,6,6] s"), ()
    ),
    "over channels: group normalisation": Case(
        between("r = GroupNormalization<num_groups=4>(a, g, b)", "float[8] g, float[8] b"),
        (),
        opset=21,
    ),
    "over channels: in two groups by reshape, with a scale for each channel of a group": Case(
        between(
            "s = Reshape(a, i) t = LayerNormalization<axis=2>(s, g) r = Reshape(t, j)",
            "float[4,36] g",
        ),
        (2,),
        integers={"i": [2, 2, 4, 36], "j": [2, 8, 6, 6]},
    ),
    "weights read twice": Case(
        f"({X}, {CONV}, float[8,8,3,3] w2) => (float[n,c,h,w] y, float[n,c,h,w] z)"
        f" {{ {FIRST} r = Relu(a) y = Conv(r, w2) b = Conv(x, w1) s = Tanh(b) z = Conv(s, w2) }}",
        (),
    ),
    "read by no weights": Case(
        f"({X}, {CONV}) => (float[n,h,w] y) {{ {FIRST} r = Relu(a)"
        " s = ReduceMax<axes=[1], keepdims=0>(r) y = Neg(s) }",
        (),
    ),
    "given by no weights": Case(
        f"(float[2,8,6,6] x, {LAST}) {Y} {{ r = Relu(x) y = Conv(r, w2) }}", ()
    ),
    "a product of two values": Case(
        "(float[2,3,6] x, float[6,8] w1, float[6,8] w2) => (float[n,m,k] y) { a = MatMul(x, w1)"
        " b = MatMul(x, w2) t = Transpose<perm=[0,2,1]>(b) y = MatMul(a, t) }",
        (),
    ),
    "einsum": Case(
        "(float[3,6] x, float[6,8] w1, float[8,5] w2) => (float[n,c] y)"
        ' { a = MatMul(x, w1) y = Einsum<equation="ij,jk->ik">(a, w2) }',
        (),
    ),
    "a slice with steps": Case(
        between(
            "p = Slice(a, i0, i8, i1, i2) q = Slice(a, i1, i8, i1, i2) r = Concat<axis=1>(q, p)"
        ),
        (),
        integers={"i0": [0], "i1": [1], "i2": [2], "i8": [8]},
    ),
    "one channel by name": Case(
        between("p = Gather<axis=1>(a, i) q = Unsqueeze(p, j) r = Mul(a, q)"),
        (),
        integers={"i": 3, "j": [1]},
    ),
    "channels chosen by data": Case(
        between("k = Gather<axis=1>(a, xi) r = Relu(k)").replace(
            "(float", "(int64[8] xi, float", 1
        ),
        (),
    ),
    "halves chosen by data": Case(
        between("r = Slice(a, xi, huge, i1)").replace("(float", "(int64[1] xi, float", 1),
        (),
        integers={"huge": [2**62], "i1": [1]},
    ),
    "a size copied from channels that go elsewhere": Case(
        between("t = Reshape(a, i) u = Relu(t) r = Reshape(u, j)").replace("6,6] x", "4,4] x"),
        (),
        integers={"i": [16, 0, -1], "j": [2, 8, 4, 4]},
    ),
    "resized by a policy": Case(
        between('r = Resize<keep_aspect_ratio_policy="not_larger">(a, , , s)'),
        (),
        opset=18,
        integers={"s": [2, 8, 12, 12]},
    ),
    "positions become channels": Case(between("s = SpaceToDepth<blocksize=1>(a) r = Relu(s)"), ()),
    "scaled along channels": Case(
        between("r = Resize(a, , s)", "", "float[4,16,1,1] w2").replace(
            "{ ", "{ s = Constant<value_floats=[1.0,2.0,1.0,1.0]>() ", 1
        ),
        (),
    ),
    "training": Case(
        between(
            "r, rm, rv = BatchNormalization<training_mode=1>(a, g, b, m, var)",
            "float[8] g, float[8] b, float[8] m, float[8] var",
        ),
        (),
    ),
    "groups of a depthwise convolution of the input": Case(
        f"(float[2,8,6,6] x, float[8,1,3,3] w1, {LAST}) {Y}"
        " { a = Conv<group=8>(x, w1) y = Conv(a, w2) }",
        (),
    ),
    "sums that an attribute aligns": Case(
        between("r = Add<axis=1, broadcast=1>(a, s)", "float[8] s"), (), opset=6
    ),
    "a mask for each head": Case(
        "(float[2,5,6] x, float[4,5,5] xm, float[6,8] wq, float[6,8] wk, float[6,8] wv,"
        " float[8,6] wo) => (float[n,m,c] y) { q = MatMul(x, wq) k = MatMul(x, wk)"
        " v = MatMul(x, wv) m = Unsqueeze(xm, i)"
        " o = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v, m) y = MatMul(o, wo) }",
        (),
        opset=23,
        integers={"i": [0]},
    ),
    "states from outside": Case(
        "(float[4,2,6] x, float[1,2,8] x2, float[1,8,6] w, float[1,8,8] r, float[8,5] w2)"
        " => (float[n,c] y) { s, h = RNN<hidden_size=8>(x, w, r, , , x2) q = Squeeze(h, i)"
        " y = MatMul(q, w2) }",
        (),
        integers={"i": [0]},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_followed_stays(name: str) -> None:
    case = HOSTILE[name]
    assert tuple(group.units for group in groups_of(Editor(Model.load(case.proto())))) == case.units


PLAIN = CASES["unary"]


def test_what_a_body_reads_stays() -> None:
    text = (
        between(
            "r = Relu(a) c = Cast<to=9>(xc) z = If(c) <then_branch = t () => (float[n,k,h,w] p)"
            " { p = Neg(r) }, else_branch = e () => (float[n,k,h,w] q) { q = Abs(x) }>"
        )
        .replace("(float", "(int64 xc, float", 1)
        .replace(Y, "=> (float[n,c,h,w] y, float[n,k,h,w] z)")
    )
    assert groups_of(Editor(Model.load(Case(text, ()).proto()))) == []
    inner = text.replace("Neg(r)", "Neg(x)")
    assert [g.units for g in groups_of(Editor(Model.load(Case(inner, ()).proto())))] == [8]


def test_weights_that_a_body_reads_stay() -> None:
    text = (
        between(
            "r = Relu(a) c = Cast<to=9>(xc) z = If(c) <then_branch = t () => (float[n,k,h,w] p)"
            " { p = Neg(w2) }, else_branch = e () => (float[n,k,h,w] q) { q = Abs(x) }>"
        )
        .replace("(float", "(int64 xc, float", 1)
        .replace(Y, "=> (float[n,c,h,w] y, float[n,k,h,w] z)")
    )
    assert groups_of(Editor(Model.load(Case(text, ()).proto()))) == []


@pytest.mark.parametrize("name", ["a", "r", "w1", "w2"])
def test_pinned_values_stay(name: str) -> None:
    loaded = Model.load(PLAIN.proto())
    loaded.graph.pinned.add(loaded.graph.values[name])
    assert groups_of(Editor(loaded)) == []


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_weights_that_a_caller_may_replace_stay(name: str) -> None:
    proto = PLAIN.proto()
    (weights,) = (t for t in proto.graph.initializer if t.name == name)
    info = onnx.helper.make_tensor_value_info(name, weights.data_type, weights.dims)
    proto.graph.input.append(info)
    assert groups_of(Editor(Model.load(proto))) == []


def test_weights_of_integers_and_sparse_ones_stay() -> None:
    proto = PLAIN.proto()
    (weights,) = (t for t in proto.graph.initializer if t.name == "w2")
    values = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights).reshape(-1), "w2")
    indices = onnx.numpy_helper.from_array(np.arange(32, dtype=np.int64), "")
    proto.graph.initializer.remove(weights)
    proto.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(values, indices, list(weights.dims))
    )
    assert groups_of(Editor(Model.load(proto))) == []


# -- removal -----------------------------------------------------------------------------------


def test_vectors_are_shared_by_none_and_matrices_by_all_that_read_them() -> None:
    text = (
        f"({X}, float[8,3,1,1] w1, float[8] b1, float[4,8,1,1] w2, float[5,8,1,1] w3)"
        " => (float[n,c,h,w] y, float[n,c,h,w] z)"
        " { a = Conv(x, w1, b1) r = Relu(a) y = Conv(r, w2)"
        " s = Tanh(x) c = Conv(s, w1, b1) z = Conv(c, w3) }"
    )
    proto = Case(text, ()).proto()
    (group,) = groups_of(Editor(Model.load(proto)))  # of w1, which both must go on sharing
    assert group.units == 8
    made, _ = applied(proto, cut)
    assert gap(runs(applied(proto, mute)[0], "off"), runs(made, "off")) < 2e-6
    apart = text.replace("c = Conv(s, w1, b1)", "c = Conv(s, w4, b1)")
    apart = apart.replace("float[8] b1", "float[8] b1, float[8,3,1,1] w4")
    proto = Case(apart, ()).proto()
    assert [g.units for g in groups_of(Editor(Model.load(proto)))] == [8, 8]

    def first(edit: Editor) -> None:
        assert remove(edit, groups_of(edit)[0], [1, 2])

    made, _ = applied(proto, first)
    assert sorted(list(t.dims) for t in made.graph.initializer if len(t.dims) == 1) == [[6], [8]]


def test_groups_stay_good_while_others_are_cut_in_any_order() -> None:
    proto = CASES["squeeze and excite"].proto()

    def backwards(edit: Editor) -> None:
        for group in reversed(groups_of(edit)):
            assert remove(edit, group, some(group))

    def anew(edit: Editor) -> None:
        for number in range(len(groups_of(edit))):
            group = groups_of(edit)[number]
            assert remove(edit, group, some(group))

    found = [runs(applied(proto, how)[0], "off") for how in (cut, backwards)]
    assert gap(found[0], found[1]) == 0.0
    proto = CASES["transposed"].proto()
    found = [runs(applied(proto, how)[0], "off") for how in (cut, backwards, anew)]
    assert gap(found[0], found[1]) == gap(found[0], found[2]) == 0.0


def test_what_is_refit_first_can_be_cut_afterwards() -> None:
    proto = CASES["measured channels"].proto()

    def both(edit: Editor) -> None:
        for group in groups_of(edit):
            silence(edit, group, some(group))
            assert remove(edit, group, some(group))

    assert gap(runs(applied(proto, mute)[0], "off"), runs(applied(proto, both)[0], "off")) < 2e-6


@pytest.mark.parametrize("units", [[], [8], [-1], range(8)])
def test_units_that_are_not_there_and_all_at_once_are_refused(units: Any) -> None:
    edit = Editor(Model.load(PLAIN.proto()))
    (group,) = groups_of(edit)
    with pytest.raises(ValueError, match="cannot go"):
        remove(edit, group, units)
    assert edit.mark() == (0, 0)


def test_no_tensor_is_left_without_channels() -> None:
    edit = Editor(Model.load(CASES["concat"].proto()))
    (group,) = groups_of(edit)
    assert not remove(edit, group, range(8))  # all of the first convolution
    assert not remove(edit, group, range(8, 13))
    assert edit.mark() == (0, 0)
    assert remove(edit, group, range(1, 12))


def test_a_change_that_is_denied_is_not_made() -> None:
    loaded = Model.load(PLAIN.proto())
    edit = Editor(loaded, [(REMOVE, "a")])
    (group,) = groups_of(edit)
    assert group.root == "a"
    assert not remove(edit, group, [1])
    assert edit.mark() == (0, 0)
    edit = Editor(loaded, fuel=0)
    assert not remove(edit, groups_of(edit)[0], [1])


def test_the_type_of_weights_is_kept() -> None:
    proto = PLAIN.proto()
    for tensor in proto.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    made, _ = applied(proto, cut)
    assert {t.data_type for t in made.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_a_group_says_what_shares_it() -> None:
    edit = Editor(Model.load(CASES["squeeze and excite"].proto()))
    first, second = groups_of(edit)
    assert first.text(3) == (
        "remove 3 of 8 channels of Conv 'a' because Mul 'r', Conv 'q' (reads), Conv 'y' (reads)"
        " share them"
    )
    assert str(second) == "remove 1 of 2 channels of Conv 'q' because Conv 'g' (reads) shares them"
    read = [(slot.value.name, slot.axis, slot.read and slot.read.name) for slot in first.readers]
    assert read == [("w3", 1, "p"), ("w2", 1, "r")]
    assert [(slot.value.name, slot.axis) for slot in first.givers] == [
        ("w1", 0), ("b1", 0), ("w4", 0),
    ]  # fmt: skip


def test_the_worth_of_a_unit_is_what_its_removal_saves() -> None:
    for name in ("unary", "depthwise", "attention", "flatten", "squeeze and excite", "concat"):
        proto = CASES[name].proto()
        shapes = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        known: dict[str, tuple[int, ...]] = {
            info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
            for info in (*shapes.graph.value_info, *shapes.graph.input)
        }
        known["y"] = runs(proto, "off")["y"].shape
        total = counted(proto)
        edit = Editor(Model.load(proto))
        for number, group in enumerate(groups_of(edit)):

            def one(edit: Editor, number: int = number) -> None:
                assert remove(edit, groups_of(edit)[number], [0])

            saved = total - counted(applied(proto, one)[0])
            worth = costs(edit, group, known)
            if name != "concat":  # whose units are worth differently
                assert worth == pytest.approx(saved, rel=0.02), name
            assert worth > 0


def counted(proto: onnx.ModelProto) -> int:
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    return macs.count(proto, {"x": tuple(dim.dim_value for dim in dims)}).total


# -- models ------------------------------------------------------------------------------------

FEW = {
    "mlp": (2, 2),
    "cnn": (7, 7),
    "gru": (0, 1),  # its weights are put together by the graph, until they are folded
    "vit": (6, 6),
    "ppocr_cls_v2": (26, 25),
    "mobilenetv3_large_ts": (30, 30),
    "efficientnet_b0_dynamo": (40, 40),
    "vit_small_dynamo": (24, 24),
    "distilbert_ts": (7, 13),
}


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("name", FEW)
def test_units_of_every_group_of_a_model_can_go(name: str, level: int) -> None:
    path = prune_groups.path_of(name)
    feeds = prune_groups.Feeds(path)
    for share in (0.0, 0.3):
        row = prune_groups.measure(name, path, level, feeds, share)
        assert row.groups == row.removed == FEW[name][level // 2]
        assert row.problem == ""
    assert row.effect > 100 * row.error or not row.groups


# -- random graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_units_of_random_graphs_can_go_in_any_order(start: int) -> None:
    for seed in range(start, start + 20):
        proto = Chain(seed).model(3 + seed % 12)
        random = np.random.default_rng(seed)
        edits = [Editor(Model.load(proto)) for _ in range(2)]
        muted, found = (groups_of(edit) for edit in edits)
        interface, printed = verify.Interface.of(edits[1].model), fingerprint(edits[1].model)
        for number in random.permutation(len(found)):
            count = int(random.integers(1, found[number].units))
            units = sorted(random.choice(found[number].units, count, replace=False).tolist())
            if remove(edits[1], found[number], units):
                silence(edits[0], muted[number], units)
        edits[1].settle()
        assert verify.problems(edits[1].model, interface) == []
        wanted, made = (runs(exporter.to_proto(edit.model), "off") for edit in edits)
        assert gap(wanted, made) < 1e-4, seed
        edits[1].undo_to((0, 0))
        assert fingerprint(edits[1].model) == printed
