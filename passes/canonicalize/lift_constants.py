"""Constant nodes, which runtimes and rules would have to look for, as initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.constants import node_constant
from graphopt.edit import Editor
from graphopt.ir import Model


@dataclass(frozen=True)
class LiftConstants:
    """What a Constant node computes => an initializer of the same name, in bodies as well.

    The data stays where it is. Outputs of a graph stay as they are, and so does everything in
    files of IR < 4, whose initializers would have to be inputs.
    """

    name: ClassVar[str] = "lift-constants"

    def run(self, model: Model, edit: Editor) -> None:
        if model.graph.inputs_are_frozen:
            return
        for node in list(model.nodes()):
            weight = node_constant(node, model.store)
            value = node.outputs[0] if len(node.outputs) == 1 else None
            if weight is None or value is None or value.is_output:
                continue
            if not edit.allows("lift-constant", value.name):
                continue
            before = node.text()
            edit.detach_node(node)
            edit.make_constant(value, weight, node.position)
            shape = ",".join(map(str, weight.shape))
            edit.record("lift-constant", value.name, before, f"{value.name} [{shape}]")
