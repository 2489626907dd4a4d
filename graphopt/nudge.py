"""The same model to anybody: feeds and weights moved by one unit in the last place.

What such a move changes of an output is noise. The parameters of a model are rounded when they are
stored, and every rewrite that folds one into another rounds them once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model, Value
from graphopt.operators import fills_parameter_slot

DRAWS: Final = 2  # copies of a model with other neighbours of its weights
_SCALES: Final = frozenset({"Add", "Div", "Mul", "Sub"})  # whose constants folding takes in


def nudged(feed: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The feed with every float moved to a neighbour, up or down at random; the rest as it is."""
    rng = np.random.default_rng(seed)
    return {name: _moved(value, rng) for name, value in feed.items()}


def write_nudged(source: Path, target: Path, seed: int = 0) -> None:
    """Write a copy of a model whose learned parameters are moved to a neighbour at random.

    Those are floats of several elements, in slots for parameters or where an elementwise operator
    takes them; zeros and what is not finite stay. Raises ModelError for a broken file.
    """
    model = Model.load(source)
    rng = np.random.default_rng(seed)
    edit = Editor(model)
    for graph in model.graphs():
        for value in list(graph.initializers):
            if _is_parameter(value):
                assert value.weight is not None
                array = _moved(value.weight.values, rng)
                edit.set_weight(value, onnx.numpy_helper.from_array(array, value.name))
    exporter.save(model, target)


def _is_parameter(value: Value) -> bool:
    weight = value.constant
    if weight is None or weight.is_sparse or weight.size < 2:
        return False
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return weight.data_type in kinds and all(
        (reader.domain == "" and reader.op in _SCALES)
        or all(fills_parameter_slot(reader, at) for at, v in enumerate(reader.inputs) if v is value)
        for reader in value.consumers
    )


def _moved(value: Any, rng: np.random.Generator) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    target = np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf).astype(value.dtype)
    moved: NDArray[Any] = np.nextafter(value, target)
    return np.where(np.isfinite(value) & np.isfinite(moved) & (value != 0), moved, value)
