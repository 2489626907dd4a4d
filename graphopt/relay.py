"""A model run piece by piece on all feeds, each node once for each of them.

What a later piece needs is kept between the pieces, in memory or on disk, so that weights of nodes
that have not run yet may still change: whoever fits layer after layer runs the model once, not
once for each layer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from graphopt import regions
from graphopt.errors import DataError, UsageError
from graphopt.ir import Model, Node, Value
from graphopt.runtime import Array, Feed, Session

MEMORY: Final = 64 << 20  # bytes of values that are kept in memory; the rest goes to disk


class Shelf:
    """Arrays by key, in memory up to a limit and in files of a temporary folder beyond it."""

    def __init__(self, limit: int = MEMORY) -> None:
        self._limit = limit
        self._held: dict[tuple[str, int], Array] = {}
        self._files: dict[tuple[str, int], Path] = {}
        self._bytes = 0
        self._count = 0
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")

    def __setitem__(self, key: tuple[str, int], array: Array) -> None:
        if self._bytes + array.nbytes <= self._limit:
            self._held[key] = array
            self._bytes += array.nbytes
            return
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}.npy"
        np.save(path, array, allow_pickle=False)
        self._files[key] = path

    def __getitem__(self, key: tuple[str, int]) -> Array:
        return self._held[key] if key in self._held else np.load(self._files[key])

    def __delitem__(self, key: tuple[str, int]) -> None:
        if key in self._held:
            self._bytes -= self._held.pop(key).nbytes
        else:
            self._files.pop(key).unlink()

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


class Relay:
    """One model on its way over all feeds, with the values that are still needed.

    `ends` are the values that will be asked for; nodes that none of them needs never run. The model
    may be edited between two pieces where no node that has run is touched. Raises UsageError for
    feeds with optional or sequence values, DataError where there are none, RuntimeFailure where
    onnxruntime fails.
    """

    def __init__(
        self,
        model: Model,
        feeds: Iterable[Feed],
        ends: Iterable[Value],
        *,
        threads: int = 0,
        custom_ops: Sequence[Path] = (),
        memory: int = MEMORY,
    ) -> None:
        self._model = model
        self._threads = threads
        self._custom_ops = custom_ops
        self._shelf = Shelf(memory)
        asked = list(ends)
        needed = _needed(asked)
        self._asked = Counter(value.name for value in asked)  # how often each will be asked for
        self._left = set(needed)  # nodes that have not run
        self._kept: set[str] = set()  # names of values on the shelf
        self.feeds = 0
        read = {v.name for node in needed for v in regions.reads(node)} | set(self._asked)
        for feed in feeds:
            for value in model.graph.inputs:
                if value.name in feed and value.name in read:
                    given = feed[value.name]
                    if isinstance(given, list) or given is None:
                        raise UsageError(f"input {value.name!r} is no tensor")
                    self._shelf[value.name, self.feeds] = np.asarray(given)
                    self._kept.add(value.name)
            self.feeds += 1
        if not self.feeds:
            raise DataError("there are no feeds to run the model on")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shelf.close()

    def values(self, value: Value) -> Iterator[Array]:
        """What a value is on each feed, in their order; the nodes it needs run as it is read.

        All feeds have to be read to the end before the next value is asked for.
        """
        self._asked -= Counter((value.name,))
        if value.name in self._kept:
            for number in range(self.feeds):
                yield self._shelf[value.name, number]
            self._tidy((value,))
            return
        piece = list(regions.operands_first([_producer(value)], self._left))
        inside = set(piece)
        read = dict.fromkeys(v for node in piece for v in regions.reads(node))
        inputs = [v for v in read if v.name in self._kept and v.producer not in inside]
        inputs = [v for v in inputs if not regions.fixed(v)]  # a piece brings its constants along
        self._left -= inside
        later = self._later()
        made = [v for node in piece for v in node.outputs if v is not None]
        kept = [v for v in made if v.name in later]
        names = list(dict.fromkeys([value.name, *(v.name for v in kept)]))
        with self._session(piece, inputs, names) as session:
            for number in range(self.feeds):
                feed = {v.name: self._shelf[v.name, number] for v in inputs}
                found = session.run(feed, names)
                for v in kept:
                    self._shelf[v.name, number] = np.asarray(found[v.name])
                yield np.asarray(found[value.name])
        self._kept |= {v.name for v in kept}
        self._tidy(inputs)

    def _later(self) -> set[str]:
        """Names of values that will be needed: read by nodes that have not run, or asked for."""
        return {v.name for node in self._left for v in regions.reads(node)} | set(self._asked)

    def _tidy(self, values: Iterable[Value]) -> None:
        """Forget what is needed no more."""
        later = self._later()
        for value in values:
            if value.name in self._kept and value.name not in later:
                self._drop(value.name)

    def _drop(self, name: str) -> None:
        self._kept.discard(name)
        for number in range(self.feeds):
            del self._shelf[name, number]

    def _session(
        self, piece: Sequence[Node], inputs: Sequence[Value], names: Sequence[str]
    ) -> Session:
        types = {}
        for value in inputs:
            first = self._shelf[value.name, 0]
            types[value.name] = regions.StaticType(first.dtype, (None,) * first.ndim)
        proto = regions.extract(self._model, piece, types, also=names)
        return Session(
            proto.SerializeToString(),
            threads=self._threads,
            optimizations="extended",
            custom_ops=self._custom_ops,
        )


def _needed(ends: Iterable[Value]) -> list[Node]:
    """All nodes that the values need, operands first."""
    produced = [value.producer for value in ends if value.producer is not None]
    every = {node for end in produced for node in end.graph.nodes}
    return list(regions.operands_first(produced, every))


def _producer(value: Value) -> Node:
    if value.producer is None:
        raise UsageError(f"{value.name!r} is given by no node and no feed")
    return value.producer


def paired(first: Relay, x: Value, second: Relay, y: Value) -> Iterator[tuple[Any, Any]]:
    """A value of one model beside one of another, feed by feed."""
    return zip(first.values(x), second.values(y), strict=True)
