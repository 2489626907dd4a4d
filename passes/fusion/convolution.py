"""What follows or precedes a convolution and can be part of its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.passes.guards import from_front, whole
from graphopt.rules import Const, Ops, Rewrite, Var, absent, require, rule

_RNG = np.random.default_rng(0)
IMAGE = (2, 3, 8, 6)
KERNEL = (4, 3, 3, 3)
CHANNELS = _RNG.uniform(0.5, 1.5, 4)
# A convolution of these gives [2, 4, 6, 4] or [2, 4, 3, 4]: as wide as it has channels.
NOT_PER_CHANNEL: list[dict[str, Any]] = [
    {"c": (4,)},
    {"c": (1, 4)},
    {"c": (4, 1, 4)},
    {"c": (2, 1, 1, 1)},
    {"c": (2, 4, 1, 1)},
    {"c": (1, 1, 1, 1, 1)},
]


SHIFTED: list[dict[str, Any]] = [  # a constant per channel after a convolution
    {"x": IMAGE, "w": KERNEL, "c": (1, 4, 1, 1), "b": (4,), "conv.strides": [2, 1]},
    {"c": 0.5},
    {"x": (2, 6, 9), "w": (4, 3, 3), "c": (4, 1), "conv.group": 2, "conv.strides": [2]},
]


def per_channel(vector: NDArray[Any], weights: Const) -> NDArray[Any]:
    """A vector over output channels, shaped to scale weights [channels, ...]."""
    return vector.reshape(-1, *[1] * (weights.values.ndim - 1))


def channel_vector(c: Const, rank: int, channels: int) -> NDArray[Any]:
    """The constant as a vector over axis 1 of a value, where it broadcasts along just that axis.

    A plain [channels] vector would run along the last axis, whatever its length.
    """
    return _channels(c.values, rank, channels)


def _channels(values: NDArray[Any], rank: int, channels: int) -> NDArray[Any]:
    require(values.ndim <= rank, "the constant has more axes than the value")
    if values.size == 1:
        return np.full(channels, values.reshape(-1)[0], values.dtype)
    shape = (1,) * (rank - values.ndim) + values.shape
    require(values.size == channels == shape[1], "the constant is not per channel")
    return values.reshape(-1)


@rule(
    "fuse-conv-batchnorm",
    min_opset=9,
    sample=[
        {
            "x": IMAGE,
            "w": KERNEL,
            "gamma": CHANNELS,
            "beta": (4,),
            "mean": (4,),
            "var": CHANNELS,
            "b": (4,),
        },
        {"conv.strides": [2, 1]},
    ],
)
def fuse_conv_batchnorm(
    op: Ops,
    x: Var,
    w: Const,
    gamma: Const,
    beta: Const,
    mean: Const,
    var: Const,
    b: Const = absent(0.0),
) -> Rewrite:
    """BatchNormalization(Conv(x, w, b)) => Conv(x, w*k, (b - mean)*k + beta), k = gamma/std."""
    conv = op.Conv(x, w, b)
    bn = op.BatchNormalization(conv, gamma, beta, mean, var, training_mode=0)
    yield bn  # ------------------------------------------------ before => after
    k = gamma.values / np.sqrt(var.values + bn.attr("epsilon"))
    bias = (b.values - mean.values) * k + beta.values
    return op.Conv(x, w.values * per_channel(k, w), bias, **conv.attrs)


@rule(
    "fuse-conv-mul",
    min_opset=7,
    sample=[
        {"x": IMAGE, "w": KERNEL, "c": (4, 1, 1), "b": (4,), "conv.strides": [2, 1]},
        {"c": 0.5},
        {"x": (2, 6, 9), "w": (4, 3, 3), "c": (1, 4, 1), "conv.group": 2, "conv.strides": [2]},
        {"x": (2, 3, 5, 6, 7), "w": (4, 3, 3, 2, 3), "c": (4, 1, 1, 1), "conv.strides": None},
    ],
    refuses=NOT_PER_CHANNEL,
)
def fuse_conv_mul(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Mul(Conv(x, w, b), c) => Conv(x, w*c, b*c), c per channel."""
    conv = op.Conv(x, w, b)
    yield op.Mul(conv, c)  # ----------------------------------- before => after
    k = channel_vector(c, w.values.ndim, len(w.values))
    bias = None if b.is_absent else b.values * k
    return op.Conv(x, w.values * per_channel(k, w), bias, **conv.attrs)


@rule(
    "fuse-conv-add",
    min_opset=7,
    sample=SHIFTED,
    refuses=NOT_PER_CHANNEL,
)
def fuse_conv_add(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Add(Conv(x, w, b), c) => Conv(x, w, b + c), c per channel."""
    conv = op.Conv(x, w, b)
    yield op.Add(conv, c)  # ----------------------------------- before => after
    bias = b.values + channel_vector(c, w.values.ndim, len(w.values))
    return op.Conv(x, w, bias, **conv.attrs)


@rule(
    "fuse-conv-squeeze-add",
    min_opset=7,
    sample=[
        {"x": (2, 3, 8, 3), "w": (4, 3, 3, 3), "c": (1, 4, 1), "b": (4,), "squeezed.axes": [3]},
        {"c": (4, 1)},
        {"c": 0.5},
        {"x": (2, 3, 3, 3), "c": (4,), "squeezed.axes": [2, 3]},
        {"x": (1, 3, 8, 6), "c": (4, 1, 1), "squeezed.axes": [0]},
    ],
    refuses=[
        {"x": (2, 3, 8, 3), "c": (1, 1, 6)},
        {"x": (2, 3, 6, 3), "c": (4,)},
        {"c": (1, 1, 4, 1)},
        {"c": (1, 2, 1, 1)},
        {"w": (1, 3, 3, 3), "b": (1,), "squeezed.axes": [1, 3], "c": (6,)},
    ],
)
def fuse_conv_squeeze_add(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Squeeze(Conv(x, w, b)) + c => Squeeze(Conv(x, w, b + c)), c per channel."""
    conv = op.Conv(x, w, b)
    squeezed = op.Squeeze(conv)
    yield op.Add(squeezed, c)  # -------------------------------- before => after
    rank = w.values.ndim
    gone = from_front(whole(squeezed.attr("axes")), rank)
    require(gone and 1 not in gone, "channels go, or it is not said what goes")
    require(c.values.ndim <= rank - len(gone), "the constant has more axes than the value")
    left = (1,) * (rank - len(gone) - c.values.ndim) + c.values.shape
    spread = np.expand_dims(c.values.reshape(left), tuple(gone))
    bias = b.values + _channels(spread, rank, len(w.values))
    return op.Squeeze(op.Conv(x, w, bias, **conv.attrs), axes=gone)


@rule(
    "fuse-conv-sub",
    min_opset=7,
    sample=SHIFTED,
    refuses=NOT_PER_CHANNEL,
)
def fuse_conv_sub(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Sub(Conv(x, w, b), c) => Conv(x, w, b - c), c per channel."""
    conv = op.Conv(x, w, b)
    yield op.Sub(conv, c)  # ----------------------------------- before => after
    bias = b.values - channel_vector(c, w.values.ndim, len(w.values))
    return op.Conv(x, w, bias, **conv.attrs)


@rule(
    "fuse-conv-div",
    min_opset=7,
    sample=[
        {"x": IMAGE, "w": KERNEL, "c": CHANNELS.reshape(4, 1, 1), "b": (4,)}
        | {"conv.strides": [2, 1]},
        {"c": 0.5},
        {"x": (2, 6, 9), "w": (4, 3, 3), "c": CHANNELS.reshape(1, 4, 1)}
        | {"conv.group": 2, "conv.strides": [2]},
    ],
    refuses=[*NOT_PER_CHANNEL, {"c": 0.0}],
)
def fuse_conv_div(op: Ops, x: Var, w: Const, c: Const, b: Const = absent(0.0)) -> Rewrite:
    """Div(Conv(x, w, b), c) => Conv(x, w/c, b/c), c per channel."""
    conv = op.Conv(x, w, b)
    yield op.Div(conv, c)  # ----------------------------------- before => after
    k = channel_vector(c, w.values.ndim, len(w.values))
    require(bool((k != 0).all()), "the divisor has a zero")
    bias = None if b.is_absent else b.values / k
    return op.Conv(x, w.values / per_channel(k, w), bias, **conv.attrs)


@rule(
    "fuse-conv-neg",
    min_opset=6,
    sample=[{"x": IMAGE, "w": KERNEL, "b": (4,), "conv.strides": [2, 1]}],
)
def fuse_conv_neg(op: Ops, x: Var, w: Const, b: Const = absent(0.0)) -> Rewrite:
    """-Conv(x, w, b) => Conv(x, -w, -b)."""
    conv = op.Conv(x, w, b)
    yield op.Neg(conv)  # -------------------------------------- before => after
    return op.Conv(x, -w.values, None if b.is_absent else -b.values, **conv.attrs)


@rule(
    "fuse-pad-conv",
    min_opset=2,
    sample=[
        {
            "x": IMAGE,
            "w": KERNEL,
            "b": (4,),
            "pad.pads": [0, 0, 1, 2, 0, 0, 0, 1],
            "pad.value": None,
            "conv.pads": None,
            "conv.auto_pad": None,
        },
        {"pad.value": 0.0, "conv.pads": [0, 1, 3, 2]},
        {"x": (2, 3, 9), "w": (4, 3, 2), "pad.pads": [0, 0, 1, 0, 0, 2], "conv.pads": [3, 0]},
        {"pad.pads": [0] * 8, "conv.auto_pad": "NOTSET"},
    ],
    refuses=[
        {"pad.pads": [0, 1, 0, 0, 0, 0, 0, 0], "w": (4, 4, 3, 3)},
        {"pad.pads": [0, 0, 0, 0, 1, 0, 0, 0]},
        {"pad.pads": [0, 0, 1, 0, 0, 0, -1, 0]},
        {"pad.value": 1.0},
        {"conv.auto_pad": "SAME_UPPER"},
        {"conv.auto_pad": "VALID"},
    ],
)
def fuse_pad_conv(op: Ops, x: Var, w: Var, b: Var = absent()) -> Rewrite:
    """Conv(Pad(x), w, b) => Conv(x, w, b) with the padding in its pads."""
    pad = op.Pad(x, mode="constant")
    conv = op.Conv(pad, w, b)
    yield conv  # ---------------------------------------------- before => after
    require(conv.attr("auto_pad") in ("NOTSET", None), "the convolution pads by itself")
    value, axes, stated = (pad.attr(name) for name in ("value", "axes", "pads"))
    require(value is None or not np.any(value), "the padding is not zero")
    rank = w.rank
    pads = np.zeros((2, rank), np.int64)
    pads[:, from_front(range(rank) if axes is None else axes, rank)] = np.reshape(stated, (2, -1))
    require(not pads[:, :2].any(), "it pads batch or channels")
    require((pads >= 0).all(), "it crops")
    own = conv.attr("pads") or [0] * 2 * (rank - 2)
    return op.Conv(x, w, b, **conv.attrs | {"pads": np.asarray(own) + pads[:, 2:].reshape(-1)})
