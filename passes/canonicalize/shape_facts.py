"""Sizes that are proven of values, as the constants that a graph computes from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Value
from graphopt.match import Context, stated

_MOST: Final = 64  # elements; shapes have fewer

Elements = NDArray[Any]
"""Integers of a small tensor, None where one is not proven."""


class ShapeFacts:
    """What is proven of the elements of shapes and of what is cut out of them."""

    def __init__(self, model: Model, edit: Editor) -> None:
        self._context = Context(model, edit.types)
        self._known: dict[Value, Elements] = {}

    def visit(self, node: Node) -> NDArray[np.int64] | None:
        """All elements of what the node computes, where they are proven and it is no constant.

        Nodes are to be visited in topological order.
        """
        rule = _RULES.get(node.op)
        if rule is None or node.domain or len(node.outputs) != 1 or node.outputs[0] is None:
            return None
        try:
            found = rule(self, node)
        except (LookupError, ValueError, TypeError):
            return None  # an index out of range, a part that is not proven: nothing follows
        if found is None or found.size > _MOST:
            return None
        self._known[node.outputs[0]] = found
        if any(element is None for element in found.flat):
            return None
        return found.astype(np.int64)

    def elements(self, value: Value | None) -> Elements:
        """Raises LookupError where nothing is known."""
        if value is None:
            raise LookupError("left out")
        if value in self._known:
            return self._known[value]
        weight = constant_of(value, self._context.model.store)
        if weight is None or weight.size > _MOST or weight.data_type != onnx.TensorProto.INT64:
            raise LookupError(value.name)
        return weight.values.astype(object)

    def integers(self, value: Value | None) -> list[int]:
        found = self.elements(value)
        if any(element is None for element in found.flat):
            raise LookupError("not proven")
        return [int(element) for element in found.flat]

    def dims(self, value: Value | None) -> list[int | None]:
        known = self._context.types[value] if value is not None else None
        if known is None or known.shape is None:
            raise LookupError("unknown rank")
        return [dim if isinstance(dim, int) else None for dim in known.shape]

    def attribute(self, node: Node, name: str) -> Any:
        """As a plain attribute or as the input that it became; None where it is left out."""
        return stated(node, name, self._context)

    @property
    def opset(self) -> int:
        return self._context.opset


def _shape(facts: ShapeFacts, node: Node) -> Elements:
    dims = facts.dims(node.inputs[0])
    start, end = (node.attribute(name) for name in ("start", "end"))
    return np.array(dims[start.i if start else 0 : end.i if end else None], object)


def _size(facts: ShapeFacts, node: Node) -> Elements | None:
    dims = facts.dims(node.inputs[0])
    if None in dims:
        return None
    return np.array(int(np.prod([dim or 0 for dim in dims], dtype=np.int64)), object)


def _gather(facts: ShapeFacts, node: Node) -> Elements:
    data, indices = facts.elements(node.inputs[0]), facts.elements(node.inputs[1])
    axis = node.attribute("axis")
    at = np.array(facts.integers(node.inputs[1]), np.int64).reshape(indices.shape)
    return np.asarray(np.take(data, at, axis=axis.i if axis else 0), object)


def _slice(facts: ShapeFacts, node: Node) -> Elements | None:
    data = facts.elements(node.inputs[0])
    starts, ends = facts.attribute(node, "starts"), facts.attribute(node, "ends")
    axes = facts.attribute(node, "axes")
    steps = facts.attribute(node, "steps") if facts.opset >= 10 else None
    if data.ndim != 1 or len(starts) != 1 or (axes is not None and int(axes[0]) not in (0, -1)):
        return None
    step = 1 if steps is None else int(steps[0])
    return data[int(starts[0]) : int(ends[0]) : step]


def _concat(facts: ShapeFacts, node: Node) -> Elements | None:
    parts = [facts.elements(value) for value in node.inputs]
    if any(part.ndim != 1 for part in parts):
        return None
    return np.concatenate(parts)


def _squeeze(facts: ShapeFacts, node: Node) -> Elements | None:
    data = facts.elements(node.inputs[0])
    axes = facts.attribute(node, "axes")
    return data.reshape(()) if data.shape == (1,) and (axes is None or len(axes)) else None


def _unsqueeze(facts: ShapeFacts, node: Node) -> Elements | None:
    data = facts.elements(node.inputs[0])
    axes = facts.attribute(node, "axes")
    return data.reshape(1) if data.ndim == 0 and len(axes) == 1 else None


def _same(facts: ShapeFacts, node: Node) -> Elements:
    return facts.elements(node.inputs[0])


def _cast(facts: ShapeFacts, node: Node) -> Elements | None:
    target = node.attribute("to")
    wide = target is not None and target.i == onnx.TensorProto.INT64
    return facts.elements(node.inputs[0]) if wide else None


_RULES: Final[dict[str, Callable[[ShapeFacts, Node], Elements | None]]] = {
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Identity": _same,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
