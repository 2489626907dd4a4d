"""Constants however a model states them: initializers and Constant nodes are one thing here."""

from __future__ import annotations

import contextlib
from typing import Final

import numpy as np
import onnx

from graphopt.errors import ModelError
from graphopt.ir import Node, Value, Weight
from graphopt.storage import HOLLOW_OVER, Store, tensor_bytes

CONSTANT: Final = "Constant"
_KINDS: Final = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def constant_of(value: Value | None, store: Store) -> Weight | None:
    """The weight behind an initializer that no caller can replace, or behind a Constant node."""
    if value is None:
        return None
    if value.weight is not None or value.producer is None:
        return value.constant
    return node_constant(value.producer, store)


def node_constant(node: Node, store: Store) -> Weight | None:
    """The weight that a Constant node holds, None for any other node."""
    if node.op != CONSTANT or node.domain or len(node.proto.attribute) != 1:
        return None
    stated = node.proto.attribute[0]
    if stated.name == "value":
        return Weight(stated.t, store)
    if stated.name == "sparse_value":
        return Weight(stated.sparse_tensor, store)
    if stated.name in _KINDS:
        array = np.asarray(onnx.helper.get_attribute_value(stated), _KINDS[stated.name])
        return Weight(onnx.numpy_helper.from_array(array), store)
    if stated.name in ("value_string", "value_strings"):
        texts = [stated.s] if stated.name == "value_string" else list(stated.strings)
        shape = [] if stated.name == "value_string" else [len(texts)]
        tensor = onnx.TensorProto(dims=shape, data_type=onnx.TensorProto.STRING)
        tensor.string_data.extend(texts)
        return Weight(tensor, store)
    return None


def small_tensor(weight: Weight) -> onnx.TensorProto | None:
    """The weight as a dense tensor of up to 1 KB, from which inference reads shapes and axes.

    None for a larger one. It may be the weight's own: to be read only.
    """
    if not weight.is_sparse:
        return None if weight.nbytes > HOLLOW_OVER else weight.tensor
    if tensor_bytes(weight.data_type, weight.shape) > HOLLOW_OVER:
        return None
    with contextlib.suppress(ModelError):  # malformed: nothing follows from it
        return onnx.numpy_helper.from_array(weight.values, weight.tensor.name)
    return None


def hollow_tensor(weight: Weight) -> onnx.TensorProto:
    """A dense tensor of the weight's name, type and shape, without its data."""
    tensor = onnx.TensorProto(name=weight.tensor.name, data_type=weight.data_type)
    tensor.dims.extend(weight.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    return tensor
