"""The one table of operator facts. Nothing else in the core names an operator.

Sources: the ONNX operator specification (https://onnx.ai/onnx/operators/) and, for domains of
onnxruntime, its contrib operator documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import onnx

from graphopt.ir import STANDARD_DOMAINS, Model, Node

# Domains whose operators are pure: a node nobody reads can go. Others may write files or print.
PURE_DOMAINS: Final = frozenset(
    {"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "com.microsoft"}
)

# Domains in which two equal calls give equal results, but for what `is_random` says.
REPEATABLE_DOMAINS: Final = frozenset({"", "ai.onnx.ml"})

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

# Ranks that an operator insists on when it runs, by input.
EXACT_RANKS: Final[dict[str, dict[int, int]]] = {
    "GRU": {0: 3, 1: 3, 2: 3},
    "LSTM": {0: 3, 1: 3, 2: 3},
    "RNN": {0: 3, 1: 3, 2: 3},
}

# Inputs that are scalars by definition: runtimes take a vector of one element until they know it.
SCALARS: Final[dict[str, frozenset[int]]] = {"Range": frozenset({0, 1, 2})}

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


# For proposing integers: operators that compare, that index (the slot of the indices; slot 0 is
# what they index), that take a shape or a count, and that only move elements from one slot on.
COMPARISONS: Final = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
INDEX_SLOTS: Final = {"Gather": 1, "GatherElements": 1, "GatherND": 1}
SHAPE_SLOTS: Final[dict[str, frozenset[int]]] = {
    "ConstantOfShape": frozenset({0}),
    "Expand": frozenset({1}),
    "Range": frozenset({0, 1, 2}),
    "Reshape": frozenset({1}),
    "Resize": frozenset({3}),
    "Slice": frozenset({1, 2, 4}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
}
PASSES_VALUES_ON: Final[dict[str, frozenset[int]]] = {
    **dict.fromkeys(
        ("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split"),
        frozenset({0}),
    ),
    **dict.fromkeys(("Squeeze", "Tile", "Transpose", "Unsqueeze"), frozenset({0})),
    "Concat": frozenset(range(64)),
}

# What gives scores or probabilities of classes when a model ends in it, and what may stand behind.
SCORES: Final = frozenset(
    {
        "Gemm",
        "HardSigmoid",
        "If",
        "LogSoftmax",
        "MatMul",
        "Sigmoid",
        "Softmax",
        "TreeEnsembleClassifier",
    }
)
PASSES_SCORES: Final = frozenset(
    {"Add", "Cast", "Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


class MacFact(NamedTuple):
    """Which formula of `graphopt.macs` counts an operator, and in which slots its operands are."""

    formula: Literal[
        "attention",
        "convolution",
        "einsum",
        "matrix-product",
        "packed-product",
        "projected-attention",
        "recurrent",
        "transposed-convolution",
    ]
    operands: tuple[int, ...]


# Multiply-accumulates by (domain, operator). An operator that is not here has none worth counting.
MACS: Final[dict[tuple[str, str], MacFact]] = {
    ("", "Attention"): MacFact("attention", (0, 1, 4)),
    ("", "Conv"): MacFact("convolution", (1,)),
    ("", "ConvInteger"): MacFact("convolution", (1,)),
    ("", "ConvTranspose"): MacFact("transposed-convolution", (0, 1)),
    ("", "DeformConv"): MacFact("convolution", (1,)),
    ("", "Einsum"): MacFact("einsum", ()),
    ("", "GRU"): MacFact("recurrent", (0, 1, 2)),
    ("", "Gemm"): MacFact("matrix-product", (0, 1)),
    ("", "LSTM"): MacFact("recurrent", (0, 1, 2)),
    ("", "MatMul"): MacFact("matrix-product", (0, 1)),
    ("", "MatMulInteger"): MacFact("matrix-product", (0, 1)),
    ("", "QLinearConv"): MacFact("convolution", (3,)),
    ("", "QLinearMatMul"): MacFact("matrix-product", (0, 3)),
    ("", "RNN"): MacFact("recurrent", (0, 1, 2)),
    ("com.microsoft", "Attention"): MacFact("projected-attention", (0, 1, 4)),
    ("com.microsoft", "ConvTransposeWithDynamicPads"): MacFact("transposed-convolution", (0, 1)),
    ("com.microsoft", "DynamicQuantizeLSTM"): MacFact("recurrent", (0, 1, 2)),
    ("com.microsoft", "DynamicQuantizeMatMul"): MacFact("matrix-product", (0, 1)),
    ("com.microsoft", "FusedConv"): MacFact("convolution", (1,)),
    ("com.microsoft", "FusedGemm"): MacFact("matrix-product", (0, 1)),
    ("com.microsoft", "FusedMatMul"): MacFact("matrix-product", (0, 1)),
    ("com.microsoft", "GemmFastGelu"): MacFact("matrix-product", (0, 1)),
    ("com.microsoft", "GroupQueryAttention"): MacFact("attention", (0, 1, 3)),
    ("com.microsoft", "MatMulBnb4"): MacFact("packed-product", (0,)),
    ("com.microsoft", "MatMulIntegerToFloat"): MacFact("matrix-product", (0, 1)),
    ("com.microsoft", "MatMulNBits"): MacFact("packed-product", (0,)),
    ("com.microsoft", "MultiHeadAttention"): MacFact("attention", (0, 1, 6)),
    ("com.microsoft", "QAttention"): MacFact("projected-attention", (0, 1, 8)),
    ("com.microsoft", "QGemm"): MacFact("matrix-product", (0, 3)),
    ("com.microsoft", "QLinearConv"): MacFact("convolution", (3,)),
    ("com.microsoft", "TransposeMatMul"): MacFact("matrix-product", (0, 1)),
    ("com.microsoft.nchwc", "Conv"): MacFact("convolution", (1,)),
}

# Operators with bodies, by how often these run: one of them once, or one as often as data says.
BODIES: Final[dict[str, Literal["branch", "loop", "scan"]]] = {
    "If": "branch",
    "Loop": "loop",
    "Scan": "scan",
}

COMMUTATIVE: Final = frozenset(
    {"Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Max", "Mean", "Min", "Mul"}
    | {"Or", "Sum", "Xor"}
)

# Attributes that became inputs, and later inputs that are settings like those: (operator, name) ->
# (opset since, slot of the input).
ATTRIBUTE_INPUTS: Final[dict[tuple[str, str], tuple[int, int]]] = {
    ("Clip", "max"): (11, 2),
    ("Clip", "min"): (11, 1),
    ("Dropout", "ratio"): (12, 1),
    ("Dropout", "training_mode"): (12, 2),
    ("Pad", "axes"): (18, 3),
    ("Pad", "pads"): (11, 1),
    ("Pad", "value"): (11, 2),
    **{(f"Reduce{kind}", "axes"): (18, 1) for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max")},
    **{(f"Reduce{kind}", "axes"): (18, 1) for kind in ("Mean", "Min", "Prod", "SumSquare")},
    ("ReduceSum", "axes"): (13, 1),
    ("Reshape", "shape"): (5, 1),
    ("Slice", "axes"): (10, 3),
    ("Slice", "ends"): (10, 2),
    ("Slice", "starts"): (10, 1),
    ("Slice", "steps"): (10, 4),
    ("Split", "split"): (13, 1),
    ("Squeeze", "axes"): (13, 1),
    ("TopK", "k"): (10, 1),
    ("Unsqueeze", "axes"): (13, 1),
    ("Upsample", "scales"): (9, 1),
}

IDENTITY: Final = "Identity"

# Operators that folding leaves alone although their inputs are constant: computing them would store
# the weight that they keep small, and runtimes look for them to choose an integer kernel.
QUANTIZERS: Final = frozenset({"DequantizeLinear", "QuantizeLinear"})

# Operators whose output is at most as many elements as their input has, times its rank: a size
# that does not follow before they run is bounded all the same.
BOUNDED_OUTPUTS: Final = frozenset({"Compress", "NonZero", "Unique"})

# Operators that readers should have to themselves: runtimes fuse one with each reader.
ONE_PER_READER: Final = frozenset({"DequantizeLinear"})

# Operators of two operands that broadcast as numpy does: the result has the longer one's rank.
BROADCASTING: Final = frozenset(
    {"Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater"}
    | {"GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu"}
    | {"Pow", "Sub", "Sum", "Xor"}
)

# Operators that compute each element from the same one of their first input; other inputs, like
# the bounds of Clip, are one number each.
ELEMENTWISE: Final = frozenset(
    {"Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil"}
    | {"Celu", "Clip", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"}
    | {"HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not"}
    | {"Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh"}
    | {"Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"}
)

# Operators that, below an opset, are in training mode where they state more than one output.
TRAINING_BY_OUTPUTS: Final = {"BatchNormalization": 14}

# Operators whose first versions count axes forward only. Runtimes take negative ones all the
# same; onnx's inference does as well, but with a wrong result.
FORWARD_AXES: Final = {"Slice": 10, "Squeeze": 11, "Unsqueeze": 11}

# Operators whose `axes` count the axes of the result, which has one more for each.
AXES_OF_OUTPUT: Final = frozenset({"Unsqueeze"})

# Operators that read the shape of their input and none of its elements.
SHAPE_READERS: Final = frozenset({"Shape", "Size"})

# Operators of com.microsoft whose first output, and fourth where there is one (the sum before the
# normalisation), have shape and type of their first input.
SAME_AS_INPUT: Final = frozenset(
    {
        "BiasGelu",
        "FastGelu",
        "Gelu",
        "QLinearLeakyRelu",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QuickGelu",
        "RotaryEmbedding",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)

# Operators of com.microsoft whose output has the shape that a standard operator gives, with the
# slots of the inputs that the standard one takes.
SHAPED_LIKE: Final[dict[str, tuple[str, tuple[int, ...]]]] = {
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)),
    "FusedConv": ("Conv", (0, 1)),
    "FusedGemm": ("Gemm", (0, 1)),
    "MatMulIntegerToFloat": ("MatMul", (0, 1)),
    "QGemm": ("Gemm", (0, 3)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QLinearMul": ("Mul", (0, 3)),
}


# Operators of the standard domain that ONNX does not define (most it had before 1.5, as
# experiments) and that onnxruntime's CPU provider has a kernel for, most of them up to opset 9.
# The two copies are what onnxruntime writes into models that it optimised for a GPU.
LEGACY: Final = frozenset(
    {
        "Affine",
        "Crop",
        "DynamicSlice",
        "ImageScaler",
        "MemcpyFromHost",
        "MemcpyToHost",
        "ParametricSoftplus",
        "Scale",
        "ScaledTanh",
        "SimplifiedLayerNormalization",
    }
)


def is_known(op: str) -> bool:
    """True for an operator of the standard domain that ONNX, in any version, or a runtime has."""
    return op in LEGACY or onnx.defs.has(op)


# For judging results: operators that only widen a stored type, that pick elements (the output that
# holds their indices), and that keep every element.
STORAGE_READERS: Final = frozenset({"Cast", "CastLike", "DequantizeLinear"})
PICKS: Final = {"ArgMax": 0, "ArgMin": 0, "NonMaxSuppression": 0, "TopK": 1}
ELEMENTS_IN_PLACE: Final = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
)


def is_pure(node: Node, model: Model) -> bool:
    """True where a node without readers can go: it does nothing but compute its outputs."""
    inner = (other for body in node.graphs() for other in body.nodes)
    if not all(is_pure(other, model) for other in inner):
        return False
    alone = onnx.NodeProto(op_type=node.op, domain=node.domain, overload=node.overload)
    return _is_pure(alone, model.functions)  # bodies of the proto are as they were in the file


def _is_pure(
    node: onnx.NodeProto,
    functions: Mapping[tuple[str, str, str], onnx.FunctionProto],
    inside: frozenset[tuple[str, str, str]] = frozenset(),
) -> bool:
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    key = (domain, node.op_type, node.overload)
    inner = [body.node for a in node.attribute for body in (a.g, *a.graphs)]
    if (function := functions.get(key)) is not None:
        if key in inside:
            return False  # calls itself, which ONNX forbids
        inside |= {key}
        inner.append(function.node)
    elif domain not in PURE_DOMAINS:
        return False
    return all(_is_pure(other, functions, inside) for nodes in inner for other in nodes)


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
