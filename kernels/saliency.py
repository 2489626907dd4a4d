"""How much each weight, or each channel, is worth keeping: larger is more important."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

_DAMPING: Final = 1e-2  # of the mean diagonal of a Gram matrix, before it is inverted


def magnitude(weights: Array) -> Floats:
    """|w|, float64 in the shape of the weights."""
    return np.abs(np.asarray(weights, np.float64))


def wanda(weights: Array, matrix: Array) -> Floats:
    """|w| ||x||, ||x|| of the inputs it multiplies (Sun et al., arXiv:2306.11695), [M, K].

    `matrix` [K, K] is the Gram matrix of the inputs.
    """
    return np.asarray(magnitude(weights) * np.sqrt(np.diag(matrix)))


def obs(weights: Array, matrix: Array) -> Floats:
    """The root of w^2 / [H^-1]: what taking out one weight costs if the others make up for it.

    The optimal brain surgeon's score for a layer's own squared error (Hassibi and Stork, 1993;
    Frantar and Alistarh, arXiv:2208.11580), [M, K]; `matrix` [K, K] is the Gram matrix of the
    inputs, damped by a hundredth of the mean of its diagonal.
    """
    h = np.array(matrix, np.float64)
    mean = float(np.mean(np.diag(h)))
    if mean == 0:  # nothing was ever read
        return np.zeros(np.shape(weights))
    h[np.diag_indices_from(h)] += _DAMPING * mean
    factor = scipy.linalg.cholesky(h, lower=True, check_finite=False)
    root = scipy.linalg.solve_triangular(factor, np.eye(len(h)), lower=True, check_finite=False)
    return np.asarray(magnitude(weights) / np.sqrt(np.einsum("ij,ij->j", root, root)))


def lamp(scores: Array) -> Floats:
    """Scores of one layer made comparable with those of others: s^2 / (sum of s'^2 not below s).

    Layer-adaptive magnitude pruning (Lee et al., arXiv:2010.07611): the largest weight of each
    layer scores 1, so that no layer is ever emptied. float64, shape kept.
    """
    squares = np.square(np.asarray(scores, np.float64)).ravel()
    order = np.argsort(squares, kind="stable")
    above = np.cumsum(squares[order][::-1])[::-1]
    found = np.empty_like(squares)
    found[order] = np.divide(squares[order], above, out=np.zeros_like(above), where=above > 0)
    return found.reshape(np.shape(scores))
