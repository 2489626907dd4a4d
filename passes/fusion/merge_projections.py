"""Several products of one value with weights of their own: those of attention, mostly.

onnxruntime takes as long for the one product as for the several where the time goes into the
arithmetic (BERT), and less where it goes into calls of operators (a small vision transformer, 4 to
6 % of all). What quantizes comes after, and meets one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.match import Context, input_slot

_RULE: Final = "merge-projections"
_FLOATS: Final = (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
_MIN_OPSET: Final = 5  # Reshape states its target as an input


@dataclass(frozen=True)
class MergeProjections:
    """MatMul(x, a) + c, MatMul(x, b) + d, ... => Split(MatMul(x, [a b ...]) + [c d ...]).

    Where the heads of each are taken apart, that is done once as well, and Split hands out heads.
    Only where it makes fewer nodes, and no weight is stored twice.
    """

    name: ClassVar[str] = "merge-projections"

    def run(self, model: Model, edit: Editor) -> None:
        if model.opsets.get("", 1) < _MIN_OPSET:
            return
        context = Context(model, edit.types)
        is_changed = False
        for graph in model.graphs():
            for group in _groups(graph, context):
                is_changed |= _merged(group, context, edit)
        if is_changed:
            edit.forget_types()


@dataclass(frozen=True)
class _Heads:
    """How a projection is taken apart: a Reshape to [*rows, heads, size]."""

    node: Node
    rows: tuple[int, ...]
    heads: int
    size: int
    result: Value


@dataclass(frozen=True)
class _Projection:
    """MatMul(x, weight), with what it is added to, and how it goes on, as far as it is alone."""

    x: Value
    rank: int
    weight: Weight
    bias: Weight | None
    nodes: tuple[Node, ...]
    result: Value
    heads: _Heads | None

    @property
    def width(self) -> int:
        return self.weight.shape[1]


def _groups(graph: Graph, context: Context) -> list[list[_Projection]]:
    """The projections of each value, in the order of the graph."""
    found: dict[Value, list[_Projection]] = {}
    for node in graph.nodes:
        projection = _projection(node, context)
        if projection is not None:
            found.setdefault(projection.x, []).append(projection)
    return [group for group in found.values() if len(group) > 1]


def _projection(node: Node, context: Context) -> _Projection | None:
    if node.op != "MatMul" or node.domain or len(node.inputs) != 2:
        return None
    x, stored = node.inputs
    result, weight = node.outputs[0], context.constant(stored)
    if x is None or stored is None or result is None or weight is None or weight.is_sparse:
        return None
    if len(weight.shape) != 2 or 0 in weight.shape or weight.data_type not in _FLOATS:
        return None
    known = context.types[x]
    if known is None or known.rank is None or known.rank < 2 or stored.consumers != {node: 1}:
        return None
    nodes, bias = [node], None
    add = _only_reader(result)
    if add is not None and add.op == "Add":
        bias = _bias(add, result, weight.shape[1], known.rank, context)
        if bias is not None and add.outputs[0] is not None:
            nodes, result = [node, add], add.outputs[0]
    heads = _heads(result, weight.shape[1], known.rank - 1, context)
    return _Projection(x, known.rank, weight, bias, tuple(nodes), result, heads)


def _only_reader(value: Value) -> Node | None:
    """The node of the same graph that alone needs the value, and reads it once."""
    if value.is_output or value in value.graph.pinned or len(value.consumers) != 1:
        return None
    ((reader, count),) = value.consumers.items()
    return reader if count == 1 and reader.graph is value.graph and not reader.domain else None


def _bias(add: Node, product: Value, width: int, rank: int, context: Context) -> Weight | None:
    """What is added, where that is one number for each column."""
    other = next((value for value in add.inputs if value is not product), None)
    weight = context.constant(other)
    if weight is None or weight.is_sparse or weight.data_type not in _FLOATS:
        return None
    is_row = len(weight.shape) <= rank and weight.size == (weight.shape or (1,))[-1]
    return weight if is_row and weight.size in (1, width) else None


def _heads(value: Value, width: int, leading: int, context: Context) -> _Heads | None:
    """How [*leading, width] is taken apart, the rows standing as they stood or not."""
    reshape = _only_reader(value)
    if reshape is None or reshape.op != "Reshape" or reshape.inputs[0] is not value:
        return None
    target, result = context.constant(reshape.inputs[1]), reshape.outputs[0]
    literal = reshape.attribute("allowzero")
    if target is None or result is None or (literal is not None and literal.i):
        return None
    if target.size < 3:
        return None
    *rows, heads, size = (int(number) for number in target.values)
    if -1 in (heads, size) and rows == [0] * leading:  # the free one is what is left of the width
        heads, size = (width // abs(size), size) if heads == -1 else (heads, width // abs(heads))
    if min(heads, size) < 1 or heads * size != width:
        return None
    return _Heads(reshape, tuple(rows), heads, size, result)


# -- putting them together -------------------------------------------------------------------------


def _merged(group: Sequence[_Projection], context: Context, edit: Editor) -> bool:
    """Merge them if that makes fewer nodes; True where it does."""
    if len({(each.weight.data_type, each.weight.shape[0]) for each in group}) > 1:
        return False
    heads = [each.heads for each in group if each.heads is not None]
    apart = len(heads) == len(group) and len({(each.rows, each.size) for each in heads}) == 1
    plan = _Plan(group, heads if apart else [], context, edit)
    try:
        return plan.pays and edit.allows(_RULE, plan.root) and plan.commit()
    except ModelError:
        return False  # a weightless model has nothing to put together


class _Plan:
    """The nodes that take the place of a group."""

    def __init__(
        self, group: Sequence[_Projection], heads: Sequence[_Heads], context: Context, edit: Editor
    ) -> None:
        self.group = group
        self.edit = edit
        self.context = context
        self.old = [node for each in group for node in each.nodes]
        self.old += [each.node for each in heads]
        self.results = [each.result for each in heads or group]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Callable[[], NDArray[Any]]] = {}
        last = self._product()
        if heads:  # side by side, those of the first projection before those of the next
            counts, (rows, size) = [each.heads for each in heads], (heads[0].rows, heads[0].size)
            target = self._constant(lambda: np.array([*rows, sum(counts), size], np.int64))
            self._split(self._add("Reshape", [last, target]), len(rows), counts)
        else:
            self._split(last, group[0].rank - 1, [each.width for each in group])

    @property
    def root(self) -> str:
        return self.results[0].name

    @property
    def pays(self) -> bool:
        return len(self.nodes) < len(self.old)

    def _product(self) -> str:
        weights = self._constant(lambda: _joined([each.weight.values for each in self.group]))
        last = self._add("MatMul", [self.group[0].x.name, weights])
        if all(each.bias is None for each in self.group):
            return last
        return self._add("Add", [last, self._constant(lambda: _joined(_biases(self.group)))])

    def _split(self, value: str, axis: int, sizes: Sequence[int]) -> None:
        outputs = [each.name for each in self.results]
        if input_slot("Split", "split", self.context.opset) is None:
            self._add("Split", [value], outputs, axis=axis, split=list(sizes))
        else:
            stated = self._constant(lambda: np.array(sizes, np.int64))
            self._add("Split", [value, stated], outputs, axis=axis)

    def _add(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        name = self._name(op)
        node = onnx.helper.make_node(op, inputs, outputs or [name], name, **attributes)
        self.nodes.append(node)
        return str(node.output[0])

    def _name(self, of: str) -> str:
        return self.edit.unique(f"{self.root}/{of}")

    def _constant(self, make: Callable[[], NDArray[Any]]) -> str:
        name = self._name("constant")
        self.constants[name] = make
        return name

    def commit(self) -> bool:
        """Edit. Raises ModelError, before anything is changed, where the model has no weights."""
        tensors = {
            name: onnx.numpy_helper.from_array(make(), name)
            for name, make in self.constants.items()
        }
        edit, x = self.edit, self.group[0].x
        graph, place = self.old[0].graph, self.old[0].position
        before = "\n".join(node.text() for node in self.old)
        for node in self.old:
            edit.detach_node(node)
        for value in (value for node in self.old for value in node.outputs):
            if value is not None and value not in self.results:
                edit.remove_value(value)
        known: dict[str, Value] = {x.name: x}
        for name, tensor in tensors.items():
            known[name] = edit.add_constant(graph, name, tensor, place)
        results = {value.name: value for value in self.results}
        made = [edit.add_node(graph, proto, known, results, place, _RULE) for proto in self.nodes]
        edit.record(_RULE, self.root, before, "\n".join(node.text() for node in made))
        return True


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays, axis=-1)


def _biases(group: Sequence[_Projection]) -> list[NDArray[Any]]:
    """A row of numbers for each, zeros where nothing is added."""
    kind = group[0].weight.values.dtype
    return [
        np.zeros(each.width, kind)
        if each.bias is None
        else np.broadcast_to(each.bias.values.reshape(-1), each.width)
        for each in group
    ]
