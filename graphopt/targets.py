"""Targets as data: which operators a runtime has integer kernels for, and under which conditions.

Measured with onnxruntime's CPU provider; every line that a pass relies on is checked by
tests/test_targets.py against the graph as onnxruntime runs it.
"""

from __future__ import annotations

import functools
import platform
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
CLAMPED: Final = frozenset({"convolution", "product", "sum", "gate"})

# What onnxruntime takes onto integers unasked wherever DequantizeLinear stands before it and
# QuantizeLinear behind. The float weights of these are quantized by tensor in passing (those of
# ConvTranspose even dequantized again on every run):
QUANTIZED_UNASKED: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})
# and these were measured two and three times slower on integers.
SLOW_ON_INTEGERS: Final = frozenset({"AveragePool", "Softmax"})
# Through these DequantizeLinear is moved down and QuantizeLinear up to where they fuse.
PASSED_THROUGH: Final = frozenset(
    {"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)

# Opsets in which DequantizeLinear has one scale for each channel of a weight, and of which
# onnxruntime 1.32 has both conversions: of opset 28 it reads models, but not these.
OPSETS: Final = range(13, 28)


@functools.cache
def has_vnni() -> bool:
    """True where the CPU multiplies u8 by s8 without saturating pairs of products.

    Without it weights need 7 bits (`reduce_range`): AVX2's pmaddubsw adds two products in 16 bits.
    ARM multiplies without saturation whatever its extensions.
    """
    from archspec.cpu.detect import detected_info

    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    # Not `archspec.cpu.host()`, which has the features of the latest microarchitecture that it
    # knows by all of its flags, not those of the CPU: virtual machines hide a few.
    return bool({"avx512_vnni", "avx_vnni"} & set(detected_info().features))
