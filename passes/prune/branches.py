"""Models whose layers lie in the branches of an If, seen as the data runs them.

Where all feeds take one branch, a copy of the model with that branch in the place of the If has the
same layers under the same names: what is fitted there holds for the model itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.passes.canonicalize.inline_if import branch_of, inline
from graphopt.passes.fitting import Settings
from graphopt.relay import Relay
from graphopt.runtime import Feed

RULE: Final = "take-branches"


def taken(model: Model, feeds: Callable[[], Iterable[Feed]], settings: Settings) -> dict[str, str]:
    """The branch that each If of the main graph takes on all feeds, by its first output."""
    found = {}
    for node in _ifs(model):
        condition = node.inputs[0]
        if condition is None or condition.constant is not None:
            continue
        with Relay(model, feeds(), [condition], **settings.relay) as relay:
            seen = {bool(value.reshape(-1)[0]) for value in relay.values(condition)}
        if len(seen) == 1:
            found[_name(node)] = "then_branch" if seen.pop() else "else_branch"
    return found


def flattened(model: Model, branches: Mapping[str, str]) -> Model:
    """A copy of the model with these branches in the place of their Ifs."""
    copy = Model.load(exporter.to_proto(model))
    edit = Editor(copy)
    names = Counter(name for graph in copy.graphs() for name in graph.values)
    for node in _ifs(copy):
        stated = branches.get(_name(node))
        branch = None if stated is None else branch_of(node, stated, copy)
        if branch is not None:
            inline(node, branch, edit, names, RULE)
    edit.settle()
    return copy


def _ifs(model: Model) -> list[Node]:
    return [n for n in model.graph.nodes if n.op == "If" and not n.domain and n.inputs]


def _name(node: Node) -> str:
    return next((value.name for value in node.outputs if value is not None), "")
