"""Channels whose scale is free: values between weights that can take a factor in and out.

Dividing a channel by s > 0 where it is given and multiplying by s where it is read changes nothing
in real numbers, if everything between is positively homogeneous and keeps channels apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import networkx as nx
import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value

Array = NDArray[Any]

# f(s * x) = s * f(x) for s > 0, element by element or over the positions of one channel.
HOMOGENEOUS: Final = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "Identity",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
    }
)
_POOLS_AT: Final = 1  # the axis of channels of all that pools


@dataclass(frozen=True)
class Slot:
    """Where a constant meets the channels: they lie along `axis` of what the node reads at `slot`.

    Of a convolution's weights that read the channels, `axis` 1 holds those of one of `groups`.
    """

    node: Node
    slot: int
    axis: int
    groups: int = 1

    @property
    def value(self) -> Value:
        """The constant."""
        value = self.node.inputs[self.slot]
        assert value is not None
        return value

    def scaled(self, array: Array, factors: Array) -> Array:
        """The constant with each channel multiplied by its factor, float32.

        `factors` [C]; a constant that serves all channels is told apart by them.
        """
        wide = np.asarray(array, np.float64)
        if self.groups > 1:
            per = wide.shape[0] // self.groups
            each = np.repeat(factors.reshape(self.groups, -1), per, axis=0)
            result = wide * each.reshape(each.shape + (1,) * (wide.ndim - 2))
        else:
            shape = [1] * max(wide.ndim, 1)
            shape[self.axis] = -1
            result = wide * factors.reshape(shape)
        return np.asarray(result, np.float32)

    def by_channel(self, array: Array) -> Array:
        """Weights that read the channels as [groups, M / groups, C / groups, taps]."""
        if self.axis == 1:
            grouped = array.reshape(self.groups, -1, array.shape[1], *array.shape[2:])
            return grouped.reshape(*grouped.shape[:3], -1)
        return np.ascontiguousarray(array.T)[None, :, :, None]


@dataclass
class Channels:
    """Values whose channels are scaled together, and the constants that take it in and out.

    `axes` says along which axis each value has its channels, in order of computation; `givers`
    are weights, biases and addends to be divided, `readers` pairs of what is read and the weights
    to be multiplied. `size` is the number of channels.
    """

    axes: dict[Value, int] = field(default_factory=dict)
    givers: list[Slot] = field(default_factory=list)
    readers: list[tuple[Value, Slot]] = field(default_factory=list)
    size: int = 0

    @property
    def root(self) -> str:
        """The name that changes and reports call it by: of the value computed first."""
        return next(iter(self.axes)).name

    @property
    def slots(self) -> list[Slot]:
        """All places of constants that are to be scaled."""
        return [*self.givers, *(slot for _, slot in self.readers)]


def channels_of(edit: Editor) -> list[Channels]:
    """All sets of channels of the main graph that can be scaled, in order of computation."""
    return list(_Search(edit).found())


def readings_of(edit: Editor, value: Value) -> Channels | None:
    """The products that read what a LayerNormalization gives, whoever else does; None without."""
    node = value.producer
    search = _Search(edit)
    if node is None or value not in search.axes:
        return None
    givers = [slot for given, slot in search.givers if given is value and slot.node is node]
    readers = [(read, slot) for read, slot in search.readers if read is value]
    size = search.size(value, search.axes[value])
    if not (givers and readers) or size < 2:
        return None
    return Channels({value: search.axes[value]}, givers, readers, size)


class _Search:
    """One walk over the graph: values with channels, joined where one factor must hold for both.

    A value that anything unknown gives or reads is barred, and with it all that it is joined to.
    """

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self.axes: dict[Value, int] = {}
        self._joined: nx.Graph[Value] = nx.Graph()
        self._barred: set[Value] = set()
        self.givers: list[tuple[Value, Slot]] = []
        self.readers: list[tuple[Value, Slot]] = []
        for node in edit.model.graph.nodes:
            if node.domain or not self._visit(node):
                self._bar(node)

    def found(self) -> Iterator[Channels]:
        """The sets without a barred value that something gives and something reads."""
        numbers: dict[Value, int] = {}
        for number, group in enumerate(nx.connected_components(self._joined)):
            numbers |= dict.fromkeys(group, number)
        spoilt = {numbers[v] for v in self.axes if v in self._barred or _leaves(v)}
        sets: dict[int, Channels] = {}
        for value, axis in self.axes.items():
            if numbers[value] not in spoilt:
                sets.setdefault(numbers[value], Channels()).axes[value] = axis
        for value, slot in self.givers:
            if numbers[value] in sets:
                sets[numbers[value]].givers.append(slot)
        for value, slot in self.readers:
            if numbers[value] in sets:
                sets[numbers[value]].readers.append((value, slot))
        for channels in sets.values():
            sizes = {self.size(value, axis) for value, axis in channels.axes.items()}
            if channels.readers and len(sizes) == 1 and (size := sizes.pop()) > 1:
                channels.size = size
                yield channels

    # -- nodes: False for one through which no factor passes ---------------------------------------

    def _visit(self, node: Node) -> bool:
        if len(node.outputs) != 1 or node.outputs[0] is None or not node.inputs:
            return False
        if node.op in ("Conv", "Gemm", "MatMul"):
            return self._product(node)
        if node.op == "LayerNormalization":
            return self._normalisation(node)
        if node.op in ("Add", "Mul"):
            return self._binary(node)
        source = node.inputs[0]
        if source is None or source not in self.axes:
            return False
        axis = self.axes[source]
        if node.op in HOMOGENEOUS and ("Pool" not in node.op or axis == _POOLS_AT):
            return self._pass(source, node.outputs[0], axis)
        if node.op == "Transpose" and (perm := node.attribute("perm")) is not None:
            return self._pass(source, node.outputs[0], list(perm.ints).index(axis))
        if node.op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
            moved = self._moved(source, axis, node.outputs[0])
            return moved is not None and self._pass(source, node.outputs[0], moved)
        return False

    def _product(self, node: Node) -> bool:
        """Weights read the channels of their input and give those of their result."""
        source, weights, result = node.inputs[0], node.inputs[1], node.outputs[0]
        assert result is not None
        shape = self._shape(weights)
        if source is None or shape is None:
            return False
        if node.op == "Conv":
            at, read, given, groups = 1, 1, 0, int(_number(node, "group", 1))
        else:
            turned = node.op == "Gemm" and bool(_number(node, "transB", 0))
            rank = self._rank(source)
            if len(shape) != 2 or rank < 2 or (node.op == "Gemm" and _number(node, "transA", 0)):
                return False
            at, read, given, groups = rank - 1, int(turned), int(not turned), 1
        if source in self.axes and self.axes[source] == at:
            self.readers.append((source, Slot(node, 1, read, groups)))
        elif source in self.axes:
            self._barred.add(source)
        self._give(result, at, Slot(node, 1, given))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not self._addend(bias, shape[given], result, Slot(node, 2, -1)):
            self._barred.add(result)
        return True

    def _normalisation(self, node: Node) -> bool:
        """Gamma and beta give the channels; what they normalise takes no factor."""
        source, result = node.inputs[0], node.outputs[0]
        assert result is not None
        rank = self._rank(source)
        if rank < 1 or int(_number(node, "axis", -1)) not in (-1, rank - 1):
            return False
        shapes = [self._shape(value) for value in node.inputs[1:] if value is not None]
        if any(shape is None or len(shape) != 1 for shape in shapes):
            return False
        self._bar(node)
        for slot in range(1, 1 + len(shapes)):
            self._give(result, rank - 1, Slot(node, slot, -1))
        return True

    def _binary(self, node: Node) -> bool:
        """Sums of scaled values or with constants; products of one scaled value with another."""
        first, second = node.inputs
        result = node.outputs[0]
        if first is None or second is None or result is None:
            return False
        for source, other, slot in ((first, second, 1), (second, first, 0)):
            shape = self._shape(other)
            if shape is None or source not in self.axes:
                continue
            axis = self.axes[source]
            if not self._alike(source, result):
                return False
            if node.op == "Add":
                place = Slot(node, slot, axis - self._rank(source))
                if not self._addend(other, self.size(source, axis), result, place):
                    return False
            return self._pass(source, result, axis)
        if node.op == "Add":
            both = first in self.axes and second in self.axes
            if not both or self.axes[first] != self.axes[second]:
                return False
            if not (self._alike(first, result) and self._alike(second, result)):
                return False
            self._pass(first, result, self.axes[first])
            return self._pass(second, result, self.axes[second])
        return self._gate(first, second, result)

    def _gate(self, first: Value, second: Value, result: Value) -> bool:
        """x * g(x): the factor goes with the operand that is no gate."""
        for source, gate in ((first, second), (second, first)):
            if source in self.axes and gate not in self.axes and self._alike(source, result):
                return self._pass(source, result, self.axes[source])
        return False

    # -- values ------------------------------------------------------------------------------------

    def _pass(self, source: Value, result: Value | None, axis: int) -> bool:
        assert result is not None
        self.axes[result] = axis
        self._joined.add_edge(source, result)
        return True

    def _give(self, result: Value, axis: int, slot: Slot) -> None:
        self.axes[result] = axis
        self._joined.add_node(result)
        self.givers.append((result, slot))

    def _addend(self, value: Value, size: int, result: Value, slot: Slot) -> bool:
        """A constant that adds a number to each channel; False for one of another shape."""
        shape = self._shape(value)
        if shape is None or len(shape) < -slot.axis or shape[slot.axis] != size:
            return False
        if np.prod(shape) != size:
            return False
        self.givers.append((result, slot))
        return True

    def _bar(self, node: Node) -> None:
        self._barred.update(v for v in (*node.inputs, *node.outputs) if v in self.axes and v)

    def _moved(self, source: Value, axis: int, result: Value | None) -> int | None:
        """Where the channels are after a reshape that keeps them an axis."""
        before, after = self._dims(source), self._dims(result)
        if before is None or after is None:
            return None
        known = [dim for dim in before[:axis] if dim != 1]
        if None in known:
            return None
        for at, dim in enumerate(after):
            if dim == before[axis] and [d for d in after[:at] if d != 1] == known:
                return at
        return None

    def _alike(self, source: Value, result: Value) -> bool:
        """True where the operator does not broadcast the value along its channels or others."""
        before, after = self._dims(source), self._dims(result)
        return before is not None and before == after and None not in before

    def _dims(self, value: Value | None) -> list[Any] | None:
        known = None if value is None else self._edit.types[value]
        return None if known is None or known.shape is None else list(known.shape)

    def _rank(self, value: Value | None) -> int:
        dims = self._dims(value)
        return -1 if dims is None else len(dims)

    def size(self, value: Value, axis: int) -> int:
        dims = self._dims(value)
        return dims[axis] if dims is not None and isinstance(dims[axis], int) else 0

    def _shape(self, value: Value | None) -> tuple[int, ...] | None:
        """Of a float32 constant that has numbers."""
        weight = constant_of(value, self._edit.model.store)
        is_float = weight is not None and weight.data_type == onnx.TensorProto.FLOAT
        return weight.shape if weight is not None and is_float and weight.size else None


def _leaves(value: Value) -> bool:
    """True where others than the nodes of its graph see the value."""
    outside = any(reader.graph is not value.graph for reader in value.consumers)
    return value.is_output or value in value.graph.pinned or outside


def _number(node: Node, name: str, default: float) -> float:
    stated = node.attribute(name)
    return default if stated is None else float(onnx.helper.get_attribute_value(stated))
