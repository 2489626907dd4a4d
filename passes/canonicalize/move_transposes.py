"""Transposes moved, merged and cancelled, wherever fewer of them, or smaller ones, do."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Final

from graphopt.edit import Editor
from graphopt.errors import ModelError
from graphopt.ir import Graph, Model, Node
from graphopt.passes.canonicalize.layout_regions import Region, best, changes
from graphopt.passes.canonicalize.layouts import Facts, then
from graphopt.passes.canonicalize.relayout import RULE, Relayout, permuted
from graphopt.passes.guards import is_identity

_log = logging.getLogger(__name__)
_ROUNDS: Final = 8  # each makes Transposes fewer or smaller, so that one more rarely finds any


@dataclass(frozen=True)
class MoveTransposes:
    """Operators computed in the other layout, where Transposes around them then cancel or shrink.

    Neither the number of Transposes nor the bytes that they move ever grow, and one of them falls.
    """

    name: ClassVar[str] = "move-transposes"

    def run(self, model: Model, edit: Editor) -> None:
        for graph in list(model.graphs()):
            for _ in range(_ROUNDS):
                if not _move(graph, edit):
                    break


def _move(graph: Graph, edit: Editor) -> bool:
    """Look at each Transpose once; True where anything changed."""
    changed = False
    settled: set[Node] = set()  # those of regions in which nothing is to be gained
    for seed in [node for node in graph.nodes if _is_transpose(node)]:
        if seed in graph.nodes and _cancels(seed, edit):
            changed = True
        elif seed in graph.nodes and seed not in settled:
            region = Region(graph, Facts(edit), seed)
            if _relayout(region, edit):
                changed = True
            else:
                settled |= {copy.producer for c in region.contents for copy in c.copies}  # type: ignore[misc]
    return changed


def _is_transpose(node: Node) -> bool:
    return node.op == "Transpose" and not node.domain


def _cancels(node: Node, edit: Editor) -> bool:
    """Let readers of a Transpose that undoes another read what that one reads.

    The first stays where others read it.
    """
    first = node.inputs[0].producer if node.inputs[0] is not None else None
    if first is None or not _is_transpose(first):
        return False
    facts = Facts(edit)
    one, two = facts.permutation(first), facts.permutation(node)
    source, result = first.inputs[0], node.outputs[0]
    if one is None or two is None or source is None or result is None:
        return False
    if not is_identity(then(one, two)) or not edit.can_bypass(result, source):
        return False
    if not edit.allows("cancel-transposes", result.name):
        return False
    before = f"{node.text()}\n{first.text()}"
    edit.detach_node(node)
    edit.bypass(result, source)
    edit.record("cancel-transposes", result.name, before, f"{result.name} := {source.name}")
    return True


def _relayout(region: Region, edit: Editor) -> bool:
    """Make the changes that pay; True where there was one."""
    if not region.members:
        return False
    made = False
    for change in list(changes(region, best(region))):
        root = change.root
        if not edit.allows(RULE, root):
            continue
        try:
            stored = permuted(change, region)
        except ModelError as error:  # the weights are not there
            _log.debug("%s: %s", root, error)
            continue
        before, after = Relayout(edit, region, change, stored).make()
        edit.record(RULE, root, before, after)
        made = True
    return made
