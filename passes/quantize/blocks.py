"""Units in blocks: a product or convolution with what stands behind it, up to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import Value
from graphopt.passes.quantize.units import Unit


@dataclass(frozen=True)
class Block:
    """Units that are given up together: alone, what stands behind a product gains nothing."""

    units: tuple[Unit, ...]

    @property
    def root(self) -> str:
        """The root of its first unit."""
        return self.units[0].root

    @property
    def roots(self) -> frozenset[str]:
        """The roots of all of its units."""
        return frozenset(unit.root for unit in self.units)

    @property
    def operators(self) -> str:
        """Its operators, as in `2 Mul, Conv`."""
        counted = Counter(node.op for unit in self.units for node in unit.nodes)
        return ", ".join(op if n == 1 else f"{n} {op}" for op, n in sorted(counted.items()))


def blocks(units: Sequence[Unit]) -> list[Block]:
    """The units of a choice, in order of computation, in blocks."""
    home: dict[Value, int] = {}
    found: list[list[Unit]] = []
    for unit in units:
        before = [home[value] for value in unit.inputs if value in home]
        if unit.weights is not None or not before:
            found.append([])
            place = len(found) - 1
        else:
            place = max(before)
        found[place].append(unit)
        home |= dict.fromkeys(unit.outputs, place)
    return [Block(tuple(each)) for each in found]
