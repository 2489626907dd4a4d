"""What split layers take, in the model that they are in, as onnxruntime runs it.

Layers are timed in whole models, where layouts and fusions are as they will be; how fast a layer is
does not depend on the numbers in it, so that models of arbitrary numbers do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.attribution import NodeCosts, node_costs
from graphopt.passes.linear import Layer
from graphopt.passes.lowrank.forms import FORMS, Method, Split
from graphopt.passes.lowrank.options import Option, Splittable
from graphopt.passes.lowrank.split import parts_of
from graphopt.passes.lowrank.table import Ranks
from graphopt.passes.recipe import Stage, StagedRecipe
from graphopt.runtime import Feed

Array = NDArray[Any]
SLACK: Final = 0.10  # of a layer's time: what it may take beyond its share of MACs
_SECONDS: Final = 60.0  # for all options; those that are left then lie between timed ones
_LEAST: Final = 4  # models with options in them that are timed however long that takes
_RUNS: Final = 5  # in one profile
_ROUNDS: Final = 3  # of profiles of one model, of which the fastest counts

Times = Mapping[str, float]
"""Milliseconds by the root of the first layer of a group."""


class SplitTimes:
    """Times of one model's layers, whole and split. `folder` is for files, and may be used again.

    All is measured once, at the start.
    """

    def __init__(
        self,
        lossless: Path,
        ranks: Ranks,
        feed: Feed,
        threads: int,
        custom_ops: Sequence[Path],
        folder: Path,
        tell: Callable[[float], None],
    ) -> None:
        self._lossless = lossless
        self._groups = ranks.groups
        self._feed = feed
        self._options: dict[str, Any] = {"threads": threads, "custom_ops": custom_ops}
        self._file = folder / "timed.onnx"
        self._points: dict[tuple[str, Method], dict[int, float]] = {}
        tell(0.0)
        started = time.perf_counter()
        self.dense = self.of([lossless])[0]
        variants = list(_variants(ranks))
        for number, variant in enumerate(variants):
            spent = (time.perf_counter() - started) / _SECONDS
            if spent > 1 and number >= _LEAST:
                break
            tell(min(1.0, max(spent, (number + 1) / (len(variants) + 1))))
            for root, ms in self.chosen(variant).items():
                option = variant.get(root)
                if option is not None and option.method is not None:
                    self._points.setdefault((root, option.method), {})[option.macs] = ms

    def of(self, files: Sequence[Path], rounds: int = _ROUNDS) -> list[dict[str, float]]:
        """Milliseconds by group in each of some files of the model, timed in turns."""
        each_round: list[list[NodeCosts]] = [[] for _ in files]
        for _ in range(rounds):
            for found, file in zip(each_round, files, strict=True):
                found.append(node_costs(file, self._feed, runs=_RUNS, **self._options))
        return [
            {group.root: min(_of(group, costs) for costs in each) for group in self._groups}
            for each in each_round
        ]

    def chosen(self, chosen: Mapping[str, Option], rounds: int = 1) -> dict[str, float]:
        """Milliseconds by group in a model split as chosen, with arbitrary numbers in it.

        The whole model is timed in turns with it, and what its layers take now against what they
        took at first says how busy the machine is.
        """
        splits = {
            group.root: arbitrary(group.first, option.method, option.rank)
            for group in self._groups
            if (option := chosen.get(group.root)) is not None and option.method is not None
        }
        exporter.save(StagedRecipe((Stage(splits=splits),)).dense(self._lossless), self._file)
        now, split = self.of([self._lossless, self._file], rounds)
        return {
            root: ms * self.dense[root] / now[root] if now[root] > 0 else math.inf
            for root, ms in split.items()
        }

    def estimate(self, root: str, option: Option) -> float:
        """Milliseconds of a group as timed, or between timed ranks; infinite for others."""
        if option.method is None:
            return self.dense[root]
        points = self._points.get((root, option.method))
        if not points:
            return math.inf
        macs = sorted(points)
        times = [points[each] for each in macs]
        return float(np.interp(option.macs, macs, times, math.inf, math.inf))

    def pays(self, group: Splittable, option: Option, ms: float) -> bool:
        """True where a group is as much faster as it has less to do, or nearly so."""
        whole = self.dense[group.root]
        return whole > 0 and ms <= (option.macs / max(1, group.macs) + SLACK) * whole


def arbitrary(layer: Layer, method: Method, rank: int) -> Split:
    """A split of a layer with numbers that mean nothing, of a size that they may have."""
    rng = np.random.default_rng(0)
    shapes = FORMS[method].shapes(layer, rank)
    factors = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return Split(method, tuple(f / math.sqrt(max(1, f[0].size)) for f in factors))


def _variants(ranks: Ranks) -> Iterator[dict[str, Option]]:
    """Choices in which each option of each layer comes once, far ones first."""
    turns = {
        root: _scattered([option for option in options if option.method is not None])
        for root, options in ranks.options.items()
    }
    for turn in range(max(map(len, turns.values()), default=0)):
        yield {root: options[turn] for root, options in turns.items() if turn < len(options)}


def _scattered(options: Sequence[Option]) -> list[Option]:
    """In an order of which each beginning is spread over all (van der Corput, 1935)."""
    width = max(1, len(options) - 1).bit_length()
    found = sorted(range(len(options)), key=lambda n: int(f"{n:0{width}b}"[::-1], 2))
    return [options[number] for number in found]


def _of(group: Splittable, costs: NodeCosts) -> float:
    """Of what executes a group's layers, or their parts."""
    return costs.of(name for layer in group.layers for name in parts_of(layer.root))
