"""Before and after a pass as text, with what must hold of every pass whatever it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import pipeline
from graphopt.runtime import Session
from tests import graphs


def run(before: onnx.ModelProto, passes: str) -> tuple[onnx.ModelProto, list[str]]:
    """The model after the passes, and the rules that fired with the names they stand on."""
    loaded = Model.load(before)
    runs = run_pipeline(loaded, pipeline(0, passes), verify_each=True)
    assert [one.error for one in runs if one.error] == []
    told = [f"{change.rule} {change.root}" for one in runs for change in one.changes]
    return exporter.to_proto(loaded), told


def golden(
    passes: str,
    before: str | onnx.ModelProto,
    expected: str,
    told: list[str],
    *,
    ir: int | None = None,
    runs: bool = True,
) -> onnx.ModelProto:
    """`expected` is the whole model after the passes, "" if it is as before; `runs` says that
    onnxruntime runs the model, whose outputs must then be the same bits."""
    original = graphs.parsed(before) if isinstance(before, str) else before
    wanted = graphs.parsed(expected) if expected else original
    for proto in (original, wanted):
        if ir is not None:
            proto.ir_version = ir
    made, found = run(original, passes)
    assert onnx.printer.to_text(made).splitlines() == onnx.printer.to_text(wanted).splitlines()
    assert found == told
    check(original, made, passes, runs=runs)
    return made


def check(
    original: onnx.ModelProto, made: onnx.ModelProto, passes: str, *, runs: bool = True
) -> None:
    """Sound, undone without a trace, done in one go, and the same bits in onnxruntime."""
    again, more = run(made, passes)
    assert more == []
    assert again == made
    loaded = Model.load(original)
    edit = Editor(loaded)
    before = fingerprint(loaded)
    for step in pipeline(0, passes):
        edit.settle()
        step.run(loaded, edit)
    edit.undo_to((0, 0))
    assert fingerprint(loaded) == before
    assert exporter.to_proto(loaded) == original
    if runs:
        onnx.checker.check_model(made)
        assert outputs(made, original) == outputs(original, original)


def outputs(model: onnx.ModelProto, like: onnx.ModelProto) -> dict[str, Any]:
    """What onnxruntime computes with optimisations off, exactly, on seeded feeds."""
    rng = np.random.default_rng(0)
    defaults = {tensor.name for tensor in like.graph.initializer}
    feed = {i.name: _fed(i, rng) for i in like.graph.input if i.name not in defaults}
    with Session(model.SerializeToString(), optimizations="off", threads=1) as session:
        return {name: _exact(value) for name, value in session.run(feed).items()}


def _fed(info: onnx.ValueInfoProto, rng: np.random.Generator) -> Any:
    tensor = info.type.tensor_type
    shape = [dim.dim_value or 3 for dim in tensor.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return np.asarray(rng.normal(size=shape) * 4).astype(dtype)


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return [_exact(part) for part in value]
    array = np.asarray(value)
    content = array.tolist() if array.dtype.kind == "O" else array.tobytes()
    return array.dtype.name, array.shape, content
