"""Writes a large ONNX model with external data, to see how much memory a tool needs for it.

    python benchmarks/make_large.py OUT.onnx --gigabytes 6

The model is a chain of MatMul, Add and Relu over [batch, width]. Its weights are random, all
different, the same at every call, and lie in OUT.onnx.data; they are written piece by piece, so
that this script itself needs little memory whatever the size.
"""

import argparse
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 17
IR_VERSION = 8
WIDTH = 4096
PIECE_ROWS = 256
# Offsets that every system can map straight into memory.
ALIGNMENT = 65536


def pieces(seed: int, rows: int, columns: int, deviation: float) -> Iterator[bytes]:
    """The bytes of normal float32 values [rows, columns], `PIECE_ROWS` rows at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, rows, PIECE_ROWS):
        shape = (min(PIECE_ROWS, rows - start), columns)
        yield (random.standard_normal(shape, dtype=np.float32) * np.float32(deviation)).tobytes()


def write_tensor(
    file: IO[bytes], location: str, name: str, dims: list[int], data: Iterator[bytes]
) -> TensorProto:
    """Appends the data to the external file; returns the tensor that refers to it there."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    offset = file.tell()
    for piece in data:
        file.write(piece)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    facts = {"location": location, "offset": offset, "length": file.tell() - offset}
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def chain(layers: int, width: int, initializers: list[TensorProto]) -> onnx.ModelProto:
    """Relu(x @ weight + bias), `layers` times: `input` [batch, width] -> `output` the same."""
    nodes, value = [], "input"
    for layer in range(layers):
        result = "output" if layer == layers - 1 else f"layer{layer}.relu"
        nodes += [
            helper.make_node("MatMul", [value, f"layer{layer}.weight"], [f"layer{layer}.matmul"]),
            helper.make_node(
                "Add", [f"layer{layer}.matmul", f"layer{layer}.bias"], [f"layer{layer}.add"]
            ),
            helper.make_node("Relu", [f"layer{layer}.add"], [result]),
        ]
        value = result
    dims: list[str | int | None] = ["batch", width]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, dims)],
        initializers,
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)


def make_large(out: Path, gigabytes: float, width: int = WIDTH) -> int:
    """Writes the model `out` and its weights, `out`.data; returns the number of layers.

    A layer has width * width weights of 4 bytes, 64 MiB at the default width; `gigabytes` are
    GiB of weights, rounded to whole layers, at least one.
    """
    layers = max(1, round(gigabytes * 2**30 / (width * width * 4)))
    data = out.with_name(out.name + ".data")
    # Keeps the size of the values about the same from layer to layer under Relu.
    deviation = (2 / width) ** 0.5
    initializers: list[TensorProto] = []
    with data.open("wb") as file:
        for layer in range(layers):
            for name, dims in (("weight", [width, width]), ("bias", [width])):
                # One seed for each tensor: their number so far.
                content = pieces(len(initializers), prod(dims[:-1]), width, deviation)
                tensor = write_tensor(file, data.name, f"layer{layer}.{name}", dims, content)
                initializers.append(tensor)
    out.write_bytes(chain(layers, width, initializers).SerializeToString(deterministic=True))
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="the model to write; its weights go to OUT.data")
    parser.add_argument("--gigabytes", type=float, default=6, help="GiB of weights (default 6)")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"default {WIDTH}")
    options = parser.parse_args()
    layers = make_large(options.out, options.gigabytes, options.width)
    size = options.out.with_name(options.out.name + ".data").stat().st_size
    print(f"{options.out}: {layers} layers, {size / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
