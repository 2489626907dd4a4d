"""Search of the clipping that loses least when weights are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Encoding = Callable[[Array], tuple[Array, Array]]

# Shares of the largest magnitude; 2 bits are best off near 0.4, 8 bits near 0.95.
FACTORS: Final = np.linspace(1.0, 0.22, 40)
CHUNK: Final = 1 << 16  # elements at a time, so that the forty passes stay in the cache


def best_factor(x: Array, encode: Encoding, levels: tuple[int, int]) -> Array:
    """The factor of `FACTORS` with the least squared error for each group of weights.

    `x` is float32 [G, L, N] with groups along the middle axis; `encode` takes a factor [1, 1, 1]
    to a float32 scale and a zero point, both [G, 1, N] or broadcastable to it; `levels` are the
    lowest and highest quantized values. Returns float64 [G, 1, N]. Of equal errors the one that
    clips least is taken. Memory beyond `x` does not grow with L.
    """
    groups, length, columns = x.shape
    errors = np.zeros((len(FACTORS), groups, 1, columns))
    step = max(1, CHUNK // max(1, columns))
    for at, factor in enumerate(FACTORS):
        scale, zero = encode(np.full((1, 1, 1), factor))
        low = (levels[0] - zero).astype(np.float32)
        high = (levels[1] - zero).astype(np.float32)
        for start in range(0, length, step):
            steps = x[:, start : start + step] / scale
            rounded = np.rint(steps)
            np.maximum(rounded, low, out=rounded)
            np.minimum(rounded, high, out=rounded)
            np.subtract(steps, rounded, out=steps)
            np.square(steps, out=steps)
            errors[at] += steps.sum(axis=1, keepdims=True)
        errors[at] *= np.square(scale, dtype=np.float64)
    return np.asarray(FACTORS[errors.argmin(axis=0)])


def group_step(shape: tuple[int, ...]) -> int:
    """How many groups of an [G, L, N] array make up one chunk."""
    _, length, columns = shape
    return max(1, CHUNK // max(1, length * columns))
