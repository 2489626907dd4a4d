"""A planted wrong rule is found, denied, named and reproduced; the rest is kept and proved."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from graphopt import divergence, exporter
from graphopt.api import optimize
from graphopt.blame import Blame, Fault, _Probe, _Search
from graphopt.cli import app
from graphopt.edit import Editor
from graphopt.errors import ValidationError
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import PASSES, pipeline
from graphopt.report import Report
from graphopt.rules import RULES, Const, Ops, Rewrite, RuleFunction, Var, compile_rule
from graphopt.trial import Outcome, Trial
from tests import graphs
from tests.graphs import parsed, save, weight

CHAIN = """
agraph (float[N, 8] x) => (float[N, 8] y)
<float two = {2.0}, float three = {3.0}, float five = {5.0}> {
    a = Identity (x)
    b = Mul (a, two)
    c = Tanh (b)
    d = Mul (c, three)
    e = Sin (d)
    f = Identity (e)
    g = Mul (f, five)
    h = Relu (g)
    y = Add (h, c)
}
"""

BODIES = """
agraph (float[N, 8] x, bool flag) => (float[N, 8] y)
{
    a = Identity (x)
    y = If (flag) <
        then_branch = then_graph () => (float[N, 8] t) { t1 = Relu (a) t = Sin (t1) },
        else_branch = else_graph () => (float[N, 8] e) { e1 = Identity (a) e = Cos (e1) }
    >
}
"""


@contextlib.contextmanager
def planted(function: RuleFunction, name: str = "planted") -> Iterator[None]:
    """The rule stands in front of all right ones of canonicalize."""
    function.__module__ = "graphopt.passes.canonicalize.planted"
    pipeline(2, None)
    right = dict(RULES)
    RULES.clear()
    RULES[name] = compile_rule(name, function)
    RULES.update(right)
    try:
        yield
    finally:
        del RULES[name]


def off_by_a_percent(op: Ops, x: Var, c: Const) -> Rewrite:
    """Mul(x, c) => Div(x, 0.99/c)."""
    yield op.Mul(x, c)
    return op.Div(x, 0.99 / c.values)


def wrong_for_three(op: Ops, x: Var, c: Const) -> Rewrite:
    """Mul(x, c) => Div(x, 1/c), but for c = 3."""
    yield op.Mul(x, c)
    return op.Div(x, 1 / c.values + (c.scalar() == 3))


def no_relu(op: Ops, x: Var) -> Rewrite:
    """Relu(x) => x."""
    yield op.Relu(x)
    return x


def out_of_bounds(op: Ops, x: Var) -> Rewrite:
    """Relu(x) => x + an element that is not there."""
    yield op.Relu(x)
    return op.Add(x, op.Gather(np.zeros(3, np.float32), np.array(7)))


def a_few_ulps(op: Ops, x: Var, c: Const) -> Rewrite:
    """Mul(x, c) => Div(x, 1/c), the last digits wrong."""
    yield op.Mul(x, c)
    return op.Div(x, (1 + 4e-6) / c.values)


def rules_of(report: Report) -> list[str]:
    return [change.rule for step in report.passes for change in step.changes]


def run(text: str, folder: Path) -> Report:
    return optimize(save(parsed(text), folder / "in.onnx"), folder / "out.onnx").report


# -- whole runs ------------------------------------------------------------------------------------


def test_one_wrong_change_is_denied_and_the_others_of_its_rule_are_kept(tmp_path: Path) -> None:
    with planted(wrong_for_three):
        report = run(CHAIN, tmp_path)
    assert report.validation.verdict == "proved"
    assert report.target is not None
    (fault,) = report.blame
    assert (fault.verdict, fault.scope) == ("blamed", "change")
    assert (fault.rule, fault.root) == ("planted", "d")
    assert fault.pass_text == "canonicalize"
    assert fault.first_diverging == "d"
    assert fault.error > 0.1
    assert fault.message == (
        f"rule planted (pass canonicalize) is wrong at 'd' and denied there: 'd' strays by "
        f"{fault.error:.2g} of its variation, 1e-05 is allowed; see {fault.reproducer}"
    )
    assert report.warnings == [fault.message]
    assert rules_of(report).count("planted") == 2
    assert rules_of(report).count("eliminate-identity") == 2
    written = onnx.load(tmp_path / "out.onnx")
    assert [made.op_type for made in written.graph.node].count("Div") == 2
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_reproducer_is_the_model_just_before_and_one_command(tmp_path: Path) -> None:
    with planted(wrong_for_three):
        report = run(CHAIN, tmp_path)
        folder = tmp_path / "out.onnx.blame" / "planted"
        assert report.blame[0].reproducer == str(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["before.onnx", "pipeline.txt"]
        line = (folder / "pipeline.txt").read_text("utf-8")
        words = ["graphopt", "optimize", "before.onnx", "after.onnx"]
        assert shlex.split(line) == [*words, "--passes", "canonicalize{rules=planted}"]
        before = folder / "before.onnx"
        again = optimize(before, folder / "after.onnx", passes="canonicalize{rules=planted}").report
    operators = [made.op_type for made in onnx.load(before).graph.node]
    assert (operators.count("Div"), operators.count("Mul")) == (1, 2)  # the next is the wrong one
    assert [(fault.rule, fault.root) for fault in again.blame] == [("planted", "d")]


def test_a_rule_is_denied_after_three_faults(tmp_path: Path) -> None:
    with planted(off_by_a_percent):
        report = run(CHAIN.replace("y = Add", "i = Mul (h, two)\n y = Add"), tmp_path)
    assert report.validation.verdict == "proved"
    assert [fault.scope for fault in report.blame] == ["change", "change", "rule"]
    assert {fault.rule for fault in report.blame} == {"planted"}
    assert len({fault.root for fault in report.blame} & {"b", "d", "g", "i"}) == 3
    assert " and, after 3 faults, denied everywhere: " in report.blame[2].message
    assert "planted" not in rules_of(report)
    assert len({fault.reproducer for fault in report.blame}) == 1


def test_a_fault_that_leaves_no_node_is_found(tmp_path: Path) -> None:
    """Where a node goes, no stamp tells: bisecting does."""
    with planted(no_relu):
        report = run(CHAIN, tmp_path)
    assert report.validation.verdict == "proved"
    assert [(fault.rule, fault.root) for fault in report.blame] == [("planted", "h")]
    assert report.blame[0].first_diverging == "y"  # its name is gone
    assert "Relu" in report.after.operators
    assert rules_of(report).count("eliminate-identity") == 2


def test_a_fault_in_a_body_is_found(tmp_path: Path) -> None:
    with planted(no_relu):
        report = run(BODIES, tmp_path)
    assert report.validation.verdict == "proved"
    assert [(fault.rule, fault.root) for fault in report.blame] == [("planted", "t1")]
    assert report.blame[0].first_diverging == "y"
    assert rules_of(report).count("eliminate-identity") == 2


def test_a_result_that_does_not_run_has_a_culprit_too(tmp_path: Path) -> None:
    with planted(out_of_bounds):
        report = run(CHAIN, tmp_path)
    assert report.validation.verdict == "proved"
    (fault,) = report.blame
    assert (fault.rule, fault.root, fault.first_diverging) == ("planted", "h", "")
    assert "Gather" in fault.message
    assert fault.error == float("inf")


def test_errors_that_accumulate_cost_the_lossiest_rule(tmp_path: Path) -> None:
    nodes = [f"v{n + 1} = Mul (v{n}, two)\n w{n} = Identity (v{n + 1})" for n in range(6)]
    text = "agraph (float[N, 8] v0) => (float[N, 8] y) <float two = {2.0}> {\n"
    text += "\n".join(nodes) + "\n y = Identity (v6)\n}"
    with planted(a_few_ulps):
        report = run(text, tmp_path)
    assert report.validation.verdict == "proved"
    (fault,) = report.blame
    assert (fault.verdict, fault.scope, fault.rule) == ("accumulated", "rule", "planted")
    assert fault.message.startswith("errors accumulated; rule planted (pass canonicalize) loses ")
    assert "planted" not in rules_of(report)
    assert (Path(fault.reproducer) / "before.onnx").exists()


def test_two_wrong_rules_are_both_found(tmp_path: Path) -> None:
    with planted(no_relu, "planted-1"), planted(wrong_for_three, "planted-2"):
        report = run(CHAIN, tmp_path)
    assert report.validation.verdict == "proved"
    found = {(fault.rule, fault.root) for fault in report.blame}
    assert found == {("planted-1", "h"), ("planted-2", "d")}


def test_without_an_output_the_reproducer_stays_in_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with planted(no_relu):
        result = optimize(parsed(CHAIN))
    (fault,) = result.report.blame
    assert Path(fault.reproducer).is_relative_to(tmp_path)
    assert (Path(fault.reproducer) / "before.onnx").exists()
    assert "Relu" in [made.op_type for made in result.proto().graph.node]
    kept = [path.name for path in tmp_path.iterdir()]
    assert len(kept) == 1  # all other temporary files are gone
    assert kept[0].startswith("graphopt-blame-")


def test_a_reproducer_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out.onnx.blame").write_text("in the way")
    with planted(no_relu):
        report = run(CHAIN, tmp_path)
    assert report.validation.verdict == "proved"
    assert report.blame[0].reproducer == ""
    assert "; see " not in report.blame[0].message


def test_the_command_warns_and_succeeds(tmp_path: Path) -> None:
    source, out = save(parsed(CHAIN), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    with planted(wrong_for_three):
        result = CliRunner().invoke(app, ["optimize", str(source), str(out), "--verify-each"])
    assert result.exit_code == 0, result.output
    said = "".join(result.stdout.split())  # lines are wrapped anywhere
    assert "warningruleplanted(passcanonicalize)iswrongat'd'anddeniedthere:" in said
    assert "".join(str(out).split()) + ".blame/planted" in said
    assert "validationproved" in said


def test_the_command_says_what_was_tried_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.blame._MOST_FAULTS", 1)
    source, out = save(parsed(CHAIN), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    with planted(off_by_a_percent):
        result = CliRunner().invoke(app, ["optimize", str(source), str(out)])
    assert result.exit_code == 1
    assert "".join(result.stdout.split()).count("iswrongat") == 1
    assert "error: nothing written: failed: output 'y': error " in result.stderr
    assert not out.exists()


# -- passes that do not ask ------------------------------------------------------------------------


@dataclass(frozen=True)
class SwapAll:
    """A wrong pass that asks nobody: every Sub the other way round, each a change."""

    name: ClassVar[str] = "swap-all"

    def run(self, model: Model, edit: Editor) -> None:
        for made in list(model.graph.nodes):
            if made.op == "Sub":
                first, second = made.inputs
                edit.set_input(made, 0, second)
                edit.set_input(made, 1, first)
                assert made.outputs[0] is not None
                edit.record("swap", made.outputs[0].name, "", "")


def test_a_pass_that_does_not_ask_is_denied_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASSES, "swap-all", SwapAll)
    text = """agraph (float[N, 8] x, float[N, 8] z) => (float[N, 8] y) {
        a = Identity (x)  b = Sub (a, z)  c = Sin (b)  d = Sub (c, z)  y = Sub (d, x)
    }"""
    path = save(parsed(text), tmp_path / "in.onnx")
    report = optimize(path, tmp_path / "out.onnx", passes="canonicalize, swap-all").report
    assert report.validation.verdict == "proved"
    (fault,) = report.blame
    assert (fault.scope, fault.pass_text) == ("pass", "swap-all")
    assert fault.message.startswith("pass swap-all is wrong and denied (last change: swap): ")
    assert rules_of(report) == ["eliminate-identity"]


# -- the search ------------------------------------------------------------------------------------


class Fake(_Search):
    """A search among changes of which one is wrong; counts how often it looks."""

    def __init__(self, culprit: int) -> None:
        self._culprit = culprit
        self.looked = 0

    def probe(self, fuel: int) -> _Probe:
        self.looked += 1
        problem = "wrong" if fuel >= self._culprit else ""
        return _Probe(fuel, Outcome(problem=problem))


@pytest.mark.parametrize("number", range(1, 101, 7))
@pytest.mark.parametrize("guesses", [[], [1], [50], [100, 1], [101], [7, 93, 50], [22, 21]])
def test_the_search_finds_any_culprit(number: int, guesses: list[int]) -> None:
    search = Fake(number)
    assert search.culprit(0, 100, guesses) == number
    assert search.looked <= 7 + 2 * len(guesses) + 1


def test_a_right_guess_costs_two_looks() -> None:
    search = Fake(40)
    assert search.culprit(3, 100, [40]) == 40
    assert search.looked == 2
    assert search.culprit(3, 100, [60, 40]) == 40
    assert search.looked == 2 + 3


def test_what_fails_without_any_change_has_no_culprit() -> None:
    assert Fake(0).culprit(0, 100, []) is None
    assert Fake(0).culprit(0, 100, [30]) is None
    assert Fake(0).culprit(0, 0, []) is None


def test_fuel_gives_every_prefix_of_the_changes() -> None:
    text = """agraph (float[N, 8] x) => (float[N, 8] y) <float one = {1.0}, float same = {1.0}> {
        two = Constant <value = float[1] {2.0}> ()  three = Constant <value = float[1] {3.0}> ()
        five = Add (two, three)  a = Identity (x)  b = Mul (a, one)  c = Mul (b, five)
        dead = Neg (c)  d = Sin (c)  e = Sin (c)  f = Add (d, same)  g = Add (e, one)
        y = Sub (f, g)
    }"""

    def changes(fuel: int | None) -> list[Any]:
        runs = run_pipeline(Model.load(parsed(text)), pipeline(2, None), fuel=fuel)
        return [change for run in runs for change in run.changes]

    everything = changes(None)
    assert len(everything) >= 5
    for fuel in range(len(everything) + 1):
        assert changes(fuel) == everything[:fuel]


def test_nothing_is_blamed_where_no_feed_shows_a_fault(tmp_path: Path) -> None:
    path = save(parsed(CHAIN), tmp_path / "in.onnx")
    steps = pipeline(2, None)
    model = Model.load(path)
    runs = run_pipeline(model, steps)
    blame = Blame(path, lambda: Model.load(path), steps, lambda: tmp_path / "blame")
    assert blame.rescue(model, runs) is None
    assert blame.faults == []


def test_a_model_that_nothing_mends_is_refused_with_all_that_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.blame._MOST_FAULTS", 1)
    with planted(off_by_a_percent), pytest.raises(ValidationError) as caught:
        run(CHAIN, tmp_path)
    report = caught.value.report
    assert report is not None
    assert report.validation.verdict == "failed"
    assert [fault.rule for fault in report.blame] == ["planted"]
    assert not (tmp_path / "out.onnx").exists()
    assert "; 1 fault was denied, which was not enough: rule planted" in str(caught.value)


# -- values inside ---------------------------------------------------------------------------------


def diverging(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> str:
    """Where the changed copy leaves the original: a diamond of two arms, and a tail."""
    text = """agraph (float[N, 8] x) => (float[N, 8] y) {
        a = Tanh (x)
        left = Sin (a)     left2 = Exp (left)    left3 = Neg (left2)
        right = Cos (a)    right2 = Exp (right)  right3 = Neg (right2)
        sum = Add (left3, right3)
        y = Sin (sum)
    }"""
    original, candidate = parsed(text), parsed(text)
    change(candidate)
    with Trial(save(original, tmp_path / "original.onnx"), tmp_path) as trial:
        model = Model.load(candidate)
        found = trial.divergence(model, trial.find(model))
    return found.value if found is not None else ""


def exchange(output: str, op: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        (made,) = (made for made in proto.graph.node if made.output[0] == output)
        made.op_type = op

    return change


@pytest.mark.parametrize("most", [1, 2, 64])
@pytest.mark.parametrize(
    ("output", "op"),
    [
        ("a", "Sin"),
        ("left", "Cos"),
        ("left3", "Abs"),
        ("right2", "Sin"),
        ("sum", "Sub"),
        ("y", "Neg"),
    ],
)
def test_the_first_diverging_value_is_found(
    output: str, op: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.divergence._EXPOSED", most)
    assert diverging(exchange(output, op), tmp_path) == output


def test_equal_shapes_acquit_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed from a wrong value, and are right all the same."""
    monkeypatch.setattr("graphopt.divergence._EXPOSED", 2)
    text = """agraph (float[N, 8] x) => (float[N, 8] y) {
        a = Tanh (x)  b = Sin (a)  c = Cos (b)  size = Shape (b)  d = Exp (c)
        e = Reshape (d, size)  y = Neg (e)
    }"""
    candidate = parsed(text)
    exchange("a", "Sin")(candidate)
    with Trial(save(parsed(text), tmp_path / "original.onnx"), tmp_path) as trial:
        model = Model.load(candidate)
        found = trial.divergence(model, trial.find(model))
    assert found is not None
    assert found.value == "a"


@pytest.mark.parametrize("most", [2, 64])
def test_equal_squares_acquit_nobody(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.divergence._EXPOSED", most)
    text = """agraph (float[N, 8] x) => (float[N, 8] y) {
        a = Tanh (x)  d = Sin (a)  square = Mul (d, d)  root = Sqrt (square)
        more = Add (root, root)  y = Mul (d, more)
    }"""
    candidate = parsed(text.replace("d = Sin (a)", "s = Sin (a)  d = Neg (s)"))
    with Trial(save(parsed(text), tmp_path / "original.onnx"), tmp_path) as trial:
        model = Model.load(candidate)
        found = trial.divergence(model, trial.find(model))
    assert found is not None
    assert found.value == "d"


def test_nothing_diverges_between_equals(tmp_path: Path) -> None:
    assert diverging(lambda proto: None, tmp_path) == ""


def test_a_value_that_cannot_be_an_output_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where some of the exposed values cannot be had, the others still are."""
    real = divergence.write_exposed

    def write(model: Model, path: Path, exposed: Any = ()) -> Path:
        return real(model, path, ["nowhere" if n == "right2" else n for n in exposed])

    monkeypatch.setattr(divergence, "write_exposed", write)
    assert diverging(exchange("left2", "Sin"), tmp_path) == "left2"


# -- the editor ------------------------------------------------------------------------------------


def test_denials_are_of_one_change_or_of_a_rule() -> None:
    edit = Editor(Model.load(parsed(CHAIN)), denied={("one", "a"), ("all", None)})
    assert not edit.allows("one", "a")
    assert edit.allows("one", "b")
    assert edit.allows("other", "a")
    assert not edit.allows("all", "a")
    mark = edit.mark()
    edit.record("one", "b", "", "")
    assert edit.overstepped(mark) is None
    edit.record("all", "c", "", "")
    change = edit.overstepped(mark)
    assert change is not None
    assert (change.rule, change.root) == ("all", "c")


def test_fuel_is_spent_by_changes_and_comes_back_with_undoing() -> None:
    edit = Editor(Model.load(parsed(CHAIN)), fuel=1)
    assert edit.allows("a", "x")
    mark = edit.mark()
    edit.record("a", "x", "", "")
    assert edit.is_spent
    assert not edit.allows("a", "y")
    assert not edit.is_overspent
    edit.record("a", "y", "", "")
    assert edit.is_overspent
    assert edit.overstepped(mark) is edit.changes[1]
    edit.undo_to(mark)
    assert edit.allows("a", "y")
    edit.stop()
    assert not edit.allows("a", "y")


def test_types_that_an_undone_rule_refined_are_forgotten() -> None:
    model = Model.load(parsed(CHAIN))
    edit = Editor(model)
    value = model.graph.values["h"]
    before = edit.types[value]
    mark = edit.mark()
    assert value.producer is not None
    edit.set_input(value.producer, 0, value.producer.inputs[0])
    known = edit.types[model.graph.values["x"]]
    assert known is not None
    edit.types[value] = type(known)(known.data_type, (1, 1))
    edit.undo_to(mark)
    assert edit.types[value] == before


def test_large_weights_of_a_reproducer_are_there(tmp_path: Path) -> None:
    nodes = [
        graphs.node("MatMul", ["x", "w"], ["m"]),
        graphs.node("Relu", ["m"], ["y"]),
    ]
    inputs, outputs = [graphs.value("x", ("N", 16))], [graphs.value("y", ("N", 32))]
    proto = graphs.model(nodes, inputs, outputs, [weight("w")])
    with planted(no_relu):
        report = optimize(save(proto, tmp_path / "in.onnx"), tmp_path / "out.onnx").report
    assert [fault.root for fault in report.blame] == ["y"]
    before = onnx.load(tmp_path / "out.onnx.blame" / "planted" / "before.onnx")
    expected = exporter.to_proto(Model.load(proto)).graph.initializer[0].raw_data
    assert before.graph.initializer[0].raw_data == expected


def test_messages_tell_scopes_apart() -> None:
    def message(kind: Any, scope: Any, error: float = 0.5) -> str:
        return Fault(kind, scope, "r", "v", "p", "v", error, 1e-5, "", "").message

    told = "'v' strays by 0.5 of its variation, 1e-05 is allowed"
    assert (
        message("blamed", "change") == f"rule r (pass p) is wrong at 'v' and denied there: {told}"
    )
    assert message("blamed", "change", float("inf")).endswith(
        "there: 'v' has another shape, other integers, or NaN in other places"
    )
    assert message("blamed", "pass") == f"pass p is wrong and denied (last change: r): {told}"
    assert message("accumulated", "rule") == (
        f"errors accumulated; rule r (pass p) loses most and is denied: {told}"
    )
