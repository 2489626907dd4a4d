"""Scales and zero points of activations: from what calibration saw, and what operators ask for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal

import networkx as nx
import numpy as np

from graphopt.ir import Value
from graphopt.kernels import ranges
from graphopt.kernels.affine import Affine, asymmetric
from graphopt.kernels.ranges import Histogram
from graphopt.passes.quantize.units import Unit
from graphopt.statistics import Observer, Statistics

Range = tuple[float, float]
Method = Literal["min-max", "percentile", "entropy", "mse"]

METHODS: Final[Mapping[Method, Callable[[Histogram], Range]]] = {
    "min-max": ranges.min_max,
    "percentile": ranges.percentile,
    "entropy": ranges.entropy,
    "mse": ranges.mse,
}
_KNEE: Final = -3.0  # below it HardSwish is zero, whatever its input is
_ALIKE: Final = 4.0  # ranges that differ by more lose over two bits when they share a scale


def wanted(units: Collection[Unit]) -> set[Observer]:
    """What calibration has to observe, so that any choice of these units can be made."""
    values = {value.name for unit in units for value in (*unit.inputs, *unit.outputs)}
    return {Observer(name, "histogram") for name in values}


class Ranges:
    """The range of every activation that units read or give, by one method of calibration."""

    def __init__(
        self, units: Sequence[Unit], statistics: Statistics, method: Method = "mse"
    ) -> None:
        self._statistics = statistics
        self._choose = METHODS[method]
        self._givers = {value: unit for unit in units for value in unit.outputs}
        self._readers: dict[Value, list[Unit]] = {}
        for unit in units:
            for value in unit.inputs:
                self._readers.setdefault(value, []).append(unit)
        self._known: dict[Value, Range | None] = {}

    def of(self, value: Value) -> Range | None:
        """The range, None where calibration saw nothing of the value."""
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def _find(self, value: Value) -> Range | None:
        giver = self._givers.get(value)
        if giver is not None and (
            giver.kind == "hard-sigmoid" or (giver.kind == "lookup" and giver.node.op == "Sigmoid")
        ):
            return 0.0, 1.0
        try:
            low, high = self._choose(self._statistics.histogram(value.name))
        except LookupError:
            return None
        if giver is not None:
            low, high = max(low, giver.clamp[0]), min(high, giver.clamp[1])
        readers = self._readers.get(value, [])
        everywhere = len(readers) == len(value.consumers) and not value.is_output
        if everywhere and readers and all(unit.kind == "hard-swish" for unit in readers):
            low = max(low, _KNEE)
        return (min(low, 0.0), max(high, 0.0)) if np.isfinite([low, high]).all() else None

    def are_alike(self, values: Sequence[Value]) -> bool:
        """True where one scale serves all of them: boxes and scores have none in common."""
        found = [self.of(value) for value in values]
        widths = [known[1] - known[0] for known in found if known is not None]
        if len(widths) < len(values):
            return False
        narrowest = min(widths)
        return narrowest > 0 and max(widths) <= _ALIKE * narrowest


def affines(chosen: Sequence[Unit], known: Ranges) -> dict[str, Affine]:
    """u8 parameters by value name: one set for all values between which elements only move.

    Raises LookupError for a value that calibration saw nothing of.
    """
    graph: nx.Graph[Value] = nx.Graph()
    derived = {unit.outputs[0]: unit for unit in chosen if unit.kind == "affine"}
    for unit in chosen:
        graph.add_nodes_from((*unit.inputs, *unit.outputs))
        if unit.shares_range:
            values = (*unit.inputs, *unit.outputs)
            graph.add_edges_from((values[0], other) for other in values[1:])
    shifts: dict[Value, float] = {}
    for unit in derived.values():
        shifts.setdefault(unit.inputs[0], unit.shift / unit.factor)
    found: dict[str, Affine] = {}
    for group in nx.connected_components(graph):
        if len(group) > 1 or not derived.keys() & group:
            affine = _shared([known.of(value) for value in group], shifts, group)
            found |= {value.name: affine for value in group}
    for value, unit in derived.items():
        if value.name not in found:
            found[value.name] = _derived(unit, found[unit.inputs[0].name])
    return found


def _shared(
    each: Sequence[Range | None], shifts: Mapping[Value, float], group: Collection[Value]
) -> Affine:
    """One set of parameters for a group of values.

    Where an affine unit reads one of them, its shift is made a whole number of steps, so that it
    is exact; and what it moves to zero is representable.
    """
    ranges_known = [each_range for each_range in each if each_range is not None]
    if len(ranges_known) < len(each):
        raise LookupError(f"calibration saw nothing of {min(v.name for v in group)!r}")
    shift = next((shifts[value] for value in group if value in shifts), 0.0)
    low = min(*(r[0] for r in ranges_known), -shift, 0.0)
    high = max(*(r[1] for r in ranges_known), -shift, 0.0)
    affine = asymmetric(low, high)
    steps = int(abs(shift) / float(affine.scale))
    if steps < 1:
        return affine
    scale = abs(shift) / steps  # a little more than before
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return Affine(np.float32(scale), np.uint8(zero), np.dtype(np.uint8))


def _derived(unit: Unit, source: Affine) -> Affine:
    """How an affine unit's result reads in the integers of its source."""
    scale = np.float32(float(source.scale) * unit.factor)
    zero = int(source.zero_point) - round(unit.shift / unit.factor / float(source.scale))
    return Affine(scale, np.uint8(np.clip(zero, 0, 255)), np.dtype(np.uint8))
