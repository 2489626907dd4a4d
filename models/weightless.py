"""Weightless ONNX models: real exported graphs kept without their weights.

In a weightless file every float tensor over 4 KiB keeps its type and dims but holds no data; its
doc_string holds {"mean", "std", "min", "max", "seed"}. Filling gives it normal values of that
mean and deviation, clipped to that range, from that seed: the same file every time with the same
numpy. Structure and latency are then real; accuracy means nothing.

    python models/weightless.py fill ARCHITECTURE.onnx MODEL.onnx
    python models/weightless.py strip MODEL.onnx ARCHITECTURE.onnx
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

LIMIT_BYTES = 4096
MARK = '{"mean"'


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every initializer and Constant value of the graph and of its subgraphs, in file order."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors(attribute.g)


def strip(model: onnx.ModelProto) -> None:
    """Replaces the data of every large float tensor by its statistics, in place."""
    for seed, tensor in enumerate(tensors(model.graph)):
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind != "f" or values.nbytes <= LIMIT_BYTES:
            continue
        statistics = {
            "mean": values.mean(dtype=np.float64),
            "std": values.std(dtype=np.float64),
            "min": values.min(),
            "max": values.max(),
        }
        hollow = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        rounded = {key: float(f"{float(value):.6g}") for key, value in statistics.items()}
        hollow.doc_string = json.dumps(rounded | {"seed": seed})
        tensor.CopyFrom(hollow)


def fill(model: onnx.ModelProto) -> None:
    """Gives every tensor that `strip` emptied seeded random values, in place."""
    for tensor in tensors(model.graph):
        if not tensor.doc_string.startswith(MARK):
            continue
        s = json.loads(tensor.doc_string)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        values = np.random.default_rng(s["seed"]).normal(s["mean"], s["std"], tuple(tensor.dims))
        np.clip(values, s["min"], s["max"], out=values)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, dtype), tensor.name))


def write(model: onnx.ModelProto, target: Path) -> None:
    """Writes the model as one file, with the same bytes for the same model."""
    target.write_bytes(model.SerializeToString(deterministic=True))


def fill_file(source: Path, target: Path) -> None:
    """Writes the weightless model `source` with its random weights to `target`."""
    model = onnx.load(source)
    fill(model)
    write(model, target)


def strip_file(source: Path, target: Path) -> None:
    """Writes `source` without its large float tensors to `target`."""
    model = onnx.load(source)
    strip(model)
    write(model, target)


if __name__ == "__main__":
    actions = {"fill": fill_file, "strip": strip_file}
    if len(sys.argv) != 4 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    actions[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
