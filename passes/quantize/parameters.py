"""Scales and zero points of activations: from what calibration saw, and what operators ask for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

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
        """The range, None where calibration saw nothing of the value, or numbers not finite.

        A mask of minus infinity says what no integer can.
        """
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def _find(self, value: Value) -> Range | None:
        giver = self._givers.get(value)
        if giver is not None and (giver.kind == "hard-sigmoid" or giver.node.op == "Sigmoid"):
            return 0.0, 1.0
        if self._statistics.nonfinite.get(value.name):
            return None
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
        return min(low, 0.0), max(high, 0.0)

    def clamp(self, value: Value) -> Range:
        """The range to which the unit that gives the value leaves the clamping."""
        giver = self._givers.get(value)
        if giver is None:
            return -np.inf, np.inf
        return (0.0, 1.0) if giver.kind == "hard-sigmoid" else giver.clamp

    def are_alike(self, values: Sequence[Value]) -> bool:
        """True where one scale serves all of them: boxes and scores have none in common."""
        found = [self.of(value) for value in values]
        widths = [known[1] - known[0] for known in found if known is not None]
        return len(widths) == len(values) and max(widths) <= _ALIKE * min(widths)


def usable(units: Iterable[Unit], known: Ranges) -> list[Unit]:
    """The units whose parameters calibration tells; any part of them can be chosen.

    Left out are units of which it saw nothing, results of Concat whose parts have no scale in
    common, and shifts that would move a clamp away from the end of its range.
    """
    kept, groups = [], _Groups(known)
    for unit in units:
        if any(known.of(value) is None for value in (*unit.inputs, *unit.outputs)):
            continue
        if unit.kind == "concatenation" and not known.are_alike(unit.inputs):
            continue
        if groups.add(unit):
            kept.append(unit)
    return kept


def affines(chosen: Sequence[Unit], known: Ranges) -> dict[str, Affine]:
    """u8 parameters by value name: one set for all values between which elements only move.

    Raises LookupError for a value that calibration saw nothing of, ValueError for units that are
    not `usable`.
    """
    groups = _Groups(known)
    for unit in chosen:
        for value in (*unit.inputs, *unit.outputs):
            if known.of(value) is None:
                raise LookupError(f"calibration saw nothing of {value.name!r}")
        if not groups.add(unit):
            raise ValueError(f"{unit.root!r} cannot share the range of what it reads")
    return groups.affines()


@dataclass(frozen=True)
class _Reading:
    """How a value reads in the integers of a group: factor * (what the group holds) + shift."""

    factor: float = 1.0
    shift: float = 0.0

    def apply(self, ends: Range) -> Range:
        low, high = ends
        return self.factor * low + self.shift, self.factor * high + self.shift

    def undo(self, ends: Range) -> Range:
        low, high = ends
        return (low - self.shift) / self.factor, (high - self.shift) / self.factor

    def then(self, other: _Reading) -> _Reading:
        """First this, then the other."""
        return _Reading(self.factor * other.factor, self.shift * other.factor + other.shift)


_Group = dict[Value, _Reading]


class _Groups:
    """Values that are read from the same integers, because elements only move between them."""

    def __init__(self, known: Ranges) -> None:
        self._known = known
        self._groups: dict[Value, _Group] = {}

    def add(self, unit: Unit) -> bool:
        """Take in a unit; False, and nothing is changed, where it cannot be.

        Parts of a Concat that cannot share its range keep their own: the kernel takes both.
        """
        for value in unit.inputs:
            self._groups.setdefault(value, {value: _Reading()})
        if not (unit.shares_range or unit.kind == "affine"):
            for value in unit.outputs:
                self._groups.setdefault(value, {value: _Reading()})
            return self._holds(self._groups[unit.outputs[0]])
        source = self._groups[unit.inputs[0]]
        given = source[unit.inputs[0]].then(_Reading(unit.factor, unit.shift))
        merged = source | dict.fromkeys(unit.outputs, given)
        if not self._holds(merged):
            if unit.kind != "concatenation":
                return False
            given = _Reading()
            merged = dict.fromkeys(unit.outputs, given)
        for value in unit.inputs[1:]:
            if value not in merged:
                wider = _joined(merged, given, self._groups[value], value)
                merged = wider if self._holds(wider) else merged
        for value in merged:
            self._groups[value] = merged
        return True

    def affines(self) -> dict[str, Affine]:
        """The parameters of every value."""
        found: dict[str, Affine] = {}
        for group in {id(group): group for group in self._groups.values()}.values():
            affine = self._affine(group)
            found |= {value.name: _read(affine, reading) for value, reading in group.items()}
        return found

    def _holds(self, group: _Group) -> bool:
        """True where the range of the group ends where the clamps of its members end.

        Only there does a QuantizeLinear clamp as well, and onnxruntime drops the operator.
        """
        ends = self._ends(group)
        for value, reading in group.items():
            low, high = reading.apply(ends)
            bottom, top = self._known.clamp(value)
            slack = 1e-6 * (high - low)
            if low < bottom - slack or high > top + slack:
                return False
        return True

    def _ends(self, group: _Group) -> Range:
        """The range in which all members have theirs, and so their zeros."""
        ends = []
        for value, reading in group.items():
            own = self._known.of(value)
            assert own is not None
            ends.append(reading.undo(own))
        return min(low for low, _ in ends), max(high for _, high in ends)

    def _affine(self, group: _Group) -> Affine:
        """One set of parameters. A shift becomes a whole number of steps, so that it is exact."""
        low, high = self._ends(group)
        affine = asymmetric(low, high)
        shift = max((abs(r.shift / r.factor) for r in group.values()), default=0.0)
        steps = int(shift / float(affine.scale))
        if steps >= 1:
            scale = shift / steps  # a little more than before
            zero = np.clip(np.rint(-low / scale), 0, 255)
            return Affine(np.asarray(scale, np.float32), np.asarray(zero), np.dtype(np.uint8))
        return affine


def _joined(group: _Group, reading: _Reading, other: _Group, value: Value) -> _Group:
    """Both groups, such that `value` of the other reads as `reading` does, to the last bit."""
    theirs = other[value]
    factor = reading.factor / theirs.factor
    change = _Reading(factor, (reading.shift - theirs.shift) / theirs.factor)
    return group | {
        each: reading if its == theirs else change.then(its) for each, its in other.items()
    }


def _read(affine: Affine, reading: _Reading) -> Affine:
    """How a member reads in the integers of its group."""
    if reading == _Reading():
        return affine
    scale = float(affine.scale) * reading.factor
    moved = round(reading.shift / reading.factor / float(affine.scale))
    zero = np.clip(int(affine.zero_point) - moved, 0, 255)
    return Affine(np.asarray(scale, np.float32), np.asarray(zero), np.dtype(np.uint8))
