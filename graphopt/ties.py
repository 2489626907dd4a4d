"""Integers that differ because two scores were as good as equal.

The index of a maximum may change when both candidates lie within rounding of each other. Such an
output is judged by the values that it chose: the original runs once more with the scores exposed,
and the candidate's choice must be as good as the original's within the scores' own noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import exporter, output
from graphopt.errors import RuntimeFailure
from graphopt.ir import Model, Node, Value
from graphopt.judge import NOISE_FACTOR, OutputState
from graphopt.operators import ELEMENTS_IN_PLACE, PICKS
from graphopt.runtime import Session, limits

Array = NDArray[Any]
_SCORES: Final = {"ArgMax": 0, "ArgMin": 0, "TopK": 0, "NonMaxSuppression": 1}


class Settler:
    """Decides, output by output, whether differing integers are ties."""

    def __init__(
        self,
        model: Model,
        feeds: Sequence[Mapping[str, Any]],
        custom_ops: Sequence[Path],
        tolerance: float,
    ) -> None:
        self._model = model
        self._feeds = feeds
        self._custom_ops = custom_ops
        self._tolerance = tolerance

    def is_tie(self, state: OutputState, index: int) -> bool:
        """True where on this feed the candidate picked other elements of the same value."""
        node = self._picker(state.name)
        reference = state.runs["original off"][index]
        runs = [state.runs[f"candidate {way}"][index] for way in ("off", "default")]
        if node is None or len(reference) != 1 or any(len(run) != 1 for run in runs):
            return False
        if any(run[0].shape != reference[0].shape for run in runs):
            return False
        scores = self._scores(node, index)
        if scores is None:
            return False
        off, default = scores
        allowed = max(self._tolerance * float(off.std()), NOISE_FACTOR * _spread(off, default))
        wanted = _picked(node, off, reference[0])
        return wanted is not None and all(
            (got := _picked(node, off, run[0])) is not None and _spread(wanted, got) <= allowed
            for run in runs
        )

    def _picker(self, name: str) -> Node | None:
        """The ArgMax or the like whose indices the output is, behind operators that only cast."""
        value: Value | None = self._model.graph.values.get(name)
        while value is not None and value.producer is not None:
            node = value.producer
            if node.op in PICKS and node.domain == "":
                return node if node.outputs.index(value) == PICKS[node.op] else None
            if node.op not in ELEMENTS_IN_PLACE or node.domain:
                return None
            value = node.inputs[0]
        return None

    def _scores(self, node: Node, index: int) -> tuple[Array, Array] | None:
        """What the node chose from, optimisations off and at the default level."""
        value = node.inputs[_SCORES[node.op]]
        if value is None:
            return None
        if value.name in self._feeds[index]:
            given = np.asarray(self._feeds[index][value.name])
            return given, given
        proto = onnx.ModelProto()
        proto.CopyFrom(exporter.to_hollow(self._model))
        proto.ir_version = min(proto.ir_version, limits().ir)
        if all(info.name != value.name for info in proto.graph.output):
            proto.graph.output.add(name=value.name)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            (path, *_) = output.write(proto, self._model.store, Path(folder) / "exposed.onnx")
            found = []
            for level in ("off", "default"):
                try:
                    with Session(
                        path,
                        optimizations="off" if level == "off" else "default",
                        custom_ops=self._custom_ops,
                    ) as session:
                        found.append(session.run(self._feeds[index], [value.name])[value.name])
                except RuntimeFailure:  # the scores cannot be had: then nothing excuses the output
                    return None
        return found[0], found[1]


def _picked(node: Node, scores: Array, indices: Array) -> Array | None:
    """The scores that the indices stand for; None where they do not fit."""
    try:
        if node.op == "NonMaxSuppression":
            batch, label, box = indices.reshape(-1, 3).T
            return np.sort(scores[batch, label, box])
        stated = node.attribute("axis")
        axis = stated.i if stated is not None else (-1 if node.op == "TopK" else 0)
        # without keepdims, or behind a Squeeze, the axis is gone; the order of elements is the same
        shape = list(scores.shape)
        shape[axis] = indices.size * shape[axis] // max(scores.size, 1)
        return np.take_along_axis(scores, indices.astype(np.int64).reshape(shape), axis)
    except (IndexError, ValueError):
        return None


def _spread(a: Array, b: Array) -> float:
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float(gap.max(initial=0.0))
