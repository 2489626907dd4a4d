"""What a loop computes anew in every round though nothing that it reads changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.operators import BODIES, REPEATABLE_DOMAINS, is_pure, is_random

_MOST: Final = 1024  # bytes of a constant of the body that moves along
# Cannot fail on any input that its type allows, and cost no more than to read it.
_TOTAL: Final = frozenset(
    {"Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "IsInf", "IsNaN"}
    | {"LeakyRelu", "Log", "Neg", "Not", "Reciprocal", "Relu", "Round", "Shape", "Sigmoid"}
    | {"Sign", "Sin", "Size", "Softplus", "Sqrt", "Tanh"}
)


@dataclass(frozen=True)
class HoistInvariants:
    """Nodes of Loop and Scan bodies that read only what stands outside => before the loop.

    Any pure node, where the loop provably runs at least once. Else only functions of each element,
    Shape and Size, which cannot fail: there may be no round, and then nothing that a round would
    refuse may be refused. Outputs of a body stay, and so do nodes in branches.
    """

    name: ClassVar[str] = "hoist-invariants"

    def run(self, model: Model, edit: Editor) -> None:
        mark = edit.mark()
        _hoist_in(model.graph, model, edit)
        if edit.mark() != mark:
            edit.forget_types()  # inference knows more of what stands outside


def _hoist_in(graph: Graph, model: Model, edit: Editor) -> None:
    for node in list(graph.nodes):
        for body in node.graphs():
            _hoist_in(body, model, edit)  # what leaves an inner loop may leave the outer one
            if not node.domain and BODIES.get(node.op) in ("loop", "scan"):
                _hoist_from(body, node, model, edit)


def _hoist_from(body: Graph, loop: Node, model: Model, edit: Editor) -> None:
    runs = runs_once(loop, model, edit)
    for node in sorted(body.nodes, key=lambda node: node.place):
        root = next((value.name for value in node.outputs if value is not None), "")
        fits = (runs or (not node.domain and node.op in _TOTAL)) and _may_leave(node, body, model)
        if fits and edit.allows("hoist-invariant", root):
            _hoist(node, loop, edit)


def runs_once(loop: Node, model: Model, edit: Editor) -> bool:
    """True where the body provably runs at least once."""
    if loop.op == "Loop":
        return all(
            value is None
            or ((weight := constant_of(value, model.store)) is not None and _is_positive(weight))
            for value in loop.inputs[:2]
        )
    count, axes = loop.attribute("num_scan_inputs"), loop.attribute("scan_input_axes")
    if count is None or model.opsets.get("", 1) < 9:
        return False
    scanned = loop.inputs[-count.i :]
    known = edit.types[scanned[0]] if scanned[0] is not None else None
    if known is None or known.shape is None:
        return False
    size = known.shape[axes.ints[0] if axes is not None else 0]
    return isinstance(size, int) and size > 0


def _is_positive(weight: Weight) -> bool:
    return weight.size == 1 and bool(weight.values.reshape(-1)[0] > 0)


def _may_leave(node: Node, body: Graph, model: Model) -> bool:
    """True for a pure node that reads nothing of a round, and that is no output of its body."""
    if node.bodies or node.domain not in REPEATABLE_DOMAINS or is_random(node):
        return False
    outputs = [value for value in node.outputs if value is not None]
    if any(value.is_output or value in body.pinned for value in outputs):
        return False
    reads = [value for value in node.inputs if value is not None]
    outside = [value.graph is not body for value in reads]
    return (
        any(outside)
        and is_pure(node, model)
        and all(out or _moves(value) for out, value in zip(outside, reads, strict=True))
    )


def _moves(value: Value) -> bool:
    """True for a small constant."""
    weight = value.constant
    return weight is not None and not weight.is_sparse and weight.nbytes <= _MOST


def _hoist(node: Node, loop: Node, edit: Editor) -> None:
    before, graph, place = node.text(), loop.graph, loop.position
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    known: dict[str, Value] = {}
    del proto.input[:], proto.output[:]
    for value in node.inputs:
        found = _outside(value, node.graph, loop, edit) if value is not None else None
        proto.input.append(found.name if found is not None else "")
        if found is not None:
            known[found.name] = found
    proto.output.extend(edit.unique(v.name) if v is not None else "" for v in node.outputs)
    proto.name = edit.unique(node.name or next(filter(None, proto.output)))
    made = edit.add_node(graph, proto, known, {}, place, "hoist-invariant")
    root = next(value.name for value in node.outputs if value is not None)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        if old is not None and new is not None:
            if (known_type := edit.types[old]) is not None:
                edit.types[new] = known_type
            edit.replace_uses(old, new)
    edit.remove_node(node)
    edit.record("hoist-invariant", root, before, made.text())


def _outside(value: Value, body: Graph, loop: Node, edit: Editor) -> Value:
    """The value, or where it is a constant of the body, the same around the loop."""
    if value.graph is not body or value.constant is None:
        return value
    name = edit.unique(value.name)
    tensor = value.constant.named(name).tensor
    return edit.add_constant(loop.graph, name, tensor, loop.position)
