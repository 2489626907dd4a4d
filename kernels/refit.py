"""Weights fitted again after some of them were taken out: masked least squares in closed form.

A layer reads rows X [n, K] and should give Y [n, M]: the dense network's, while X comes from the
network as it has been pruned so far. Of each row of weights only some may differ from zero. All
that is needed of X and Y are the Gram matrix X^T X and X^T Y (`graphopt.kernels.moments`), so that
any number of rows can be streamed (Lazarevich et al., arXiv:2104.00432, call it layer-wise
calibration; He et al., arXiv:1707.06168, fit the consumers of removed channels the same way).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

_STEPS: Final = 100  # of conjugate gradients, at most
_SLOWER: Final = 20  # times: many small factorisations than products of whole matrices
_TOLERANCE: Final = 1e-5  # of their residual, relative to where they started
_LEAST_VARIANCE: Final = 1e-6  # of what it should be: an output with less has lost its weights
_LARGEST_SCALE: Final = 4.0


class Fit(NamedTuple):
    """Weights [M, K] and bias [M] (None where there is none), float64."""

    weights: Floats
    bias: Floats | None


def masked_least_squares(
    matrix: Array,
    cross: Array,
    mask: Array,
    start: Array,
    *,
    ridge: float,
    has_bias: bool = True,
) -> Fit:
    """The weights on the mask that give Y from X best, and a free bias.

    Minimises ||X w + b - y||^2 + r ||w - w0||^2 for each row w of the weights, w zero off the mask.
    `matrix` [K + 1, K + 1] is X^T X with a last column of ones, `cross` [K + 1, M] is X^T Y, `mask`
    [M, K] is True where weights stay, `start` [M, K] are the w0: those of the dense layer. r is
    `ridge` times the mean of the diagonal of X^T X. Without a bias the ones are left out.
    """
    features = mask.shape[1]
    penalty = ridge * float(np.mean(np.diag(matrix)[:features]))
    size = features + has_bias
    a = np.array(matrix[:size, :size], np.float64)
    a[range(features), range(features)] += penalty
    free = np.ones((len(mask), size), bool)
    free[:, :features] = mask
    first = np.zeros((len(mask), size))
    first[:, :features] = np.where(mask, start, 0)
    right = np.array(cross[:size].T, np.float64)
    right[:, :features] += penalty * first[:, :features]
    if penalty == 0:  # nothing but zeros was read: all that can be learned are means
        weights = first[:, :features]
        left = cross[-1] - weights @ matrix[-1, :features]
        return Fit(weights, left / max(1.0, float(matrix[-1, -1])) if has_bias else None)
    found = _solved(a, right, free, first)
    return Fit(found[:, :features], found[:, features] if has_bias else None)


def squared_error(matrix: Array, cross: Array, energy: Array, fit: Fit) -> Floats:
    """||X w + b - y||^2 of each output, float64 [M]; `energy` [M] holds the squares of Y, added."""
    weights = fit.weights
    if fit.bias is not None:
        weights = np.concatenate((weights, fit.bias[:, None]), axis=1)
    size = weights.shape[1]
    quadratic = np.einsum("mk,mk->m", weights @ matrix[:size, :size], weights)
    linear = np.einsum("mk,km->m", weights, cross[:size])
    return np.asarray(np.maximum(energy - 2 * linear + quadratic, 0.0))


def _solved(a: Floats, right: Floats, free: Array, first: Floats) -> Floats:
    """Rows x of A x = b, each on its own free unknowns; by whichever way is cheaper."""
    kept = free.sum(axis=1)
    patterns, which = np.unique(np.packbits(free, axis=1), axis=0, return_inverse=True)
    sizes = kept[np.unique(which, return_index=True)[1]]
    direct = float(np.sum(sizes.astype(np.float64) ** 3)) / 3
    if _SLOWER * direct > 2.0 * _STEPS * free.size * len(a):
        return _conjugate_gradients(a, right, free, first)
    found = np.zeros_like(right)
    for pattern in range(len(patterns)):
        rows = np.flatnonzero(which == pattern)
        unknowns = np.flatnonzero(free[rows[0]])
        if unknowns.size:
            factor = scipy.linalg.cho_factor(a[np.ix_(unknowns, unknowns)], check_finite=False)
            solution = scipy.linalg.cho_solve(factor, right[np.ix_(rows, unknowns)].T)
            found[np.ix_(rows, unknowns)] = solution.T
    return found


def _conjugate_gradients(a: Floats, right: Floats, free: Array, first: Floats) -> Floats:
    """All rows at once, preconditioned by the diagonal; exact in the limit."""
    diagonal = np.diag(a)
    x = first.copy()
    residual = np.where(free, right - x @ a, 0)
    scaled = residual / diagonal
    direction = scaled.copy()
    product = np.einsum("mk,mk->m", residual, scaled)
    goal = product * _TOLERANCE**2
    for _ in range(_STEPS):
        if not (product > goal).any():
            break
        image = np.where(free, direction @ a, 0)
        curvature = np.einsum("mk,mk->m", direction, image)
        step = np.divide(product, curvature, out=np.zeros_like(product), where=curvature > 0)
        x += step[:, None] * direction
        residual -= step[:, None] * image
        scaled = residual / diagonal
        after = np.einsum("mk,mk->m", residual, scaled)
        ratio = np.divide(after, product, out=np.zeros_like(after), where=product > 0)
        direction = scaled + ratio[:, None] * direction
        product = after
    return x


def match_moments(matrix: Array, cross: Array, energy: Array, plain: Fit) -> Fit:
    """Weights scaled and biases moved so that each output keeps mean and variance.

    Without a bias no mean can be put right, and a scale moves it: the mean square is kept then.

    What taking weights out does to a layer on average, undone without fitting anything (as after
    Finkelstein et al., arXiv:1906.03193, for rounding). Arguments as in `squared_error`; an output
    that does not vary keeps its scale, and no scale grows beyond `_LARGEST_SCALE`.
    """
    count, features = matrix[-1, -1], plain.weights.shape[1]
    centred = float(plain.bias is not None)
    mean_x = centred * matrix[-1, :features] / count
    covariance = matrix[:features, :features] / count - np.outer(mean_x, mean_x)
    given = np.einsum("mk,mk->m", plain.weights @ covariance, plain.weights)
    mean_y = centred * cross[-1] / count
    wanted = np.maximum(energy / count - np.square(mean_y), 0)
    varies = given > _LEAST_VARIANCE * np.maximum(wanted, np.finfo(np.float64).tiny)
    ratio = np.divide(wanted, given, out=np.ones_like(wanted), where=varies)
    weights = plain.weights * np.minimum(np.sqrt(ratio), _LARGEST_SCALE)[:, None]
    bias = None if plain.bias is None else mean_y - weights @ mean_x
    return Fit(weights, bias)
