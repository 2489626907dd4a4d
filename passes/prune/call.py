"""A node as its handler sees it: facts of its inputs, what it states, and where to note more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Value, Weight
from graphopt.passes.prune.labels import Axis, Coupling, Facts, Fix, Labels, Reading
from graphopt.size_terms import Size


@dataclass(frozen=True, eq=False)
class Call:
    """One node. `inputs` are None where an optional one is left out."""

    node: Node
    inputs: Sequence[Facts | None]
    coupling: Coupling
    edit: Editor
    opset: int
    facts: Callable[[Value], Facts | None]

    @property
    def axes(self) -> tuple[Axis, ...] | None:
        """Of the first input."""
        return self.inputs[0].axes if self.inputs and self.inputs[0] is not None else None

    def input(self, slot: int) -> Facts | None:
        """What is known of an input; None where it is left out."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def integer(self, name: str, default: int) -> int:
        """An attribute of one integer."""
        stated = self.node.attribute(name)
        return default if stated is None else int(stated.i)

    def text(self, name: str, default: str) -> str:
        """An attribute of text."""
        stated = self.node.attribute(name)
        return default if stated is None else stated.s.decode("utf-8", "replace")

    def states(self, name: str) -> list[int] | None:
        """An attribute of integers; None where it is left out."""
        stated = self.node.attribute(name)
        return None if stated is None else list(stated.ints)

    def setting(self, name: str, slot: int) -> list[int] | None:
        """Integers that are an attribute in older versions and an input in later ones.

        None where they are left out or not known.
        """
        stated = self.states(name)
        if stated is not None:
            return stated
        given = self.input(slot)
        return None if given is None else given.literals

    def constant(self, slot: int) -> Weight | None:
        """The constant that an input is."""
        value = self.node.inputs[slot] if slot < len(self.node.inputs) else None
        return constant_of(value, self.edit.model.store)

    def proven(self, slot: int = 0) -> tuple[Size | None, ...] | None:
        """The sizes of an output as far as inference knows them."""
        value = self.node.outputs[slot]
        return None if value is None else sizes_of(self.edit, value)

    def axis(self, name: str, default: int, rank: int) -> int:
        """An attribute that names an axis, counted from the front; -1 for one that is not there."""
        stated = self.integer(name, default)
        stated += rank if stated < 0 else 0
        return stated if 0 <= stated < rank else -1

    def bar(self, *what: Axis | Facts | Labels | None) -> None:
        """Let the labels stay."""
        self.coupling.bar(*what)

    def read(self, weights: Facts, axis: int, slot: int, at: int) -> None:
        """Note that the node sums over an axis of the weights, and axis `at` of input `slot`."""
        self._read(weights, axis, self.node.inputs[slot], at, is_recurrent=False)

    def read_own(self, weights: Facts, axis: int, slot: int, at: int) -> None:
        """Note that the node sums over axis `at` of its own output `slot`, a step later."""
        self._read(weights, axis, self.node.outputs[slot], at, is_recurrent=True)

    def _read(
        self, weights: Facts, axis: int, value: Value | None, at: int, *, is_recurrent: bool
    ) -> None:
        if weights.axes is None or (labels := weights.axes[axis].labels) is None:
            return
        origin = weights.origin
        if origin is None or value is None:
            self.bar(labels)
            return
        read = Reading(origin, origin.axes[axis], labels, self.node, value, at, is_recurrent)
        self.coupling.readings.append(read)

    def fix_attribute(self, name: str, index: int | None, labels: Labels, watched: Labels) -> None:
        """Note that an attribute counts these labels."""
        self.coupling.fixes.append(Fix(self.node, name, index, labels, watched))

    def _is_long(self, slot: int) -> bool:
        """True where a constant of its type, int64 unless it is one already, can be put there."""
        if self.constant(slot) is not None:
            return True
        value = self.node.inputs[slot]
        known = None if value is None else self.edit.types[value]
        return known is not None and known.data_type == onnx.TensorProto.INT64

    def fix_indices(self, labels: Labels) -> None:
        """Note that input 1 holds indices into an axis with these labels."""
        given = self.input(1)
        if given is None or given.literals is None or not self._is_long(1):
            self.bar(labels)
            return
        numbers = tuple(given.literals)
        self.coupling.fixes.append(Fix(self.node, 1, None, labels, labels, numbers))

    def fix_input(self, slot: int, index: int, labels: Labels, watched: Labels) -> None:
        """Note that an element of an input counts these labels; bar them where it cannot change.

        It can where the whole input is known, or comes from a Concat of which that part is.
        """
        given, value = self.input(slot), self.node.inputs[slot]
        if given is not None and given.literals is not None and self._is_long(slot):
            numbers = tuple(given.literals)
            self.coupling.fixes.append(Fix(self.node, slot, index, labels, watched, numbers))
            return
        maker = None if value is None else value.producer
        if maker is not None and maker.op == "Concat" and not maker.domain:
            for part, each in enumerate(maker.inputs):
                known = None if each is None else self.facts(each)
                if known is None or known.numbers is None:
                    break
                if index < len(known.numbers) and known.literals is not None:
                    fix = Fix(self.node, slot, index, labels, watched, tuple(known.literals), part)
                    self.coupling.fixes.append(fix)
                    return
                index -= len(known.numbers)
                if index < 0:
                    break
        self.bar(labels, watched)


def sizes_of(edit: Editor, value: Value) -> tuple[Size | None, ...] | None:
    """What inference knows of the sizes of a value."""
    known = edit.types[value]
    if known is None or known.shape is None:
        return None
    proofs = edit.types.proofs
    return tuple(proofs.size(dim) if isinstance(dim, str) else dim for dim in known.shape)


def is_scalar_type(weight: Weight) -> bool:
    """True for a constant of int64 or int32, which shapes and axes are made of."""
    return weight.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


Handler = Callable[[Call], list[Facts] | None]
"""Facts of the outputs; None for a node through which no channel can be followed."""
