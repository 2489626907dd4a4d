"""Forms that rules state because onnxruntime fuses just these: it still does."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from graphopt.runtime import Session
from tests import goldens, graphs

_CONSTANTS = """float one = {1}, float half = {0.5}, float two = {2}, float three = {3},
    float root = {1.4142135}, float inverse = {0.70710678}, float share = {0.044715},
    float bend = {0.7978846}"""
_TANH = "  s = Add (x, q)  a = Mul (s, bend)  e = Tanh (a)  g = Add (e, one)  "
_CUBES = {
    "power": "p = Pow (x, three)  q = Mul (p, share)",
    "products": "o = Mul (x, x)  p = Mul (o, x)  q = Mul (p, share)",
    "weighted": "o = Mul (x, share)  p = Mul (x, o)  q = Mul (x, p)",
}
_HALVES = {
    "after": "h = Mul (x, g)  y = Mul (h, half)",
    "divided": "h = Mul (x, g)  y = Div (h, two)",
    "before": "h = Mul (x, half)  y = Mul (h, g)",
    "of the gate": "h = Mul (g, half)  y = Mul (x, h)",
}


def executed(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that onnxruntime runs."""
    target = folder / "optimized.onnx"
    Session(model.SerializeToString(), optimized_model=target).close()
    return [node.op_type for node in onnx.load(target).graph.node]


def between_sines(nodes: str) -> onnx.ModelProto:
    """FastGelu is not fused where it would compute an output of the graph."""
    return graphs.parsed(
        f"""<ir_version: 8, opset_import: ["": 15]> g (float[n, 8] z) => (float[n, 8] out)
        <{_CONSTANTS}> {{ x = Sin (z)  {nodes}  out = Sin (y) }}"""
    )


@pytest.mark.parametrize("half", list(_HALVES))
@pytest.mark.parametrize("scaled", ["Div (x, root)", "Mul (x, inverse)"])
def test_gelu(half: str, scaled: str, tmp_path: Path) -> None:
    made, _ = goldens.run(
        between_sines(f"a = {scaled}  e = Erf (a)  g = Add (e, one)  {_HALVES[half]}"), "fuse"
    )
    assert executed(made, tmp_path) == ["Sin", "Gelu", "Sin"]


@pytest.mark.parametrize("half", ["after", "before", "of the gate"])
@pytest.mark.parametrize("cube", list(_CUBES))
def test_gelu_by_tanh(half: str, cube: str, tmp_path: Path) -> None:
    made, _ = goldens.run(between_sines(_CUBES[cube] + _TANH + _HALVES[half]), "fuse")
    assert executed(made, tmp_path) == ["Sin", "FastGelu", "Sin"]


@pytest.mark.parametrize("opset", [15, 17])
def test_sums_before_layer_norms_are_not_part_of_them(opset: int, tmp_path: Path) -> None:
    parts = """m = ReduceMean <axes = [-1]> (t)  d = Sub (t, m)  q = Pow (d, two)
    v = ReduceMean <axes = [-1]> (q)  e = Add (v, eps)  s = Sqrt (e)  n = Div (d, s)
    g = Mul (n, gamma)  l = Add (g, beta)"""
    norm = parts if opset < 17 else "l = LayerNormalization <axis = -1> (t, gamma, beta)"
    original = graphs.parsed(
        f"""<ir_version: 8, opset_import: ["": {opset}]> g (float[n, 3, 2] x) => (float[n, 3, 2] y)
        <float[2] gamma = {{1, 2}}, float[2] beta = {{3, 4}}, float two = {{2}},
        float eps = {{0.1}}>
        {{ r = Sin (x)  t = Add (r, x)  {norm}  y = Sin (l) }}"""
    )
    made, _ = goldens.run(original, "fuse")
    assert executed(original, tmp_path) == ["Sin", "SkipLayerNormalization", "Sin"]
    assert executed(made, tmp_path) == ["Sin", "Sum", "LayerNormalization", "Sin"]
