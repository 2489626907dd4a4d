"""Factors of the layers that are to be split, each weighed by what it reads in the network so far.

Layers are fitted in their order to what the dense network gives; of what a layer is fitted to the
nearest weights of its rank are taken (reduced-rank regression: Izenman, 1975), so that each makes
up for what was lost before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Model, Value
from graphopt.kernels.lowrank import weighted_error
from graphopt.passes.fitting import Fitted, Settings, fit
from graphopt.passes.linear import Layer, linear_layers
from graphopt.passes.lowrank.forms import Method, Split, split_of
from graphopt.passes.lowrank.options import Option, Splittable, pooled
from graphopt.runtime import Feed

Array = NDArray[Any]
_ZEROS: Final = 0.05  # share of zeros that are no accident, and stay zeros


@dataclass
class Factored:
    """Splits by root, the share that each loses of what its layer gives, and how layers fit."""

    splits: dict[str, Split] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    fitted: Fitted = field(default_factory=Fitted)


def factor(
    dense: Model,
    edit: Editor,
    groups: Sequence[Splittable],
    chosen: Mapping[str, Option],
    feeds: Callable[[], Iterable[Feed]] | None,
    settings: Settings,
    *,
    known: Mapping[str, Array] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Factored:
    """Factors for the layers of `groups` as `chosen` by root; what is chosen dense stays.

    `edit` is of a model like `dense` and gets the weights that the factors amount to: its layers
    are not split yet. Weights that several nodes read are weighed by `known` moments
    [K + 1, K + 1] by root and not fitted, and other nodes go on reading them as they are; without
    feeds nothing is fitted, and all directions count alike.
    """
    found = Factored()
    narrow: dict[str, Callable[[Array, Array | None], Array]] = {}
    for group in groups:
        option = chosen.get(group.root)
        if option is None or option.method is None:
            continue
        work = _narrowing(found, group.first, option.method, option.rank)
        if feeds is not None and len(group.layers) == 1 and group.first.is_free:
            narrow[group.root] = work
        else:
            _give(edit, group, work(group.first.matrix(), pooled(group, known or {})))
    edit.settle()
    if feeds is not None:
        masks = _zeros(edit, narrow)
        found.fitted = fit(dense, edit, masks, feeds, settings, narrow=narrow, progress=progress)
    return found


def _zeros(edit: Editor, split: Collection[str]) -> dict[str, Array]:
    """Where the weights of layers that are not `split` are none: zeros that somebody put there."""
    found = {}
    for layer in linear_layers(edit):
        mask = layer.matrix() != 0
        if layer.is_free and layer.root not in split and np.mean(mask) < 1 - _ZEROS:
            found[layer.root] = mask
    return found


def _give(edit: Editor, group: Splittable, weights: Array) -> None:
    """Let layers read weights [M, K] of their own; who else reads theirs reads what they were."""
    graph, old = edit.model.graph, group.first.weights.name
    stored = group.first.stored(weights.astype(np.float32))
    made: dict[bool, Value] = {}
    for layer in group.layers:
        node = graph.values[layer.root].producer
        assert node is not None
        is_behind = node.inputs[1] is not graph.values[old]  # a Transpose
        if is_behind not in made:
            name = edit.unique(f"{old}/split")
            array = np.ascontiguousarray(stored.T) if is_behind else stored
            tensor = onnx.numpy_helper.from_array(array, name)
            made[is_behind] = edit.add_constant(graph, name, tensor, -1.0)
        edit.set_input(node, 1, made[is_behind])


def _narrowing(
    found: Factored, layer: Layer, method: Method, rank: int
) -> Callable[[Array, Array | None], Array]:
    """Gives the nearest weights of a rank, and keeps their factors."""

    def narrow(weights: Array, gram: Array | None) -> Array:
        split = split_of(layer, method, rank, weights, gram)
        near = split.effective
        found.splits[layer.root] = split
        found.errors[layer.root] = weighted_error(np.asarray(weights), near, gram)
        return near

    return narrow
