"""Linear layers: convolutions and products with constant weights, as matrices [M, K].

Pruning and low rank change weights; they and quantization ask what a layer's rows of inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value, Weight
from graphopt.observers import Observer, Patches

Array = NDArray[Any]

_PRODUCTS: Final = frozenset({"Gemm", "MatMul"})
_SETTLED_PADS: Final = (b"NOTSET", b"VALID")


@dataclass(frozen=True)
class Bias:
    """Where a layer's bias is: a constant at `slot` of `node`, None where one can be put there.

    `is_apart` says that another node adds it to what the layer gives.
    """

    node: Node
    slot: int
    value: Value | None
    is_apart: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer; `is_turned` where its weights are stored as [K, M].

    `weights` is the initializer, also where a Transpose stands between it and the node. `patches`
    are the rows that a convolution reads, None for a product, whose rows lie along the last axis.
    `is_own` is False where other nodes read the weights too.
    """

    node: Node
    source: Value
    weights: Value
    weight: Weight
    result: Value
    bias: Bias | None
    patches: Patches | None
    is_turned: bool
    is_own: bool

    @property
    def root(self) -> str:
        """The name that reports call it by: of what it computes."""
        return self.result.name

    @property
    def is_free(self) -> bool:
        """True where new weights are its own affair: nobody else reads them, its bias is known.

        What a bias that is computed, or that others read, adds is no part of what weights give.
        """
        return self.is_own and (self.node.op == "MatMul" or self.bias is not None)

    @property
    def groups(self) -> int:
        """Of the convolution; 1 for a product."""
        return self.patches.group if self.patches is not None else 1

    @property
    def shape(self) -> tuple[int, int]:
        """M outputs, K weights for each."""
        if self.is_turned:
            return self.weight.shape[1], self.weight.shape[0]
        return self.weight.shape[0], math.prod(self.weight.shape[1:])

    @property
    def taps(self) -> int:
        """Weights that one input channel has for each output: the kernel's size."""
        return math.prod(self.patches.kernel) if self.patches is not None else 1

    @property
    def channel_axis(self) -> int:
        """Along which axis source and result have their channels."""
        return 1 if self.patches is not None else -1

    def matrix(self, array: Array | None = None) -> Array:
        """Weights, the layer's own without an `array`, as [M, K]."""
        stored = self.weight.values if array is None else array
        return stored.T if self.is_turned else stored.reshape(len(stored), -1)

    def stored(self, matrix: Array) -> Array:
        """A matrix [M, K] in the shape in which weights are stored."""
        turned = matrix.T if self.is_turned else matrix.reshape(self.weight.shape)
        return np.ascontiguousarray(turned)

    def observer(self, kind: str) -> Observer:
        """Of the rows that it reads: "gram", or "regression" on what it gives."""
        target = self.result.name if kind == "regression" else None
        if self.patches is not None:
            return Observer(self.source.name, kind, patches=self.patches, target=target)  # type: ignore[arg-type]
        return Observer(self.source.name, kind, -1, target=target)  # type: ignore[arg-type]

    def parts(self) -> Iterator[slice]:
        """The rows of the matrix that belong to each group of the convolution."""
        per = self.shape[0] // self.groups
        for group in range(self.groups):
            yield slice(group * per, (group + 1) * per)


def linear_layers(edit: Editor, *, sparse: bool = False) -> list[Layer]:
    """All linear layers of the main graph with float32 weights, in order of computation.

    Their weights are dense, unless `sparse` ones are asked for too.
    """
    found = (layer_of(edit, node, sparse=sparse) for node in edit.model.graph.nodes)
    return [layer for layer in found if layer is not None]


def layer_of(edit: Editor, node: Node, *, sparse: bool = False) -> Layer | None:
    """The node as a linear layer, None where it is none."""
    if node.domain or node.op not in ("Conv", *_PRODUCTS) or len(node.inputs) < 2:
        return None
    source, result = node.inputs[0], node.outputs[0]
    weights, is_behind = _stored(node)
    weight = constant_of(weights, edit.model.store)
    if source is None or weights is None or result is None or weight is None:
        return None
    if weight.data_type != onnx.TensorProto.FLOAT or not weight.size:
        return None
    if weight.is_sparse and not sparse:
        return None
    if weights.weight is None:
        return None  # of a Constant node: what lifts those runs before
    if constant_of(source, edit.model.store) is not None:
        return None
    patches = convolution_patches(node, weight.shape[2:]) if node.op == "Conv" else None
    if node.op == "Conv" and patches is None:
        return None
    if node.op in _PRODUCTS and (len(weight.shape) != 2 or not _is_plain(node)):
        return None
    turned = node.op == "MatMul" or (node.op == "Gemm" and not _number(node, "transB", 0))
    turned ^= is_behind
    ways = [v for v in dict.fromkeys((weights, node.inputs[1])) if v is not None]
    own = all(sum(v.consumers.values()) == 1 and not v.is_output for v in ways)
    return Layer(node, source, weights, weight, result, _bias(edit, node), patches, turned, own)


def _stored(node: Node) -> tuple[Value | None, bool]:
    """What a node's weights are stored as, and whether a product reads them through a Transpose."""
    weights = node.inputs[1]
    turns = None if weights is None or node.op not in _PRODUCTS else weights.producer
    if turns is None or turns.domain or turns.op != "Transpose" or turns.graph is not node.graph:
        return weights, False
    order = turns.attribute("perm")
    if order is not None and list(order.ints) != [1, 0]:
        return weights, False
    return turns.inputs[0], True


def convolution_patches(node: Node, kernel: tuple[int, ...]) -> Patches | None:
    """The rows that a Conv reads; None where its padding is settled only where it runs."""
    stated = {a.name: onnx.helper.get_attribute_value(a) for a in node.proto.attribute}
    if not kernel or stated.get("auto_pad", b"NOTSET") not in _SETTLED_PADS:
        return None
    return Patches(
        kernel,
        tuple(stated.get("strides", ())),
        tuple(stated.get("pads", ())) if stated.get("auto_pad") != b"VALID" else (),
        tuple(stated.get("dilations", ())),
        stated.get("group", 1),
    )


def _is_plain(node: Node) -> bool:
    """True where a product multiplies rows of its first input by the weights, and nothing more."""
    if node.op == "MatMul":
        return True
    scales = _number(node, "alpha", 1.0), _number(node, "beta", 1.0)
    return scales == (1.0, 1.0) and not _number(node, "transA", 0)


def _bias(edit: Editor, node: Node) -> Bias | None:
    """Of a Conv or Gemm its own; behind a MatMul that of an Add that nobody else comes before."""
    assert node.outputs[0] is not None
    outputs = node.outputs[0]
    if node.op != "MatMul":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        return Bias(node, 2, value) if value is None or _is_own_vector(edit, value) else None
    readers = list(outputs.consumers)
    if len(readers) != 1 or outputs.is_output or readers[0].op != "Add" or readers[0].domain:
        return None
    (adder,) = readers
    slot = 1 if adder.inputs[0] is outputs else 0
    value = adder.inputs[slot]
    if value is None or adder.graph is not node.graph or not _is_own_vector(edit, value):
        return None
    weight, known = constant_of(node.inputs[1], edit.model.store), edit.types[outputs]
    is_long = weight is not None and constant_size(edit, value) == weight.shape[-1]
    return Bias(adder, slot, value, is_apart=True) if is_long and known is not None else None


def constant_size(edit: Editor, value: Value) -> int:
    """Elements of a constant; 0 for what is none."""
    weight = constant_of(value, edit.model.store)
    return 0 if weight is None else weight.size


def _is_own_vector(edit: Editor, value: Value) -> bool:
    """True for a float32 vector that one node reads, once."""
    weight = value.constant
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT or weight.is_sparse:
        return False
    own = sum(value.consumers.values()) == 1 and not value.is_output
    return len(weight.shape) == 1 and own


def _number(node: Node, name: str, default: float) -> float:
    stated = node.attribute(name)
    return default if stated is None else float(onnx.helper.get_attribute_value(stated))
