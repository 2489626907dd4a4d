"""Sizes that are proven of values, and the small integers that a graph computes from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import size_terms
from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Model, Node, Value
from graphopt.match import Context, stated
from graphopt.proofs import TensorType
from graphopt.size_terms import Open, Size, Term

_MOST: Final = 64  # elements; shapes have fewer
_KINDS: Final[dict[int, type[np.generic]]] = {
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.BOOL: np.bool_,
}

Elements = NDArray[Any]
"""What a small tensor of integers or truth values holds: a Size each, a bool, or None."""


class ShapeFacts:
    """What is proven of the elements of shapes and of what is computed from them."""

    def __init__(self, model: Model, edit: Editor) -> None:
        self._context = Context(model, edit.types)
        self._known: dict[Value, Elements] = {}

    def visit(self, node: Node) -> NDArray[Any] | None:
        """All elements of what the node computes, where they are proven numbers.

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
        known = self.type(node.outputs[0])
        if known is None or known.data_type not in _KINDS:
            return None
        if any(isinstance(element, Term) or element is None for element in found.flat):
            return None
        try:
            return found.astype(_KINDS[known.data_type])
        except OverflowError:
            return None  # which a run would wrap around

    def type(self, value: Value | None) -> TensorType | None:
        """What is proven of the value's type."""
        return self._context.types[value] if value is not None else None

    def elements(self, value: Value | None) -> Elements:
        """Raises LookupError where nothing is known."""
        if value is None:
            raise LookupError("left out")
        if value in self._known:
            return self._known[value]
        weight = constant_of(value, self._context.model.store)
        if weight is not None and weight.size <= _MOST and weight.data_type in _KINDS:
            return weight.values.astype(object)
        known = self.type(value)
        if known is None or known.shape is None or known.data_type not in _KINDS:
            raise LookupError(value.name)
        sizes = [size for size in known.shape if isinstance(size, int)]
        if len(sizes) < len(known.shape) or int(np.prod(sizes)) > _MOST:
            raise LookupError(value.name)
        if known.data_type == onnx.TensorProto.BOOL:
            return np.full(sizes, None, object)
        count = int(np.prod(sizes))
        opaque = [size_terms.atom(Open(value, at, is_size=False)) for at in range(count)]
        return np.array(opaque, object).reshape(sizes)

    def integers(self, value: Value | None) -> list[int]:
        """Elements that are all numbers. Raises LookupError where one is not."""
        found = self.elements(value).reshape(-1)
        if any(isinstance(element, Term) or element is None for element in found):
            raise LookupError("not proven")
        return [int(element) for element in found]

    def dims(self, value: Value | None) -> list[Size]:
        """The sizes of a value. Raises LookupError where not even the rank is proven."""
        known = self.type(value)
        if known is None or known.shape is None:
            raise LookupError("unknown rank")
        return [self._dim(value, axis, size) for axis, size in enumerate(known.shape)]

    def _dim(self, value: Value | None, axis: int, size: int | str | None) -> Size:
        if isinstance(size, int):
            return size
        if size is None:
            return size_terms.atom(Open(value, axis, is_size=True))
        return self._context.types.proofs.size(size)

    def attribute(self, node: Node, name: str) -> Any:
        """As a plain attribute or as the input that it became; None where it is left out."""
        return stated(node, name, self._context)

    @property
    def opset(self) -> int:
        return self._context.opset


def is_size(element: object) -> bool:
    """True for what is never negative."""
    return (
        element.is_size if isinstance(element, Term) else isinstance(element, int) and element >= 0
    )


def _objects(elements: Sequence[object]) -> Elements:
    found = np.empty(len(elements), object)
    found[:] = elements
    return found


def _shape(facts: ShapeFacts, node: Node) -> Elements:
    dims = facts.dims(node.inputs[0])
    start, end = (node.attribute(name) for name in ("start", "end"))
    return _objects(dims[start.i if start else 0 : end.i if end else None])


def _scalar(element: object) -> Elements:
    found = np.empty((), object)
    found[()] = element
    return found


def _size(facts: ShapeFacts, node: Node) -> Elements:
    return _scalar(size_terms.product(facts.dims(node.inputs[0])))


def _gather(facts: ShapeFacts, node: Node) -> Elements:
    data, indices = facts.elements(node.inputs[0]), facts.elements(node.inputs[1])
    axis = node.attribute("axis")
    at = np.array(facts.integers(node.inputs[1]), np.int64).reshape(indices.shape)
    found = np.empty((), object)
    taken = np.take(data, at, axis=axis.i if axis else 0)
    if isinstance(taken, np.ndarray):
        return taken
    found[()] = taken
    return found


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


def _reshape(facts: ShapeFacts, node: Node) -> Elements | None:
    data = facts.elements(node.inputs[0])
    target = facts.attribute(node, "shape")
    return data.reshape([int(size) for size in target]) if 0 not in target else None


def _same(facts: ShapeFacts, node: Node) -> Elements:
    return facts.elements(node.inputs[0])


def _cast(facts: ShapeFacts, node: Node) -> Elements | None:
    """Between integers, where nothing is cut off: a size over 31 bits would be cut in the model."""
    known, target = facts.type(node.inputs[0]), node.attribute("to")
    kinds = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    if known is None or target is None or target.i not in kinds or known.data_type not in kinds:
        return None
    elements = facts.elements(node.inputs[0])
    narrow = target.i == onnx.TensorProto.INT32 and known.data_type != target.i
    fits = (isinstance(e, str) or _fits(e) for e in elements.flat)
    return elements if not narrow or all(fits) else None


def _fits(element: object) -> bool:
    if isinstance(element, Term):
        return len(element.parts) == 1 and element.is_size
    return isinstance(element, int) and abs(element) < 1 << 31


def _arithmetic(
    combine: Callable[[Size, Size], Size | None],
) -> Callable[[ShapeFacts, Node], Elements | None]:
    def rule(facts: ShapeFacts, node: Node) -> Elements | None:
        a, b = np.broadcast_arrays(*(facts.elements(value) for value in node.inputs))
        if any(isinstance(e, bool) or e is None for e in (*a.flat, *b.flat)):
            return None
        found = [combine(x, y) for x, y in zip(a.flat, b.flat, strict=True)]
        return None if None in found else _objects(found).reshape(a.shape)

    return rule


def _divide(a: Size, b: Size) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a >= 0 and b > 0 else None  # below zero Div truncates
    return size_terms.quotient(a, b)


def _equal(facts: ShapeFacts, node: Node) -> Elements | None:
    a, b = np.broadcast_arrays(*(facts.elements(value) for value in node.inputs))
    found = [_are_equal(x, y) for x, y in zip(a.flat, b.flat, strict=True)]
    return _objects(found).reshape(a.shape)


def _are_equal(a: object, b: object) -> bool | None:
    """None where neither is proven."""
    if a is None or b is None:
        return None
    if not (isinstance(a, Term) or isinstance(b, Term)):
        return bool(a == b)
    gap = size_terms.subtract(a, b)  # type: ignore[arg-type]
    if isinstance(gap, int):
        return gap == 0
    sizes = (a, b) if isinstance(a, Term) else (b, a)
    below = isinstance(sizes[1], int) and sizes[1] < 0 and is_size(sizes[0])
    return False if below else None


def _where(facts: ShapeFacts, node: Node) -> Elements | None:
    picks, a, b = np.broadcast_arrays(*(facts.elements(value) for value in node.inputs))
    if any(pick is None for pick in picks.flat):
        return None
    chosen = [x if p else y for p, x, y in zip(picks.flat, a.flat, b.flat, strict=True)]
    return _objects(chosen).reshape(picks.shape)


_RULES: Final[dict[str, Callable[[ShapeFacts, Node], Elements | None]]] = {
    "Add": _arithmetic(size_terms.add),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _arithmetic(_divide),
    "Equal": _equal,
    "Gather": _gather,
    "Identity": _same,
    "Mul": _arithmetic(size_terms.multiply),
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(size_terms.subtract),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
