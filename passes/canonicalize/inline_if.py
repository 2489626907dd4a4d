"""Branches that are always, or never, taken."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import onnx

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node, Value, Weight
from graphopt.proofs import TensorType
from graphopt.shapes import small_data, takes
from graphopt.splice import splice

Known = dict[Value, TensorType | onnx.TensorProto]


@dataclass(frozen=True)
class InlineIf:
    """An If whose condition is constant => the nodes of the branch that it takes.

    Names of the branch stay where no other graph has them, else new ones are derived from them.
    """

    name: ClassVar[str] = "inline-if"

    def run(self, model: Model, edit: Editor) -> None:
        names = Counter(name for graph in model.graphs() for name in graph.values)
        _inline_in(model.graph, model, edit, names)


def _inline_in(graph: Graph, model: Model, edit: Editor, names: Counter[str]) -> None:
    pending = list(reversed(graph.nodes))
    while pending:
        node = pending.pop()
        branch = _constant_branch(node, model)
        root = next((value.name for value in node.outputs if value is not None), "")
        if (
            branch is None
            or not suits_readers(node, branch, model, edit)
            or not edit.allows("inline-if", root)
        ):
            for body in node.graphs():
                _inline_in(body, model, edit, names)
            continue
        added = inline(node, branch, edit, names, "inline-if")
        pending.extend(reversed(added))


def inline(node: Node, branch: Graph, edit: Editor, names: Counter[str], rule: str) -> list[Node]:
    """Put the nodes of a branch, which fits, in the place of the If; the nodes.

    `names` counts the names of values in the model, and is kept up.
    """
    root = next((value.name for value in node.outputs if value is not None), "")
    before = node.text()
    for body in node.graphs():
        if body is not branch:
            names.subtract(name for graph in body.walk() for name in graph.values)

    def outside(name: str) -> str:
        if names[name] == 1:
            return name
        fresh = edit.unique(name)
        names[name] -= 1
        names[fresh] += 1
        return fresh

    added = splice(edit, node, branch, rename=outside)
    after = "\n".join(other.text() for other in added)
    edit.record(rule, root, before, after)
    return added


def branch_taken(node: Node, condition: Weight | None, model: Model) -> Graph | None:
    """The branch that an If takes on a condition, where its nodes can stand outside of it."""
    if node.op != "If" or node.domain or condition is None or condition.size != 1:
        return None
    taken = "then_branch" if condition.values.reshape(-1)[0] else "else_branch"
    return branch_of(node, taken, model)


def branch_of(node: Node, name: str, model: Model) -> Graph | None:
    """The branch of an If by its attribute's name, where its nodes can stand outside of it."""
    branches = node.bodies.get(name, [])
    return branches[0] if len(branches) == 1 and _fits(node, branches[0], model) else None


def suits_readers(node: Node, branch: Graph, model: Model, edit: Editor) -> bool:
    """False where readers of an If would be refused if what the branch computes were known.

    An If whose branches differ leaves shapes open, and runtimes take a vector of one element for
    a scalar as long as they do not see it coming.
    """
    given: Known = {
        value: known
        for value, result in zip(node.outputs, branch.outputs, strict=False)
        if value is not None and (known := small_data(result, model) or edit.types[result])
    }
    return all(
        reader.bodies or takes(reader, edit.types, model, _of(reader, given))
        for value in given
        for reader in value.consumers
    )


def _of(reader: Node, given: Known) -> Known:
    return {value: given[value] for value in reader.inputs if value in given and value is not None}


def _fits(node: Node, branch: Graph, model: Model) -> bool:
    """False for what would not mean the same outside: annotations, weights where IR < 4."""
    if branch.inputs or branch.pinned or branch.proto.quantization_annotation:
        return False
    if model.graph.inputs_are_frozen and any(branch.initializers):
        return False
    computed = [v for v in branch.outputs if v.graph is branch and v.producer is not None]
    copied = len(set(computed)) < len(branch.outputs)
    # Identity takes other types than tensors from opset 16 on
    return len(branch.outputs) >= len(node.outputs) and (
        not copied or model.opsets.get("", 1) >= 16 or _are_tensors(branch)
    )


def _are_tensors(branch: Graph) -> bool:
    return all(info.type.HasField("tensor_type") for info in branch.proto.output)


def _constant_branch(node: Node, model: Model) -> Graph | None:
    condition = constant_of(node.inputs[0], model.store) if node.inputs else None
    return branch_taken(node, condition, model)
