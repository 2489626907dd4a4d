"""Convolution kernels as products of smaller ones: spatial, Tucker and CP, weighed by data.

All are linear in each of their factors. Given what comes first the last factor is least squares,
and any other one is solved by conjugate gradients: no step makes the error larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from graphopt.kernels.lowrank import spectrum

Array = NDArray[Any]
Floats = NDArray[np.float64]

_RIDGE: Final = 1e-6  # of the mean square of what is read
_FLOPS: Final = 3e10  # that refining one kernel may take
_STEPS: Final = 8  # of conjugate gradients for one factor
_SWEEPS: Final = 4
_STARTS: Final = 4
_ITERATIONS: Final = 300
_SETTLED: Final = 1e-7  # of an error: less is no progress
_PULL: Final = 1e-1  # of the mean square, at first, towards what a factor was

SPATIAL: Final = "rci,mrj->mcij"
TUCKER: Final = "qc,pqt,mp->mct"
CP: Final = "rc,rt,mr->mct"


class Cp(NamedTuple):
    """`first` [r, C], `middle` [r, *kernel], `last` [M, r].

    `degeneracy`, the squares of all terms over those of the weights, is large where terms cancel.
    """

    factors: tuple[Floats, Floats, Floats]
    degeneracy: float


def spatial(weights: Array, gram: Array | None, rank: int) -> list[Floats]:
    """A column, then a row: [r, C, h] and [M, r, w] near weights [M, C, h, w].

    After Jaderberg et al. (2014); weighed by `gram` [K, K] of the patches that are read, K = C h w.
    """
    w = np.asarray(weights, np.float64)
    m, c, h, wide = w.shape
    matrix = w.transpose(0, 3, 1, 2).reshape(m * wide, c * h)
    inner = None
    if gram is not None:
        blocks = gram.reshape(c * h, wide, c * h, wide)
        inner = np.einsum("ajbj->ab", blocks)
    last, first = spectrum(matrix, inner, _RIDGE).factors(rank)
    factors = [first.reshape(rank, c, h), last.reshape(m, wide, rank).transpose(0, 2, 1)]
    return _refined(SPATIAL, factors, w, gram) if gram is not None else factors


def tucker(weights: Array, gram: Array | None, ranks: tuple[int, int]) -> list[Floats]:
    """[q, C], [p, q, *kernel] and [M, p] near weights [M, C, *kernel], for ranks (p, q).

    Kim et al. (2016), by higher-order orthogonal iteration (De Lathauwer et al., 2000).
    """
    w = np.asarray(weights, np.float64)
    p, q = ranks
    kernel = w.shape[2:]
    flat, root = _whitened(w, gram)
    inputs = _leading(flat.transpose(1, 0, 2).reshape(flat.shape[1], -1), q)
    for _ in range(_SWEEPS * 4):
        small = np.einsum("mct,qc->mqt", flat, inputs, optimize=True)
        outputs = _leading(small.reshape(len(flat), -1), p)
        small = np.einsum("mct,pm->pct", flat, outputs, optimize=True)
        before = inputs
        inputs = _leading(small.transpose(1, 0, 2).reshape(flat.shape[1], -1), q)
        if np.sum(np.square(before @ inputs.T)) > q * (1 - _SETTLED):
            break
    core = np.einsum("mct,pm,qc->pqt", flat, outputs, inputs, optimize=True)
    factors = [_back(inputs, root), core, outputs.T]
    if gram is not None:
        factors = _refined(TUCKER, factors, w.reshape(flat.shape), gram)
    first, core, last = factors
    return [first, core.reshape(p, q, *kernel), last]


def cp(weights: Array, gram: Array | None, rank: int, *, seed: int = 0) -> Cp:
    """A sum of rank-one terms near weights [M, C, *kernel], all taps of the kernel as one axis.

    Lebedev et al. (2015). Alternating least squares diverge where no best sum exists (de Silva and
    Lim, 2008): each factor is pulled to what it was by a force that fades, and the best of several
    starts is taken.
    """
    w = np.asarray(weights, np.float64)
    flat, root = _whitened(w, gram)
    best: list[Floats] = []
    least = math.inf
    for start in range(_STARTS):
        found = _alternating(flat, _start(flat, rank, start, seed))
        lost = float(np.sum(np.square(flat - _made(CP, found))))
        if lost < least:
            best, least = found, lost
    first, middle, last = best
    factors = [_back(first, root), middle, last]
    if gram is not None:
        factors = _refined(CP, factors, w.reshape(flat.shape), gram)
    first, middle, last = _balanced(factors)
    terms = [np.square(first).sum(1), np.square(middle).sum(1), np.square(last).sum(0)]
    whole = float(np.square(w).sum())
    degeneracy = float(np.prod(terms, axis=0).sum()) / whole if whole else 0.0
    return Cp((first, middle.reshape(rank, *w.shape[2:]), last), degeneracy)


# -- the axis of input channels ----------------------------------------------------------------


def _whitened(w: Floats, gram: Array | None) -> tuple[Floats, Floats | None]:
    """Weights [M, C, taps] times a root of what channels have in common, and that root."""
    flat = w.reshape(*w.shape[:2], -1)
    if gram is None:
        return flat, None
    channels, taps = flat.shape[1:]
    shared = np.einsum("atbt->ab", gram.reshape(channels, taps, channels, taps))
    mean = float(np.mean(np.diag(shared)))
    if mean <= 0:
        return flat, None
    root = scipy.linalg.cholesky(shared + _RIDGE * mean * np.eye(channels), lower=True)
    return np.einsum("mct,cd->mdt", flat, root, optimize=True), root


def _back(first: Floats, root: Floats | None) -> Floats:
    """A factor [q, C] of whitened weights as one of the weights themselves."""
    if root is None:
        return first
    return np.asarray(scipy.linalg.solve_triangular(root, first.T, lower=True, trans="T").T)


def _leading(matrix: Floats, count: int) -> Floats:
    """Leading left singular vectors as rows [count, n]."""
    _, vectors = scipy.linalg.eigh(matrix @ matrix.T, check_finite=False)
    return np.ascontiguousarray(vectors[:, ::-1][:, :count].T)


# -- factors against a Gram matrix -------------------------------------------------------------


def _made(form: str, factors: Sequence[Floats]) -> Floats:
    return np.asarray(np.einsum(form, *factors, optimize=True))


def _refined(form: str, factors: list[Floats], weights: Floats, gram: Array) -> list[Floats]:
    """The factors after some sweeps of least squares for each, last ones first."""
    outputs, features = weights.shape[0], gram.shape[0]
    cost = 2.0 * outputs * features**2 * _STEPS * len(factors)
    sweeps = max(1, min(_SWEEPS, int(_FLOPS / cost)))
    factors = list(factors)
    for _ in range(sweeps):
        for index in reversed(range(len(factors))):
            factors[index] = _solved(form, factors, index, weights, gram)
        if cost * sweeps > _FLOPS:
            break
    return factors


def _solved(
    form: str, factors: Sequence[Floats], index: int, weights: Floats, gram: Array
) -> Floats:
    """One factor by conjugate gradients from what it is, all others as they are."""
    made, rest = _linear(form, factors, index, weights.shape, gram)
    x = factors[index]
    residual = rest(weights - made(x))
    direction, size = residual, float(np.sum(residual * residual))
    goal = size * _SETTLED
    for _ in range(_STEPS):
        if size <= goal or size == 0:
            break
        image = rest(made(direction))
        curvature = float(np.sum(direction * image))
        if curvature <= 0:
            break
        x = x + size / curvature * direction
        residual = residual - size / curvature * image
        before, size = size, float(np.sum(residual * residual))
        direction = residual + size / before * direction
    return x


def _linear(
    form: str, factors: Sequence[Floats], index: int, shape: tuple[int, ...], gram: Array
) -> tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]:
    """What a factor does to the weights, and the adjoint of it, the Gram matrix in between."""
    given, result = form.split("->")
    names = given.split(",")
    others = [f for number, f in enumerate(factors) if number != index]
    other_names = [name for number, name in enumerate(names) if number != index]
    back = ",".join((result, *other_names)) + "->" + names[index]

    def made(factor: Floats) -> Floats:
        every = list(factors)
        every[index] = factor
        return _made(form, every)

    def rest(lost: Floats) -> Floats:
        weighed = (lost.reshape(shape[0], -1) @ gram).reshape(shape)
        return np.asarray(np.einsum(back, weighed, *others, optimize=True))

    return made, rest


# -- sums of rank-one terms ----------------------------------------------------------------------


def _start(flat: Floats, rank: int, number: int, seed: int) -> list[Floats]:
    """Factors to begin with: leading singular vectors of each axis, then random ones."""
    rng = np.random.default_rng((seed, number))
    m, c, t = flat.shape
    factors = [rng.standard_normal((size, rank)) for size in (c, t, m)]
    if number == 0:
        for axis, factor in zip((1, 2, 0), factors, strict=True):
            unfolded = np.moveaxis(flat, axis, 0).reshape(flat.shape[axis], -1)
            vectors = _leading(unfolded, min(rank, len(unfolded)))
            factor[:, : len(vectors)] = vectors.T
    return [factors[0].T, factors[1].T, factors[2]]


def _alternating(flat: Floats, factors: list[Floats]) -> list[Floats]:
    """Least squares for each factor in turn, each pulled to what it was."""
    first, middle, last = factors
    whole = float(np.sum(np.square(flat)))
    before, pull = math.inf, _PULL
    by_axis = [np.moveaxis(flat, axis, 0).reshape(flat.shape[axis], -1) for axis in (1, 2, 0)]
    for _ in range(_ITERATIONS):
        # The other two axes of each unfolding are in the order m, c, t.
        cross = by_axis[0] @ _pairs(last, middle.T)
        first = _pulled(cross, first.T, (middle @ middle.T) * (last.T @ last), pull).T
        cross = by_axis[1] @ _pairs(last, first.T)
        middle = _pulled(cross, middle.T, (first @ first.T) * (last.T @ last), pull).T
        cross = by_axis[2] @ _pairs(first.T, middle.T)
        both = (first @ first.T) * (middle @ middle.T)
        last = _pulled(cross, last, both, pull)
        lost = whole - 2 * float(np.sum(cross * last)) + float(np.sum(both * (last.T @ last)))
        first, middle, last = _balanced([first, middle, last])
        if before - lost <= _SETTLED * max(whole, np.finfo(np.float64).tiny) and pull <= 1e-6:
            break
        before, pull = lost, max(pull * 0.7, 1e-7)
    return [first, middle, last]


def _pairs(a: Floats, b: Floats) -> Floats:
    """Products of the rows of a [n, r] and b [k, r], all with all: [n k, r]."""
    return np.asarray((a[:, None, :] * b[None, :, :]).reshape(-1, a.shape[1]))


def _pulled(cross: Floats, before: Floats, gram: Floats, pull: float) -> Floats:
    """x [n, r] that minimises x G x^T - 2 cross x^T + pull (x - before)^2."""
    force = pull * float(np.mean(np.diag(gram))) + np.finfo(np.float64).tiny
    matrix = gram + force * np.eye(len(gram))
    return np.asarray(
        scipy.linalg.solve(matrix, (cross + force * before).T, assume_a="pos", check_finite=False).T
    )


def _balanced(factors: Sequence[Floats]) -> list[Floats]:
    """Rank-one terms with parts of one length."""
    first, middle, last = factors
    sizes = [np.linalg.norm(first, axis=1), np.linalg.norm(middle, axis=1)]
    sizes.append(np.linalg.norm(last, axis=0))
    each = np.cbrt(np.prod(sizes, axis=0))
    a, b, c = (np.divide(each, size, out=np.ones_like(each), where=size > 0) for size in sizes)
    return [first * a[:, None], middle * b[:, None], last * c]
