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

    @functools.cached_property
    def has_literals(self) -> bool:
        return any(isinstance(operand, Literal) for operand in self.operands)


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


def needs(root: PatternNode) -> tuple[frozenset[str], ...]:
    """For each operand that not every operator may compute, which may; "" stands for a constant.

    What a node reads is checked against this before anything is matched: most patterns fit no
    node, and this shows it in a fraction of the time.
    """
    found = (_sources(operand) for operand in root.operands)
    return tuple(frozenset(ops) for ops in found if ops is not None)


def _sources(operand: Operand) -> set[str] | None:
    """Operators that may compute the operand; None for any, or for an input left out."""
    if isinstance(operand, Output):
        return {operand.node.op}
    if isinstance(operand, Literal):
        return {""}
    if isinstance(operand, Either):
        each = [_sources(option) for option in operand.options]
        return None if None in each else set[str]().union(*filter(None, each))
    return {""} if operand.kind is Const and operand.default is None else None


def levels(item: PatternNode | Operand, level: int = 0) -> Iterator[tuple[str, int]]:
    """Each operator of a pattern, and how many nodes away from its root it stands."""
    if isinstance(item, PatternNode):
        yield item.op, level
        for operand in item.operands:
            yield from levels(operand, level + 1)
    elif isinstance(item, Output):
        yield from levels(item.node, level)
    elif isinstance(item, Either):
        for option in item.options:
            yield from levels(option, level)


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
