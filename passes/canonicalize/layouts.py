"""What an operator becomes where the axes of its tensors come in another order.

A permutation says of a value how `Transpose` would move it: axis `i` of what results is axis
`permutation[i]` of the value. Nothing here changes a graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Node, Shape, Value, Weight
from graphopt.operators import ATTRIBUTE_INPUTS
from graphopt.passes.guards import whole
from graphopt.storage import tensor_bytes

Permutation = tuple[int, ...]

_COPIED: Final = 1 << 16  # bytes of a constant up to which two layouts of it may be stored


class Stays(Exception):
    """The operator has no equal in the other layout, or none that is proven."""


@dataclass(frozen=True)
class Move:
    """An operator in another layout: how each tensor that it reads or computes is permuted.

    `constants` are inputs to store permuted, with axes of size one put in front as broadcasting
    does. `settings` are numbers to state otherwise, by the name of an attribute, which may have
    become an input, or by the slot of an input. What is not named stays as it is.
    """

    inputs: Mapping[int, Permutation] = field(default_factory=dict)
    outputs: Mapping[int, Permutation] = field(default_factory=dict)
    constants: Mapping[int, Permutation] = field(default_factory=dict)
    settings: Mapping[str | int, int | list[int] | list[float]] = field(default_factory=dict)
    op: str = ""  # "": the same


def inverse(permutation: Permutation) -> Permutation:
    """What takes the permutation back."""
    return tuple(permutation.index(axis) for axis in range(len(permutation)))


def then(first: Permutation, second: Permutation) -> Permutation:
    """One permutation for two, one after the other."""
    return tuple(first[axis] for axis in second)


def without(permutation: Permutation, axes: Collection[int]) -> Permutation:
    """How the axes that are left move, once `axes` of the value are gone."""
    kept = [axis for axis in range(len(permutation)) if axis not in axes]
    return tuple(kept.index(axis) for axis in permutation if axis not in axes)


def around(permutation: Permutation, axes: Collection[int]) -> Permutation:
    """The permutation with `axes` more, which stay where they are."""
    rank = len(permutation) + len(axes)
    moving = [axis for axis in range(rank) if axis not in axes]
    order = iter(permutation)
    return tuple(axis if axis in axes else moving[next(order)] for axis in range(rank))


def is_still(permutation: Permutation, shape: Shape | None) -> bool:
    """True where the permutation changes neither a value of that shape nor its sizes."""
    return all(
        axis == at or (shape is not None and shape[axis] == shape[at] == 1)
        for at, axis in enumerate(permutation)
    )


class Facts:
    """What moving relies on: proven shapes and constants."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self.opset = edit.model.opsets.get("", 1)

    def shape(self, value: Value | None) -> Shape | None:
        known = self._edit.types[value] if value is not None else None
        return known.shape if known is not None else None

    def rank(self, value: Value | None) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def width(self, value: Value) -> int:
        """Bytes of an element."""
        known = self._edit.types[value]
        return tensor_bytes(known.data_type, [1]) if known is not None else 1

    def constant(self, value: Value | None) -> Weight | None:
        return constant_of(value, self._edit.model.store)

    def permutation(self, node: Node) -> Permutation | None:
        """That of a Transpose; None where its rank is not proven."""
        stated = node.attribute("perm")
        if stated is not None:
            return tuple(stated.ints)
        rank = self.rank(node.inputs[0])
        return None if rank is None else tuple(range(rank))[::-1]

    def slot(self, op: str, name: str) -> int | None:
        """Where this opset states a setting as an input; None where it is an attribute."""
        since, slot = ATTRIBUTE_INPUTS.get((op, name), (self.opset + 1, 0))
        return slot if self.opset >= since else None


@dataclass(frozen=True)
class Question:
    """What becomes of `node` where one of its tensors is permuted."""

    node: Node
    slot: int
    is_output: bool
    permutation: Permutation
    facts: Facts

    @property
    def source(self) -> Value | None:
        return self.node.inputs[0]

    @property
    def result(self) -> Value | None:
        return self.node.outputs[0]

    def require(self, holds: bool) -> None:
        """Refuse where it does not hold."""
        if not holds:
            raise Stays

    def rank(self, value: Value | None) -> int:
        """The proven rank."""
        rank = self.facts.rank(value)
        if rank is None:
            raise Stays
        return rank

    def number(self, name: str, default: int) -> int:
        """An attribute that is one integer."""
        stated = self.node.attribute(name)
        return default if stated is None else stated.i

    def numbers(self, name: str) -> list[int] | None:
        """Integers that an attribute or a constant input states; None where they are left out."""
        slot = self.facts.slot(self.node.op, name)
        if slot is not None:
            return self.stored(slot)
        stated = self.node.attribute(name)
        return None if stated is None else list(stated.ints)

    def stored(self, slot: int) -> list[int] | None:
        """Integers of a constant input; None where it is left out."""
        value = self.node.inputs[slot] if slot < len(self.node.inputs) else None
        if value is None:
            return None
        weight = self.facts.constant(value)
        if weight is None:
            raise Stays
        return whole(weight.values)

    def axes(self, name: str, rank: int) -> list[int] | None:
        """Axes counted from the front; None where they are left out."""
        stated = self.numbers(name)
        if stated is None:
            return None
        self.require(all(-rank <= axis < rank for axis in stated))
        return [axis % rank for axis in stated]

    def may_store(self, value: Value) -> bool:
        """False for a large constant that others read: it would be stored twice."""
        weight = self.facts.constant(value)
        assert weight is not None
        return not weight.is_sparse and (weight.nbytes <= _COPIED or len(value.consumers) == 1)

    def operands(
        self, slots: Sequence[int]
    ) -> tuple[dict[int, Permutation], dict[int, Permutation]]:
        """Inputs that broadcast against one another: what moves along, what is stored anew."""
        rank = len(self.permutation)
        moving, stored = {}, {}
        for slot in slots:
            value = self.node.inputs[slot]
            shape = self.facts.shape(value)
            if value is None or shape is None or len(shape) > rank:
                raise Stays
            if all(size == 1 for size in shape):
                continue
            if self.facts.constant(value) is not None:
                padded = (1,) * (rank - len(shape)) + shape
                if not is_still(self.permutation, padded):
                    self.require(self.may_store(value))
                    stored[slot] = self.permutation
            else:
                self.require(len(shape) == rank)
                moving[slot] = self.permutation
        return moving, stored
