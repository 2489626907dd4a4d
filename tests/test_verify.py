"""Verification: every invariant, broken by hand, is found; sound models have no problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from graphopt.edit import Editor
from graphopt.fingerprint import fingerprint
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.manager import run_pipeline
from graphopt.passes.pipelines import LEVELS, pipeline
from graphopt.verify import Interface, problems
from tests import graphs
from tests.graphs import CONDITION, if_node, node, value, weight


def branch(name: str, op: str) -> onnx.GraphProto:
    """A body that reads "a" of the graph around it."""
    nodes = [node(op, ["a"], [f"{name}/inner"]), node("Neg", [f"{name}/inner"], [f"{name}/out"])]
    return graphs.graph(nodes, [], [value(f"{name}/out", (1, 16))])


def sound() -> Model:
    """x -> Relu -> a, y = If(c, a's, a's), z = a w."""
    nodes = [
        node("Relu", ["x"], ["a"]),
        if_node(branch("then", "Exp"), branch("else", "Abs")),
        node("MatMul", ["a", "w"], ["z"]),
        node("Softmax", ["z"], ["s"], axis=-1),
    ]
    inputs = [value("x", (1, 16)), CONDITION]
    outputs = [value("y", (1, 16)), value("s", (1, 32))]
    return Model.load(graphs.model(nodes, inputs, outputs, [weight("w")]))


def named(model: Model, name: str) -> Value:
    return next(graph.values[name] for graph in model.graphs() if name in graph.values)


def maker(model: Model, name: str) -> Node:
    made = named(model, name).producer
    assert made is not None
    return made


def body(model: Model) -> Graph:
    return next(maker(model, "y").graphs())


# -- each invariant, broken ------------------------------------------------------------------------


def producer_forgotten(model: Model) -> None:
    named(model, "a").producer = None


def producer_of_another(model: Model) -> None:
    named(model, "a").producer = maker(model, "z")


def two_producers(model: Model) -> None:
    maker(model, "s").outputs[0] = named(model, "z")


def one_value_twice(model: Model) -> None:
    made = maker(model, "a")
    made.outputs.append(made.outputs[0])


def computed_and_given(model: Model) -> None:
    named(model, "a").weight = named(model, "w").weight


def reader_forgotten(model: Model) -> None:
    del named(model, "a").consumers[maker(model, "z")]


def reader_counted_twice(model: Model) -> None:
    named(model, "a").consumers[maker(model, "z")] = 2


def reader_in_a_body_forgotten(model: Model) -> None:
    del named(model, "a").consumers[maker(model, "then/inner")]


def reader_that_is_gone(model: Model) -> None:
    graph = model.graph
    made = maker(model, "s")
    del graph.nodes[made]
    named(model, "s").producer = None


def value_without_a_name(model: Model) -> None:
    del model.graph.values["z"]


def value_under_another_name(model: Model) -> None:
    named(model, "z").name = "other"


def value_of_another_graph(model: Model) -> None:
    """The main graph reads what only a body knows."""
    maker(model, "s").graph._set_input(maker(model, "s"), 0, named(model, "then/inner"))


def nothing_computes_it(model: Model) -> None:
    graph = model.graph
    fresh = Value("fresh", graph)
    graph.values["fresh"] = fresh
    graph._set_input(maker(model, "s"), 0, fresh)


def hidden_name(model: Model) -> None:
    inner = named(model, "then/inner")
    around = inner.graph
    del around.values["then/inner"]
    inner.name = "a"
    around.values["a"] = inner


def a_cycle(model: Model) -> None:
    model.graph._set_input(maker(model, "a"), 0, named(model, "s"))


def a_cycle_through_a_body(model: Model) -> None:
    inner = maker(model, "then/inner")
    inner.graph._set_input(inner, 0, named(model, "y"))


def node_of_another_graph(model: Model) -> None:
    maker(model, "then/inner").graph = model.graph


def outer_value_as_branch_output(model: Model) -> None:
    graph = body(model)
    graph.outputs = [named(model, "a")]
    graph.output_counts = {named(model, "a"): 1}


def output_of_nowhere(model: Model) -> None:
    stranger = Value("stranger", model.graph)
    model.graph.outputs[0] = stranger


def output_count(model: Model) -> None:
    model.graph.output_counts[named(model, "a")] = 1


def input_lost(model: Model) -> None:
    model.graph._set_inputs(model.graph.inputs[1:])


def input_counted_twice(model: Model) -> None:
    model.graph.inputs.append(model.graph.inputs[0])


def inputs_in_another_order(model: Model) -> None:
    model.graph._set_inputs(model.graph.inputs[::-1])


def input_of_another_type(model: Model) -> None:
    model.graph.proto.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def output_of_another_shape(model: Model) -> None:
    model.proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 7


def outputs_swapped(model: Model) -> None:
    model.graph.outputs.reverse()


def become(node: Node, op: str, domain: str = "") -> None:
    node.op = node.proto.op_type = op
    node.domain = node.proto.domain = domain


def stored_as_another_operator(model: Model) -> None:
    maker(model, "s").proto.op_type = "LogSoftmax"


def constant_too_short(model: Model) -> None:
    proto = onnx.TensorProto()
    held = named(model, "w").weight
    assert held is not None
    proto.CopyFrom(held.tensor)
    proto.dims[0] += 1
    named(model, "w").weight = Weight(proto, held.store)


def constant_of_another_name(model: Model) -> None:
    proto = onnx.TensorProto()
    held = named(model, "w").weight
    assert held is not None
    proto.CopyFrom(held.tensor)
    proto.name = "v"
    named(model, "w").weight = Weight(proto, held.store)


def unknown_operator(model: Model) -> None:
    become(maker(model, "s"), "Softmacks")


def operator_too_new(model: Model) -> None:
    become(maker(model, "s"), "RMSNormalization")


def domain_not_imported(model: Model) -> None:
    become(maker(model, "s"), "Softmax", "ai.onnx.ml")


def too_few_inputs(model: Model) -> None:
    made = maker(model, "z")
    made.graph._set_input(made, 1, None)


def input_left_out(model: Model) -> None:
    made = maker(model, "z")
    made.graph._set_input(made, 0, None)


def too_many_inputs(model: Model) -> None:
    made = maker(model, "s")
    made.inputs.append(None)
    made.graph._set_input(made, 1, named(model, "a"))


def unknown_attribute(model: Model) -> None:
    maker(model, "s").proto.attribute.append(onnx.helper.make_attribute("axes", 1))


def attribute_of_another_type(model: Model) -> None:
    stated = maker(model, "s").proto.attribute[0]
    stated.CopyFrom(onnx.helper.make_attribute("axis", 1.0))


def attribute_stated_twice(model: Model) -> None:
    maker(model, "s").proto.attribute.append(onnx.helper.make_attribute("axis", 0))


def attribute_lacking(model: Model) -> None:
    become(maker(model, "s"), "Concat")
    del maker(model, "s").proto.attribute[:]


BROKEN: dict[Callable[[Model], None], str] = {
    producer_forgotten: "'a' is computed by Relu 'a', and by nobody as it says",
    producer_of_another: "'a' says MatMul 'z' computes it, which does not",
    two_producers: "'z' is computed by Softmax 'z', and by MatMul 'z' as it says",
    one_value_twice: "Relu 'a' computes one value twice",
    computed_and_given: "'a' is computed by Relu 'a' and given as well",
    reader_forgotten: "'a' lists readers that are not those it has",
    reader_counted_twice: "'a' lists readers that are not those it has",
    reader_in_a_body_forgotten: "'a' lists readers that are not those it has",
    reader_that_is_gone: "'z' lists readers that are not those it has: Softmax 's'",
    value_without_a_name: "'z', which MatMul 'z' computes, is not in the graph",
    value_under_another_name: "'z' is listed in the graph, but is 'other' of another",
    value_of_another_graph: "Softmax 's' reads 'then/inner', which is not visible there",
    nothing_computes_it: "Softmax 's' reads 'fresh', which nothing computes",
    hidden_name: "'a' in a body of If 'y' hides a value of that name around it",
    a_cycle: "the graph: the graph has a cycle through ",
    a_cycle_through_a_body: "the graph: the graph has a cycle through If 'y'",
    node_of_another_graph: "a body of If 'y' holds Exp 'then/inner' of another graph",
    outer_value_as_branch_output: "a body of If 'y' has the output 'a' of a graph around it",
    output_of_nowhere: "the graph has the output 'stranger', which it does not hold",
    output_count: "the outputs of the graph are counted wrongly",
    input_lost: "the inputs of the model changed: x, c became c",
    input_counted_twice: "the inputs of the graph are counted wrongly",
    inputs_in_another_order: "the inputs of the model changed: x, c became c, x",
    input_of_another_type: "the declared type of 'x', one of the inputs, changed",
    output_of_another_shape: "the declared type of 'y', one of the outputs, changed",
    outputs_swapped: "the graph computes s, y, which are not the model's outputs",
    constant_too_short: "initializer 'w' has 2,048 bytes and needs 2,176",
    constant_of_another_name: "the initializer 'w' is stored as 'v'",
    stored_as_another_operator: "Softmax 's': it is stored as 'LogSoftmax'",
    unknown_operator: "Softmacks 's': ai.onnx 17 has no operator 'Softmacks'",
    operator_too_new: "RMSNormalization 's': ai.onnx 17 has no operator 'RMSNormalization'",
    domain_not_imported: "Softmax 's': the model does not import the domain 'ai.onnx.ml'",
    too_few_inputs: "MatMul 'z' has 1 inputs; it takes 2 to 2",
    input_left_out: "MatMul 'z' lacks its input 0",
    too_many_inputs: "Softmax 's' has 2 inputs; it takes 1 to 1",
    unknown_attribute: "Softmax 's' has no attribute 'axes' in this version",
    attribute_of_another_type: "Softmax 's': its attribute 'axis' is FLOAT, not INT",
    attribute_stated_twice: "Softmax 's' states its attribute 'axis' twice",
    attribute_lacking: "Concat 's' lacks its attribute 'axis'",
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda function: function.__name__)
def test_every_broken_invariant_is_found(break_it: Callable[[Model], None]) -> None:
    model = sound()
    interface = Interface.of(model)
    assert problems(model, interface) == []
    break_it(model)
    found = problems(model, interface)
    assert any(problem.startswith(BROKEN[break_it]) for problem in found), found


def test_an_input_with_a_default_may_be_frozen_and_no_other() -> None:
    proto = graphs.matmul()
    proto.graph.input.append(value("w", (16, 32)))
    model = Model.load(proto)
    interface = Interface.of(model)
    Editor(model).freeze_input(model.graph.values["w"])
    assert problems(model, interface) == []


def test_the_same_problem_everywhere_is_not_told_without_end() -> None:
    nodes = [node("Relu", ["x"], [f"y{number}"]) for number in range(500)]
    model = Model.load(graphs.model(nodes, ["x"], ["y0"]))
    for made in model.graph.nodes:
        become(made, "Rely")
    assert len(problems(model)) == 100


@pytest.mark.parametrize("path", graphs.ARCHITECTURES, ids=lambda path: path.stem)
def test_architectures_are_sound(path: Path) -> None:
    model = Model.load(path)
    assert problems(model, Interface.of(model)) == []


# -- fingerprints ----------------------------------------------------------------------------------


def changes() -> Iterator[Callable[[Model], None]]:
    yield lambda m: m.graph._set_input(maker(m, "s"), 0, named(m, "a"))
    yield lambda m: become(maker(m, "then/inner"), "Abs")
    yield lambda m: setattr(maker(m, "s").proto.attribute[0], "i", 0)
    yield lambda m: m.graph._set_inputs(m.graph.inputs[:1])
    yield lambda m: setattr(named(m, "w"), "weight", None)
    yield lambda m: setattr(m.proto.opset_import[0], "version", 18)


def test_fingerprints_tell_graphs_apart_and_nothing_else() -> None:
    first = fingerprint(sound())
    assert fingerprint(sound()) == first  # though the store draws its keys at random
    found = set()
    for change in changes():
        model = sound()
        change(model)
        found.add(fingerprint(model))
    assert len(found | {first}) == 7


def test_fingerprints_tell_constants_apart_by_place_or_by_content(tmp_path: Path) -> None:
    small, other = (graphs.weight("w", (2, 2), seed=seed) for seed in (0, 1))
    made = [
        graphs.model([node("MatMul", ["x", "w"], ["y"])], ["x"], ["y"], [tensor])
        for tensor in (small, other)
    ]
    assert len({fingerprint(Model.load(proto)) for proto in made}) == 2
    large = graphs.save(graphs.matmul(), tmp_path / "m.onnx")
    assert fingerprint(Model.load(large)) == fingerprint(Model.load(large))


# -- in pipelines ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """A pass that breaks the graph."""

    name: ClassVar[str] = "break"

    def run(self, model: Model, edit: Editor) -> None:
        first = next(iter(model.graph.nodes))
        edit.set_input(first, 0, None)
        edit.record("break", "a", "", "")


@dataclass(frozen=True)
class BreakUnseen:
    """A pass that breaks the graph past the editor: no journal takes that back."""

    name: ClassVar[str] = "break-unseen"

    def run(self, model: Model, edit: Editor) -> None:
        next(iter(model.graph.nodes)).inputs[0] = None
        edit.record("break-unseen", "a", "", "")


@dataclass(frozen=True)
class Silent:
    """A pass that edits and tells nobody."""

    name: ClassVar[str] = "silent"

    def run(self, model: Model, edit: Editor) -> None:
        last = list(model.graph.nodes)[-1]
        edit.set_input(last, 0, last.inputs[0])


@pytest.mark.parametrize("each", [False, True])
def test_a_pass_that_breaks_the_model_is_undone_and_reported(each: bool) -> None:
    model = sound()
    before = fingerprint(model)
    dead = pipeline(0, "remove-dead")
    runs = run_pipeline(model, [*dead, Break(), *dead], verify_each=each)
    assert [run.error for run in runs] == [
        "",
        "the model is broken after it: Relu 'a' has 0 inputs; it takes 1 to 1",
        "",
    ]
    assert [len(run.changes) for run in runs] == [0, 0, 0]
    assert fingerprint(model) == before
    assert problems(model) == []


def test_an_undo_that_leaves_traces_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="the journal is incomplete"):
        run_pipeline(sound(), [BreakUnseen()], verify_each=True)


def test_what_was_wrong_before_is_no_passes_fault() -> None:
    model = sound()
    maker(model, "s").proto.attribute.append(onnx.helper.make_attribute("axes", 1))
    runs = run_pipeline(model, pipeline(0, "remove-dead"))
    assert [run.error for run in runs] == [""]


def test_the_environment_asks_for_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("graphopt.verify.problems", lambda *_: seen.append(1) or [])
    monkeypatch.setenv("GRAPHOPT_VERIFY_EACH", "0")
    run_pipeline(sound(), pipeline(1, None))
    assert len(seen) == 1
    monkeypatch.setenv("GRAPHOPT_VERIFY_EACH", "1")
    runs = run_pipeline(sound(), pipeline(1, None))
    assert len(seen) == 1 + 1 + sum(run.seconds > 0 for run in runs)  # those that had to run


def test_edits_that_nobody_recorded_are_a_change_all_the_same() -> None:
    (run,) = run_pipeline(sound(), [Silent()])
    assert [(change.rule, change.after) for change in run.changes] == [
        ("silent", "edits without an account")
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_levels_leave_sound_models_and_do_the_same_twice(level: int) -> None:
    """Blame runs pipelines again and again: they must be deterministic."""
    (path,) = (path for path in graphs.ARCHITECTURES if path.stem == "distilbert_ts")
    found = []
    for _ in range(2):
        model = Model.load(path)
        interface = Interface.of(model)
        runs = run_pipeline(model, pipeline(level, None), verify_each=True)
        assert problems(model, interface) == []
        found.append((fingerprint(model), [run.changes for run in runs]))
    assert found[0] == found[1]


def test_numpy_is_not_what_counts() -> None:
    """Weights over 1 KB are counted by where they lie: nothing is read."""
    model = Model.load(graphs.matmul(weight("w", (512, 512))))
    held = model.graph.values["w"].weight
    assert held is not None
    first = fingerprint(model)
    assert np.asarray(held.values).shape == (512, 512)
    assert fingerprint(model) == first


def test_passes_start_with_nodes_in_topological_order() -> None:
    """Rules put what they make at the place of their root, behind all that stands there."""
    seen = []

    @dataclass(frozen=True)
    class Look:
        name: ClassVar[str] = "look"

        def run(self, model: Model, edit: Editor) -> None:
            done: set[Value] = set()
            for made in model.graph.nodes:
                seen.append(all(v in done for v in made.inputs if v is not None and v.producer))
                done.update(v for v in made.outputs if v is not None)

    @dataclass(frozen=True)
    class Insert:
        name: ClassVar[str] = "insert"

        def run(self, model: Model, edit: Editor) -> None:
            made = maker(model, "a")
            known = {"x": named(model, "x")}
            edit.detach_node(made)
            for number, (read, result) in enumerate([("fresh", "a"), ("x", "fresh")]):
                proto = node("Relu", [read], [result], name=f"n{number}")
                if read == "fresh":
                    known["fresh"] = edit.add_value(model.graph, "fresh")
                results = {"a": named(model, "a")} if result == "a" else {"fresh": known["fresh"]}
                edit.add_node(model.graph, proto, known, results, made.position, "insert")
            edit.record("insert", "a", "", "")

    runs = run_pipeline(sound(), [Insert(), Look()])
    assert [run.error for run in runs] == ["", ""]
    assert len(seen) == 5
    assert all(seen)
