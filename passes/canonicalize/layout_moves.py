"""Moves by operator: which ones compute in another layout what they computed in this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from graphopt.ir import Node, Shape
from graphopt.operators import BROADCASTING, ELEMENTWISE
from graphopt.passes.canonicalize.layouts import (
    Facts,
    Move,
    Permutation,
    Question,
    Stays,
    around,
    inverse,
    is_still,
    then,
    without,
)

_REDUCTIONS: Final = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"}
    | {"ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"}
)


def move_of(
    node: Node, slot: int, is_output: bool, permutation: Permutation, facts: Facts
) -> Move | None:
    """What the node becomes where that input or output is permuted; None where it has to stay.

    Tensors on which a permutation shows no effect are left out of the move.
    """
    mover = _MOVES.get(node.op) if not node.domain else None
    if mover is None:
        return None
    try:
        move = mover(Question(node, slot, is_output, permutation, facts))
    except Stays:
        return None
    found = Move(
        {n: p for n, p in move.inputs.items() if not is_still(p, facts.shape(node.inputs[n]))},
        {n: p for n, p in move.outputs.items() if not is_still(p, facts.shape(node.outputs[n]))},
        move.constants,
        move.settings,
        move.op,
    )
    asked = (found.outputs if is_output else found.inputs).get(slot)
    return found if asked == permutation else None


def _unary(q: Question) -> Move:
    return Move({0: q.permutation}, {0: q.permutation})


def _broadcast(q: Question) -> Move:
    """Before opset 7 operands were aligned by attributes."""
    q.require(q.facts.opset >= 7 and q.rank(q.result) == len(q.permutation))
    moving, stored = q.operands(range(len(q.node.inputs)))
    return Move(moving, {0: q.permutation}, stored)


def _concat(q: Question) -> Move:
    stated = q.node.attribute("axis")
    rank = len(q.permutation)
    q.require(stated is not None and q.rank(q.result) == rank)
    axis = q.permutation.index(q.number("axis", 1) % rank)
    moving, stored = {}, {}
    for slot, value in enumerate(q.node.inputs):
        q.require(value is not None)
        if value is not None and q.facts.constant(value) is not None:
            q.require(q.may_store(value))
            stored[slot] = q.permutation
        else:
            moving[slot] = q.permutation
    return Move(moving, {0: q.permutation}, stored, {"axis": axis})


def _split(q: Question) -> Move:
    axis = q.permutation.index(q.number("axis", 0) % len(q.permutation))
    computed = {n: q.permutation for n, value in enumerate(q.node.outputs) if value is not None}
    return Move({0: q.permutation}, computed, settings={"axis": axis})


def _softmax(q: Question) -> Move:
    """Runtimes compute it along the last axis and transpose for any other: none may come up."""
    rank = len(q.permutation)
    if q.facts.opset < 13:  # the axes from `axis` on are one
        axis = q.number("axis", 1) % rank
        q.require(set(q.permutation[:axis]) == set(range(axis)))
        return _unary(q)
    axis = q.number("axis", -1) % rank
    moved = q.permutation.index(axis)
    q.require(moved == rank - 1 or axis != rank - 1)
    return Move({0: q.permutation}, {0: q.permutation}, settings={"axis": moved})


def _normalization(q: Question) -> Move:
    """BatchNormalization in inference: the channels are axis 1."""
    q.require(q.facts.opset >= 9 and q.permutation[1] == 1 and len(q.node.outputs) == 1)
    return _unary(q)


def _reduce(q: Question) -> Move:
    rank = q.rank(q.source)
    axes, keeps = q.axes("axes", rank), q.number("keepdims", 1)
    q.require(len(q.permutation) == rank and (bool(keeps) or not q.is_output))
    q.require(axes != [] and not q.number("noop_with_empty_axes", 0))
    if axes is None:
        return Move({0: q.permutation})
    moved = sorted(q.permutation.index(axis) for axis in axes)
    left = q.permutation if keeps else without(q.permutation, axes)
    return Move({0: q.permutation}, {0: left}, settings={"axes": moved})


def _arg(q: Question) -> Move:
    rank = q.rank(q.source)
    axis, keeps = q.number("axis", 0) % rank, q.number("keepdims", 1)
    q.require(len(q.permutation) == rank and (bool(keeps) or not q.is_output))
    left = q.permutation if keeps else without(q.permutation, [axis])
    return Move({0: q.permutation}, {0: left}, settings={"axis": q.permutation.index(axis)})


def _pad(q: Question) -> Move:
    rank = len(q.permutation)
    if q.facts.slot("Pad", "axes") is not None and (axes := q.axes("axes", rank)) is not None:
        moved = [q.permutation.index(axis) for axis in axes]
        return Move({0: q.permutation}, {0: q.permutation}, settings={"axes": moved})
    pads = q.numbers("pads")
    if pads is None or len(pads) != 2 * rank:
        raise Stays
    ordered = [pads[side * rank + axis] for side in (0, 1) for axis in q.permutation]
    return Move({0: q.permutation}, {0: q.permutation}, settings={"pads": ordered})


def _slice(q: Question) -> Move:
    axes = q.axes("axes", len(q.permutation))
    if axes is None:
        axes = list(range(len(q.numbers("starts") or ())))
    moved = [q.permutation.index(axis) for axis in axes]
    return Move({0: q.permutation}, {0: q.permutation}, settings={"axes": moved})


def _squeeze(q: Question) -> Move:
    rank = q.rank(q.source)
    axes = q.axes("axes", rank)
    if axes is None:
        raise Stays
    wide = around(q.permutation, axes) if q.is_output else q.permutation
    moved = sorted(wide.index(axis) for axis in axes)
    return Move({0: wide}, {0: without(wide, axes)}, settings={"axes": moved})


def _unsqueeze(q: Question) -> Move:
    axes = q.numbers("axes")
    if axes is None:
        raise Stays
    rank = q.rank(q.source) + len(axes)
    axes = [axis % rank for axis in axes]
    wide = q.permutation if q.is_output else around(q.permutation, axes)
    moved = sorted(wide.index(axis) for axis in axes)
    return Move({0: without(wide, axes)}, {0: wide}, settings={"axes": moved})


def _reshape(q: Question) -> Move:
    """A Reshape or Flatten that only drops and adds axes of size one, as far as is proven."""
    before, after = q.facts.shape(q.source), q.facts.shape(q.result)
    if before is None or after is None or q.facts.opset < 5:
        raise Stays
    q.require(_same_but_ones(before, after))
    given, wanted = (after, before) if q.is_output else (before, after)
    dropped = [axis for axis, size in enumerate(given) if size == 1]
    added = [axis for axis, size in enumerate(wanted) if size == 1]
    other = around(without(q.permutation, dropped), added)
    left = q.permutation if q.is_output else other
    target = [size if isinstance(size, int) else -1 for size in after]
    moved: dict[str | int, int | list[int] | list[float]] = {1: [target[axis] for axis in left]}
    inputs, outputs = (other, q.permutation) if q.is_output else (q.permutation, other)
    return Move({0: inputs}, {0: outputs}, settings=moved, op="Reshape")


def _same_but_ones(before: Shape, after: Shape) -> bool:
    """True where the shapes differ in axes of size one alone; one size may be open.

    The open one follows from the others, which are positive.
    """
    first, second = ([size for size in dims if size != 1] for dims in (before, after))
    if len(first) != len(second):
        return False
    opened = [
        (a, b)
        for a, b in zip(first, second, strict=True)
        if not isinstance(a, int) or not isinstance(b, int) or a != b or not a
    ]
    return not opened or (len(opened) == 1 and not any(isinstance(size, int) for size in opened[0]))


def _repeat(q: Question) -> Move:
    """Tile and Expand: one number for each axis."""
    numbers = q.stored(1)
    rank = len(q.permutation)
    if numbers is None or len(numbers) != rank:
        raise Stays
    q.require(q.rank(q.source) == rank and q.facts.opset >= 6)
    ordered = [numbers[axis] for axis in q.permutation]
    return Move({0: q.permutation}, {0: q.permutation}, settings={1: ordered})


def _resize(q: Question) -> Move:
    """By constant scales and to where batch and channels come first, which is what kernels are
    written for."""
    inputs = q.node.inputs
    weight = q.facts.constant(inputs[2]) if len(inputs) == 3 else None
    if weight is None or q.facts.opset < 11 or q.node.attribute("axes") is not None:
        raise Stays
    roi = q.facts.constant(inputs[1])
    mode = q.node.attribute("coordinate_transformation_mode")
    q.require(inputs[1] is None or (roi is not None and not roi.size))
    q.require(mode is None or mode.s != b"tf_crop_and_resize")
    scales = np.ravel(weight.values).tolist()
    q.require(len(scales) == len(q.permutation))
    ordered = [float(scales[axis]) for axis in q.permutation]
    q.require(ordered[:2] == [1.0, 1.0])
    return Move({0: q.permutation}, {0: q.permutation}, settings={2: ordered})


def _transpose(q: Question) -> Move:
    """One that is not undone takes the change of layout in."""
    own = q.facts.permutation(q.node)
    if own is None:
        raise Stays
    order = then(own, q.permutation) if q.is_output else then(inverse(q.permutation), own)
    q.require(order != tuple(range(len(order))))
    moved: dict[str | int, int | list[int] | list[float]] = {"perm": list(order)}
    if q.is_output:
        return Move({}, {0: q.permutation}, settings=moved)
    return Move({0: q.permutation}, settings=moved)


_MOVES: Final[dict[str, Callable[[Question], Move]]] = {
    **dict.fromkeys(ELEMENTWISE, _unary),
    **dict.fromkeys(BROADCASTING | {"Where"}, _broadcast),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    **dict.fromkeys(("Tile", "Expand"), _repeat),
    "BatchNormalization": _normalization,
    "Concat": _concat,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
