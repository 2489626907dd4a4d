"""Small faults in the source of a rule, and checks of the engine switched off for it."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeGuard
from unittest import mock

import numpy as np
import onnx

from graphopt import match
from graphopt.ir import Node, Value, Weight
from graphopt.operators import COMMUTATIVE
from graphopt.rules import Rule, compile_rule

_SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_ORDERED = frozenset({"Sub", "Div", "Pow", "MatMul", "Greater", "Less"})  # operands do not commute
_WORDS = {"constant": "edge", "NOTSET": "VALID", "none": "tanh", "tanh": "none"}


@dataclass(frozen=True)
class Mutant:
    """A broken rule. `made` gives it inside a context that the fault may need."""

    operator: str
    text: str
    made: Callable[[], contextlib.AbstractContextManager[Rule]]


def mutants(rule: Rule, count: int, seed: int) -> list[Mutant]:
    """At least `count` mutants where the source allows; every kind of fault takes its turn."""
    groups: dict[str, list[Mutant]] = {}
    unique: dict[str, Mutant] = {}
    for mutant in (*_of_engine(rule), *_of_opsets(rule), *_of_source(rule)):
        unique.setdefault(mutant.text, mutant)
    for mutant in unique.values():
        groups.setdefault(mutant.operator, []).append(mutant)
    rng = np.random.default_rng(seed)
    for group in groups.values():
        rng.shuffle(group)  # type: ignore[arg-type]
    chosen: list[Mutant] = []
    while any(groups.values()) and len(chosen) < count:
        for group in groups.values():
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


# -- the engine ------------------------------------------------------------------------------------


def _of_engine(rule: Rule) -> Iterator[Mutant]:
    if len(rule.nodes) > len(rule.roots):
        for name, private in (("single-use", _unread), ("output-escape", _not_output)):
            yield Mutant(name, f"{name} check off", _patched(rule, match, "_is_private", private))
    if any(v.kind.__name__ == "Const" for v in rule.variables.values()):
        made = _patched(rule, match.Context, "constant", _default_or_constant)
        yield Mutant("const-ness", "inputs with a default are constant", made)


def _patched(rule: Rule, owner: Any, name: str, new: Any) -> Callable[[], Any]:
    @contextlib.contextmanager
    def made() -> Iterator[Rule]:
        with mock.patch.object(owner, name, new):
            yield rule

    return made


def _unread(binding: match.Binding, root: Node) -> bool:
    """The engine's check without the readers outside the match."""
    inner = set(binding.nodes.values()) - {root}
    return not any(v is not None and v.is_output for node in inner for v in node.outputs)


def _not_output(binding: match.Binding, root: Node) -> bool:
    """The engine's check without graph outputs."""
    matched = set(binding.nodes.values())
    values = [v for node in matched - {root} for v in node.outputs if v is not None]
    return all(reader in matched for value in values for reader in value.consumers)


def _default_or_constant(context: match.Context, value: Value | None) -> Weight | None:
    if value is not None and value.weight is not None:
        return value.weight
    return match.constant_of(value, context.model.store)


def _of_opsets(rule: Rule) -> Iterator[Mutant]:
    """Versions that the rule was not written for."""
    changes: list[dict[str, int]] = []
    if rule.min_opset > 7 and not _is_new(rule):
        changes.append({"min_opset": rule.min_opset - 1})
    if rule.max_opset is not None:
        changes.append({"max_opset": rule.max_opset + 1})
    for change in changes:
        text = ", ".join(f"{key}={value}" for key, value in change.items())
        other = replace(rule, **change)  # type: ignore[arg-type]
        yield Mutant("opset", text, lambda other=other: contextlib.nullcontext(other))  # type: ignore[misc]


def _is_new(rule: Rule) -> bool:
    """True where an operator of the rule first came with its least opset: no other could be."""
    calls = [n for f in reachable(rule.function) for n in ast.walk(_tree(f)) if _is_call_of_op(n)]
    names = {call.func.attr for call in calls}  # type: ignore[union-attr]
    schemas = onnx.defs.get_all_schemas_with_history()
    first: dict[str, int] = {}
    for schema in schemas:
        if schema.domain == "":
            first[schema.name] = min(schema.since_version, first.get(schema.name, 99))
    return any(first.get(name) == rule.min_opset for name in names)


def _is_call_of_op(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and _is_operator(node)


# -- the source ------------------------------------------------------------------------------------


def _of_source(rule: Rule) -> Iterator[Mutant]:
    functions = reachable(rule.function)
    for function in functions:
        tree = _tree(function)
        is_rule = function is functions[0]
        for operator, mutated, text in _changes(tree, is_rule=is_rule):
            where = "" if is_rule else f"{function.__name__}: "
            yield Mutant(operator, f"{where}{text}", _compiled(rule, functions, function, mutated))


def reachable(function: Callable[..., Any]) -> list[FunctionType]:
    """The function and those of `passes` that it calls, directly or not."""
    found = [_plain(function)]
    for one in found:
        for name in _called(_tree(one)):
            other = _names(one).get(name)
            if (
                isinstance(other, FunctionType)
                and other.__module__.startswith("graphopt.passes")
                and other not in found
            ):
                found.append(other)
    return found


def _plain(function: Callable[..., Any]) -> FunctionType:
    assert isinstance(function, FunctionType)
    return function


def _names(function: FunctionType) -> dict[str, Any]:
    """Globals of the function, and what it closes over."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {**function.__globals__, **{name: cell.cell_contents for name, cell in cells}}


def _called(tree: ast.FunctionDef) -> list[str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.id for call in calls if isinstance(call, ast.Name)]


def _tree(function: FunctionType) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    return tree


def _compiled(
    rule: Rule, functions: list[FunctionType], broken: FunctionType, tree: ast.FunctionDef
) -> Callable[[], Any]:
    """The rule with one of its functions exchanged, the others calling that one."""

    @contextlib.contextmanager
    def made() -> Iterator[Rule]:
        spaces = {function: _names(function) for function in functions}
        fresh = {}
        for function, space in spaces.items():
            part = tree if function is broken else _tree(function)
            code = ast.fix_missing_locations(ast.Module([part], []))
            exec(compile(code, f"<{rule.name}>", "exec"), space)
            fresh[function] = space[part.name]
        for space in spaces.values():
            for name, bound in list(space.items()):
                if isinstance(bound, FunctionType) and bound in fresh:
                    space[name] = fresh[bound]
        yield compile_rule(rule.name, fresh[functions[0]], rule.min_opset, rule.max_opset)

    return made


Change = tuple[str, ast.FunctionDef, str]  # operator, the function changed, what changed as text


def _changes(tree: ast.FunctionDef, *, is_rule: bool) -> Iterator[Change]:
    """Every fault at every place: the n-th node of the tree is visited in a copy of it."""
    arrow = _arrow(tree) if is_rule else 0
    annotations = set(_annotations(tree))
    for number, node in enumerate(ast.walk(tree)):
        if node in annotations:
            continue
        before = getattr(node, "lineno", 0) <= arrow and is_rule
        for operator, fault in _faults(node, before=before):
            mutated = copy.deepcopy(tree)
            place = next(n for i, n in enumerate(ast.walk(mutated)) if i == number)
            fault(place)
            yield operator, mutated, _difference(tree, mutated)


def _annotations(tree: ast.FunctionDef) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if (stated := getattr(node, name, None)) is not None:
                yield from ast.walk(stated)


def _arrow(tree: ast.FunctionDef) -> int:
    return next(node.end_lineno or 0 for node in ast.walk(tree) if isinstance(node, ast.Yield))


def _difference(tree: ast.FunctionDef, mutated: ast.FunctionDef) -> str:
    old, new = ast.unparse(tree).splitlines(), ast.unparse(mutated).splitlines()
    kept = [line for line in old if line not in new]
    made = [line for line in new if line not in old]
    return f"{' / '.join(s.strip() for s in kept)}  ->  {' / '.join(s.strip() for s in made)}"


Fault = tuple[str, Callable[[Any], None]]


def _faults(node: ast.AST, *, before: bool) -> Iterator[Fault]:
    """What can be broken at a node; `before` the arrow, or after it."""
    if isinstance(node, ast.arguments):
        yield from _parameters(node)
    elif isinstance(node, ast.Expr) and _is_call(node.value, "require"):
        yield "guard", _remove_guard
        yield "guard", _negate_guard
    elif isinstance(node, ast.BoolOp) and len(node.values) > 1:
        for index in range(len(node.values)):
            yield "guard", lambda n, index=index: n.values.pop(index)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        yield "guard", lambda n: n.ops.__setitem__(0, _COMPARED[type(n.ops[0])]())
    elif isinstance(node, ast.If | ast.IfExp):
        yield "guard", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    elif isinstance(node, ast.BinOp):
        yield from _binary(node)
    elif isinstance(node, ast.Call) and _is_operator(node):
        yield from _pattern(node) if before else _replacement(node)


def _parameters(node: ast.arguments) -> Iterator[Fault]:
    for index, default in enumerate(node.defaults):
        if _is_call(default, "absent") and isinstance(default, ast.Call) and default.args:
            yield (
                "absent",
                lambda n, index=index: n.defaults[index].args.__setitem__(0, ast.Constant(0.75)),
            )


def _binary(node: ast.BinOp) -> Iterator[Fault]:
    if type(node.op) in _SWAPPED:
        yield "sign", lambda n: setattr(n, "op", _SWAPPED[type(n.op)]())
        name = "epsilon" if "eps" in ast.unparse(node.right) else "term"
        yield name, lambda n: n.__dict__.update(_only(n, "left"))
    if isinstance(node.op, ast.BitOr):
        for side in ("left", "right"):
            if not isinstance(node.left, ast.Attribute):
                yield "alternative", lambda n, side=side: n.__dict__.update(_only(n, side))


def _only(node: ast.BinOp, side: str) -> Mapping[str, Any]:
    """The node made to mean one of its sides: the side, added to nothing."""
    kept = getattr(node, side)
    return {
        "left": kept,
        "op": ast.BitOr() if isinstance(node.op, ast.BitOr) else ast.Add(),
        "right": kept if isinstance(node.op, ast.BitOr) else ast.Constant(0),
    }


def _pattern(node: ast.Call) -> Iterator[Fault]:
    """A call of the pattern: attributes, numbers, order."""
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in (None, "outputs"):
            continue
        yield "attribute", lambda n, index=index: n.keywords.pop(index)
        if (other := _other(keyword.value)) is not None:
            kind = "axis" if keyword.arg in ("axis", "axes", "perm") else "attribute"
            yield kind, lambda n, index=index, o=other: setattr(n.keywords[index], "value", o)
    for index, argument in enumerate(node.args):
        number = argument.operand if isinstance(argument, ast.UnaryOp) else argument
        if isinstance(number, ast.Constant) and isinstance(number.value, int | float):
            near = ast.Constant(number.value * 1.1 + 0.01)
            yield "number", lambda n, index=index, o=near: n.args.__setitem__(index, o)
    if isinstance(node.func, ast.Attribute) and node.func.attr in _ORDERED:
        yield "operands", lambda n: n.args.reverse()


def _replacement(node: ast.Call) -> Iterator[Fault]:
    """A call of the replacement: operands and attributes."""
    if len(node.args) > 1:
        yield "operands", lambda n: n.args.pop()
        if isinstance(node.func, ast.Attribute) and node.func.attr not in COMMUTATIVE:
            yield "operands", lambda n: n.args.reverse()
    for index, keyword in enumerate(node.keywords):
        name = "epsilon" if keyword.arg == "epsilon" else "attribute"
        if not _is_default(node, keyword):
            yield name, lambda n, index=index: n.keywords.pop(index)
        if (other := _other(keyword.value)) is not None:
            yield "axis", lambda n, index=index, o=other: setattr(n.keywords[index], "value", o)


def _is_default(call: ast.Call, keyword: ast.keyword) -> bool:
    """True where leaving the attribute out says the same."""
    assert isinstance(call.func, ast.Attribute)
    try:
        stated = ast.literal_eval(keyword.value)
        schema = onnx.defs.get_schema(call.func.attr)
        default = schema.attributes[keyword.arg or ""].default_value
    except (ValueError, KeyError, onnx.defs.SchemaError):
        return False
    return bool(default.type) and bool(match.python_value(default) == stated)


def _other(value: ast.expr) -> ast.expr | None:
    """Another value of the same kind."""
    try:
        found = ast.literal_eval(value)
    except ValueError:
        return None
    if isinstance(found, str):
        return ast.Constant(_WORDS[found]) if found in _WORDS else None
    if isinstance(found, bool | int):
        return ast.Constant(1 - found if found in (0, 1) else found - 1)
    if isinstance(found, float):
        return ast.Constant(found * 1.1 + 0.01)
    if isinstance(found, list) and found and all(isinstance(part, int) for part in found):
        return ast.parse(repr([*found[:-1], found[-1] - 1]), mode="eval").body
    return None


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _is_operator(node: ast.Call) -> bool:
    function = node.func
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "op"
    )


def _remove_guard(node: ast.Expr) -> None:
    node.value = ast.Constant(None)


def _negate_guard(node: ast.Expr) -> None:
    assert isinstance(node.value, ast.Call)
    node.value.args[0] = ast.UnaryOp(ast.Not(), node.value.args[0])
