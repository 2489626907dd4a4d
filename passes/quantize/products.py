"""Products of an activation and a constant matrix, however a model states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Model, Node, Value
from graphopt.passes.quantize.site import Site

Array = NDArray[Any]
_FLOAT: Final = onnx.TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class Product:
    """source @ matrix + bias: a MatMul or Gemm, and the Add behind it.

    `nodes` are these, in order of computation; the last computes the result. `matrix` is float32
    [K, N], `bias` float32 [N] or None where there is none; `owner` and `bias_owner` are the
    constants that they are stored in.
    """

    nodes: tuple[Node, ...]
    source: Value
    owner: Value
    matrix: Array
    bias: Array | None = None
    bias_owner: Value | None = None

    @property
    def node(self) -> Node:
        """The MatMul or Gemm."""
        return self.nodes[0]

    @property
    def result(self) -> Value:
        """What is computed in the end."""
        value = self.nodes[-1].outputs[0]
        assert value is not None
        return value

    def stored_bias(self, site: Site) -> Value | None:
        """A constant [N] that holds the bias."""
        if self.bias is None or self.bias_owner is None:
            return None
        return site.constant(self.bias_owner, "vector", self.bias)


def product_of(node: Node, edit: Editor) -> Product | str:
    """The product that the node is, or the reason why it is none that kernels compute."""
    if node.domain or node.op not in ("MatMul", "Gemm") or node.outputs[0] is None:
        return "it is no MatMul or Gemm"
    source = node.inputs[0]
    assert source is not None
    if constant_of(source, edit.model.store) is not None:
        return "both operands are constant"
    stored = stored_matrix(node.inputs[1], edit.model)
    if isinstance(stored, str):
        return stored
    owner, matrix = stored
    if matrix.ndim != 2:
        return f"the weights have {matrix.ndim} axes instead of 2"
    known = edit.types[source]
    if known is not None and known.rank == 1:
        return "the activation is a vector"
    if node.op == "Gemm":
        for name, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
            if _number(node, name, usual) != usual:
                return f"{name} is {_number(node, name, usual):g}"
        matrix = matrix.T if _number(node, "transB", 0) else matrix
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = _vector(node.inputs[2], matrix.shape[1], 2, edit.model)
            if bias is None:
                return "the bias is not one constant for each column"
            return Product((node,), source, owner, matrix, bias, node.inputs[2])
    if (added := _added(node, matrix.shape[1], edit)) is not None:
        return Product((node, added[0]), source, owner, matrix, *added[1:])
    return Product((node,), source, owner, matrix)


def stored_matrix(value: Value | None, model: Model) -> tuple[Value, Array] | str:
    """The constant behind a value and its numbers as float32, or why there are none.

    Looks through Transpose, Identity and a Cast from a narrower float.
    """
    if value is None:
        return "the weights are left out"
    steps: list[Node] = []
    owner = value
    while (weight := constant_of(owner, model.store)) is None:
        maker = owner.producer
        if maker is None or maker.domain or maker.op not in ("Transpose", "Identity", "Cast"):
            return "the weights are not constant"
        steps.append(maker)
        assert maker.inputs[0] is not None
        owner = maker.inputs[0]
    if weight.is_sparse or weight.size == 0:
        return "the weights are sparse" if weight.is_sparse else "the weights are empty"
    kinds = {int(_number(step, "to", 0)) for step in steps if step.op == "Cast"}
    kind = weight.data_type
    if not (kind == _FLOAT and not kinds) and not (_is_half(kind) and kinds == {_FLOAT}):
        return f"the weights are {onnx.TensorProto.DataType.Name(kind).lower()}"
    try:
        array: Array = weight.values.astype(np.float32, copy=False)
    except ModelError:
        return "the model has no weights"
    if not np.isfinite(array).all():
        return "the weights are not finite"
    for step in reversed(steps):
        if step.op == "Transpose":
            stated = step.attribute("perm")
            array = array.transpose(None if stated is None else list(stated.ints))
    return owner, array


def _added(node: Node, columns: int, edit: Editor) -> tuple[Node, Array, Value | None] | None:
    """The Add of a constant vector that alone reads the node's result."""
    value = node.outputs[0]
    if value is None or value.is_output or value in value.graph.pinned:
        return None
    if len(value.consumers) != 1:
        return None
    reader, count = next(iter(value.consumers.items()))
    if reader.op != "Add" or reader.domain or count != 1 or reader.graph is not node.graph:
        return None
    other = reader.inputs[1] if reader.inputs[0] is value else reader.inputs[0]
    known = edit.types[value]
    bias = _vector(other, columns, (known.rank if known else None) or 1, edit.model)
    return None if bias is None else (reader, bias, other)


def _vector(value: Value | None, columns: int, rank: int, model: Model) -> Array | None:
    """A constant that adds to each column a number, and no axis to a tensor of this rank."""
    weight = constant_of(value, model.store)
    if weight is None or weight.data_type != _FLOAT or weight.is_sparse:
        return None
    if len(weight.shape) > rank or weight.shape[-1:] not in ((), (1,), (columns,)):
        return None
    if weight.size not in (1, columns):
        return None
    try:
        return np.broadcast_to(weight.values.reshape(-1), (columns,)).astype(np.float32)
    except ModelError:
        return None


def _is_half(kind: int) -> bool:
    return kind in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def _number(node: Node, name: str, usual: float) -> float:
    stated = node.attribute(name)
    return usual if stated is None else float(onnx.helper.get_attribute_value(stated))
