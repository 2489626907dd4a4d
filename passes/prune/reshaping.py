"""Reshape and Flatten: axes taken apart and put together.

Where an axis with labels is split, one of the parts keeps them (a head, of heads times features),
and what lies at the same place of the others goes together. Where it is merged with axes that have
none, it repeats its labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from graphopt import size_terms
from graphopt.ir import Node, Value
from graphopt.passes.prune.call import Call, Handler
from graphopt.passes.prune.labels import MOST, Axis, Counted, Facts, Labels, Number, same
from graphopt.size_terms import Size

_PACKED: Final = 3  # values in one, where they are taken out by slices
Block = tuple[list[int], list[int]]
"""Axes before and after that hold the same elements in the same order."""


def reshape(call: Call) -> list[Facts] | None:
    """To a shape that is stated, measured, or both."""
    source, target = call.input(0), call.input(1)
    if source is None or source.axes is None:
        return None
    stated = call.states("shape")
    numbers = tuple(stated) if stated is not None else target.numbers if target else None
    if numbers is None:
        return None
    if call.integer("allowzero", 0) and 0 in numbers:
        return None
    after = _sizes_after(call, source.axes, numbers)
    if after is None:
        return None
    out = _moved(call, source.axes, after)
    for place, (axis, number) in enumerate(zip(out, numbers, strict=True)):
        _state(call, source.axes, place, axis, number, is_attribute=stated is not None)
    is_vector = len(source.axes) <= 1 and len(out) <= 1
    return [Facts(tuple(out), source.numbers if is_vector else None)]


def flatten(call: Call) -> list[Facts] | None:
    """All axes before `axis` as one, and all others as one."""
    axes = call.axes
    if axes is None:
        return None
    at = call.integer("axis", 1)
    at += len(axes) if at < 0 else 0
    after = [_product(axes[:at]), _product(axes[at:])]
    return [Facts(tuple(_moved(call, axes, after)))]


def _product(axes: Sequence[Axis]) -> Size | None:
    sizes = [axis.size for axis in axes if axis.size is not None]
    return size_terms.product(sizes) if len(sizes) == len(axes) else None


def _sizes_after(
    call: Call, axes: Sequence[Axis], numbers: Sequence[Number]
) -> list[Size | None] | None:
    """Sizes of the result, from the target and from inference."""
    plain = [len(n.labels) if isinstance(n, Counted) else n for n in numbers]
    found: list[Size | None] = [None if n == -1 else n for n in plain]
    if any(n == 0 and at >= len(axes) for at, n in enumerate(plain)):
        return None
    for at, n in enumerate(plain):
        if n == 0:
            found[at] = axes[at].size
    before = [axis.size for axis in axes]
    if plain.count(-1) == 1 and None not in before:
        known = [size for size in before if size is not None]
        places = [size for at, size in enumerate(found) if plain[at] != -1]
        if None not in places:
            others = size_terms.product([size for size in places if size is not None])
            if others != 0:
                found[plain.index(-1)] = size_terms.quotient(size_terms.product(known), others)
    proven = call.proven()
    if proven is not None and len(proven) == len(found):
        for at, size in enumerate(proven):
            if isinstance(size, int) or found[at] is None:
                found[at] = size
    return found


def _state(
    call: Call,
    before: Sequence[Axis],
    place: int,
    axis: Axis,
    number: Number,
    *,
    is_attribute: bool,
) -> None:
    """Note what the target says of an axis of the result."""
    if isinstance(number, Counted):
        if not same(number.labels, axis.labels):
            call.bar(axis)
            call.coupling.bar(number)
        return
    if number == 0:  # the size of the axis at that place, whichever its elements go to
        if not same(axis.labels, before[place].labels):
            call.bar(axis, before[place])
        return
    if axis.labels is None or number == -1:
        return
    if not isinstance(number, int):
        call.bar(axis)
    elif is_attribute:
        call.fix_attribute("shape", place, axis.labels, axis.labels)
    else:
        call.fix_input(1, place, axis.labels, axis.labels)


def _moved(call: Call, before: Sequence[Axis], after: Sequence[Size | None]) -> list[Axis]:
    """Axes of the result, with labels where it is sure which elements they hold."""
    out = [Axis(size) for size in after]
    blocks, followed = _blocks([axis.size for axis in before], after), set[int]()
    for old, new in blocks:
        followed.update(old)
        kept = _kept_axis(call, before, old)
        if kept is None:
            continue
        found = _grid(before, old, kept, [after[axis] for axis in new])
        if found is None:
            call.bar(before[kept])
            continue
        at = 0 if len(new) == 1 else _kept(call.node, new, found)
        rows = np.moveaxis(found, at, 0).reshape(found.shape[at], -1)
        united = call.coupling.rows(rows)
        out[new[at]] = Axis(len(united), united)
    call.bar(*(axis for number, axis in enumerate(before) if number not in followed))
    return out


def _kept_axis(call: Call, before: Sequence[Axis], old: Sequence[int]) -> int | None:
    """The one axis of a block that keeps its labels: of two, none, unless one only repeats."""
    found: list[tuple[int, Labels]] = []
    for axis in old:
        labels = before[axis].labels
        if labels is not None:
            found.append((axis, labels))
    if len(found) > 1:
        found = [(axis, ls) for axis, ls in found if not call.coupling.is_repeated(ls)]
    kept = found[0][0] if len(found) == 1 else None
    call.bar(*(before[axis] for axis in old if axis != kept))
    return kept


def _grid(
    before: Sequence[Axis], old: Sequence[int], kept: int, after: Sequence[Size | None]
) -> Labels | None:
    """The label of each element of a block, in the shape that it gets."""
    shape = [size for axis in old if isinstance(size := before[axis].size, int)]
    sizes = [size for size in after if isinstance(size, int)]
    labels = before[kept].labels
    if labels is None or not sizes or len(shape) < len(old) or len(sizes) < len(after):
        return None
    if math.prod(shape) > MOST or math.prod(shape) != math.prod(sizes):
        return None
    view = labels.reshape([-1 if axis == kept else 1 for axis in old])
    return np.broadcast_to(view, shape).reshape(sizes)


def _blocks(before: Sequence[Size | None], after: Sequence[Size | None]) -> list[Block]:
    """Axes, other than those of one index, that hold the same elements: from both ends."""
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    blocks, i, j = _aligned(before, after, old, new)
    rest, _, _ = _aligned(before, after, old[i:][::-1], new[j:][::-1])
    return blocks + [(left[::-1], right[::-1]) for left, right in rest]


def _aligned(
    before: Sequence[Size | None],
    after: Sequence[Size | None],
    old: Sequence[int],
    new: Sequence[int],
) -> tuple[list[Block], int, int]:
    """Blocks in order as far as sizes tell, and how many axes of each side they take."""
    blocks: list[Block] = []
    i = j = 0
    while i < len(old) and j < len(new):
        a, b = i + 1, j + 1
        left, right = before[old[i]], after[new[j]]
        while left is not None and right is not None and left != right:
            if a < len(old) and _divides(left, right):
                factor = before[old[a]]
                left = None if factor is None else size_terms.multiply(left, factor)
                a += 1
            elif b < len(new) and _divides(right, left):
                factor = after[new[b]]
                right = None if factor is None else size_terms.multiply(right, factor)
                b += 1
            elif isinstance(left, int) and isinstance(right, int):
                left, right, a, b = _longer(before, after, old, new, (left, right, a, b))
            else:
                left = None
        if left is None or right is None:
            break
        blocks.append((list(old[i:a]), list(new[j:b])))
        i, j = a, b
    return blocks, i, j


def _longer(
    before: Sequence[Size | None],
    after: Sequence[Size | None],
    old: Sequence[int],
    new: Sequence[int],
    state: tuple[int, int, int, int],
) -> tuple[Size | None, Size | None, int, int]:
    """One axis more on the side that holds fewer elements, where neither divides the other."""
    left, right, a, b = state
    if left < right and a < len(old):
        factor = before[old[a]]
        return (None if factor is None else size_terms.multiply(left, factor)), right, a + 1, b
    if right < left and b < len(new):
        factor = after[new[b]]
        return left, (None if factor is None else size_terms.multiply(right, factor)), a, b + 1
    return None, None, a, b


def _divides(a: Size, b: Size) -> bool:
    return a != 0 and size_terms.quotient(b, a) is not None


# -- which part of a split keeps the labels ----------------------------------------------------


def _kept(node: Node, new: Sequence[int], grid: Labels) -> int:
    """The part that alone tells the labels apart, where there is one.

    Else the first, unless it is what packs several values into one, or is shuffled.
    """
    result, shape = node.outputs[0], grid.shape
    assert result is not None
    for part in range(len(new)):
        rows = np.moveaxis(grid, part, 0).reshape(shape[part], -1)
        if (rows == rows[:, :1]).all():
            return part
    choices = [part for part in range(len(new)) if not _packs(result, new[part], shape[part])]
    if not choices:
        return int(np.argmax(shape))
    if len(new) == 2 and _is_shuffled(result, new[0], new[1]):
        return int(np.argmax(shape))
    return choices[0]


def _packs(value: Value, axis: int, size: int, depth: int = 3) -> bool:
    """True where readers take single indices of the axis, as of query, key and value in one."""
    for reader in value.consumers:
        if reader.domain or reader.inputs[0] is not value:
            continue
        stated = reader.attribute("axis")
        is_here = (0 if stated is None else stated.i) == axis
        if is_here and (reader.op == "Gather" or reader.op == "Split"):
            return reader.op == "Gather" or len(reader.outputs) == size
        if reader.op == "Slice" and size <= _PACKED:
            return True
        moved = _after(reader, axis) if reader.op == "Transpose" and depth else None
        result = reader.outputs[0]
        if moved is not None and result is not None and _packs(result, moved, size, depth - 1):
            return True
    return False


def _after(transpose: Node, axis: int) -> int | None:
    stated = transpose.attribute("perm")
    return list(stated.ints).index(axis) if stated is not None else None


def _is_shuffled(value: Value, major: int, minor: int) -> bool:
    """True where a reader exchanges the two parts, as between the groups of a ShuffleNet."""
    for reader in value.consumers:
        if reader.op == "Transpose" and not reader.domain:
            first, second = _after(reader, major), _after(reader, minor)
            result = reader.outputs[0]
            if first is None or second is None or result is None or first != second + 1:
                continue
            if all(other.op == "Reshape" for other in result.consumers):
                return True
    return False


HANDLERS: Final[dict[tuple[str, str], Handler]] = {
    ("", "Flatten"): flatten,
    ("", "Reshape"): reshape,
}
