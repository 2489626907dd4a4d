"""Which operators onnxruntime really runs, and what of a quantized model stayed unfused.

A quantized model is only fast where onnxruntime turns DequantizeLinear, operator and QuantizeLinear
into one integer kernel. Where it does not, the operator computes in float and pays for the
conversions on every run; nothing but the optimised graph tells.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from graphopt.executed import DEQUANTIZE, QUANTIZE, Executed
from graphopt.ir import Node, Value
from graphopt.marked import MarkedCopy
from graphopt.runtime import Level

_INTEGER_PREFIXES: Final = (
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulNBits",
    "QAttention",
    "QGemm",
    "QLinear",
    "QMoE",
)

# Operators of ONNX and onnxruntime that only move or compare elements: they run on 8-bit integers
# as they are, where one scale holds before and behind.
_MOVEMENT: Final = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "MaxPool",
        "NhwcMaxPool",
        "Pad",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Upsample",
    }
)


@dataclass(frozen=True)
class Census:
    """Operators of the graph that onnxruntime really runs, bodies of If, Loop and Scan included.

    `counts` is keyed by operator, prefixed with its domain unless that is ai.onnx
    (`com.microsoft::FusedConv`); `integer` counts those among them that compute or move 8-bit (or
    narrower) data. The other fields name values of the model, in the order of execution:
    `dequantized_constants` the weights that are dequantized on every run (each was meant to fuse
    into an integer kernel), `quantized` and `dequantized` the floats that QuantizeLinear reads and
    DequantizeLinear computes at run time, constants excepted, and `unfused` the roots that were
    asked for and run on no integer kernel.
    """

    counts: Mapping[str, int]
    integer: Mapping[str, int]
    dequantized_constants: tuple[str, ...]
    quantized: tuple[str, ...]
    dequantized: tuple[str, ...]
    unfused: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """How many nodes there are in all."""
        return sum(self.counts.values())

    @property
    def integer_kernels(self) -> int:
        """How many nodes compute on integer weights or activations, data movement excepted."""
        kernels = (n for op, n in self.integer.items() if is_integer(op.rpartition("::")[2]))
        return sum(kernels)


def is_integer(op: str) -> bool:
    """True for the kernels of onnxruntime that compute on quantized weights or activations."""
    return op.startswith(_INTEGER_PREFIXES)


def census(
    model: Path | bytes,
    roots: Iterable[str] = (),
    *,
    optimizations: Level = "default",
    threads: int = 0,
    custom_ops: Sequence[Path] = (),
    folder: Path | None = None,
) -> Census:
    """Count the operators left after onnxruntime's own optimisations at this level.

    `roots` are values whose operators are meant to run on integer kernels. The model and its
    optimised form are written to a temporary folder. Raises RuntimeFailure if onnxruntime refuses
    the model.
    """
    with MarkedCopy(model, folder) as copy:
        graph = copy.executed(optimizations=optimizations, threads=threads, custom_ops=custom_ops)
        return take_census(graph, roots)


def take_census(graph: Executed, roots: Iterable[str] = ()) -> Census:
    """As `census`, of a graph that is already known."""
    counts: collections.Counter[str] = collections.Counter()
    integer: collections.Counter[str] = collections.Counter()
    kernels = _integer_nodes(graph)
    constants, quantized, dequantized = list[str](), list[str](), list[str]()
    for node in graph.nodes:
        key = f"{node.domain}::{node.op}" if node.domain else node.op
        counts[key] += 1
        integer[key] += node in kernels
        if node.op == DEQUANTIZE:
            is_constant = node.inputs[0] is not None and node.inputs[0].constant is not None
            found = constants if is_constant else dequantized
            found.append(_name(graph, node, node.outputs[0]))
        elif node.op == QUANTIZE:
            quantized.append(_name(graph, node, node.inputs[0]))
    return Census(
        dict(counts.most_common()),
        {op: n for op, n in integer.most_common() if n},
        tuple(constants),
        tuple(quantized),
        tuple(dequantized),
        tuple(root for root in roots if _computing(graph, root) not in kernels),
    )


def _integer_nodes(graph: Executed) -> set[Node]:
    """Integer kernels, and what moves their data on the way."""
    kernels: set[Node] = set()
    narrow: set[Value | None] = set()
    for node in graph.nodes:  # producers first
        if is_integer(node.op):
            kernels.add(node)
            if node.op.startswith(("QLinear", "QGemm")):
                narrow.update(node.outputs)
        elif node.op in (QUANTIZE, "DynamicQuantizeLinear"):
            narrow.add(node.outputs[0])
        elif node.op in _MOVEMENT and narrow.issuperset(_moved(node)):
            kernels.add(node)
            narrow.update(node.outputs)
    return kernels


def _moved(node: Node) -> list[Value | None]:
    """The operands that are data, not sizes or indices."""
    return node.inputs if node.op == "Concat" else node.inputs[:1]


def _computing(graph: Executed, root: str) -> Node | None:
    """The executed node of the operator behind a root, whatever converts its result."""
    value = graph.values.get(root)
    while value is not None and value.producer is not None:
        if value.producer.op not in (QUANTIZE, DEQUANTIZE):
            return graph.owners.get(value.producer)
        value = value.producer.inputs[0]
    return None


def _name(graph: Executed, node: Node, value: Value | None) -> str:
    """What the model calls a value that is converted, else what the executed graph calls it."""
    known = "" if value is None else graph.original_name(value)
    stated = "" if value is None else value.name
    return known or graph.conversions.get(node, "") or stated
