"""What is joined and taken apart again."""

from __future__ import annotations

from graphopt.passes.guards import from_front, whole
from graphopt.rules import Ops, Rewrite, Var, Vars, require, rule


@rule(
    "cancel-concat-split",
    min_opset=2,
    sample=[
        {
            "xs": [(2, 3), (2, 3)],
            "Concat.axis": 1,
            "parts.axis": -1,
            "parts.split": [3, 3],
            "parts.outputs": 2,
        },
        {"xs": [(2, 3), (2, 4), (2, 5)], "parts.split": [3, 4, 5], "parts.outputs": 3},
        {"parts.split": None, "parts.num_outputs": 2},
    ],
    refuses=[
        {"xs": [(2, 2), (2, 4)], "parts.split": None, "parts.num_outputs": 2},
        {"xs": [(2, 4), (2, 2)]},
        {"xs": [(3, 3), (3, 3)], "parts.axis": 0, "parts.split": [1, 2]},
        {"xs": [(2, 3), (2, 2), (2, 1)]},
    ],
)
def cancel_concat_split(op: Ops, xs: Vars) -> Rewrite:
    """Split(Concat(a, b, ...)) => a, b, ... where it cuts at the seams."""
    joined = op.Concat(xs)
    parts = op.Split(joined, outputs=None)
    yield parts  # ---------------------------------------------- before => after
    values = list(xs)
    rank = values[0].rank
    (seam,), (cut,) = (from_front([each.attr("axis")], rank) for each in (joined, parts))
    require(seam == cut, "it splits along another axis")
    require(len(parts) == len(values), "it splits into another number of parts")
    sizes = [value.shape[seam] for value in values]
    stated = parts.attr("split")
    if stated is None:
        require(None not in sizes and len(set(sizes)) == 1, "the parts are not of one size")
    else:
        require(sizes == whole(stated), "the parts are cut elsewhere")
    return values


@rule(
    "cancel-split-concat",
    min_opset=2,
    sample=[
        {"x": (6, 12), "Split.axis": 1, "two.split": [5, 7], "three.split": [2, 7, 3]}
        | {"Concat.axis": -1},
        {"Split.axis": 0, "Concat.axis": 0, "two.split": [5, 1], "three.split": [1, 2, 3]},
    ],
    refuses=[{"Concat.axis": 0, "two.split": [6, 6], "three.split": [4, 4, 4]}],
)
def cancel_split_concat(op: Ops, x: Var) -> Rewrite:
    """Concat(Split(x)) => x, two parts or three."""
    two, three = op.Split(x, outputs=2), op.Split(x, outputs=3)
    joined = op.Concat(*two) | op.Concat(*three)
    yield joined  # --------------------------------------------- before => after
    rank = x.rank
    (cut,) = from_front([(two[0] | three[0]).attr("axis")], rank)
    (seam,) = from_front([joined.attr("axis")], rank)
    require(seam == cut, "it joins along another axis")
    return x
