"""Copies that hold back onnxruntime's own choice of what is computed on integers.

Wherever DequantizeLinear stands before an operator and QuantizeLinear behind, onnxruntime computes
it on integers, whether the model states its weights as integers or not: a convolution that was left
in floats, because it loses too much otherwise, would be quantized all the same, and worse, by
tensor. A product whose result is quantized and read as floats as well, or goes through a Relu that
is not quantized, is computed in floats, its weights dequantized on every run. A Max of one operand,
which copies its input, prevents both.
"""

from __future__ import annotations

from typing import Final

import onnx

from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.targets import (
    CLAMPS,
    ORT_CPU,
    PASSED_THROUGH,
    QUANTIZED_UNASKED,
    SLOW_ON_INTEGERS,
)

_HELD_BACK: Final = QUANTIZED_UNASKED | SLOW_ON_INTEGERS
BARRIER: Final = "Max"


def hold_back(edit: Editor, quantize: Node, rule: str) -> None:
    """Put a barrier where a QuantizeLinear of floats would change how they are computed."""
    value = quantize.inputs[0]
    if value is None:
        return
    if len(value.consumers) > 1 or value.is_output:
        if _is_integer_product(edit, value):
            _separate(edit, value, [quantize], rule)
        return
    node = _computing(value)
    if node is None or not _is_dequantized(node.inputs[0]):
        return
    if node.op in QUANTIZED_UNASKED and _is_dequantized(node.inputs[1]):
        return  # it was asked for
    result = node.outputs[0]
    assert result is not None
    _separate(edit, result, list(result.consumers), rule)


def _separate(edit: Editor, value: Value, readers: list[Node], rule: str) -> None:
    """Let these readers read a copy."""
    name = edit.unique(f"{value.name}/copy")
    proto = onnx.helper.make_node(BARRIER, [value.name], [name], edit.unique(f"{name}/{BARRIER}"))
    known = {value.name: value}
    assert value.producer is not None
    edit.add_node(value.graph, proto, known, {}, value.producer.position, rule)
    for reader in readers:
        for slot, read in enumerate(reader.inputs):
            if read is value:
                edit.set_input(reader, slot, known[name])


def keep_integer(edit: Editor, clamp: Node, is_implied: bool, rule: str) -> None:
    """Put a barrier before a clamp that would keep the product before it in floats.

    That is one with a single use: onnxruntime looks behind it for the QuantizeLinear that says the
    same (`is_implied`), and gives up where there is none.
    """
    value, result = clamp.inputs[0], clamp.outputs[0]
    if value is None or result is None or not _has_one_use(value) or not _has_one_use(result):
        return
    is_dropped = is_implied and _is_quantized(result)
    if not is_dropped and _is_integer_product(edit, value):
        _separate(edit, value, [clamp], rule)


def _has_one_use(value: Value) -> bool:
    return not value.is_output and list(value.consumers.values()) == [1]


def _is_quantized(value: Value | None) -> bool:
    """True where a QuantizeLinear is all that reads the value, whatever moves it before."""
    while value is not None and _has_one_use(value):
        (node,) = value.consumers
        if node.op == "QuantizeLinear":
            return True
        if node.domain or node.op not in PASSED_THROUGH:
            return False
        value = node.outputs[0]
    return False


def _is_integer_product(edit: Editor, value: Value) -> bool:
    """True for the result of a product of integers, or of the Gemm that is made of it and a sum."""
    node, known = value.producer, edit.types[value]
    if node is None or node.domain:
        return False
    if node.op == "Add" and (known is None or known.rank in (2, None)):
        return any(_is_product(other.producer) for other in node.inputs if other is not None)
    return _is_product(node)


def _is_product(node: Node | None) -> bool:
    if node is None or node.domain or ORT_CPU.get(node.op) != "product":
        return False
    return _is_dequantized(node.inputs[1])


def _computing(value: Value | None) -> Node | None:
    """The operator to be held back whose result, or what is made of it, is quantized alone."""
    while value is not None and _has_one_use(value):
        node = value.producer
        if node is None or node.domain:
            return None
        if node.op in _HELD_BACK:
            return node
        if node.op not in CLAMPS | PASSED_THROUGH:
            return None
        value = node.inputs[0]
    return None


def _is_dequantized(value: Value | None) -> bool:
    while value is not None and value.producer is not None:
        node = value.producer
        if node.op == "DequantizeLinear":
            return True
        if node.domain or node.op not in PASSED_THROUGH:
            return False
        value = node.inputs[0]
    return False
