"""The one table of operator facts. Nothing else in the core names an operator.

Sources: the ONNX operator specification (https://onnx.ai/onnx/operators/) and, for domains of
onnxruntime, its contrib operator documentation.
"""

from __future__ import annotations

from typing import Final

import onnx

from graphopt.ir import Model, Node

# Domains whose operators are pure: a node nobody reads can go. Others may write files or print.
PURE_DOMAINS: Final = frozenset(
    {"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "com.microsoft"}
)

# Domains whose kernels every onnxruntime build has; any other needs a library of the user's.
RUNTIME_DOMAINS: Final = frozenset({*PURE_DOMAINS, "com.microsoft.nchwc", "com.ms.internal.nhwc"})

RANDOM: Final = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)

# Inputs that hold what training learned. An input with a default in such a slot is a weight that
# an old exporter listed as input; in any other slot it may be an initial state meant to be fed.
PARAMETER_SLOTS: Final[dict[str, frozenset[int]]] = {
    "BatchNormalization": frozenset({1, 2, 3, 4}),
    "Conv": frozenset({1, 2}),
    "ConvInteger": frozenset({1, 3}),
    "ConvTranspose": frozenset({1, 2}),
    "DeformConv": frozenset({1, 3}),
    "GRU": frozenset({1, 2, 3}),
    "Gemm": frozenset({1, 2}),
    "GroupNormalization": frozenset({1, 2}),
    "InstanceNormalization": frozenset({1, 2}),
    "LSTM": frozenset({1, 2, 3, 7}),
    "LayerNormalization": frozenset({1, 2}),
    "MatMul": frozenset({1}),
    "MatMulInteger": frozenset({1, 3}),
    "PRelu": frozenset({1}),
    "QLinearConv": frozenset({1, 2, 3, 4, 5, 6, 7, 8}),
    "QLinearMatMul": frozenset({1, 2, 3, 4, 5, 6, 7}),
    "RMSNormalization": frozenset({1}),
    "RNN": frozenset({1, 2, 3}),
    "Scale": frozenset({1, 2}),
}


def is_pure(node: Node, model: Model) -> bool:
    """True where a node without readers can go: it does nothing but compute its outputs."""
    if node.domain in PURE_DOMAINS:
        return all(is_pure(inner, model) for body in node.graphs() for inner in body.nodes)
    function = model.functions.get((node.domain, node.op))
    return function is not None and all(
        inner.domain in PURE_DOMAINS or inner.domain == "ai.onnx" for inner in function.node
    )


def is_random(node: Node) -> bool:
    """True for an operator whose output two runs need not agree on.

    Dropout counts unless its training_mode is provably off: left out, or a constant False.
    """
    if node.domain != "":
        return False
    if node.op in RANDOM:
        return True
    return node.op == "Dropout" and _dropout_is_live(node)


def _dropout_is_live(node: Node) -> bool:
    is_test = node.attribute("is_test")  # opset 1 and 6
    if is_test is not None:
        return is_test.i == 0
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    mode = node.inputs[2]
    if mode.constant is not None:
        return bool(mode.constant.values.any())
    if mode.producer is not None and mode.producer.op == "Constant":
        value = mode.producer.attribute("value")
        return value is None or bool(onnx.numpy_helper.to_array(value.t).any())
    return True


def fills_parameter_slot(node: Node, slot: int) -> bool:
    """True where the input is a learned parameter by the operator's definition."""
    return node.domain == "" and slot in PARAMETER_SLOTS.get(node.op, frozenset())
