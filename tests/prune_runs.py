"""Models for tests of pruning: graphs in text with random weights, their feeds, decided timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from graphopt import exporter, search
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.runtime import Session
from graphopt.timing import PairedTiming, Ratio, Timing

Array = NDArray[Any]
DIGITS = Path(__file__).resolve().parent.parent / "models" / "digits"
DATA = f"{__file__}:feeds"
FEEDS = 5

# All that can be fitted: convolutions with and without bias, grouped and depthwise, both products.
NET = (
    "(float[n,3,8,8] x, float[8,3,3,3] w1, float[8,4,3,3] w2, float[8] b2, float[8,1,3,3] w3,"
    " float[8,12] w4, float[10,12] w5, float[12,10] w6, float[10] b6) => (float[n,10] y) {"
    " c1 = Conv<pads=[1,1,1,1]>(x, w1) r1 = Relu(c1)"
    " c2 = Conv<group=2,strides=[2,2],pads=[1,1,1,1]>(r1, w2, b2) r2 = Relu(c2)"
    ' c3 = Conv<group=8,auto_pad="VALID">(r2, w3) r3 = Relu(c3)'
    " p = GlobalAveragePool(r3) f = Flatten(p)"
    " g4 = Gemm(f, w4) r4 = Relu(g4) g5 = Gemm<transB=1>(r4, w5) s = Tanh(g5)"
    " q = Gemm<transB=1>(s, w6) m = MatMul(q, w5t) y = Add(m, b6) }"
).replace("float[12,10] w6", "float[12,10] w6, float[12,10] w5t")


def weighted(text: str, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """A graph in text with random weights: all its inputs but x, x2, ... and c."""
    header = f'<ir_version: 9, opset_import: ["" : {opset}]>'
    made = onnx.parser.parse_model(f"{header} g {text}")
    for info in list(made.graph.input):
        if info.name.startswith("x") or info.name == "c":
            continue
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        fan = np.prod(shape[1:]) if len(shape) != 2 else shape[0]
        array = np.random.default_rng([seed, *info.name.encode()]).standard_normal(shape)
        if len(shape) > 1:
            array *= np.sqrt(2 / fan)
        tensor = onnx.numpy_helper.from_array(array.astype(np.float32), info.name)
        made.graph.initializer.append(tensor)
        made.graph.input.remove(info)
    return made


def correlated(shape: Sequence[int], count: int = 6, seed: int = 0) -> list[dict[str, Array]]:
    """Feeds "x" whose features few directions make up, so that weights can stand for others."""
    size = int(np.prod(shape[1:]))
    few = max(2, size // 8)
    mixing = np.random.default_rng(7).standard_normal((few, size)) / few**0.5
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        x = rng.standard_normal((shape[0], len(mixing))) @ mixing
        x += 0.1 * rng.standard_normal(x.shape)
        found.append({"x": x.reshape(shape).astype(np.float32)})
    return found


def pair(proto: onnx.ModelProto) -> tuple[Model, Editor]:
    """The dense model, and an editor of a copy of it."""
    return Model.load(proto), Editor(Model.load(proto))


def weights(source: Editor | Model) -> dict[str, Array]:
    """Initializers of the main graph, by name; sparse ones made dense."""
    model = source.model if isinstance(source, Editor) else source
    found = {}
    for value in model.graph.initializers:
        assert value.weight is not None
        found[value.name] = np.array(value.weight.values)
    return found


def output_error(source: Editor | Model, proto: onnx.ModelProto, feeds: Any) -> float:
    """Mean square of what the first output differs by, relative to its variance."""
    model = source.model if isinstance(source, Editor) else source
    with (
        Session(exporter.to_proto(model).SerializeToString(), threads=1) as found,
        Session(proto.SerializeToString(), threads=1) as whole,
    ):
        a, b = (
            np.concatenate([next(iter(s.run(feed).values())) for feed in feeds])
            for s in (found, whole)
        )
    return float(np.mean(np.square(a - b)) / b.var())


def feeds() -> Iterator[dict[str, Any]]:
    """Digits to calibrate on, some at a time."""
    with np.load(DIGITS / "calibration.npz") as data:
        for start in range(0, FEEDS * 16, 16):
            yield {"image": data["image"][start : start + 16]}


def timed(ratio: float) -> Callable[..., PairedTiming]:
    """What stands for `time_paired`: candidates are this much faster, the first of them most."""

    def time_paired(models: Sequence[Path | bytes], feed: Any, **_: Any) -> PairedTiming:
        found = [1.0, *(ratio - 0.01 * place for place in range(len(models) - 1))]
        if Path(str(models[-1])).parent.name not in ("prune", "int8"):
            found[-1] = 0.8  # the original comes last
        ratios = tuple(Ratio(each, 0.99 * each, 1.01 * each) for each in found)
        times = tuple(Timing(1 / each, 0.9 / each, 1.1 / each) for each in found)
        return PairedTiming(times, ratios, 8, 100)

    return time_paired


def decide(monkeypatch: Any, ratio: float) -> None:
    """Let every candidate be `ratio` times as fast as the lossless model."""
    monkeypatch.setattr(search, "time_paired", timed(ratio))
