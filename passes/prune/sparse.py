"""Weights with many zeros as sparse tensors, which makes the file smaller, and back.

Runtimes make them dense again as they load a model: this saves room in files, never time.
A SparseTensorProto holds the elements that are not zero and where they stand. Indices are linear
and packed as varints, 1 to 3 bytes each in tensors of up to 2 M elements: a float32 tensor
becomes smaller above 43 % zeros, not above 67 % as with indices of 8 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import node_constant
from graphopt.edit import Editor
from graphopt.errors import ModelError, UsageError
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.proofs import TensorType
from graphopt.storage import HOLLOW_OVER, Store, tensor_bytes

_SINCE_IR: Final = 6  # sparse initializers came with it
_FRAME: Final = 64  # bytes that a sparse tensor may need around values and indices
# What onnxruntime 1.31 makes dense again: no strings, nothing that shares bytes, no complex.
_TYPES: Final = frozenset(
    number
    for name, number in onnx.TensorProto.DataType.items()
    if name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "BOOL")
    or re.fullmatch(r"U?INT(8|16|32|64)|FLOAT8E[45]M[23](FN|FNUZ)?", name)
)
_SIZE: Final = re.compile(r"size\((.*), (\d+)\)")


@dataclass(frozen=True)
class Sparsify:
    """A weight with enough zeros => a sparse initializer of the same numbers, where it is smaller.

    Only +0.0 counts as zero, so that `densify` gives every bit back. A share of zeros below
    `least` leaves a weight dense. So stay tensors of up to 1 KB, which others read shapes from,
    and inputs and outputs of the graph, which would be declared dense and be sparse.
    Types that inference no longer finds behind sparse tensors are declared.
    """

    name: ClassVar[str] = "sparsify"
    least: float = 0.0

    def run(self, model: Model, edit: Editor) -> None:
        if not 0 <= self.least <= 1:
            raise UsageError(f"sparsify: least is a share of zeros, 0 to 1, not {self.least}")
        if model.proto.ir_version < _SINCE_IR:
            reason = f"the file is of IR {model.proto.ir_version}, sparse initializers need 6"
            edit.rejections.append(("sparsify-weight", model.label, reason))
            return
        for value, weight, node in list(_weights(model)):
            if weight.data_type not in _TYPES or _dense_bytes(weight) <= HOLLOW_OVER:
                continue
            reason = _refusal(value)
            try:
                sparse = None if reason else sparsified(weight, model.store, self.least)
            except ModelError as error:
                sparse, reason = None, str(error)
            if reason:
                edit.rejections.append(("sparsify-weight", value.name, reason))
            elif sparse is not None and edit.allows("sparsify-weight", value.name):
                self._replace(edit, value, node, sparse)
        _declare(model, edit)

    def _replace(
        self, edit: Editor, value: Value, node: Node | None, sparse: onnx.SparseTensorProto
    ) -> None:
        sparse.values.name = value.name
        made = Weight(sparse, edit.model.store)
        if node is not None:
            before = node.text()
            edit.detach_node(node)
            edit.make_constant(value, made, node.position)
        else:
            assert value.weight is not None
            before = _text(value.name, value.weight)
            edit.represent(value, sparse)
        if value.name in value.graph.value_info:
            edit.declare(value, None)  # a declared tensor is no sparse tensor to inference
        edit.record("sparsify-weight", value.name, before, _text(value.name, made))


@dataclass(frozen=True)
class Densify:
    """A sparse initializer, or Constant node with a sparse value => dense, the same to the bit.

    Most tools that read ONNX files know no sparse initializers. Raises ModelError for a sparse
    tensor that ONNX does not allow: indices that do not ascend or lie outside.
    """

    name: ClassVar[str] = "densify"

    def run(self, model: Model, edit: Editor) -> None:
        for value, weight, node in list(_weights(model)):
            if not weight.is_sparse or not edit.allows("densify-weight", value.name):
                continue
            tensor = onnx.numpy_helper.from_array(weight.values, weight.tensor.name)
            tensor.doc_string = weight.tensor.doc_string
            before = _text(value.name, weight)
            if node is None:
                edit.represent(value, model.store.kept(tensor))
            else:
                proto = onnx.NodeProto()
                proto.CopyFrom(node.proto)
                stated = onnx.helper.make_attribute("value", model.store.kept(tensor))
                proto.attribute[0].CopyFrom(stated)
                edit.restate(node, proto)
            made = Weight(tensor, model.store)
            edit.record("densify-weight", value.name, before, _text(value.name, made))


def sparsified(weight: Weight, store: Store, least: float = 0.0) -> onnx.SparseTensorProto | None:
    """The weight as a sparse tensor, None where it would not be smaller than it is.

    Its data is in `store`. `least` is the share of zeros that it has to have. Raises ModelError
    where the weight cannot be decoded.
    """
    array = weight.values
    where = _nonzero(array)
    if array.size - len(where) < least * array.size:
        return None
    if len(where) * array.itemsize + _varint_bytes(where) + _FRAME >= weight.nbytes:
        return None
    sparse = onnx.SparseTensorProto(dims=weight.shape)
    sparse.values.CopyFrom(_values(array.reshape(-1)[where], store))
    sparse.values.name, sparse.values.doc_string = weight.tensor.name, weight.tensor.doc_string
    sparse.indices.CopyFrom(store.listed(where))
    return sparse


def _values(array: NDArray[Any], store: Store) -> onnx.TensorProto:
    """Not as raw data where that takes the same room: onnx-graphsurgeon would not look there."""
    if array.dtype in (np.float32, np.float64):
        return store.listed(array)
    return store.kept(onnx.numpy_helper.from_array(array))


def has_sparse(model: Model) -> bool:
    """True where an initializer of the model or of a body is sparse."""
    return any(_is_sparse(value) for graph in model.graphs() for value in graph.initializers)


def _is_sparse(value: Value) -> bool:
    return value.weight is not None and value.weight.is_sparse


def _weights(model: Model) -> Iterator[tuple[Value, Weight, Node | None]]:
    """Initializers, and what Constant nodes compute, bodies included."""
    for graph in model.graphs():
        for value in graph.initializers:
            assert value.weight is not None
            yield value, value.weight, None
        for node in graph.nodes:
            weight = node_constant(node, model.store)
            if weight is not None and (value_made := node.outputs[0]) is not None:
                yield value_made, weight, node


def _refusal(value: Value) -> str:
    """Why the weight has to stay dense, "" for no reason."""
    if value.is_input:
        return "it is an input as well"  # inference refuses the whole model
    if value.is_output:
        return "it is an output as well"  # onnxruntime gives back a sparse tensor
    return "annotations name it" if value in value.graph.pinned else ""


def _nonzero(array: NDArray[Any]) -> NDArray[np.int64]:
    """Linear indices, ascending, of elements that are not all zero bits: -0.0 is among them."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    return np.flatnonzero(bits)


def _varint_bytes(ascending: NDArray[np.int64]) -> int:
    """Bytes that the numbers take as varints: one for each begun 7 bits."""
    longer = (len(ascending) - np.searchsorted(ascending, 1 << bits) for bits in range(7, 63, 7))
    return len(ascending) + int(sum(longer))


def _dense_bytes(weight: Weight) -> int:
    return tensor_bytes(weight.data_type, weight.shape)


def _declare(model: Model, edit: Editor) -> None:
    """State the types that inference does not find: of what is computed from sparse tensors.

    Only of what reads them directly: from there on it finds its way.
    """
    for graph in model.graphs():
        for value in graph.initializers:
            for reader in value.consumers if _is_sparse(value) else ():
                node: Node | None = reader
                while node is not None:  # an If has no types where its bodies have none
                    _declare_outputs(node, model, edit)
                    node = node.graph.owner


def _declare_outputs(node: Node, model: Model, edit: Editor) -> None:
    for value in node.outputs:
        if value is None or value.is_output:
            continue
        known, declared = edit.types[value], value.declared_type
        if known is None or known.shape is None:
            continue
        if declared is not None and declared.tensor_type.HasField("shape"):
            continue
        if edit.allows("declare-type", value.name):
            edit.declare(value, _named(known, model.graph).proto())
            edit.record("declare-type", value.name, value.name, f"{value.name}: {known}")


def _named(known: TensorType, graph: Graph) -> TensorType:
    """With open sizes called as the inputs that have them say, and the others left open."""

    def named(size: int | str | None) -> int | str | None:
        found = _SIZE.fullmatch(size) if isinstance(size, str) else None
        info = graph.value_info.get(found[1]) if found else None
        if found is None or info is None:
            return size if isinstance(size, int) else None
        return info.type.tensor_type.shape.dim[int(found[2])].dim_param or None

    assert known.shape is not None
    return TensorType(known.data_type, tuple(named(size) for size in known.shape))


def _text(name: str, weight: Weight) -> str:
    kind = "sparse " if weight.is_sparse else ""
    return f"{name} {kind}[{','.join(map(str, weight.shape))}], {weight.nbytes} B"
