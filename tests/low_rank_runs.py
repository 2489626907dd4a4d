"""Decided times of split layers, for tests of what depends on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphopt import low_rank_search
from graphopt.passes.lowrank.options import Option, Splittable
from graphopt.passes.lowrank.table import Ranks
from graphopt.split_times import SLACK, SplitTimes

Price = Callable[[Splittable, Option], float]


def follows_macs(group: Splittable, option: Option) -> float:
    """Milliseconds that MACs alone decide."""
    return option.macs / 1e6


def decide_layers(monkeypatch: Any, price: Price = follows_macs) -> None:
    """Let every layer take what `price` says, whole or split."""

    class Decided(SplitTimes):
        def __init__(self, lossless: Any, ranks: Ranks, *_: Any) -> None:
            self._ranks = {group.root: group for group in ranks.groups}
            self.dense = {g.root: price(g, g.dense) for g in ranks.groups}

        def chosen(self, chosen: Mapping[str, Option], rounds: int = 1) -> dict[str, float]:
            return {root: price(self._ranks[root], option) for root, option in chosen.items()}

        def estimate(self, root: str, option: Option) -> float:
            return price(self._ranks[root], option)

    assert SLACK < 1
    monkeypatch.setattr(low_rank_search, "SplitTimes", Decided)
