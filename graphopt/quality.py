"""How close a candidate comes to its original on data, output by output.

A lossy candidate is not equal to its original, so that the question is how often and how far it
differs: signal to noise of real numbers, agreement of choices. All sums are streamed; one feed's
outputs are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.choices import Choices, Tally
from graphopt.concordance import Concordance
from graphopt.errors import UsageError
from graphopt.judge import flatten
from graphopt.runtime import Feed

Run = Callable[[Feed], Mapping[str, Any]]
"""Runs a model on a feed and returns its outputs by name, as `Session.run` does."""

Kind = Literal["classes", "binary", "integers", "real", "empty"]


@dataclass(frozen=True)
class Agreement:
    """A share of equal choices: over `n` choices, with its standard error.

    Where feeds differ in their shares they are what the error is computed from (ratio estimator
    over clusters: Cochran, Sampling Techniques, 3rd ed., section 6.4); it is at least that of `n`
    independent choices under a uniform prior, so that a share of 1 is not beyond doubt.
    """

    share: float
    standard_error: float
    n: int
    excluded: int = 0
    """Near-ties: choices that the original might have made otherwise."""
    expected_drop: float = 0.0
    """Accuracy lost, if the original's probabilities are what they say: the mean, over all choices,
    of its probability of its own choice less that of the candidate's."""


@dataclass(frozen=True)
class OutputQuality:
    """One output of the candidate against the original's.

    `kind` is what the values are, and so what `choice` compares: the classes with the largest
    score, the sides of one half, integers (strings, booleans); None for real numbers. `signal` is
    the variance of the original over all elements of all feeds (its mean square where it is
    constant), `noise` the mean squared difference, and `sqnr_db` the one against the other
    (infinite where nothing differs, None without real numbers), with the standard error that
    follows from how feeds differ (None of a single feed). `mismatched` counts feeds on which the
    shapes differ, which enter nothing else; `broken` counts elements that are NaN or infinite in
    one of the two only.
    """

    name: str
    kind: Kind
    n: int
    feeds: int
    signal: float
    noise: float
    sqnr_db: float | None
    sqnr_standard_error: float | None
    correlation: float | None
    choice: Agreement | None
    concordance: float | None = None
    mismatched: int = 0
    broken: int = 0

    @property
    def agreement(self) -> float:
        """Between 0 and 1: of choices, what is not lost; of real numbers, the concordance.

        A choice that differs counts by how sure the original was of its own; whole numbers count
        where they are equal. Feeds with outputs of another shape agree in nothing.
        """
        if self.kind == "empty" or self.feeds == self.mismatched:
            return 0.0 if self.mismatched else 1.0
        if self.broken:
            return 0.0
        if self.choice is not None:
            is_sure = self.kind == "integers"
            share = self.choice.share if is_sure else 1.0 - self.choice.expected_drop
        elif self.noise == 0:
            share = 1.0
        else:
            share = max(0.0, self.concordance or 0.0)
        return share * (self.feeds - self.mismatched) / self.feeds


@dataclass(frozen=True)
class Quality:
    """All outputs, in the original's order."""

    outputs: tuple[OutputQuality, ...]
    feeds: int

    @property
    def agreement(self) -> float:
        """That of the output that agrees least."""
        return min((output.agreement for output in self.outputs), default=1.0)

    @property
    def drop(self) -> float:
        """1 - agreement."""
        return 1.0 - self.agreement

    @property
    def noise(self) -> float:
        """1 - the least concordance of the outputs: small noises of several causes add up."""
        known = [o.concordance for o in self.outputs if o.concordance is not None]
        return 1.0 - min(known, default=1.0)

    @property
    def sqnr_db(self) -> float | None:
        """The lowest of all outputs; None where none is a real number."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=None)


def agreement(quality: Quality) -> float:
    """Between 0 and 1: how far a candidate agrees with its original, on its worst output."""
    return quality.agreement


def compare(
    original: Run,
    candidate: Run,
    feeds: Iterable[Feed],
    *,
    margins: Mapping[str, float] | None = None,
    classes: Mapping[str, int | None] | None = None,
) -> Quality:
    """Run both on every feed and compare their outputs.

    `margins` is the original's own noise by output (absolute): choices that are closer are
    excluded, as those within a thousandth of the spread of their row are. `classes` names the
    axis along which an output chooses among classes, None for one whose largest number means
    nothing unless the values are probabilities; without it the values tell (see
    `graphopt.choices`). Raises UsageError if there are no feeds, or the candidate lacks
    an output; what the runs raise passes through.
    """
    states: dict[str, _State] = {}
    count = 0
    for feed in feeds:
        expected, found = original(feed), candidate(feed)
        count += 1
        for name, value in expected.items():
            if name not in found:
                raise UsageError(f"the candidate does not compute the output {name!r}")
            if name not in states:
                choices = Choices((margins or {}).get(name, 0.0), classes, name)
                states[name] = _State(name, choices)
            states[name].add(flatten(value), flatten(found[name]))
    if not count:
        raise UsageError("there are no feeds to compare original and candidate on")
    return Quality(tuple(state.finish() for state in states.values()), count)


class _State:
    """Streamed sums of one output."""

    def __init__(self, name: str, choices: Choices) -> None:
        self._name = name
        self._choices = choices
        self._integers = Tally()
        self._moments = _Moments()
        self._concordance = Concordance()
        self._noises: list[tuple[float, int]] = []  # of each feed: sum of squares, elements
        self._feeds = self._mismatched = self._broken = self._elements = 0
        self._is_real = False

    def add(self, original: list[NDArray[Any]], candidate: list[NDArray[Any]]) -> None:
        self._feeds += 1
        if [a.shape for a in original] != [b.shape for b in candidate]:
            self._mismatched += 1
            return
        equal = compared = 0
        for a, b in zip(original, candidate, strict=True):
            self._elements += a.size
            if a.dtype.kind in "biuOSU":
                equal += int(np.count_nonzero(a == b))
                compared += a.size
            else:
                self._add_real(a, b)
        self._integers.add(equal, compared)

    def _add_real(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        self._is_real = True
        a, b = _real(a), _real(b)
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
            self._broken += int(np.count_nonzero(~same))
        else:
            self._choices.add(a, b)
            self._concordance.add(a, b)
        x, y = (a[finite], b[finite]) if not finite.all() else (a.ravel(), b.ravel())
        if x.size:
            self._moments.add(x, y)
            difference = x - y
            self._noises.append((float(np.dot(difference, difference)), x.size))

    def finish(self) -> OutputQuality:
        kind, choice = self._kind()
        moments, elements = self._moments, sum(n for _, n in self._noises)
        noise = sum(total for total, _ in self._noises) / elements if elements else 0.0
        return OutputQuality(
            name=self._name,
            kind=kind,
            n=self._elements,
            feeds=self._feeds,
            signal=moments.signal,
            noise=noise,
            sqnr_db=decibels(moments.signal, noise) if self._is_real and elements else None,
            sqnr_standard_error=_decibel_error(self._noises),
            correlation=moments.correlation if self._is_real else None,
            choice=choice,
            concordance=self._concordance.result,
            mismatched=self._mismatched,
            broken=self._broken,
        )

    def _kind(self) -> tuple[Kind, Agreement | None]:
        if not self._elements:
            return "empty", None
        if not self._is_real:
            return "integers", _agreement(self._integers)
        if (found := self._choices.result) is None:
            return "real", None
        return found[0], _agreement(found[1])


class _Moments:
    """Means, variances and covariance of pairs, merged chunk by chunk (Chan et al., 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self.xx = self.yy = self.xy = 0.0  # sums of squared deviations from the mean
        self._x = self._y = 0.0

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        n, mean_x, mean_y = x.size, float(x.mean()), float(y.mean())
        dx, dy = x - mean_x, y - mean_y
        total = self.n + n
        weight = self.n * n / total
        step_x, step_y = mean_x - self._x, mean_y - self._y
        self.xx += float(np.dot(dx, dx)) + step_x * step_x * weight
        self.yy += float(np.dot(dy, dy)) + step_y * step_y * weight
        self.xy += float(np.dot(dx, dy)) + step_x * step_y * weight
        self._x += step_x * n / total
        self._y += step_y * n / total
        self.n = total

    @property
    def signal(self) -> float:
        """The variance of x, its mean square where it does not vary."""
        return self.xx / self.n if self.xx > 0 else self._x * self._x

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where one of the two does not vary."""
        scale = math.sqrt(self.xx) * math.sqrt(self.yy)
        return max(-1.0, min(1.0, self.xy / scale)) if scale > 0 else None


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _decibel_error(noises: list[tuple[float, int]]) -> float | None:
    """Standard error of the noise in dB, from feeds (delta method on the ratio estimator).

    None where there is no noise, or but one feed.
    """
    total, elements = sum(t for t, _ in noises), sum(n for _, n in noises)
    if len(noises) < 2 or total == 0:
        return None
    mean = total / elements
    spread = sum((t - mean * n) ** 2 for t, n in noises)
    error = math.sqrt(spread * len(noises) / (len(noises) - 1)) / elements
    return 10 / math.log(10) * error / mean


def _agreement(tally: Tally) -> Agreement | None:
    if not tally.n:
        return None
    drop = tally.expected_drop
    return Agreement(tally.share, tally.standard_error, tally.n, tally.excluded, drop)


def _real(array: NDArray[Any]) -> NDArray[np.float64]:
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], -1).astype(np.float64)
    return array.astype(np.float64)
