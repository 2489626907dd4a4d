"""What units cost on either side, from two profiles of the whole model: in floats, on integers.

Units are not timed alone: layouts and fusions around them decide, and profiles of whole models
have both. What was never seen in either profile, the conversions at a boundary that another choice
would make, is estimated from the number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from graphopt.attribution import NodeCosts, node_costs
from graphopt.ir import Value
from graphopt.passes.quantize.placement import Costs
from graphopt.passes.quantize.units import Unit
from graphopt.runtime import Feed
from graphopt.statistics import Statistics

# Milliseconds of a conversion: of a node, and of an element. Measured on two cores with AVX-512
# (QuantizeLinear 0.15 ns, DequantizeLinear 0.21 ns, and the change of layout that mostly goes with
# them); `cheapest` is asked at several multiples of these, and whole models decide.
_NODE: Final = 0.003
_QUANTIZE: Final = 0.25e-6
_DEQUANTIZE: Final = 0.35e-6
_DOUBT: Final = 1.05  # integers have to gain this much in a profile before they are believed


@dataclass(frozen=True)
class Profile:
    """Milliseconds by root of a unit, and of all that runs."""

    units: Mapping[str, float]
    total: float

    @classmethod
    def of(cls, model: Path, feed: Feed, units: Sequence[Unit], threads: int) -> Profile:
        """Profile a model in which the units' values have their names."""
        found = node_costs(model, feed, threads)
        return cls(_by_unit(found, units), found.total)


def _by_unit(found: NodeCosts, units: Sequence[Unit]) -> dict[str, float]:
    """Time of what several units compute together goes to the first that has weights."""
    owners = {v.name: u for u in units for n in u.nodes for v in n.outputs if v is not None}
    owners |= {f"{unit.root}/gate": unit for unit in units if unit.kind == "hard-swish"}
    spent = dict.fromkeys((unit.root for unit in units), 0.0)
    for root, ms in found.values.items():
        named = (*found.computed.get(root, ()), root)
        mine = list(dict.fromkeys(owners[name] for name in named if name in owners))
        heavy = [unit for unit in mine if unit.weights is not None] or mine
        if heavy:
            spent[heavy[0].root] += ms
    return spent


def boundary_costs(
    floats: Profile, integers: Profile, statistics: Statistics, conversions: float = 1.0
) -> Costs:
    """Costs for `cheapest`; `conversions` is what boundaries are taken to cost, 1 as estimated."""

    def elements(value: Value) -> int:
        return math.prod(statistics.shape(value.name).first)

    return Costs(
        floats=lambda unit: floats.units[unit.root],
        integers=lambda unit: integers.units[unit.root] * _DOUBT + 1e-4,
        quantize=lambda value: conversions * (_NODE + _QUANTIZE * elements(value)),
        dequantize=lambda value: conversions * (_NODE + _DEQUANTIZE * elements(value)),
    )
