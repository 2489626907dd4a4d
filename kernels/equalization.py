"""Scales moved between neighbouring layers, so that rounding costs all channels alike."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGEST: Final = 1024.0  # beyond, a nearly dead channel's bias would dominate the activations


def cross_layer_scales(range1: Array, range2: Array) -> NDArray[np.float32]:
    """s_i = sqrt(r1_i * r2_i) / r2_i, by which W1[i] and b1[i] are divided and W2[:, i] multiplied.

    `range1` [C] are the largest magnitudes of the first layer's output channels, `range2` those of
    the second layer's input channels; both become sqrt(r1 * r2). Exact between layers with only a
    positively homogeneous function (Relu) between them (Nagel et al., arXiv:1906.04721). A channel
    that is dead or not finite on either side has s = 1; s lies in [1/1024, 1024].
    """
    r1, r2 = (np.asarray(r, np.float64) for r in (range1, range2))
    alive = _alive(r1, r2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _bounded(np.sqrt(r1) / np.sqrt(r2), alive)


def smooth_scales(
    activation_max: Array, weight_max: Array, alpha: float = 0.5
) -> NDArray[np.float32]:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): x_j is divided by it, w[j] multiplied.

    Both [in], one for each input channel of a MatMul; a larger `alpha` moves more of the
    difficulty from activations to weights (Xiao et al., SmoothQuant, arXiv:2211.10438). A channel
    that is dead or not finite on either side has s = 1; s lies in [1/1024, 1024].
    """
    x, w = (np.asarray(r, np.float64) for r in (activation_max, weight_max))
    alive = _alive(x, w)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _bounded(np.power(x, alpha) / np.power(w, 1.0 - alpha), alive)


def _alive(one: Array, other: Array) -> NDArray[np.bool_]:
    return np.asarray((one > 0) & (other > 0) & np.isfinite(one) & np.isfinite(other))


def _bounded(scales: Array, alive: NDArray[np.bool_]) -> NDArray[np.float32]:
    bounded = np.clip(scales, 1.0 / LARGEST, LARGEST)
    return np.asarray(np.where(alive, bounded, 1.0)).astype(np.float32)
