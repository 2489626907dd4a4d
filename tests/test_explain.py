"""`graphopt explain` and the rules in `graphopt passes`: what they say, on graphs made for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.errors import UsageError
from graphopt.explain import Explanation, Miss, explain
from graphopt.passes.rules import all_rules
from tests import graphs

LAYER_NORM = """
   mean = ReduceMean <axes = [-1], keepdims = 1, @> (x)
   d = Sub (x, mean)
   square = Pow (d, two)
   variance = ReduceMean <axes = [-1], keepdims = 1> (square)
   shifted = Add (variance, eps)
   std = Sqrt (shifted)
   normed = Div (d, std)
   scaled = Mul (normed, gamma)
   y = Add (scaled, beta)
"""
RULE = "fuse-layer-norm"


def layer_norm(
    folder: Path, old: str = "", new: str = "", outputs: str = "", header: str = ""
) -> Path:
    """A layer normalisation in parts, with one thing changed."""
    assert old in LAYER_NORM
    body = LAYER_NORM.replace(", @", "").replace(old, new) if old else LAYER_NORM.replace(", @", "")
    proto = graphs.parsed(
        f"""{header}
        g (float[2, 5, 8] x, float[8] fed) => (float[2, 5, 8] y{outputs})
        <float two = {{2}}, float eps = {{0.00001}}, float half = {{0.5}}>
        {{{body}}}
        """
    )
    for name in ("gamma", "beta"):
        values = np.linspace(1, 2, 8, dtype=np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(proto)
    return graphs.save(proto, folder / "model.onnx")


def miss_of(path: Path, rule: str = RULE, node: str = "y") -> Miss:
    (record,) = explain(path, rule, node).rules
    assert not record.fired
    (miss,) = record.misses
    return miss


def invoke(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_fired(tmp_path: Path) -> None:
    found = explain(layer_norm(tmp_path), RULE)
    (record,) = found.rules
    (firing,) = record.fired
    assert firing.root == "y"
    assert "Sqrt (shifted)" in firing.before
    assert firing.after.startswith("y = LayerNormalization")
    assert (record.applies, record.opsets, found.opset, found.level) == (True, "17 on", 17, 2)
    assert record.rejected == []


def test_node_that_is_gone(tmp_path: Path) -> None:
    path = layer_norm(tmp_path)
    assert explain(path, node="std").gone == f"{RULE} rewrote it, at 'y'"
    assert explain(path, node="y").gone == ""


def test_rejected(tmp_path: Path) -> None:
    path = layer_norm(tmp_path, "Add (scaled, beta)", "Add (scaled, half)")
    (record,) = explain(path, RULE).rules
    (rejection,) = record.rejected
    assert (rejection.node, rejection.reason) == ("Add 'y'", "affine is not per-feature")
    assert "Add 'y'" not in [miss.node for miss in record.misses]  # it is told already


@pytest.mark.parametrize(
    ("old", "new", "wanted", "found", "depth"),
    [
        ("Sqrt (shifted)", "Exp (shifted)", "Sqrt", "Exp 'std'", 3),
        ("Pow (d, two)", "Pow (d, half)", "the constant 2", "the constant 0.5 ('half')", 7),
        (
            "axes = [-1], keepdims = 1> (square)",
            "axes = [1], keepdims = 1> (square)",
            "ReduceMean with axes = [-1]",
            "ReduceMean 'variance' with axes = [1]",
            5,
        ),
        ("Sub (x, mean)", "Sub (fed, mean)", "x again: the input 'fed'", "the input 'x'", 5),
    ],
)
def test_first_thing_that_does_not_fit(
    tmp_path: Path, old: str, new: str, wanted: str, found: str, depth: int
) -> None:
    miss = miss_of(layer_norm(tmp_path, old, new))
    assert (miss.node, miss.fits[0]) == ("Add 'y'", "Add 'y'")
    assert wanted in miss.wanted
    assert miss.found == found
    assert len(miss.fits) >= depth


def test_value_that_is_no_constant(tmp_path: Path) -> None:
    proto = graphs.parsed(
        """g (float[2, 3] x, float[3, 4] w, float[4] fed) => (float[2, 4] y)
        <float[4] c = {1, 2, 3, 4}>
        { product = Gemm (x, w, c)
          y = BatchNormalization (product, c, c, c, c) }"""
    )
    miss = miss_of(graphs.save(proto, tmp_path / "model.onnx"), "fuse-gemm-batchnorm")
    assert (miss.wanted, miss.found) == ("a constant for w", "the input 'w'")
    assert miss.fits == ["BatchNormalization 'y'", "Gemm 'product'"]


def test_other_use_of_an_interior_value(tmp_path: Path) -> None:
    body = "y = Add (scaled, beta)"
    path = layer_norm(tmp_path, body, f"{body}\n   z = Neg (variance)", ", float[2, 5, 1] z")
    miss = miss_of(path)
    assert miss.wanted == "a value inside that nothing else needs"
    assert miss.found == "'variance', which Neg 'z' reads as well"


def test_interior_value_that_is_an_output(tmp_path: Path) -> None:
    path = layer_norm(tmp_path, outputs=", float[2, 5, 1] std")
    assert miss_of(path).found == "'std', an output of the graph"


def test_closest_first(tmp_path: Path) -> None:
    """Of several nodes the one that fits furthest leads, and mere roots are not listed."""
    path = layer_norm(tmp_path, "Sqrt (shifted)", "Exp (shifted)")
    (record,) = explain(path, RULE).rules
    assert [miss.node for miss in record.misses] == ["Add 'y'"]


def test_rule_for_other_opsets(tmp_path: Path) -> None:
    path = layer_norm(tmp_path, header='<ir_version: 8, opset_import: ["": 16]>')
    (record,) = explain(path, RULE).rules
    assert (record.applies, record.fired, record.misses) == (False, [], [])
    assert "the rule is for opset 17 on" in invoke("explain", path, "--rule", RULE)


def test_unknown_names(tmp_path: Path) -> None:
    path = layer_norm(tmp_path)
    with pytest.raises(UsageError, match="--rule: there is no rule 'nope'; 'graphopt passes'"):
        explain(path, "nope")
    with pytest.raises(UsageError, match="--node: no node is called 'nope', or computes it"):
        explain(path, node="nope")


def test_every_rule_is_accounted_for(tmp_path: Path) -> None:
    found = explain(layer_norm(tmp_path))
    assert [record.name for record in found.rules] == list(all_rules())
    assert all(record.misses == [] for record in found.rules)  # only where few are asked for


def test_overview(tmp_path: Path) -> None:
    path = layer_norm(tmp_path, "Add (scaled, beta)", "Add (scaled, half)")
    shown = invoke("explain", path)
    assert RULE in shown
    assert "affine is not per-feature" in shown
    assert "fuse-plain-layer-norm" in shown
    assert "other opsets" in shown
    assert len(shown.splitlines()) < 60


def test_screen_of_a_node(tmp_path: Path) -> None:
    path = layer_norm(tmp_path, "Sqrt (shifted)", "Exp (shifted)")
    shown = " ".join(invoke("explain", path, "--node", "y").split())
    assert "node Add 'y'" in shown
    assert "fuse-layer-norm expected Sqrt, found Exp 'std'" in shown


def test_json(tmp_path: Path) -> None:
    path = layer_norm(tmp_path, "Sqrt (shifted)", "Exp (shifted)")
    shown = invoke("explain", path, "--rule", RULE, "--json")
    assert Explanation.model_validate_json(shown) == explain(path, RULE)


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = layer_norm(tmp_path)
    before = path.read_bytes()
    explain(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_passes_lists_every_rule_with_its_equation() -> None:
    shown = "".join(invoke("passes").split())
    for rule in all_rules().values():
        assert rule.name in shown
    assert "eliminate-identityIdentity(x)=>x.1+" in shown
    assert "7-13" in shown  # the versions that gate-hard-swish is for
