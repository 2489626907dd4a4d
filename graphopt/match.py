"""Matching: every way a pattern fits at a node, alternatives and operand orders included.

Matching is complete. Committing to the first local success would find (x*a)+(x*b) in half of its
operand orders only, so each choice is a generator that the next failure resumes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from graphopt.constants import CONSTANT, constant_of
from graphopt.ir import Model, Node, Value, Weight
from graphopt.operators import (
    ATTRIBUTE_INPUTS,
    AXES_OF_OUTPUT,
    BROADCASTING,
    COMMUTATIVE,
    TRAINING_BY_OUTPUTS,
)
from graphopt.rules import (
    Const,
    Either,
    Literal,
    Operand,
    Output,
    PatternNode,
    Rule,
    Variable,
    Vars,
    levels,
    needs,
)
from graphopt.shapes import Types

_MAX_BINDINGS = 256  # ways to fit one node that are looked at; real rules have a handful
_LITERAL_ULPS = 4  # a number written by an exporter is the rule's, rounded to its type


@dataclass(slots=True)
class Binding:
    """What a pattern stands for at one place: nodes by index, parameters by name."""

    nodes: dict[int, Node] = field(default_factory=dict)
    variables: dict[str, Value | tuple[Value, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """The model that is matched against, with what is proven of its values."""

    model: Model
    types: Types

    @functools.cached_property
    def opset(self) -> int:
        return self.model.opsets.get("", 1)

    def constant(self, value: Value | None) -> Weight | None:
        """The weight behind a value, however the model states it."""
        return constant_of(value, self.model.store)


def matches(rule: Rule, node: Node, context: Context) -> Iterator[Binding]:
    """Every binding of the rule with its root at `node`, whose interior is nobody else's.

    The same Binding object is yielded each time, changed in place.
    """
    for root in rule.roots:
        if root.op != node.op:
            continue
        matcher = Matcher(context)
        found = matcher.node(root, node)
        for _ in itertools.islice(found, _MAX_BINDINGS):
            if _is_private(matcher.binding, node) and _binds_all(rule, matcher.binding):
                yield matcher.binding


class RuleIndex:
    """The rules that may fit a node, by its operator and by what computes its inputs.

    Most patterns fit hardly anywhere, and this shows it in a fraction of the time of an attempt.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._roots: dict[str, list[tuple[Rule, tuple[frozenset[str], ...]]]] = {}
        self._reach: dict[str, int] = {}  # the farthest that an operator stands from a root
        for rule in rules:
            for root in rule.roots:
                self._roots.setdefault(root.op, []).append((rule, needs(root)))
                for op, level in levels(root):
                    self._reach[op] = max(level, self._reach.get(op, 0))
        self._found: dict[tuple[str, frozenset[str]], tuple[Rule, ...]] = {}

    def at(self, node: Node) -> tuple[Rule, ...]:
        """In the order of the rules, each once."""
        if node.domain or node.op not in self._roots:
            return ()
        key = node.op, _sources(node)
        found = self._found.get(key)
        if found is None:
            fitting = (
                rule
                for rule, needed in self._roots[node.op]
                if all(not key[1].isdisjoint(ops) for ops in needed)
            )
            found = self._found[key] = tuple({rule.name: rule for rule in fitting}.values())
        return found

    def affected(self, changed: Sequence[Node]) -> dict[Node, None]:
        """The nodes, and the readers from which a pattern could see one of them."""
        found = dict.fromkeys(changed)
        for node in changed:
            layer: dict[Node, None] = {node: None}
            for _ in range(self._reach.get(node.op, 0)):
                made = [value for at in layer for value in at.outputs if value is not None]
                layer = {reader: None for value in made for reader in value.consumers}
                found.update(layer)
        return found


def _sources(node: Node) -> frozenset[str]:
    """The operators whose results the node reads; "" where one may be a constant."""
    found = set()
    for value in node.inputs:
        if value is not None:
            producer = value.producer
            found.add("" if producer is None else producer.op)
            if producer is not None and producer.op == CONSTANT:
                found.add("")
    return frozenset(found)


def _binds_all(rule: Rule, binding: Binding) -> bool:
    """Parameters that the chosen alternative leaves out must be absent by declaration."""
    for name, variable in rule.variables.items():
        if name not in binding.variables:
            if variable.default is None:
                return False
            binding.variables[name] = None
    return True


def _is_private(binding: Binding, root: Node) -> bool:
    """True where no value inside the match is read elsewhere, bodies included, or an output."""
    matched = set(binding.nodes.values())
    for node in matched - {root}:
        for value in node.outputs:
            if value is None:
                continue
            if value.is_output or value in value.graph.pinned:
                return False
            if any(reader not in matched for reader in value.consumers):
                return False
    return True


class Matcher:
    """One attempt: every method yields once for each way, with `binding` holding it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.binding = Binding()

    def operand(self, pattern: Operand, value: Value | None) -> Iterator[None]:
        if isinstance(pattern, Variable):
            yield from self.variable(pattern, value)
        elif isinstance(pattern, Literal):
            if value is not None and self.equals(value, pattern.value):
                yield
        elif isinstance(pattern, Either):
            for option in pattern.options:
                yield from self.operand(option, value)
        elif value is not None and value.producer is not None:
            yield from self.output(pattern, value, value.producer)

    def output(self, pattern: Output, value: Value, producer: Node) -> Iterator[None]:
        outputs = producer.outputs
        if pattern.slot < len(outputs) and outputs[pattern.slot] is value:
            yield from self.node(pattern.node, producer)

    def variable(self, pattern: Variable, value: Value | None) -> Iterator[None]:
        if not self.accepts(pattern, value):
            return
        bound = self.binding.variables
        fresh = pattern.name not in bound
        if fresh:
            bound[pattern.name] = value
        yield
        if fresh:
            del bound[pattern.name]

    def accepts(self, pattern: Variable, value: Value | None) -> bool:
        """True where the variable stands for this value, or may come to."""
        bound = self.binding.variables
        if pattern.name in bound:
            return bound[pattern.name] is value
        if value is None:
            return pattern.default is not None
        return pattern.kind is not Const or self.context.constant(value) is not None

    def node(self, pattern: PatternNode, node: Node) -> Iterator[None]:
        bound = self.binding.nodes
        if pattern.index in bound:
            if bound[pattern.index] is node:
                yield
            return
        if pattern.op != node.op or node.domain or node in bound.values():
            return
        if bound and node.graph is not next(iter(bound.values())).graph:
            return  # a body may read the value, but a rewrite of it belongs to the other graph
        if not self.has_outputs(pattern, node) or not self.has_attributes(pattern, node):
            return
        bound[pattern.index] = node
        for values in self.orders(pattern, node):
            if self.keeps_rank(pattern, node, values):
                yield from self.operands(pattern.operands, values)
        del bound[pattern.index]

    def keeps_rank(self, pattern: PatternNode, node: Node, values: Sequence[Value | None]) -> bool:
        """False where a number of the pattern has axes that may make the result have more."""
        if node.op not in BROADCASTING or not pattern.has_literals:
            return True
        for operand, value in zip(pattern.operands, values, strict=False):
            if not isinstance(operand, Literal) or value is None:
                continue
            weight = self.context.constant(value)
            others = [self.context.types[v] for v in values if v is not None and v is not value]
            ranks = [kind.rank for kind in others if kind is not None and kind.rank is not None]
            if weight is not None and len(weight.shape) > max(ranks, default=0):
                return False
        return True

    def operands(
        self, patterns: Sequence[Operand], values: Sequence[Value | None]
    ) -> Iterator[None]:
        if not patterns:
            if not values:
                yield
            return
        first = patterns[0]
        if isinstance(first, Variable) and first.kind is Vars:
            yield from self.rest(first, values)
            return
        if not values and not (isinstance(first, Variable) and first.default is not None):
            return
        value, following = (values[0], values[1:]) if values else (None, ())
        ways = (
            self.variable(first, value)
            if isinstance(first, Variable)
            else self.operand(first, value)
        )
        if len(patterns) == 1 and not following:
            yield from ways
            return
        for _ in ways:
            yield from self.operands(patterns[1:], following)

    def rest(self, pattern: Variable, values: Sequence[Value | None]) -> Iterator[None]:
        bound = self.binding.variables
        present = tuple(value for value in values if value is not None)
        if pattern.name in bound or len(present) != len(values):
            return
        bound[pattern.name] = present
        yield
        del bound[pattern.name]

    def orders(self, pattern: PatternNode, node: Node) -> Iterator[Sequence[Value | None]]:
        """The inputs that are operands, in each order that means the same."""
        settled = _settled(pattern, self.context.opset)
        values = [value for slot, value in enumerate(node.inputs) if slot not in settled]
        while values and values[-1] is None:
            values.pop()
        yield values
        if node.op in COMMUTATIVE and len(values) == 2 and values[0] is not values[1]:
            yield values[::-1]

    def has_outputs(self, pattern: PatternNode, node: Node) -> bool:
        """True where the node computes no output that the pattern does not know of."""
        if pattern.outputs is None or pattern.outputs == len(node.outputs) == 1:
            return True
        if pattern.outputs == 1:
            used = sum(value is not None and is_needed(value) for value in node.outputs[1:])
            trains = self.context.opset < TRAINING_BY_OUTPUTS.get(node.op, 0)
            return used == 0 and not (trains and len(node.outputs) > 1)
        return len(node.outputs) == pattern.outputs

    def has_attributes(self, pattern: PatternNode, node: Node) -> bool:
        return all(self.agrees(node, name, wanted) for name, wanted in pattern.attributes.items())

    def agrees(self, node: Node, name: str, wanted: object) -> bool:
        try:
            found = stated(node, name, self.context)
        except LookupError:
            return False
        if name in ("axes", "axis", "perm") and found is not None:
            found, wanted = self.positive(node, found), self.positive(node, wanted)
        return bool(np.array_equal(np.asarray(found), np.asarray(wanted)))

    def positive(self, node: Node, axes: Any) -> Any:
        """Axes counted from the front, where the rank is proven."""
        known = self.context.types[node.inputs[0]] if node.inputs[0] is not None else None
        if known is None or known.rank is None:
            return axes
        found = np.asarray(axes)
        rank = known.rank + (found.size if node.op in AXES_OF_OUTPUT else 0)
        return np.where(found < 0, found + rank, found)

    def equals(self, value: Value, wanted: float) -> bool:
        """True for a constant of one element, the number as its type can hold it."""
        weight = self.context.constant(value)
        if weight is None or weight.size != 1:
            return False
        if weight.data_type == onnx.TensorProto.STRING:
            return False
        found = weight.values.reshape(-1)
        nearest = np.asarray([wanted]).astype(found.dtype)
        if found.dtype.kind in "iub":
            return bool(found[0] == nearest[0]) and float(nearest[0]) == wanted
        gap = abs(float(found[0]) - float(nearest[0]))
        return gap <= _LITERAL_ULPS * _epsilon(found.dtype) * abs(float(nearest[0]))


@functools.lru_cache(maxsize=4096)
def _settled(pattern: PatternNode, opset: int) -> frozenset[int]:
    """Inputs that are attributes to the pattern: it names them so, or not at all."""
    slots = {
        name: slot
        for op, name in ATTRIBUTE_INPUTS
        if op == pattern.op and (slot := input_slot(op, name, opset)) is not None
    }
    named = {slot for name, slot in slots.items() if name in pattern.attributes}
    if any(isinstance(each, Variable) and each.kind is Vars for each in pattern.operands):
        return frozenset(named)
    free = (slot for slot in itertools.count() if slot not in named)
    by_position = set(itertools.islice(free, len(pattern.operands)))
    return frozenset(named | (set(slots.values()) - by_position))


def stated(node: Node, name: str, context: Context) -> Any:
    """An attribute's value: as the node states it, as the input that it became, or the default.

    None where it has no default. Raises LookupError where no version of the operator has such an
    attribute, and where it is an input that is no constant.
    """
    attribute = node.attribute(name)
    if attribute is not None:
        return python_value(attribute)
    slot = input_slot(node.op, name, context.opset)
    if slot is not None:
        if slot >= len(node.inputs) or node.inputs[slot] is None:
            return None
        weight = context.constant(node.inputs[slot])
        if weight is None:
            raise LookupError(f"{name} of {node.label} is not constant")
        return weight.values
    return default_of(node.op, name, context.opset)


def input_slot(op: str, name: str, opset: int) -> int | None:
    """The input that an attribute became, where it has become one by this version."""
    since, slot = ATTRIBUTE_INPUTS.get((op, name), (0, -1))
    return slot if slot >= 0 and opset >= since else None


def python_value(attribute: onnx.AttributeProto) -> Any:
    """Numbers, text and lists as Python has them; tensors and graphs as protos."""
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


@functools.lru_cache(maxsize=4096)
def default_of(op: str, name: str, opset: int) -> Any:
    """The default of an attribute, None where it has none.

    Where the version has no such attribute, that of the next version which does, else of the last
    one that did: a new attribute's default is what the operator did before. Raises LookupError.
    """
    try:
        since = onnx.defs.get_schema(op, opset, "").since_version
    except onnx.defs.SchemaError:
        raise LookupError(f"there is no {op} in opset {opset}") from None
    stating = {s.since_version: s for s in _versions(op) if name in s.attributes}
    later = [version for version in stating if version >= since]
    if not stating:
        if (op, name) in ATTRIBUTE_INPUTS:
            return None  # a later version's input: this one does what leaving it out does
        raise LookupError(f"{op} has no attribute {name}")
    chosen = stating[min(later) if later else max(stating)]
    default = chosen.attributes[name].default_value
    return python_value(default) if default.type else None


@functools.lru_cache(maxsize=256)
def _versions(op: str) -> tuple[onnx.defs.OpSchema, ...]:
    schemas = onnx.defs.get_all_schemas_with_history()
    return tuple(s for s in schemas if s.name == op and s.domain == "")


def is_needed(value: Value) -> bool:
    """True for what a node reads, the graph gives back, or an annotation names."""
    return bool(value.consumers) or value.is_output or value in value.graph.pinned


def _epsilon(dtype: np.dtype[Any]) -> float:
    if dtype.kind == "f":
        return float(np.finfo(dtype).eps)
    return float(onnx_epsilon(dtype.name))


def onnx_epsilon(name: str) -> float:
    """Spacing of bfloat16 and narrower types at 1."""
    return {"bfloat16": 2.0**-7, "float8_e4m3fn": 0.125}.get(name, 0.25)
