"""What a graph tells about its integer inputs: bounds of indices, constants compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from graphopt.ir import Node, Value
from graphopt.operators import (
    COMPARISONS,
    INDEX_SLOTS,
    PASSES_VALUES_ON,
    SHAPE_SLOTS,
    STORAGE_READERS,
)
from graphopt.runtime import Array
from graphopt.storage import HOLLOW_OVER

_MAX_STEPS: Final = 2000  # values followed from one input


@dataclass(frozen=True)
class Hint:
    """Integers worth feeding: `low` to `high`, both included, or those it is `compared` with."""

    low: int = 0
    high: int = 1
    compared: tuple[int, ...] = ()


def integer_hints(value: Value) -> Hint:
    """Follow an integer input to where it indexes, sets a shape, or is compared."""
    bounds: list[int] = []
    compared: set[int] = set()
    is_shape = False
    for _, node, slot in _readers(value):
        if (axis_size := _index_bound(node, slot)) is not None:
            bounds.append(axis_size - 1)
        elif node.op in COMPARISONS:
            other = node.inputs[1 - slot] if slot < 2 and len(node.inputs) == 2 else None
            constant = constant_array(other)
            if constant is not None and constant.size == 1 and _is_scalar(value):
                compared.add(int(constant.reshape(-1)[0]))
        elif slot in SHAPE_SLOTS.get(node.op, ()):
            is_shape = True
    if compared:
        # one more, equal to none of them, takes the branch that is left
        return Hint(compared=(*sorted(compared, reverse=True), min(compared) - 1))
    if bounds:
        return Hint(high=max(min(bounds), 0))
    return Hint(low=1, high=4) if is_shape else Hint()


def constant_array(value: Value | None) -> Array | None:
    """The array behind an initializer or a Constant node of up to 1 KB; None for anything else."""
    if value is None:
        return None
    if value.constant is not None:
        return np.asarray(value.constant.values) if value.constant.nbytes <= HOLLOW_OVER else None
    node = value.producer
    if node is None or node.op != "Constant" or node.domain:
        return None
    stated = node.proto.attribute[0]
    if stated.name == "value" and not stated.t.external_data:
        return np.asarray(onnx.numpy_helper.to_array(stated.t))
    if stated.name == "value_int":
        return np.asarray(stated.i, np.int64)
    return np.asarray(list(stated.ints), np.int64) if stated.name == "value_ints" else None


def _constant_shape(value: Value | None) -> tuple[int, ...] | None:
    while value is not None and value.producer is not None:
        if value.producer.op not in STORAGE_READERS:
            break
        value = value.producer.inputs[0]  # a table kept in a narrower type
    if value is None:
        return None
    if value.weight is not None:
        return value.weight.shape
    node = value.producer
    if node is not None and node.op == "Constant" and (stated := node.attribute("value")):
        return tuple(stated.t.dims)
    return None


def _readers(value: Value) -> Iterator[tuple[Value, Node, int]]:
    """Who reads the value's elements, through operators that only move them: value, node, slot."""
    pending, seen = [value], {value}
    while pending and len(seen) < _MAX_STEPS:
        current = pending.pop()
        for node in current.consumers:
            for slot, read in enumerate(node.inputs):
                if read is not current:
                    continue
                yield current, node, slot
                if slot in PASSES_VALUES_ON.get(node.op, ()):
                    following = [v for v in node.outputs if v is not None and v not in seen]
                    pending.extend(following)
                    seen.update(following)


def _index_bound(node: Node, slot: int) -> int | None:
    """Number of entries that an index read in this slot may choose from, where that is constant."""
    if slot != INDEX_SLOTS.get(node.op):
        return None
    shape = _constant_shape(node.inputs[0])
    if not shape:
        return None
    if node.op == "GatherND":
        return min(shape)
    axis = node.attribute("axis")
    return shape[axis.i if axis is not None else 0]


def _is_scalar(value: Value) -> bool:
    """True for one element, and where nothing is declared, as exporters leave it for scalars."""
    declared = value.declared_type
    if declared is None:
        return True
    return all(dim.dim_value == 1 for dim in declared.tensor_type.shape.dim)
