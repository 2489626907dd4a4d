"""Which weights stay: masks, True where one does, from scores of which larger is more important."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]


def largest(scores: Sequence[Array], sparsity: float) -> list[Mask]:
    """Of all scores together the largest stay: a share of `sparsity` goes, rounded down.

    Equal scores go in order, so that the share holds whatever they are.
    """
    every = np.concatenate([np.ravel(s) for s in scores])
    gone = int(sparsity * every.size + 1e-9)
    keep = np.ones(every.size, np.bool_)
    keep[np.argsort(every, kind="stable")[:gone]] = False
    ends = np.cumsum([np.size(s) for s in scores])
    parts = np.split(keep, ends[:-1])
    return [part.reshape(np.shape(s)) for part, s in zip(parts, scores, strict=True)]


def n_of_m(scores: Array, n: int, m: int) -> Mask:
    """The n largest of every m neighbours along the last axis stay.

    Where m does not divide the axis, the rest at its end stays whole. Raises ValueError unless
    0 < n < m.
    """
    if not 0 < n < m:
        raise ValueError(f"{n}:{m}: it is some, but not all, of each group")
    whole = scores.shape[-1] // m * m
    keep = np.ones(scores.shape, np.bool_)
    groups = scores[..., :whole].reshape(*scores.shape[:-1], -1, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    chosen = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(chosen, order[..., :n], True, axis=-1)
    keep[..., :whole] = chosen.reshape(*scores.shape[:-1], whole)
    return keep


def block_means(scores: Array, rows: int, columns: int) -> Array:
    """The root mean square of the scores [M, K] of each block, [ceil(M / rows), ceil(K / columns)].

    Blocks at the end may be smaller; their mean is over what they have.
    """
    at = np.arange(0, scores.shape[0], rows), np.arange(0, scores.shape[1], columns)
    sums = np.add.reduceat(np.add.reduceat(np.square(scores), at[0], axis=0), at[1], axis=1)
    counts = np.diff([*at[0], scores.shape[0]])[:, None] * np.diff([*at[1], scores.shape[1]])
    return np.asarray(np.sqrt(sums / counts))


def spread_blocks(keep: Mask, shape: tuple[int, int], rows: int, columns: int) -> Mask:
    """A mask of blocks as one of weights [M, K]."""
    wide = np.repeat(np.repeat(keep, rows, axis=0), columns, axis=1)
    return np.ascontiguousarray(wide[: shape[0], : shape[1]])
