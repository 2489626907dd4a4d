"""Ranges to quantize activations over, chosen from what calibration saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from graphopt.kernels.affine import Affine, asymmetric
from graphopt.kernels.affine import symmetric as symmetric_affine
from graphopt.kernels.histogram import Histogram

__all__ = [
    "Histogram",
    "MovingAverage",
    "Range",
    "entropy",
    "expand_levels",
    "expected_error",
    "min_max",
    "mse",
    "percentile",
]

Array = NDArray[Any]
Range = tuple[float, float]

KL_BINS: Final = 2048
# Which ends move, low and high: both first, lest one outlier hides what the other end costs.
MOVES: Final = [(True, True), (False, True), (True, False), (False, True), (True, False)]
# Shares of an end, coarsely down to 0.8 %: a rare outlier may be a hundred times the bulk.
COARSE: Final = tuple(0.85**power for power in range(31))


def min_max(histogram: Histogram) -> Range:
    """All that was seen; (0, 0) where nothing was."""
    return (histogram.minimum, histogram.maximum) if histogram.count else (0.0, 0.0)


def percentile(histogram: Histogram, percent: float = 99.99) -> Range:
    """The central `percent` of the values: the rest is clipped, half of it at each end.

    Values are taken as spread evenly over their bin.
    """
    if not histogram.count:
        return (0.0, 0.0)
    edges, zero = histogram.edges, -histogram.first
    counts = np.insert(histogram.counts, zero, histogram.zeros)
    starts = np.insert(edges[:-1], zero, 0.0)
    ends = np.insert(edges[1:], zero, 0.0)
    used = counts > 0
    counts, starts, ends = counts[used], starts[used], ends[used]
    below = np.cumsum(counts)

    def value(share: float) -> float:
        target = share * histogram.count
        at = min(int(np.searchsorted(below, target)), len(below) - 1)
        inside = (target - (below[at] - counts[at])) / counts[at]
        return float(starts[at] + inside * (ends[at] - starts[at]))

    tail = (1.0 - percent / 100.0) / 2.0
    low, high = value(tail), value(1.0 - tail)
    return max(low, histogram.minimum), min(high, histogram.maximum)


def entropy(histogram: Histogram, levels: int = 128) -> Range:
    """The threshold whose rounding to `levels` keeps the most information, after TensorRT.

    Least Kullback-Leibler divergence of the clipped distribution of |x| from its quantized form
    (Migacz, "8-bit inference with TensorRT", GTC 2017), 128 levels for int8 and 255 for what has
    one sign; zeros are left out, as there. Known trap: it weighs how often values occur, not how
    far clipping moves them, so it cuts long tails that matter; it took EfficientNet-Lite0 from
    75.4 to 31.1 % top-1 in Sparsebit's tables, where the least squared error kept 75.1. Offered
    for comparison, never as the default.
    """
    if not histogram.counts.any():
        return min_max(histogram)
    index = np.arange(histogram.first, histogram.first + len(histogram.counts))
    index = np.where(index < 0, -index - 1, index)
    magnitudes = np.bincount(index, histogram.counts)
    shift = max(0, math.ceil(math.log2(len(magnitudes) / KL_BINS)))
    counts = np.add.reduceat(magnitudes, np.arange(0, len(magnitudes), 2**shift))
    best, least = len(counts), math.inf
    for size in range(min(levels, len(counts)), len(counts) + 1):
        reference = counts[:size].copy()
        reference[-1] += counts[size:].sum()
        divergence = _divergence(reference, expand_levels(counts[:size], levels, reference > 0))
        if divergence < least:
            best, least = size, divergence
    threshold = best * math.ldexp(1.0, (histogram.exponent or 0) + shift)
    return max(-threshold, histogram.minimum), min(threshold, histogram.maximum)


def expand_levels(counts: Array, levels: int, used: NDArray[np.bool_] | None = None) -> Array:
    """Counts [n] merged into `levels` and spread evenly over the bins `used` of each again.

    Bins not used stay empty; by default the empty ones. The last level takes the remainder.
    """
    used = counts > 0 if used is None else used
    level = np.minimum(np.arange(len(counts)) // max(1, len(counts) // levels), levels - 1)
    total = np.bincount(level, counts)
    number = np.bincount(level, used)
    return np.where(used, (total / np.maximum(number, 1))[level], 0.0)


def _divergence(p: Array, q: Array) -> float:
    """KL(p || q) in nats of two histograms; infinite where q lacks what p has."""
    if not q.any() or (q[p > 0] == 0).any():
        return math.inf
    p, q = p[p > 0] / p.sum(), q[p > 0] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def mse(
    histogram: Histogram,
    dtype: DTypeLike = np.uint8,
    levels: tuple[int, int] | None = None,
    symmetric: bool = False,
) -> Range:
    """The range with the least expected squared error, both ends clipped independently.

    What rounding and clipping lose together, by `expected_error`, for the `asymmetric` map onto
    `dtype` (or `levels` of it), or for the `symmetric` one, whose range is (-bound, bound). The
    objective is nearly convex, so its ends are searched in turn, coarsely first; the result is
    never worse than the extremes (at 16 levels, whose steps show, it was 4 % from the best). An
    end at zero stays there, as fused Relu needs. Raises ValueError for levels of a symmetric map.
    """
    if symmetric and levels is not None:
        raise ValueError("a symmetric map uses all of its dtype")
    low, high = min(min_max(histogram)[0], 0.0), max(min_max(histogram)[1], 0.0)
    if symmetric:
        bound = max(-low, high)
        low, high = -bound, bound

    def error(ends: Range) -> float:
        if symmetric:
            return expected_error(histogram, symmetric_affine(ends[1], dtype))
        return expected_error(histogram, asymmetric(*ends, dtype, levels))

    if not histogram.counts.any():
        return low, high
    together = symmetric or low == 0 or high == 0
    return _descend(error, (low, high), [(True, True)] if together else MOVES)


def _descend(error: Callable[[Range], float], ends: Range, moves: list[tuple[bool, bool]]) -> Range:
    """Move the ends named by each move to the share with the least error, ever more finely."""
    best, least = ends, error(ends)
    # A finer sweep spans a step of the one before it on either side.
    finer = (np.linspace(1.0 - width, 1.0 + width, 11).tolist() for width in (0.15, 0.025))
    for at, shares in enumerate([COARSE, *finer]):
        for moves_low, moves_high in moves if at == 0 else moves[-2:]:
            start = best
            for share in shares:
                low = max(ends[0], start[0] * (share if moves_low else 1.0))
                high = min(ends[1], start[1] * (share if moves_high else 1.0))
                found = error((low, high))
                if found < least:
                    best, least = (low, high), found
    return best


def expected_error(histogram: Histogram, affine: Affine) -> float:
    """Mean squared error of quantizing what the histogram saw by a map of the whole tensor.

    Rounding and clipping integrated exactly over each bin, in which values are taken as spread
    evenly; zeros cost nothing. In the squared unit of the values; 0 where there were none.
    """
    used = np.flatnonzero(histogram.counts)
    if not used.size:
        return 0.0
    part = slice(int(used[0]), int(used[-1]) + 1)
    scale, zero = float(affine.scale), int(affine.zero_point)
    low, high = affine.limits[0] - zero, affine.limits[1] - zero
    x = histogram.edges[part.start : part.stop + 1] / scale

    # The antiderivative of the squared error from 0: each whole step has 1/12.
    q = np.minimum(np.maximum(np.rint(x), low), high)
    rest = x - q
    integral = np.diff(q / 12.0 + rest * rest * rest / 3.0)
    width = np.diff(x)
    mean = integral / np.maximum(width, np.finfo(np.float64).tiny)
    # An outermost bin may be a point, the largest value: its difference has no digits.
    narrow = width < 1e-6 * width.max()
    middle = (x[:-1] + x[1:])[narrow] / 2.0
    mean[narrow] = (middle - np.clip(np.rint(middle), low, high)) ** 2
    return float(histogram.counts[part] @ mean) * scale**2 / histogram.count


class MovingAverage:
    """Exponential moving average of each batch's extremes.

    `share` is the weight of a new batch, 0.01 as in PyTorch and onnxruntime; the first batch
    counts in full. It depends on the order of the batches. Values not finite are left out.
    """

    __slots__ = ("_ends", "share")

    def __init__(self, share: float = 0.01) -> None:
        self.share = share
        self._ends: Range | None = None

    @property
    def range(self) -> Range:
        """The averaged (low, high); (0, 0) where nothing was seen."""
        return self._ends or (0.0, 0.0)

    def add(self, x: Array) -> None:
        """Average in the extremes of one batch, of any shape."""
        finite = x[np.isfinite(x)]
        if not finite.size:
            return
        low, high = float(finite.min()), float(finite.max())
        if self._ends is None:
            self._ends = low, high
            return
        before = self._ends
        self._ends = (
            before[0] + self.share * (low - before[0]),
            before[1] + self.share * (high - before[1]),
        )
