"""Root mean square normalisation in parts (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

from graphopt.passes.fusion.normalization import precision
from graphopt.rules import Const, Ops, Rewrite, Var, require, rule


@rule(
    "fuse-rms-norm",
    min_opset=23,
    sample={"x": (2, 5, 8), "gamma": (8,), "eps": 1e-5},
    refuses=[
        {"gamma": (5, 1)},
        {"gamma": (1,)},
        {"gamma": (5, 8)},
        {"eps": [1e-5] * 8},
        {"x": (2, 5, 1)},
    ],
)
def fuse_rms_norm(op: Ops, x: Var, gamma: Var, eps: Const) -> Rewrite:
    """x / sqrt(mean(x**2) + eps) * gamma => RMSNormalization(x, gamma)."""
    square = op.Mul(x, x) | op.Pow(x, 2.0)
    root = op.Sqrt(op.Add(op.ReduceMean(square, axes=[-1], keepdims=1), eps))
    yield op.Mul(op.Div(x, root) | op.Mul(x, op.Reciprocal(root)), gamma)  # before => after
    require(None not in gamma.shape and gamma.shape == x.shape[-1:], "gamma is not per feature")
    return op.RMSNormalization(x, gamma, axis=-1, epsilon=eps.scalar(), stash_type=precision(x))


@rule("state-rms-norm", min_opset=7, max_opset=22, sample={"x": (2, 5, 8), "eps": 1e-5})
def state_rms_norm(op: Ops, x: Var, eps: Const) -> Rewrite:
    """x * (1 / sqrt(mean(x**2) + eps)) => x / sqrt(...), the form that onnxruntime fuses."""
    square = op.Pow(x, 2.0)
    root = op.Sqrt(op.Add(op.ReduceMean(square, axes=[-1], keepdims=1), eps))
    yield op.Mul(x, op.Reciprocal(root))  # --------------------- before => after
    return op.Div(x, root)
