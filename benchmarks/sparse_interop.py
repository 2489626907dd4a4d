"""What other tools make of a file with sparse initializers: all but a few need `densify` first.

    python benchmarks/sparse_interop.py [--tool NAME ...] [--model cnn] [--model vit]

A small trained model, 90 % of its weights zero, goes through every tool three times: with dense
weights, as `sparsify` writes it, and with indices of 8 bytes, as ONNX's own helpers make them. What
a tool writes is loaded and run by onnxruntime and compared with the dense model. Optimisers run in
environments of their own (see peers.py), tools of the project's environment in a fresh process.
`tests/test_prune_sparse.py` asserts the same of the latter, so that a change shows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import int8_tools, peers
from benchmarks.sparse_file import pruned
from graphopt import exporter
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.prune.sparse import Sparsify
from graphopt.runtime import Session

ZEROS = 0.9
TOLERANCE = 1e-3  # of the largest output: what folding and fusing may cost in float32
QUANTIZED = 5e-2  # what int8 may cost here
_DIGITS = Path(__file__).parents[1] / "models" / "digits"
_SAVED = "m = onnx.load(source); onnx.save({}, target)"
_QUANTIZER = (f"onnxruntime[quantization,symbolic]=={int8_tools.ONNXRUNTIME}", int8_tools.ONNX)


def _job(statement: str, imports: str = "onnx") -> str:
    return f"import {imports}\ndef job(source, target):\n    {statement}\n"


def _own(name: str, statement: str, imports: str = "onnx") -> peers.Peer:
    """A tool of the project's own environment."""
    return peers.Peer(name, "", (), _job(statement, imports))


def _quantizer(name: str, function: str, more: str = "") -> peers.Peer:
    source = _job(f"q.{function}(source, target{more})", "onnxruntime.quantization as q")
    return peers.Peer(name, int8_tools.ONNXRUNTIME, _QUANTIZER, source)


TOOLS = {
    tool.name: tool
    for tool in (
        *peers.PEERS.values(),
        _quantizer("quantize_dynamic", "quantize_dynamic"),
        _quantizer("quant_pre_process", "quant_pre_process"),
        _own(
            "graphsurgeon",
            _SAVED.format("gs.export_onnx(gs.import_onnx(m))"),
            "onnx, onnx_graphsurgeon as gs",
        ),
        _own(
            "graphsurgeon cleanup",
            _SAVED.format("gs.export_onnx(gs.import_onnx(m).cleanup())"),
            "onnx, onnx_graphsurgeon as gs",
        ),
        _own("infer_shapes", _SAVED.format("onnx.shape_inference.infer_shapes(m)")),
        _own(
            "infer_shapes strict",
            _SAVED.format("onnx.shape_inference.infer_shapes(m, strict_mode=True)"),
        ),
        _own(
            "full_check",
            _SAVED.format("(onnx.checker.check_model(m, full_check=True), m)[1]"),
        ),
        _own(
            "version_converter",
            _SAVED.format("onnx.version_converter.convert_version(m, 20)"),
            "onnx, onnx.version_converter",
        ),
        _own(
            "extract_model",
            "onnx.utils.extract_model(source, target, ['image'], ['logits'])",
            "onnx, onnx.utils",
        ),
        _own("add_prefix", _SAVED.format("onnx.compose.add_prefix(m, 'p_')"), "onnx, onnx.compose"),
        _own(
            "external data",
            "onnx.save(onnx.load(source), target, save_as_external_data=True, location='d')",
        ),
        _own(
            "ReferenceEvaluator",
            _SAVED.format("(onnx.reference.ReferenceEvaluator(m), m)[1]"),
            "onnx, onnx.reference",
        ),
        peers.GRAPHOPT,
    )
}


def forms(name: str) -> dict[str, onnx.ModelProto]:
    """The model as the tools get it."""
    dense = pruned(_DIGITS / f"{name}.onnx", ZEROS)
    model = Model.load(dense)
    run_pipeline(model, [Sparsify()])
    sparse = exporter.to_proto(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(sparse)
    for tensor in wide.graph.sparse_initializer:
        values = numpy_helper.from_array(numpy_helper.to_array(tensor.values), tensor.values.name)
        where = numpy_helper.from_array(numpy_helper.to_array(tensor.indices))
        tensor.CopyFrom(helper.make_sparse_tensor(values, where, tensor.dims))
    return {"dense": dense, "sparse": sparse, "8 B": wide}


def outcome(tool: peers.Peer, source: Path, target: Path, expected: np.ndarray) -> str:  # type: ignore[type-arg]
    """What the tool did with the file, in a few words."""
    found = peers.run(tool, source, target)
    if found.error:
        return f"fails: {found.error}"
    try:
        result = outputs(target)
    except RuntimeFailure as error:
        reason = str(error).replace(str(target), target.name)
        return f"writes what onnxruntime refuses: {reason}"
    kept = len(onnx.load(target, load_external_data=False).graph.sparse_initializer)
    beside = target.with_name("d")
    size = target.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    error = np.abs(result - expected).max() / np.abs(expected).max()
    allowed = QUANTIZED if tool.name == "quantize_dynamic" else TOLERANCE
    verdict = "ok" if error <= allowed else f"computes something else ({error:.1e})"
    return f"{verdict}, {size / 1e3:.0f} kB" + (f", {kept} sparse" if kept else "")


def outputs(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    """The logits of a few images, optimisations on."""
    with np.load(_DIGITS / "evaluation.npz") as data:
        images = data["image"][:16].astype(np.float32)
    with Session(path, threads=1) as session:
        found: np.ndarray = session.run({session.inputs[0].name: images})[session.outputs[0].name]  # type: ignore[type-arg]
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tool", action="append", choices=TOOLS)
    parser.add_argument("--model", action="append", choices=("cnn", "mlp", "gru", "vit"))
    arguments = parser.parse_args()
    for name in arguments.model or ("cnn", "vit"):
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for form, proto in forms(name).items():
                files[form] = Path(folder) / f"{form.replace(' ', '')}.onnx"
                onnx.save(proto, files[form])
            expected = outputs(files["dense"])
            stated = ", ".join(f"{f} {p.stat().st_size / 1e3:.0f} kB" for f, p in files.items())
            print(f"{name}: {stated}")
            for tool in arguments.tool or TOOLS:
                for form, source in files.items():
                    target = (
                        Path(folder) / tool.replace(" ", "-") / form.replace(" ", "") / "o.onnx"
                    )
                    target.parent.mkdir(parents=True)
                    told = outcome(TOOLS[tool], source, target, expected)
                    print(
                        f"  {tool if form == 'dense' else '':22} {form:7} {told[:130]}", flush=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
