"""Where attention in parts becomes one operator, and where onnxruntime would tell them apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from graphopt.errors import RuntimeFailure
from graphopt.runtime import Session
from tests import goldens, graphs

_LOWEST = float(np.finfo(np.float32).min)
_CLEANED = "simplify-shapes, canonicalize, fuse"


def model(width: str, before: str = "", mask: bool = False) -> onnx.ModelProto:
    """Attention of x with itself, which some nodes `before` compute from z."""
    added = "s = Add (p, mask)" if mask else "s = Identity (p)"
    given = ", float[5,5] mask" if mask else ""
    return graphs.parsed(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float{width} z{given}) => (float[?,?,?,?] y)
        <int64[3] free = {{0, 15, -1}}, int64[4] heads = {{0, 3, 5, 4}}>
        {{
          {before or "x = Identity (z)"}
          t = Transpose <perm = [0, 1, 3, 2]> (x)
          p = MatMul (x, t)
          {added}
          w = Softmax <axis = -1> (s)
          y = MatMul (w, x)
        }}"""
    )


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def run(proto: onnx.ModelProto, level: Any = "off", **feed: NDArray[Any]) -> NDArray[Any]:
    with Session(proto.SerializeToString(), optimizations=level, threads=1) as session:
        found: NDArray[Any] = session.run(feed)["y"]
        return found


# -- what may be empty -----------------------------------------------------------------------------


def test_what_is_never_empty() -> None:
    made, told = goldens.run(model("[2,3,5,4]"), _CLEANED)
    assert operators(made) == ["Attention"]
    assert told[-1] == "fuse-attention y"


def test_nothing_that_may_be_empty() -> None:
    before = model("[n,3,5,4]")
    made, _ = goldens.run(before, _CLEANED)
    assert "Attention" not in operators(made)
    nothing = np.zeros((0, 3, 5, 4), np.float32)
    assert run(made, z=nothing).shape == run(before, z=nothing).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("axis", range(4))
def test_no_axis_that_may_be_empty(axis: int) -> None:
    sizes = ["2", "3", "5", "4"]
    sizes[axis] = "n"
    made, _ = goldens.run(model(f"[{','.join(sizes)}]"), _CLEANED)
    assert "Attention" not in operators(made)


def test_what_the_original_refuses_to_take_empty() -> None:
    """A free size beside the batch: where that is zero, the Reshape fails."""
    before = model("[n,60]", "r = Reshape (z, free)  x = Reshape (r, heads)")
    made, _ = goldens.run(before, _CLEANED)
    assert operators(made).count("Attention") == 1
    z = np.random.default_rng(0).normal(size=(2, 60)).astype(np.float32)
    np.testing.assert_allclose(run(made, z=z), run(before, z=z), rtol=1e-5, atol=1e-5)
    for proto in (before, made):
        with pytest.raises(RuntimeFailure):
            run(proto, z=np.zeros((0, 60), np.float32))


def test_what_is_proven_lasts_through_other_names() -> None:
    """Proofs of sizes speak of them by names, which change as more is known."""
    head = "r = Reshape (z, free)  u = Reshape (r, heads)  x = Relu (u)"
    made, _ = goldens.run(model("[n,60]", head), f"{_CLEANED}, canonicalize, {_CLEANED}")
    assert operators(made).count("Attention") == 1


def test_a_dead_reshape_proves_nothing() -> None:
    before = model("[n,3,5,4]", "dead = Reshape (z, free)  x = Identity (z)")
    made, _ = goldens.run(before, _CLEANED)
    assert "Attention" not in operators(made)


@pytest.mark.parametrize("axis", range(4))
def test_onnxruntime_takes_nothing_empty(axis: int) -> None:
    """The reason for the guard; a runtime that does makes it needless."""
    shape = [2, 3, 5, 4]
    shape[axis] = 0
    whole = _attention()
    with pytest.raises(RuntimeFailure, match="must be greater than 0"):
        run(whole, z=np.zeros(shape, np.float32))


# -- rows that are masked altogether ---------------------------------------------------------------


@pytest.mark.parametrize("level", ["off", "default"])
@pytest.mark.parametrize("masked", [-np.inf, _LOWEST, _LOWEST / 2, -1e4])
def test_onnxruntime_on_a_masked_row(level: str, masked: float) -> None:
    """The operator gives zeros where the scores are all the lowest number or -inf; see the rule."""
    mask = np.zeros((5, 5), np.float32)
    mask[2] = masked
    z = np.random.default_rng(1).normal(size=(1, 3, 5, 4)).astype(np.float32)
    parts = run(model("[n,3,5,4]", mask=True), level, z=z, mask=mask)
    whole = run(_attention(mask=True), level, z=z, mask=mask)
    is_masked = masked <= _LOWEST
    assert (whole[:, :, 2] == 0).all() == is_masked
    assert np.isnan(parts[:, :, 2]).all() == (masked == -np.inf)
    kept = [row for row in range(5) if row != 2 or not is_masked]
    np.testing.assert_allclose(whole[:, :, kept], parts[:, :, kept], rtol=1e-5, atol=1e-6)


def test_no_mask_that_comes_at_run_time() -> None:
    made, _ = goldens.run(model("[2,3,5,4]", mask=True), _CLEANED)
    assert "Attention" not in operators(made)


def _attention(mask: bool = False) -> onnx.ModelProto:
    given, read = (", float[5,5] mask", ", mask") if mask else ("", "")
    return graphs.parsed(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[?,?,?,?] z{given}) => (float[?,?,?,?] y)
        {{ y = Attention <scale = 1.0> (z, z, z{read}) }}"""
    )
