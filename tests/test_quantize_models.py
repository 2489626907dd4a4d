"""Whatever model it is, and whatever is chosen: it stays sound, and its weights run on integers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest

from graphopt.api import optimize
from graphopt.edit import Editor
from graphopt.errors import RuntimeFailure, UnprovenError
from graphopt.ir import Model
from graphopt.manager import parse_pipeline, run_pipeline
from graphopt.passes.pipelines import PASSES
from graphopt.passes.quantize.units import Unit, Units
from graphopt.proposals import propose
from graphopt.runtime import Session
from graphopt.targets import OPSETS
from models import digits, fetch
from tests.graphs import exported, onnx_cases
from tests.quantized import Choose, Static, everything, make_static, run

# Kernels that compute with weights; products of two activations run on the last two as well.
_KERNELS: Final = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
_SHARES: Final = (1.0, 0.85, 0.5, 0.15)  # of the units, that are chosen by chance


def some(share: float) -> Choose:
    def choose(units: list[Unit]) -> list[Unit]:
        rng = random.Random(round(share * 100))
        return [unit for unit in units if rng.random() < share]

    return everything if share == 1 else choose


def feeds_of(proto: onnx.ModelProto, count: int = 2) -> list[dict[str, Any]]:
    """Proposed feeds; none where onnxruntime does not run the model."""
    content = proto.SerializeToString()
    with Session(content, optimizations="off", threads=1) as session:
        return [f for _, f in itertools.islice(propose(Model.load(proto), session, seed=0), count)]


def check(before: onnx.ModelProto, share: float, feeds: list[dict[str, Any]]) -> Static:
    """Sound, of the same interface (`make_static` sees to that), run, and nothing left behind."""
    static = make_static(before, feeds, choose=some(share), method="mse", checked=False)
    if _is_valid(before):
        onnx.checker.check_model(static.after, full_check=True)
    held = {tensor.name: tensor for tensor in static.executed.graph.initializer}
    int8 = onnx.TensorProto.INT8
    assert [name for name in static.dequantized if held[name].data_type == int8] == []
    heavy = sum(unit.weights is not None for unit in static.units)
    assert sum(static.counts[kernel] for kernel in _KERNELS) >= heavy
    exact = run(before, "off", feeds[0])
    found = run(static.after, "default", feeds[0])
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        assert found[name].shape == expected.shape
        assert found[name].dtype == expected.dtype
    return static


def _is_valid(proto: onnx.ModelProto) -> bool:
    """False for the few models of which the checker says the declared shapes are wrong."""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@pytest.mark.parametrize("share", _SHARES)
@pytest.mark.parametrize("name", digits.FLOORS)
def test_digits(name: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / "lossless.onnx"
    optimize(digits.path(name), file, opset=17, validate=False)
    before = onnx.load(file)
    feeds = feeds_of(before)
    static = check(before, share, feeds)
    if share == 1:
        assert set(static.chosen) == set(static.found)
    for output, exact in run(before, "off", feeds[0]).items():
        off, default = (run(static.after, level, feeds[0])[output] for level in ("off", "default"))
        signal = np.square(exact).mean()
        assert np.square(off - exact).mean() < signal / 100
        assert np.square(default - off).mean() < signal / 10_000


def _with_units() -> list[str]:
    """Every tenth of the node cases whose name promises units, and all models of layers."""
    words = (
        "conv",
        "gemm",
        "matmul",
        "attention",
        "concat",
        "maxpool",
        "split",
        "swish",
        "sigmoid",
    )
    nodes = [c.name for c in onnx_cases() if c.kind == "node" and any(w in c.name for w in words)]
    layers = [c.name for c in onnx_cases() if c.kind in ("pytorch-converted", "pytorch-operator")]
    kept = [name for name in layers if any(w in name.lower() for w in ("conv", "linear", "mm"))]
    return list(dict.fromkeys([*nodes[::10], *kept]))


@pytest.mark.parametrize("name", _with_units())
def test_cases_of_onnx(name: str) -> None:
    before = next(case for case in onnx_cases() if case.name == name).proto()
    opset = next((e.version for e in before.opset_import if not e.domain), 1)
    if opset not in OPSETS:
        target = 17 if opset < OPSETS.start else opset
        loaded = Model.load(before)
        run_pipeline(loaded, parse_pipeline(f"convert-opset{{opset={target}}}", PASSES))
        before = exported(loaded)
    units = Units(Editor(Model.load(before))).all
    if not units:
        return
    try:
        feeds = feeds_of(before)
    except (RuntimeFailure, UnprovenError):
        return  # onnxruntime does not run it on anything that can be proposed
    for share in _SHARES[::2]:
        check(before, share, feeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", fetch.names())
def test_real_models(name: str, tmp_path: Path) -> None:
    try:
        source = fetch.fetch(name)
    except fetch.UnreachableError as error:
        pytest.skip(f"NOT TESTED, {name} cannot be fetched: {error}")
    file = tmp_path / "lossless.onnx"
    stated = Model.load(source).opsets.get("", 1)
    optimize(source, file, opset=None if stated in OPSETS else 17, validate=False)
    before = onnx.load(file)
    if not Units(Editor(Model.load(before))).all:
        return
    feeds = feeds_of(before, 1)
    for share in _SHARES:
        check(before, share, feeds)
