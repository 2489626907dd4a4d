"""The cheapest division between floats and integers, against every subset of small graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ir import Model, Value
from graphopt.passes.quantize.placement import Costs, cheapest
from graphopt.passes.quantize.units import Unit
from tests import graphs

KINDS = ("sum", "lookup", "movement", "product", "convolution", "affine")


@dataclass(frozen=True)
class Problem:
    """A graph of units and of nodes that are none, with what everything costs."""

    units: list[Unit]
    values: list[Value]
    costs: Costs
    barred: frozenset[Unit]

    def total(self, chosen: Iterable[Unit]) -> float:
        """The cost of a choice, counted value by value."""
        integer = set(chosen)
        givers = {value: unit for unit in self.units for value in unit.outputs}
        spent = sum(self.costs.floats(u) for u in self.units if u not in integer)
        spent += sum(self.costs.integers(u) for u in integer)
        for value in self.values:
            readers = {node for unit in integer if value in unit.inputs for node in unit.nodes}
            read_as_floats = value.is_output or any(n not in readers for n in value.consumers)
            read_as_integers = bool(readers)
            giver = givers.get(value)
            if giver in integer and giver is not None and giver.kind != "product":
                spent += self.costs.dequantize(value) if read_as_floats else 0
            elif read_as_integers and (giver not in integer or read_as_floats):
                spent += self.costs.quantize(value)
        return spent

    def least(self) -> float:
        free = [unit for unit in self.units if unit not in self.barred]
        sizes = range(len(free) + 1)
        return min(self.total(c) for size in sizes for c in itertools.combinations(free, size))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 7))
    made, names, kinds = [], ["x"], {}
    for number in range(count):
        inputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
        outputs = [f"v{number}", f"w{number}"][: draw(st.integers(1, 2))]
        made.append(graphs.node("Op", inputs, outputs, f"n{number}", domain="test"))
        names += outputs
        kinds[f"n{number}"] = draw(st.sampled_from((*KINDS, "")))
    outputs = draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=3, unique=True))
    model = Model.load(graphs.model(made, ["x"], outputs, domains=["test"]))
    # A second value that a node reads may say how, as the roi of a Resize does: not what moves.
    reads = {name: draw(st.integers(1, 3)) for name in kinds}
    units = [
        Unit(
            kinds[node.name],  # type: ignore[arg-type]
            (node,),
            tuple(v for v in dict.fromkeys(node.inputs) if v is not None)[: reads[node.name]],
            tuple(v for v in node.outputs if v is not None),
        )
        for node in model.graph.nodes
        if kinds[node.name]
    ]
    values = list(model.graph.values.values())
    price = st.integers(0, 12)
    floats, integers = ({u: draw(price) for u in units} for _ in range(2))
    quantize, dequantize = ({v: draw(price) for v in values} for _ in range(2))
    costs = Costs(
        floats.__getitem__, integers.__getitem__, quantize.__getitem__, dequantize.__getitem__
    )
    barred = frozenset(u for u in units if draw(st.integers(0, 5)) == 0)
    return Problem(units, values, costs, barred)


@settings(max_examples=1500)
@given(problems())
def test_no_other_choice_is_cheaper(problem: Problem) -> None:
    chosen = cheapest(problem.units, problem.costs, problem.barred)
    assert not problem.barred & set(chosen)
    assert chosen == [unit for unit in problem.units if unit in set(chosen)]
    assert problem.total(chosen) == problem.least()


def chain(*kinds: str, outputs: tuple[str, ...] = ()) -> list[Unit]:
    """Units in a row: x -> v0 -> v1 ..."""
    names = ["x", *(f"v{i}" for i in range(len(kinds)))]
    made = [graphs.node("Op", [a], [b], domain="test") for a, b in itertools.pairwise(names)]
    model = Model.load(graphs.model(made, ["x"], [*outputs, names[-1]], domains=["test"]))
    return [
        Unit(kind, (node,), (node.inputs[0],), (node.outputs[0],))  # type: ignore[arg-type]
        for kind, node in zip(kinds, model.graph.nodes, strict=True)
    ]


def flat(gain: dict[str, float], boundary: float) -> Costs:
    """Floats cost a hundred, integers what is gained less; all boundaries cost the same."""
    return Costs(
        lambda unit: 100.0,
        lambda unit: 100.0 - gain[unit.kind],
        lambda value: boundary,
        lambda value: boundary,
    )


def test_what_loses_a_little_goes_along_between_what_gains() -> None:
    units = chain("convolution", "lookup", "convolution")
    gains = {"convolution": 10.0, "lookup": -3.0}
    assert cheapest(units, flat(gains, 2.0)) == units
    assert cheapest(units, flat(gains, 1.0)) == [units[0], units[2]]
    assert cheapest(units, flat(gains, 20.0)) == []


def test_products_leave_floats_and_quantize_for_nothing() -> None:
    units = chain("product", "product")
    assert cheapest(units, flat({"product": 1.0}, 1.5)) == units
    apart = chain("product", "product", outputs=("v0",))
    assert cheapest(apart, flat({"product": 1.0}, 1.5)) == []
    assert cheapest(apart, flat({"product": 1.0}, 0.5)) == apart


@pytest.mark.parametrize("barred", [0, 1, 2])
def test_a_barred_unit_is_paid_around(barred: int) -> None:
    units = chain("convolution", "convolution", "convolution")
    chosen = cheapest(units, flat({"convolution": 10.0}, 1.0), {units[barred]})
    assert chosen == [unit for i, unit in enumerate(units) if i != barred]


def test_nothing_to_choose() -> None:
    assert cheapest([], flat({}, 1.0)) == []
