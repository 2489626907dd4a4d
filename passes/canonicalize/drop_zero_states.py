"""Initial states of recurrent operators that say what leaving them out says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Model, Node, Value

_RULE: Final = "drop-zero-state"
_STATES: Final = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}  # initial_h and initial_c


@dataclass(frozen=True)
class DropZeroStates:
    """GRU, LSTM or RNN from an initial state of zeros => the same without one, which is zero.

    The zeros are a constant, or what ConstantOfShape makes whatever the shape: an operator takes
    but one.
    """

    name: ClassVar[str] = "drop-zero-states"

    def run(self, model: Model, edit: Editor) -> None:
        for graph in model.graphs():
            for node in list(graph.nodes):
                if node.domain or node.op not in _STATES:
                    continue
                for slot in _STATES[node.op]:
                    if slot < len(node.inputs) and _is_zero(node.inputs[slot], model):
                        _drop(node, slot, edit)


def _is_zero(value: Value | None, model: Model) -> bool:
    if value is None:
        return False
    weight = constant_of(value, model.store)
    if weight is not None:
        try:
            return not weight.values.any()
        except ModelError:
            return False  # a weightless model has none to look at
    maker = value.producer
    if maker is None or maker.op != "ConstantOfShape" or maker.domain:
        return False
    filling = maker.attribute("value")
    return filling is None or not onnx.numpy_helper.to_array(filling.t).any()


def _drop(node: Node, slot: int, edit: Editor) -> None:
    root = next(value.name for value in node.outputs if value is not None)
    if edit.allows(_RULE, root):
        before = node.text()
        edit.set_input(node, slot, None)
        edit.record(_RULE, root, before, node.text())
