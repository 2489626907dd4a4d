"""Choices that outputs stand for: the class with the largest score, the side of one half.

What an output is shows in the original's values, over all feeds: rows that sum to one, or whose
exponentials do, are probabilities of classes (last axis, else axis 1); other values that all lie
between 0 and 1 are probabilities of something being so; any other matrix of rows of more than two
numbers holds scores of classes, unless the rows have length one, as embeddings have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]

_TIE: Final = 1e-3  # of the spread of a row: choices closer than this are no choices
_SUM: Final = 1e-3  # how far the sum of probabilities may be from one


@dataclass
class Tally:
    """Equal choices among those compared, feed by feed."""

    equal: int = 0
    n: int = 0
    excluded: int = 0
    loss: float = 0.0
    """Sum over all choices of what the original's own probabilities say that they lose."""
    feeds: list[tuple[int, int]] = field(default_factory=list)

    def add(self, equal: int, n: int, excluded: int = 0, loss: float = 0.0) -> None:
        """Count the choices of one feed."""
        self.equal += equal
        self.n += n
        self.excluded += excluded
        self.loss += loss
        if n:
            self.feeds.append((equal, n))

    @property
    def share(self) -> float:
        """Equal choices over all compared."""
        return self.equal / self.n

    @property
    def expected_drop(self) -> float:
        """Accuracy that is lost, if the original's probabilities are what they say."""
        total = self.n + self.excluded
        return self.loss / total if total else 0.0

    @property
    def standard_error(self) -> float:
        """Of the share: from feeds as clusters, at least that of independent choices."""
        prior = (self.equal + 1) / (self.n + 2)
        independent = math.sqrt(prior * (1 - prior) / (self.n + 3))
        if len(self.feeds) < 2:
            return independent
        spread = sum((equal - self.share * n) ** 2 for equal, n in self.feeds)
        clustered = math.sqrt(spread * len(self.feeds) / (len(self.feeds) - 1)) / self.n
        return max(independent, clustered)


class Choices:
    """The choices of one output, counted in every way that its values still allow.

    `margin` is the original's own noise; `classes` states the axis of classes by output, None for
    one whose largest number means nothing, unless the values are probabilities.
    """

    def __init__(
        self, margin: float = 0.0, classes: Mapping[str, int | None] | None = None, name: str = ""
    ) -> None:
        self._margin = margin
        self._is_stated = classes is not None and name in classes
        self._axis = (classes or {}).get(name)
        self._tallies: dict[str, Tally] = {}
        self._possible: set[str] | None = None

    def add(self, original: Reals, candidate: Reals) -> None:
        """Count one feed's choices; both are of one shape, and finite."""
        if not original.size:
            return
        ways = self._ways(original)
        self._possible = set(ways) if self._possible is None else self._possible & set(ways)
        for way, axis in ways.items():
            if way in self._possible:
                tally = self._tallies.setdefault(way, Tally())
                if axis is None:
                    counts = _same_sides(original, candidate, max(self._margin, _TIE))
                    tally.add(*counts, float(_side_losses(original, candidate).sum()))
                else:
                    counts = _same_classes(original, candidate, axis, self._margin)
                    tally.add(*counts, float(_class_losses(original, candidate, axis).sum()))

    @property
    def result(self) -> tuple[Literal["classes", "binary"], Tally] | None:
        """What the output chooses, by the most telling way that held for every feed."""
        order = ("stated", "last", "second", "binary", "scores")
        way = next((way for way in order if way in (self._possible or ())), None)
        if way is None:
            return None
        return "binary" if way == "binary" else "classes", self._tallies[way]

    def _ways(self, x: Reals) -> dict[str, int | None]:
        """How the values may be choices: the way to the axis of classes."""
        if self._is_stated and self._axis is not None:
            return {"stated": self._axis} if -x.ndim <= self._axis < x.ndim else {}
        ways: dict[str, int | None] = {}
        if x.ndim and _are_distributions(x, -1):
            ways["last"] = -1
        if x.ndim > 2 and _are_distributions(x, 1):
            ways["second"] = 1
        if x.min() >= 0 and x.max() <= 1:
            ways["binary"] = None
        if x.ndim == 2 and x.shape[1] > 2 and not (self._is_stated or _have_length_one(x)):
            ways["scores"] = -1
        return ways


def _are_distributions(x: Reals, axis: int) -> bool:
    if x.shape[axis] <= 2:
        return False
    if x.min() >= 0:
        return bool(np.all(np.abs(x.sum(axis) - 1) <= _SUM))
    if x.max() <= _SUM:  # logarithms
        return bool(np.all(np.abs(np.exp(x).sum(axis) - 1) <= _SUM))
    return False


def _have_length_one(x: Reals) -> bool:
    return bool(np.all(np.abs(np.sqrt((x * x).sum(-1)) - 1) <= _SUM))


def _same_classes(
    original: Reals, candidate: Reals, axis: int, margin: float
) -> tuple[int, int, int]:
    a = np.moveaxis(original, axis, -1).reshape(-1, original.shape[axis])
    b = np.moveaxis(candidate, axis, -1).reshape(-1, candidate.shape[axis])
    if a.shape[1] < 2:
        return 0, 0, 0
    top = np.partition(a, -2, axis=-1)
    spread = top[:, -1] - a.min(-1)
    clear = top[:, -1] - top[:, -2] > np.maximum(margin, _TIE * spread)
    equal = a.argmax(-1) == b.argmax(-1)
    n = int(np.count_nonzero(clear))
    return int(np.count_nonzero(equal & clear)), n, len(a) - n


def _same_sides(original: Reals, candidate: Reals, margin: float) -> tuple[int, int, int]:
    clear = np.abs(original - 0.5) > margin
    equal = (original > 0.5) == (candidate > 0.5)
    n = int(np.count_nonzero(clear))
    return int(np.count_nonzero(equal & clear)), n, original.size - n


def _class_losses(original: Reals, candidate: Reals, axis: int) -> Reals:
    """For each row, the original's probability of its own choice less that of the candidate's."""
    a = np.moveaxis(original, axis, -1).reshape(-1, original.shape[axis])
    b = np.moveaxis(candidate, axis, -1).reshape(-1, candidate.shape[axis])
    if a.shape[1] < 2:
        return np.zeros(0)
    if not _are_distributions(a, -1) or a.max() <= 0:  # scores, or logarithms
        powers = np.exp(a - a.max(-1, keepdims=True))
        a = powers / powers.sum(-1, keepdims=True)
    rows = np.arange(len(a))
    return np.asarray(a[rows, a.argmax(-1)] - a[rows, b.argmax(-1)])


def _side_losses(original: Reals, candidate: Reals) -> Reals:
    flipped = (original > 0.5) != (candidate > 0.5)
    return np.where(flipped, np.abs(2 * original - 1), 0.0)
