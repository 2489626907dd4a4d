"""Patterns: what the first half of a rule draws, and the checks that it is drawn rightly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.language import Absent, Const, RuleError, Var, Vars


@dataclass(frozen=True, eq=False)
class Variable(Const):
    """A parameter of the rule."""

    name: str
    kind: type[Var]
    default: Absent | None = None

    @property
    def is_absent(self) -> bool:
        return self._unavailable()

    def __or__(self, other: Var) -> Var:
        return Either((self, _operand(other)))


@dataclass(frozen=True, eq=False)
class Literal(Var):
    """A number that a constant in the graph must equal."""

    value: float


@dataclass(eq=False)
class PatternNode:
    """An operator of the pattern; `attributes` are required values."""

    index: int
    op: str
    operands: tuple[Operand, ...]
    attributes: Mapping[str, Any]
    outputs: int | None


@dataclass(frozen=True, eq=False)
class Output(Var):
    """One output of an operator of the pattern."""

    node: PatternNode
    slot: int

    def __or__(self, other: Var) -> Var:
        return Either((self, _operand(other)))


@dataclass(frozen=True, eq=False)
class Outputs(Vars):
    """All outputs of an operator of the pattern, however many there are."""

    node: PatternNode


@dataclass(frozen=True, eq=False)
class Either(Var):
    """Alternatives, tried in order."""

    options: tuple[Operand, ...]

    def __or__(self, other: Var) -> Var:
        return Either((*self.options, _operand(other)))


Operand = Variable | Literal | Output | Either


class PatternOps:
    """Records the operators that the first half of a rule names."""

    def __init__(self) -> None:
        self.nodes: list[PatternNode] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self._node, name)

    def _node(
        self, name: str, /, *operands: object, outputs: int | None = 1, **attributes: object
    ) -> Output | tuple[Output, ...] | Outputs:
        node = PatternNode(
            len(self.nodes), name, tuple(map(_operand, operands)), attributes, outputs
        )
        self.nodes.append(node)
        if outputs is None:
            return Outputs(node)
        found = tuple(Output(node, slot) for slot in range(outputs))
        return found[0] if outputs == 1 else found


def _operand(value: object) -> Operand:
    if isinstance(value, Variable | Literal | Output | Either):
        return value
    if isinstance(value, int | float):  # True and False are constants of boolean operators
        return Literal(float(value))
    raise RuleError(f"{value!r} cannot stand in a pattern: use a parameter, a number, op.X(...)")


def labels_of(
    local: Mapping[str, object], nodes: Sequence[PatternNode]
) -> dict[str, tuple[PatternNode, ...]]:
    """What samples may call operators: the rule's local variables, and operators as such.

    Operators with a local name are still meant by their operator's; the local name goes first.
    """
    labels: dict[str, tuple[PatternNode, ...]] = {}
    for node in nodes:
        labels[node.op] = (*labels.get(node.op, ()), node)
    for name, bound in local.items():
        if named := tuple(dict.fromkeys(_nodes_behind(bound))):
            labels[name] = named
    return labels


def _nodes_behind(bound: object) -> Iterator[PatternNode]:
    if isinstance(bound, Output | Outputs):
        yield bound.node
    elif isinstance(bound, Either):
        for option in bound.options:
            yield from _nodes_behind(option)
    elif isinstance(bound, tuple):
        for part in bound:
            yield from _nodes_behind(part)


def depth_of(item: PatternNode | Operand) -> int:
    """Operators on the longest way down from here."""
    if isinstance(item, PatternNode):
        return 1 + max((depth_of(operand) for operand in item.operands), default=0)
    if isinstance(item, Output):
        return depth_of(item.node)
    if isinstance(item, Either):
        return max(depth_of(option) for option in item.options)
    return 0


def roots_of(name: str, root: object) -> tuple[PatternNode, ...]:
    """The root of each alternative; several outputs must be those of one node, all of them."""
    if isinstance(root, Either):
        return tuple(node for option in root.options for node in roots_of(name, option))
    if isinstance(root, Outputs) or (isinstance(root, Output) and root.node.outputs == 1):
        return (root.node,)
    if isinstance(root, tuple) and all(isinstance(part, Output) for part in root):
        nodes = {id(part.node): part.node for part in root}
        if len(nodes) == 1 and [part.slot for part in root] == list(range(len(root))):
            return tuple(nodes.values())
    raise RuleError(f"rule {name!r}: the yield gives one operator's output, or all of its outputs")


def check_alternatives(
    name: str, roots: Sequence[PatternNode], variables: Mapping[str, Variable]
) -> None:
    """Every way through the pattern must bind every parameter that has no default."""
    needed = {v.name for v in variables.values() if v.default is None}
    for root in roots:
        lacking = needed - _common(_bound_by(root))
        if lacking:
            raise RuleError(
                f"rule {name!r}: some alternative leaves {', '.join(sorted(lacking))} unbound; "
                "bind it in each, or declare it absent()"
            )


def _bound_by(item: PatternNode | Operand) -> list[set[str]]:
    """The names that each way through the item binds, at least."""
    if isinstance(item, Variable):
        return [{item.name}]
    if isinstance(item, Either):
        return [found for option in item.options for found in _bound_by(option)]
    if isinstance(item, Output):
        return _bound_by(item.node)
    if isinstance(item, PatternNode):
        each = [_common(_bound_by(operand)) for operand in item.operands]
        return [set[str]().union(*each)]
    return [set()]


def _common(sets: Sequence[set[str]]) -> set[str]:
    return functools.reduce(lambda a, b: a & b, sets)
