"""Operators that put channels elsewhere: other axes, other places on an axis."""

from __future__ import annotations

from typing import Final

import numpy as np

from graphopt.passes.prune.call import Call, Handler
from graphopt.passes.prune.labels import Axis, Counted, Facts, Labels, Number, same
from graphopt.size_terms import Size, add

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
        assert facts is not None
        size = facts.axes[0].size if facts.axes else None
        if facts.numbers is None and not isinstance(size, int):
            return None
        found += facts.numbers if facts.numbers is not None else (None,) * int(str(size))
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
    if step != 1 or size < 2:
        call.bar(axis)
        return Axis(size)
    _state_bounds(call, axis.labels, first, last, index)
    return Axis(size, axis.labels[first:last])


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
    numbers = None
    if source.numbers is not None and indices is not None and len(axes) == 1:
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


def expand(call: Call) -> list[Facts] | None:
    """Axes of one index repeated; others keep their size, or take it from a shape that is right."""
    source, target = call.input(0), call.input(1)
    if source is None or source.axes is None or target is None or target.numbers is None:
        return None
    rank = max(len(source.axes), len(target.numbers))
    axes = (Axis(1),) * (rank - len(source.axes)) + source.axes
    numbers = (1,) * (rank - len(target.numbers)) + target.numbers
    shift = rank - len(target.numbers)
    out = [_sized(call, axis, number, place - shift) for place, (axis, number)
           in enumerate(zip(axes, numbers, strict=True))]  # fmt: skip
    return [Facts(tuple(out))]


def constant_of_shape(call: Call) -> list[Facts] | None:
    """One number everywhere."""
    target = call.input(0)
    if target is None or target.numbers is None:
        return None
    sized = (_sized(call, Axis(1), number, at, slot=0) for at, number in enumerate(target.numbers))
    return [Facts(tuple(sized))]


def _sized(call: Call, axis: Axis, number: Number, place: int, *, slot: int = 1) -> Axis:
    """The axis as an element of a shape makes it. What is repeated can be repeated less often."""
    if isinstance(number, Counted):
        if axis.size == 1:
            return Axis(len(number.labels), number.labels)
        if not same(axis.labels, number.labels):
            call.bar(axis)
            call.coupling.bar(number)
        return axis
    if axis.size == 1:
        if not isinstance(number, int) or number < 2:
            return Axis(number)
        labels = call.coupling.fresh(number)
        call.fix_input(slot, place, labels, labels)
        return Axis(number, labels)
    if axis.labels is not None and number != 1:
        if number != axis.size:
            call.bar(axis)
        else:
            call.fix_input(slot, place, axis.labels, axis.labels)
    return axis


def tile(call: Call) -> list[Facts] | None:
    """Channels that come several times go together."""
    axes, repeats = call.axes, call.input(1)
    if axes is None or repeats is None or repeats.literals is None:
        return None
    out = []
    for axis, times in zip(axes, repeats.literals, strict=True):
        size = axis.size * times if isinstance(axis.size, int) else None
        labels = None if axis.labels is None else np.tile(axis.labels, times)
        out.append(axis if times == 1 else Axis(size, labels))
    return [Facts(tuple(out))]


def resize(call: Call) -> list[Facts] | None:
    """Axes that keep their size by a constant scale of 1 or a stated size pass."""
    axes = call.axes
    if axes is None or call.states("axes") is not None:
        return None
    if call.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return None
    slot = 2 if call.node.op == "Resize" and call.opset > 10 else 1
    weight = call.constant(slot)
    scales = None if weight is None or not weight.size else weight.values.reshape(-1)
    if scales is None and (stated := call.node.attribute("scales")) is not None:
        scales = np.asarray(stated.floats, np.float32)
    sizes = call.input(3)
    out = []
    for number, axis in enumerate(axes):
        is_kept = scales is not None and len(scales) == len(axes) and scales[number] == 1
        if scales is None and sizes is not None and sizes.numbers is not None:
            is_kept = _keeps(call, axis, sizes.numbers[number], number)
        if not is_kept:
            call.bar(axis)
        out.append(axis if is_kept else Axis(None))
    return [Facts(tuple(out))]


def _keeps(call: Call, axis: Axis, number: Number, place: int) -> bool:
    """True where the stated size is that of the axis, and will be."""
    if isinstance(number, Counted):
        return same(number.labels, axis.labels)
    if number is None or number != axis.size:
        return False
    if axis.labels is not None:
        call.fix_input(3, place, axis.labels, axis.labels)
    return True


def shape(call: Call) -> list[Facts] | None:
    """Sizes; one of channels that may go is measured, not known."""
    axes = call.axes
    if axes is None:
        return None
    numbers: list[Number] = [
        axis.size if axis.labels is None else Counted(axis.labels) for axis in axes
    ]
    stop = call.node.attribute("end")
    numbers = numbers[call.integer("start", 0) : None if stop is None else stop.i]
    return [Facts((Axis(len(numbers)),), tuple(numbers))]


HANDLERS: Final[dict[tuple[str, str], Handler]] = {
    ("", "Concat"): concat,
    ("", "ConstantOfShape"): constant_of_shape,
    ("", "Expand"): expand,
    ("", "Gather"): gather,
    ("", "Pad"): pad,
    ("", "Resize"): resize,
    ("", "Shape"): shape,
    ("", "Slice"): slice_,
    ("", "Split"): split,
    ("", "Squeeze"): squeeze,
    ("", "Tile"): tile,
    ("", "Transpose"): transpose,
    ("", "Unsqueeze"): unsqueeze,
    ("", "Upsample"): resize,
}
