"""Pipelines: text that round-trips, mistakes that are named, passes that fail alone."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import exporter
from graphopt.edit import Change, Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.manager import Pass, parse_pipeline, run_pipeline, to_text
from graphopt.passes.pipelines import LEVELS, PASSES, pipeline
from tests import graphs
from tests.graphs import node


@dataclass(frozen=True)
class Tuned:
    """A pass with an option of every kind."""

    name: ClassVar[str] = "tuned"
    flag: bool = False
    on: bool = True
    count: int = 3
    share: float = 0.5
    keep: str = ""

    def run(self, model: Model, edit: Editor) -> None:
        pass


@dataclass(frozen=True)
class Skip:
    """Let the readers of the first node read its input."""

    name: ClassVar[str] = "skip"

    def run(self, model: Model, edit: Editor) -> None:
        first = next(iter(model.graph.nodes))
        source, result = first.inputs[0], first.outputs[0]
        assert source is not None
        assert result is not None
        edit.replace_uses(result, source)
        edit.remove_node(first)
        edit.record("skip", result.name, "before", "after")


@dataclass(frozen=True)
class Fails:
    """Does half of its work, then raises."""

    name: ClassVar[str] = "fails"

    def run(self, model: Model, edit: Editor) -> None:
        Skip().run(model, edit)
        raise ZeroDivisionError("half way")


REGISTRY: dict[str, type[Pass]] = {"tuned": Tuned, "skip": Skip, "fails": Fails}


def texts(passes: list[Pass]) -> list[str]:
    return [to_text(step) for step in passes]


def chain() -> Model:
    nodes = [node("Neg", ["x"], ["a"]), node("Relu", ["a"], ["b"]), node("Exp", ["b"], ["y"])]
    return Model.load(graphs.model(nodes))


# -- text ------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.builds(
            Tuned,
            flag=st.booleans(),
            on=st.booleans(),
            count=st.integers(),
            share=st.floats(allow_nan=False),
            keep=st.text("abc./_-=:", max_size=8),
        )
        | st.just(Skip()),
        max_size=4,
    )
)
def test_pipelines_round_trip_as_text(passes: list[Pass]) -> None:
    assert parse_pipeline(", ".join(texts(passes)), REGISTRY) == passes


def test_only_options_that_differ_from_their_default_are_told() -> None:
    assert to_text(Tuned()) == "tuned"
    assert to_text(Tuned(on=False, count=4, keep="x")) == "tuned{on=false, count=4, keep=x}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ", []),
        ("skip", ["skip"]),
        ("skip,", ["skip"]),
        (" skip ,\n tuned ", ["skip", "tuned"]),
        ("tuned{}", ["tuned"]),
        (
            "tuned { flag = true , count=7 }, skip, skip",
            ["tuned{flag=true, count=7}", "skip", "skip"],
        ),
    ],
)
def test_spaces_and_commas(text: str, expected: list[str]) -> None:
    assert texts(parse_pipeline(text, REGISTRY)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "passes: there is no pass 'nope'; there are: tuned, skip, fails"),
        ("skip, nope{a=1}", "passes: there is no pass 'nope'; there are: tuned, skip, fails"),
        ("skip skip", "passes: cannot read 'skip skip'; write 'name, name{option=value}'"),
        ("skip,, skip", "passes: cannot read ', skip'; write 'name, name{option=value}'"),
        ("Skip", "passes: cannot read 'Skip'; write 'name, name{option=value}'"),
        ("tuned{count=1", "passes: cannot read 'tuned{count=1'; write 'name, name{option=value}'"),
        ("tuned{{}}", "passes: cannot read 'tuned{{}}'; write 'name, name{option=value}'"),
        ("skip; tuned", "passes: cannot read 'skip; tuned'; write 'name, name{option=value}'"),
        (
            "tuned{size=1}",
            "passes: tuned has no option 'size=1'; its options: flag, on, count, share, keep",
        ),
        (
            "tuned{count}",
            "passes: tuned has no option 'count'; its options: flag, on, count, share, keep",
        ),
        ("skip{count=1}", "passes: skip has no option 'count=1'; its options: none"),
        ("tuned{flag=1}", "passes: tuned: flag is true or false, not '1'"),
        ("tuned{count=few}", "passes: tuned: count is a number, not 'few'"),
        ("tuned{count=1.5}", "passes: tuned: count is a number, not '1.5'"),
        ("tuned{share=}", "passes: tuned: share is a number, not ''"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text, REGISTRY)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@given(st.text("abc-{}=, \n1", max_size=30) | st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_pipeline(text, REGISTRY)


# -- levels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_text_that_round_trips(level: int) -> None:
    chosen = pipeline(level, None)
    assert ", ".join(texts(chosen)) == LEVELS[level]
    assert all(PASSES[step.name] is type(step) for step in chosen)


def test_level_0_is_a_round_trip_and_others_are_not() -> None:
    assert pipeline(0, None) == []
    assert all(pipeline(level, None) for level in LEVELS if level > 0)


def test_named_passes_take_the_place_of_a_level() -> None:
    assert texts(pipeline(0, "remove-dead, freeze-parameters")) == [
        "remove-dead",
        "freeze-parameters",
    ]
    assert pipeline(2, "") == []


def test_overridable_inputs_are_kept_on_demand() -> None:
    assert "freeze-parameters" in texts(pipeline(2, None))
    kept = texts(pipeline(2, None, keep_overridable=True))
    assert kept == [name for name in texts(pipeline(2, None)) if name != "freeze-parameters"]


@pytest.mark.parametrize("level", [-1, 4, 100])
def test_levels_that_do_not_exist(level: int) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline(level, None)
    assert str(caught.value) == f"level {level}: there are levels 0 to 3"


def test_passes_are_called_by_verb_and_object_and_documented() -> None:
    for name, kind in PASSES.items():
        assert name == kind.name
        assert kind.__name__ == "".join(word.title() for word in name.split("-"))
        assert kind.__doc__
        assert to_text(kind()) == name


# -- runs ------------------------------------------------------------------------------------------


def test_what_passes_did_is_told() -> None:
    told: list[str] = []
    runs = run_pipeline(chain(), [Skip(), Tuned(count=9), Skip()], told.append)
    assert told == ["skip", "tuned", "skip"]
    assert [run.text for run in runs] == ["skip", "tuned{count=9}", "skip"]
    assert [run.changes for run in runs] == [
        (Change("skip", "a", "before", "after"),),
        (),
        (Change("skip", "b", "before", "after"),),
    ]
    assert not any(run.error for run in runs)
    assert all(run.seconds >= 0 for run in runs)


def test_a_pass_that_raises_is_undone_and_reported_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = chain()
    with caplog.at_level(logging.ERROR):
        runs = run_pipeline(loaded, [Fails(), Skip(), Fails()])
    assert [run.error for run in runs] == [
        "ZeroDivisionError: half way",
        "",
        "ZeroDivisionError: half way",
    ]
    assert [len(run.changes) for run in runs] == [0, 1, 0]
    assert [n.text() for n in loaded.graph.nodes] == ["b = Relu (x)", "y = Exp (b)"]
    assert "pass fails failed and was undone" in caplog.text


def test_a_pass_that_raises_alone_leaves_the_model_as_it_was() -> None:
    loaded = chain()
    before = exporter.to_proto(loaded)
    run_pipeline(loaded, [Fails()])
    assert exporter.to_proto(loaded) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_pass_interrupts(stop: type[BaseException]) -> None:
    class Stopped(Skip):
        def run(self, model: Model, edit: Editor) -> None:
            raise stop

    with pytest.raises(stop):
        run_pipeline(chain(), [Stopped()])


def test_a_text_option_with_a_comma_is_refused_rather_than_cut() -> None:
    """It would not round-trip: commas separate options."""
    text: Any = to_text(Tuned(keep="a,b"))
    with pytest.raises(UsageError, match="tuned has no option 'b'"):
        parse_pipeline(text, REGISTRY)


def test_a_pass_that_found_nothing_to_do_waits_until_the_graph_changes() -> None:
    ran: list[int] = []

    @dataclass(frozen=True)
    class Idle:
        name: ClassVar[str] = "idle"

        def run(self, model: Model, edit: Editor) -> None:
            ran.append(len(model.graph.nodes))

    chain_of = chain()
    count = len(chain_of.graph.nodes)
    runs = run_pipeline(chain_of, [Idle(), Idle(), Skip(), Idle(), Fails(), Idle()])
    assert len(runs) == 6
    assert ran == [count, count - 1]  # what Fails did was undone
