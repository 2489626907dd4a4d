"""How much each unit of a coupled group matters: a score for each, larger is more important."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.passes.prune.groups import Group, Slot
from graphopt.statistics import Observer, Statistics

Array = NDArray[Any]
Floats = NDArray[np.float64]
UnitImportance = Literal["activation", "l1", "l2", "apoz"]
UNIT_IMPORTANCES: Final[tuple[UnitImportance, ...]] = ("activation", "l1", "l2", "apoz")
NEEDS_DATA: Final = frozenset({"activation", "apoz"})


def observed(groups: Iterable[Group], importance: UnitImportance) -> set[Observer]:
    """What has to be known of the activations that the groups' readers read."""
    if importance not in NEEDS_DATA:
        return set()
    kind: Literal["moments", "nonzero"] = "moments" if importance == "activation" else "nonzero"
    return {
        Observer(slot.read.name, kind, slot.read_axis)
        for group in groups
        for slot in group.readers
        if slot.read is not None
    }


def unit_scores(
    edit: Editor, group: Group, importance: UnitImportance, statistics: Statistics | None = None
) -> Floats:
    """The score of each unit, float64 [units].

    * "l1", "l2": norms of the weights that give it (Li et al., arXiv:1608.08710);
    * "activation": energy of what its readers read of it, times that of their weights for it;
    * "apoz": the share of positions at which it is not zero (Hu et al., arXiv:1607.03250).

    Readers that calibration has not seen count by their weights alone.
    """
    if importance in ("l1", "l2"):
        total = sum(
            (_norms(edit, slot, group.units, importance) for slot in _weighted(edit, group)),
            np.zeros(group.units),
        )
        return np.asarray(np.sqrt(total) if importance == "l2" else total)
    scores = np.zeros(group.units)
    for slot in group.readers:
        found = _power(slot, importance, statistics)
        if importance == "activation":
            found = found * _norms(edit, slot, None, "l2")
        known = slot.units >= 0
        np.add.at(scores, slot.units[known], found[known])
    return scores


def ranking(scores: Floats) -> tuple[int, ...]:
    """All units, the least important first; equal ones in order."""
    return tuple(int(unit) for unit in np.argsort(scores, kind="stable"))


def _weighted(edit: Editor, group: Group) -> list[Slot]:
    """Givers that multiply: matrices, not what is added or scales."""
    found = []
    for slot in group.givers:
        weight = constant_of(slot.value, edit.model.store)
        if weight is not None and sum(size > 1 for size in weight.shape) > 1:
            found.append(slot)
    return found or group.givers


def _norms(edit: Editor, slot: Slot, units: int | None, kind: str) -> Floats:
    """Sums of magnitudes or squares of the weights at each index, added up by unit if given."""
    weight = constant_of(slot.value, edit.model.store)
    assert weight is not None
    array = np.moveaxis(np.asarray(weight.values, np.float64), slot.axis, 0)
    flat = array.reshape(len(array), -1)
    sums = np.abs(flat).sum(axis=1) if kind == "l1" else np.square(flat).sum(axis=1)
    if units is None:
        return np.asarray(sums)
    found = np.zeros(units)
    known = slot.units >= 0
    np.add.at(found, slot.units[known], sums[known])
    return found


def _power(slot: Slot, importance: UnitImportance, statistics: Statistics | None) -> Floats:
    """Mean squares, or shares of what is not zero, of what meets each index of a reader."""
    size = len(slot.units)
    kind: Literal["moments", "nonzero"] = "moments" if importance == "activation" else "nonzero"
    if slot.read is None or statistics is None:
        return np.ones(size)
    if Observer(slot.read.name, kind, slot.read_axis) not in statistics:
        return np.ones(size)
    if kind == "moments":
        seen = statistics.moments(slot.read.name, slot.read_axis)
        by_channel = seen.variance + np.square(seen.mean)
    else:
        by_channel = statistics.nonzero(slot.read.name, slot.read_axis)
    # A grouped convolution's index meets the channel at that place of every group.
    return np.asarray(by_channel.reshape(-1, size).mean(axis=0))
