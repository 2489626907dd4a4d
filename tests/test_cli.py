"""The command as a process: exit codes, one-line errors, JSON, pipes, signals, start-up."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner, Result

from graphopt import cli
from graphopt.bench import BenchRecord
from graphopt.errors import RuntimeFailure
from graphopt.inspection import Inspection
from graphopt.passes.pipelines import LEVELS, PASSES
from graphopt.report import OutputRecord, Report, ValidationRecord

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
small (float[n, 64] x) => (float[n, 8] y) {
    a = Identity(x)
    b = MatMul(a, w)
    y = Relu(b)
}
"""
HEAVY = {"onnx", "numpy", "onnxruntime", "scipy", "networkx", "rich"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(MODEL)
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "in.onnx"
    onnx.save(proto, path)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from graphopt.cli import main; main()"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def assert_one_line(result: Any, code: int, *parts: str) -> None:
    """Exit code, one line on stderr that holds the parts, nothing on stdout."""
    stderr = result.stderr
    assert getattr(result, "exit_code", getattr(result, "returncode", None)) == code, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for part in parts:
        assert part in stderr
    assert result.stdout == ""


def refuse(verdict: str, reason: str) -> Any:
    output = OutputRecord(
        name="y",
        type="float32",
        feeds=3,
        signal=1.0,
        noise=1e-7,
        error_off=0.5,
        error_default=0.25,
        used=5e4,
        sqnr_db=6.0,
        verdict="failed",
    )

    def validate_files(*_: Any, **__: Any) -> ValidationRecord:
        return ValidationRecord(verdict=verdict, reason=reason, outputs=[output])  # type: ignore[arg-type]

    return validate_files


# -- optimize --------------------------------------------------------------------------------------


def test_optimize_writes_proves_and_says_so(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = run("optimize", model, out)
    assert (result.returncode, result.stderr) == (0, "")  # quiet when piped
    assert len(onnx.load(out).graph.node) == 2
    for part in ("nodes", "-33.3 %", "eliminate-identity", "1 x", "proved", "noise floor", "feeds"):
        assert part in result.stdout
    assert f"written     {out}  " in result.stdout
    assert "\x1b" not in result.stdout
    assert len(result.stdout.splitlines()) <= 30


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_output_keeps_to_the_width(model: Path, tmp_path: Path, columns: int) -> None:
    out = tmp_path / "out.onnx"
    for arguments in (("optimize", model, out), ("inspect", model), ("validate", model, model)):
        text = run(*arguments, COLUMNS=str(columns)).stdout
        lines = [line for line in text.splitlines() if str(tmp_path) not in line]
        assert max(map(len, lines)) <= columns, text


def test_json_is_the_report_and_nothing_else(model: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "out.onnx", tmp_path / "report.json"
    result = run("optimize", model, out, "--json", "--report", saved)
    assert result.returncode == 0
    report = Report.model_validate_json(result.stdout)
    assert report == Report.model_validate_json(saved.read_text())
    assert report.validation.verdict == "proved"
    assert report.target is not None
    assert report.target.bytes == out.stat().st_size
    assert (report.before.nodes, report.after.nodes) == (3, 2)


@pytest.mark.parametrize("verdict", ["failed", "unproven"])
def test_a_refusal_writes_nothing_but_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    monkeypatch.setattr("graphopt.validate.validate_files", refuse(verdict, "y is off"))
    out, saved = tmp_path / "out.onnx", tmp_path / "report.json"
    result = invoke("optimize", model, out, "--json", "--report", saved)
    assert_one_line(result, 1, f"nothing written: {verdict}: y is off")
    assert sorted(tmp_path.iterdir()) == [model, saved]
    report = Report.model_validate_json(saved.read_text())
    assert report.target is None
    assert report.validation.verdict == verdict
    shown = invoke("optimize", model, out)
    assert "5.0e-01" in shown.stdout  # which output is off, and by how much
    assert "50,000.0 x" in shown.stdout
    assert "50,000.0 x what is allowed" in " ".join(shown.stdout.split())


def test_unproven_writes_on_request(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.validate.validate_files", refuse("unproven", "no feed"))
    assert invoke("optimize", model, tmp_path / "out.onnx", "--unproven").exit_code == 0
    assert (tmp_path / "out.onnx").exists()


def test_options_reach_the_optimizer(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    options = ["--no-validate", "--passes", "remove-dead", "--external-data", "always"]
    result = invoke("optimize", model, out, *options, "--json")
    report = Report.model_validate_json(result.stdout)
    assert report.pipeline == "remove-dead"
    assert report.validation.verdict == "skipped"
    assert (tmp_path / "out.onnx.data").exists()
    result = invoke("optimize", model, out, "--no-validate", "--level", 0, "--json")
    assert Report.model_validate_json(result.stdout).passes == []


def test_bench_adds_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.timing import PairedTiming, Ratio, Timing

    timed = PairedTiming(
        (Timing(2.0, 1.9, 2.1), Timing(1.0, 0.9, 1.1)),
        (Ratio(1, 1, 1), Ratio(2.0, 1.9, 2.1)),
        blocks=8,
        runs=80,
    )
    monkeypatch.setattr("graphopt.bench.time_paired", lambda *_, **__: timed)
    arguments = ["optimize", model, tmp_path / "out.onnx", "--no-validate", "--bench"]
    assert "2.000x faster: 2.00 ms -> 1.00 ms" in invoke(*arguments).stdout
    report = Report.model_validate_json(invoke(*arguments, "--json").stdout)
    assert report.bench is not None
    assert report.bench.models[1].ratio == 2.0


def test_shapes_and_opset_reach_the_result(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = invoke("optimize", model, out, "--shape", "x:3,-1", "--opset", 20)
    assert result.exit_code == 0, result.stderr
    assert "level 2, opset 17 -> 20" in result.stdout
    assert "compared at x:3x?" in result.stdout
    made = onnx.load(out)
    assert [dim.dim_value for dim in made.graph.input[0].type.tensor_type.shape.dim] == [3, 64]
    assert [dim.dim_value for dim in made.graph.output[0].type.tensor_type.shape.dim] == [3, 8]
    assert made.opset_import[0].version == 20
    assert invoke("validate", model, out).exit_code == 1
    assert invoke("validate", model, out, "--shape", "x:3,64").exit_code == 0


def test_the_screen_says_what_matters(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["one"], value_float=1.0))
    proto.graph.node[1].CopyFrom(onnx.helper.make_node("Mul", ["x", "one"], ["a"]))
    onnx.save(proto, model)
    text = invoke("optimize", model, tmp_path / "out.onnx").stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "nodes 4 2 -50.0 %" in lines
    assert "that compute 3 2 -33.3 %" in lines  # a constant takes no time
    assert re.search(r"error +0 against a noise floor of 0: 0 % of what is allowed", text)
    assert "seconds" not in text  # passes are for those who ask
    told = invoke("optimize", model, tmp_path / "out.onnx", "--verbose").stdout
    assert re.search(r"^remove-dead +\d\.\d{3}", told, re.MULTILINE)
    assert re.search(r"^lift-constants +\d\.\d{3} +1 *$", told, re.MULTILINE)
    assert re.search(r"^all +\d\.\d{3}", told, re.MULTILINE)


# -- errors ----------------------------------------------------------------------------------------


def test_user_mistakes_are_one_line_and_exit_2(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    optimize = ("optimize", model, out)
    assert_one_line(run("optimize", tmp_path / "nope.onnx", out), 2, "nope.onnx: no such file")
    assert_one_line(invoke("optimize", text, out), 2, "text.onnx", "not an ONNX model")
    assert_one_line(invoke("inspect", text), 2, "not an ONNX model")
    assert_one_line(invoke("bench", model, text), 2, "not an ONNX model")
    assert_one_line(invoke(*optimize, "--level", 9), 2, "level 9", "0 to 3")
    assert_one_line(invoke(*optimize, "--passes", "nope"), 2, "no pass 'nope'")
    assert_one_line(invoke("optimize", model, tmp_path / "a" / "b"), 2, "cannot be written")
    assert_one_line(invoke(*optimize, "--report", tmp_path / "a" / "b"), 2, "cannot be written")
    assert_one_line(invoke(*optimize, "--report", out), 2, "a model of this command")
    assert_one_line(invoke("inspect", model, "--shape", "x"), 2, "NAME:1,3,224,224")
    assert_one_line(invoke("inspect", model, "--shape", "x:1,b"), 2, "NAME:1,3,224,224")
    assert_one_line(invoke("inspect", model, "--shape", "z:1,64"), 2, "no such input")
    assert_one_line(invoke("inspect", model, "--shape", "x:-1,64"), 2, "NAME:1,3,224,224")
    for shape, said in (
        ("x", "write NAME:1,3,-1,-1"),
        ("x:1,-2", "write NAME:1,3,-1,-1"),
        ("x:0,64", "sizes are positive"),
        ("x:1,65", "axis 1 is 64 in the model, not 65"),
        ("x:1", "1 has 1 sizes, the input is float[n,64]"),
        ("z:1,64", "shape of 'z': there is no such input; there are 'x'"),
    ):
        assert_one_line(invoke(*optimize, "--shape", shape), 2, said)
    twice = invoke(*optimize, "--shape", "x:1,64", "--shape", "x:2,64")
    assert_one_line(twice, 2, "'x' is given twice")
    assert_one_line(invoke(*optimize, "--opset", 99), 2, "opset 99: onnx", "knows 1 to")
    assert not out.exists()
    assert sorted(tmp_path.iterdir()) == [model, text]


def test_usage_errors_exit_2(model: Path) -> None:
    for arguments in (
        ("nope",),
        ("optimize", model),
        ("inspect",),
        ("bench", model, "--threads", -1),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RuntimeFailure("a\nb"), 1, "error: a b\n"),
        (OSError(28, "No space left on device", "f.onnx"), 2, "f.onnx: No space left on device"),
        (MemoryError(), 1, "out of memory"),
        (KeyError("x"), 1, "KeyError: 'x' (this is a bug in graphopt; -v shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_exception_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("graphopt.inspection.inspect", fail)
    monkeypatch.delenv("GRAPHOPT_DEBUG", raising=False)
    assert_one_line(invoke("inspect", model), code, line)


def test_verbose_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHOPT_DEBUG", raising=False)
    missing = tmp_path / "nope.onnx"
    assert "Traceback" not in invoke("inspect", missing).stderr
    result = invoke("inspect", missing, "-v")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    monkeypatch.setenv("GRAPHOPT_DEBUG", "1")
    assert "Traceback" in invoke("inspect", missing).stderr


# -- the other commands ----------------------------------------------------------------------------


def test_validate_tells_by_exit_code(model: Path, tmp_path: Path) -> None:
    same = invoke("validate", model, model)
    assert same.exit_code == 0
    assert "proved" in same.stdout
    other = onnx.load(model)
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    onnx.save(other, tmp_path / "other.onnx")
    saved = tmp_path / "proof.json"
    result = invoke("validate", model, tmp_path / "other.onnx", "--json", "--report", saved)
    assert result.exit_code == 1
    assert result.stderr == ""
    proof = ValidationRecord.model_validate_json(result.stdout)
    assert proof.verdict == "failed"
    assert ValidationRecord.model_validate_json(saved.read_text()) == proof


def test_inspect_says_at_which_shape(model: Path) -> None:
    assert "512 at x:1x64 (free dims assumed; --shape sets them)" in invoke("inspect", model).stdout
    for shape in ("x:5,64", "x:5x64"):
        assert "2.6 k at x:5x64\n" in _stripped(invoke("inspect", model, "--shape", shape).stdout)
    found = Inspection.model_validate_json(invoke("inspect", model, "--json").stdout)
    assert found.macs.total == 512


def test_names_with_colons_and_control_characters(model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "x\x1b[31m:0"
    proto.graph.node[0].name = "[bold]"
    onnx.save(proto, model)
    result = run("inspect", model, "--shape", "x\x1b[31m:0:5,64", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert "2.6 k at" in result.stdout
    assert r"x\x1b[31m:0: float32[n, 64]" in result.stdout


def test_bench_compares_with_the_first(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(model.read_bytes())
    result = run("bench", model, copy, "--seconds", "0.5", "--shape", "x:3,64", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = BenchRecord.model_validate_json(result.stdout)
    assert found.shapes == {"x": [3, 64]}
    assert [entry.path for entry in found.models] == [str(model), str(copy)]
    first, second = found.models
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert second.ratio_low <= second.ratio <= second.ratio_high
    assert all(entry.ms > 0 and entry.load_seconds > 0 for entry in found.models)
    assert "copy.onnx" in invoke("bench", model, copy, "--seconds", "0.5").stdout


def test_passes_lists_all(model: Path) -> None:
    text = invoke("passes").stdout
    for name in PASSES:
        assert name in text
    for level in LEVELS:
        assert f"level {level}" in text


def test_version() -> None:
    from importlib import metadata

    assert invoke("--version").stdout == f"graphopt {metadata.version('graphopt')}\n"


# -- the process -----------------------------------------------------------------------------------

# The pipeline says that it runs, then waits for the signal; the output is staged by then.
SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what shells put behind
import sys, time
import graphopt.api
def wait(*_, **__):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
graphopt.api.run_pipeline = wait
from graphopt.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_interruption_leaves_nothing(
    model: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    number: signal.Signals,
    code: int,
    said: str,
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    out = tmp_path / "out.onnx"
    arguments = ["optimize", str(model), str(out), "--report", str(tmp_path / "r.json")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) > 1
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (code, "", said)
    assert list(tmp_path.iterdir()) == [model]
    assert list(scratch.glob("graphopt*")) == []


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("option", ["--json", "--verbose"])
def test_a_reader_that_leaves_is_no_error(model: Path, tmp_path: Path, option: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from graphopt.cli import main; main()"]
    done = subprocess.run(
        [*command, "inspect", str(model), option],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["optimize", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        "from graphopt.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    modules = json.loads(done.stderr.splitlines()[-1])
    assert "typer" in modules
    # typer itself needs pydantic to make the options of a command, though not to list commands
    heavy = HEAVY if "optimize" in arguments else HEAVY | {"pydantic"}
    assert {name.partition(".")[0] for name in modules} & heavy == set()


def test_importing_graphopt_is_light() -> None:
    code = "import sys, graphopt; sys.exit(bool(set(sys.modules) & {'onnx', 'numpy', 'pydantic'}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="terminals of POSIX")
def test_progress_goes_to_a_terminal_only(model: Path, tmp_path: Path) -> None:
    import pty

    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", "from graphopt.cli import main; main()"]
    process = subprocess.Popen(
        [*command, "optimize", str(model), str(tmp_path / "out.onnx"), "--json"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )
    stdout, _ = process.communicate(timeout=120)
    os.close(terminal)
    time.sleep(0.1)
    shown = os.read(controller, 1 << 16)
    os.close(controller)
    assert b"reading" in shown
    Report.model_validate_json(stdout)


def _stripped(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())
