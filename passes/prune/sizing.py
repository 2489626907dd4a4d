"""Operators whose results have stated sizes, and the one that measures them."""

from __future__ import annotations

from typing import Final

import numpy as np

from graphopt.passes.prune.call import Call, Handler
from graphopt.passes.prune.labels import Axis, Counted, Facts, Number, same


def expand(call: Call) -> list[Facts] | None:
    """Axes of one index repeated; others keep their size, or take it from a shape that is right."""
    source, target = call.input(0), call.input(1)
    if source is None or source.axes is None or target is None or target.numbers is None:
        return None
    rank = max(len(source.axes), len(target.numbers))
    axes = (Axis(1),) * (rank - len(source.axes)) + source.axes
    numbers = (1,) * (rank - len(target.numbers)) + target.numbers
    shift = rank - len(target.numbers)
    pairs = enumerate(zip(axes, numbers, strict=True))
    out = [_sized(call, axis, number, place - shift) for place, (axis, number) in pairs]
    is_same = all(number == 1 for number in numbers)
    return [Facts(tuple(out), source.numbers if is_same else None)]


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
        labels = call.coupling.repeated(number)
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
    if call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
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
    ("", "ConstantOfShape"): constant_of_shape,
    ("", "Expand"): expand,
    ("", "Resize"): resize,
    ("", "Shape"): shape,
    ("", "Tile"): tile,
    ("", "Upsample"): resize,
}
