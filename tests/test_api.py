"""`optimize`: sources, outputs, verdicts, the report, and never a half-written file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphopt
from graphopt import output as output_module
from graphopt.api import Result, optimize
from graphopt.blame import Blame
from graphopt.edit import Editor
from graphopt.errors import (
    DataError,
    GraphoptError,
    ModelError,
    OutputError,
    RefusedError,
    UnprovenError,
    UsageError,
    ValidationError,
)
from graphopt.ir import Model
from graphopt.manager import to_text
from graphopt.passes.pipelines import LEVELS, PASSES, pipeline
from graphopt.report import Report
from graphopt.runtime import Limits
from tests.graphs import matmul, model, node, save, value, weight


def steps(level: int = 2) -> list[str]:
    """What a level runs, as the report spells it."""
    return [to_text(step) for step in pipeline(level, None)]


def untidy() -> onnx.ModelProto:
    """y = x w, with an Identity in between, a dead branch, and w listed as an input."""
    nodes = [
        node("Identity", ["x"], ["same"]),
        node("MatMul", ["same", "w"], ["y"]),
        node("Neg", ["x"], ["dead"]),
    ]
    inputs = [value("x", ("N", 16)), value("w", (16, 32))]
    unused = weight("unused", (8, 8), seed=1)
    return model(nodes, inputs, [value("y", ("N", 32))], [weight("w"), unused])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return save(untidy(), folder / "source.onnx")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@dataclasses.dataclass(frozen=True)
class SwapOperands:
    """A wrong pass: x - y becomes y - x."""

    name: ClassVar[str] = "swap-operands"

    def run(self, model: Model, edit: Editor) -> None:
        for made in model.graph.nodes:
            if made.op == "Sub":
                first, second = made.inputs
                edit.set_input(made, 0, second)
                edit.set_input(made, 1, first)
                edit.record("swap-operands", "y", "x - z", "z - x")


@dataclasses.dataclass(frozen=True)
class BreakDown:
    """A pass that fails after it has begun."""

    name: ClassVar[str] = "break-down"

    def run(self, model: Model, edit: Editor) -> None:
        SwapOperands().run(model, edit)
        raise RuntimeError("half way through")


@pytest.fixture
def wrong_passes() -> Iterator[None]:
    PASSES["swap-operands"] = SwapOperands
    PASSES["break-down"] = BreakDown
    yield
    del PASSES["swap-operands"], PASSES["break-down"]


def subtraction() -> onnx.ModelProto:
    return model([node("Sub", ["x", "z"], ["y"])], ["x", "z"])


def dead_end() -> onnx.ModelProto:
    return model([node("Sub", ["x", "x"], ["y"])])


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# ------------------------------------------------------------------------------- sources and saving


def test_a_path_is_optimised_proved_and_written(source: Path, place: Path) -> None:
    before = source.read_bytes()
    result = optimize(source, place / "out.onnx")
    assert source.read_bytes() == before
    assert listing(place) == ["out.onnx"]
    written = onnx.load(place / "out.onnx")
    assert [made.op_type for made in written.graph.node] == ["MatMul"]
    assert [info.name for info in written.graph.input] == ["x"]
    assert [tensor.name for tensor in written.graph.initializer] == ["w"]
    assert result.report.validation.verdict == "proved"
    assert result.report.target is not None
    assert result.report.target.path == str(place / "out.onnx")
    assert result.report.target.bytes == (place / "out.onnx").stat().st_size
    onnx.checker.check_model(written, full_check=True)


def test_text_is_a_path_too(source: Path, place: Path) -> None:
    optimize(str(source), str(place / "out.onnx"))
    assert listing(place) == ["out.onnx"]


def test_a_proto_is_left_untouched(place: Path) -> None:
    proto = untidy()
    before = proto.SerializeToString(deterministic=True)
    result = optimize(proto, place / "out.onnx")
    assert proto.SerializeToString(deterministic=True) == before
    assert result.report.validation.verdict == "proved"
    assert result.report.source.path == ""
    assert result.report.source.bytes == len(before)
    assert [made.op_type for made in onnx.load(place / "out.onnx").graph.node] == ["MatMul"]


def test_without_an_output_nothing_is_written(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = optimize(source)
    assert listing(place) == []
    assert listing(source.parent) == ["source.onnx"]
    assert result.report.target is None
    assert result.report.validation.verdict == "proved"


def test_proto_and_save_give_the_same_model(source: Path, place: Path) -> None:
    result = optimize(source, place / "out.onnx")
    written = (place / "out.onnx").read_bytes()
    assert result.proto().SerializeToString(deterministic=True) == onnx.load(
        place / "out.onnx"
    ).SerializeToString(deterministic=True)
    assert result.save(place / "again.onnx") == [place / "again.onnx"]
    assert (place / "again.onnx").read_bytes() == written
    assert result.save(str(place / "again.onnx")) == [place / "again.onnx"]


def test_optimising_twice_gives_the_same_bytes(source: Path, place: Path) -> None:
    optimize(source, place / "a.onnx")
    optimize(source, place / "b.onnx")
    optimize(place / "a.onnx", place / "c.onnx")
    contents = {(place / name).read_bytes() for name in ("a.onnx", "b.onnx", "c.onnx")}
    assert len(contents) == 1


def test_in_place(source: Path) -> None:
    before, size = source.read_bytes(), source.stat().st_size
    report = optimize(source, source).report
    assert listing(source.parent) == ["source.onnx"]
    assert source.read_bytes() != before
    assert report.source.bytes == size
    assert report.target is not None
    assert report.target.bytes == source.stat().st_size < size
    assert optimize(source).report.passes[0].changes == []


def test_external_data_as_asked(source: Path, place: Path) -> None:
    optimize(source, place / "inside.onnx")
    assert listing(place) == ["inside.onnx"]
    report = optimize(source, place / "beside.onnx", external="always").report
    assert listing(place) == ["beside.onnx", "beside.onnx.data", "inside.onnx"]
    assert report.target is not None
    total = sum((place / name).stat().st_size for name in ("beside.onnx", "beside.onnx.data"))
    assert report.target.bytes == total
    kept = optimize(place / "beside.onnx", place / "kept.onnx").report
    assert (place / "kept.onnx.data").exists()
    assert kept.source.bytes == total
    optimize(place / "beside.onnx", place / "back.onnx", external="never")
    assert not (place / "back.onnx.data").exists()
    assert (place / "back.onnx").read_bytes() == (place / "inside.onnx").read_bytes()


def test_in_place_with_external_data(source: Path, place: Path) -> None:
    optimize(source, place / "m.onnx", level=0, external="always")
    expected = numpy_helper.to_array(optimize(source).proto().graph.initializer[0])
    for _ in range(2):
        optimize(place / "m.onnx", place / "m.onnx")
        assert listing(place) == ["m.onnx", "m.onnx.data"]
        loaded = onnx.load(place / "m.onnx")
        np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), expected)


def test_models_too_large_for_one_file(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "PROTO_LIMIT", 1024)
    with pytest.raises(ModelError, match="over the 2 GB that one file can hold"):
        optimize(source, place / "never.onnx", external="never")
    assert listing(place) == []
    result = optimize(source, place / "auto.onnx")
    assert listing(place) == ["auto.onnx", "auto.onnx.data"]
    assert result.report.validation.verdict == "proved"
    with pytest.raises(ModelError, match="exceeds the 2 GB of one ModelProto; save it to a file"):
        result.proto()


def test_save_is_atomic(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = optimize(source)
    (place / "old.onnx").write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module, "_stream", full)
    with pytest.raises(OutputError) as caught:
        result.save(place / "old.onnx")
    assert str(caught.value) == f"{place / 'old.onnx'}: cannot be written: No space left on device"
    assert (place / "old.onnx").read_bytes() == b"old"
    assert listing(place) == ["old.onnx"]


# -------------------------------------------------------------------------- levels, passes, options


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_levels(source: Path, place: Path, level: int) -> None:
    report = optimize(source, place / "out.onnx", level=level).report
    assert report.level == level
    assert report.pipeline == ", ".join(steps(level))
    assert report.after.nodes == (3 if level == 0 else 1)
    if level == 0:
        assert (place / "out.onnx").read_bytes() == source.read_bytes()


def test_passes_replace_those_of_the_level(source: Path) -> None:
    report = optimize(source, passes="remove-dead, freeze-parameters").report
    assert report.pipeline == "remove-dead, freeze-parameters"
    assert optimize(source, passes="").report.pipeline == ""
    twice = optimize(source, passes="remove-dead, remove-dead").report
    assert [bool(run.changes) for run in twice.passes] == [True, False]


def test_overridable_weights_are_kept_on_demand(source: Path) -> None:
    kept = optimize(source, keep_overridable=True)
    assert [info.name for info in kept.proto().graph.input] == ["x", "w"]
    expected = [step for step in steps() if step != "freeze-parameters"]
    assert kept.report.pipeline == ", ".join(expected)
    assert len(expected) < len(steps())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 4}, "level 4: there are levels 0 to 3"),
        ({"level": -1}, "level -1: there are levels 0 to 3"),
        ({"target": "gpu"}, "target 'gpu': there are 'portable' and 'ort-cpu'"),
        ({"passes": "nope"}, f"passes: there is no pass 'nope'; there are: {', '.join(PASSES)}"),
        (
            {"passes": "remove-dead{}}"},
            "passes: cannot read 'remove-dead{}}'; write 'name, name{option=value}'",
        ),
        (
            {"passes": "remove-dead{x=1}"},
            "passes: remove-dead has no option 'x=1'; its options: none",
        ),
    ],
)
def test_unknown_choices_are_refused(
    source: Path, place: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        optimize(source, place / "out.onnx", **options)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2
    assert listing(place) == []


def test_both_targets_are_known(source: Path) -> None:
    for target in ("portable", "ort-cpu"):
        assert optimize(source, target=target).report.validation.verdict == "proved"  # type: ignore[arg-type]


def test_missing_and_broken_sources_write_nothing(place: Path) -> None:
    with pytest.raises(UsageError):
        optimize(place / "missing.onnx", place / "out.onnx")
    (place / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        optimize(place / "broken.onnx", place / "out.onnx")
    assert listing(place) == ["broken.onnx"]


def test_an_output_that_cannot_be_written(source: Path, place: Path) -> None:
    with pytest.raises(OutputError) as caught:
        optimize(source, place / "nowhere" / "out.onnx")
    expected = f"{place / 'nowhere' / 'out.onnx'}: cannot be written: No such file or directory"
    assert str(caught.value) == expected
    with pytest.raises(OutputError, match="it is a directory"):
        optimize(source, place)


def test_data_proves_and_bad_data_writes_nothing(source: Path, place: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 16)).astype("f")
    np.savez(source.parent / "d.npz", x=rows)
    report = optimize(source, place / "out.onnx", data=str(source.parent / "d.npz")).report
    assert [feed.kind for feed in report.validation.feeds] == ["given"] * 5
    (place / "out.onnx").unlink()
    np.savez(source.parent / "d.npz", z=rows)
    with pytest.raises(DataError):
        optimize(source, place / "out.onnx", data=str(source.parent / "d.npz"))
    assert listing(place) == []


def test_seeds_choose_the_feeds(source: Path) -> None:
    def signal(**options: Any) -> float:
        return optimize(source, **options).report.validation.outputs[0].signal

    assert signal() == signal(seed=0) != signal(seed=1)


# ----------------------------------------------------------------------------------------- verdicts


@pytest.mark.usefixtures("wrong_passes")
@pytest.mark.parametrize("from_proto", [False, True])
def test_a_wrong_pass_is_found_and_denied(tmp_path: Path, place: Path, from_proto: bool) -> None:
    path = save(subtraction(), tmp_path / "s.onnx")
    source = subtraction() if from_proto else path
    report = optimize(source, place / "out.onnx", passes="swap-operands, remove-dead").report
    assert list(onnx.load(place / "out.onnx").graph.node[0].input) == ["x", "z"]
    assert report.validation.verdict == "proved"
    assert [run.text for run in report.passes] == ["swap-operands", "remove-dead"]
    assert [run.changes for run in report.passes] == [[], []]
    (fault,) = report.blame
    assert (fault.verdict, fault.rule, fault.root) == ("blamed", "swap-operands", "y")
    assert (fault.pass_text, fault.first_diverging) == ("swap-operands", "y")
    assert fault.error > 0.1
    assert fault.reproducer == str(place / "out.onnx.blame" / "swap-operands")
    assert report.warnings == [
        "pass swap-operands failed and was undone: its change swap-operands at 'y' is denied",
        fault.message,
    ]
    assert fault.message.startswith(
        "rule swap-operands (pass swap-operands) is wrong at 'y' and denied there: 'y' strays by "
    )
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.usefixtures("wrong_passes")
def test_a_wrong_result_that_nothing_mends_is_not_written(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blame, "rescue", lambda *_: None)
    (place / "out.onnx").write_bytes(b"what was there")
    path = save(subtraction(), tmp_path / "s.onnx")
    with pytest.raises(ValidationError) as caught:
        # a difference is not excused by `unproven`
        optimize(path, place / "out.onnx", passes="swap-operands, remove-dead", unproven=True)
    assert (place / "out.onnx").read_bytes() == b"what was there"
    assert listing(place) == ["out.onnx"]
    message = str(caught.value)
    assert message.startswith("nothing written: failed: output 'y': error ")
    assert "\n" not in message
    assert "--unproven" not in message
    assert caught.value.exit_code == 1
    report = caught.value.report
    assert report is not None
    assert report.target is None
    assert report.validation.verdict == "failed"
    (change,) = report.passes[0].changes
    assert (change.rule, change.root) == ("swap-operands", "y")
    assert (change.before, change.after) == ("x - z", "z - x")
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.usefixtures("wrong_passes")
def test_in_place_a_wrong_result_leaves_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Blame, "rescue", lambda *_: None)
    path = save(subtraction(), tmp_path / "s.onnx")
    before = path.read_bytes()
    with pytest.raises(ValidationError):
        optimize(path, path, passes="swap-operands")
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["s.onnx"]


@pytest.mark.usefixtures("wrong_passes")
def test_without_validation_a_wrong_pass_goes_unseen(tmp_path: Path, place: Path) -> None:
    """Which is why it is on unless somebody switches it off, and the report says that."""
    path = save(subtraction(), tmp_path / "s.onnx")
    report = optimize(path, place / "out.onnx", passes="swap-operands", validate=False).report
    assert report.validation.verdict == "skipped"
    assert report.validation.reason == "validation was switched off"
    assert list(onnx.load(place / "out.onnx").graph.node[0].input) == ["z", "x"]
    assert optimize(path, validate=False).report.target is None


@pytest.mark.usefixtures("wrong_passes")
def test_a_pass_that_raises_is_undone_and_the_rest_goes_on(tmp_path: Path, place: Path) -> None:
    path = save(subtraction(), tmp_path / "s.onnx")
    report = optimize(path, place / "out.onnx", passes="break-down, remove-dead").report
    assert report.validation.verdict == "proved"
    expected = "pass break-down failed and was undone: RuntimeError: half way through"
    assert report.warnings == [expected]
    assert report.passes[0].error == "RuntimeError: half way through"
    assert report.passes[0].changes == []
    assert report.passes[1].error == ""
    assert list(onnx.load(place / "out.onnx").graph.node[0].input) == ["x", "z"]


def test_what_cannot_be_proved_is_written_on_demand_only(tmp_path: Path, place: Path) -> None:
    path = save(dead_end(), tmp_path / "d.onnx")
    with pytest.raises(UnprovenError) as caught:
        optimize(path, place / "out.onnx")
    message = str(caught.value)
    assert message.startswith("nothing written: unproven: none of ")
    assert message.endswith("; give --data; --unproven writes it all the same")
    assert caught.value.exit_code == 1
    assert caught.value.report is not None
    assert caught.value.report.validation.verdict == "unproven"
    assert caught.value.report.target is None
    assert listing(place) == []
    report = optimize(path, place / "out.onnx", unproven=True).report
    assert report.validation.verdict == "unproven"
    assert report.target is not None
    assert listing(place) == ["out.onnx"]


def test_foreign_operators_are_refused_with_their_remedy(place: Path) -> None:
    foreign = model([node("Mystery", ["x"], ["y"], domain="own")], domains=["own"])
    with pytest.raises(RefusedError, match="domain own need their library: --custom-ops"):
        optimize(foreign, place / "out.onnx")
    with pytest.raises(UnprovenError, match="does not load the original"):
        optimize(foreign, place / "out.onnx", custom_ops=[str(place / "missing.so")])
    assert listing(place) == []


def test_an_interruption_leaves_nothing(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.validate.validate_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimize(source, place / "out.onnx")
    assert listing(place) == []


# --------------------------------------------------------------------------------------- the report


def test_the_report_tells_what_was_done(source: Path, place: Path) -> None:
    report = optimize(source, place / "out.onnx").report
    assert report.schema_version == 1
    assert report.graphopt == metadata.version("graphopt")
    assert report.source.path == str(source)
    assert report.source.bytes == source.stat().st_size
    assert report.opsets == {"": 17}
    assert report.warnings == []
    assert report.before.nodes == 3
    assert report.before.operators == {"Identity": 1, "MatMul": 1, "Neg": 1}
    assert (report.before.initializers, report.before.parameters) == (2, 16 * 32 + 64)
    assert report.before.weight_bytes == 4 * (16 * 32 + 64)
    assert report.after.operators == {"MatMul": 1}
    assert (report.after.initializers, report.after.weight_bytes) == (1, 4 * 16 * 32)
    assert report.pipeline == ", ".join(steps())
    assert [run.text for run in report.passes] == steps()
    assert all(run.seconds >= 0 for run in report.passes)
    assert report.seconds > sum(run.seconds for run in report.passes)
    assert report.validation.outputs[0].name == "y"


def test_every_change_has_its_before_and_after(source: Path) -> None:
    found = [change for run in optimize(source).report.passes for change in run.changes]
    by_root = {change.root: change for change in found}
    assert set(by_root) == {"w", "same", "dead", "unused"}
    assert by_root["w"].rule == "freeze-parameter"
    assert "Identity" in by_root["same"].before
    assert "Identity" not in by_root["same"].after
    assert (by_root["dead"].before, by_root["dead"].after) == ("dead = Neg (x)", "")
    assert by_root["unused"].before == "unused [8,8], 256 B"


def test_the_report_names_the_host(source: Path) -> None:
    host = optimize(source).report.host
    assert host.cpu
    assert host.system
    assert host.python.count(".") == 2
    assert set(host.versions) == {"onnx", "onnxruntime", "numpy"}
    assert host.versions["onnx"] == onnx.__version__


def test_the_report_survives_json(source: Path, place: Path) -> None:
    report = optimize(source, place / "out.onnx").report
    assert Report.model_validate_json(report.model_dump_json()) == report
    for infinite in (float("inf"), -float("inf")):
        record = report.validation.outputs[0].model_copy(update={"used": infinite})
        again = type(record).model_validate_json(record.model_dump_json())
        assert again.used == infinite


def test_progress_names_every_step(source: Path, place: Path) -> None:
    told: list[str] = []
    optimize(source, place / "out.onnx", progress=lambda what, share: told.append(what))
    phases = list(dict.fromkeys(told))
    names = [step.partition("{")[0] for step in steps()]
    expected = list(dict.fromkeys(["reading", *names, "writing", "finding feeds"]))
    assert phases[: len(expected)] == expected
    assert phases[-1] == "running candidate default"


def test_the_package_offers_it() -> None:
    assert graphopt.optimize is optimize
    result = graphopt.optimize(matmul())
    assert isinstance(result, Result)
    assert issubclass(ValidationError, GraphoptError)


def test_the_weights_of_the_input_are_never_replaced_by_those_of_the_output(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(untidy(), tmp_path / "plain.onnx")
    graphopt.optimize(tmp_path / "plain.onnx", source, external="always", validate=False)
    (tmp_path / "in.onnx.data").rename(tmp_path / "out.onnx.data")
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "out.onnx.data"
    source.write_bytes(proto.SerializeToString())
    before = (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(OutputError, match=r"would replace out\.onnx\.data, which .*in\.onnx reads"):
        graphopt.optimize(source, target, external="always")
    assert (tmp_path / "out.onnx.data").read_bytes() == before
    assert not target.exists()


# ------------------------------------------------------------------------------- shapes and opsets


def test_shapes_and_opset_are_done_first_and_reported(source: Path, place: Path) -> None:
    result = optimize(source, place / "out.onnx", shapes={"x": [3, -1]}, opset=20)
    report = result.report
    wanted = ["fix-shapes{shapes=x:3x-1}", "convert-opset{opset=20}", *steps()]
    assert [one.text for one in report.passes] == wanted
    assert report.pipeline == ", ".join(wanted)
    assert (report.opsets_before[""], report.opsets[""]) == (17, 20)
    assert report.passes[0].changes[0].before == "x: float[N,16]"
    assert report.passes[0].changes[0].after == "x: float[3,16]"
    assert report.validation.verdict == "proved"


def test_a_fault_is_denied_and_what_was_requested_stays(place: Path, wrong_passes: None) -> None:
    proto = model(
        [node("Sub", ["x", "z"], ["y"])],
        [value("x", ("N", 4)), value("z", (4,))],
        [value("y", ("N", 4))],
    )
    report = optimize(
        proto, place / "out.onnx", passes="swap-operands", shapes={"x": [2, 4]}, opset=20
    ).report
    assert [fault.rule for fault in report.blame] == ["swap-operands"]
    assert report.validation.notes == ["compared at x:2x4"]
    written = onnx.load(place / "out.onnx")
    assert written.opset_import[0].version == 20
    assert list(written.graph.node[0].input) == ["x", "z"]
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    before = onnx.load(Path(report.blame[0].reproducer) / "before.onnx")
    assert before.opset_import[0].version == 20  # it reproduces without what was requested


def test_what_was_requested_must_not_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("half way through")

    monkeypatch.setattr("graphopt.passes.canonicalize.convert_opset.ConvertOpset.run", fail)
    with pytest.raises(UsageError, match=r"convert-opset.*failed: RuntimeError: half way through"):
        optimize(untidy(), opset=20)


def test_an_opset_that_cannot_be_proved_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("graphopt.runtime.limits", lambda: Limits(ir=10, opset=19))
    with pytest.raises(UsageError, match=r"opset 20: .* runs models up to opset 19, so nothing"):
        optimize(untidy(), opset=20)
    assert optimize(untidy(), opset=20, validate=False).report.opsets[""] == 20
