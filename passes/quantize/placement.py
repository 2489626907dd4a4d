"""Which units run on integers: the cheapest division of the graph, a minimum cut.

A unit costs what it was measured to cost in floats or on integers; where a value passes from one
side to the other it costs a QuantizeLinear once, or a DequantizeLinear once. Choosing the side of
every unit is then a minimum cut (project selection: Picard, Management Science 22, 1976), which
needs no search. Integer arithmetic between products never pays by itself: it is chosen only where
leaving and entering would cost more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import networkx as nx

from graphopt.ir import Node, Value
from graphopt.passes.quantize.units import Unit

_INTEGER, _FLOAT = "integer", "float"


@dataclass(frozen=True)
class Costs:
    """Milliseconds: of each unit on either side, and of passing a value to the other side."""

    floats: Callable[[Unit], float]
    integers: Callable[[Unit], float]
    quantize: Callable[[Value], float]
    dequantize: Callable[[Value], float]


def cheapest(
    units: Sequence[Unit], costs: Costs, barred: Collection[Unit] = frozenset()
) -> list[Unit]:
    """The units to run on integers, in order. Those `barred` stay floating-point."""
    graph: nx.DiGraph[object] = nx.DiGraph()
    graph.add_nodes_from((_INTEGER, _FLOAT))
    for unit in units:
        # On the integer side the edge to _FLOAT is cut, and the other way round.
        _add(graph, _INTEGER, unit, costs.floats(unit))
        _add(graph, unit, _FLOAT, None if unit in barred else costs.integers(unit))
    givers = {value: unit for unit in units for value in unit.outputs}
    owner: dict[Node, Unit] = {node: unit for unit in units for node in unit.nodes}
    for value in dict.fromkeys(v for unit in units for v in (*unit.inputs, *unit.outputs)):
        _add_value(graph, value, givers.get(value), owner, costs)
    _, (integer, _) = nx.minimum_cut(graph, _INTEGER, _FLOAT)
    return [unit for unit in units if unit in integer]


def _add_value(
    graph: nx.DiGraph[object],
    value: Value,
    giver: Unit | None,
    owner: dict[Node, Unit],
    costs: Costs,
) -> None:
    """The cost of a value that is read on the other side than it is given on."""
    source: object = giver if giver is not None else _FLOAT
    readers = dict.fromkeys(owner.get(node) for node in value.consumers)
    integer_readers = [unit for unit in readers if unit is not None and value in unit.inputs]
    others = value.is_output or None in readers or len(integer_readers) < len(readers)
    if integer_readers and (giver is None or giver in graph):
        # `needed` is on the integer side as soon as one reader is; then the giver must be too, or
        # the value be quantized.
        needed = ("quantized", value)
        for unit in integer_readers:
            _add(graph, unit, needed, None)
        if giver is not None and giver.gives_floats:
            # Its kernel quantizes the result for nothing, where nobody reads that as floats.
            source = ("separate", value)
            for other in (giver, *integer_readers, *([_FLOAT] if others else [])):
                _add(graph, source, other, None)
        _add(graph, needed, source, costs.quantize(value))
    if giver is not None and not giver.gives_floats:
        # `kept` is on the float side as soon as one reader is.
        kept = ("dequantized", value)
        for reader in integer_readers:
            _add(graph, kept, reader, None)
        if others:
            _add(graph, kept, _FLOAT, None)
        _add(graph, giver, kept, costs.dequantize(value))


def _add(graph: nx.DiGraph[object], a: object, b: object, capacity: float | None) -> None:
    """An edge that is cut for `capacity`, or cannot be cut."""
    if capacity is None:
        graph.add_edge(a, b)
        return
    have = graph.edges[a, b].get("capacity") if graph.has_edge(a, b) else 0.0
    if have is not None:
        graph.add_edge(a, b, capacity=have + max(capacity, 0.0))
