"""Targets as data: which operators a runtime has integer kernels for, and under which conditions.

Measured with onnxruntime's CPU provider; every line that a pass relies on is checked by
tests/test_targets.py against the graph as onnxruntime runs it.
"""

from __future__ import annotations

import functools
from typing import Final, Literal

Kind = Literal[
    "convolution",
    "product",
    "sum",
    "gate",
    "lookup",
    "hard-sigmoid",
    "hard-swish",
    "mean",
    "affine",
    "movement",
    "concatenation",
]
"""How an operator is quantized; see passes/quantize/emission.py."""

# Operators of onnxruntime's CPU provider that run on u8 activations once their operands come from
# DequantizeLinear and their result goes to QuantizeLinear alone. What is not here has no integer
# kernel, or one that was measured slower than floats whatever surrounds it (Softmax, AveragePool).
ORT_CPU: Final[dict[str, Kind]] = {
    "Conv": "convolution",
    "MatMul": "product",
    "Gemm": "product",
    "Add": "sum",
    "Mul": "gate",
    "Sigmoid": "lookup",
    "LeakyRelu": "lookup",
    "HardSigmoid": "hard-sigmoid",
    "HardSwish": "hard-swish",
    "GlobalAveragePool": "mean",
    "BatchNormalization": "affine",
    "Reshape": "movement",
    "Transpose": "movement",
    "Squeeze": "movement",
    "Unsqueeze": "movement",
    "Flatten": "movement",
    "Slice": "movement",
    "Gather": "movement",
    "Split": "movement",
    "DepthToSpace": "movement",
    "MaxPool": "movement",
    "Resize": "movement",
    "Concat": "concatenation",
}

# Kinds whose result may stay floating-point: they accumulate in int32 and scale at the end.
FLOAT_RESULT: Final = frozenset({"product"})

# What a QuantizeLinear says by its range already, so that onnxruntime drops the operator.
CLAMPS: Final = frozenset({"Relu", "Clip"})
CLAMPED: Final = frozenset({"convolution", "product", "sum"})


@functools.cache
def has_vnni() -> bool:
    """True where the CPU multiplies u8 by s8 without saturating pairs of products.

    Without it weights need 7 bits (`reduce_range`): AVX2's pmaddubsw adds two products in 16 bits.
    ARM multiplies without saturation whatever its extensions.
    """
    import archspec.cpu

    host = archspec.cpu.host()
    if host.family.name in ("aarch64", "arm"):
        return True
    return bool({"avx512_vnni", "avx_vnni"} & set(host.features))
