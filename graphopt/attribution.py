"""Where the time of a model goes, in the model's own names.

The whole model is profiled as onnxruntime runs it: what a node costs depends on the layouts and
fusions around it, so that nodes timed alone do not add up. Each executed node's time goes to the
original value that it ends in (`graphopt.executed`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import RuntimeFailure
from graphopt.executed import Executed
from graphopt.ir import Node
from graphopt.marked import MarkedCopy
from graphopt.runtime import Feed
from graphopt.trace import OpTime, profile


@dataclass(frozen=True)
class Conversion:
    """A node that onnxruntime inserted: it turns `value` into another layout or type."""

    op: str
    value: str
    ms: float


@dataclass(frozen=True)
class NodeCosts:
    """Milliseconds per run of a whole model.

    `values` is keyed by the original value in which an executed node ends, slowest first;
    `computed` lists all original values that nodes ending in it compute, in file order.
    `unattributed` is the time of nodes that nothing of the original could be found for.
    """

    values: Mapping[str, float]
    computed: Mapping[str, tuple[str, ...]]
    conversions: tuple[Conversion, ...]
    unattributed: float

    @property
    def total(self) -> float:
        """The time of all nodes."""
        return sum(self.values.values()) + self.converting + self.unattributed

    @property
    def converting(self) -> float:
        """The time of all conversions."""
        return sum(conversion.ms for conversion in self.conversions)

    def of(self, values: Iterable[str]) -> float:
        """The time of the executed nodes that compute any of these values."""
        wanted = set(values)
        return sum(ms for root, ms in self.values.items() if wanted & {root, *self.computed[root]})


def node_costs(
    model: Path | bytes,
    feed: Feed,
    threads: int = 0,
    *,
    runs: int = 10,
    custom_ops: Sequence[Path] = (),
    folder: Path | None = None,
) -> NodeCosts:
    """Profile a model on one feed and attribute the time of each executed node.

    Profiling adds some microseconds to each node: the costs are meant to be compared with each
    other. Raises RuntimeFailure if onnxruntime refuses the model or the feed.
    """
    with MarkedCopy(model, folder) as copy:
        graph = copy.executed(threads=threads, custom_ops=custom_ops)
        try:
            times = profile(copy.file, feed, threads=threads, runs=runs, custom_ops=custom_ops)
        except RuntimeFailure as failure:
            raise copy.unmarked(failure) from failure
        return attribute(graph, times)


def attribute(graph: Executed, times: Sequence[OpTime]) -> NodeCosts:
    """Add up profiled times (milliseconds per run, by executed node) by original value."""
    by_name: dict[tuple[str, str], Node] = {(node.name, node.op): node for node in graph.nodes}
    spent: dict[str, float] = collections.defaultdict(float)
    conversions: list[Conversion] = []
    unattributed = 0.0
    for time in times:
        node = by_name.get((time.name, time.op))
        if node is not None and node in graph.roots:
            spent[graph.roots[node].name] += time.ms
        elif node is not None and graph.conversions.get(node):
            conversions.append(Conversion(time.op, graph.conversions[node], time.ms))
        else:
            unattributed += time.ms
    return NodeCosts(
        dict(sorted(spent.items(), key=lambda item: (-item[1], item[0]))),
        _computed(graph, spent),
        tuple(conversions),
        unattributed,
    )


def _computed(graph: Executed, roots: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {root: [] for root in roots}
    for node, owner in sorted(graph.owners.items(), key=lambda item: item[0].place):
        root = graph.roots.get(owner)
        if root is not None and root.name in found:
            found[root.name] += [value.name for value in node.outputs if value is not None]
    return {root: tuple(values) for root, values in found.items()}
