"""Operators that put channels elsewhere: other axes, other places on an axis."""

from __future__ import annotations

from typing import Final

import numpy as np

from graphopt.passes.prune.call import Call, Handler
from graphopt.passes.prune.labels import Axis, Facts, Labels, Number
from graphopt.size_terms import Size, add

_MOST_NUMBERS: Final = 64  # elements of a shape
_MODES: Final = frozenset({"constant", ""})


def transpose(call: Call) -> list[Facts] | None:
    """Axes in another order."""
    source = call.input(0)
    if source is None or source.axes is None:
        return None
    order = call.states("perm") or list(range(len(source.axes)))[::-1]
    return [source.permuted(order)] if len(order) == len(source.axes) else None


def concat(call: Call) -> list[Facts] | None:
    """Channels of one behind those of the other."""
    parts = [facts.axes for facts in call.inputs if facts is not None and facts.axes is not None]
    if len(parts) < len(call.inputs) or len({len(axes) for axes in parts}) != 1:
        return None
    at = call.axis("axis", 1, len(parts[0]))
    if at < 0:
        return None
    out = []
    for number, column in enumerate(zip(*parts, strict=True)):
        out.append(_chained(call, column) if number == at else call.coupling.join(column))
    return [Facts(tuple(out), _numbers_of_all(call) if len(out) == 1 else None)]


def _chained(call: Call, column: tuple[Axis, ...]) -> Axis:
    total: Size | None = 0
    for axis in column:
        total = None if total is None or axis.size is None else add(total, axis.size)
    if all(axis.labels is None for axis in column):
        return Axis(total)
    if not isinstance(total, int) or not all(isinstance(axis.size, int) for axis in column):
        call.bar(*column)
        return Axis(total)
    labels = [
        axis.labels if axis.labels is not None else call.coupling.fixed(int(axis.size or 0))
        for axis in column
        if isinstance(axis.size, int)
    ]
    return Axis(total, np.concatenate(labels))


def _numbers_of_all(call: Call) -> tuple[Number, ...] | None:
    found: list[Number] = []
    for facts in call.inputs:
        size = facts.axes[0].size if facts is not None and facts.axes else None
        if facts is not None and facts.numbers is not None:
            found += facts.numbers
        elif isinstance(size, int) and size <= _MOST_NUMBERS:
            found += [None] * size
        else:
            return None
    return tuple(found)


def split(call: Call) -> list[Facts] | None:
    """Stretches of an axis; where sizes are not stated, as many channels go from each."""
    axes, count = call.axes, len(call.node.outputs)
    if axes is None or (at := call.axis("axis", 0, len(axes))) < 0:
        return None
    whole, sizes = axes[at], call.setting("split", 1)
    is_stated = sizes is not None
    if sizes is None:
        if call.input(1) is not None or not isinstance(whole.size, int) or whole.size % count:
            return None
        sizes = [whole.size // count] * count
    if whole.labels is None:
        parts = [Axis(size) for size in sizes]
    else:
        if sum(sizes) != whole.size or len(sizes) != count:
            return None
        pieces = np.split(whole.labels, np.cumsum(sizes)[:-1])
        parts = [Axis(len(labels), labels if len(labels) > 1 else None) for labels in pieces]
        call.bar(*(labels for labels in pieces if len(labels) == 1))
        if is_stated:
            _state_sizes(call, pieces, whole.labels)
        else:
            call.coupling.unite(*pieces)
    return [Facts((*axes[:at], part, *axes[at + 1 :])) for part in parts]


def _state_sizes(call: Call, pieces: list[Labels], watched: Labels) -> None:
    for number, labels in enumerate(pieces):
        if call.states("split") is not None:
            call.fix_attribute("split", number, labels, watched)
        else:
            call.fix_input(1, number, labels, watched)


def slice_(call: Call) -> list[Facts] | None:
    """A stretch of axes with step 1; others have to stay."""
    source = call.input(0)
    if source is None or source.axes is None:
        return None
    axes = source.axes
    starts, ends = call.setting("starts", 1), call.setting("ends", 2)
    at = call.setting("axes", 3)
    if at is None:
        if call.input(3) is not None or starts is None:
            return None
        at = list(range(len(starts)))
    steps = call.setting("steps", 4) or [1] * len(at)
    if call.input(4) is not None and call.input(4).literals is None:  # type: ignore[union-attr]
        return None
    out, numbers = list(axes), source.numbers
    for index, axis in enumerate(at):
        axis += len(axes) if axis < 0 else 0
        if not 0 <= axis < len(axes):
            return None
        if starts is None or ends is None:
            call.bar(axes[axis])
            out[axis], numbers = Axis(None), None
            continue
        out[axis] = _stretch(call, axes[axis], starts[index], ends[index], steps[index], index)
        if numbers is not None and len(axes) == 1:
            numbers = numbers[starts[index] : ends[index] : steps[index]]
    return [Facts(tuple(out), numbers)]


def _stretch(call: Call, axis: Axis, start: int, end: int, step: int, index: int) -> Axis:
    if not isinstance(axis.size, int):
        return Axis(None)
    first, last, _ = slice(start, end, step).indices(axis.size)
    size = len(range(first, last, step))
    if axis.labels is None or (size == axis.size and step == 1):
        return Axis(size) if axis.labels is None else _full(call, axis, start, end, index)
    if step != 1:
        call.bar(axis)
        return Axis(size)
    _state_bounds(call, axis.labels, first, last, index)
    kept = axis.labels[first:last]
    if size < 2:
        call.bar(kept)
    return Axis(size, kept if size > 1 else None)


def _full(call: Call, axis: Axis, start: int, end: int, index: int) -> Axis:
    """All of it, which goes on holding where it is said by 0 and a number beyond the end."""
    assert axis.labels is not None
    if start != 0 or end < len(axis.labels):
        _state_bounds(call, axis.labels, 0, len(axis.labels), index)
    return axis


def _state_bounds(call: Call, labels: Labels, first: int, last: int, index: int) -> None:
    for slot, name, count in ((1, "starts", first), (2, "ends", last)):
        if call.states(name) is not None:
            call.fix_attribute(name, index, labels[:count], labels)
        else:
            call.fix_input(slot, index, labels[:count], labels)


def gather(call: Call) -> list[Facts] | None:
    """Channels by constant index; by any other, that axis has to stay and the others pass."""
    source, chosen = call.input(0), call.input(1)
    if source is None or source.axes is None or chosen is None or chosen.axes is None:
        return None
    axes = source.axes
    if (at := call.axis("axis", 0, len(axes))) < 0:
        return None
    whole, indices, middle = axes[at], chosen.literals, chosen.axes
    numbers, size = None, whole.size if isinstance(whole.size, int) else 0
    if indices is not None and size and not all(-size <= index < size for index in indices):
        return None
    if source.numbers is not None and indices is not None and len(axes) == 1 and size:
        numbers = tuple(source.numbers[index] for index in indices)
    if whole.labels is not None:
        if indices is not None and len(middle) == 1 and len(indices) > 1:
            middle = (Axis(len(indices), whole.labels[indices]),)
            call.fix_indices(whole.labels)
        else:
            call.bar(whole)
    call.bar(*chosen.axes)
    if source.origin is not None:  # a table: an embedding
        for axis in (*axes[:at], *axes[at + 1 :]):
            call.coupling.give(axis)
    return [Facts((*axes[:at], *middle, *axes[at + 1 :]), numbers)]


def squeeze(call: Call) -> list[Facts] | None:
    """Without axes of one index."""
    source = call.input(0)
    if source is None or source.axes is None:
        return None
    gone = call.setting("axes", 1)
    if gone is None:
        if call.input(1) is not None or not all(isinstance(a.size, int) for a in source.axes):
            return None
        gone = [number for number, axis in enumerate(source.axes) if axis.size == 1]
    positions = {axis + len(source.axes) if axis < 0 else axis for axis in gone}
    kept = [number for number in range(len(source.axes)) if number not in positions]
    left = source.permuted(kept)
    call.bar(*(source.axes[axis] for axis in positions if axis < len(source.axes)))
    return [Facts(left.axes, source.numbers, left.origin)]


def unsqueeze(call: Call) -> list[Facts] | None:
    """With more axes of one index."""
    source, new = call.input(0), call.setting("axes", 1)
    if source is None or source.axes is None or new is None:
        return None
    rank = len(source.axes) + len(new)
    positions = {axis + rank if axis < 0 else axis for axis in new}
    if len(positions) != len(new):
        return None
    rest = iter(source.axes)
    out = tuple(Axis(1) if number in positions else next(rest) for number in range(rank))
    return [Facts(out, source.numbers)]


def pad(call: Call) -> list[Facts] | None:
    """What is added has to stay; only constants can be added to channels."""
    axes, pads = call.axes, call.setting("pads", 1) or call.states("paddings")
    if axes is None or pads is None:
        return None
    at = call.setting("axes", 3)
    if at is None:
        if call.input(3) is not None:
            return None
        at = list(range(len(axes)))
    if len(pads) != 2 * len(at):
        return None
    out = list(axes)
    for number, position in enumerate(at):
        before, after = pads[number], pads[number + len(at)]
        position += len(axes) if position < 0 else 0
        out[position] = _padded(call, axes[position], before, after)
    return [Facts(tuple(out))]


def _padded(call: Call, axis: Axis, before: int, after: int) -> Axis:
    if not (before or after):
        return axis
    total = axis.size + before + after if isinstance(axis.size, int) else None
    if axis.labels is None:
        return Axis(total)
    if before < 0 or after < 0 or call.text("mode", "constant") not in _MODES:
        call.bar(axis)
        return Axis(total)
    fixed = call.coupling.fixed
    return Axis(total, np.concatenate([fixed(before), axis.labels, fixed(after)]))


HANDLERS: Final[dict[tuple[str, str], Handler]] = {
    ("", "Concat"): concat,
    ("", "Gather"): gather,
    ("", "Pad"): pad,
    ("", "Slice"): slice_,
    ("", "Split"): split,
    ("", "Squeeze"): squeeze,
    ("", "Transpose"): transpose,
    ("", "Unsqueeze"): unsqueeze,
}
