"""What onnxruntime makes of a model, and what is lost of its results: for tests of lossy passes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import exporter, verify
from graphopt.edit import Editor
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model, Node
from graphopt.runtime import Session
from graphopt.verify import Interface

Array = NDArray[Any]
Level = Literal["off", "basic", "extended", "default"]


def applied(
    before: onnx.ModelProto, change: Callable[[Editor], object], *, checked: bool = True
) -> tuple[onnx.ModelProto, Editor]:
    """The model after the change, which is sound and leaves no trace where it is undone.

    onnx's checker wants a shape of every input and output; without one, it is not `checked`.
    """
    loaded = Model.load(before)
    edit, interface = Editor(loaded), Interface.of(loaded)
    assert verify.problems(loaded) == []
    print_before = fingerprint(loaded)
    change(edit)
    edit.settle()
    assert verify.problems(loaded, interface) == []
    made = exporter.to_proto(loaded)
    if checked:
        onnx.checker.check_model(made, full_check=True)
    told = list(edit.changes)
    edit.undo_to((0, 0))
    assert fingerprint(loaded) == print_before
    assert exporter.to_proto(loaded) == before
    edit.changes.extend(told)
    return made, edit


def nodes(edit: Editor, *operators: str) -> list[Node]:
    """The nodes of these operators, bodies included."""
    return [node for node in edit.model.nodes() if node.op in operators]


def run(proto: onnx.ModelProto, level: Level = "default", **feed: Any) -> Array:
    """The first output."""
    with Session(proto.SerializeToString(), optimizations=level, threads=1) as session:
        found: Array = next(iter(session.run(feed).values()))
        return found


def operators(proto: onnx.ModelProto) -> Counter[str]:
    """Operators of the graph that onnxruntime really runs, bodies included."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        Session(proto.SerializeToString(), optimized_model=file, threads=1).close()
        return Counter(node.op_type for node in _nodes(onnx.load(file).graph))


def stored(proto: onnx.ModelProto) -> dict[str, Array]:
    """Initializers of all graphs, by name."""
    found = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in _nodes(proto.graph):
        for attribute in node.attribute:
            for tensor in attribute.g.initializer:
                found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return found


def sqnr(expected: Array, found: Array) -> float:
    """Signal to quantization noise, in dB."""
    noise = float(np.square(found.astype(np.float64) - expected).sum())
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise))


def noise_of_rounding(x: Array, step: Array | float) -> float:
    """Power of what rounding to multiples of `step` adds, relative to that of x: step^2 / 12."""
    return float(np.mean(np.square(step)) / 12 / np.mean(np.square(x.astype(np.float64))))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
