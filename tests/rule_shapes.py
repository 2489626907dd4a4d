"""Shapes around drawn patterns: constants that broadcast otherwise, ranks and sizes unknown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.operators import BROADCASTING
from graphopt.rules import Rule
from tests.rule_attributes import is_valid
from tests.rule_cases import Draft

Context = tuple[str, Draft, bool | None]


def contexts(rule: Rule, draft: Draft) -> Iterator[Context]:
    """The rule may fire or not, but what it makes has to be equal."""
    yield from _constants(draft)
    yield from _coinciding(draft)
    yield from _undeclared(draft)


def _constants(draft: Draft) -> Iterator[Context]:
    """Each constant in every shape that its reader may take."""
    for name, array in draft.constants.items():
        if name in draft.stated or array.dtype.kind != "f":
            continue
        for shape in _shapes_for(draft, name, array):
            changed = draft.copy()
            grows = array.size > 1 and math.prod(shape) > array.size
            changed.constants[name] = _resized(array, shape) if grows else np.resize(array, shape)
            if is_valid(changed):
                yield f"{name} has shape {list(shape)}", changed, None


def _shapes_for(draft: Draft, name: str, array: NDArray[Any]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(), (1,), (1,) * 3, (1,) * 5, (1, *array.shape)]
    shapes += [(*array.shape, 1), array.shape[1:], array.shape[::-1]]
    sibling = _sibling(draft, name)
    if sibling is not None:
        rank = len(sibling)
        for axis in range(rank):
            shapes.append((1,) * axis + (sibling[axis],) + (1,) * (rank - axis - 1))
            shapes.append(sibling[axis:])
            shapes.append((sibling[axis],) + (1,) * (rank - axis - 1))
        shapes.append((2, *sibling))
        ones = [axis for axis in range(rank) if sibling[axis] == 1]
        shapes += [(*sibling[:axis], 3, *sibling[axis + 1 :]) for axis in ones]
    return [shape for shape in dict.fromkeys(shapes) if shape != array.shape]


def _sibling(draft: Draft, name: str) -> tuple[int, ...] | None:
    """The shape that a constant meets in an operator that broadcasts."""
    types = draft.types()
    for node in draft.drawn.values():
        if name in node.input and node.op_type in BROADCASTING:
            for other in node.input:
                known = types.get(other)
                if other != name and known is not None and known.shape is not None:
                    return tuple(d if isinstance(d, int) else 1 for d in known.shape)
    return None


def _coinciding(draft: Draft) -> Iterator[Context]:
    """Inputs of a size such that a vector fits along another axis than its own."""
    for name, array in draft.constants.items():
        sibling = _sibling(draft, name)
        if sibling is None or array.size < 2 or array.size != max(array.shape):
            continue
        for fed, axis in ((f, a) for f, v in draft.inputs.items() for a in range(v.ndim)):
            for at in range(len(sibling)):
                yield from _fitting(draft, name, fed, axis, at, sibling)


def _fitting(
    draft: Draft, name: str, fed: str, axis: int, at: int, sibling: tuple[int, ...]
) -> Iterator[Context]:
    """The vector along axis `at`, where some size of the input makes that axis as long."""
    array, value = draft.constants[name], draft.inputs[fed]
    for size in range(1, 13):
        shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
        changed = draft.copy()
        changed.inputs[fed] = _resized(value, shape)
        met = _sibling(changed, name)
        if met is None or len(met) <= at or met[at] != array.size:
            continue
        if met[at] == sibling[at] and size != value.shape[axis]:
            continue  # the size did not bring this about
        for spelled in {(1,) * at + (array.size,) + (1,) * (len(met) - at - 1), met[at : at + 1]}:
            vector = changed.copy()
            vector.constants[name] = array.reshape(spelled)
            if is_valid(vector):
                yield f"{name} as {list(spelled)} where {fed} is {list(shape)}", vector, None
        return


def _resized(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Other sizes, and no repetition that would hide which element went where."""
    found = np.resize(array, shape)
    if array.dtype.kind != "f":
        return found
    return (found * np.random.default_rng(2).uniform(0.5, 1.5, shape)).astype(array.dtype)


def undeclared(draft: Draft) -> Iterator[tuple[str, Draft]]:
    """The draft with inputs of unknown rank, and with sizes that all bear one name."""
    free = draft.copy()
    free.shapes = dict.fromkeys(free.inputs, None)
    yield "rank unknown", free
    named = draft.copy()
    named.shapes = {name: ("n",) * array.ndim for name, array in free.inputs.items()}
    yield "sizes unknown", named


def _undeclared(draft: Draft) -> Iterator[Context]:
    """Nothing declared, and what is fed of several shapes."""
    for fed in (None, *draft.inputs):
        for how, shape in _feedable(draft, fed):
            for kind, base in undeclared(draft):
                if fed is not None and kind == "sizes unknown" and how == "rank":
                    continue
                changed = base.copy()
                if fed is not None:
                    changed.inputs[fed] = _resized(draft.inputs[fed], shape)
                yield f"{kind}, {fed} fed as {list(shape)}", changed, None
    lonely = draft.copy()
    for name in list(lonely.constants):
        if lonely.constants[name].ndim == 0 and lonely.constants[name].dtype.kind == "f":
            lonely.constants[name] = lonely.constants[name].reshape(1, 1, 1, 1)
    lonely.shapes = dict.fromkeys(lonely.inputs, None)
    yield "rank unknown, numbers of rank 4", lonely, None


def _feedable(draft: Draft, fed: str | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    if fed is None:
        yield "as it is", ()
        return
    shape = draft.inputs[fed].shape
    for axis in range(len(shape)):
        if shape[axis] != 1:
            yield "size", (*shape[:axis], 1, *shape[axis + 1 :])
    yield "rank", (1, *shape)
    if shape:
        yield "rank", shape[1:]
