"""LSTM on integers: onnxruntime's DynamicQuantizeLSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.kernels.affine import channel_affine, quantize
from graphopt.passes.quantize.products import stored_matrix
from graphopt.passes.quantize.site import CONTRIB, Site, import_contrib

RULE: Final = "quantize-dynamic"
_INPUTS: Final = 8  # of LSTM; the scales of DynamicQuantizeLSTM stand behind them

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Recurrent:
    """An LSTM with constant weights [directions, 4 * hidden, inputs], by slot: 1 is W, 2 is R."""

    node: Node
    owners: tuple[Value, Value]
    weights: tuple[Array, Array]


def recurrent_of(node: Node, edit: Editor) -> Recurrent | str:
    """The LSTM that the node is, or the reason why no integer kernel computes it."""
    if node.op != "LSTM":
        return f"onnxruntime has no integer kernel of {node.op}"
    layout = node.attribute("layout")
    if layout is not None and layout.i:
        return "the batch comes first, which onnxruntime refuses"
    owners, weights = [], []
    for value in node.inputs[1:3]:
        stored = stored_matrix(value, edit.model)
        if isinstance(stored, str):
            return stored
        if stored[1].ndim != 3:
            return f"the weights have {stored[1].ndim} axes instead of 3"
        owners.append(stored[0])
        weights.append(stored[1])
    return Recurrent(node, (owners[0], owners[1]), (weights[0], weights[1]))


def make_recurrent(edit: Editor, node: Node, *, bits: int = 8) -> bool:
    """Compute an LSTM with s8 weights, one scale for each row of a gate and direction.

    Weights are stored [directions, inputs, 4 * hidden] and both kinds of activations quantized at
    every step, as onnxruntime's own quantizer has it. Raises ValueError like `make_dynamic`.
    """
    found = recurrent_of(node, edit)
    if isinstance(found, str):
        raise ValueError(f"{node.label} cannot be dynamic: {found}")
    outputs: list[Value | str] = []
    for slot, value in enumerate(node.outputs):
        outputs.append(f"{node.name or 'LSTM'}/unread_{slot}" if value is None else value)
    root = next(value for value in node.outputs if value is not None)
    if not edit.allows(RULE, root.name):
        return False
    import_contrib(edit)
    site = Site(edit, [node], RULE)
    inputs: list[Value | None] = [*node.inputs, *[None] * (_INPUTS - len(node.inputs))]
    for slot, owner, weights in zip((1, 2), found.owners, found.weights, strict=True):
        directions, rows, columns = weights.shape
        flat = weights.reshape(directions * rows, columns)
        affine = channel_affine(flat, 0, bits=bits)
        q = quantize(flat, affine).reshape(weights.shape).transpose(0, 2, 1)
        inputs[slot] = site.constant(owner, "int8", q)
        shape = (directions, rows)
        inputs.append(site.constant(owner, "scales", affine.scale.reshape(shape)))
        inputs.append(site.constant(owner, "zero_points", np.zeros(shape, np.int8)))
    attributes = [a for a in node.proto.attribute if a.name != "layout"]
    site.call("DynamicQuantizeLSTM", inputs, outputs, CONTRIB, attributes)
    site.close()
    return True
