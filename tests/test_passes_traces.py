"""strip-traces: stack traces go, everything else that is said of a node stays."""

from __future__ import annotations

import onnx

from tests import goldens, graphs


def traced() -> onnx.ModelProto:
    proto = graphs.parsed(
        """g (bool c, float[2] x) => (float[2] y) { a = Neg (x)  b = Abs (a)
        y = If (c) < then_branch = t () => (float[2] p) { p = Exp (b) },
        else_branch = e () => (float[2] q) { q = Identity (b) }> }"""
    )
    neg, absolute, choice = proto.graph.node
    body = choice.attribute[0].g.node[0]
    for node in (neg, body):
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File a.py, line 1\n" * 9)
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layer']")
    absolute.doc_string = "model.py(12): forward\nrun.py(3): <module>"
    choice.doc_string = "Takes the first branch while training."
    return proto


def test_traces_go_and_other_notes_stay() -> None:
    before = traced()
    made, told = goldens.run(before, "strip-traces")
    assert told == ["strip-trace a", "strip-trace b", "strip-trace p"]
    neg, absolute, choice = made.graph.node
    body = choice.attribute[0].g.node[0]
    for node in (neg, body):
        assert [entry.key for entry in node.metadata_props] == ["pkg.torch.onnx.name_scopes"]
    assert absolute.doc_string == ""
    assert choice.doc_string == "Takes the first branch while training."
    assert b".py" not in made.SerializeToString()
    goldens.check(before, made, "strip-traces")
