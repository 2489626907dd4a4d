"""Which inputs of layers to do without: one after another, the rest making up for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

_DAMPING: Final = 1e-2  # of the mean diagonal of a Gram matrix, before it is inverted
_SMALLEST: Final = 1e-12  # of a pivot, relative to the largest


class Reader:
    """A layer that reads units: what doing without each costs, with optimal compensation.

    `weights` [M, K], `matrix` [K, K] the Gram matrix of what it reads; `columns` [read, taps] are
    those of each of the `units` [read] that it reads: all have as many. Costs are relative to the
    energy of what the layer gives. The optimal brain surgeon on blocks (Kurtic et al.,
    arXiv:2302.04089, for structures).
    """

    def __init__(self, weights: Array, matrix: Array, units: Array, columns: Array) -> None:
        self._columns = columns
        self._units = units
        self._row = {int(unit): row for row, unit in enumerate(units)}
        self._weights = np.array(weights, np.float64)
        h = np.array(matrix, np.float64)
        energy = float(np.einsum("mk,mk->", self._weights @ h, self._weights))
        h[np.diag_indices_from(h)] += _DAMPING * float(np.mean(np.diag(h))) or 1.0
        self._inverse = np.linalg.inv(h)
        self._scale = 1 / energy if energy > 0 else 0.0

    def costs(self, count: int) -> Floats:
        """Of each of so many units, with those gone that were taken out; float64 [count]."""
        found = np.zeros(count)
        found[self._units] = self._costs()
        return found

    def _costs(self) -> Floats:
        columns = self._columns
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weights[:, columns].transpose(1, 2, 0)  # [units, taps, M]
        if columns.shape[1] == 1:
            diagonal = np.maximum(blocks[:, 0, 0], _SMALLEST)
            return np.asarray(self._scale * np.square(weights[:, 0]).sum(axis=1) / diagonal)
        size = blocks.shape[-1]
        largest = np.abs(blocks).max(axis=(1, 2), keepdims=True)
        blocks = blocks + (_SMALLEST * np.maximum(largest, 1e-30)) * np.eye(size)
        solved = np.linalg.solve(blocks, weights)
        return np.asarray(self._scale * np.einsum("utm,utm->u", weights, solved))

    def take_out(self, unit: int) -> None:
        """Do without a unit: the other weights make up for it."""
        if unit not in self._row:
            return
        at = self._columns[self._row[unit]]
        inverse = self._inverse
        block = inverse[np.ix_(at, at)]
        block = block + _SMALLEST * float(np.abs(block).max()) * np.eye(len(at))
        rows = np.linalg.solve(block, inverse[at])  # [taps, K]
        self._weights -= self._weights[:, at] @ rows
        self._weights[:, at] = 0
        self._inverse = inverse - inverse[:, at] @ rows
        # What is gone must not come back by rounding, nor be divided by.
        self._inverse[at] = 0
        self._inverse[:, at] = 0
        self._inverse[at, at] = 1.0


def elimination(
    readers: Sequence[Reader], units: int, at_once: int = 1
) -> tuple[tuple[int, ...], Floats]:
    """The order in which units go, and what each then costs the reader that loses most.

    Always those go that cost least once those before them are gone, so many at once.
    """
    order: list[int] = []
    costs: list[float] = []
    left = np.ones(units, np.bool_)
    while left.any():
        total = np.zeros(units)
        for reader in readers:
            total = np.maximum(total, reader.costs(units))
        found = np.argsort(np.where(left, total, np.inf), kind="stable")
        for unit in found[: min(at_once, int(left.sum()))].tolist():
            order.append(unit)
            costs.append(max(float(total[unit]), 0.0))
            left[unit] = False
            for reader in readers:
                reader.take_out(unit)
    return tuple(order), np.asarray(costs)
