"""Agreement of real numbers, channel by channel.

An output may put side by side what has nothing in common: boxes of hundreds and scores below one.
Over all elements the boxes alone would count. Lin's concordance (Biometrics 45, 1989) of each
channel, 1 - E[(x - y)^2] / (var x + var y + (mean x - mean y)^2), is 1 for equal numbers and falls
with noise, gain and offset alike; the mean over channels is what an output is judged by.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]

_MOST: Final = 4096  # more along an axis are not channels
_UNLIKE: Final = 10.0  # variances that differ by more tell that an axis has channels


class Concordance:
    """Streamed over the feeds of one output, along every axis that may have channels."""

    def __init__(self) -> None:
        self._sums: dict[int, Reals] | None = None  # axis from the end -> [6, channels]
        self._shift: dict[int, Reals] = {}  # what is subtracted first, against cancellation

    def add(self, x: Reals, y: Reals) -> None:
        """Take in one feed; both are finite and of one shape."""
        if not x.size:
            return
        axes = {axis: x.shape[axis] if axis else 1 for axis in _axes(x)}
        if self._sums is None:
            self._sums = {axis: np.zeros((6, size)) for axis, size in axes.items()}
            self._shift = {axis: _rows(x, axis).mean(1) for axis in axes}
        kept = [a for a in self._sums if axes.get(a) == self._sums[a].shape[1]]
        self._sums = {axis: self._sums[axis] for axis in kept}
        for axis, sums in self._sums.items():
            a = _rows(x, axis) - self._shift[axis][:, None]
            b = _rows(y, axis) - self._shift[axis][:, None]
            sums += [
                np.full(len(a), float(a.shape[1])),
                a.sum(1),
                b.sum(1),
                (a * a).sum(1),
                (b * b).sum(1),
                np.square(a - b).sum(1),
            ]

    @property
    def result(self) -> float | None:
        """The mean over the channels that vary in the original; None where none does."""
        best: tuple[float, float] | None = None
        for axis, (n, x, y, xx, yy, noise) in (self._sums or {}).items():
            var_x = np.maximum(xx / n - (x / n) ** 2, 0)
            var_y = np.maximum(yy / n - (y / n) ** 2, 0)
            varies = var_x > 1e-12 * (xx / n + (self._shift[axis] ** 2))
            if not varies.any():
                continue
            spread = float(var_x[varies].max() / var_x[varies].min())
            total = var_x + var_y + ((x - y) / n) ** 2
            found = 1 - (noise / n)[varies] / total[varies]
            if spread < _UNLIKE:
                spread = 0.0
            if best is None or spread > best[0]:
                best = spread, float(found.mean())
        return None if best is None else best[1]


def _axes(x: Reals) -> list[int]:
    """0 stands for no axis: all elements are one channel."""
    candidates = {1 - x.ndim, -1} if x.ndim > 1 else set()
    return [0, *(axis for axis in sorted(candidates) if 1 < x.shape[axis] <= _MOST)]


def _rows(x: Reals, axis: int) -> Reals:
    """Channels first, everything else behind; one row for axis 0."""
    return x.reshape(1, -1) if axis == 0 else np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
