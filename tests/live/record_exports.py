"""Record the exports that tests/test_hooks.py replays. Needs torch and onnxscript.

    python -m tests.live.record_exports [FOLDER]

Each file is what `torch.onnx.export` wrote, less the stack traces of the machine it ran on.
Recorded with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx
import torch

from tests.live.architectures import ARCHITECTURES, build, export_arguments

RECORDED = ("mlp", "cnn", "transformer")
FOLDER = Path(__file__).parents[1] / "data" / "exports"
TRACE = "pkg.torch.onnx.stack_trace"


def record(name: str, dynamo: bool) -> onnx.ModelProto:
    """The export of one architecture, its weights inside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        arguments = export_arguments(name, dynamo)
        torch.onnx.export(build(name), ARCHITECTURES[name].args(), path, **arguments)
        model = onnx.load(path)
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return model


def main(folder: Path) -> None:
    """Write every recording, as NAME.EXPORTER.onnx."""
    for name in RECORDED:
        for exporter in ("torchscript", "dynamo"):
            model = record(name, exporter == "dynamo")
            onnx.save(model, folder / f"{name}.{exporter}.onnx")
            print(name, exporter, len(model.graph.node), "nodes,", model.ByteSize(), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
