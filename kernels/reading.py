"""Weights of which the input side is a product: the half that factorised kernels have in common.

Weights [M, A, B] read x [A, B], such as channels and taps. Where A is first mapped to q features,
z = F x [q, B], all that comes after is linear in z: given F [q, A], it needs no more than the Gram
matrix of z. Given what comes after, F is least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from graphopt.kernels.lowrank import roots

Array = NDArray[Any]
Floats = NDArray[np.float64]

RIDGE: Final = 1e-3  # of the mean square of what is read: as good on other data, or better
_SETTLED: Final = 1e-3  # of a residual, by size
_TRACE: Final = 1e-10  # of the mean of a preconditioner's diagonal, that it can be inverted


@dataclass(frozen=True, eq=False)
class Reading:
    """Weights W [M, A, B] and what they read; `reading` builds it."""

    weights: Floats
    gram: Floats | None  # G [AB, AB], its diagonal near one; None: the identity
    cross: Floats  # W G [M, A, B]
    inputs: Floats  # [A, A]: the mean over B of G
    taps: Floats  # [B, B]: the mean over A, where that of the diagonal of both is one
    energy: float  # tr W G W^T

    @property
    def flops(self) -> float:
        """Of one row of weights times the Gram matrix."""
        size = float(self.weights[0].size)
        return 2.0 * size * (size if self.gram is not None else self.weights.shape[2])

    def white(self) -> tuple[Floats, Floats, Floats]:
        """Weights times roots of `inputs` and `taps`, as if G were their product, and the inverses.

        Factors [q, A] and [r, B] of these weights times the inverses are ones of W.
        """
        if self.gram is None:
            return self.weights, np.eye(len(self.inputs)), np.eye(len(self.taps))
        root, inverse = _root(self.inputs)
        tap_root, tap_inverse = _root(self.taps)
        return np.matmul(root.T, self.weights @ tap_root), inverse, tap_inverse

    def seen(self, first: Floats) -> tuple[Floats, Floats]:
        """The Gram matrix of z [q, B, q, B] and W G P^T [M, q, B], P = F for each of B."""
        features, taps = len(first), self.weights.shape[2]
        cross = np.matmul(first, self.cross)
        if self.gram is None:
            inner = np.einsum("qs,tu->qtsu", first @ first.T, np.eye(taps))
            return inner, cross
        half = first @ self.gram.reshape(first.shape[1], -1)
        inner = np.matmul(first, half.reshape(features * taps, -1, taps))
        inner = inner.reshape(features * taps, -1)
        return (0.5 * (inner + inner.T)).reshape(features, taps, features, taps), cross

    def moved(self, first: Floats, core: Floats, last: Floats | None, steps: int) -> Floats:
        """A better F, given W ~ `last` [M, p] `core` [p, q, B] F: conjugate gradients from F on.

        `last` None is the identity. No step makes the error larger.
        """
        target = self.cross
        if last is None and len(core) > core[0].size:  # more outputs than what they see
            last, core = core.reshape(len(core), -1), np.eye(core[0].size)
            core = core.reshape(-1, first.shape[0], self.weights.shape[2])
        if last is not None:
            q, r = scipy.linalg.qr(last, mode="economic", check_finite=False)
            core = np.tensordot(r, core, axes=1)
            target = np.tensordot(q.T, target, axes=1)
        flat = core.transpose(1, 0, 2).reshape(core.shape[1], -1)

        def back(x: Floats) -> Floats:
            return np.asarray(flat @ x.transpose(0, 2, 1).reshape(-1, x.shape[1]))

        def image(x: Floats) -> Floats:
            made = np.matmul(x.T, core)
            return back(self.times(made))

        left = inverse(flat @ flat.T)
        right = inverse(self.inputs)
        return descended(first, back(target), image, lambda x: left @ x @ right, steps)

    def times(self, weights: Floats) -> Floats:
        """Weights [n, A, B] times G."""
        if self.gram is None:
            return weights
        return np.asarray((weights.reshape(len(weights), -1) @ self.gram).reshape(weights.shape))


def reading(weights: Array, gram: Array | None, ridge: float = RIDGE) -> Reading:
    """Of weights [M, A, B]; `gram` [AB, AB] is scaled to a diagonal of mean one, plus `ridge`.

    A Gram matrix of zeros says nothing, and counts as none.
    """
    w = np.asarray(weights, np.float64)
    inputs, taps = w.shape[1:]
    mean = 0.0 if gram is None else float(np.mean(np.diag(gram)))
    if gram is None or mean <= 0:
        return Reading(w, None, w, np.eye(inputs), np.eye(taps), float(np.sum(w * w)))
    g = np.asarray(gram, np.float64) / mean
    g[np.diag_indices_from(g)] += ridge
    cross = (w.reshape(len(w), -1) @ g).reshape(w.shape)
    blocks = g.reshape(inputs, taps, inputs, taps)
    by_input = np.einsum("atbt->ab", blocks) / taps
    by_tap = np.einsum("atau->tu", blocks) / (inputs * (1 + ridge))
    return Reading(w, g, cross, by_input, by_tap, max(float(np.sum(cross * w)), 0.0))


def leading(matrix: Floats, count: int) -> Floats:
    """Leading left singular vectors of [n, k] as columns [n, count]."""
    size = len(matrix)
    vectors = scipy.linalg.eigh(
        matrix @ matrix.T, subset_by_index=(size - count, size - 1), check_finite=False
    )[1]
    return np.ascontiguousarray(vectors[:, ::-1])


def descended(
    x: Floats,
    right: Floats,
    image: Callable[[Floats], Floats],
    scaled: Callable[[Floats], Floats],
    steps: int,
) -> Floats:
    """x nearer to the solution of image(x) = right: preconditioned conjugate gradients.

    `image` is linear, symmetric and not negative, `scaled` about its inverse.
    """
    residual = right - image(x)
    direction = scaled(residual)
    product = float(np.sum(residual * direction))
    goal = product * _SETTLED**2
    for _ in range(steps):
        if not product > goal:
            break
        along = image(direction)
        curvature = float(np.sum(direction * along))
        if not curvature > 0:
            break
        x = x + product / curvature * direction
        residual = residual - product / curvature * along
        after = scaled(residual)
        before, product = product, float(np.sum(residual * after))
        direction = after + product / before * direction
    return x


def inverse(matrix: Floats) -> Floats:
    """Of a matrix that is symmetric and not negative, plus a trace of the identity."""
    trace = _TRACE * float(np.mean(np.diag(matrix))) or 1.0
    whole = matrix + trace * np.eye(len(matrix))
    return np.asarray(scipy.linalg.inv(whole, check_finite=False))


def _root(matrix: Floats) -> tuple[Floats, Floats]:
    """C with C C^T = matrix, and its inverse."""
    try:
        root = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:  # singular, but for rounding
        return roots(matrix)
    return root, scipy.linalg.solve_triangular(root, np.eye(len(root)), lower=True)
