"""Convolution kernels as products of smaller ones, weighed by data: spatial and Tucker.

Each is weighed by `gram` [K, K] = X^T X of the patches X that the convolution reads (`unfold`: K
columns, channel by channel), or by nothing where that is None. They begin with the singular vectors
of the kernel, as if channels and taps were correlated each by themselves; then what comes after the
first factor is solved exactly, and the first one improved, in turn, against the Gram matrix itself.
No sweep makes the weighed error larger; `work` bounds them all, in floating-point operations.
Ranks beyond those that lose nothing are cut to these.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from graphopt.kernels.cp import CP, Cp, cp
from graphopt.kernels.lowrank import regression, spectrum
from graphopt.kernels.reading import Reading, leading, reading

__all__ = ["CP", "SPATIAL", "TUCKER", "Cp", "cp", "spatial", "tucker"]

Array = NDArray[Any]
Floats = NDArray[np.float64]

SPATIAL: Final = "rci,mrj->mcij"
TUCKER: Final = "qc,pqt,mp->mct"

WORK: Final = 4e10  # flops that improving one kernel, and orthogonal iteration, may take
_STEPS: Final = 4  # of conjugate gradients in each
_PROGRESS: Final = 2e-3  # of what is lost: less is the end
_TURNS: Final = 60  # of orthogonal iteration
_CONVERGED: Final = 1e-5  # of what it leaves
_STARTS: Final = 2
_LARGE: Final = 1 << 17  # weights: so many and more get one start


def spatial(weights: Array, gram: Array | None, rank: int, *, work: float = WORK) -> list[Floats]:
    """A column, then a row: [r, C, h] and [M, r, w] near weights [M, C, h, w].

    After Jaderberg et al. (2014); weighed by `gram` [K, K] of the patches that are read, K = C h w.
    """
    w = np.asarray(weights, np.float64)
    outputs, channels, height, width = w.shape
    read = reading(w.reshape(outputs, channels * height, width), gram)
    rank = min(rank, channels * height, outputs * width)
    white, back, _ = read.white()
    unfolded = white.transpose(1, 0, 2).reshape(channels * height, -1)
    first, last, _ = _improved(read, leading(unfolded, rank).T @ back, outputs, work)
    first, last = _even(first, last)
    return [first.reshape(rank, channels, height), last]


def tucker(
    weights: Array, gram: Array | None, ranks: tuple[int, int], *, work: float = WORK
) -> list[Floats]:
    """[q, C], [p, q, *kernel] and [M, p] near weights [M, C, *kernel], for ranks (p, q).

    Kim et al. (2016); begun by higher-order orthogonal iteration (De Lathauwer et al., 2000).
    """
    w = np.asarray(weights, np.float64)
    read = reading(w.reshape(*w.shape[:2], -1), gram)
    outputs, inputs, taps = read.weights.shape
    q = min(ranks[1], inputs)
    p = min(ranks[0], outputs, q * taps)
    q = min(q, p * taps)
    white, back, _ = read.white()
    begun = _orthogonal_iteration(white, p, q, work)
    first, core, last = _improved(read, begun.T @ back, p, work)
    first, core = _even(first, core)
    return [first, core.reshape(p, q, *w.shape[2:]), last]


# -- a first factor and all that comes after ---------------------------------------------------


def _improved(read: Reading, first: Floats, p: int, work: float) -> tuple[Floats, Floats, Floats]:
    """F [q, A], a core [p, q, B] and [M, p], which is the identity where p is M."""
    core, last, lost = _rest(read, first, p)
    if read.gram is None:
        return first, core, last  # it began with the optimum
    rows = min(p, core[0].size)
    budget = work
    while budget > 0:
        steps = max(min(int(budget / (read.flops * rows)) - 1, _STEPS), 1)
        budget -= read.flops * (len(first) + (steps + 1) * rows)
        moved = read.moved(first, core, None if p == len(last) else last, steps)
        *rest, now = _rest(read, moved, p)
        if not now < lost:
            break
        progress, lost, first, (core, last) = lost - now, now, moved, rest
        if progress <= _PROGRESS * lost:
            break
    return first, core, last


def _rest(read: Reading, first: Floats, p: int) -> tuple[Floats, Floats, float]:
    """The best core [p, q, B] and [M, p] for F, and what is lost then."""
    gram, cross = read.seen(first)
    outputs, (q, taps) = len(cross), gram.shape[:2]
    inner, outer = gram.reshape(q * taps, -1), cross.reshape(outputs, -1)
    free = regression(inner, outer.T)
    if p == outputs:
        lost = read.energy - float(np.sum(free * outer))
        return free.reshape(outputs, q, taps), np.eye(outputs), lost
    found = spectrum(free, inner)
    last, core = found.factors(p)
    return core.reshape(-1, q, taps), last, read.energy - float(found.values[:p].sum())


def _even(first: Floats, core: Floats) -> tuple[Floats, Floats]:
    """F [q, A] and what reads it, [p, q, B], each feature with parts of one size in both."""
    sizes = np.linalg.norm(first, axis=1), np.linalg.norm(core, axis=(0, 2))
    some = (sizes[0] > 0) & (sizes[1] > 0)
    scale = np.sqrt(np.divide(sizes[1], sizes[0], out=np.ones(len(first)), where=some))
    return first * scale[:, None], core / scale[:, None]


def _orthogonal_iteration(tensor: Floats, p: int, q: int, work: float) -> Floats:
    """V [A, q] that, with the best U [M, p], keeps most of a tensor [M, A, B].

    From the singular vectors and, of small tensors, from random ones as well.
    """
    outputs, inputs, _ = tensor.shape
    rng = np.random.default_rng(0)
    starts = [leading(tensor.transpose(1, 0, 2).reshape(inputs, -1), q)]
    starts += [
        scipy.linalg.qr(rng.standard_normal((inputs, q)), mode="economic")[0]
        for _ in range(_STARTS if tensor.size < _LARGE else 0)
    ]
    flops = 4.0 * tensor.size * (p + q) + 20.0 * (outputs**3 + inputs**3)
    turns = max(min(int(work / flops), _TURNS), 2)
    whole = float(np.sum(np.square(tensor)))
    best, most = starts[0], -1.0
    for v in starts:
        before = 0.0
        for _ in range(turns):
            u = leading(np.matmul(v.T, tensor).reshape(outputs, -1), p)
            small = np.tensordot(u.T, tensor, axes=1).transpose(1, 0, 2).reshape(inputs, -1)
            v = leading(small, q)
            kept = float(np.sum(np.square(v.T @ small)))
            if kept - before <= _CONVERGED * (whole - kept):
                break
            before = kept
        if kept > most:
            best, most = v, kept
    return best
