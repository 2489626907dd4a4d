"""Original against candidate, on small models made for each verdict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import validate
from graphopt.errors import DataError, ModelError, RuntimeFailure
from graphopt.report import ValidationRecord
from graphopt.runtime import Session, limits
from graphopt.validate import validate_files
from tests.graphs import CONDITION, graph, if_node, matmul, model, node, parsed, save, value

F16 = TensorProto.FLOAT16


def constant(name: str, values: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


@pytest.fixture
def prove(tmp_path: Path) -> Any:
    """Compares two models given as protos."""

    def run(
        original: onnx.ModelProto, candidate: onnx.ModelProto | None = None, **options: Any
    ) -> ValidationRecord:
        first = save(original, tmp_path / "original.onnx")
        second = save(candidate or original, tmp_path / "candidate.onnx")
        before = first.read_bytes(), second.read_bytes()
        record = validate_files(first, second, **options)
        assert (first.read_bytes(), second.read_bytes()) == before
        return record

    return run


def chain(*ops: str, shape: tuple[int | str, ...] = ("N", 16)) -> onnx.ModelProto:
    names = ["x", *(f"v{i}" for i in range(len(ops) - 1)), "y"]
    nodes = [node(op, [a], [b]) for op, a, b in zip(ops, names, names[1:], strict=False)]
    return model(nodes, [value("x", shape)], [value("y", shape)])


def scaled(by: float) -> onnx.ModelProto:
    return model(
        [node("Mul", ["x", "k"], ["y"])],
        [value("x", ("N", 16))],
        [value("y", ("N", 16))],
        [constant("k", by)],
    )


# --------------------------------------------------------------------------------------- verdicts


def test_a_model_proves_itself(prove: Any) -> None:
    record = prove(matmul())
    assert (record.verdict, record.reason) == ("proved", "")
    assert record.tolerance == 1e-5
    (output,) = record.outputs
    assert (output.name, output.type, output.verdict) == ("y", "tensor(float)", "proved")
    assert output.feeds == len(record.feeds) == 24
    assert output.error_off == output.used == 0
    assert output.sqnr_db is None
    assert output.signal > 1
    assert record.feeds[0].kind == "normal 1x16"
    assert record.feeds[0].shapes == {"x": [1, 16]}
    assert record.seconds > 0


def test_an_equivalent_rewrite_is_proved_with_its_error(prove: Any) -> None:
    record = prove(scaled(1.0), scaled(1.0 + 2e-6))
    assert record.verdict == "proved"
    (output,) = record.outputs
    assert 0 < output.error_off < 1e-5
    assert output.error_default == output.error_off == record.error
    assert output.used == pytest.approx(output.error_off / 1e-5)
    assert output.sqnr_db == pytest.approx(110, abs=6)  # 2e-6 is -114 dB


def test_a_thousandth_is_found(prove: Any) -> None:
    record = prove(scaled(1.0), scaled(1.001))
    assert record.verdict == "failed"
    assert record.reason.startswith("output 'y': error 0.002")  # of half the gap between two feeds
    assert re.search(r" times what is allowed \(noise \S+\)$", record.reason)
    assert "on feed 1 (normal 1x16)" in record.reason
    assert record.outputs[0].verdict == "failed"
    assert record.outputs[0].used > 50


def test_one_wrong_output_of_two_fails_and_is_named(prove: Any) -> None:
    def two(op: str) -> onnx.ModelProto:
        return model([node("Neg", ["x"], ["a"]), node(op, ["x"], ["b"])], ["x"], ["a", "b"])

    record = prove(two("Exp"), two("Abs"))
    assert record.verdict == "failed"
    assert record.reason.startswith("output 'b': ")
    assert [output.verdict for output in record.outputs] == ["proved", "failed"]


def test_seeds_choose_the_feeds(prove: Any) -> None:
    first, again, other = (prove(matmul(), seed=seed).outputs[0].signal for seed in (0, 0, 1))
    assert first == again != other


def test_both_branches_of_a_condition_are_proved(prove: Any) -> None:
    def branching(by: float) -> onnx.ModelProto:
        taken = graph([node("Neg", ["x"], ["t"])], [], ["t"], name="t")
        other = graph([node("Mul", ["x", "k"], ["e"])], [], ["e"], name="e")
        return model([if_node(taken, other)], ["x", CONDITION], ["y"], [constant("k", by)])

    assert prove(branching(1.0)).verdict == "proved"
    record = prove(branching(1.0), branching(1.001))
    assert record.verdict == "failed"
    assert "c=0)" in record.reason


def test_default_optimisations_of_the_candidate_are_proved_too(
    prove: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What users get may be wrong though the rewrite is right: here, a run returns zeros."""
    run = Session.run
    created = Session.__init__

    def init(self: Session, path: Path, **options: Any) -> None:
        created(self, path, **options)
        self.broken = "candidate" in str(path) and options["optimizations"] == "default"  # type: ignore[attr-defined]

    def broken(self: Session, *arguments: Any) -> dict[str, Any]:
        found = run(self, *arguments)
        return {k: v * 0 for k, v in found.items()} if self.broken else found  # type: ignore[attr-defined]

    monkeypatch.setattr(Session, "__init__", init)
    monkeypatch.setattr(Session, "run", broken)
    record = prove(matmul())
    assert record.verdict == "failed"
    assert record.outputs[0].error_off == 0
    assert record.outputs[0].error_default > 0.1


def test_tolerance_is_that_of_the_narrowest_type(prove: Any) -> None:
    def half(by: float) -> onnx.ModelProto:
        nodes = [
            node("Cast", ["x"], ["h"], to=F16),
            node("Mul", ["h", "k"], ["m"]),
            node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["f", "by"], ["y"]),
        ]
        constants = [constant("k", 1.0, "f2"), constant("by", by)]
        return model(nodes, [value("x", ("N", 16))], [value("y", None)], constants)

    record = prove(half(1.0), half(1.0005))
    assert (record.verdict, record.tolerance) == ("proved", 2e-3)
    assert prove(half(1.0), half(1.01)).verdict == "failed"


# --------------------------------------------------------------------------------------- unproven


def unproven(record: ValidationRecord) -> str:
    assert record.verdict == "unproven"
    return record.reason


def test_a_dead_output_proves_nothing(prove: Any) -> None:
    """Far below zero for every feed: Relu gives zeros, whatever comes before."""

    def dead(op: str) -> onnx.ModelProto:
        nodes = [
            node(op, ["x"], ["h"]),
            node("Sub", ["h", "big"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ]
        inputs, outputs = [value("x", ("N", 16))], [value("y", ("N", 16))]
        return model(nodes, inputs, outputs, [constant("big", 1e6)])

    reason = unproven(prove(dead("Neg"), dead("Abs")))
    assert reason == (
        "none of 72 feeds says anything about 'y' (constant, empty, not finite, or noise over 1 % "
        "of the signal); give --data"
    )


def test_a_dead_output_beside_a_live_one_is_named(prove: Any) -> None:
    nodes = [node("Neg", ["x"], ["a"]), node("Sub", ["x", "x"], ["b"])]
    record = prove(model(nodes, ["x"], ["a", "b"]))
    assert "says anything about 'b' (" in unproven(record)
    assert [output.verdict for output in record.outputs] == ["proved", "unproven"]


def test_a_constant_that_differs_fails(prove: Any) -> None:
    def offset(by: float) -> onnx.ModelProto:
        nodes = [node("Sub", ["x", "x"], ["z"]), node("Add", ["z", "k"], ["y"])]
        return model(nodes, ["x"], ["y"], [constant("k", by)])

    assert unproven(prove(offset(1.0)))
    record = prove(offset(1.0), offset(1.01))
    assert record.verdict == "failed"
    assert record.reason.startswith("output 'y': error 0.01 of what is constant on feed 1 (")


def test_an_output_that_no_input_reaches_needs_no_variation(prove: Any) -> None:
    def fixed(by: float) -> onnx.ModelProto:
        nodes = [node("Neg", ["x"], ["y"]), node("Neg", ["k"], ["z"])]
        return model(nodes, ["x"], ["y", "z"], [constant("k", [by, 2, 3, 4])])

    assert prove(fixed(1.0)).verdict == "proved"
    assert prove(fixed(1.0), fixed(1.001)).verdict == "failed"


def test_a_model_without_inputs_is_compared_once(prove: Any) -> None:
    def fixed(by: float) -> onnx.ModelProto:
        return model([node("Neg", ["k"], ["y"])], [], ["y"], [constant("k", [by, 2, 3, 4])])

    record = prove(fixed(1.0))
    assert (record.verdict, [feed.kind for feed in record.feeds]) == ("proved", ["no inputs"])
    assert prove(fixed(1.0), fixed(1.001)).verdict == "failed"


def noisy(monkeypatch: pytest.MonkeyPatch, by: float, until: int) -> None:
    """The original at the default level strays by this much on its first feeds."""
    run, created = Session.run, Session.__init__
    runs = {"n": 0}

    def init(self: Session, path: Any, **options: Any) -> None:
        created(self, path, **options)
        self.strays = "original" in str(path) and options["optimizations"] == "default"  # type: ignore[attr-defined]

    def stray(self: Session, *arguments: Any) -> dict[str, Any]:
        found = run(self, *arguments)
        if not getattr(self, "strays", False):
            return found
        runs["n"] += 1
        return {k: v + by * np.abs(v).max() if runs["n"] <= until else v for k, v in found.items()}

    monkeypatch.setattr(Session, "__init__", init)
    monkeypatch.setattr(Session, "run", stray)


def test_feeds_with_noise_over_one_percent_are_replaced(
    prove: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy(monkeypatch, 0.1, until=24)
    record = prove(scaled(1.0))
    assert (record.verdict, len(record.feeds), record.outputs[0].feeds) == ("proved", 48, 24)
    assert record.noise == 0
    assert len({feed.kind for feed in record.feeds}) == 12


def test_feeds_are_replaced_twice_at_most(prove: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, 0.1, until=999)
    assert unproven(prove(scaled(1.0))).startswith("none of 72 feeds says anything about 'y'")


def test_replacements_are_drawn_like_feeds_that_told_something(
    prove: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy(monkeypatch, 0.1, until=22)
    record = prove(scaled(1.0))
    kinds = [feed.kind for feed in record.feeds]
    assert len(kinds) == 24 + 22
    assert set(kinds[24:]) == {"small 2x16"} == {kinds[23]}
    assert record.outputs[0].feeds == 24


def test_the_output_that_lacks_most_decides(prove: Any) -> None:
    """The second output is constant, but for the feeds with the largest numbers."""

    def made() -> onnx.ModelProto:
        nodes = [
            node("Neg", ["x"], ["y"]),
            node("Sub", ["x", "high"], ["d"]),
            node("Relu", ["d"], ["z"]),
        ]
        outputs = [value(name, ("N", 16)) for name in "yz"]
        return model(nodes, [value("x", ("N", 16))], outputs, [constant("high", 40.0)])

    record = prove(made())
    kinds = [feed.kind for feed in record.feeds]
    assert record.verdict == "proved"
    assert kinds.count("larger 1x16") + kinds.count("larger 2x16") == 24
    assert record.outputs[1].feeds == 24
    assert len(kinds) == 24 + 20


def test_noise_allows_four_times_itself(prove: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(monkeypatch, 1e-3, until=999)
    assert prove(scaled(1.0), scaled(1.003)).verdict == "proved"
    assert prove(scaled(1.0), scaled(1.02)).verdict == "failed"


def test_randomness_has_no_oracle(prove: Any) -> None:
    reason = unproven(prove(model([node("RandomNormalLike", ["x"], ["y"], name="r")])))
    assert reason == "RandomNormalLike r draws random numbers: two runs of the original differ"


def test_operators_of_foreign_domains_need_their_library(prove: Any) -> None:
    foreign = model([node("Mystery", ["x"], ["y"], domain="own")], domains=["own"])
    expected = "operators of domain own need their library: --custom-ops lib.so"
    assert unproven(prove(foreign)) == expected


def test_a_custom_library_that_is_missing(prove: Any, tmp_path: Path) -> None:
    foreign = model([node("Mystery", ["x"], ["y"], domain="own")], domains=["own"])
    reason = unproven(prove(foreign, custom_ops=[tmp_path / "missing.so"]))
    assert reason.startswith("onnxruntime does not load the original: ")
    assert "missing.so" in reason


def test_an_original_that_does_not_load(prove: Any) -> None:
    broken = model([node("Conv", ["x"], ["y"])])
    assert unproven(prove(broken)).startswith("onnxruntime does not load the original: ")


def test_an_opset_newer_than_onnxruntime(prove: Any) -> None:
    beyond = limits().opset + 1  # with some onnxruntimes, newer than onnx itself
    reason = unproven(prove(model([node("Relu", ["x"], ["y"])], opset=beyond)))
    assert reason.startswith("onnxruntime does not load the original: ")
    assert str(beyond) in reason


def test_an_original_that_runs_on_no_feed(prove: Any) -> None:
    unreachable = model(
        [node("Reshape", ["x", "s"], ["y"])],
        ["x"],
        [value("y", None)],
        [constant("s", [7, 11], np.int64)],
    )
    assert unproven(prove(unreachable)).startswith("no proposed feed runs on the original (")


def test_an_original_that_runs_only_without_optimisations(
    prove: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, created = Session.run, Session.__init__

    def init(self: Session, path: Any, **options: Any) -> None:
        created(self, path, **options)
        self.fails = "original" in str(path) and options["optimizations"] == "default"  # type: ignore[attr-defined]

    def failing(self: Session, *arguments: Any) -> dict[str, Any]:
        if getattr(self, "fails", False):
            raise RuntimeFailure("no memory")
        return run(self, *arguments)

    monkeypatch.setattr(Session, "__init__", init)
    monkeypatch.setattr(Session, "run", failing)
    expected = "the original runs only with onnxruntime's optimisations off: no memory"
    assert unproven(prove(matmul())) == expected


# ------------------------------------------------------------------------------------ IR versions


def test_newer_ir_versions_are_compared_on_copies(prove: Any) -> None:
    newer = matmul()
    newer.ir_version = limits().ir + 1
    record = prove(newer)
    assert record.verdict == "proved"
    note = f"compared on copies with IR version {limits().ir}, the newest onnxruntime reads"
    assert record.notes == [note]
    wrong = matmul()
    wrong.ir_version = limits().ir + 1
    raw = numpy_helper.to_array(wrong.graph.initializer[0])
    wrong.graph.initializer[0].CopyFrom(constant("w", raw * 1.001))
    assert prove(newer, wrong).verdict == "failed"
    assert prove(matmul()).notes == []
    newest = matmul()
    newest.ir_version = limits().ir
    assert prove(newest).notes == []


def test_only_the_candidate_may_be_newer(prove: Any) -> None:
    newer = matmul()
    newer.ir_version = limits().ir + 1
    record = prove(matmul(), newer)
    assert (record.verdict, len(record.notes)) == ("proved", 1)


# --------------------------------------------------------------------------------------- interface


def two_by_two() -> onnx.ModelProto:
    nodes = [node("Add", ["a", "b"], ["p"]), node("Sub", ["a", "b"], ["q"])]
    return model(nodes, ["a", "b"], ["p", "q"])


def test_renamed_reordered_retyped_and_missing_ports(prove: Any) -> None:
    a, b, p, q = (f"{name} tensor(float)" for name in "abpq")
    cases: list[tuple[str, Any]] = []

    def case(expected: str, change: Any) -> None:
        cases.append((expected, change))

    case(f"the inputs differ: {a}, {b} became {b}, {a}", lambda g: g.input.reverse())
    case(f"the outputs differ: {p}, {q} became {q}, {p}", lambda g: g.output.reverse())
    case(f"the outputs differ: {p}, {q} became {p}", lambda g: g.output.pop())
    for expected, change in cases:
        candidate = two_by_two()
        change(candidate.graph)
        record = prove(two_by_two(), candidate)
        assert (record.verdict, record.reason) == ("failed", expected)


def test_renamed_and_retyped_ports(prove: Any) -> None:
    renamed = parsed("agraph (float[4] z) => (float[4] y) { y = Relu (z) }")
    original = parsed("agraph (float[4] x) => (float[4] y) { y = Relu (x) }")
    record = prove(original, renamed)
    assert record.reason == "the inputs differ: x tensor(float) became z tensor(float)"
    retyped = parsed("agraph (float[4] x) => (double[4] y) { r = Relu (x) y = Cast <to = 11> (r) }")
    record = prove(original, retyped)
    assert record.reason == "the outputs differ: y tensor(float) became y tensor(double)"
    assert record.verdict == "failed"


def test_an_input_with_a_default_may_be_frozen(prove: Any) -> None:
    def weighted(listed: bool) -> onnx.ModelProto:
        made = matmul()
        if listed:
            made.graph.input.append(value("w", (16, 32)))
        return made

    assert prove(weighted(True), weighted(False)).verdict == "proved"


# --------------------------------------------------------------------- candidates that break down


def test_a_candidate_that_onnxruntime_does_not_load(prove: Any) -> None:
    broken = model([node("Conv", ["x"], ["y"])], [value("x", ("N", 16))], [value("y", None)])
    record = prove(chain("Relu"), broken)
    assert record.verdict == "failed"
    assert record.reason.startswith("onnxruntime does not load the candidate: ")


def test_a_candidate_that_is_no_model(tmp_path: Path) -> None:
    original = save(matmul(), tmp_path / "original.onnx")
    (tmp_path / "candidate.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError):
        validate_files(original, tmp_path / "candidate.onnx")


def test_a_candidate_that_does_not_run(prove: Any) -> None:
    """It runs for a batch of 1 only."""
    fixed = model(
        [node("Reshape", ["x", "s"], ["y"])],
        [value("x", ("N", 16))],
        [value("y", ("N", 16))],
        [constant("s", [1, 16], np.int64)],
    )
    record = prove(chain("Identity"), fixed)
    assert record.verdict == "failed"
    assert record.reason.startswith(
        "the candidate does not run where the original does: Reshape node "
    )


def test_a_candidate_of_another_shape(prove: Any) -> None:
    flat = model(
        [node("Reshape", ["x", "s"], ["y"])],
        [value("x", ("N", 16))],
        [value("y", None)],
        [constant("s", [-1], np.int64)],
    )
    record = prove(chain("Identity"), flat)
    assert record.verdict == "failed"
    assert "shape 16 instead of 1x16 on feed 1 (normal 1x16)" in record.reason
    assert "times what is allowed" not in record.reason


# ------------------------------------------------------------------------------------- given data


def test_given_data_is_what_is_compared_on(prove: Any, tmp_path: Path) -> None:
    """Both agree on negative numbers only; data of those proves what proposals disprove."""
    rows = -np.abs(np.random.default_rng(0).normal(size=(5, 16))).astype("f")
    np.savez(tmp_path / "d.npz", x=rows)
    record = prove(chain("Neg"), chain("Abs"), data=str(tmp_path / "d.npz"))
    assert record.verdict == "proved"
    assert [feed.kind for feed in record.feeds] == ["given"] * 5
    assert prove(chain("Neg"), chain("Abs")).verdict == "failed"


def test_given_data_is_not_replaced(prove: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=-np.ones((5, 16), "f"))
    record = prove(chain("Relu"), data=str(tmp_path / "d.npz"))
    assert record.verdict == "unproven"
    assert len(record.feeds) == 5


def test_no_more_data_is_read_than_needed(prove: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(99, 16)).astype("f"))
    assert len(prove(chain("Relu"), data=str(tmp_path / "d.npz")).feeds) == 24


def test_mistakes_in_the_data_are_the_users(prove: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 7), "f"))
    with pytest.raises(DataError, match="the model rejects it: Got invalid dimensions"):
        prove(chain("Relu"), data=str(tmp_path / "d.npz"))
    feeds = tmp_path / "feeds.py"
    feeds.write_text(
        "import numpy as np\n"
        "def later():\n"
        "    yield {'x': np.ones((1, 16), 'f')}\n"
        "    yield {'x': np.ones((1, 7), 'f')}\n"
    )
    with pytest.raises(DataError) as caught:
        prove(chain("Relu"), data=f"{feeds}:later")
    expected = f"data {feeds}:later: the model rejects feed 2: Got invalid dimensions for input: x"
    assert str(caught.value).startswith(expected)


# -------------------------------------------------------------------------------- how many feeds


@pytest.mark.parametrize(
    ("seconds", "feeds", "of_one_element"),
    [(0.0, 24, 72), (0.05, 24, 50), (0.25, 24, 24), (0.75, 10, 10), (5.0, 6, 6)],
)
def test_slow_models_get_fewer_feeds(
    prove: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, feeds: int, of_one_element: int
) -> None:
    """A quarter of 30 s is for the runs of the original without optimisations."""

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            cls.now += seconds
            return cls.now

    monkeypatch.setattr(validate, "time", Clock)
    assert len(prove(scaled(1.0)).feeds) == feeds
    assert len(prove(chain("ReduceSum")).feeds) == of_one_element


def test_outputs_of_few_elements_get_more_feeds(prove: Any) -> None:
    """One number may be almost the same in two feeds: more tell how much it varies."""

    def summed(size: int) -> onnx.ModelProto:
        weights = constant("w", np.ones((16, size)))
        inputs, outputs = [value("x", ("N", 16))], [value("y", ("N", size))]
        return model([node("MatMul", ["x", "w"], ["y"])], inputs, outputs, [weights])

    assert len(prove(summed(8)).feeds) == 24
    assert len(prove(summed(7)).feeds) == 72
    beside = summed(16)
    beside.graph.node.add(op_type="ReduceMax", input=["x"], output=["z"])
    beside.graph.output.append(value("z", (1, 1)))
    assert len(prove(beside).feeds) == 72


@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_another_order_of_summation_is_no_fault(prove: Any, outputs: int) -> None:
    """Hidden units in another order: equal on paper, and rounded differently."""
    for trial in range(6):
        rng = np.random.default_rng(trial)
        shapes = (64, 256), (256, 256), (256, outputs)
        weights = [rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes]
        order = rng.permutation(256)

        def network(w1: Any, w2: Any, w3: Any, count: int = outputs) -> onnx.ModelProto:
            nodes = [
                node("MatMul", ["x", "w1"], ["h"]),
                node("Tanh", ["h"], ["t"]),
                node("MatMul", ["t", "w2"], ["u"]),
                node("Tanh", ["u"], ["v"]),
                node("MatMul", ["v", "w3"], ["y"]),
            ]
            constants = [constant(f"w{i + 1}", w) for i, w in enumerate((w1, w2, w3))]
            return model(nodes, [value("x", ("N", 64))], [value("y", ("N", count))], constants)

        first, second, third = weights
        reordered = network(first[:, order], second[order][:, order], third[order])
        assert prove(network(*weights), reordered).verdict == "proved"
        wrong = network(first, second, third * 1.001)
        assert prove(network(*weights), wrong).verdict == "failed"


def test_progress_is_told(prove: Any) -> None:
    told: list[tuple[str, float | None]] = []
    prove(matmul(), progress=lambda what, share: told.append((what, share)))
    assert told[0] == ("finding feeds", None)
    assert {what for what, _ in told[1:]} == {
        f"running {who} {level}"
        for who in ("original", "candidate")
        for level in ("off", "default")
    }
    assert all(share is not None and 0 <= share < 1 for _, share in told[1:])


# ---------------------------------------------------------------------------------- kinds of values


def test_sequences_strings_and_optionals_are_compared(prove: Any) -> None:
    split = "agraph (float[4] x) => (seq(float[N]) y) { y = SplitToSequence <axis = 0> (x) }"
    assert prove(parsed(split)).verdict == "proved"
    wrong = "agraph (float[4] x) => (seq(float[N]) y) { z = Neg (x) y = SplitToSequence (z) }"
    assert prove(parsed(split), parsed(wrong)).verdict == "failed"

    def suffixed(text: str) -> onnx.ModelProto:
        strings = [value(name, (4,), TensorProto.STRING) for name in "xy"]
        suffix = helper.make_tensor("k", TensorProto.STRING, [], [text.encode()])
        nodes = [node("StringConcat", ["x", "k"], ["y"])]
        return model(nodes, strings[:1], strings[1:], [suffix], opset=20)

    assert prove(suffixed("!")).verdict == "proved"
    record = prove(suffixed("!"), suffixed("?"))
    assert record.reason.startswith("output 'y': 4 of 4 integers differ on feed 1 (normal 4)")


def test_labels_and_probabilities_of_a_classifier(prove: Any) -> None:
    """Maps from labels in words to probabilities, as scikit-learn's exporter makes them."""

    def classifier(shift: float) -> onnx.ModelProto:
        nodes = [
            node(
                "LinearClassifier",
                ["x"],
                ["label", "p"],
                domain="ai.onnx.ml",
                classlabels_strings=["cat", "dog"],
                coefficients=[1.0, -1.0, -1.0, 1.0 + shift],
                intercepts=[0.0, 0.0],
                post_transform="SOFTMAX",
                multi_class=1,
            ),
            node("ZipMap", ["p"], ["y"], domain="ai.onnx.ml", classlabels_strings=["cat", "dog"]),
        ]
        entry = helper.make_map_type_proto(
            TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
        )
        maps = helper.make_value_info("y", helper.make_sequence_type_proto(entry))
        return model(
            nodes,
            [value("x", ("N", 2))],
            [value("label", ("N",), TensorProto.STRING), maps],
            domains=["ai.onnx.ml"],
        )

    assert prove(classifier(0.0)).verdict == "proved"
    assert prove(classifier(0.0), classifier(0.01)).verdict == "failed"
