"""Matrices as products of thinner ones, weighed by what they are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

_FORGIVEN: Final = 1e-12  # of a Gram matrix's largest eigenvalue: what is less is rounding


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What a matrix W [M, K] loses at each rank: `values` are squared singular values, descending.

    Of W C, where C C^T is the Gram matrix of the rows that W is multiplied with.
    """

    values: Floats
    _left: Floats  # [M, n], so that W is about _left[:, :r] @ _right[:r]
    _right: Floats  # [n, K]

    def error(self, rank: int) -> float:
        """The share of the sum of squares that is lost at a rank; 0 where there is nothing."""
        return self.errors([rank])[0]

    def errors(self, ranks: Sequence[int]) -> list[float]:
        """The shares that are lost at several ranks, summed from the smallest values on."""
        tails = np.append(np.cumsum(self.values[::-1])[::-1], 0.0)
        last = len(self.values)
        return [float(tails[min(r, last)] / tails[0]) if tails[0] > 0 else 0.0 for r in ranks]

    def factors(self, rank: int) -> tuple[Floats, Floats]:
        """Left [M, r] and right [r, K], whose product loses least; both of like size.

        r is `rank`, or min(M, K) where that is less.
        """
        left, right = self._left[:, :rank], self._right[:rank]
        sizes = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
        some = (sizes[0] > 0) & (sizes[1] > 0)
        scale = np.sqrt(np.divide(sizes[1], sizes[0], out=np.ones(len(right)), where=some))
        return left * scale, right / scale[:, None]


def spectrum(weights: Array, gram: Array | None = None, ridge: float = 0.0) -> Spectrum:
    """The spectrum of W [M, K], weighed by `gram` [K, K] = X^T X of the rows X that it multiplies.

    min ||(W - A B) C||, C C^T = gram + `ridge` times the mean of its diagonal, is solved by A = U,
    B = U^T W, where U are leading eigenvectors of W C C^T W^T (DRONE, Chen et al., 2021; SVD-LLM,
    Wang et al., arXiv:2403.07378): no inverse is needed where W is wide. Where it is tall, it is
    solved on the other side. Without a Gram matrix, or one of zeros, this is the plain SVD.
    """
    w = np.asarray(weights, np.float64)
    mean = 0.0 if gram is None else float(np.mean(np.diag(gram)))
    if gram is None or mean <= 0:
        u, s, vt = scipy.linalg.svd(w, full_matrices=False, check_finite=False)
        return Spectrum(np.square(s), u * s, vt)
    g = np.array(gram, np.float64)
    g[np.diag_indices_from(g)] += ridge * mean
    if w.shape[0] <= w.shape[1]:
        values, vectors = scipy.linalg.eigh(w @ g @ w.T, check_finite=False)
        vectors = np.ascontiguousarray(vectors[:, ::-1])
        return Spectrum(np.maximum(values[::-1], 0.0), vectors, vectors.T @ w)
    root, inverse = roots(g)
    small = scipy.linalg.qr(w @ root, mode="r", check_finite=False)[0][: len(g)]
    _, s, vt = scipy.linalg.svd(small, check_finite=False)
    return Spectrum(np.square(s), w @ (root @ vt.T), vt @ inverse)


def roots(gram: Floats) -> tuple[Floats, Floats]:
    """C with C C^T = gram [K, K], and its inverse.

    Where the Gram matrix is singular, what it does not see counts as if it saw a trace of it: a
    relative `_FORGIVEN` of its largest eigenvalue.
    """
    values, vectors = scipy.linalg.eigh(gram, check_finite=False)
    if values[-1] <= 0:
        return np.eye(len(gram)), np.eye(len(gram))
    root = np.sqrt(np.maximum(values, _FORGIVEN * values[-1]))
    return vectors * root, vectors.T / root[:, None]


def weighted_error(weights: Array, near: Array, gram: Array | None) -> float:
    """The share that is lost of what W [M, K] gives; 0 where it gives nothing."""
    w = np.asarray(weights, np.float64)
    lost = w - near
    if gram is None:
        whole, part = float(np.sum(w * w)), float(np.sum(lost * lost))
    else:
        whole, part = float(np.sum((w @ gram) * w)), float(np.sum((lost @ gram) * lost))
    return max(part, 0.0) / whole if whole > 0 else 0.0


def truncated_svd(matrix: Array, rank: int) -> tuple[Floats, Floats, Floats]:
    """u [M, r], s [r] and vt [r, K] of the leading singular values, r = min(rank, M, K)."""
    a = np.asarray(matrix, np.float64)
    u, s, vt = scipy.linalg.svd(a, full_matrices=False, check_finite=False)
    return u[:, :rank], s[:rank], vt[:rank]


def randomised_svd(
    matrix: Array, rank: int, *, oversampling: int = 10, powers: int = 2, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """As `truncated_svd`, nearly, and faster where the rank is far below M and K.

    From a random range of rank + `oversampling` dimensions and `powers` power iterations (Halko,
    Martinsson and Tropp, 2011). The same for the same seed.
    """
    a = np.asarray(matrix, np.float64)
    size = min(rank + oversampling, *a.shape)
    basis = a @ np.random.default_rng(seed).standard_normal((a.shape[1], size))
    for _ in range(powers):
        back = scipy.linalg.qr(a.T @ _orthonormal(basis), mode="economic", check_finite=False)[0]
        basis = a @ back
    q = _orthonormal(basis)
    u, s, vt = scipy.linalg.svd(q.T @ a, full_matrices=False, check_finite=False)
    return (q @ u)[:, :rank], s[:rank], vt[:rank]


def _orthonormal(matrix: Floats) -> Floats:
    return np.asarray(scipy.linalg.qr(matrix, mode="economic", check_finite=False)[0])


def refit_left(right: Array, gram: Array | None, weights: Array, ridge: float = 0.0) -> Floats:
    """The left factor A [M, R] that makes A P nearest to W [M, K]: W G P^T (P G P^T)^-1.

    `right` P [R, K] is the inner map, z = P x; `gram` G [K, K] is that of the x. `ridge`, of the
    mean square of z for rows of P of one length, keeps A small. What G does not see of z gets 0.
    """
    p, w = np.asarray(right, np.float64), np.asarray(weights, np.float64)
    lengths = np.linalg.norm(p, axis=1)
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    p = p * inverse[:, None]  # else what G does not see might be large by rounding
    seen = p if gram is None else p @ np.asarray(gram, np.float64)
    return np.asarray(regression(seen @ p.T, seen @ w.T, ridge) * inverse)


def regression(gram: Floats, cross: Floats, ridge: float = 0.0) -> Floats:
    """A [M, R] that minimises ||A z - y||^2, from z z^T [R, R] and z y^T [R, M], summed.

    The one of least norm where it is not determined; `ridge` is relative to the mean of z^2.
    """
    squares = np.diag(gram)
    seen = squares > _FORGIVEN * float(np.max(squares, initial=0.0))
    inverse = np.sqrt(np.divide(1.0, squares, out=np.zeros(len(gram)), where=seen))
    matrix = gram * inverse * inverse[:, None]
    if ridge:
        matrix = matrix + np.diag(ridge * float(np.mean(squares)) * inverse**2)
    right = cross * inverse[:, None]
    try:
        factor = scipy.linalg.cho_factor(matrix, check_finite=False)
        if np.min(np.diag(factor[0])) > math.sqrt(_FORGIVEN):
            return np.asarray((inverse[:, None] * scipy.linalg.cho_solve(factor, right)).T)
    except scipy.linalg.LinAlgError:
        pass  # singular: below
    values, vectors = scipy.linalg.eigh(matrix, check_finite=False)
    kept = values > _FORGIVEN * float(np.max(values, initial=0.0))
    vectors = vectors[:, kept]
    found = vectors @ ((vectors.T @ right) / values[kept, None])
    return np.asarray((inverse[:, None] * found).T)


def energy_rank(values: Sequence[float] | Floats, share: float) -> int:
    """The least rank that keeps a share of the sum of `values`, which are squares."""
    sums = np.cumsum(np.concatenate(([0.0], np.asarray(values, np.float64))))
    return int(np.searchsorted(sums, min(share, 1.0) * sums[-1]))


def evbmf_rank(matrix: Array) -> int:
    """The rank of what stands out of noise, by empirical variational Bayes.

    The analytic solution of Nakajima et al. (JMLR 14, 2013): singular values below a threshold are
    noise, whose variance minimises the free energy. Where all but some are rounding, these are it.
    """
    a = np.asarray(matrix, np.float64)
    rows, columns = sorted(a.shape)
    squares = scipy.linalg.svdvals(a, check_finite=False) ** 2 if a.size else np.zeros(0)
    seen = int(np.count_nonzero(squares > _FORGIVEN * float(np.max(squares, initial=0.0))))
    alpha = rows / columns if rows else 0.0
    surely = min(math.ceil(rows / (1 + alpha)) - 1, rows - 1)  # noise from here on at least
    if seen <= max(surely, 0):
        return seen
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    lower = max(squares[surely] / threshold, float(np.mean(squares[surely:]))) / columns
    upper = float(squares.sum()) / (rows * columns)
    if lower < upper:
        found = scipy.optimize.minimize_scalar(
            lambda log: _free_energy(squares / (columns * math.exp(log)), alpha, threshold),
            bounds=(math.log(lower), math.log(upper)),
            method="bounded",
        )
        upper = math.exp(found.x)
    return int(np.count_nonzero(squares > columns * upper * threshold))


def _free_energy(squares: Floats, alpha: float, threshold: float) -> float:
    """Of a noise variance, which the squared singular values were divided by."""
    x = np.maximum(squares, np.finfo(np.float64).tiny)
    noise, signal = x[x <= threshold], x[x > threshold]
    about = signal - (1 + alpha)
    t = 0.5 * (about + np.sqrt(np.maximum(about**2 - 4 * alpha, 0)))
    energy = np.sum(noise - np.log(noise)) + np.sum(signal - t)
    return float(energy + np.sum(np.log((t + 1) / signal)) + alpha * np.sum(np.log(t / alpha + 1)))
