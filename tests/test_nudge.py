"""Feeds and weights that are the same to anybody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from graphopt import nudge
from tests import graphs


def places(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many units in the last place lie between floats of one sign."""
    kinds = {"float32": np.int32, "float16": np.int16, "float64": np.int64}
    kind = kinds[a.dtype.name]
    return np.abs(a.view(kind).astype(np.int64) - b.view(kind).astype(np.int64))


def test_floats_of_a_feed_move_by_one_place_and_nothing_else_does() -> None:
    rng = np.random.default_rng(0)
    feed = {
        "x": rng.normal(size=100).astype(np.float32),
        "odd": np.array([0.0, np.inf, -np.inf, np.nan], np.float32),
        "n": np.arange(5),
        "s": ["text"],
    }
    found = nudge.nudged(feed, 1)
    assert (places(feed["x"], found["x"]) == 1).all()
    assert 20 < (found["x"] > feed["x"]).sum() < 80
    np.testing.assert_array_equal(found["odd"], feed["odd"])
    assert found["n"] is feed["n"]
    assert found["s"] is feed["s"]


def test_parameters_of_a_copy_move_and_settings_do_not(tmp_path: Path) -> None:
    proto = graphs.parsed(
        """g (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <float[2,2,1,1] w = {1, 2, 3, 0}, float[2] b = {0.1, 0.2}, float[1,2,1,1] k = {3, 4},
        float half = {0.5}, float[4] scales = {1, 1, 2, 2}, int64[1] at = {1}>
        { c = Conv (x, w, b)  m = Mul (c, k)  h = Mul (m, half)
        r = Resize <mode = "nearest"> (h, , scales)  y = MaxPool <kernel_shape = [2, 2],
        strides = [2, 2]> (r)  u = Unsqueeze (y, at) }"""
    )
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(proto, source)
    nudge.write_nudged(source, target)
    before, after = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (source, target)
    )
    for name in ("w", "b", "k"):
        expected = (before[name] != 0).astype(np.int64)
        np.testing.assert_array_equal(places(before[name], after[name]), expected)
    for name in ("half", "scales", "at"):
        np.testing.assert_array_equal(before[name], after[name])
    nudge.write_nudged(source, other := tmp_path / "c.onnx", seed=1)
    assert other.read_bytes() != target.read_bytes()
