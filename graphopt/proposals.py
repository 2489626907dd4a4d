"""Feeds proposed for a model without data: drawn by seed, kept only if the model runs on them.

Sizes of free dims are tried from short ladders, integers stay below what the graph indexes with
them, and an integer that the graph compares with constants takes each of these in turn.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from graphopt.data import given_feeds, refusal
from graphopt.errors import DataError, UnprovenError
from graphopt.hints import Hint, integer_hints
from graphopt.ir import Model
from graphopt.runtime import Array, Port, Session

Kind = Literal["normal", "uniform", "smooth", "small", "large", "larger"]
KINDS: Final[tuple[Kind, ...]] = ("normal", "smooth", "large", "uniform", "larger", "small")
_SCALE: Final[dict[Kind, float]] = {
    "normal": 1.0,
    "uniform": 1.0,
    "smooth": 1.0,
    "small": 1e-2,
    "large": 8.0,
    "larger": 64.0,
}

# Sizes that real models accept, likeliest first: images want multiples of 32, sequences whatever.
_BATCH: Final[tuple[int, ...]] = (1, 2, 3, 4, 8)
_CHANNELS: Final[tuple[int, ...]] = (3, 1, 4, 16, 64)
_IMAGE: Final[tuple[int, ...]] = (
    64,
    224,
    96,
    32,
    48,
    128,
    192,
    160,
    256,
    320,
    384,
    416,
    512,
    640,
    28,
    16,
    8,
)
_SEQUENCE: Final[tuple[int, ...]] = (
    16,
    8,
    32,
    64,
    128,
    256,
    512,
    576,
    320,
    160,
    80,
    1024,
    4,
    2,
    1,
    4096,
    16000,
)
_MAX_TRIALS: Final = 120
_MAX_ELEMENTS: Final = 1 << 26  # of one proposed input; a bigger one would test the machine

Key = tuple[str, int] | str  # a free dim: its symbol, or (input, axis) where it has none


@dataclass(frozen=True)
class Sizes:
    """One accepted choice of sizes, and of the integers that the graph compares with constants."""

    dims: Mapping[Key, int]
    choices: Mapping[str, int] = field(default_factory=dict)


class Proposer:
    """Draws feeds for a model and keeps to sizes on which it runs."""

    def __init__(self, model: Model, session: Session, shapes: Mapping[str, Sequence[int]]) -> None:
        self._session = session
        self._ports = session.inputs
        self._shapes = _fixed_shapes(self._ports, shapes)
        self._hints = {p.name: self._hint(model, p) for p in self._ports}
        self.rejected = ""  # the model's reason for refusing the first proposal

    def sizes(self, wanted: int = 2) -> list[Sizes]:
        """Up to `wanted` accepted choices for each branch of compared integers, unlike each other.

        Every branch comes once before any comes in another size: a slow model gets few feeds.
        Raises UnprovenError with the model's reason where none is accepted.
        """
        found = [first for choices in self._choices() if (first := self._first(choices))]
        if not found:
            raise UnprovenError(
                f"no proposed feed runs on the original ({self.rejected}); give --data"
            )
        others = [itertools.islice(self._others(first), wanted - 1) for first in found]
        return [*found, *itertools.chain.from_iterable(others)]

    def feed(self, sizes: Sizes, kind: Kind, seed: int) -> dict[str, Any]:
        """Values for every input, the same for the same arguments."""
        return {port.name: self._value(port, sizes, kind, seed) for port in self._ports}

    def _hint(self, model: Model, port: Port) -> Hint:
        value = model.graph.values.get(port.name)
        if value is None or port.dtype is None:
            return Hint()
        if port.dtype.kind == "b" and all(n == 1 for n in self._shapes.get(port.name, port.shape)):
            return Hint(compared=(1, 0))  # one truth value most likely chooses a branch
        return integer_hints(value) if port.dtype.kind in "iu" else Hint()

    def _choices(self) -> Iterator[dict[str, int]]:
        names = [name for name, hint in self._hints.items() if hint.compared]
        options = [self._hints[name].compared[:4] for name in names]
        for values in itertools.islice(itertools.product(*options), 8):
            yield dict(zip(names, values, strict=True))

    def _first(self, choices: Mapping[str, int]) -> Sizes | None:
        for dims in itertools.islice(self._assignments(), _MAX_TRIALS):
            if self._accepted(sizes := Sizes(dims, choices)):
                return sizes
        return None

    def _accepted(self, sizes: Sizes) -> bool:
        if any(np.prod(self._shape(p, sizes), dtype=float) > _MAX_ELEMENTS for p in self._ports):
            return False
        reason = refusal(self._session, self.feed(sizes, "normal", 0))
        if reason is not None and not self.rejected:
            self.rejected = reason
        return reason is None

    def _ladders(self) -> dict[Key, tuple[int, ...]]:
        """For every free dim the sizes worth trying, by what its place in the shape suggests."""
        ladders: dict[Key, tuple[int, ...]] = {}
        for port in self._ports:
            shape = self._shapes.get(port.name, port.shape)
            for axis, size in enumerate(shape):
                if isinstance(size, int) and size > 0:
                    continue
                if axis == 0 or (isinstance(size, str) and "batch" in size.lower()):
                    ladder = _BATCH
                elif len(shape) >= 4:
                    ladder = _CHANNELS if axis == 1 else _IMAGE
                else:
                    ladder = _SEQUENCE
                ladders.setdefault(_key(port, axis, size), ladder)
        return ladders

    def _assignments(self) -> Iterator[dict[Key, int]]:
        """Sizes in the order worth trying: all likeliest, then along the ladders, then mixed."""
        ladders = self._ladders()
        base = {key: ladder[0] for key, ladder in ladders.items()}
        yield base
        sizes = sorted({size for size in base.values() if size > 1})
        for key in (key for key in ladders if ladders[key] is _SEQUENCE):
            yield base | {key: sum(sizes)}  # a mask over what is cached and what is new
        groups = [[k for k in ladders if ladders[k] is ladder] for ladder in (_SEQUENCE, _IMAGE)]
        for group in (g for g in groups if g):
            for size in ladders[group[0]][1:]:
                yield base | dict.fromkeys(group, size)
        ones = dict.fromkeys(base, 1)
        yield ones
        for start in (ones, base):
            for key, ladder in ladders.items():
                for size in ladder[1:]:
                    yield start | {key: size}
        for group in (g for g in groups if len(g) == 2):
            for first, second in itertools.permutations(ladders[group[0]][:8], 2):
                yield base | {group[0]: first, group[1]: second}

    def _others(self, first: Sizes) -> Iterator[Sizes]:
        """Accepted sizes unlike the first: as many dims changed as the model lets."""
        ladders = self._ladders()
        free = list(ladders)
        batch = [key for key in free if ladders[key] is _BATCH]
        rest = [key for key in free if key not in batch]
        for group in (free, rest, batch, *([key] for key in free)):
            for step in (1, 2, 3) if group else ():
                dims = dict(first.dims)
                for at, key in enumerate(group):
                    dims[key] = _further(ladders[key], dims[key], step + at % 2)
                if self._accepted(sizes := Sizes(dims, first.choices)):
                    yield sizes
                    break

    def _shape(self, port: Port, sizes: Sizes) -> tuple[int, ...]:
        shape = self._shapes.get(port.name, port.shape)
        return tuple(
            size if isinstance(size, int) and size > 0 else sizes.dims[_key(port, axis, size)]
            for axis, size in enumerate(shape)
        )

    def _value(self, port: Port, sizes: Sizes, kind: Kind, seed: int) -> Any:
        # drawn by name, so that no input's values depend on which other inputs there are
        rng = np.random.default_rng([seed, *(zlib.crc32(t.encode()) for t in (port.name, kind))])
        shape = self._shape(port, sizes)
        if port.dtype is None:
            return _other_value(port, rng, kind)
        if port.name in sizes.choices:
            return np.full(shape, sizes.choices[port.name], port.dtype)
        return draw(port.dtype, shape, self._hints[port.name], kind, rng)


def draw(
    dtype: np.dtype[Any], shape: tuple[int, ...], hint: Hint, kind: Kind, rng: np.random.Generator
) -> Array:
    """Random values of the type: floats of the kind, integers and masks as the hint allows."""
    if dtype.kind == "b":
        return rng.random(shape) < 0.75
    if dtype.kind in "iu":
        return rng.integers(hint.low, hint.high, shape, endpoint=True).astype(dtype)
    if dtype.kind in "OUS":
        return rng.choice(np.array(["a", "b c", "ONNX"], dtype=object), shape)
    values = rng.random(shape) if kind == "uniform" else rng.standard_normal(shape)
    if kind == "smooth":
        values = smooth(values)
    if dtype.kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return np.asarray(values * _SCALE[kind]).astype(dtype)


def smooth(noise: Array) -> Array:
    """White noise with amplitudes falling as 1/frequency along its long axes, as in nature.

    Networks for images and sound react to structure; white noise leaves many of them unmoved.
    The result has the input's shape, mean 0 and standard deviation 1.
    """
    axes = [axis for axis, size in enumerate(noise.shape) if axis > 0 and size >= 8]
    if not axes:
        return noise
    spectrum = np.fft.fftn(noise, axes=axes)
    squared = sum(
        np.square(np.fft.fftfreq(noise.shape[axis])).reshape(
            [-1 if at == axis else 1 for at in range(noise.ndim)]
        )
        for axis in axes
    )
    lowest = min(1 / noise.shape[axis] for axis in axes)
    spectrum /= np.sqrt(np.maximum(squared, lowest**2))
    values = np.real(np.fft.ifftn(spectrum, axes=axes))
    return np.asarray((values - values.mean()) / max(values.std(), 1e-12))


def propose(
    model: Model,
    session: Session,
    *,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Feeds that the session accepts, each with how it was drawn, without end.

    Each kind of values comes in every accepted choice of sizes, twice; then it starts over with
    other seeds. Those who take feeds decide when they have enough. A model without
    inputs has one feed, the empty one. Raises UnprovenError where the model accepts none.
    """
    if not session.inputs:
        yield "no inputs", {}
        return
    proposer = Proposer(model, session, shapes or {})
    accepted = proposer.sizes()
    for draw_number in itertools.count():
        refused = True
        for kind, sizes, repeat in itertools.product(KINDS, accepted, range(2)):
            feed = proposer.feed(sizes, kind, seed * 1_000_003 + draw_number * 2 + repeat)
            if refusal(session, feed) is None:
                refused = False
                yield f"{kind} {_text(feed, sizes.choices)}", feed
        if refused:
            raise UnprovenError("proposed feeds run on the original too rarely; give --data")


def first_feed(
    model: Path,
    *,
    data: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    custom_ops: Sequence[Path] = (),
) -> dict[str, Any]:
    """One feed that the model runs on: the first of `data`, else a proposed one of normal values.

    `shapes` fixes the shapes of inputs by name. Raises DataError and UnprovenError.
    """
    with Session(model, optimizations="off", custom_ops=custom_ops) as session:
        if data is not None:
            return next(given_feeds(data, session))
        return next(propose(Model.load(model), session, seed=seed, shapes=shapes))[1]


def _fixed_shapes(
    ports: Sequence[Port], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    names = {port.name for port in ports}
    for name in shapes:
        if name not in names:
            raise DataError(f"shape of {name!r}: the model's inputs are {', '.join(names)}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _key(port: Port, axis: int, size: int | str | None) -> Key:
    # '?' and the like name nothing: every one is a dim of its own
    if isinstance(size, str) and size.strip() not in ("", "?", "-1", "None"):
        return size
    return (port.name, axis)


def _further(ladder: tuple[int, ...], size: int, step: int) -> int:
    at = ladder.index(size) if size in ladder else 0
    return ladder[(at + step) % len(ladder)]


def _other_value(port: Port, rng: np.random.Generator, kind: Kind) -> Any:
    """A sequence of two small tensors; other kinds of values have no proposal."""
    if port.type.startswith("seq(tensor("):
        element = Port(port.name, port.type[4:-1], ())
        if element.dtype is not None:
            return [draw(element.dtype, (2, 3), Hint(), kind, rng) for _ in range(2)]
    return None


def _text(feed: Mapping[str, Any], choices: Mapping[str, int]) -> str:
    return ", ".join(
        f"{name}={choices[name]}"
        if name in choices
        else "x".join(map(str, value.shape)) or "scalar"
        for name, value in feed.items()
        if isinstance(value, np.ndarray)
    )
