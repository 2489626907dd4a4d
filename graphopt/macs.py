"""Multiply-accumulates (MACs) of a model, from the shapes of its values.

One MAC is one multiplication with its addition; a bias, an activation or a normalisation counts
nothing, padding is counted as if it were data, and a causal mask saves nothing. Which operator is
counted how stands in `graphopt.operators.MACS`. Of an If the larger branch counts, of a Loop or a
Scan one iteration.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from graphopt.operators import BODIES, MACS
from graphopt.sizes import Call, Size, walk

Sizes = Sequence[Size | None]


@dataclass
class Macs:
    """Counts of a graph: by operator, and how many of the nodes that have MACs stayed unknown."""

    by_operator: Counter[str] = field(default_factory=Counter)
    nodes: int = 0
    unknown: int = 0
    has_loop: bool = False

    @property
    def total(self) -> int:
        """MACs of all nodes that are known."""
        return self.by_operator.total()

    def add(self, other: Macs) -> None:
        """Include another count."""
        self.by_operator.update(other.by_operator)
        self.nodes += other.nodes
        self.unknown += other.unknown
        self.has_loop |= other.has_loop


def count(
    model: onnx.ModelProto, inputs: Mapping[str, Size], symbols: Mapping[str, int] | None = None
) -> Macs:
    """Count a model, hollow or not, at these shapes of its inputs."""
    return _count(walk(model, inputs, symbols or {}))


def _count(calls: Iterable[Call]) -> Macs:
    result = Macs()
    for call in calls:
        operator = ("" if call.node.domain == "ai.onnx" else call.node.domain, call.node.op_type)
        if operator in MACS:
            fact = MACS[operator]
            operands = [call.inputs[i] if i < len(call.inputs) else None for i in fact.operands]
            absent = [i >= len(call.inputs) or not call.node.input[i] for i in fact.operands]
            macs = _FORMULAS[fact.formula](_Operands(call, operands, absent))
            result.nodes += 1
            if macs is None:
                result.unknown += 1
            else:
                result.by_operator[label(call.node)] += macs
        bodies = [_count(body) for body in call.bodies]
        if bodies and BODIES[call.node.op_type] == "branch":
            bodies = [max(bodies, key=lambda body: (body.total, body.unknown, body.nodes))]
        elif bodies:
            result.has_loop |= any(body.nodes for body in bodies)
        for body in bodies:
            result.add(body)
    return result


def label(node: onnx.NodeProto) -> str:
    """How reports call an operator: its name, with the domain where it is not the standard one."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


class _Operands:
    """What a formula reads: `sizes` in the order of the fact, None where unknown or `absent`."""

    def __init__(self, call: Call, sizes: Sizes, absent: Sequence[bool]) -> None:
        self.sizes = sizes
        self.absent = absent
        self.all_inputs = call.inputs
        self.output = call.outputs[0] if call.outputs else None
        self._attributes = {a.name: a for a in call.node.attribute}

    def integer(self, name: str, default: int = 0) -> int:
        return self._attributes[name].i if name in self._attributes else default

    def text(self, name: str) -> str:
        return self._attributes[name].s.decode() if name in self._attributes else ""


def _convolution(o: _Operands) -> int | None:
    """Every output element takes one kernel: weight (outputs, inputs / groups, *kernel)."""
    (weight,) = o.sizes
    if o.output is None or weight is None:
        return None
    return math.prod(o.output) * math.prod(weight[1:])


def _transposed_convolution(o: _Operands) -> int | None:
    """Every input element meets one kernel: weight (inputs, outputs / groups, *kernel)."""
    data, weight = o.sizes
    if data is None or weight is None:
        return None
    return math.prod(data) * math.prod(weight[1:])


def _matrix_product(o: _Operands) -> int | None:
    """(..., M, K) times (..., K, N), either transposed: the output's elements times K."""
    left, right = o.sizes
    if o.output is None:
        return None
    if left:
        depth = left[-2] if o.integer("transA") and len(left) > 1 else left[-1]
    elif right:
        depth = right[-1] if o.integer("transB") or len(right) == 1 else right[-2]
    else:
        return None
    return math.prod(o.output) * depth


def _packed_product(o: _Operands) -> int | None:
    """(..., K) times a packed (K, N) whose sizes are attributes."""
    (data,) = o.sizes
    return None if data is None else math.prod(data) * o.integer("N")


def _einsum(o: _Operands) -> int | None:
    """One pass over all indices for every product; a sum over a single operand has none."""
    extents: dict[str, int] = {}
    terms = o.text("equation").replace(" ", "").split("->")[0].split(",")
    if len(terms) != len(o.all_inputs):
        return None
    for term, size in zip(terms, o.all_inputs, strict=True):
        if size is None:
            return None
        before, dots, after = term.partition("...")
        names = list(before) + [f".{i}" for i in range(len(size) - len(before + after), 0, -1)]
        names = names + list(after) if dots else list(before)
        for name, extent in zip(names, size, strict=False):
            extents[name] = max(extents.get(name, 1), extent)
    return math.prod(extents.values()) * (len(terms) - 1)


def _recurrent(o: _Operands) -> int | None:
    """Each step of each sequence: weights (directions, gates, inputs) and (.., gates, hidden)."""
    data, weight, recurrence = o.sizes
    if data is None or weight is None or recurrence is None:
        return None
    return data[0] * data[1] * (math.prod(weight) + math.prod(recurrence))


def _attention(o: _Operands) -> int | None:
    """Scores and mixture: each element of query and of output meets every key."""
    query, key, past = o.sizes
    if query is None or o.output is None:
        return None
    if o.absent[1]:  # query, key and value packed as (batch, length, heads, 3, size)
        return 2 * math.prod(query) // 3 * query[1] if len(query) == 5 else None
    if key is None or len(key) < 3 or (past is None and not o.absent[2]):
        return None
    length = key[-2] + (past[-2] if past else 0)
    return (math.prod(query) + math.prod(o.output)) * length


def _projected_attention(o: _Operands) -> int | None:
    """Input (batch, length, inputs) times weight (inputs, 3 x hidden), then attention."""
    data, weight, past = o.sizes
    if data is None or weight is None or len(data) != 3 or len(weight) != 2:
        return None
    if past is None and not o.absent[2]:
        return None
    batch, length, _ = data
    total = length + (past[-2] if past else 0)
    return math.prod(data) * weight[1] + batch * length * total * weight[1] * 2 // 3


_FORMULAS: Final[dict[str, Callable[[_Operands], int | None]]] = {
    "attention": _attention,
    "convolution": _convolution,
    "einsum": _einsum,
    "matrix-product": _matrix_product,
    "packed-product": _packed_product,
    "projected-attention": _projected_attention,
    "recurrent": _recurrent,
    "transposed-convolution": _transposed_convolution,
}
