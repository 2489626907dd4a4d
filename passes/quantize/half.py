"""Weights stored in fewer bits than they are computed with: smaller files at the same speed.

onnxruntime computes Cast and Mul of constants as it loads a model, so that operators see float
weights and keep the layouts and fusions that they have. It does not fold DequantizeLinear: on the
weights of a convolution that is computed on every run, and costs the blocked layout as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Graph, Value
from graphopt.kernels.affine import Affine, channel_affine, dequantize, quantize
from graphopt.operators import QUANTIZERS

HALF: Final = "store-half"
INT8: Final = "store-int8"
HALF_BOUND: Final = (
    2.0**-11
)  # what rounding to 11 bits changes at most, but for under- and overflow
INT8_BOUND: Final = 0.02
_FEWEST: Final = 1024  # elements; fewer save less than the nodes take
_SINCE: Final = 7  # opset of Mul that broadcasts; Cast states its type as a number since 6

Array = NDArray[Any]


def can_be_half(value: Value, edit: Editor, *, bound: float = HALF_BOUND) -> str | None:
    """None where `store_half` takes the weight, else the reason why not."""
    weight = _weight(value, edit)
    return weight if isinstance(weight, str) else _excess(weight, _halved(weight), bound)


def can_be_int8(
    value: Value, edit: Editor, *, axis: int | None = 0, bound: float = INT8_BOUND
) -> str | None:
    """None where `store_int8` takes the weight, else the reason why not."""
    weight = _weight(value, edit)
    if isinstance(weight, str):
        return weight
    affine = channel_affine(weight, axis)
    return _excess(weight, dequantize(quantize(weight, affine), affine), bound)


def store_half(edit: Editor, value: Value, *, bound: float = HALF_BOUND) -> bool:
    """Store a float32 constant as float16 behind a Cast; False where that is not allowed.

    `bound` is on the root mean square of the error, relative to that of the weight. Raises
    ValueError for a weight that `can_be_half` has a reason against.
    """
    if (reason := can_be_half(value, edit, bound=bound)) is not None:
        raise ValueError(f"{value.name!r} cannot be stored as float16: {reason}")
    if not edit.allows(HALF, value.name):
        return False
    weight = _weight(value, edit)
    assert not isinstance(weight, str)
    stored = weight.astype(np.float16)

    def restate(put: _Put) -> None:
        put("Cast", [put.constant("float16", stored)], value.name, to=onnx.TensorProto.FLOAT)

    _restate(edit, value, HALF, restate)
    return True


def store_int8(
    edit: Editor, value: Value, *, axis: int | None = 0, bound: float = INT8_BOUND
) -> bool:
    """Store a float32 constant as int8 behind Cast and Mul; False where that is not allowed.

    One scale for each index along `axis` (output channels of a convolution: 0), or one for all
    with None; `bound` as for `store_half`. Raises ValueError for a weight that `can_be_int8` has a
    reason against.
    """
    if (reason := can_be_int8(value, edit, axis=axis, bound=bound)) is not None:
        raise ValueError(f"{value.name!r} cannot be stored as int8: {reason}")
    if not edit.allows(INT8, value.name):
        return False
    weight = _weight(value, edit)
    assert not isinstance(weight, str)
    affine: Affine = channel_affine(weight, axis)
    scale, _ = affine.along(weight.ndim)

    def restate(put: _Put) -> None:
        q = put.constant("int8", quantize(weight, affine))
        wide = put("Cast", [q], put.name("float"), to=onnx.TensorProto.FLOAT)
        put("Mul", [wide, put.constant("scales", np.asarray(scale))], value.name)

    _restate(edit, value, INT8, restate)
    return True


def _weight(value: Value, edit: Editor) -> Array | str:
    """The numbers of a large float32 constant, or why it is none."""
    weight = constant_of(value, edit.model.store)
    if weight is None or weight.is_sparse:
        return "it is not a dense constant"
    if weight.data_type != onnx.TensorProto.FLOAT:
        return f"it is {onnx.TensorProto.DataType.Name(weight.data_type).lower()}"
    if weight.size < _FEWEST:
        return f"it has fewer than {_FEWEST} elements"
    if value.is_output or value in value.graph.pinned:
        return "it is an output"
    if edit.model.graph.inputs_are_frozen:
        return "this IR version wants every initializer among the inputs"
    if any(reader.op in QUANTIZERS for reader in value.consumers):
        return "it holds scales"
    if edit.model.opsets.get("", 1) < _SINCE:
        return f"it takes opset {_SINCE}"
    try:
        array: Array = weight.values
    except ModelError:
        return "the model has no weights"
    return array if np.isfinite(array).all() else "it is not finite"


def _halved(weight: Array) -> Array:
    with np.errstate(over="ignore"):
        return weight.astype(np.float16).astype(np.float32)


def _excess(weight: Array, kept: Array, bound: float) -> str | None:
    """Why what is kept of a weight is too far from it."""
    if not np.isfinite(kept).all():
        return "it has numbers beyond those of float16"
    size = float(np.linalg.norm(weight.astype(np.float64)))
    lost = float(np.linalg.norm(np.subtract(weight, kept, dtype=np.float64)))
    error = lost / size if size else 0.0
    return None if error <= bound else f"its error of {error:.2g} exceeds {bound:.2g}"


class _Put:
    """Adds the nodes and constants that a weight is computed from."""

    def __init__(self, edit: Editor, graph: Graph, name: str, rule: str) -> None:
        self._edit, self._graph, self._name, self._rule = edit, graph, name, rule
        self.told: list[str] = []

    def name(self, part: str) -> str:
        return self._edit.unique(f"{self._name}/{part}")

    def constant(self, part: str, array: Array) -> Value:
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))
        tensor.name = self.name(part)
        return self._edit.add_constant(self._graph, tensor.name, tensor, -1.0)

    def __call__(self, op: str, inputs: list[Value], output: str, **attributes: Any) -> Value:
        read = [value.name for value in inputs]
        proto = onnx.helper.make_node(op, read, [output], self.name(op), **attributes)
        known = dict(zip(read, inputs, strict=True))
        node = self._edit.add_node(self._graph, proto, known, {}, -1.0, self._rule)
        self.told.append(node.text())
        return known[output]


def _restate(edit: Editor, value: Value, rule: str, restate: Callable[[_Put], None]) -> None:
    """Let nodes compute what was a constant; it keeps its name, so its readers change hands."""
    graph, name = value.graph, value.name
    known = edit.types[value]
    assert known is not None
    before = f"{name} = {known}"
    readers = [
        (node, slot)
        for node in list(value.consumers)
        for slot, read in enumerate(node.inputs)
        if read is value
    ]
    for node, slot in readers:
        edit.set_input(node, slot, None)
    if value.producer is not None:
        edit.remove_node(value.producer)
    else:
        if value.is_input:
            edit.freeze_input(value)
        edit.remove_value(value)
    put = _Put(edit, graph, name, rule)
    restate(put)
    made = graph.values[name]
    for node, slot in readers:
        edit.set_input(node, slot, made)
    edit.types[made] = known
    edit.record(rule, name, before, "\n".join(put.told))
