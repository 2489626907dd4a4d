"""One walk over the main graph, which finds out what goes together and what has to stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from graphopt.constants import CONSTANT, constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value, Weight
from graphopt.operators import SHAPE_READERS
from graphopt.passes.prune import elementwise, movement, products, reshaping, sizing
from graphopt.passes.prune.call import Call, Handler, is_scalar_type, sizes_of
from graphopt.passes.prune.labels import Axis, Coupling, Facts, Labels, Origin

HANDLERS: Final[dict[tuple[str, str], Handler]] = {
    **elementwise.HANDLERS,
    **movement.HANDLERS,
    **products.HANDLERS,
    **reshaping.HANDLERS,
    **sizing.HANDLERS,
}

# Slots at which a node may read a measured size: it passes it on, or shapes its result by it.
_PASSES: Final = {
    **{op: {0} for op in ("Cast", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze")},
    "Expand": {0},
    "Reshape": {0},
    "Concat": set(range(64)),
}
_SHAPES: Final = {"Reshape": {1}, "Expand": {1}, "ConstantOfShape": {0}, "Resize": {3}}
_MOST_NUMBERS: Final = 64  # elements of a constant that may be a shape, or choose channels
_MOST_CHOSEN: Final = 1 << 14
_FLOATS: Final = frozenset(
    (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    )
)


@dataclass(eq=False)
class Stored:
    """A constant with labels, and where nodes read it. A vector is its own for each reader."""

    value: Value
    uses: list[tuple[Node, int]]
    axes: tuple[Axis, ...]

    @property
    def readers(self) -> list[tuple[Node, int]]:
        """Uses of its numbers; all, where only its shape is used."""
        found = [use for use in self.uses if use[0].op not in SHAPE_READERS]
        return found or self.uses


@dataclass(frozen=True, eq=False)
class Place:
    """An output of a node, with the labels of one of its axes; -1: measured sizes that it holds."""

    node: Node
    slot: int
    axis: int
    labels: Labels


@dataclass(eq=False)
class Walk:
    """What is known of every value, and what follows for labels."""

    edit: Editor
    coupling: Coupling = field(default_factory=Coupling)
    places: list[Place] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    joined: dict[Node, list[Labels]] = field(default_factory=dict)
    _known: dict[Value, Facts] = field(default_factory=dict)
    _matrices: dict[Value, Stored] = field(default_factory=dict)

    def run(self) -> None:
        """Visit the nodes in order."""
        self.edit.settle()
        for node in self.edit.model.graph.nodes:
            if node.op != CONSTANT or node.domain:
                self._visit(node)
        uses = {use: stored for stored in self.stored for use in stored.uses}
        for reading in self.coupling.readings:
            stored = uses[reading.origin.node, reading.origin.slot]
            if len(stored.readers) > 1:  # what is refit for one reader would be for the others
                self.coupling.bar(reading.labels)

    def facts(self, value: Value) -> Facts | None:
        """What is known of a value, constants as vectors of integers only."""
        weight = constant_of(value, self.edit.model.store)
        return self._known.get(value) if weight is None else _integers(weight)

    def _visit(self, node: Node) -> None:
        inputs = [self._input(node, slot) for slot in range(len(node.inputs))]
        handler = HANDLERS.get((node.domain, node.op))
        if node.bodies or (node.domain, node.op, node.overload) in self.edit.model.functions:
            handler = None
        opset = self.edit.model.opsets.get("", 1)
        call = Call(node, inputs, self.coupling, self.edit, opset, self.facts)
        found = handler(call) if handler is not None else None
        if found is not None:
            found = self._checked(node, found)
        self._bar_measured(node, inputs, found)
        if found is None:
            self.coupling.bar(*inputs)
            found = [self._bare(value) for value in node.outputs]
        for slot, value in enumerate(node.outputs):
            if value is not None:
                self._note(node, slot, value, found[slot])
        self.joined[node] = [
            axis.labels
            for facts in inputs
            if facts is not None and facts.origin is None
            for axis in facts.axes or ()
            if axis.labels is not None
        ]

    def _note(self, node: Node, slot: int, value: Value, facts: Facts) -> None:
        self._known[value] = facts
        if _leaves(value):
            self.coupling.bar(facts)
        for axis, each in enumerate(facts.axes or ()):
            if each.labels is not None:
                self.places.append(Place(node, slot, axis, each.labels))
        for counted in facts.counted:
            self.places.append(Place(node, slot, -1, counted.labels))

    def _checked(self, node: Node, found: Sequence[Facts]) -> list[Facts] | None:
        """What a handler found with what inference knows; None where they contradict each other."""
        result = []
        for value, facts in zip(node.outputs, found, strict=False):
            proven = None if value is None else sizes_of(self.edit, value)
            if proven is None or facts.axes is None:
                result.append(facts)
                continue
            known = [axis.size for axis in facts.axes]
            if len(proven) != len(known) or any(
                isinstance(a, int) and isinstance(b, int) and a != b
                for a, b in zip(proven, known, strict=True)
            ):
                self.coupling.bar(*found)
                return None
            axes = tuple(
                Axis(b if size is None or isinstance(b, int) else size, axis.labels)
                for size, b, axis in zip(proven, known, facts.axes, strict=True)
            )
            result.append(Facts(axes, facts.numbers, facts.origin))
        if len(result) < len(node.outputs):
            self.coupling.bar(*found)
            return None
        return result

    def _bar_measured(
        self, node: Node, inputs: Sequence[Facts | None], found: Sequence[Facts] | None
    ) -> None:
        """Where a measured size goes into anything but shapes, it has to stay."""
        passes, shapes = (
            (_PASSES.get(node.op, set()), _SHAPES.get(node.op, set()))
            if not node.domain
            else (set[int](), set[int]())
        )
        is_passed = found is not None and found[0].numbers is not None
        for slot, facts in enumerate(inputs):
            if facts is None or not facts.counted or (slot in shapes and found is not None):
                continue
            if not (slot in passes and is_passed):
                self.coupling.bar(*facts.counted)

    def _bare(self, value: Value | None) -> Facts:
        proven = None if value is None else sizes_of(self.edit, value)
        return Facts(None if proven is None else tuple(Axis(size) for size in proven))

    def _input(self, node: Node, slot: int) -> Facts | None:
        value = node.inputs[slot]
        if value is None:
            return None
        weight = constant_of(value, self.edit.model.store)
        if weight is None:
            return self._known.get(value) or self._bare(value)
        if weight.data_type not in _FLOATS or weight.is_sparse or weight.size < 2:
            return _integers(weight)
        return self._labelled(value, weight, node, slot)

    def _labelled(self, value: Value, weight: Weight, node: Node, slot: int) -> Facts:
        """A constant of floats; where others than nodes of this graph see it, it stays."""
        is_vector = max(weight.shape) == weight.size
        stored = None if is_vector else self._matrices.get(value)
        if stored is None:
            is_kept = _leaves(value) and not is_vector
            axes = tuple(
                Axis(size, None if size < 2 or is_kept else self.coupling.fresh(size))
                for size in weight.shape
            )
            stored = Stored(value, [], axes)
            self.stored.append(stored)
            if not is_vector:
                self._matrices[value] = stored
        stored.uses.append((node, slot))
        origin = Origin(node, slot, tuple(range(len(stored.axes))))
        return Facts(stored.axes, None, origin)


def _integers(weight: Weight) -> Facts:
    axes = tuple(Axis(size) for size in weight.shape)
    limit = _MOST_CHOSEN if len(axes) == 1 else _MOST_NUMBERS
    if not is_scalar_type(weight) or len(axes) > 1 or weight.size > limit or weight.is_sparse:
        return Facts(axes)
    return Facts(axes, tuple(int(number) for number in weight.values.reshape(-1)))


def _leaves(value: Value) -> bool:
    """True where others than the nodes of its graph see the value."""
    outside = any(reader.graph is not value.graph for reader in value.consumers)
    return value.is_output or value in value.graph.pinned or outside
