"""Firing rules: names bound to what was matched, a replacement planned, checked, then committed.

Nothing is changed while a rule computes. It plans nodes; each is typed as it is planned; and only
a plan whose results agree with what is proven of the values they replace reaches the editor.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from graphopt import collector
from graphopt.bound import Bound, BoundVars, Planned
from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.match import Binding, Context, RuleIndex, is_needed, matches
from graphopt.plan import Plan, Replacement, root_name
from graphopt.rules import Rejected, Rule, RuleError, Var

_FIRINGS_PER_NODE: Final = 50  # far more than any set of rules that ends has ever needed
_SHARED_WITHIN: Final = 4  # nodes of one pattern that read the same value


@dataclass
class Tally:
    """How often rules fired, and why they did not where their pattern fitted."""

    fired: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)


def apply_rules(rules: Sequence[Rule], edit: Editor, tally: Tally | None = None) -> Tally:
    """Fire the rules wherever they fit, until none does. Linear in nodes, by a worklist.

    Raises RuleError where they fire without end, because they undo one another.
    """
    tally = tally or Tally()
    with collector.paused():
        _work_off(rules, edit, tally)
    return tally


def _work_off(rules: Sequence[Rule], edit: Editor, tally: Tally) -> None:
    context = Context(edit.model, edit.types)
    index = RuleIndex(rule for rule in rules if rule.applies_to(context.opset))
    # readers first: a pattern is tried before the smaller ones that it may hold inside
    pending = deque(node for graph in edit.model.graphs() for node in reversed(graph.nodes))
    queued = set(pending)
    fuel = _FIRINGS_PER_NODE * (len(pending) + _FIRINGS_PER_NODE)
    while pending:
        node = pending.popleft()
        queued.discard(node)
        if node not in node.graph.nodes:
            continue
        for rule in index.at(node):
            touched = _fire(rule, node, context, edit, tally)
            if touched is not None:
                fuel -= 1
                if fuel < 0:
                    raise RuleError(f"rules undo one another without end, {rule.name!r} among them")
                fresh = [n for n in index.affected(touched) if n not in queued]
                pending.extend(fresh)
                queued.update(fresh)
                break


def _fire(
    rule: Rule, node: Node, context: Context, edit: Editor, tally: Tally
) -> list[Node] | None:
    """Rewrite at the node if the rule fits; the nodes worth another look, or None."""
    for binding in matches(rule, node, context):
        if not edit.allows(rule.name, root_name(node)):
            return None
        try:
            plan, results = _planned(rule, binding, node, context, edit)
            targets = _targets(node, results)
            _check(targets, results, edit)
        except Rejected as rejection:
            tally.rejected[rule.name, str(rejection)] += 1
            edit.rejections.append((rule.name, node.label, str(rejection)))
            continue
        touched = _commit(rule, binding, node, plan, targets, results, edit)
        tally.fired[rule.name] += 1
        return touched
    return None


def _targets(root: Node, results: Sequence[Var]) -> list[Value]:
    """The outputs that are replaced: all but those that nobody needs, at the end."""
    outputs = [value for value in root.outputs if value is not None]
    while len(outputs) > len(results) and not is_needed(outputs[-1]):
        outputs.pop()
    return outputs


def _planned(
    rule: Rule, binding: Binding, root: Node, context: Context, edit: Editor
) -> tuple[Plan, list[Var]]:
    ops = Replacement(rule, binding, root, context, edit)
    generator = rule.function(
        ops, **{name: ops.handle(variable) for name, variable in rule.variables.items()}
    )
    next(generator)
    ops.emitting = True
    try:
        with np.errstate(all="ignore"):  # what is not finite rejects the rewrite
            next(generator)
    except StopIteration as stop:
        result = stop.value
    else:
        raise RuleError(f"rule {rule.name!r} yields twice")
    results = list(result) if isinstance(result, tuple | list) else [result]
    if isinstance(result, BoundVars):
        results = list(result.items)
    if any(not isinstance(found, Bound | Planned) for found in results):
        raise RuleError(f"rule {rule.name!r} does not return the value that takes the root's place")
    return ops.plan, results


def _check(targets: Sequence[Value], results: Sequence[Var], edit: Editor) -> None:
    """What is proven of the new values must not contradict what is proven of the old."""
    if len(targets) != len(results):
        raise Rejected(f"{len(results)} values for {len(targets)} outputs")
    bound = [result.value for result in results if isinstance(result, Bound)]
    for target, result in zip(targets, results, strict=True):
        if isinstance(result, Planned):
            new = result.known
        elif isinstance(result, Bound) and target.is_output and bound.count(result.value) > 1:
            raise Rejected(f"{target.name!r} is an output, of a value that stands for two")
        elif isinstance(result, Bound):
            new = edit.types[result.value]
            if not edit.can_bypass(target, result.value):
                raise Rejected(f"{target.name!r} is an output that {result.value.name!r} cannot be")
        old = edit.types[target]
        if old is not None and (new is None or not new.stands_for(old)):
            unknown = "something unknown"
            raise Rejected(f"{target.name!r} would turn from {old} into {new or unknown}")


def _commit(
    rule: Rule,
    binding: Binding,
    root: Node,
    plan: Plan,
    targets: Sequence[Value],
    results: Sequence[Var],
    edit: Editor,
) -> list[Node]:
    before = "\n".join(node.text() for node in binding.nodes.values())
    graph = root.graph
    inputs = [v for node in binding.nodes.values() for v in node.inputs if v is not None]
    names: Mapping[str, Value] = {
        result.name: target
        for target, result in zip(targets, results, strict=True)
        if isinstance(result, Planned)
    }
    readers = [node for target in targets for node in target.consumers]
    edit.detach_node(root)
    for value in root.outputs:
        if value is not None and value not in targets:
            edit.remove_value(value)
    for name, tensor in plan.constants.items():
        plan.read[name] = edit.add_constant(graph, name, tensor, root.position)
    added = [
        edit.add_node(graph, proto, plan.read, names, root.position, rule.name)
        for proto in plan.nodes
    ]
    for name, known in plan.known.items():
        if name in plan.read:
            edit.types[plan.read[name]] = known
    for target, result in zip(targets, results, strict=True):
        if isinstance(result, Bound):
            edit.bypass(target, result.value)
    for node in sorted(binding.nodes.values(), key=lambda n: -n.position):
        if node is not root and node in node.graph.nodes and not _is_read(node):
            edit.remove_node(node)
    renamed = (
        f"{target.name} := {result.value.name}"
        for target, result in zip(targets, results, strict=True)
        if isinstance(result, Bound)
    )
    after = "\n".join([*(node.text() for node in added), *renamed])
    edit.record(rule.name, targets[0].name, before, after)
    producers = [v.producer for v in inputs if v.producer is not None]
    # what has lost readers may now belong to one match alone
    lonely = [n for v in inputs if len(v.consumers) <= _SHARED_WITHIN for n in v.consumers]
    return [n for n in (*added, *readers, *producers, *lonely) if n in n.graph.nodes]


def _is_read(node: Node) -> bool:
    return any(v is not None and (v.consumers or v.is_output) for v in node.outputs)
