"""Channels, heads and hidden units taken out, and what reads them fitted again.

First readers learn to do without (their weights for what goes are zero, the others fitted), then
what nobody reads any more is cut out of the graph, which changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.passes.fitting import LayerFit, Settings, fit
from graphopt.passes.linear import layer_of
from graphopt.passes.prune.costs import Work
from graphopt.passes.prune.groups import Group, groups_of
from graphopt.passes.prune.remove import remove
from graphopt.runtime import Feed

Array = NDArray[Any]
Feeds = Callable[[], Iterable[Feed]]
Cut = Mapping[str, tuple[int, ...]]
"""Units that go, by the root of their group."""

# Convolutions run on blocks of so many channels (AVX-512; 8 on AVX2): less than a block gains
# nothing.
_BLOCKS: Final = ((48, 16), (16, 8))
_WIDE: Final = 8  # indices of one unit: heads go one by one
_MOST: Final = 0.875  # of a group's units, so that something is left to fit


def column_masks(edit: Editor, groups: Sequence[Group], cut: Cut) -> dict[str, Array]:
    """What readers of units that go must not read: masks [M, K] of linear layers, by root."""
    stored: dict[Node, Array] = {}
    for group in groups:
        gone = cut.get(group.root, ())
        for slot in group.readers if gone else ():
            layer = layer_of(edit, slot.node)
            if layer is None or slot.value is not layer.weights:
                continue  # recurrent weights: what they read is cut off all the same
            mask = stored.setdefault(slot.node, np.ones(layer.weight.shape, np.bool_))
            np.moveaxis(mask, slot.axis, 0)[np.isin(slot.units, gone)] = False
    found = {}
    for node, mask in stored.items():
        layer = layer_of(edit, node)
        assert layer is not None
        found[layer.root] = np.ascontiguousarray(layer.matrix(mask))
    return found


def prune_channels(
    dense: Model,
    edit: Editor,
    cut: Cut,
    feeds: Feeds | None,
    settings: Settings,
    progress: Callable[[float], None] | None = None,
) -> list[LayerFit]:
    """Take the units of a cut out of the model, and fit all layers where there are feeds.

    `edit` is of a copy of `dense`. The account is of the layers before channels are cut out; empty
    without feeds. Raises LookupError for a group that the model does not have.
    """
    groups = {group.root: group for group in groups_of(edit)}
    if missing := set(cut) - set(groups):
        raise LookupError(f"there is no group {min(missing)!r}")
    layers: list[LayerFit] = []
    if feeds is not None:
        masks = column_masks(edit, list(groups.values()), cut)
        layers = fit(dense, edit, masks, feeds, settings, progress=progress).layers
        groups = {group.root: group for group in groups_of(edit)}  # with the biases that came up
    take_out(edit, list(groups.values()), cut)
    return layers


def take_out(edit: Editor, groups: Iterable[Group], cut: Cut) -> None:
    """Cut the units out of the graph."""
    for group in groups:
        if cut.get(group.root):
            remove(edit, group, cut[group.root])
    edit.settle()


def steps(group: Group) -> list[int]:
    """How many units may go: counts after which what is left suits the kernels, without 0."""
    width = max((int((units >= 0).sum()) for _, units in group.axes.values()), default=0)
    is_wide = width / group.units >= _WIDE
    block = 1 if is_wide else next((b for least, b in _BLOCKS if group.units >= least), 1)
    most = math.floor(_MOST * group.units)
    if block == 1:
        every = max(1, group.units // 16)
        return list(range(every, most + 1, every))
    first = group.units % block or block
    return [count for count in range(first, most + 1, block) if count < group.units]


Harm = Callable[[int], float]
"""What it does to the outputs that so many units of a group go."""


@dataclass(frozen=True)
class Choice:
    """One group to choose from: how many units may go, what that does, in which order they go."""

    group: Group
    steps: Sequence[int]
    harm: Harm
    order: Sequence[int]


def choose(
    choices: Sequence[Choice], work: Work, share: float, ms: Mapping[Node, float] | None = None
) -> Cut:
    """Take units until a share of all MACs is gone, always where most is won for the harm.

    What is won is measured time (`ms` of each node), MACs without it. Steps are coarse: the last
    one is left out where that comes closer to the share, unless it is the only one.
    """
    taken = {choice.group.root: 0 for choice in choices}
    goal = (1 - share) * work.total

    def next_step(choice: Choice) -> int | None:
        now = taken[choice.group.root]
        return next((count for count in choice.steps if count > now), None)

    while work.macs(taken) > goal:
        best: tuple[float, str, int] | None = None
        for choice in choices:
            count = next_step(choice)
            if count is None:
                continue
            root = choice.group.root
            won = work.saved(taken, root, count, ms)
            lost = choice.harm(count) - choice.harm(taken[root])
            worth = won / max(lost, 1e-12)
            if won > 0 and (best is None or worth > best[0]):
                best = worth, root, count
        if best is None:
            break
        after = {**taken, best[1]: best[2]}
        short, beyond = work.macs(taken) - goal, goal - work.macs(after)
        if beyond > short and any(taken.values()):
            break
        taken = after
    order = {choice.group.root: choice.order for choice in choices}
    return {root: tuple(sorted(order[root][:n])) for root, n in taken.items() if n}


def power_law(first: tuple[float, float], second: tuple[float, float]) -> Callable[[float], float]:
    """The curve a f^p through two measurements (f, harm), p from 1 to 4."""
    (f1, h1), (f2, h2) = first, second
    h1, h2 = max(h1, 1e-9), max(h2, 1e-9)
    exponent = math.log(h2 / h1) / math.log(f2 / f1) if f2 > f1 else 2.0
    exponent = min(max(exponent, 1.0), 4.0)
    scale = h2 / f2**exponent
    return lambda share: scale * share**exponent
