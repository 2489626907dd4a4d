"""Sizes of values that follow from the integers which a graph computes: more than inference finds.

Inference gives up where a shape is computed by arithmetic, or says -1 for what follows from the
rest. Each rule here gives the sizes of a node's output as terms; what it proves is told to the
editor, and inference goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final

from graphopt import size_terms
from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value
from graphopt.passes.canonicalize.liveness import needed_nodes
from graphopt.passes.canonicalize.shape_facts import ShapeFacts, is_size
from graphopt.proofs import TensorType, is_open, learn
from graphopt.size_terms import Size, Term

Dims = list[Size | None]
_ROUNDS: Final = 8  # each goes as deep as inference does between two shapes that it cannot read


def prove_sizes(model: Model, edit: Editor) -> ShapeFacts:
    """Prove what follows, as far as it goes; the facts that hold then, every node visited."""
    for _ in range(_ROUNDS):
        facts = ShapeFacts(model, edit)
        news = _News(edit)
        for graph in model.graphs():
            for node in graph.nodes:
                facts.visit(node)
                if graph is model.graph:
                    news.add(node, facts)
        if not news.tell(model.graph):
            break
        edit.forget_types()
    return facts


class _News:
    """What one round proves: shapes that were unknown, and what open sizes turn out to be."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._shapes: dict[Value, TensorType] = {}
        self._sizes: dict[Hashable, Size] = {}  # by the symbol that inference gave them

    def add(self, node: Node, facts: ShapeFacts) -> None:
        """See what follows for the node."""
        rule = _RULES.get(node.op)
        if rule is None or node.domain or not node.outputs or node.outputs[0] is None:
            return
        value = node.outputs[0]
        known = facts.type(value)
        try:
            found = rule(facts, node)
        except (LookupError, ValueError, TypeError):
            return  # a part that is not proven
        if known is None or found is None or not all(s is None or is_size(s) for s in found):
            return
        if known.shape is None:
            shape = tuple(
                None if size is None else self._edit.types.proofs.dim(size) for size in found
            )
            self._shapes[value] = TensorType(known.data_type, shape)
        elif len(known.shape) == len(found):
            for old, new in zip(known.shape, found, strict=True):
                self._learn(old, new)

    def _learn(self, old: int | str | None, new: Size | None) -> None:
        if new is not None and isinstance(old, str) and is_open(old):
            learn(self._sizes, old, new)

    def tell(self, graph: Graph) -> bool:
        """Let the editor know, open sizes by name everywhere; True where anything is new."""
        if not self._shapes and not self._sizes:
            return False
        proofs = self._edit.types.proofs
        for value in graph.values.values():
            known = self._shapes.get(value) or self._edit.types[value]
            if value.producer is None or known is None or known.shape is None:
                continue
            shape = tuple(
                proofs.dim(size_terms.replaced(proofs.size(size), self._sizes))
                if isinstance(size, str)
                else size
                for size in known.shape
            )
            if value in self._shapes or shape != known.shape:
                self._edit.prove(value, TensorType(known.data_type, shape))
        return True


def nonzero_atoms(graph: Graph, facts: ShapeFacts) -> set[Hashable]:
    """Sizes that are not zero wherever the model runs: those beside the free one of a Reshape.

    Where one of them is zero, the free one does not follow, and the run fails.
    """
    found: set[Hashable] = set()
    for node in needed_nodes(graph):
        if node.op != "Reshape" or node.domain or len(node.inputs) < 2:
            continue
        try:
            target = list(facts.elements(node.inputs[1]))
            sizes = facts.dims(node.inputs[0])
        except LookupError:
            continue
        if -1 in target:
            beside = [sizes[at] if size == 0 else size for at, size in enumerate(target)]
            others = size_terms.product(size for size in beside if size != -1)
            if isinstance(others, Term) and len(others.parts) == 1:
                found |= others.atoms
    return found


def reshaped(facts: ShapeFacts, node: Node) -> Dims:
    """The sizes that a Reshape gives, its free one solved for."""
    literal = node.attribute("allowzero")
    return size_terms.solved(
        facts.dims(node.inputs[0]),
        list(facts.elements(node.inputs[1])),
        zeros_copy=literal is None or literal.i == 0,
    )


def _expanded(facts: ShapeFacts, node: Node) -> Dims:
    sizes = facts.dims(node.inputs[0])
    target = list(facts.elements(node.inputs[1]))
    rank = max(len(sizes), len(target))
    left = [1] * (rank - len(sizes)) + sizes
    right = [1] * (rank - len(target)) + target
    return [_broadcast(a, b) for a, b in zip(left, right, strict=True)]


def _broadcast(a: Size, b: Size) -> Size | None:
    if a == 1:
        return b
    if b == 1 or a == b:
        return a
    numbers = [size for size in (a, b) if isinstance(size, int)]
    return numbers[0] if len(numbers) == 1 else None


def _filled(facts: ShapeFacts, node: Node) -> Dims:
    return list(facts.elements(node.inputs[0]))


def _range(facts: ShapeFacts, node: Node) -> Dims | None:
    start, end, step = (facts.elements(value).item() for value in node.inputs)
    return [end] if start == 0 and step == 1 and is_size(end) else None


def _sliced(facts: ShapeFacts, node: Node) -> Dims | None:
    """Where the ends are numbers, or the size itself; inference knows the rest."""
    if len(node.inputs) < 3:
        return None
    sizes: Dims = list(facts.dims(node.inputs[0]))
    starts, ends = facts.integers(node.inputs[1]), facts.elements(node.inputs[2])
    given = [*node.inputs[3:], None, None]
    axes = facts.integers(given[0]) if given[0] is not None else list(range(len(starts)))
    steps = facts.integers(given[1]) if given[1] is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        whole = start == 0 and step == 1 and (end == sizes[axis] or _reaches(end))
        if not whole:
            sizes[axis] = None
    return sizes


def _reaches(end: object) -> bool:
    return isinstance(end, int) and end >= 2**31 - 1


def _windowed(facts: ShapeFacts, node: Node) -> Dims | None:
    """Convolutions and pools that go in steps of one: what padding adds and the window takes."""
    sizes = facts.dims(node.inputs[0])
    spatial = len(sizes) - 2
    if node.op == "Conv":
        kernel = facts.dims(node.inputs[1])[2:]
        channels = facts.dims(node.inputs[1])[0]
    else:
        kernel, channels = list(facts.attribute(node, "kernel_shape")), sizes[1]
    pads = facts.attribute(node, "pads") or [0] * 2 * spatial
    steps = facts.attribute(node, "strides") or [1] * spatial
    spread = facts.attribute(node, "dilations") or [1] * spatial
    if facts.attribute(node, "auto_pad") != "NOTSET" or spatial != len(kernel):
        return None
    found: Dims = [sizes[0], channels]
    for axis, (size, window, step, every) in enumerate(
        zip(sizes[2:], kernel, steps, spread, strict=True)
    ):
        taken = size_terms.multiply(size_terms.subtract(window, 1), every)
        added = size_terms.subtract(pads[axis] + pads[axis + spatial], taken)
        found.append(size_terms.add(size, added) if step == 1 else None)
    return [size if size is None or is_size(size) else None for size in found]


_RULES: Final[dict[str, Callable[[ShapeFacts, Node], Dims | None]]] = {
    "AveragePool": _windowed,
    "ConstantOfShape": _filled,
    "Conv": _windowed,
    "Expand": _expanded,
    "MaxPool": _windowed,
    "Range": _range,
    "Reshape": reshaped,
    "Slice": _sliced,
}
