"""Scaled dot-product attention written out in parts (Vaswani et al., arXiv:1706.03762).

onnxruntime's CPU kernel of the standard operator was never measured slower than the parts: 1.0 to
1.8 times as fast on heads taken apart already, 1.1 to 2.8 times where it takes them apart itself.
"""

from __future__ import annotations

import numpy as np

from graphopt.passes.guards import broadcasts_into, is_identity
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

_HEADS = {"q": (2, 3, 5, 4), "k": (2, 3, 6, 4), "v": (2, 3, 6, 7)}
_CAUSAL = np.where(np.tri(5, 6) > 0, 0.0, -np.inf)


@rule(
    "fuse-attention",
    min_opset=23,
    sample=[
        {**_HEADS, "c": 0.3, "d": 1.7, "mask": (2, 1, 5, 6), "keys.perm": [0, 1, 3, 2]},
        {"k": (2, 6, 3, 4), "keys.perm": [0, 2, 3, 1], "mask": (5, 6), "c": [[0.5]]},
        {"mask": (3, 5, 6)},
        {"mask": _CAUSAL},
    ],
    refuses=[
        {"mask": np.where(np.tri(5, 6, -1) > 0, 0.0, -np.inf)},
        {"mask": np.full((2, 1, 5, 6), float(np.finfo(np.float32).min))},
        {"v": (1, 3, 6, 7)},
        {"q": (2, 1, 5, 4)},
        {"k": (3, 6, 4), "keys.perm": [0, 2, 1]},
        {"q": (3, 5, 4), "k": (3, 6, 4), "v": (3, 6, 7), "keys.perm": [0, 2, 1]} | {"mask": (5, 6)},
        {"c": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], "d": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}
        | {"k": (2, 3, 4, 4), "v": (2, 3, 4, 7), "mask": (5, 4), "c": (4,), "d": (4,)},
        {"c": -0.3, "d": -0.3},
    ],
)
def fuse_attention(
    op: Ops,
    q: Var,
    k: Var,
    v: Var,
    mask: Const = absent(),
    c: Const = absent(1.0),
    d: Const = absent(1.0),
) -> Rewrite:
    """Softmax(c * q @ transpose(k) + mask) @ v => Attention(q, k, v, mask, scale=c).

    Where a row's scores are all -inf or the lowest number there is, the parts give NaN or the mean
    of v; onnxruntime's operator takes the row for masked and gives zeros. So the mask is one that
    can be looked at. And the operator takes nothing empty, which the parts do.
    """
    keys = op.Transpose(k)
    product = op.MatMul(q, keys)
    scores = op.Mul(product, c) | op.Div(product, d) | product
    attended = op.MatMul(op.Softmax(op.Add(scores, mask) | scores, axis=-1), v)
    yield attended  # ------------------------------------------- before => after
    require(q.dtype in (np.float16, np.float32), "runtimes have no such Attention")
    require(q.rank == keys.rank == v.rank == 4, "there is no axis of heads")
    batch = q.shape[:2]
    require(None not in batch and batch == keys.shape[:2] == v.shape[:2], "heads are shared")
    require(q.is_never_empty and k.is_never_empty and v.is_never_empty, "one may be empty")
    require(c.scalar() > 0 and d.scalar() > 0, "the scale is not positive")
    if not mask.is_absent:
        seen = (*batch, q.shape[2], keys.shape[3])
        require(2 <= mask.rank <= 4 and None not in mask.shape, "the mask has other axes")
        require(mask.shape[-2:] == seen[2:], "the mask spreads out")
        require(broadcasts_into(mask.shape, seen), "the mask adds a batch or heads")
        low = np.finfo(q.dtype).min / 2  # from above it, only scores that overflow lead to the end
        require((mask.values.max(axis=-1) > low).all(), "a row may be masked altogether")
    order = keys.attr("perm") or [3, 2, 1, 0]
    order = [*order[:2], order[3], order[2]]
    apart = k if is_identity(order) else op.Transpose(k, perm=order)
    return op.Attention(q, apart, v, mask, scale=c.scalar() / d.scalar())


@rule(
    "fuse-score-scale",
    min_opset=7,
    sample=[
        {"x": (2, 3, 8), "w": (8, 6), "b": (6,), "target": [2, 3, 2, 3], "y": (2, 2, 3, 5)}
        | {"c": 0.3, "d": 1.7, "moved.perm": [0, 2, 1, 3]},
        {"w": (2, 8, 6), "c": [[[2.5]]], "d": [1.7]},
        {"x": ("n", 3, 8), "target": [0, -1, 2, 3], "y": (3, 5)},
    ],
    refuses=[
        {"c": [0.3, 0.4, 0.5, 0.6, 0.7], "d": [0.3, 0.4, 0.5, 0.6, 0.7]},
        {"c": [[[[[0.3]]]]], "d": [[[[[0.3]]]]]},
        {"c": 0.0, "d": 0.0},
    ],
)
def fuse_score_scale(
    op: Ops,
    x: Var,
    w: Const,
    y: Var,
    target: Const,
    b: Const = absent(0.0),
    c: Const = absent(1.0),
    d: Const = absent(1.0),
) -> Rewrite:
    """f(x @ w + b) @ y * c => f(x @ (w*c) + b*c) @ y, f moves elements, c one number."""
    product = op.MatMul(x, w)
    apart = op.Reshape(op.Add(product, b) | product, target)
    moved = op.Transpose(apart)
    scores = op.MatMul(moved, y)
    yield op.Mul(scores, c) | op.Div(scores, d)  # -------------- before => after
    require(scores.dtype.kind == "f", "the values are not floating-point")
    require(max(c.values.ndim, d.values.ndim) <= scores.rank, "the factor adds axes")
    require(c.scalar() != 0 and d.scalar() != 0, "the factor is zero")
    factor = c.scalar() / d.scalar()
    made = op.MatMul(x, w.values * factor)
    if not b.is_absent:
        made = op.Add(made, b.values * factor)
    heads = op.Transpose(op.Reshape(made, target, **apart.attrs), **moved.attrs)
    return op.MatMul(heads, y)


@rule(
    "fuse-attention-scale",
    min_opset=23,
    sample=[
        {**_HEADS, "mask": (2, 1, 5, 6), "c": 0.3, "e": 1.7, "a.scale": 0.7, "a.is_causal": None},
        {"c": [[[0.3]]], "mask": (5, 6), "a.is_causal": 1},
    ],
    refuses=[
        {"a.scale": None},
        {"c": (4,), "e": (4,)},
        {"c": -0.3, "e": -0.3},
    ],
)
def fuse_attention_scale(
    op: Ops,
    q: Var,
    k: Var,
    v: Var,
    mask: Var = absent(),
    c: Const = absent(1.0),
    e: Const = absent(1.0),
) -> Rewrite:
    """Attention(q * c, k, v) or Attention(q, k * c, v) => Attention(q, k, v), its scale times c."""
    a = op.Attention(op.Mul(q, c), k, v, mask) | op.Attention(q, op.Mul(k, e), v, mask)
    yield a  # -------------------------------------------------- before => after
    require(q.dtype != np.float64, "attributes hold single precision")
    factor = c.scalar() * e.scalar()
    require(factor > 0, "the factor is not positive")
    require(c.values.ndim <= q.rank and e.values.ndim <= k.rank, "the factor adds axes")
    scale = a.attr("scale")
    require(scale is not None, "the scale follows from the shapes")
    return op.Attention(q, k, v, mask, **a.attrs | {"scale": scale * factor})


@rule(
    "fuse-attention-heads",
    min_opset=23,
    sample=[
        {"q": (2, 5, 12), "k": (2, 6, 12), "v": (2, 6, 21), "mask": (5, 6), "a.scale": 0.3}
        | {"a.q_num_heads": None, "a.kv_num_heads": None, "a.is_causal": None}
        | {"qs.shape": [0, 0, 3, 4], "ks.shape": [2, 6, 3, 4], "vs.shape": [2, -1, 3, 7]}
        | {"joined.shape": [0, 0, -1]},
        {"mask": (2, 1, 5, 6), "a.scale": None, "a.is_causal": 1},
        {"q": (2, 5, 24), "qs.shape": [2, 5, 6, 4]},
    ],
    refuses=[
        {"q": (1, 10, 12), "qs.shape": [2, 5, 3, 4]},
        {"k": (1, 12, 12)},
        {"v": (1, 12, 21), "vs.shape": [2, 6, 3, 7]},
        {"joined.shape": [1, 10, 21]},
        {"joined.shape": [2, 5, 3, 7]},
    ],
)
def fuse_attention_heads(op: Ops, q: Var, k: Var, v: Var, mask: Var = absent()) -> Rewrite:
    """Attention of split heads, joined again => Attention(q, k, v, q_num_heads=...)."""
    qs, ks, vs = op.Reshape(q), op.Reshape(k), op.Reshape(v)
    a = op.Attention(
        op.Transpose(qs, perm=[0, 2, 1, 3]),
        op.Transpose(ks, perm=[0, 2, 1, 3]),
        op.Transpose(vs, perm=[0, 2, 1, 3]),
        mask,
    )
    joined = op.Reshape(op.Transpose(a, perm=[0, 2, 1, 3]))
    yield joined  # --------------------------------------------- before => after
    for whole, apart in ((q, qs), (k, ks), (v, vs), (joined, qs)):
        require(whole.rank == 3 and apart.rank == 4, "it does not split one axis into heads")
        rows = whole.shape[:2]
        require(None not in rows and rows == apart.shape[:2], "batch or rows change, or may")
    heads = {"q_num_heads": qs.shape[2], "kv_num_heads": ks.shape[2]}
    require(all(isinstance(each, int) for each in heads.values()), "how many heads is not known")
    return op.Attention(q, k, v, mask, **a.attrs | heads)
