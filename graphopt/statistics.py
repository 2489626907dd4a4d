"""The one store of what calibration data tells: int8, pruning and low rank share it.

Each pass names the observers it needs, one `sweep` feeds them all, in memory bounded by one feed
whatever their number. A value's name never changes meaning, so what was gathered on a model holds
for every rewrite of it that keeps the name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from graphopt import observers
from graphopt.errors import DataError, UsageError
from graphopt.exposed import Exposure, write_exposed
from graphopt.ir import Model
from graphopt.kernels.moments import Gram, Moments, Regression
from graphopt.kernels.ranges import Histogram, MovingAverage
from graphopt.observers import Maximum, NonZero, Observer, Patches, State
from graphopt.output import Target, output_errors
from graphopt.runtime import Array, Feed

__all__ = ["BUDGET", "Observer", "Patches", "Shapes", "Statistics", "sweep"]

logger = logging.getLogger(__name__)

BUDGET: Final = 512 << 20  # bytes of one feed's exposed values that are held at a time
_FORMAT: Final = 1
_DAMAGE: Final = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile)
_Kind = TypeVar("_Kind", Histogram, MovingAverage, Moments, Maximum, NonZero)


class Shapes(NamedTuple):
    """The shapes that a value took: that on the first feed, and whether all were like it."""

    first: tuple[int, ...]
    equal: bool


class Statistics:
    """What observers have seen of a model's values.

    `feeds` is the number of feeds. `unseen` says of every value that could not be observed, or not
    by all that wanted it, why. `nonfinite` counts NaN and infinities by value, where there were
    any. Constants were observed once, whatever the number of feeds.
    """

    def __init__(self, wanted: Iterable[Observer] = ()) -> None:
        self.feeds = 0
        self.unseen: dict[str, str] = {}
        self.nonfinite: dict[str, int] = {}
        self._shapes: dict[str, Shapes] = {}
        self._wanted: dict[str, dict[Observer, None]] = {}
        for observer in wanted:
            self._wanted.setdefault(observer.value, {})[observer] = None
        # from the first array on: only then is the number of channels known
        self._states: dict[Observer, list[State]] = {}
        self._dropped: dict[Observer, str] = {}

    @property
    def values(self) -> list[str]:
        """The values of which anything was wanted."""
        return list(self._wanted)

    @property
    def observers(self) -> list[Observer]:
        """All that was wanted, whether anything was seen or not."""
        return [observer for wanted in self._wanted.values() for observer in wanted]

    def __contains__(self, observer: Observer) -> bool:
        """True where the observer has seen something: only then is there an answer."""
        return observer in self._states

    # -- answers: LookupError for what was not asked for, or not seen ----------------------------

    def histogram(self, value: str) -> Histogram:
        """The histogram of a value."""
        return self._one(Observer(value, "histogram"), Histogram)

    def moving_average(self, value: str) -> MovingAverage:
        """The moving average of a value's extremes."""
        return self._one(Observer(value, "moving-average"), MovingAverage)

    def moments(self, value: str, axis: int) -> Moments:
        """Count, mean and variance of each channel along an axis."""
        return self._one(Observer(value, "moments", axis), Moments)

    def maximum(self, value: str, axis: int) -> Array:
        """The largest magnitude of each channel along an axis, float64 [channels]."""
        return self._one(Observer(value, "maximum", axis), Maximum).values

    def gram(self, value: str, rows: int | Patches) -> Gram:
        """The Gram matrix, with bias, of rows along an axis or of a convolution of one group."""
        (found,) = self.grams(value, rows)
        return found

    def grams(self, value: str, rows: int | Patches) -> list[Gram]:
        """As `gram`: one matrix for each group of the convolution."""
        if isinstance(rows, Patches):
            observer = Observer(value, "gram", patches=rows)
        else:
            observer = Observer(value, "gram", rows)
        return [state for state in self._found(observer) if isinstance(state, Gram)]

    def nonzero(self, value: str, axis: int) -> Array:
        """The share of positions at which each channel is not zero, float64 [channels]."""
        return self._one(Observer(value, "nonzero", axis), NonZero).share

    def regressions(self, observer: Observer) -> list[Regression]:
        """Of rows on their targets: one for each group of a convolution."""
        return [state for state in self._found(observer) if isinstance(state, Regression)]

    def has_shape(self, value: str) -> bool:
        """True where the value was seen at all."""
        return value in self._shapes

    def shape(self, value: str) -> Shapes:
        """The shapes that a value took."""
        if value not in self._shapes:
            raise LookupError(f"the shape of {value!r} is not known: {self._reason(value)}")
        return self._shapes[value]

    def _one(self, observer: Observer, kind: type[_Kind]) -> _Kind:
        (state,) = self._found(observer)
        assert isinstance(state, kind)
        return state

    def _found(self, observer: Observer) -> list[State]:
        if observer in self._states:
            return self._states[observer]
        value = observer.value
        asked = observer in self._wanted.get(value, ())
        reason = self._dropped.get(observer) or self._reason(value)
        raise LookupError(
            f"no {observer.kind} of {value!r}: {reason if asked else 'not asked for'}"
        )

    def _reason(self, value: str) -> str:
        if value not in self._wanted:
            return "not asked for"
        return self.unseen.get(value, "there was no finite number in it")

    # -- gathering -------------------------------------------------------------------------------

    def observe(self, value: str, x: Array) -> None:
        """Take in what a value is on one feed: numbers of any shape and type."""
        if x.dtype not in (np.float32, np.float64):
            x = x.astype(np.float64 if x.dtype.kind in "iub" else np.float32)
        first, equal = self._shapes.get(value, (x.shape, True))
        self._shapes[value] = Shapes(first, equal and x.shape == first)
        if not x.size:
            return
        finite = int(np.count_nonzero(np.isfinite(x)))
        if finite < x.size:
            self.nonfinite[value] = self.nonfinite.get(value, 0) + x.size - finite
        if not finite:
            return
        for observer in self._wanted.get(value, ()):
            if observer in self._dropped:
                continue
            if reason := observer.misfit(x.shape, first):
                self._drop(observer, reason)
                continue
            if observer not in self._states:
                self._states[observer] = observers.new_states(observer, x.shape)
            observers.observe(observer, self._states[observer], x, finite=finite == x.size)

    def regress(self, observer: Observer, x: Array, y: Array, every: int = 1) -> None:
        """Take in what a value and its target are on one feed: a "regression" needs both.

        They need not be of one model, which is why `sweep` does not feed these. With `every` only
        each so-manieth row counts. Raises ValueError for arrays that do not fit.
        """
        if observer not in self._states:
            if reason := observer.misfit(x.shape, x.shape):
                raise ValueError(reason)
            self._states[observer] = observers.new_regressions(observer, x.shape, y.shape)
        observers.regress(observer, self._states[observer], x, y, every)

    def _drop(self, observer: Observer, reason: str) -> None:
        """A feed on which a value has no such channels spoils this observer, and no other."""
        self._dropped[observer] = reason
        self._states.pop(observer, None)
        self.unseen[observer.value] = f"no {observer.kind}: {reason}"

    def merge(self, other: Statistics) -> None:
        """Take in what the same observers have seen on other feeds.

        Raises UsageError where the observers are others, or where one depends on the order of the
        feeds, as a moving average does.
        """
        if set(self.observers) != set(other.observers):
            raise UsageError("statistics of different observers cannot be merged")
        for observer in self.observers:
            if observer.kind == "moving-average":
                raise UsageError(
                    f"the moving average of {observer.value!r} depends on the order of the feeds: "
                    "it cannot be merged"
                )
            if observer.kind == "regression":
                raise UsageError(f"the regression of {observer.value!r} cannot be merged here")
        self.feeds += other.feeds
        self.unseen |= other.unseen
        for value, count in other.nonfinite.items():
            self.nonfinite[value] = self.nonfinite.get(value, 0) + count
        for value, (first, equal) in other._shapes.items():
            mine, alike = self._shapes.get(value, (first, True))
            self._shapes[value] = Shapes(mine, alike and equal and first == mine)
        for observer, reason in other._dropped.items():
            self._drop(observer, reason)
        for observer, states in other._states.items():
            if observer in self._dropped:
                continue
            first = self._shapes[observer.value].first
            if reason := observer.misfit(other._shapes[observer.value].first, first):
                self._drop(observer, reason)
                continue
            if observer not in self._states:
                self._states[observer] = observers.new_states(observer, first)
            observers.merge(self._states[observer], states)

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all of it as one .npz, which appears whole or not at all. Raises OutputError."""
        arrays: dict[str, Array] = {}
        described = [observers.dump(o, self._states.get(o, ()), arrays) for o in self.observers]
        content = {
            "format": _FORMAT,
            "feeds": self.feeds,
            "unseen": self.unseen,
            "nonfinite": self.nonfinite,
            "shapes": self._shapes,
            "observers": described,
            "dropped": [self._dropped.get(o, "") for o in self.observers],
        }
        arrays["content"] = np.array(json.dumps(content))
        with Target(path) as target, output_errors(path):
            with target.staged.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            target.commit([target.staged])

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises DataError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                content = json.loads(str(archive["content"]))
                if content["format"] != _FORMAT:
                    raise ValueError(f"format {content['format']}, not {_FORMAT}")
                restored = [observers.restore(entry, archive) for entry in content["observers"]]
        except _DAMAGE as error:
            raise DataError(f"statistics {path}: cannot be read: {error}") from None
        found = cls(observer for observer, _ in restored)
        found.feeds = content["feeds"]
        found.unseen = content["unseen"]
        found.nonfinite = content["nonfinite"]
        for value, (first, equal) in content["shapes"].items():
            found._shapes[value] = Shapes(tuple(first), equal)
        for (observer, states), reason in zip(restored, content["dropped"], strict=True):
            if reason:
                found._dropped[observer] = reason
            elif states:
                found._states[observer] = states
        return found


def sweep(
    model: Model | Path,
    feeds: Iterable[Feed],
    wanted: Collection[Observer],
    *,
    threads: int = 0,
    cache: Path | None = None,
    data_key: str | None = None,
    budget: int = BUDGET,
    custom_ops: Sequence[Path] = (),
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the model once on every feed and show its values to the observers.

    Inputs, outputs, constants and all that the main graph computes can be wanted; what lies in the
    body of an If, Loop or Scan, and what is no tensor of floats (inputs excepted), ends up in
    `unseen`. Where the values of one feed take more than `budget` bytes, each feed is run several
    times with a part of them. `progress` is called with the number of feeds done.

    With a folder `cache` and a `data_key` that stands for the feeds (a hash of the file they come
    from, say), the statistics are kept there under a hash of model, observers and that key; they
    are found again without running or reading anything.

    Raises UsageError for a value that the model does not have, DataError where there are no feeds,
    RuntimeFailure where onnxruntime refuses the model or a feed.
    """
    if (cache is None) != (data_key is None):
        raise UsageError("a cache of statistics needs a key of the data, and the other way round")
    loaded = Model.load(model) if isinstance(model, Path) else model
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        written = write_exposed(loaded, Path(folder) / "model.onnx", external="always")
        kept = None
        if cache is not None:
            kept = cache / f"{_key(written, wanted, str(data_key))}.npz"
            if (found := _cached(kept)) is not None:
                return found
        statistics = Statistics(wanted)
        options: dict[str, Any] = {"threads": threads, "custom_ops": custom_ops}
        with Exposure(loaded, written, statistics.values, budget=budget, **options) as exposure:
            for name, constant in exposure.constants():
                statistics.observe(name, constant)
            for feed in feeds:
                for name, x in exposure.values(feed):
                    statistics.observe(name, x)
                statistics.feeds += 1
                if progress is not None:
                    progress(statistics.feeds)
            statistics.unseen |= exposure.refused
    if not statistics.feeds:
        raise DataError("there are no feeds to gather statistics from")
    for value in statistics.values:
        if value not in statistics.unseen and not statistics.has_shape(value):
            statistics.unseen[value] = "it was left out on every feed"
    if kept is not None:
        with output_errors(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(kept)
    return statistics


def _key(written: Path, wanted: Iterable[Observer], data_key: str) -> str:
    """A hash of all that statistics depend on, 64 hex digits."""
    digest = hashlib.sha256()
    stated = (_FORMAT, metadata.version("onnxruntime"), data_key)
    digest.update(repr((stated, sorted(map(repr, wanted)))).encode("utf-8", "backslashreplace"))
    for path in (written, written.with_name(f"{written.name}.data")):
        if path.exists():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _cached(path: Path) -> Statistics | None:
    if not path.exists():
        return None
    try:
        return Statistics.load(path)
    except DataError as error:
        logger.warning("%s; gathered anew", error)
        return None
