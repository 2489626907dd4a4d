"""Scripts written for onnx-graphsurgeon, as a step of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.data import load_module
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model


@dataclass(frozen=True)
class Graphsurgeon:
    """Run `function` (`module:name` or `file.py:name`) on the model as a graphsurgeon Graph.

    The function edits the graph it is given, or returns another. Like every pass it is undone
    where it fails, and its result is compared with the original before anything is written.
    """

    name: ClassVar[str] = "graphsurgeon"
    function: str = ""

    def run(self, model: Model, edit: Editor) -> None:
        from graphopt.surgeon import operate  # costs 0.2 s that only its users should pay

        module, _, name = self.function.rpartition(":")
        if not module:
            raise UsageError("passes: graphsurgeon{function=module:name} needs a function")
        before = len(model.graph.nodes)
        edit.adopt(operate(model, getattr(load_module(module), name)))
        edit.record(
            "graphsurgeon", self.function, f"{before} nodes", f"{len(model.graph.nodes)} nodes"
        )
