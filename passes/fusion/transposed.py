"""What follows a transposed convolution and can be part of its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.passes.fusion.convolution import CHANNELS, NOT_PER_CHANNEL, channel_vector
from graphopt.rules import Const, Ops, Rewrite, Var, absent, rule

# From x of 4 x 2 these give [2, 4, 6, 4]: as wide as there are channels.
_SAMPLE: dict[str, Any] = {"x": (2, 6, 4, 2), "w": (6, 4, 3, 3), "b": (4,), "conv.strides": None}
_GROUPED: dict[str, Any] = {"w": (6, 2, 3, 3), "conv.group": 2, "conv.strides": [2, 1]}


def scaled(w: Const, k: NDArray[Any], group: int) -> NDArray[Any]:
    """Weights [in, out / group, ...] with output channel i scaled by k[i].

    The inputs of a group are consecutive, and so are its output channels.
    """
    values = w.values
    inputs, outputs = values.shape[:2]
    apart = values.reshape(group, inputs // group, outputs, -1)
    result: NDArray[Any] = apart * k.reshape(group, 1, outputs, 1)
    return result.reshape(values.shape)


@rule(
    "fuse-conv-transpose-batchnorm",
    min_opset=9,
    sample=[
        {**_SAMPLE, "gamma": CHANNELS, "beta": (4,), "mean": (4,), "var": CHANNELS[::-1]},
        _GROUPED,
    ],
)
def fuse_conv_transpose_batchnorm(
    op: Ops,
    x: Var,
    w: Const,
    gamma: Const,
    beta: Const,
    mean: Const,
    var: Const,
    b: Const = absent(0.0),
) -> Rewrite:
    """BatchNormalization(ConvTranspose(x, w, b)) => ConvTranspose(x, w*k, (b - mean)*k + beta)."""
    conv = op.ConvTranspose(x, w, b)
    bn = op.BatchNormalization(conv, gamma, beta, mean, var, training_mode=0)
    yield bn  # ------------------------------------------------- before => after
    k = gamma.values / np.sqrt(var.values + bn.attr("epsilon"))
    bias = (b.values - mean.values) * k + beta.values
    return op.ConvTranspose(x, scaled(w, k, conv.attr("group")), bias, **conv.attrs)


@rule(
    "fuse-conv-transpose-mul",
    min_opset=7,
    sample=[{**_SAMPLE, "c": (4, 1, 1)}, _GROUPED, {"c": 0.5}],
    refuses=NOT_PER_CHANNEL,
)
def fuse_conv_transpose_mul(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """ConvTranspose(x, w, b) * c => ConvTranspose(x, w*c, b*c), c per channel."""
    conv = op.ConvTranspose(x, w, b)
    yield op.Mul(conv, c)  # ------------------------------------ before => after
    group = conv.attr("group")
    k = channel_vector(c, w.values.ndim, group * w.values.shape[1])
    bias = None if b.is_absent else b.values * k
    return op.ConvTranspose(x, scaled(w, k, group), bias, **conv.attrs)


@rule(
    "fuse-conv-transpose-add",
    min_opset=7,
    sample=[{**_SAMPLE, "c": (1, 4, 1, 1)}, _GROUPED, {"c": 0.5}],
    refuses=NOT_PER_CHANNEL,
)
def fuse_conv_transpose_add(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """ConvTranspose(x, w, b) + c => ConvTranspose(x, w, b + c), c per channel."""
    conv = op.ConvTranspose(x, w, b)
    yield op.Add(conv, c)  # ------------------------------------ before => after
    channels = conv.attr("group") * w.values.shape[1]
    bias = b.values + channel_vector(c, w.values.ndim, channels)
    return op.ConvTranspose(x, w, bias, **conv.attrs)
