"""The quantizers that `int8.py` compares, each run as its own documentation says.

onnxruntime's and NNCF's run in environments of their own (see peers.py), with the onnxruntime
that graphopt itself has here: the same version quantizes and runs everywhere. Peers get the help
that their users would give them: preparation without symbolic shapes where those fail, opset 13
where a model is older than per-channel quantization, the preparation for dynamic quantization where
it fails without, and NNCF is told of a transformer where the model is one.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import peers

ONNX = f"onnx=={importlib.metadata.version('onnx')}"
ONNXRUNTIME = importlib.metadata.version("onnxruntime")
OPENVINO, NNCF = "2026.4.1", "3.4.0"

ORIGINAL, LOSSLESS, OURS = "original", "lossless", "graphopt"
TRANSFORMERS = ("paraphrase_minilm_l3", "digits_vit")

_PACKAGES = {
    "onnxruntime": (f"onnxruntime[quantization,symbolic]=={ONNXRUNTIME}", ONNX),
    "nncf": (f"nncf=={NNCF}", f"openvino=={OPENVINO}", ONNX, f"onnxruntime=={ONNXRUNTIME}"),
}

_FEEDS = """
import glob
import numpy
class Feeds:
    def __iter__(self):
        for file in sorted(glob.glob(glob.escape(calibration) + "/*.npz")):
            with numpy.load(file) as found:
                yield dict(found)
"""

_WAYS = """
import pathlib
import tempfile
import onnx
import onnxruntime
def newer(source, target):
    # Per-channel quantization begins with opset 13.
    model = onnx.load(source)
    if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 13:
        model = onnx.version_converter.convert_version(model, 13)
    onnx.save(model, target)
    return target
def in_turn(target, *ways):
    # The first way whose file onnxruntime loads, else what the last one makes of it.
    for way in ways[:-1]:
        try:
            way()
            onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
        except Exception:
            pathlib.Path(target).unlink(missing_ok=True)
        else:
            return
    ways[-1]()
"""

_ONNXRUNTIME = """
import onnx.version_converter
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization import quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = iter(Feeds())
    def get_next(self):
        return next(self.left, None)
def prepared(source, folder, symbolic):
    quant_pre_process(source, folder + "/prepared.onnx", skip_symbolic_shape=not symbolic)
    return folder + "/prepared.onnx"
"""

_DEFAULT = """
def job(source, target):
    quantize_static(source, target, Reader())
"""

_U8S8 = """
def job(source, target):
    def quantize(prepared):
        u8, s8 = QuantType.QUInt8, QuantType.QInt8
        quantize_static(
            prepared, target, Reader(), activation_type=u8, weight_type=s8, per_channel=True
        )
    with tempfile.TemporaryDirectory() as folder:
        in_turn(
            target,
            lambda: quantize(prepared(source, folder, True)),
            lambda: quantize(prepared(source, folder, False)),
            lambda: quantize(prepared(newer(source, folder + "/newer.onnx"), folder, False)),
        )
"""

_ENTROPY = """
def job(source, target):
    with tempfile.TemporaryDirectory() as folder:
        model = prepared(source, folder, False)
        quantize_static(model, target, Reader(), calibrate_method=CalibrationMethod.Entropy)
"""

_DYNAMIC = """
def job(source, target):
    def quantize(model):
        quantize_dynamic(model, target, per_channel=True, weight_type=QuantType.QInt8)
    with tempfile.TemporaryDirectory() as folder:
        in_turn(
            target,
            lambda: quantize(source),
            lambda: quantize(prepared(source, folder, False)),
            lambda: quantize(prepared(newer(source, folder + "/newer.onnx"), folder, False)),
        )
"""

_NNCF = """
import nncf
import onnx.version_converter
def job(source, target):
    def quantize(model, **options):
        model = onnx.load(model)
        onnx.save(nncf.quantize(model, nncf.Dataset(Feeds()), **options), target)
    with tempfile.TemporaryDirectory() as folder:
        model = newer(source, folder + "/newer.onnx")
        {prepare}
        in_turn(target, lambda: quantize(model, model_type=model_type), lambda: quantize(model))
"""

_PREPARE = """
        from onnxruntime.quantization.shape_inference import quant_pre_process
        quant_pre_process(model, folder + "/prepared.onnx", skip_symbolic_shape=True)
        model = folder + "/prepared.onnx"
"""

_OPENVINO = """
import nncf
import openvino
def job(source, target):
    model = openvino.Core().read_model(source)
    model = nncf.quantize(model, nncf.Dataset(Feeds()), model_type=model_type)
    openvino.save_model(model, target)
"""

_LAUNCH = """
import json, runpy, sys
answer, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    # Not getrusage: on Linux its peak is inherited from the process that started this one.
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    with open(answer, "w") as file:
        json.dump(int(lines["VmHWM"].split()[0]) * 1024, file)
"""


@dataclass(frozen=True)
class Tool:
    """What makes an int8 file, and what runs it.

    `source` defines `job(source, target)` and is empty where the runtime takes the original as it
    is. `precision` is what OpenVINO is asked for, "" for what it chooses.
    """

    name: str
    version: str
    environment: Literal["graphopt", "onnxruntime", "nncf"]
    source: str = ""
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    precision: str = ""

    @property
    def file(self) -> str:
        return "out.xml" if self.runtime == "openvino" else "out.onnx"

    def peer(self, model: str, calibration: Path) -> peers.Peer:
        """The tool for one model and its calibration feeds, a folder of .npz files."""
        kind = "nncf.ModelType.TRANSFORMER" if model in TRANSFORMERS else "None"
        given = f"calibration = {str(calibration)!r}\n"
        parts = given + _FEEDS + _WAYS + self.source
        source = parts.replace("model_type=model_type", f"model_type={kind}")
        return peers.Peer(self.name, self.version, _PACKAGES[self.environment], source)


def _onnxruntime(name: str, source: str) -> Tool:
    return Tool(name, ONNXRUNTIME, "onnxruntime", _ONNXRUNTIME + source)


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(ORIGINAL, ONNXRUNTIME, "graphopt"),
        Tool(LOSSLESS, "", "graphopt"),
        Tool(OURS, "", "graphopt"),
        _onnxruntime("ort-default", _DEFAULT),
        _onnxruntime("ort-u8s8", _U8S8),
        _onnxruntime("ort-dynamic", _DYNAMIC),
        Tool("nncf", NNCF, "nncf", _NNCF.format(prepare="")),
        Tool("nncf-prepared", NNCF, "nncf", _NNCF.format(prepare=_PREPARE.strip())),
        Tool("openvino-f32", OPENVINO, "nncf", runtime="openvino", precision="f32"),
        Tool("openvino", OPENVINO, "nncf", runtime="openvino"),
        Tool("openvino-int8", OPENVINO, "nncf", _OPENVINO, runtime="openvino"),
    )
}
"""All columns of the table: the original, graphopt's lossless and int8 files, and the peers'."""

ENTROPY = _onnxruntime("ort-entropy", _ENTROPY)
"""onnxruntime's preparation and entropy calibration: what the whole command is compared with."""

RIVALS = ("ort-default", "ort-u8s8", "ort-dynamic", "nncf", "nncf-prepared")
"""The peers whose files onnxruntime runs, which graphopt's has to beat."""

OPENVINOS = tuple(name for name, tool in TOOLS.items() if tool.runtime == "openvino")


def interpreter(tool: Tool) -> Path:
    """The Python that runs the tool's files, its environment made if need be."""
    if tool.runtime == "onnxruntime":
        return Path(sys.executable)
    return peers.environment(peers.Peer("nncf", NNCF, _PACKAGES["nncf"], ""))


@dataclass(frozen=True)
class Command:
    """One run of graphopt's command; `code` is its exit code, `said` its last line."""

    code: int
    seconds: float
    peak_bytes: int
    said: str


def optimize(source: Path, target: Path, *options: str | Path, timeout: float) -> Command:
    """`graphopt optimize SOURCE TARGET OPTIONS`, as users call it, in a fresh process."""
    program = Path(sys.executable).parent / "graphopt"
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        call: peers.Arguments = [sys.executable, "-P", "-c", _LAUNCH, answer]
        call += [program, "optimize", source, target, *options]
        started = time.perf_counter()
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Command(-1, timeout, 0, f"no end after {timeout:.0f} s")
        seconds = time.perf_counter() - started
        peak = json.loads(answer.read_text()) if answer.exists() else 0
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return Command(done.returncode, seconds, peak, lines[-1] if lines else "")
