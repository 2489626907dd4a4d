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
