"""A metric of the user's: `file.py:function`, which scores a model by running it.

The function takes `run`, which maps a feed to the model's outputs by name, and returns a number,
larger is better. Where it returns a vector instead, one score per sample, the mean counts and two
models are compared sample by sample. A function that returns a number may have an attribute
`per_sample`, a function of the same kind that returns the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.data import load_module
from graphopt.errors import GraphoptError, UsageError
from graphopt.runtime import Feed

Run = Callable[[Feed], Mapping[str, Any]]

_RESAMPLES: Final = 10_000
_CHUNK: Final = 1 << 22  # indices that are drawn at a time


@dataclass(frozen=True)
class Score:
    """What a metric says of a model; `samples` is float64 [n], or None where it gives a total."""

    value: float
    samples: NDArray[np.float64] | None = None

    @property
    def standard_error(self) -> float | None:
        """Of the mean over samples; None without at least two."""
        if self.samples is None or self.samples.size < 2:
            return None
        return float(self.samples.std(ddof=1) / np.sqrt(self.samples.size))


@dataclass(frozen=True)
class Difference:
    """A candidate's score less the original's, with its interval where samples are known."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Metric:
    """A loaded metric; called with `run` it gives a Score, or raises UsageError."""

    def __init__(self, spec: str, function: Callable[[Run], Any]) -> None:
        self.spec = spec
        self._function = function

    def __call__(self, run: Run) -> Score:
        per_sample = getattr(self._function, "per_sample", None)
        try:
            result = (per_sample or self._function)(run)
        except GraphoptError as error:  # of the run, not of the metric
            raise UsageError(f"metric {self.spec}: {error}") from error
        except Exception as error:  # the user's own code: whatever it raises is the answer
            raise UsageError(f"metric {self.spec}: {_said(error)}") from error
        return self._score(result, must_be_vector=per_sample is not None)

    def _score(self, result: Any, *, must_be_vector: bool) -> Score:
        try:
            if result is None:  # numpy takes it for NaN
                raise TypeError
            array = np.asarray(result, np.float64)
        except (TypeError, ValueError):
            kind = type(result).__name__
            raise UsageError(f"metric {self.spec}: it returns {kind}, not a number") from None
        if array.ndim > 1 or (must_be_vector and array.ndim != 1) or not array.size:
            wanted = "one score per sample" if must_be_vector else "a number"
            shape = list(array.shape)
            raise UsageError(f"metric {self.spec}: it returns an array of {shape}, not {wanted}")
        if not np.isfinite(array).all():
            raise UsageError(f"metric {self.spec}: it returns {_not_finite(array)}, not a number")
        return Score(float(array.mean()), array if array.ndim else None)


def load_metric(spec: str) -> Metric:
    """The metric that `file.py:function` or `module:function` names. Raises UsageError."""
    module_name, colon, name = spec.rpartition(":")
    if not colon or not module_name or not name:
        raise UsageError(f"metric {spec}: write it as file.py:function")
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise UsageError(f"metric {spec}: no such file: {module_name}")
    try:
        module = load_module(module_name)
    except Exception as error:  # the user's own code: whatever it raises is the answer
        raise UsageError(f"metric {spec}: {_said(error)}") from error
    function = getattr(module, name, None)
    if function is None:
        raise UsageError(f"metric {spec}: there is no {name} in {module_name}")
    if not callable(function):
        raise UsageError(f"metric {spec}: {name} is no function")
    return Metric(spec, function)


def difference(
    original: Score, candidate: Score, *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """How much better the candidate scores; the paired bootstrap interval where samples are known.

    Percentiles of the mean difference over resampled samples (Efron and Tibshirani, An
    Introduction to the Bootstrap, chapter 13). Without samples of both, or with numbers of them
    that differ, there is no interval.
    """
    value = candidate.value - original.value
    a, b = original.samples, candidate.samples
    if a is None or b is None or a.size != b.size:
        return Difference(value)
    paired = b - a
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // paired.size)
    means = np.concatenate(
        [
            paired[rng.integers(0, paired.size, (min(rows, _RESAMPLES - start), paired.size))].mean(
                1
            )
            for start in range(0, _RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(value, float(low), float(high), paired.size)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _not_finite(array: NDArray[np.float64]) -> str:
    return str(array[~np.isfinite(array)].ravel()[0])
