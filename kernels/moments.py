"""Streaming moments of activations: means and variances of channels, and Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

CHUNK: Final = 1 << 20  # elements converted to float64 at a time


class Moments:
    """Count, mean and sum of squared deviations (M2) of each channel, in float64.

    Batches are merged pairwise (Chan, Golub and LeVeque, 1983), so that a large mean costs no
    digits of the variance. Values have to be finite.
    """

    __slots__ = ("count", "m2", "mean")

    def __init__(self, channels: int) -> None:
        self.count = 0  # values in each channel
        self.mean: Floats = np.zeros(channels)
        self.m2: Floats = np.zeros(channels)

    @property
    def variance(self) -> Floats:
        """Of the population, float64 [channels]; 0 where nothing was seen."""
        return self.m2 / max(1, self.count)

    def add(self, x: Array, axis: int = 1) -> None:
        """Take in an array whose `axis` holds the channels; ValueError for another number."""
        axis = range(x.ndim)[axis]
        if x.shape[axis] != len(self.mean):
            raise ValueError(f"{x.shape[axis]} channels for {len(self.mean)}")
        if not x.size:
            return
        outer = math.prod(x.shape[:axis])
        by_channel = x.reshape(outer, x.shape[axis], -1)
        step = max(1, CHUNK * outer // x.size)
        for start in range(0, outer, step):
            part = by_channel[start : start + step].astype(np.float64)
            mean = part.mean(axis=(0, 2))
            part -= mean[:, None]
            m2 = np.einsum("ocl,ocl->c", part, part)
            self._merge(part.shape[0] * part.shape[2], mean, m2)

    def merge(self, other: Moments) -> None:
        """Take in all that another has seen; ValueError for another number of channels."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"{len(other.mean)} channels for {len(self.mean)}")
        self._merge(other.count, other.mean, other.m2)

    def _merge(self, count: int, mean: Floats, m2: Floats) -> None:
        if not count:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + np.square(delta) * (self.count * count / total)
        self.count = total


class Gram:
    """X^T X of a stream of rows X [n, features], in float64, and how many rows there were.

    With `bias` a last column of ones is added: the last row and column of `matrix`
    [features + 1, features + 1] then hold the sums, their corner the count. Values have to be
    finite.
    """

    __slots__ = ("bias", "count", "matrix")

    def __init__(self, features: int, bias: bool = False) -> None:
        self.bias = bias
        self.count = 0
        self.matrix: Floats = np.zeros((features + bias, features + bias))

    @property
    def mean(self) -> Floats:
        """Of each feature, float64 [features]; needs `bias`."""
        if not self.bias:
            raise ValueError("a Gram matrix without bias has no sums")
        return np.asarray(self.matrix[-1, :-1] / max(1, self.count))

    def add(self, rows: Array) -> None:
        """Take in rows [..., features] of any float type; ValueError for another number."""
        features = len(self.matrix) - self.bias
        if rows.shape[-1] != features:
            raise ValueError(f"{rows.shape[-1]} features for {features}")
        rows = rows.reshape(-1, features)
        step = max(1, CHUNK // max(1, features))
        for start in range(0, len(rows), step):
            part = rows[start : start + step].astype(np.float64)
            if self.bias:
                part = np.concatenate((part, np.ones((len(part), 1))), axis=1)
            self.matrix += part.T @ part
            self.count += len(part)

    def merge(self, other: Gram) -> None:
        """Take in all that another has seen; ValueError where they are not alike."""
        if other.matrix.shape != self.matrix.shape or other.bias != self.bias:
            raise ValueError(f"Gram matrices {self.matrix.shape} and {other.matrix.shape}")
        self.matrix += other.matrix
        self.count += other.count


class Regression:
    """X^T X of a stream of rows X [n, features], X^T Y of what belongs to them, Y [n, targets].

    X has a last column of ones: `matrix` [features + 1, features + 1], `cross` [features + 1,
    targets], `energy` [targets] the sums of the squares of Y; all float64. Values have to be
    finite.
    """

    __slots__ = ("count", "cross", "energy", "matrix")

    def __init__(self, features: int, targets: int) -> None:
        self.count = 0
        self.matrix: Floats = np.zeros((features + 1, features + 1))
        self.cross: Floats = np.zeros((features + 1, targets))
        self.energy: Floats = np.zeros(targets)

    @property
    def variance(self) -> Floats:
        """Of each target, float64 [targets]."""
        mean = self.cross[-1] / max(1, self.count)
        return np.asarray(np.maximum(self.energy / max(1, self.count) - np.square(mean), 0.0))

    def add(self, rows: Array, targets: Array) -> None:
        """Take in rows [..., features] and [..., targets]; ValueError where they do not fit."""
        features = len(self.matrix) - 1
        rows, targets = rows.reshape(-1, rows.shape[-1]), targets.reshape(-1, targets.shape[-1])
        shapes = rows.shape, targets.shape
        if shapes != ((len(rows), features), (len(rows), self.cross.shape[1])):
            raise ValueError(f"rows {shapes[0]} and targets {shapes[1]} for {self.cross.shape}")
        step = max(1, CHUNK // (features + self.cross.shape[1]))
        for start in range(0, len(rows), step):
            x = rows[start : start + step].astype(np.float64)
            x = np.concatenate((x, np.ones((len(x), 1))), axis=1)
            y = targets[start : start + step].astype(np.float64)
            self.matrix += x.T @ x
            self.cross += x.T @ y
            self.energy += np.einsum("nt,nt->t", y, y)
            self.count += len(x)

    @staticmethod
    def add_all(states: Sequence[Regression], rows: Array, targets: Array) -> None:
        """As `add` of each: rows [states, n, features] and targets [states, n, targets].

        Many small ones at once, as the groups of a depthwise convolution are.
        """
        step = max(1, CHUNK // max(1, len(rows) * (rows.shape[2] + targets.shape[2])))
        for start in range(0, rows.shape[1], step):
            x = rows[:, start : start + step].astype(np.float64)
            x = np.concatenate((x, np.ones((*x.shape[:2], 1))), axis=2)
            y = targets[:, start : start + step].astype(np.float64)
            turned = np.ascontiguousarray(x.transpose(0, 2, 1))
            matrices, crosses = turned @ x, turned @ y
            energies = np.einsum("gnt,gnt->gt", y, y)
            for number, state in enumerate(states):
                state.matrix += matrices[number]
                state.cross += crosses[number]
                state.energy += energies[number]
                state.count += x.shape[1]

    def merge(self, other: Regression) -> None:
        """Take in all that another has seen; ValueError where they are not alike."""
        if other.cross.shape != self.cross.shape:
            raise ValueError(f"regressions {self.cross.shape} and {other.cross.shape}")
        self.matrix += other.matrix
        self.cross += other.cross
        self.energy += other.energy
        self.count += other.count


def unfold(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
) -> Array:
    """The rows that a convolution multiplies its weights with (im2col).

    `x` is [N, C, *spatial]; kernel, strides, pads (all begins, then all ends) and dilations are as
    in ONNX Conv, of any number of axes. Returns [group, N * prod(out), C / group * prod(kernel)]
    in x's dtype, columns channel by channel as in W.reshape(group, M / group, -1), rows sample by
    sample: `rows[g] @ W[g].T` is the convolution's output with the channels last. It is
    prod(kernel) / prod(strides) times as large as x: pass few samples at a time. Raises ValueError
    where the kernel does not fit.
    """
    axes = len(kernel)
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    pads = pads or [0] * (2 * axes)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    spatial = tuple(range(2, 2 + axes))
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=spatial)
    every = (slice(None, None, step) for step in (*strides, *dilations))
    windows = windows[:, :, *every]
    samples, channels, *rest = windows.shape
    windows = windows.reshape(samples, group, channels // group, *rest)
    out, taps = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
    rows = windows.transpose(1, 0, *out, 2, *taps)
    columns = channels // group * math.prod(kernel)
    return rows.reshape(group, samples * math.prod(rest[:axes]), columns)
