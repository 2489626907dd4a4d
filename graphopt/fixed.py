"""Sessions that hold a model to fixed shapes of its inputs, as if it declared them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import RuntimeFailure
from graphopt.runtime import Feed, Port, Session

Shapes = Mapping[str, Sequence[int]]
"""Shapes by input; a size below 1 is as the model has it."""


class FixedSession(Session):
    """A session whose `inputs` state these shapes, and which refuses feeds of any other.

    So the original of a model with fixed shapes gets feeds that both run on.
    """

    def __init__(self, model: Path | bytes, shapes: Shapes, **options: Any) -> None:
        super().__init__(model, **options)
        self.inputs = tuple(_fixed(port, shapes.get(port.name, ())) for port in self.inputs)
        self._shapes = shapes

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """As in Session. Raises RuntimeFailure for a feed of another shape too."""
        for name, shape in self._shapes.items():
            found = np.shape(feed[name]) if name in feed else tuple(shape)
            if len(found) != len(shape) or any(
                size > 0 and size != given for size, given in zip(shape, found, strict=True)
            ):
                raise RuntimeFailure(f"input {name!r} is {_text(found)}, fixed to {_text(shape)}")
        return super().run(feed, outputs)


def note(shapes: Shapes) -> str:
    """What a comparison at fixed shapes has to say; "" where there are none."""
    stated = ", ".join(f"{name}:{_text(shape)}" for name, shape in shapes.items())
    return f"compared at {stated}" if stated else ""


def _fixed(port: Port, shape: Sequence[int]) -> Port:
    if not shape:
        return port
    sizes = port.shape if len(port.shape) == len(shape) else (None,) * len(shape)
    merged = tuple(new if new > 0 else old for new, old in zip(shape, sizes, strict=True))
    return dataclasses.replace(port, shape=merged)


def _text(shape: Sequence[int]) -> str:
    return "x".join(str(size) if size > 0 else "?" for size in shape) or "a scalar"
