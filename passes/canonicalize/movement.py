"""Operators that only move elements, one after the other: Reshape, Transpose, Slice, Squeeze."""

from __future__ import annotations

from typing import NamedTuple

from graphopt.passes.guards import Dims, from_front, is_identity, whole
from graphopt.rules import Ops, Rejected, Rewrite, Var, require, rule


@rule(
    "merge-reshapes",
    min_opset=5,
    sample=[
        {
            "x": (2, 3, 4),
            "outer.shape": [4, -1],
            "Reshape.shape": [6, 4],
            "Flatten.axis": 2,
            "Squeeze.axes": None,
            "Unsqueeze.axes": [1],
        },
        {"outer.shape": [0, -1, 2]},
        {
            "x": ("n", 1, 12),
            "outer.shape": [0, -1, 2, 1],
            "Reshape.shape": [0, 6, 2],
            "Flatten.axis": 1,
            "Squeeze.axes": [1],
        },
        {
            "x": ("n", 1, 6),
            "outer.shape": [0, 6],
            "Reshape.shape": [-1, 3, 2],
            "Flatten.axis": 1,
            "Squeeze.axes": [1],
        },
        {
            "x": (0, 3, 4),
            "outer.shape": [5, 0],
            "outer.allowzero": 1,
            "Reshape.shape": [0, 12],
        },
    ],
    refuses=[
        {"x": ("n", "m", 4), "Reshape.shape": [0, -1, 2], "Flatten.axis": 1}
        | {"outer.shape": [0, 0, 2]},
        {"x": ("n", "m", 6), "Reshape.shape": [-1, 3, 2], "outer.shape": [0, -1]},
    ],
)
def merge_reshapes(op: Ops, x: Var) -> Rewrite:
    """Reshape(f(x)) => Reshape(x), f = Reshape, Flatten, Squeeze or Unsqueeze."""
    inner = op.Reshape(x) | op.Flatten(x) | op.Squeeze(x) | op.Unsqueeze(x)
    outer = op.Reshape(inner)
    yield outer  # ---------------------------------------------- before => after
    target = whole(outer.attr("shape"))
    literal = bool(outer.attr("allowzero"))
    if 0 in target and not literal:
        target = _settled(target, inner.shape, x)
    return op.Reshape(x, shape=target, allowzero=1 if literal else None)


def _settled(target: list[int], between: Dims, x: Var) -> list[int]:
    """The target shape with its zeros, which copy from `between`, said in terms of `x`.

    A size may become free only beside sizes that cannot be zero: else it would not follow.
    """
    settled = list(target)
    for axis, copied in enumerate(between[: len(target)]):
        stays = axis < x.rank and copied is not None and copied == x.shape[axis]
        if target[axis] != 0 or stays:
            continue
        if isinstance(copied, int) and copied > 0:
            settled[axis] = copied
        else:
            require(-1 not in settled, "a copied size is not known")
            settled[axis] = -1
    require(settled.count(-1) <= target.count(-1) or 0 not in settled, "a copied size may be zero")
    return settled


@rule(
    "merge-transposes",
    sample=[
        {"x": (2, 3, 4), "inner.perm": [1, 2, 0], "outer.perm": [0, 2, 1]},
        {"inner.perm": [1, 2, 0], "outer.perm": [2, 0, 1]},
        {"inner.perm": None, "outer.perm": [1, 2, 0]},
        {"inner.perm": [1, 2, 0], "outer.perm": None},
        {"inner.perm": None, "outer.perm": None},
    ],
)
def merge_transposes(op: Ops, x: Var) -> Rewrite:
    """Transpose(Transpose(x, p), q) => Transpose(x, p[q]), or x where that moves nothing."""
    inner = op.Transpose(x)
    outer = op.Transpose(inner)
    yield outer  # ---------------------------------------------- before => after
    first, second = inner.attr("perm"), outer.attr("perm")
    backwards = list(range(x.rank))[::-1]
    order = [(first or backwards)[axis] for axis in second or backwards]
    return x if is_identity(order) else op.Transpose(x, perm=order)


@rule(
    "cancel-unsqueeze-squeeze",
    sample=[
        {"x": (1, 3), "inner.axes": [0, -1], "outer.axes": [3, 0]},
        {"inner.axes": [0, -1], "outer.axes": [0, -1]},
    ],
    refuses=[{"inner.axes": [0, 1], "outer.axes": [0, 2]}, {"outer.axes": None}],
)
def cancel_unsqueeze_squeeze(op: Ops, x: Var) -> Rewrite:
    """Squeeze(Unsqueeze(x, axes), axes) => x."""
    inner = op.Unsqueeze(x)
    outer = op.Squeeze(inner)
    yield outer  # ---------------------------------------------- before => after
    require(outer.attr("axes") is not None, "it squeezes whatever is of size one")
    require(_same_axes(inner, outer, inner), "other axes are squeezed")
    return x


@rule(
    "cancel-squeeze-unsqueeze",
    sample=[
        {"x": (1, 3, 1), "inner.axes": [0, -1], "outer.axes": [2, 0]},
        {"inner.axes": [0, -1], "outer.axes": [0, -1]},
    ],
    refuses=[{"inner.axes": [0], "outer.axes": [1]}, {"inner.axes": None}],
)
def cancel_squeeze_unsqueeze(op: Ops, x: Var) -> Rewrite:
    """Unsqueeze(Squeeze(x, axes), axes) => x."""
    inner = op.Squeeze(x)
    outer = op.Unsqueeze(inner)
    yield outer  # ---------------------------------------------- before => after
    require(inner.attr("axes") is not None, "it squeezes whatever is of size one")
    require(_same_axes(inner, outer, x), "other axes are unsqueezed")
    return x


def _same_axes(inner: Var, outer: Var, wide: Var) -> bool:
    """True where both name the same axes of `wide`, the value with the axes of size one."""
    first, second = whole(inner.attr("axes")), whole(outer.attr("axes"))
    if sorted(first) == sorted(second):
        return True
    return sorted(from_front(first, wide.rank)) == sorted(from_front(second, wide.rank))


class Cut(NamedTuple):
    """What one axis keeps of itself: elements start, start + step, ... before end."""

    start: int
    end: int
    step: int


@rule(
    "merge-slices",
    sample=[
        {
            "x": (7, 9),
            "inner.starts": [1, 2],
            "inner.ends": [6, 2**63 - 1],
            "inner.axes": [0, 1],
            "outer.starts": [1, -4],
            "outer.ends": [2**31 - 1, 5],
            "outer.axes": [-1, 0],
        },
        {"outer.starts": [1], "outer.ends": [-1], "outer.axes": [0]},
        {"inner.axes": None, "outer.axes": None},
        {
            "x": (20, 31),
            "inner.ends": [18, 30],
            "inner.steps": [2, 3],
            "outer.starts": [1, 2],
            "outer.ends": [9, 6],
            "outer.axes": [1, 0],
            "outer.steps": [3, 2],
        },
        {
            "x": ("n", 9),
            "inner.starts": [2],
            "inner.ends": [8],
            "inner.axes": [1],
            "outer.starts": [1],
            "outer.ends": [2**63 - 1],
            "outer.axes": [0],
        },
        {
            "x": ("n", 9),
            "inner.starts": [2],
            "inner.ends": [8],
            "inner.axes": [1],
            "outer.starts": [1],
            "outer.ends": [4],
            "outer.axes": [1],
        },
    ],
    refuses=[
        {"outer.steps": [1, -1], "outer.ends": [2**31 - 1, -9]},
        {"x": ("n", 9)},
    ],
)
def merge_slices(op: Ops, x: Var) -> Rewrite:
    """Slice(Slice(x)) => Slice(x), the steps positive."""
    inner = op.Slice(x)
    outer = op.Slice(inner)
    yield outer  # ---------------------------------------------- before => after
    first, second = _cuts(inner, x), _cuts(outer, x)
    cuts = first | second
    for axis in first.keys() & second.keys():
        cuts[axis] = _composed(first[axis], second[axis], axis, x)
    axes = sorted(cuts)
    steps = [cuts[axis].step for axis in axes]
    return op.Slice(
        x,
        starts=[cuts[axis].start for axis in axes],
        ends=[cuts[axis].end for axis in axes],
        axes=axes,
        steps=None if set(steps) == {1} else steps,
    )


def _cuts(part: Var, x: Var) -> dict[int, Cut]:
    """What a Slice does, by axis from the front."""
    starts, ends = whole(part.attr("starts")), whole(part.attr("ends"))
    axes, steps = part.attr("axes"), part.attr("steps")
    every = [1] * len(starts) if steps is None else whole(steps)
    along = list(range(len(starts))) if axes is None else whole(axes)
    if any(axis < 0 for axis in along):
        along = from_front(along, x.rank)
    require(all(step > 0 for step in every), "a step is negative")
    cuts = map(Cut, starts, ends, every)
    return dict(zip(along, cuts, strict=True))


def _composed(first: Cut, second: Cut, axis: int, x: Var) -> Cut:
    """The one cut that two along the same axis make."""
    if min(*first[:2], *second[:2]) >= 0:
        end = min(first.end, first.start + second.end * first.step)
        return Cut(first.start + second.start * first.step, end, first.step * second.step)
    size = x.shape[axis]
    if not isinstance(size, int):
        raise Rejected("an index counts from an end that is not known")
    kept = range(size)[slice(*first)][slice(*second)]
    return Cut(kept.start, kept.stop, kept.step)
