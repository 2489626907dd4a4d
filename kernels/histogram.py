"""A streaming histogram whose counts do not depend on the order in which the data came."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BINS: Final = 8192  # 64 KB a tensor; a step of 8 bits is 16 to 32 bins where nothing is clipped
CHUNK: Final = 1 << 16  # values at a time, as float64
LEAST_EXPONENT: Final = -1000  # of the width: its inverse has to be a float64


class Histogram:
    """Counts of a stream of values in at most `bins` uniform bins, with exact extremes.

    Bin k holds the values in [k, k + 1) * 2**exponent, where the exponent is the least at which
    the bins from the smallest value to the largest, and 0, are no more than `bins`. Edges are thus
    multiples of powers of two: widening a bin adds two counts, nothing is ever split, and both
    `add` in any order and `merge` give exactly the counts of all the values at once (of types up
    to float32). Memory is bounded by `bins` whatever the data.

    Zeros are counted by themselves, since quantization represents them exactly; NaN and infinities
    are counted and otherwise left out.
    """

    __slots__ = (
        "bins",
        "count",
        "counts",
        "exponent",
        "first",
        "maximum",
        "minimum",
        "nonfinite",
        "zeros",
    )

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2:
            raise ValueError(f"a histogram of {bins} bins")
        self.bins = bins
        self.count = 0  # of finite values, zeros included
        self.zeros = 0
        self.nonfinite = 0
        self.minimum = math.inf  # of the finite values
        self.maximum = -math.inf
        self.exponent: int | None = None  # None as long as nothing differs from zero
        self.first = 0  # k of counts[0]
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def edges(self) -> NDArray[np.float64]:
        """The ends of the bins, float64 [len(counts) + 1], the outermost at the extremes.

        Values of zero are no part of the bins.
        """
        if self.exponent is None:
            return np.zeros(len(self.counts) + 1)
        edges = np.arange(self.first, self.first + len(self.counts) + 1) * 2.0**self.exponent
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        return np.clip(edges, low, high)

    def add(self, x: Array) -> None:
        """Count the values of an array of any shape and real type."""
        flat = np.ravel(x, order="K")
        for start in range(0, flat.size, CHUNK):
            self._add(flat[start : start + CHUNK].astype(np.float64))

    def merge(self, other: Histogram) -> None:
        """Count all that another histogram has counted; ValueError where their `bins` differ."""
        if other.bins != self.bins:
            raise ValueError(f"histograms of {self.bins} and {other.bins} bins")
        self.zeros += other.zeros
        self.nonfinite += other.nonfinite
        if not other.count:
            return
        self.count += other.count
        self._cover(other.minimum, other.maximum)
        if self.exponent is None or other.exponent is None:
            return
        shift = self.exponent - other.exponent
        _accumulate(self.counts, self.first, other.counts, other.first, shift)

    def _add(self, x: NDArray[np.float64]) -> None:
        low, high = float(x.min()), float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = x[np.isfinite(x)]
            self.nonfinite += x.size - finite.size
            if not finite.size:
                return
            x, low, high = finite, float(finite.min()), float(finite.max())
        zeros = x.size - int(np.count_nonzero(x))
        self.count += x.size
        self.zeros += zeros
        self._cover(low, high)
        if self.exponent is None:
            return
        x *= 2.0**-self.exponent
        np.floor(x, out=x)
        x -= self.first
        self.counts += np.bincount(x.astype(np.intp), minlength=len(self.counts))
        self.counts[-self.first] -= zeros

    def _cover(self, low: float, high: float) -> None:
        """Widen range and bins until values from low to high have a bin each."""
        if self.minimum <= low and high <= self.maximum:
            return
        self.minimum = min(self.minimum, low)
        self.maximum = max(self.maximum, high)
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        if low == high:
            return
        before, first, counts = self.exponent, self.first, self.counts
        self.exponent = _exponent(low, high, self.bins)
        self.first = math.floor(math.ldexp(low, -self.exponent))
        last = math.floor(math.ldexp(high, -self.exponent))
        self.counts = np.zeros(last - self.first + 1, np.int64)
        if before is not None:
            _accumulate(self.counts, self.first, counts, first, self.exponent - before)


def _exponent(low: float, high: float, bins: int) -> int:
    """The least e for which bins of width 2**e from low to high are no more than `bins`."""
    exponent = math.frexp(high / 2 - low / 2)[1] - bins.bit_length() - 1
    exponent = max(exponent, LEAST_EXPONENT)
    while (
        math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) + 1 > bins
    ):
        exponent += 1
    return exponent


def _accumulate(into: Array, into_first: int, counts: Array, first: int, shift: int) -> None:
    """Add counts of bins from `first` to those of bins 2**shift times as wide."""
    index = (np.arange(first, first + len(counts)) >> shift) - into_first
    np.add.at(into, index, counts)
