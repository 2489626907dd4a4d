"""Kernels as sums of rank-one terms (CP, canonical polyadic decomposition), kept from diverging.

The best sum often does not exist: terms grow without bound and cancel each other (de Silva and Lim,
2008), and no network survives rounding in such parts. Phan et al. (arXiv:2008.05441) look for the
least squares of the terms at a given error. Here these squares, times a force, are added to the
error from the start, which gives the problem a solution again; the force fades only where it costs.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from graphopt.kernels.reading import Reading, descended, inverse, leading, reading

Array = NDArray[Any]
Floats = NDArray[np.float64]

CP: Final = "rc,rt,mr->mct"

_FLOPS: Final = 1e11  # that the sweeps for one kernel may take
_TRYING: Final = 5e9  # of these for several starts
_STARTS: Final = 16
_TRIED: Final = 25  # sweeps for each start
_COMPARED: Final = 75  # more, for the better third
_SWEEPS: Final = 400  # more, for the best two
_LEAST: Final = 12  # sweeps, whatever they take
_WINDOW: Final = 10  # sweeps
_PROGRESS: Final = 2e-4  # in these, of what is lost: less is the end
_MEMORY: Final = 8  # sweeps that are extrapolated from
_FORCE: Final = 1e-3
_COSTLY: Final = 0.1  # of what is lost: where the force takes more it fades
_FADED: Final = 1e-12
_CANCELLING: Final = 100.0  # squares of terms over those of the weights: more is not taken
_REFINED: Final = 3e10  # operations that sweeps against a Gram matrix may take
_GAIN: Final = 5e-3  # of what is lost, in a window of these sweeps: less is the end
_STEPS: Final = 3  # of conjugate gradients in each
_TINY: Final = float(np.finfo(np.float64).tiny)


class Cp(NamedTuple):
    """`first` [r, C], `middle` [r, *kernel], `last` [M, r].

    `degeneracy`, the squares of all terms over those of the weights, is large where terms cancel.
    """

    factors: tuple[Floats, Floats, Floats]
    degeneracy: float


class _Terms(NamedTuple):
    """Factors a [r, A], b [r, B] and c [r, M], with what they lose and their own squares."""

    a: Floats
    b: Floats
    c: Floats
    lost: float
    size: float


def cp(weights: Array, gram: Array | None, rank: int, *, seed: int = 0) -> Cp:
    """A sum of rank-one terms near weights [M, C, *kernel], all taps of the kernel as one axis.

    Lebedev et al. (2015); weighed by `gram` [K, K] of the patches that are read.
    """
    w = np.asarray(weights, np.float64)
    read = reading(w.reshape(*w.shape[:2], -1), gram)
    white, back, tap_back = read.white()
    length = float(np.linalg.norm(white))
    if length == 0:
        shapes = (rank, w.shape[1]), (rank, *w.shape[2:]), (len(w), rank)
        return Cp((np.zeros(shapes[0]), np.zeros(shapes[1]), np.zeros(shapes[2])), 0.0)
    found, force = _decomposed(white / length, rank, seed)
    factors = found.a @ back, found.b @ tap_back, found.c.T * length
    if read.gram is not None:
        factors = _refined(read, factors, force)
    first, middle, last = factors
    first, middle, last_rows = _balanced(first, middle, last.T)
    squares = [np.square(f).sum(1) for f in (first, middle, last_rows)]
    degeneracy = float(np.prod(squares, axis=0).sum()) / float(np.square(w).sum())
    middle = middle.reshape(rank, *w.shape[2:])
    return Cp((first, middle, np.ascontiguousarray(last_rows.T)), degeneracy)


class _Path:
    """Where sweeps lead to: Anderson's extrapolation (1965), to begin anew where it goes uphill."""

    def __init__(self) -> None:
        self.ends: list[Floats] = []
        self.moves: list[Floats] = []

    def next(self, start: Floats, end: Floats) -> Floats:
        """Where a sweep would move least, if that were linear between the ends of the last ones."""
        self.ends = [*self.ends[-_MEMORY:], end]
        self.moves = [*self.moves[-_MEMORY:], end - start]
        if len(self.ends) == 1:
            return end
        slopes = np.stack([self.moves[-1] - move for move in self.moves[:-1]])
        matrix = slopes @ slopes.T
        matrix[np.diag_indices_from(matrix)] *= 1 + 1e-10
        share = _solved(matrix, (slopes @ self.moves[-1])[:, None], 0.0)[:, 0]
        return np.asarray(end - share @ np.stack([end - other for other in self.ends[:-1]]))


# -- alternating least squares -------------------------------------------------------------------


class _Sweeper:
    """Sweeps for one tensor [M, A, B] of length one."""

    def __init__(self, tensor: Floats) -> None:
        self.shape = tensor.shape
        self.flat = np.ascontiguousarray(tensor.reshape(len(tensor), -1))
        self.turned = np.ascontiguousarray(self.flat.T)

    def sweep(self, a: Floats, b: Floats, force: float) -> _Terms:
        """The last factor for these two, then each of them, all balanced."""
        rank = len(a)
        c = _solved((a @ a.T) * (b @ b.T), _products(a, b) @ self.turned, force)
        cc = c @ c.T
        part = (c @ self.flat).reshape(rank, *self.shape[1:])
        a = _solved(cc * (b @ b.T), np.matmul(part, b[:, :, None])[:, :, 0], force)
        cross = np.matmul(a[:, None, :], part)[:, 0]
        both = cc * (a @ a.T)
        b = _solved(both, cross, force)
        all_three = both * (b @ b.T)
        lost = max(1 - 2 * float(np.sum(b * cross)) + float(np.sum(all_three)), 0.0)
        return _Terms(*_balanced(a, b, c), lost, float(np.trace(all_three)))

    def run(self, a: Floats, b: Floats, force: float, sweeps: int) -> _Terms:
        """Sweeps until they gain no more, each from where the last ones together point to."""
        best: _Terms | None = None
        values: list[float] = []
        start = _joined(a, b)
        path = _Path()
        for _ in range(max(sweeps, 1)):
            found = self.sweep(*_parted(start, a.shape), force)
            value = found.lost + force * found.size
            if best is not None and value > values[-1]:
                values.append(values[-1])
                start, path = _joined(best.a, best.b), _Path()
                continue
            best = found
            values.append(value)
            if len(values) > _WINDOW and values[-1 - _WINDOW] - value < _PROGRESS * value:
                break
            start = path.next(start, _joined(found.a, found.b))
        assert best is not None
        return best


def _decomposed(tensor: Floats, rank: int, seed: int) -> tuple[_Terms, float]:
    """The best of several starts for a tensor [M, A, B] of length one; the force it is held by."""
    outputs, inputs, taps = tensor.shape
    flops = 4.0 * rank * tensor.size + 3.0 * rank**2 * (rank + 2 * (outputs + inputs + taps))
    sweeps = max(min(int(_FLOPS / flops), _SWEEPS), _LEAST)
    count = max(min(int(_TRYING / (flops * _TRIED)), _STARTS), 1)
    sweeper, force = _Sweeper(tensor), _FORCE
    pairs = _starts(tensor, rank, count, seed)
    if count > 1:
        for kept, more in ((-(-count // 3), _TRIED), (min(count // 2, 2), _COMPARED)):
            tried = [sweeper.run(a, b, force, more) for a, b in pairs]
            tried.sort(key=lambda t: t.lost + force * t.size)
            pairs = [(t.a, t.b) for t in tried[:kept]]
    ends = [sweeper.run(a, b, force, sweeps) for a, b in pairs]
    best = min(ends, key=lambda t: t.lost + force * t.size)
    while force * best.size > _COSTLY * best.lost and force > _FADED:
        found = sweeper.run(best.a, best.b, force / 10, min(_COMPARED, sweeps))
        if found.size > _CANCELLING:
            break
        best, force = found, force / 10
    return best, force


def _starts(tensor: Floats, rank: int, count: int, seed: int) -> list[tuple[Floats, Floats]]:
    """Factors a [r, A] and b [r, B]: the leading singular vectors of slices, near them, or random.

    The slices are by the leading vectors of taps; what they lack is random as well.
    """
    _, inputs, taps = tensor.shape
    vectors = leading(tensor.transpose(2, 0, 1).reshape(taps, -1), taps).T
    slices = np.einsum("mat,kt->kma", tensor, vectors, optimize=True)
    _, values, right = np.linalg.svd(slices, full_matrices=False)
    chosen = np.argsort(-values.ravel(), kind="stable")[:rank]
    rng = np.random.default_rng(seed)
    starts = []
    for number in range(count):
        a = rng.standard_normal((rank, inputs)) / inputs**0.5
        b = rng.standard_normal((rank, taps)) / taps**0.5
        if number % 2 == 0:
            share = 0.3 if number else 0.0
            a[: len(chosen)] = right.reshape(-1, inputs)[chosen] + share * a[: len(chosen)]
            b[: len(chosen)] = vectors[chosen // values.shape[1]] + share * b[: len(chosen)]
        starts.append((a, b))
    return starts


def _joined(a: Floats, b: Floats) -> Floats:
    return np.concatenate([a.ravel(), b.ravel()])


def _parted(joined: Floats, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    rank, inputs = shape
    return joined[: rank * inputs].reshape(rank, -1), joined[rank * inputs :].reshape(rank, -1)


def _products(a: Floats, b: Floats) -> Floats:
    """Row by row, all of a [r, A] with all of b [r, B]: [r, AB]."""
    return np.asarray((a[:, :, None] * b[:, None, :]).reshape(len(a), -1))


def _solved(gram: Floats, right: Floats, force: float) -> Floats:
    """x [r, n] of (G + force diag G) x = right, with a trace more where G is singular."""
    diagonal = np.diag(gram)
    trace = 1e-15
    while True:
        matrix = gram.copy()
        matrix[np.diag_indices_from(matrix)] += force * diagonal + trace * diagonal.max() + _TINY
        _, found, info = lapack.dposv(matrix, right)
        if info == 0 or trace > 1:
            return np.asarray(found)
        trace *= 100


def _balanced(a: Floats, b: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
    """Rank-one terms with parts of one length."""
    sizes = [np.linalg.norm(factor, axis=1) for factor in (a, b, c)]
    each = np.cbrt(sizes[0] * sizes[1] * sizes[2])
    scale = [each / np.maximum(size, _TINY) for size in sizes]
    return a * scale[0][:, None], b * scale[1][:, None], c * scale[2][:, None]


# -- against a Gram matrix ------------------------------------------------------------------------


def _refined(
    read: Reading, factors: tuple[Floats, Floats, Floats], force: float
) -> tuple[Floats, Floats, Floats]:
    """Factors [r, A], [r, B], [M, r] after some sweeps against the Gram matrix itself.

    No sweep makes larger what is lost and the squares of terms, as the Gram matrix weighs them.
    """
    first, middle, last = factors
    budget, cross = _REFINED, read.cross.reshape(len(last), -1)
    start = _joined(first, middle)
    end, path = start, _Path()
    values: list[float] = []
    while budget > 0:
        a, b = _parted(start, first.shape)
        products = _products(a, b)
        seen = read.times(products.reshape(-1, *read.weights.shape[1:])).reshape(products.shape)
        inner, right = products @ seen.T, products @ cross.T
        found = _solved(0.5 * (inner + inner.T), right, force).T
        budget -= read.flops * len(first)
        value = read.energy - float(np.sum(found.T * right))  # with the squares of terms
        if values and value > values[-1] and start is not end:
            start, path = end, _Path()
            continue
        if values and value > values[-1]:
            break
        values.append(value)
        first, middle, last = a, b, found
        if len(values) > _WINDOW and values[-1 - _WINDOW] - value < _GAIN * value:
            break
        budget -= read.flops * len(first) * 2 * (_STEPS + 1)
        if budget > 0:
            end = _joined(*_moved(read, a, b, found, force))
            start = path.next(start, end)
    return first, middle, last


def _moved(
    read: Reading, first: Floats, middle: Floats, last: Floats, force: float
) -> tuple[Floats, Floats]:
    """Better first and middle factors, each by conjugate gradients from what it was."""
    lasts = last.T @ last
    lasts[np.diag_indices_from(lasts)] *= 1 + force
    target = np.tensordot(last.T, read.cross, axes=1)

    def image(products: Floats) -> Floats:
        seen = read.times(products)
        return np.asarray((lasts @ seen.reshape(len(seen), -1)).reshape(seen.shape))

    left = inverse(lasts * (middle @ read.taps @ middle.T))
    right = inverse(read.inputs)
    first = descended(
        first,
        np.einsum("rab,rb->ra", target, middle),
        lambda x: np.einsum("rab,rb->ra", image(x[:, :, None] * middle[:, None, :]), middle),
        lambda x: left @ x @ right,
        _STEPS,
    )
    left = inverse(lasts * (first @ read.inputs @ first.T))
    right = inverse(read.taps)
    middle = descended(
        middle,
        np.einsum("rab,ra->rb", target, first),
        lambda x: np.einsum("rab,ra->rb", image(first[:, :, None] * x[:, None, :]), first),
        lambda x: left @ x @ right,
        _STEPS,
    )
    return first, middle
