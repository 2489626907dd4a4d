"""What lossy passes look at while they edit: the model as it was, run on the user's feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from graphopt import exporter
from graphopt.ir import Model

if TYPE_CHECKING:  # they take scipy along
    from graphopt.runtime import Feed
    from graphopt.statistics import Observer, Statistics


def shapes_of(seen: Statistics) -> dict[str, tuple[int, ...]]:
    """The shapes of values by name, on the first feed."""
    return {v: seen.shape(v).first for v in seen.values if seen.has_shape(v)}


class Copy:
    """The model as it was before the pass, on disk, with the feeds that came with it."""

    def __init__(self, model: Model, data: str) -> None:
        self._folder = TemporaryDirectory(prefix="graphopt-")
        self._path = Path(self._folder.name) / "model.onnx"
        self._data = data
        exporter.save(model, self._path)

    def model(self) -> Model:
        """The copy, loaded."""
        return Model.load(self._path)

    @property
    def feeds(self) -> Callable[[], Iterator[Feed]] | None:
        """The feeds, anew at each call; None without data."""
        return self._given if self._data else None

    def _given(self) -> Iterator[Feed]:
        from graphopt.data import given_feeds
        from graphopt.runtime import Session

        with Session(self._path) as session:
            yield from given_feeds(self._data, session)

    def sweep(self, wanted: set[Observer]) -> Statistics | None:
        """What the feeds show; None without data."""
        from graphopt.statistics import sweep

        return sweep(self._path, self._given(), wanted) if self._data else None

    def sizes(self, wanted: set[Observer]) -> dict[str, tuple[int, ...]]:
        """The shapes of values by name on one feed: the first, or a proposed one without data."""
        from graphopt.proposals import first_feed
        from graphopt.statistics import sweep

        return shapes_of(
            sweep(self._path, [first_feed(self._path, data=self._data or None)], wanted)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
