"""All that can be chosen for a model: of each layer that can be split its forms and ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.lowrank import spectrum
from graphopt.kernels.threads import one_thread
from graphopt.operators import MACS
from graphopt.passes.fitting import Settings, each_moments
from graphopt.passes.lowrank.allocation import allocate
from graphopt.passes.lowrank.forms import RIDGE, Method
from graphopt.passes.lowrank.options import (
    Option,
    Splittable,
    pooled,
    splittable,
    sum_centred,
)
from graphopt.passes.work import node_macs
from graphopt.runtime import Feed

Array = NDArray[Any]
_PROBED: Final = 0.05  # an error that is of interest: whole models tolerate it in one layer


@dataclass(frozen=True)
class Probe:
    """Weights of a group of layers that lose some of what they give, as they are stored, float32.

    `weights` is the name of the initializer; `error` the mean square that is lost, the mean of it
    included, relative to the variance of what the layers give.
    """

    weights: str
    stored: Array
    error: float


@dataclass(frozen=True)
class Ranks:
    """Layers that can be split, in order of computation, with their options by root, dense first.

    `total` counts the MACs of the whole model; `moments` [K + 1, K + 1] by root are of layers that
    read the same weights. `probes` tell, by root, what a layer's error does; none without feeds.
    """

    groups: tuple[Splittable, ...]
    options: Mapping[str, list[Option]]
    total: int
    moments: Mapping[str, Array]
    probes: Mapping[str, Probe]

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
    own = {
        layer.node: extent.rows * layer.weight.size
        for group in groups
        for layer, extent in zip(group.layers, group.extents, strict=True)
    }
    nodes = (node for node in model.graph.nodes if (node.domain, node.op) in MACS)
    total = sum(node_macs(edit, node, shapes) or own.get(node, 0) for node in nodes)
    options, kept, probes = {}, dict[str, Array](), {}
    for group, moments in each_group(model, groups, feeds, settings, progress):
        if len(group.layers) > 1 or not group.first.is_free:
            kept |= moments
        with one_thread():
            found = group.options(methods, pooled(group, moments))
            share = _of_variance(group, moments)
            options[group.root] = [group.dense, *(replace(o, error=share * o.error) for o in found)]
            if moments and len(options[group.root]) > 1:
                ranks = [option.rank for option in options[group.root][1:]]
                probes[group.root] = _probe(group, ranks, moments)
    return Ranks(groups, {g.root: options[g.root] for g in groups}, total, kept, probes)


def _of_variance(group: Splittable, moments: Mapping[str, Array]) -> float:
    """The mean square of what a group gives, relative to its variance, where errors are of that."""
    gram = pooled(group, moments)
    if gram is None or group.is_centred:
        return 1.0
    weights = np.asarray(group.first.matrix(), np.float64)
    centred = sum_centred(list(moments.values()), has_bias=True)
    whole, signal = (float(np.sum((weights @ each) * weights)) for each in (gram, centred))
    return whole / signal if signal > 0 else 1.0


def _probe(group: Splittable, ranks: Sequence[int], moments: Mapping[str, Array]) -> Probe:
    """Weights as two products, at the rank that loses most nearly a twentieth."""
    layer, seen = group.first, list(moments.values())
    gram, centred = (sum_centred(seen, has_bias=each) for each in (False, True))
    weights = np.asarray(layer.matrix(), np.float64)
    found = spectrum(weights, gram, RIDGE)
    errors = np.maximum(found.errors(ranks), 1e-12)
    rank = ranks[int(np.argmin(np.abs(np.log(errors / _PROBED))))]
    left, right = found.factors(rank)
    lost = weights - left @ right
    signal = float(np.sum((weights @ centred) * weights))
    error = float(np.sum((lost @ gram) * lost)) / signal if signal > 0 else 1.0
    return Probe(layer.weights.name, layer.stored((weights - lost).astype(np.float32)), error)


def each_group(
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
