"""All that can be chosen for a model: of each layer that can be split its forms and ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.operators import MACS
from graphopt.passes.fitting import Settings, each_moments
from graphopt.passes.lowrank.allocation import allocate
from graphopt.passes.lowrank.forms import Method
from graphopt.passes.lowrank.options import Option, Splittable, pooled, splittable
from graphopt.passes.work import node_macs
from graphopt.runtime import Feed

Array = NDArray[Any]


@dataclass(frozen=True)
class Ranks:
    """Layers that can be split, in order of computation, with their options by root, dense first.

    `total` counts the MACs of the whole model; `moments` [K + 1, K + 1] by root are of layers that
    read the same weights.
    """

    groups: tuple[Splittable, ...]
    options: Mapping[str, list[Option]]
    total: int
    moments: Mapping[str, Array]

    def left(self, chosen: Mapping[str, Option]) -> float:
        """The share of the model's MACs that a choice leaves."""
        gone = sum(g.macs - chosen[g.root].macs for g in self.groups if g.root in chosen)
        return 1 - gone / max(1, self.total)

    def allocated(
        self, share: float, options: Mapping[str, list[Option]] | None = None
    ) -> dict[str, Option]:
        """What loses least of all choices that leave this share of the MACs, or nearly so.

        Of other `options` than all where those are given.
        """
        return allocate(options or self.options, lambda chosen: self.left(chosen) <= share)


def tabulate(
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    methods: Collection[Method],
    feeds: Callable[[], Iterable[Feed]] | None,
    settings: Settings,
    progress: Callable[[float], None] | None = None,
) -> Ranks:
    """The options of a model, weighed by what layers read of the feeds; alike without feeds.

    `shapes` are those of values by name as a run showed them. Runs the model once.
    """
    edit = Editor(model)
    groups = tuple(splittable(edit, shapes))
    nodes = (node for node in model.graph.nodes if (node.domain, node.op) in MACS)
    total = sum(node_macs(edit, node, shapes) for node in nodes)
    options, kept = {}, dict[str, Array]()
    for group, moments in _seen(model, groups, feeds, settings, progress):
        options[group.root] = [group.dense, *group.options(methods, pooled(group, moments))]
        if len(group.layers) > 1 or not group.first.is_own:
            kept |= moments
    return Ranks(groups, {g.root: options[g.root] for g in groups}, total, kept)


def _seen(
    model: Model,
    groups: Collection[Splittable],
    feeds: Callable[[], Iterable[Feed]] | None,
    settings: Settings,
    progress: Callable[[float], None] | None,
) -> Iterator[tuple[Splittable, dict[str, Array]]]:
    """Each group as soon as all that its layers read was seen: few matrices are held at once."""
    waiting = {group.root: group for group in groups}
    if feeds is not None:
        by_layer = {layer.root: group for group in groups for layer in group.layers}
        known: dict[str, dict[str, Array]] = {group.root: {} for group in groups}
        for root, matrix in each_moments(model, by_layer, feeds, settings, progress):
            group = by_layer[root]
            known[group.root][root] = matrix
            if len(known[group.root]) == len(group.layers):
                yield waiting.pop(group.root), known.pop(group.root)
        for group in waiting.values():  # not all of its layers run
            yield group, known[group.root]
    else:
        for group in waiting.values():
            yield group, {}
