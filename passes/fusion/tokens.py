"""Tokens of a model's own ahead of a sequence, and what is added by position."""

from __future__ import annotations

import numpy as np

from graphopt.passes.guards import broadcasts_into, from_front
from graphopt.rules import Const, Ops, Rewrite, Var, require, rule


@rule(
    "fuse-token-position",
    min_opset=8,
    sample=[
        {"x": (2, 4, 5), "token": (1, 1, 5), "target": [2, 1, 1], "position": (1, 5, 5)}
        | {"joined.axis": 1},
        {"token": (2, 5), "target": [2, 1, 5], "position": (6, 5), "joined.axis": -2},
        {"x": (3, 5), "token": (1, 5), "target": [2, 1], "position": (5, 5), "joined.axis": 0},
        {"token": (2, 1, 1), "target": [2, 3, 5], "position": (2, 7, 5)},
        {"x": ("n", 4, "d"), "token": 0.5, "target": [2, 1, 3], "position": (1, 5, 1)},
    ],
    refuses=[
        {"position": (1, 1, 5)},
        {"position": (1, 1, 5, 5)},
        {"position": (1, 5, 1)},
        {"x": (2, "n", 5), "target": [2, 3, 1]},
        {"x": (2, 1, 5), "target": [2, 0, 1]},
    ],
)
def fuse_token_position(op: Ops, x: Var, token: Const, target: Var, position: Const) -> Rewrite:
    """Concat(Expand(token), x) + p => Pad(x) + p', the token in p', zeros ahead of x.

    How far the token is spread out follows: the axes of x, and what the positions leave over.
    """
    joined = op.Concat(op.Expand(token, target), x)
    yield op.Add(joined, position)  # --------------------------- before => after
    rank = x.rank
    require(x.dtype.kind == "f", "the values are not floating-point")
    require(token.values.ndim <= rank and position.values.ndim <= rank, "a constant adds axes")
    (axis,) = from_front([joined.attr("axis")], rank)
    own, apart = (
        each.values.reshape([1] * (rank - each.values.ndim) + list(each.values.shape))
        for each in (token, position)
    )
    rows = x.shape[axis]  # of one row alone, Add could have made more
    ahead = apart.shape[axis] - rows if isinstance(rows, int) and rows > 1 else 0
    require(ahead > 0, "how many tokens there are is not known")
    require(own.shape[axis] in (1, ahead), "there are other tokens")
    apart = np.array(apart, np.float64)
    first = tuple(slice(ahead if each == axis else None) for each in range(rank))
    require(broadcasts_into(own.shape, apart[first].shape), "a token is larger than its position")
    apart[first] += own
    padded = op.Pad(x, pads=[ahead if each == axis else 0 for each in range(2 * rank)])
    require(broadcasts_into(apart.shape, padded.shape), "the positions spread out")
    return op.Add(padded, apart.reshape(apart.shape[rank - position.values.ndim :]))
