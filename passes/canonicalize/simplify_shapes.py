"""Shapes that a graph computes: each once, and where what is known of them says enough, not at all.

A Reshape whose target is read off its own input needs no arithmetic; two sizes that are proven
equal need to be computed once, from whichever tensor comes first.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from graphopt import size_terms
from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value
from graphopt.operators import is_random
from graphopt.passes.canonicalize.proven_sizes import nonzero_atoms, prove_sizes
from graphopt.passes.canonicalize.shape_facts import ShapeFacts
from graphopt.size_terms import Size, Term

_RESHAPE: Final = "reshape-by-constant"
_MERGE: Final = "merge-sizes"


@dataclass(frozen=True)
class SimplifyShapes:
    """Integers computed from sizes => one computation for all that are proven equal.

    A Reshape to such integers gets a constant target where each of them is a number, the size that
    the input has there, or follows from the others. Nothing is taken from names of dims.
    """

    name: ClassVar[str] = "simplify-shapes"

    def run(self, model: Model, edit: Editor) -> None:
        facts = prove_sizes(model, edit)
        nonzero = nonzero_atoms(model.graph, facts)
        edit.prove_nonzero(nonzero)
        mark = edit.mark()
        for graph in model.graphs():
            _merge(graph, facts, edit)
            for node in list(graph.nodes):
                if node.op == "Reshape" and not node.domain and len(node.inputs) == 2:
                    _fix_target(node, facts, nonzero, edit)
        if any(change.rule == _RESHAPE for change in edit.changes[mark[1] :]):
            edit.forget_types()  # inference reads a constant target, in bodies as well


# -- equal integers --------------------------------------------------------------------------------


def _merge(graph: Graph, facts: ShapeFacts, edit: Editor) -> None:
    """Let what is proven to hold the same integers be the first of them, in one graph."""
    first: dict[Hashable, Value] = {}
    for node in list(graph.nodes):
        if len(node.outputs) != 1 or (value := node.outputs[0]) is None or is_random(node):
            continue
        key = _content(value, facts)
        if key is None:
            continue
        other = first.setdefault(key, value)
        if other is not value and edit.can_bypass(value, other):
            _absorb(node, value, other, edit)
            if value.is_output:  # which keeps its name, so that the other is gone
                first[key] = value


def _content(value: Value, facts: ShapeFacts) -> Hashable | None:
    """Type and elements, where these are known."""
    known = facts.type(value)
    if known is None or known.shape is None or not all(isinstance(d, int) for d in known.shape):
        return None
    try:
        elements = facts.elements(value)
    except LookupError:
        return None
    found = tuple(elements.flat)
    return (known.data_type, known.shape, found) if found and None not in found else None


def _absorb(node: Node, value: Value, other: Value, edit: Editor) -> None:
    if not edit.allows(_MERGE, value.name):
        return
    before = node.text()
    edit.detach_node(node)
    edit.bypass(value, other)
    edit.record(_MERGE, value.name, before, f"{value.name} := {other.name}")


# -- Reshape ---------------------------------------------------------------------------------------


def _fix_target(node: Node, facts: ShapeFacts, nonzero: set[Hashable], edit: Editor) -> None:
    """Give the Reshape a constant target where what is known of the integers allows it."""
    data, shape = node.inputs
    result = node.outputs[0]
    if data is None or shape is None or result is None:
        return
    if constant_of(shape, edit.model.store) is not None:
        return
    try:
        elements = list(facts.elements(shape))
        target = constant_target(elements, facts.dims(data), node, nonzero)
    except LookupError:
        return
    if target is None or not edit.allows(_RESHAPE, result.name):
        return
    before = node.text()
    name = edit.unique(f"{result.name}/shape")
    tensor = onnx.numpy_helper.from_array(np.array(target, np.int64), name)
    proto = onnx.NodeProto(op_type="Reshape", name=node.name)
    proto.input.extend([data.name, name])
    proto.output.append(result.name)
    known = {data.name: data, name: edit.add_constant(node.graph, name, tensor, node.position)}
    edit.detach_node(node)
    made = edit.add_node(node.graph, proto, known, {result.name: result}, node.position, _RESHAPE)
    edit.record(_RESHAPE, result.name, before, made.text() + f", {name} = {target}")


def constant_target(
    elements: list[Size], sizes: list[Size], node: Node, nonzero: set[Hashable]
) -> list[int] | None:
    """The target as numbers: 0 copies a size, and one size may be free.

    A size is left free only beside numbers and `nonzero` sizes: beside one that is zero in some
    run it would not follow.
    """
    literal = node.attribute("allowzero")
    zeros_are_sizes = literal is not None and literal.i != 0
    if zeros_are_sizes and 0 in elements:
        return None
    target: list[int | None] = []
    for axis, element in enumerate(elements):
        if isinstance(element, int):
            target.append(element)
        elif isinstance(element, Term) and axis < len(sizes) and element == sizes[axis]:
            target.append(0)
        else:
            target.append(None)
    if None in target:
        beside = [
            element
            for element, size in zip(elements, target, strict=True)
            if size is not None and not (isinstance(element, Term) and element.atoms <= nonzero)
        ]
        if target.count(None) > 1 or any(isinstance(e, Term) or e <= 0 for e in beside):
            return None
        if size_terms.product(elements) != size_terms.product(sizes):
            return None  # not proven to be what follows from the others
    return [-1 if size is None else size for size in target]
