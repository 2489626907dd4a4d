"""Branches that a model cannot take and run to its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

from graphopt.edit import Editor
from graphopt.ir import Graph, Model, Node
from graphopt.operators import EXACT_RANKS
from graphopt.passes.canonicalize.fold_constants import FoldConstants
from graphopt.passes.canonicalize.inline_if import InlineIf, branch_of, inline
from graphopt.passes.canonicalize.lift_constants import LiftConstants
from graphopt.passes.canonicalize.liveness import needed_nodes

_RULE: Final = "refute-branch"
_MOST_TRIALS: Final = 64  # each infers all types anew
_BRANCHES: Final = ("then_branch", "else_branch")


@dataclass(frozen=True)
class RefuteBranches:
    """An If one branch of which makes the model fail => the nodes of the other.

    It does where the branch gives a value of a rank that an operator refuses which always runs,
    in the same graph: exporters guard a squeeze by an If, and then only one rank goes on. A run
    that would have taken the branch failed in the original, so that nothing is lost with it.
    """

    name: ClassVar[str] = "refute-branches"

    def run(self, model: Model, edit: Editor) -> None:
        trials = _MOST_TRIALS
        graphs = list(model.graphs())
        for graph in graphs:
            for node in list(graph.nodes):
                if trials < 2 or node not in graph.nodes or not _differ(node, edit):
                    continue
                if not _is_watched(node):
                    continue
                trials -= 2
                refuted = [_is_refuted(node, name, model, edit) for name in _BRANCHES]
                if sorted(refuted) == [False, True]:
                    _take(node, _BRANCHES[refuted.index(False)], model, edit)
                    _fold(model, edit)  # which decides the next ones as a rule


def _differ(node: Node, edit: Editor) -> bool:
    """True for an If whose branches, which fit into its graph, give values of different ranks."""
    branches = [_branch(node, name, edit.model) for name in _BRANCHES]
    if node.op != "If" or node.domain or None in branches:
        return False
    sides = [[edit.types[value] for value in b.outputs] for b in branches if b is not None]
    return any(
        a is not None and b is not None and None not in (a.rank, b.rank) and a.rank != b.rank
        for a, b in zip(*sides, strict=False)
    )


def _branch(node: Node, name: str, model: Model) -> Graph | None:
    return branch_of(node, name, model) if node.op == "If" else None


def _is_refuted(node: Node, name: str, model: Model, edit: Editor) -> bool:
    """True where the branch, if it were taken, would end in a rank that is refused."""
    graph = node.graph
    with edit.supposing():
        branch = _branch(node, name, model)
        assert branch is not None
        inline(node, branch, edit, _names(model), _RULE)
        _fold(model, edit)
        edit.settle()
        return any(_refuses(other, edit) for other in needed_nodes(graph))


def _fold(model: Model, edit: Editor) -> None:
    for _ in range(2):
        for step in (FoldConstants(), InlineIf(), LiftConstants()):
            step.run(model, edit)


def _is_watched(node: Node) -> bool:
    """True where something that insists on a rank comes after the node, in its graph."""
    pending, seen = [node], {node}
    while pending:
        for value in pending.pop().outputs:
            for reader in value.consumers if value is not None else ():
                if reader.graph is node.graph and reader not in seen:
                    if reader.op in EXACT_RANKS and not reader.domain:
                        return True
                    seen.add(reader)
                    pending.append(reader)
    return False


def _refuses(node: Node, edit: Editor) -> bool:
    for slot, rank in EXACT_RANKS.get(node.op, {}).items():
        value = node.inputs[slot] if slot < len(node.inputs) and not node.domain else None
        known = edit.types[value] if value is not None else None
        if known is not None and known.rank is not None and known.rank != rank:
            return True
    return False


def _take(node: Node, name: str, model: Model, edit: Editor) -> None:
    root = next((value.name for value in node.outputs if value is not None), "")
    branch = _branch(node, name, model)
    if branch is not None and edit.allows(_RULE, root):
        inline(node, branch, edit, _names(model), _RULE)


def _names(model: Model) -> Counter[str]:
    return Counter(name for graph in model.graphs() for name in graph.values)
