"""Detours that exporters make around axes: batches folded and unfolded, slices squeezed."""

from __future__ import annotations

from graphopt.passes.canonicalize.no_ops import TO_THE_END
from graphopt.passes.guards import Dims, from_front, whole
from graphopt.rules import Ops, Rewrite, Var, require, rule


@rule(
    "unfold-transpose",
    min_opset=5,
    sample=[
        {"x": (2, 3, 4, 5), "flat.shape": [-1, 4, 5], "unfolded.shape": [2, 3, 5, 4]},
        {"x": (2, 4, 5), "flat.shape": [0, -1, 5], "unfolded.shape": [0, 5, 4]},
        {"x": (6, 4, 4), "flat.shape": [6, 4, 4], "unfolded.shape": [6, 4, 4]},
    ],
    refuses=[
        {"flat.shape": [-1, 5, 4]},
        {"flat.shape": [-1, 2, 5], "unfolded.shape": [2, 3, 10, 2]},
        {"unfolded.shape": [3, 2, 5, 4]},
        {"unfolded.shape": [2, 3, 4, 5]},
        {"unfolded.shape": [6, 5, 4]},
        {"x": (2, 3, 4, "n"), "flat.shape": [6, -1, 4], "unfolded.shape": [2, 3, -1, 4]},
    ],
)
def unfold_transpose(op: Ops, x: Var) -> Rewrite:
    """Reshape(Transpose(Reshape(x, [-1, m, n]))) => Transpose(x), its last two axes swapped."""
    flat = op.Reshape(x)
    unfolded = op.Reshape(op.Transpose(flat, perm=[0, 2, 1]))
    yield unfolded  # ------------------------------------------- before => after
    rank = x.rank
    require(rank >= 3 and unfolded.rank == rank, "axes come or go")
    *batch, rows, columns = x.shape
    require(_same(flat.shape[1:], (rows, columns)), "it folds other axes, or may")
    require(_same(unfolded.shape, (*batch, columns, rows)), "it unfolds to other axes, or may")
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _same(a: Dims, b: Dims) -> bool:
    return None not in a and tuple(a) == tuple(b)


@rule(
    "gather-squeezed-slice",
    min_opset=11,
    sample=[
        {"x": (4, 5, 6), "part.starts": [2], "part.ends": [3], "part.axes": [1]}
        | {"squeezed.axes": [1]},
        {"part.starts": [-2], "part.ends": [-1], "part.axes": [2], "squeezed.axes": [-1]},
        {"part.starts": [-1], "part.ends": [2**63 - 1], "part.axes": [0], "squeezed.axes": [0]},
        {"part.starts": [-1], "part.ends": [2**31 - 1]},
    ],
    refuses=[
        {"x": (4, 1, 6), "part.starts": [0], "part.ends": [3]},
        {"x": (4, 1, 6), "part.starts": [0], "part.ends": [2], "part.axes": [0]},
        {"x": (4, 5, 1), "squeezed.axes": [1, 2]},
        {"x": (4, 1, 1), "part.starts": [0, 0], "part.ends": [1, 1], "part.axes": [0, 1]}
        | {"squeezed.axes": [0]},
        {"x": (4, 1, 6), "part.starts": [1], "part.ends": [2], "part.axes": [0]},
    ],
)
def gather_squeezed_slice(op: Ops, x: Var) -> Rewrite:
    """Squeeze(x[i:i+1]) => Gather(x, i), along one axis."""
    part = op.Slice(x)
    squeezed = op.Squeeze(part)
    yield squeezed  # ------------------------------------------- before => after
    starts, ends = whole(part.attr("starts")), whole(part.attr("ends"))
    cut, gone = part.attr("axes"), squeezed.attr("axes")
    require(cut is not None and gone is not None, "the axes are not stated")
    along, away = whole(cut), whole(gone)
    require(len(along) == len(away) == 1, "it is not one axis")
    same = along == away or from_front(along, x.rank) == from_front(away, x.rank)
    require(same, "it cuts one axis and squeezes another")
    start, end = starts[0], ends[0]
    last = start == -1 and end >= TO_THE_END
    require(last or (end == start + 1 and start != -1), "it takes more than one")
    return op.Gather(x, start, axis=along[0])
