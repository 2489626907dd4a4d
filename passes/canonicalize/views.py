"""Operators that show the same elements under another shape, one after the other."""

from __future__ import annotations

from graphopt.passes.guards import from_front, whole
from graphopt.rules import Const, Ops, Rewrite, Var, require, rule

_SAME_OF_ONE = ("Max", "Mean", "Min", "Prod", "Sum")  # of one element these are that element
_ONES = {"axes": [1, -1], "keepdims": 0}


@rule(
    "merge-reshape-view",
    min_opset=5,
    sample=[
        {
            "x": (2, 3, 4),
            "Reshape.shape": [1, 6, -1],
            "Unsqueeze.axes": [1, -1],
            "Squeeze.axes": [0],
            "Flatten.axis": 2,
        },
        {"x": ("n", 3, 4), "Reshape.shape": [1, -1, 4]},
        {"x": (2, 3), "Reshape.shape": [1, 6], "Squeeze.axes": None},
    ],
    refuses=[
        {"x": ("n", "m", 4), "Reshape.shape": [1, 0, -1]},
        {"x": ("n", 0, 4), "Reshape.shape": [1, 0, 0]},
    ],
)
def merge_reshape_view(op: Ops, x: Var) -> Rewrite:
    """f(Reshape(x)) => Reshape(x), f = Unsqueeze, Squeeze or Flatten."""
    inner = op.Reshape(x)
    outer = op.Unsqueeze(inner) | op.Squeeze(inner) | op.Flatten(inner)
    yield outer  # ---------------------------------------------- before => after
    sizes = [size if isinstance(size, int) else -1 for size in outer.shape]
    require(0 not in sizes, "a size is zero, which would copy one")
    require(sizes.count(-1) <= 1, "two sizes are open")
    return op.Reshape(x, shape=sizes)


@rule(
    "merge-unsqueezes",
    sample=[
        {"x": (2, 3), "inner.axes": [1], "outer.axes": [0, 3]},
        {"inner.axes": [-1, 0], "outer.axes": [2, -1]},
        {"x": (), "inner.axes": [0], "outer.axes": [0]},
    ],
)
def merge_unsqueezes(op: Ops, x: Var) -> Rewrite:
    """Unsqueeze(Unsqueeze(x, a), b) => Unsqueeze(x, the axes of both)."""
    inner = op.Unsqueeze(x)
    outer = op.Unsqueeze(inner)
    yield outer  # ---------------------------------------------- before => after
    first, second = whole(inner.attr("axes")), whole(outer.attr("axes"))
    rank = x.rank + len(first) + len(second)
    later = from_front(second, rank)
    between = [axis for axis in range(rank) if axis not in later]
    earlier = [between[axis] for axis in from_front(first, rank - len(second))]
    return op.Unsqueeze(x, axes=sorted(earlier + later))


@rule(
    "index-instead-of-unsqueeze",
    min_opset=13,
    sample=[
        {"x": (5,), "index": 2, "picked.axis": 0, "wide.axes": [0]},
        {"x": (5, 3), "index": -1, "picked.axis": 1, "wide.axes": [-1]},
        {"x": (5, 3), "wide.axes": [0]},
    ],
    refuses=[{"x": (5, 3), "wide.axes": [1]}, {"x": (5, 3), "index": [2]}],
)
def index_instead_of_unsqueeze(op: Ops, x: Var, index: Const) -> Rewrite:
    """Unsqueeze(Gather(x, i), axis) => Gather(x, [i]), the axis the same and i one number."""
    picked = op.Gather(x, index)
    wide = op.Unsqueeze(picked)
    yield wide  # ----------------------------------------------- before => after
    axes, rank = whole(wide.attr("axes")), x.rank
    require(index.values.ndim == 0, "several are picked")
    require(len(axes) == 1, "several axes are added")
    require(axes[0] % rank == picked.attr("axis") % rank, "another axis is added")
    return op.Gather(x, index.values.reshape(1), **picked.attrs)


@rule(
    "squeeze-instead-of-reduction",
    min_opset=11,
    sample=[
        {"x": (2, 1, 4, 1)}
        | {f"Reduce{kind}.{key}": value for kind in _SAME_OF_ONE for key, value in _ONES.items()},
        {"x": ("n", 1, 4, 1)},
    ],
    refuses=[{"x": (2, 1, 4, 3)}, {"x": (2, "n", 4, 1)}],
)
def squeeze_instead_of_reduction(op: Ops, x: Var) -> Rewrite:
    """ReduceMean(x), of Max, Min, Prod or Sum, along axes of size one => Squeeze(x)."""
    mean, total, most = op.ReduceMean(x), op.ReduceSum(x), op.ReduceMax(x)
    reduced = mean | total | most | op.ReduceMin(x) | op.ReduceProd(x)
    yield reduced  # -------------------------------------------- before => after
    axes = from_front(whole(reduced.attr("axes")), x.rank)
    require(axes and {x.shape[axis] for axis in axes} == {1}, "a size is not one, or may not be")
    return x if reduced.attr("keepdims") else op.Squeeze(x, axes=axes)


def _keeps_axes(reduction: str) -> None:
    """Register the rule for one of the operators that reduce axes."""

    def keep_axes(op: Ops, x: Var) -> Rewrite:
        reduced = getattr(op, reduction)(x, keepdims=0)
        wide = op.Unsqueeze(reduced) | op.Reshape(reduced)
        yield wide  # ------------------------------------------- before => after
        axes = from_front(whole(reduced.attr("axes")), x.rank)
        sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        there = axes and None not in sizes and list(wide.shape) == sizes
        require(there, "the axes are not put back where they were")
        return getattr(op, reduction)(x, axes=axes, keepdims=1)

    keep_axes.__doc__ = f"Unsqueeze or Reshape({reduction}(x)) => {reduction}(x, keepdims=1)."
    rule(
        f"keep-axes-of-{reduction.lower()}",
        min_opset=11,
        sample=[
            {"x": (2, 3, 4), "reduced.axes": [1]}
            | {"Unsqueeze.axes": [1], "Reshape.shape": [2, 1, 4]},
            {"reduced.axes": [-1, 0], "Unsqueeze.axes": [0, -1], "Reshape.shape": [1, -1, 1]},
            {"x": ("n", 3, 4), "Reshape.shape": [0, 1, 4]},
        ],
        refuses=[
            {"Unsqueeze.axes": [2], "Reshape.shape": [2, 4, 1]},
            {"x": (4, 3, 4), "Unsqueeze.axes": [0], "Reshape.shape": [1, 4, 4]},
        ],
    )(keep_axes)


for _reduction in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"):
    _keeps_axes(_reduction)
