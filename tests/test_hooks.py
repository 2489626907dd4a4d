"""The hook into `torch.onnx.export`, on recorded exports: no torch is needed."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import graphopt
from graphopt import exported, output
from graphopt.api import Result, optimize
from graphopt.errors import ModelError, OutputError, UnprovenError, UsageError
from graphopt.hooks import ExportWarning, optimize_export, torch_export
from tests import fake_torch
from tests.graphs import model, node, value, weight

RECORDINGS = [(name, dynamo) for name in ("mlp", "cnn", "transformer") for dynamo in (False, True)]
NOISE = "draws random numbers: two runs of the original differ; --unproven writes it all the same"


@pytest.fixture(autouse=True)
def torch_onnx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake `torch.onnx`."""
    modules = fake_torch.modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["torch.onnx"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Exports go to an empty current folder, and a warning of ours that is not expected fails."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        yield


def noisy() -> onnx.ModelProto:
    """An export of which nothing can be proved."""
    nodes = [
        node("Identity", ["x"], ["same"]),
        node("RandomNormalLike", ["same"], ["noise"], name="draw"),
        node("Add", ["same", "noise"], ["y"]),
    ]
    return model(nodes, [value("x", (4,))], [value("y", (4,))])


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def operators(proto: onnx.ModelProto | str | Path) -> list[str]:
    proto = proto if isinstance(proto, onnx.ModelProto) else onnx.load(proto)
    return [made.op_type for made in proto.graph.node]


def expected(name: str, dynamo: bool) -> list[str]:
    """Operators of the recording, optimised."""
    return operators(optimize(fake_torch.recording(name, dynamo)).proto())


# -- what the exporter makes is optimised ----------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(("name", "dynamo"), RECORDINGS)
def test_a_file_is_replaced(torch_onnx: Any, name: str, dynamo: bool, kind: type) -> None:
    original = fake_torch.recording(name, dynamo)
    with torch_export() as hook:
        returned = torch_onnx.export(name, (), kind("m.onnx"), dynamo=dynamo)
    (report,) = hook.reports
    assert report.validation.verdict == "proved"
    assert report.target is not None
    assert report.target.path == "m.onnx"
    assert hook.outcomes[0].name == "m.onnx"
    assert hook.outcomes[0].optimised
    optimised = onnx.load("m.onnx")
    onnx.checker.check_model(optimised, full_check=True)
    assert operators(optimised) == expected(name, dynamo)
    assert list(optimised.graph.input) == list(original.graph.input)
    assert list(optimised.graph.output) == list(original.graph.output)
    assert isinstance(returned, fake_torch.ONNXProgram if dynamo else type(None))


def test_the_recordings_give_the_optimiser_work() -> None:
    sizes = {
        (name, dynamo): (
            len(fake_torch.recording(name, dynamo).graph.node),
            len(expected(name, dynamo)),
        )
        for name, dynamo in RECORDINGS
    }
    for recorded in (("mlp", False), ("mlp", True), ("transformer", False)):
        before, after = sizes[recorded]
        assert after < before / 2 + 1, recorded


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_external_data_is_replaced_with_its_model(torch_onnx: Any, name: str) -> None:
    original = fake_torch.recording(name, True)
    with torch_export():
        torch_onnx.export(name, f="m.onnx")
    assert files() == ["m.onnx", "m.onnx.data"]
    kept = {t.name: t for t in onnx.load("m.onnx").graph.initializer}
    shared = [t for t in original.graph.initializer if t.name in kept]
    assert len(shared) > 1
    for tensor in shared:
        found = onnx.numpy_helper.to_array(kept[tensor.name])
        np.testing.assert_array_equal(found, onnx.numpy_helper.to_array(tensor))


def test_folded_weights_lie_where_the_others_lay(torch_onnx: Any) -> None:
    nodes = [node("Mul", ["w", "w"], ["square"]), node("MatMul", ["x", "square"], ["y"])]
    inputs, outputs = [value("x", ("N", 32))], [value("y", ("N", 64))]
    made = model(nodes, inputs, outputs, [weight("w", (32, 64))])
    with torch_export():
        torch_onnx.export(made, (), "m.onnx")
    (folded,) = onnx.load("m.onnx", load_external_data=False).graph.initializer
    assert folded.data_location == onnx.TensorProto.EXTERNAL
    assert operators("m.onnx") == ["MatMul"]
    with torch_export():
        torch_onnx.export(made, (), "n.onnx", external_data=False)
    assert files() == ["m.onnx", "m.onnx.data", "n.onnx"]


def test_no_file_of_weights_is_left_without_use(torch_onnx: Any) -> None:
    Path("other.onnx.data").write_bytes(b"of another model")
    with torch_export(external="never"):
        torch_onnx.export("mlp", (), "m.onnx")
    assert files() == ["m.onnx", "other.onnx.data"]
    with torch_export():
        torch_onnx.export("mlp", (), "m.onnx", dynamo=False, one_file=False)
    assert files() == ["m.onnx", "m.onnx.data", "other.onnx.data"]
    assert operators("m.onnx") == expected("mlp", False)


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_stream_gets_the_optimised_model_once(torch_onnx: Any, dynamo: bool) -> None:
    class Pipe:
        """Neither seekable nor readable."""

        def __init__(self) -> None:
            self.written: list[bytes] = []

        def write(self, data: bytes) -> int:
            self.written.append(data)
            return len(data)

    memory, pipe = io.BytesIO(), Pipe()
    with torch_export() as hook, Path("m.onnx").open("wb") as stream:
        torch_onnx.export("mlp", (), memory, dynamo=dynamo)
        torch_onnx.export("mlp", (), f=stream, dynamo=dynamo)
        torch_onnx.export("mlp", f=pipe, dynamo=dynamo)
    assert [outcome.name for outcome in hook.outcomes] == ["the stream"] * 3
    assert operators(onnx.load_model_from_string(memory.getvalue())) == expected("mlp", dynamo)
    assert [memory.getvalue()] == pipe.written == [Path("m.onnx").read_bytes()]


@pytest.mark.parametrize("target", [None, "m.onnx", io.BytesIO()])
def test_the_program_that_is_returned_is_optimised(torch_onnx: Any, target: Any) -> None:
    feed = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    raw = torch_onnx.export("mlp")
    with torch_export() as hook:
        program = torch_onnx.export("mlp", (), target)
    assert [report.validation.verdict for report in hook.reports] == ["proved"]
    assert isinstance(program.model, fake_torch.IrModel)
    assert operators(program.model_proto) == expected("mlp", True)
    assert len(operators(program.model_proto)) < len(operators(raw.model_proto))
    np.testing.assert_allclose(program(feed)[0], raw(feed)[0], atol=1e-5)
    program.save("saved.onnx")
    assert operators("saved.onnx") == expected("mlp", True)


def test_a_session_of_the_raw_program_is_not_used_again(torch_onnx: Any) -> None:
    def opened(*args: Any, **kwargs: Any) -> fake_torch.ONNXProgram:
        program = fake_torch.export("mlp")
        assert program is not None
        program(np.zeros((2, 16), np.float32))
        return program

    torch_onnx.export = opened
    with torch_export():
        assert torch_onnx.export("mlp")._session is None


def test_over_2_gb_a_program_reads_the_file(
    torch_onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proto(self: Result) -> onnx.ModelProto:
        raise ModelError("the model exceeds the 2 GB of one ModelProto")

    monkeypatch.setattr(Result, "proto", proto)
    with torch_export(on_error="raise"):
        program = torch_onnx.export("mlp", (), "m.onnx")
    assert operators(program.model_proto) == operators("m.onnx")
    with torch_export(), pytest.warns(ExportWarning, match="the program is kept .* 2 GB"):
        program = torch_onnx.export("mlp")
    assert operators(program.model_proto) == operators(fake_torch.recording("mlp", True))


def test_a_program_that_cannot_be_renewed_is_told_from_its_file(
    torch_onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with (
        torch_export() as hook,
        pytest.warns(ExportWarning, match=r"m\.onnx is optimised, but the program returned is not"),
    ):
        torch_onnx.export("mlp", (), "m.onnx")
    assert hook.outcomes[0].optimised
    with torch_export(on_error="raise"), pytest.raises(ImportError):
        torch_onnx.export("mlp", (), "m.onnx")


# -- the failure policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [False, True])
def test_keep_keeps_the_file_and_warns_where_it_was_exported(torch_onnx: Any, dynamo: bool) -> None:
    torch_onnx.export(noisy(), (), "raw.onnx", dynamo=dynamo)
    before = Path("raw.onnx").read_bytes()
    with torch_export() as hook, pytest.warns(ExportWarning) as caught:
        torch_onnx.export(noisy(), (), "m.onnx", dynamo=dynamo)
    (warning,) = caught
    start = "graphopt: m.onnx is kept as it was exported: nothing written: unproven: "
    assert str(warning.message) == f"{start}RandomNormalLike draw {NOISE}"
    assert warning.filename == __file__
    assert Path("m.onnx").read_bytes() == before
    assert [report.validation.verdict for report in hook.reports] == ["unproven"]
    assert isinstance(hook.outcomes[0].error, UnprovenError)


def test_raise_raises_and_keeps_the_file(torch_onnx: Any) -> None:
    with pytest.raises(UnprovenError), torch_export(on_error="raise") as hook:
        torch_onnx.export(noisy(), (), "m.onnx")
    assert operators("m.onnx") == operators(noisy())
    assert [report.validation.verdict for report in hook.reports] == ["unproven"]


@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_a_stream_gets_the_export_where_it_is_kept(torch_onnx: Any, on_error: Any) -> None:
    stream = io.BytesIO()
    with (
        torch_export(on_error=on_error),
        pytest.warns() if on_error == "keep" else pytest.raises(UnprovenError),
    ):
        torch_onnx.export(noisy(), (), stream)
    assert stream.getvalue() == noisy().SerializeToString()


def test_a_program_is_kept(torch_onnx: Any) -> None:
    with (
        torch_export(),
        pytest.warns(ExportWarning, match="the program is kept as it was exported"),
    ):
        program = torch_onnx.export(noisy())
    assert operators(program.model_proto) == operators(noisy())


def test_any_error_is_subject_to_the_policy(
    torch_onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(exported, "optimize", broken)
    with torch_export() as hook, pytest.warns(ExportWarning, match="ZeroDivisionError: two lines$"):
        torch_onnx.export("mlp", (), "m.onnx")
    assert hook.reports == []
    assert operators("m.onnx") == operators(fake_torch.recording("mlp", True))
    with torch_export(on_error="raise"), pytest.raises(ZeroDivisionError):
        torch_onnx.export("mlp", (), "m.onnx")


def test_nothing_is_half_written(torch_onnx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_onnx.export("mlp", (), "m.onnx")
    before = {name: Path(name).read_bytes() for name in files()}

    def full(self: output.Target, staged: list[Path]) -> list[Path]:
        raise OutputError(f"{self.path}: cannot be written: No space left on device")

    monkeypatch.setattr(output.Target, "commit", full)
    with torch_export(), pytest.warns(ExportWarning, match="No space left on device$"):
        torch_onnx.export("mlp", (), "m.onnx")
    assert {name: Path(name).read_bytes() for name in files()} == before


def test_a_link_into_another_folder(torch_onnx: Any) -> None:
    Path("real").mkdir()
    Path("m.onnx").symlink_to(Path("real/real.onnx"))
    with torch_export(), pytest.warns(ExportWarning, match="is a symbolic link into another"):
        torch_onnx.export("mlp", (), "m.onnx")
    assert files() == ["m.onnx", "m.onnx.data", "real", "real/real.onnx"]
    with torch_export():  # without external data there is nothing to get lost
        torch_onnx.export("mlp", (), "m.onnx", dynamo=False)
    assert Path("m.onnx").is_symlink()
    assert operators("real/real.onnx") == expected("mlp", False)


def test_a_link_within_the_folder(torch_onnx: Any) -> None:
    Path("m.onnx").symlink_to(Path("real.onnx"))
    Path("real.onnx").touch()
    with torch_export():
        torch_onnx.export("mlp", (), "m.onnx")
    assert files() == ["m.onnx", "real.onnx", "real.onnx.data"]
    assert Path("m.onnx").is_symlink()
    onnx.checker.check_model("m.onnx")
    onnxruntime.InferenceSession("m.onnx")


# -- options ---------------------------------------------------------------------------------------


def test_options_are_passed_on(torch_onnx: Any) -> None:
    with torch_export(level=0) as hook:
        torch_onnx.export("mlp", (), "m.onnx")
    assert hook.reports[0].level == 0
    assert operators("m.onnx") == operators(fake_torch.recording("mlp", True))
    with torch_export(passes="remove-dead", validate=False) as hook:
        torch_onnx.export("mlp", (), "m.onnx")
    assert hook.reports[0].pipeline == "remove-dead"
    assert hook.reports[0].validation.verdict == "skipped"
    with torch_export(unproven=True):
        torch_onnx.export(noisy(), (), "m.onnx")
    assert operators("m.onnx") == ["RandomNormalLike", "Add"]


def test_initializers_that_shall_be_inputs_stay_inputs(torch_onnx: Any) -> None:
    with torch_export():
        torch_onnx.export("mlp", (), "m.onnx", dynamo=False, keep_initializers_as_inputs=True)
    assert len(onnx.load("m.onnx").graph.input) > 1
    with torch_export(keep_overridable=False):
        torch_onnx.export("mlp", (), "m.onnx", dynamo=False, keep_initializers_as_inputs=True)
    assert len(onnx.load("m.onnx").graph.input) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 9}, UsageError, "level"),
        ({"passes": "no-such-pass"}, UsageError, "no-such-pass"),
        ({"on_error": "ignore"}, UsageError, "on_error 'ignore': there are 'keep' and 'raise'"),
        ({"levle": 1}, TypeError, r"torch_export\(\) got an unexpected keyword argument 'levle'"),
    ],
)
def test_wrong_options_are_refused_at_once(
    torch_onnx: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), torch_export(**options):
        pytest.fail("the block was entered")
    assert torch_onnx.export is fake_torch.export


# -- the patch -------------------------------------------------------------------------------------


def test_the_signature_stays(torch_onnx: Any) -> None:
    with torch_export():
        assert inspect.signature(torch_onnx.export) == inspect.signature(fake_torch.export)
        assert torch_onnx.export.__doc__ == fake_torch.export.__doc__
        with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
            torch_onnx.export("mlp", no_such=1)
    assert torch_onnx.export is fake_torch.export


def test_the_exporter_is_restored_after_an_exception(torch_onnx: Any) -> None:
    with pytest.raises(KeyError), torch_export():
        raise KeyError
    assert torch_onnx.export is fake_torch.export


def test_errors_of_the_exporter_pass_through(torch_onnx: Any) -> None:
    def fail() -> None:
        raise FloatingPointError

    with torch_export() as hook, pytest.raises(FloatingPointError):
        torch_onnx.export("mlp", (), "m.onnx", before=fail)
    assert hook.outcomes == []
    assert files() == []


def test_of_nested_blocks_the_innermost_does_the_work(torch_onnx: Any) -> None:
    with torch_export() as outer:
        with torch_export(level=1) as inner:
            torch_onnx.export("mlp", (), "m.onnx")
        torch_onnx.export("cnn", (), "n.onnx")
    assert [report.level for report in inner.reports] == [1]
    assert [outcome.name for outcome in outer.outcomes] == ["n.onnx"]
    assert torch_onnx.export is fake_torch.export


def test_an_exporter_that_falls_back_to_another_makes_one_export(torch_onnx: Any) -> None:
    with torch_export() as hook:
        torch_onnx.export(
            "mlp", (), "m.onnx", before=lambda: torch_onnx.export("mlp", (), "m.onnx", dynamo=False)
        )
    assert len(hook.outcomes) == 1


def test_other_threads_export_as_ever(torch_onnx: Any) -> None:
    with torch_export() as hook:
        thread = threading.Thread(target=torch_onnx.export, args=("mlp", (), "m.onnx"))
        thread.start()
        thread.join()
    assert hook.outcomes == []
    assert operators("m.onnx") == operators(fake_torch.recording("mlp", True))


def test_blocks_of_threads_may_end_in_any_order(torch_onnx: Any) -> None:
    entered, left = threading.Event(), threading.Event()
    outcomes = []

    def other() -> None:
        with torch_export() as hook:
            entered.set()
            left.wait(60)
            torch_onnx.export("mlp", (), "m.onnx")
            outcomes.extend(hook.outcomes)

    thread = threading.Thread(target=other)
    with torch_export():
        thread.start()
        entered.wait(60)
    left.set()
    thread.join()
    assert [outcome.name for outcome in outcomes] == ["m.onnx"]
    assert torch_onnx.export is fake_torch.export


def test_what_others_put_in_place_stays(torch_onnx: Any) -> None:
    def others(*args: Any, **kwargs: Any) -> None:
        return None

    with torch_export():
        torch_onnx.export = others
    assert torch_onnx.export is others


# -- without the hook, without torch ---------------------------------------------------------------


def test_a_file_of_any_exporter() -> None:
    fake_torch.export("mlp", (), "m.onnx")
    outcome = optimize_export("m.onnx", level=2)
    assert outcome.optimised
    assert outcome.report is not None
    assert outcome.report.validation.verdict == "proved"
    assert operators("m.onnx") == expected("mlp", True)
    assert files() == ["m.onnx", "m.onnx.data"]
    optimize_export(Path("m.onnx"), external="never")
    assert files() == ["m.onnx"]


def test_weights_that_another_model_may_share_stay() -> None:
    fake_torch.export("mlp", (), "m.onnx", dynamo=False, one_file=False)
    before = files()
    optimize_export("m.onnx")
    assert files() == sorted([*before, "m.onnx.data"])


def test_a_file_that_is_kept() -> None:
    Path("m.onnx").write_bytes(noisy().SerializeToString())
    with pytest.warns(ExportWarning, match=r"m\.onnx is kept as it was exported") as caught:
        outcome = optimize_export("m.onnx")
    assert caught[0].filename == __file__
    assert not outcome.optimised
    assert isinstance(outcome.error, UnprovenError)
    assert "passes=" not in repr(outcome)
    with pytest.raises(UnprovenError):
        optimize_export("m.onnx", on_error="raise")
    with pytest.warns(ExportWarning, match="missing.onnx: no such file"):
        assert optimize_export("missing.onnx").report is None
    with pytest.raises(TypeError, match=r"optimize_export\(\) got an unexpected keyword"):
        optimize_export("m.onnx", levle=1)  # type: ignore[call-arg]


def test_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.onnx")
    monkeypatch.setitem(sys.modules, "torch", None)
    with (
        pytest.raises(UsageError, match="torch_export needs PyTorch, but importing it failed: "),
        torch_export(),
    ):
        pytest.fail("the block was entered")


def test_torch_is_imported_by_a_block_only() -> None:
    code = "import graphopt, sys; graphopt.hooks.torch_export(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert graphopt.hooks.torch_export is torch_export
