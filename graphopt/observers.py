"""What can be gathered about a value while feeds stream through a model.

An `Observer` says what is wanted of which value; its state is one of the kernels, fed one array
at a time, so that memory does not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.kernels.moments import Gram, Moments, Regression, unfold
from graphopt.kernels.ranges import Histogram, MovingAverage
from graphopt.runtime import Array

Kind = Literal["histogram", "moving-average", "moments", "gram", "maximum", "nonzero", "regression"]

_BY_AXIS: Final = ("moments", "maximum", "nonzero")
_ROWS: Final = ("gram", "regression")
_UNFOLDED: Final = 1 << 22  # elements of unfolded rows at a time: 16 MB of float32


@dataclass(frozen=True)
class Patches:
    """The geometry of a convolution, as in ONNX Conv: what its rows of inputs are.

    `pads` holds all begins, then all ends, as numbers: auto_pad has to be resolved. What is left
    out is filled in with ones (strides, dilations) and zeros (pads), so that equal geometries are
    equal.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    group: int = 1

    def __post_init__(self) -> None:
        axes = len(self.kernel)
        filled = {
            "kernel": self.kernel,
            "strides": self.strides or (1,) * axes,
            "pads": self.pads or (0,) * (2 * axes),
            "dilations": self.dilations or (1,) * axes,
        }
        for name, numbers in filled.items():
            object.__setattr__(self, name, tuple(int(number) for number in numbers))
        assert axes
        assert len(self.strides) == len(self.dilations) == len(self.pads) // 2 == axes

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why no convolution of this geometry reads such an array; empty where one does."""
        if len(shape) != 2 + len(self.kernel):
            return f"a kernel of {len(self.kernel)} axes reads no shape {list(shape)}"
        if shape[1] % self.group:
            return f"{self.group} groups do not divide {shape[1]} channels"
        return "the kernel does not fit" if shape[0] and min(self.out(shape)) < 1 else ""

    def features(self, channels: int) -> int:
        """Columns of the rows of one group."""
        return channels // self.group * math.prod(self.kernel)

    def rows(self, x: Array) -> Iterator[Array]:
        """The rows of `graphopt.kernels.moments.unfold`, [group, some, features], in parts.

        A kernel multiplies what an array takes: it is unfolded in strips along its first spatial
        axis, a few megabytes at a time.
        """
        strides, pads = self.strides, list(self.pads)
        axes = len(self.kernel)
        extent = (self.kernel[0] - 1) * self.dilations[0] + 1
        along = [(0, 0)] * x.ndim
        along[2] = pads[0], pads[axes]
        pads[0] = pads[axes] = 0
        out = self.out(x.shape)
        row = x.shape[1] * math.prod(self.kernel) * math.prod(out[1:])
        step = max(1, _UNFOLDED // row)
        at_once = max(1, step // out[0])  # samples
        for sample in range(0, len(x), at_once):
            padded = np.pad(x[sample : sample + at_once], along)
            for start in range(0, out[0], step):
                last = min(start + step, out[0]) - 1
                strip = padded[:, :, start * strides[0] : last * strides[0] + extent]
                yield unfold(strip, self.kernel, strides, pads, self.dilations, self.group)

    def out(self, shape: tuple[int, ...]) -> list[int]:
        """The spatial sizes of the convolution's result."""
        axes = len(self.kernel)
        return [
            (shape[2 + i] + self.pads[i] + self.pads[axes + i] - (k - 1) * d - 1) // s + 1
            for i, (k, s, d) in enumerate(
                zip(self.kernel, self.strides, self.dilations, strict=True)
            )
        ]


@dataclass(frozen=True)
class Observer:
    """What is wanted of one value.

    * "histogram": a `Histogram` of all elements, with exact extremes;
    * "moving-average": a `MovingAverage` of the extremes of every feed;
    * "moments": `Moments` of the channels along `axis`;
    * "maximum": the largest magnitude of each channel along `axis`;
    * "gram": a `Gram` matrix with bias, of rows along the feature axis `axis` (every position of
      the other axes is a row), or of the rows that a convolution reads, by `patches`;
    * "nonzero": the share of positions at which each channel along `axis` is not zero;
    * "regression": a `Regression` of such rows on the rows of another value, the `target`, with
      the channels along the same axis (1 by `patches`); see `Statistics.regress`.
    """

    value: str
    kind: Kind
    axis: int | None = None
    patches: Patches | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        needs_axis = self.kind in _BY_AXIS or (self.kind in _ROWS and self.patches is None)
        assert needs_axis == (self.axis is not None), f"{self}: which axis?"
        assert self.patches is None or self.kind in _ROWS, f"{self}: patches"
        assert (self.target is not None) == (self.kind == "regression"), f"{self}: target"

    def misfit(self, shape: tuple[int, ...], first: tuple[int, ...]) -> str:
        """Why no array of this shape can be observed after one of the `first`; empty if it can."""
        if self.patches is not None and (reason := self.patches.misfit(shape)):
            return reason
        axis = 1 if self.patches is not None else self.axis
        if axis is None:
            return ""
        if not -len(shape) <= axis < len(shape):
            return f"a shape of {list(shape)} has no axis {axis}"
        if shape[axis] != first[axis]:
            return f"axis {axis} holds {first[axis]} elements on one feed, {shape[axis]} on another"
        return ""


class Maximum:
    """The largest magnitude seen in each channel, float64 [channels]."""

    __slots__ = ("values",)

    def __init__(self, channels: int) -> None:
        self.values: NDArray[np.float64] = np.zeros(channels)

    def add(self, x: Array, axis: int) -> None:
        """Take in an array whose `axis` holds the channels; ValueError for another number."""
        others = tuple(at for at in range(x.ndim) if at != axis % x.ndim)
        found = np.maximum(x.max(axis=others), -x.min(axis=others))
        self._raise_to(found)

    def merge(self, other: Maximum) -> None:
        """Take in all that another has seen; ValueError for another number of channels."""
        self._raise_to(other.values)

    def _raise_to(self, found: Array) -> None:
        if found.shape != self.values.shape:
            raise ValueError(f"{len(found)} channels for {len(self.values)}")
        np.maximum(self.values, found, out=self.values)


class NonZero:
    """How often each channel was not zero: counts, float64 [channels], of `total` positions."""

    __slots__ = ("counts", "total")

    def __init__(self, channels: int) -> None:
        self.counts: NDArray[np.float64] = np.zeros(channels)
        self.total = 0

    @property
    def share(self) -> NDArray[np.float64]:
        """Of the positions, in each channel: 1 - APoZ (Hu et al., arXiv:1607.03250)."""
        return self.counts / max(1, self.total)

    def add(self, x: Array, axis: int) -> None:
        """Take in an array whose `axis` holds the channels; ValueError for another number."""
        others = tuple(at for at in range(x.ndim) if at != axis % x.ndim)
        self._include(np.count_nonzero(x, axis=others), x.size // x.shape[axis])

    def merge(self, other: NonZero) -> None:
        """Take in all that another has seen; ValueError for another number of channels."""
        self._include(other.counts, other.total)

    def _include(self, counts: Array, total: int) -> None:
        if counts.shape != self.counts.shape:
            raise ValueError(f"{len(counts)} channels for {len(self.counts)}")
        self.counts += counts
        self.total += total


State = Histogram | MovingAverage | Moments | Maximum | Gram | NonZero | Regression
STATES: Final[dict[Kind, type[State]]] = {
    "histogram": Histogram,
    "moving-average": MovingAverage,
    "moments": Moments,
    "maximum": Maximum,
    "gram": Gram,
    "nonzero": NonZero,
    "regression": Regression,
}
"""The class of the states of each kind."""

_BY_CHANNEL: Final[dict[Kind, type[Moments | Maximum | NonZero]]] = {
    "moments": Moments,
    "maximum": Maximum,
    "nonzero": NonZero,
}


def new_states(observer: Observer, shape: tuple[int, ...]) -> list[State]:
    """Empty states for arrays of this shape: one, or one for each group of a convolution."""
    if observer.kind == "histogram":
        return [Histogram()]
    if observer.kind == "moving-average":
        return [MovingAverage()]
    if (patches := observer.patches) is not None:
        return [Gram(patches.features(shape[1]), bias=True) for _ in range(patches.group)]
    assert observer.axis is not None
    size = shape[observer.axis]
    if observer.kind == "gram":
        return [Gram(size, bias=True)]
    return [_BY_CHANNEL[observer.kind](size)]


def new_regressions(
    observer: Observer, shape: tuple[int, ...], target: tuple[int, ...]
) -> list[State]:
    """Empty regressions for arrays of these shapes: one for each group of a convolution."""
    if (patches := observer.patches) is not None:
        outputs = target[1] // patches.group
        return [Regression(patches.features(shape[1]), outputs) for _ in range(patches.group)]
    assert observer.axis is not None
    return [Regression(shape[observer.axis], target[observer.axis])]


def regress(
    observer: Observer, states: Sequence[State], x: Array, y: Array, every: int = 1
) -> None:
    """Take rows and their targets into regressions; rows that are not finite are left out.

    With `every` only each so-manieth row counts.
    """
    found = [state for state in states if isinstance(state, Regression)]
    if observer.patches is None:
        assert observer.axis is not None
        rows, targets = (np.moveaxis(a, observer.axis, -1) for a in (x, y))
        rows, targets = (a.reshape(1, -1, a.shape[-1])[:, ::every] for a in (rows, targets))
        _regress(found, rows, targets)
        return
    groups, start = observer.patches.group, 0
    # [N, M, *out] as rows sample by sample, as `Patches.rows` gives those of x
    wanted = np.moveaxis(y, 1, -1).reshape(-1, groups, y.shape[1] // groups).swapaxes(0, 1)
    for rows in observer.patches.rows(x):
        first, stop = -start % every, start + rows.shape[1]
        _regress(found, rows[:, first::every], wanted[:, start + first : stop : every])
        start = stop


def _regress(states: Sequence[Regression], rows: Array, targets: Array) -> None:
    """Rows [group, n, features] and targets [group, n, outputs]."""
    finite = np.isfinite(rows).all(axis=(0, 2)) & np.isfinite(targets).all(axis=(0, 2))
    if not finite.all():
        rows, targets = rows[:, finite], targets[:, finite]
    if len(states) == 1:
        states[0].add(rows[0], targets[0])
    else:
        Regression.add_all(states, rows, targets)


def observe(observer: Observer, states: Sequence[State], x: Array, *, finite: bool) -> None:
    """Take one array into the states; `finite` says that all of its numbers are.

    Where they are not, moments and Gram matrices leave out the position (the row) at which any
    channel is not finite, and the others leave out the number.
    """
    if observer.patches is not None:
        for rows in observer.patches.rows(x):
            for state, group in zip(states, rows, strict=True):
                assert isinstance(state, Gram)
                state.add(group if finite else _finite_rows(group))
        return
    (state,) = states
    if isinstance(state, Histogram | MovingAverage):
        state.add(x)
        return
    assert observer.axis is not None
    if isinstance(state, Maximum | NonZero):
        state.add(x if finite else np.where(np.isfinite(x), x, 0), observer.axis)
    elif isinstance(state, Moments) and finite:
        state.add(x, observer.axis)
    else:
        rows = np.moveaxis(x, observer.axis, -1)
        rows = rows if finite else _finite_rows(rows)
        if isinstance(state, Gram):
            state.add(rows)
        else:
            assert isinstance(state, Moments)
            state.add(rows, -1)


def _finite_rows(rows: Array) -> Array:
    rows = rows.reshape(-1, rows.shape[-1])
    return rows[np.isfinite(rows).all(axis=1)]


def merge(into: Sequence[State], states: Sequence[State]) -> None:
    """Take in all that other states of the same observer have seen."""
    for mine, theirs in zip(into, states, strict=True):
        assert type(mine) is type(theirs)
        assert not isinstance(mine, MovingAverage)  # it depends on the order
        mine.merge(theirs)  # type: ignore[arg-type]


def dump(observer: Observer, states: Iterable[State], arrays: dict[str, Array]) -> dict[str, Any]:
    """Observer and states as JSON, arrays apart.

    A state is all in its slots, which hold numbers, pairs of them and arrays.
    """

    def encoded(content: object) -> object:
        if isinstance(content, np.ndarray):
            name = str(len(arrays))
            arrays[name] = content
            return {"array": name}
        return content.item() if isinstance(content, np.generic) else content

    described = [
        {slot: encoded(getattr(state, slot)) for slot in type(state).__slots__} for state in states
    ]
    return {"observer": dataclasses.asdict(observer), "states": described}


def restore(entry: dict[str, Any], arrays: Mapping[str, Array]) -> tuple[Observer, list[State]]:
    """What `dump` described. Raises KeyError, TypeError or ValueError for anything else."""
    stated = dict(entry["observer"])
    if stated["patches"] is not None:
        stated["patches"] = Patches(**stated["patches"])
    observer = Observer(**stated)
    kind = STATES[observer.kind]
    states = []
    for described in entry["states"]:
        if set(described) != set(kind.__slots__):
            raise ValueError(f"a {kind.__name__} with {', '.join(described)}")
        state = kind.__new__(kind)
        for slot, content in described.items():
            if isinstance(content, dict):
                content = arrays[content["array"]]
            setattr(state, slot, tuple(content) if isinstance(content, list) else content)
        states.append(state)
    return observer, states
