"""The hook with a real torch, every architecture through both exporters.

pip install torch onnxscript && python -m pytest tests/live -rA
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="NO LIVE TEST OF THE EXPORT HOOK: torch is missing")
pytest.importorskip("onnxscript", reason="NO LIVE TEST OF THE EXPORT HOOK: onnxscript is missing")

from graphopt.hooks import TorchExportHook, optimize_export, torch_export  # noqa: E402
from tests.live.architectures import ARCHITECTURES, build, export_arguments  # noqa: E402

EXPORTERS = [pytest.param(False, id="torchscript"), pytest.param(True, id="dynamo")]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exports go to an empty current folder; torch's own warnings are none of ours."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size other")
        yield


def export(name: str, target: Any, dynamo: bool, **more: Any) -> Any:
    arguments = export_arguments(name, dynamo) | more
    torch.manual_seed(1)
    args = ARCHITECTURES[name].args()
    return torch.onnx.export(build(name), args, target, verbose=False, **arguments)


def hooked(name: str, target: Any, dynamo: bool, **more: Any) -> tuple[Any, TorchExportHook]:
    with torch_export(on_error="raise") as hook:
        return export(name, target, dynamo, **more), hook


def signature(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*proto.graph.input, *proto.graph.output]


def run(model: str | bytes, batch: int, name: str) -> list[np.ndarray]:
    """Outputs on a batch of another size than the one exported."""
    generator = np.random.default_rng(0)
    feed = {}
    for key, sample in zip(ARCHITECTURES[name].inputs, ARCHITECTURES[name].args(), strict=True):
        shape = (batch, *sample.shape[1:])
        if key == "mask":
            feed[key] = np.ones(shape, np.float32)
        elif sample.is_floating_point():
            feed[key] = generator.normal(size=shape).astype(np.float32)
        else:
            feed[key] = generator.integers(0, 100, shape)
    return list(onnxruntime.InferenceSession(model).run(None, feed))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo", "dynamo-raw"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, exporter: str) -> None:
    dynamo = exporter != "torchscript"
    # torch's own optimiser leaves little to do in small networks: without it the work is ours
    options = {"optimize": False} if exporter == "dynamo-raw" else {}
    export(name, "raw.onnx", dynamo, **options)
    returned, hook = hooked(name, Path("m.onnx"), dynamo, **options)
    (report,) = hook.reports
    changes = sum(len(made.changes) for made in report.passes)
    print(
        f"\n| {name} | {exporter} "
        f"| {report.before.nodes} -> {report.after.nodes} | {changes} "
        f"| {report.validation.error:.1e} | {report.validation.noise:.1e} "
        f"| {report.validation.verdict} | {report.seconds:.1f} |"
    )
    assert report.validation.verdict == "proved"
    assert report.after.nodes <= report.before.nodes
    raw, optimised = onnx.load("raw.onnx"), onnx.load("m.onnx")
    onnx.checker.check_model(optimised, full_check=True)
    assert signature(optimised) == signature(raw)
    assert sorted(p.name for p in Path().iterdir() if p.is_file()) == sorted(
        f"{stem}.onnx{end}" for stem in ("m", "raw") for end in (("", ".data") if dynamo else ("",))
    )
    for expected, found in zip(run("raw.onnx", 3, name), run("m.onnx", 3, name), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert (returned is None) != dynamo
    assert report.warnings == []
    if exporter == "dynamo-raw":
        assert report.after.nodes < report.before.nodes / 1.5


@pytest.mark.parametrize("name", ["mlp", "lstm"])
@pytest.mark.parametrize("target", [None, "m.onnx", "stream"])
def test_the_program_is_optimised(name: str, target: Any) -> None:
    raw = export(name, None, True)
    stream = io.BytesIO() if target == "stream" else target
    program, hook = hooked(name, stream, True)
    assert hook.reports[0].validation.verdict == "proved"
    assert len(program.model.graph) == hook.reports[0].after.nodes < len(raw.model.graph)
    assert signature(program.model_proto) == signature(raw.model_proto)
    args = ARCHITECTURES[name].args()
    for expected, found in zip(raw(*args), program(*args), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for external in (False, True):
        program.save("saved.onnx", external_data=external)
        assert len(onnx.load("saved.onnx").graph.node) == hook.reports[0].after.nodes
        run("saved.onnx", 3, name)
    program.rename_axes({"batch": "n"})
    assert program.model_proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_streams(dynamo: bool) -> None:
    stream = io.BytesIO()
    _, hook = hooked("mlp", stream, dynamo)
    run(stream.getvalue(), 3, "mlp")
    written = onnx.load_model_from_string(stream.getvalue())
    assert len(written.graph.node) == hook.reports[0].after.nodes
    if not dynamo:  # torch's dynamo exporter takes no stream but BytesIO
        with Path("m.onnx").open("wb") as file:
            hooked("mlp", file, dynamo)
        run("m.onnx", 3, "mlp")


def test_weights_inside_and_weights_as_inputs() -> None:
    hooked("cnn", "m.onnx", True, external_data=False)
    assert [path.name for path in Path().iterdir()] == ["m.onnx"]
    export("mlp", "raw.onnx", True, keep_initializers_as_inputs=True, external_data=False)
    hooked("mlp", "n.onnx", True, keep_initializers_as_inputs=True, external_data=False)
    names = [[i.name for i in onnx.load(p).graph.input] for p in ("raw.onnx", "n.onnx")]
    assert set(names[1]) <= set(names[0])
    assert len(names[1]) > 1


def test_the_exporter_is_as_it_was() -> None:
    genuine = torch.onnx.export
    with torch_export():
        assert inspect.signature(torch.onnx.export) == inspect.signature(genuine)
    assert torch.onnx.export is genuine


def test_an_export_without_the_hook() -> None:
    export("transformer", "m.onnx", False)
    outcome = optimize_export("m.onnx", on_error="raise")
    assert outcome.report is not None
    assert outcome.report.after.nodes < outcome.report.before.nodes / 1.5
