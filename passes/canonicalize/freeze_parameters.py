"""Weights that an old exporter listed as graph inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.edit import Editor
from graphopt.ir import Model, Value
from graphopt.operators import fills_parameter_slot


@dataclass(frozen=True)
class FreezeParameters:
    """An input with a default that only ever serves as a learned parameter => an initializer.

    onnxruntime treats an initializer that is also an input as variable, which forbids it most
    fusions. Inputs with a default in other slots (initial states) stay feedable.
    """

    name: ClassVar[str] = "freeze-parameters"

    def run(self, model: Model, edit: Editor) -> None:
        graph = model.graph
        if graph.inputs_are_frozen:
            return  # such a file must list them, and runtimes take them for constants anyway
        for value in list(graph.inputs):
            if value.weight is None or value.is_output or not _is_parameter(value):
                continue
            if edit.allows("freeze-parameter", value.name):
                edit.freeze_input(value)
                edit.record("freeze-parameter", value.name, f"input {value.name}", "initializer")


def _is_parameter(value: Value) -> bool:
    return bool(value.consumers) and all(
        fills_parameter_slot(node, slot)
        for node in value.consumers
        for slot, read in enumerate(node.inputs)
        if read is value
    )
