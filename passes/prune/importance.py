"""How much each unit of a coupled group matters: a score for each, larger is more important."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.kernels.elimination import Reader, elimination
from graphopt.passes.linear import layer_of
from graphopt.passes.prune.groups import Group, Slot
from graphopt.statistics import Observer, Statistics

Array = NDArray[Any]
Floats = NDArray[np.float64]
UnitImportance = Literal["obs", "activation", "l1", "l2", "apoz"]
UNIT_IMPORTANCES: Final[tuple[UnitImportance, ...]] = ("obs", "activation", "l1", "l2", "apoz")
NEEDS_DATA: Final = frozenset({"obs", "activation", "apoz"})
_STEPS: Final = 64  # in which units go one after another; beyond, several go at once


def observed(groups: Iterable[Group], importance: UnitImportance) -> set[Observer]:
    """What has to be known of the activations that the groups' readers read."""
    if importance not in NEEDS_DATA:
        return set()
    kind: Literal["moments", "nonzero"] = "nonzero" if importance == "apoz" else "moments"
    return {
        Observer(slot.read.name, kind, slot.read_axis)
        for group in groups
        for slot in group.readers
        if slot.read is not None
    }


def readers_of(edit: Editor, groups: Iterable[Group], importance: UnitImportance) -> set[str]:
    """The layers, by root, of which Gram matrices have to be known."""
    if importance != "obs":
        return set()
    slots = (slot for group in groups for slot in group.readers)
    found = (layer_of(edit, slot.node) for slot in slots)
    return {layer.root for layer in found if layer is not None and layer.groups == 1}


def unit_scores(
    edit: Editor,
    group: Group,
    importance: UnitImportance,
    statistics: Statistics | None = None,
    grams: Mapping[str, Array] | None = None,
) -> Floats:
    """The score of each unit, float64 [units].

    * "obs": its place in the order in which units go when always the one goes without which the
      readers, fitted again, lose least; `grams` are those of what they read;
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
    if importance == "obs":
        readers = _readers(edit, group, grams or {})
        if readers:
            order, _ = elimination(readers, group.units, -(-group.units // _STEPS))
            return np.asarray(np.argsort(order), np.float64)
        importance = "activation"  # nothing linear reads it
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


def _readers(edit: Editor, group: Group, grams: Mapping[str, Array]) -> list[Reader]:
    """The linear layers among the readers, each with the columns of the units that it reads."""
    found = []
    for slot in group.readers:
        layer = layer_of(edit, slot.node)
        if layer is None or layer.root not in grams or slot.value is not layer.weights:
            continue
        stored = np.empty(layer.weight.shape, np.int64)
        np.moveaxis(stored, slot.axis, 0)[:] = slot.units.reshape(-1, *[1] * (stored.ndim - 1))
        of_columns = layer.matrix(stored)[0]
        units, counts = np.unique(of_columns[of_columns >= 0], return_counts=True)
        if len(units) and (counts == counts[0]).all():
            order = np.argsort(of_columns, kind="stable")[np.count_nonzero(of_columns < 0) :]
            columns = order.reshape(len(units), -1)
            found.append(Reader(layer.matrix(), grams[layer.root], units, columns))
    return found


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
    kind: Literal["moments", "nonzero"] = "nonzero" if importance == "apoz" else "moments"
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
