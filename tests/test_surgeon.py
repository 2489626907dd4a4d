"""Scripts for onnx-graphsurgeon lose nothing on the way in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import graphopt
from graphopt import exporter
from graphopt.errors import ModelError, UsageError
from graphopt.ir import Model
from graphopt.surgeon import operate

ARCHITECTURES = sorted(Path(__file__).parents[1].glob("models/*/*.onnx"))


def _rich() -> onnx.ModelProto:
    """A model with most of what graphsurgeon drops."""
    big = numpy_helper.from_array(np.arange(1024, dtype=np.float32).reshape(32, 32), "big")
    small = numpy_helper.from_array(np.ones(32, np.float32), "small")
    node = helper.make_node("MatMul", ["x", "big"], ["m"], name="product", doc_string="why")
    node.metadata_props.add(key="origin", value="layer 1")
    add = helper.make_node("Add", ["m", "small"], ["y"], name="sum")
    foreign = helper.make_node("Thing", ["y"], ["z"], name="thing", domain="my.domain", size=[1])
    graph = helper.make_graph(
        [node, add, foreign],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32], "the input"),
            helper.make_tensor_value_info("small", TensorProto.FLOAT, [32]),
        ],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [big, small],
    )
    graph.metadata_props.add(key="k", value="v")
    annotation = graph.quantization_annotation.add(tensor_name="m")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="small")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, doc_string="about")
    model.model_version, model.domain = 7, "org.example"
    model.metadata_props.add(key="author", value="somebody")
    return model


def test_script_that_does_nothing_changes_nothing() -> None:
    model = Model.load(_rich())
    assert exporter.to_proto(operate(model, lambda graph: None)) == _rich()


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_nothing_is_lost_on_real_graphs(path: Path) -> None:
    model = Model.load(path)
    before = exporter.to_hollow(model)
    after = exporter.to_hollow(operate(model, lambda graph: None))
    assert list(after.graph.node) == list(before.graph.node)
    assert list(after.graph.value_info) == list(before.graph.value_info)
    assert {t.name for t in after.graph.initializer} == {t.name for t in before.graph.initializer}
    assert after.functions == before.functions


def test_script_reads_and_replaces_weights() -> None:
    def double(graph: Any) -> None:
        constant = graph.tensors()["big"]
        constant.values = constant.values * 2

    after = exporter.to_proto(operate(Model.load(_rich()), double))
    weights = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    np.testing.assert_array_equal(weights["big"].ravel(), 2 * np.arange(1024, dtype=np.float32))
    np.testing.assert_array_equal(weights["small"], np.ones(32))
    assert after.graph.node[0].doc_string == "why"
    assert [i.name for i in after.graph.input] == ["x", "small"]


def test_script_that_edits_keeps_what_it_left_alone() -> None:
    def rename(graph: Any) -> None:
        graph.nodes[1].name = "renamed"

    after = exporter.to_proto(operate(Model.load(_rich()), rename))
    expected = _rich()
    expected.graph.node[1].name = "renamed"
    assert after == expected


def test_node_cases_survive_or_are_refused_in_one_line() -> None:
    refused = []
    for case in load_model_tests(kind="node"):
        try:
            after = exporter.to_proto(operate(Model.load(case.model), lambda graph: None))
        except ModelError as error:
            refused.append(str(error))
            continue
        assert list(after.graph.node) == list(case.model.graph.node), case.name
    assert all("graphsurgeon cannot hold" in reason and "\n" not in reason for reason in refused)
    assert len(refused) <= 25, refused  # optional and sequence types, empty attributes


def test_as_a_pass_it_is_proved_and_a_wrong_one_is_denied(tmp_path: Path) -> None:
    script = tmp_path / "scripts.py"
    script.write_text(
        "def cleanup(graph):\n    graph.cleanup().toposort()\n\n"
        "def wrong(graph):\n    graph.nodes[-1].inputs[0] = graph.nodes[-2].inputs[0]\n"
    )
    digits = Path(__file__).parents[1] / "models/digits/vit.onnx"
    result = graphopt.optimize(digits, passes=f"graphsurgeon{{function={script}:cleanup}}")
    assert result.report.validation.verdict == "proved"
    report = graphopt.optimize(digits, passes=f"graphsurgeon{{function={script}:wrong}}").report
    assert [(fault.rule, fault.scope) for fault in report.blame] == [("graphsurgeon", "change")]
    assert report.validation.verdict == "proved"
    assert report.passes[0].changes == []
    with pytest.raises(UsageError, match="needs a function"):
        graphopt.optimize(digits, passes="graphsurgeon")


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    operate(Model.load(_rich()), lambda graph: None)
    assert capfd.readouterr() == ("", "")
