"""Rounding of weights that makes up for its own error, knowing what they are multiplied with."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.kernels.affine import Affine, limits, quantize

Array = NDArray[Any]
Floats = NDArray[np.float64]

BLOCK: Final = 128  # columns whose errors are gathered before the rest learns of them


def gptq(w: Array, gram: Array, affine: Affine, *, damping: float = 0.01) -> Array:
    """Integers for a weight [out, in] that lose less of w @ x than the nearest ones (GPTQ).

    Columns are rounded in turn, the ones with the largest inputs first, each error pushed onto the
    columns that are left as the inverse of the inputs' Gram matrix [in, in] says (Frantar et al.,
    arXiv:2210.17323; the order, its authors' act_order, gains 3 % here). `affine` is of the
    whole tensor or along axis 0; `damping` times the mean of the diagonal is added to it. Inputs
    that are never other than zero are rounded to nearest. A row that comes out worse than rounded
    to nearest, by the error (w - wq) gram (w - wq)^T, is rounded to nearest instead. Returns
    `affine.dtype` [out, in]. Raises ValueError where w or gram is not finite.
    """
    scale, zero = affine.along(2)
    nearest = quantize(w, affine)
    return _better(w, gram, scale, zero, affine.limits, nearest, damping)


def gptq_blocks(
    w: Array, gram: Array, scales: Array, zero_points: Array, block: int, *, damping: float = 0.01
) -> Array:
    """`gptq` for a weight [K, N] in blocks of `block` rows, as `quantize_blocks` lays them out.

    `gram` is [K, K]; scales and zero points [ceil(K / block), N] are kept. Returns q [K, N] of the
    zero points' dtype.
    """
    rows = len(w)
    scale = np.repeat(scales, block, axis=0)[:rows].T
    zero = np.repeat(zero_points, block, axis=0)[:rows].T.astype(np.int32)
    low, high = limits(zero_points.dtype)
    nearest = np.clip(np.rint(w.T / scale) + zero, low, high).astype(np.int32)
    q = _better(w.T, gram, scale, zero, (low, high), nearest.astype(zero_points.dtype), damping)
    return np.ascontiguousarray(q.T)


def _better(
    w: Array,
    gram: Array,
    scale: Array,
    zero: Array,
    levels: tuple[int, int],
    nearest: Array,
    damping: float,
) -> Array:
    """Row by row GPTQ's integers, or the nearest ones where those have the smaller error."""
    gram = np.asarray(gram, np.float64)
    if not (np.isfinite(gram).all() and np.isfinite(w).all()):
        raise ValueError("weights or Gram matrix are not finite")
    if not nearest.size:
        return nearest
    scale, zero = (np.broadcast_to(v, w.shape).astype(np.float64) for v in (scale, zero))
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _inverse_factor(gram[np.ix_(order, order)], damping)
    q = np.empty(w.shape)
    wide = np.asarray(w, np.float64)[:, order]
    q[:, order] = _feedback(wide, scale[:, order], zero[:, order], factor, levels)
    errors = [_error(w - (c - zero) * scale, gram) for c in (q, nearest.astype(np.float64))]
    better = errors[0] < errors[1]
    return np.where(better[:, None], q.astype(np.int32), nearest.astype(np.int32)).astype(
        nearest.dtype
    )


def _error(difference: Floats, gram: Floats) -> Floats:
    """Squared error of each row's product with the inputs of the Gram matrix."""
    return np.asarray(np.einsum("oi,oi->o", difference @ gram, difference))


def _inverse_factor(gram: Floats, damping: float) -> Floats:
    """The upper triangular U with U^T U the inverse of the damped Gram matrix.

    Factoring the matrix from its last column backwards, gram = R R^T, gives U = R^-1 with one
    triangular inversion; the inverse itself, which loses digits, is never formed.
    """
    from scipy.linalg import LinAlgError, cholesky, lapack

    # Inputs that are always zero have nothing off the diagonal, so that they neither give nor take
    # an error; what is added makes them no singularity.
    alive = np.diag(gram)[np.diag(gram) > 0]
    mean = float(alive.mean()) if alive.size else 1.0
    matrix = gram.copy()
    step = max(damping, 1e-8) * mean
    while True:
        matrix[np.diag_indices_from(matrix)] += step
        try:
            reverse = cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
            break
        except LinAlgError:  # rounding made it indefinite; what is added grows until it is not
            step *= 10.0
    upper, _ = lapack.dtrtri(reverse[::-1, ::-1], lower=0)
    return np.asarray(np.triu(upper))


def _feedback(
    w: Floats, scale: Floats, zero: Floats, factor: Floats, levels: tuple[int, int]
) -> Floats:
    """GPTQ's integers, as float64, all rows of w at once."""
    # Columns become rows: each step then works on memory in sequence.
    left, scale, zero = w.T.copy(), scale.T.copy(), zero.T.copy()
    q = np.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for at in range(start, stop):
            q[at] = np.clip(np.rint(left[at] / scale[at]) + zero[at], *levels)
            lost = (left[at] - (q[at] - zero[at]) * scale[at]) / factor[at, at]
            left[at + 1 : stop] -= np.outer(factor[at, at + 1 : stop], lost)
            errors[at - start] = lost
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return np.asarray(q.T)


def bias_correction(w: Array, wq: Array, mean_input: Array) -> NDArray[np.float32]:
    """What to add to a bias so that rounding w to wq does not move the mean of the output.

    w and wq (dequantized) are [out, in], `mean_input` [in] the mean of the inputs; the result,
    float32 [out], is (w - wq) @ mean_input (Nagel et al., arXiv:1906.04721, section 4.2).
    """
    difference = np.subtract(w, wq, dtype=np.float64)
    return np.asarray(difference @ np.asarray(mean_input, np.float64)).astype(np.float32)
