"""The candidates for int8 of one model: which regions take which option, and why not others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.passes.quantize.corrections import bias_corrections
from graphopt.passes.quantize.costs import Profile, boundary_costs
from graphopt.passes.quantize.emission import Options
from graphopt.passes.quantize.parameters import Method, Ranges, affines, usable, wanted
from graphopt.passes.quantize.placement import cheapest
from graphopt.passes.quantize.recipe import (
    DYNAMIC,
    STATIC,
    WEIGHTS,
    Recipe,
    dynamic_regions,
    half_regions,
    table_regions,
    weight_regions,
)
from graphopt.passes.quantize.units import Unit, Units
from graphopt.runtime import Feed
from graphopt.statistics import Observer, Statistics

# What a boundary between floats and integers is taken to cost, in multiples of the estimate.
CONVERSIONS: Final = (1.0, 0.5, 2.0)


class Candidates:
    """Recipes for one lossless model. `bits` of weights is 7 where the CPU lacks VNNI."""

    def __init__(self, lossless: Path, bits: int) -> None:
        self.lossless = lossless
        self.model = Model.load(lossless)
        edit = Editor(self.model)
        self.units: list[Unit] = Units(edit).all
        self.products = dynamic_regions(edit)
        self.weighted = weight_regions(edit)
        self.tables = table_regions(edit)
        self.halves = half_regions(edit)
        self.bits = bits
        self._usable: list[Unit] = []
        self._corrections: dict[str, NDArray[Any]] = {}
        self._ranges: Ranges | None = None
        self._statistics: Statistics | None = None
        self._floats: Profile | None = None
        self._integers: Profile | None = None

    @property
    def observers(self) -> set[Observer]:
        """What has to be known of activations before anything can be static."""
        return wanted(self.units)

    def calibrate(self, statistics: Statistics, method: Method = "mse") -> None:
        """Take what calibration saw. Units of which it saw nothing stay in floats."""
        self._statistics = statistics
        self._ranges = ranges = Ranges(self.units, statistics, method)
        self._usable = usable(self.units, ranges)

    @property
    def can_be_static(self) -> bool:
        """True where some product or convolution was calibrated: the rest does not pay alone."""
        return any(unit.weights is not None for unit in self._usable)

    def profile(self, integers: Path, feed: Feed, threads: int) -> None:
        """Measure what units cost: in the lossless model, and in one with all of them static."""
        self._floats = Profile.of(self.lossless, feed, self.units, threads)
        self._integers = Profile.of(integers, feed, self.units, threads)

    def refine(self, divided: Path, recipe: Recipe, feed: Feed, threads: int) -> None:
        """Measure again in a divided model: each unit on the side where it is there."""
        assert self._floats is not None
        assert self._integers is not None
        found = Profile.of(divided, feed, self.units, threads)
        static = recipe.taking(STATIC)
        floats, integers = dict(self._floats.units), dict(self._integers.units)
        for root, ms in found.units.items():
            (integers if root in static else floats)[root] = ms
        self._floats = replace(self._floats, units=floats)
        self._integers = replace(self._integers, units=integers)

    def everything(self) -> Recipe:
        """All units that can be static are."""
        return self._static(self._usable)

    def only(self, roots: Collection[str]) -> Recipe:
        """These units, of those that can be static."""
        return self._static([unit for unit in self._usable if unit.root in roots])

    def cut(self, conversions: float = 1.0, barred: Collection[str] = frozenset()) -> Recipe:
        """The cheapest division by the profiles; the units `barred` stay in floats."""
        assert self._floats is not None
        assert self._integers is not None
        assert self._statistics is not None
        costs = boundary_costs(self._floats, self._integers, self._statistics, conversions)
        out = {unit for unit in self._usable if unit.root in barred}
        return self._static(cheapest(self._usable, costs, out))

    def with_dynamic(self, recipe: Recipe, barred: Collection[str] = frozenset()) -> Recipe:
        """Products that are not static become dynamic."""
        taken = {unit.node for unit in self.units if recipe.options.get(unit.root) == STATIC}
        more = {
            root: DYNAMIC
            for root, node in self.products.items()
            if root not in barred and node not in taken
        }
        return replace(recipe, options={**recipe.options, **more})

    def dynamic(self, barred: Collection[str] = frozenset()) -> Recipe:
        """All products dynamic, nothing static."""
        return self.with_dynamic(Recipe({}, weights=Options(self.bits)), barred)

    def weights_only(self, bits: int) -> Recipe:
        """All products with weights of so many bits, activations in floats."""
        return Recipe(dict.fromkeys(self.weighted, WEIGHTS[bits]), weights=Options(self.bits))

    def computes(self, recipe: Recipe) -> bool:
        """True where a product or convolution is on integers: the rest alone is no int8."""
        return any(unit.weights is not None for unit in self.chosen(recipe))

    def corrected(self, recipe: Recipe, feeds: Iterable[Feed], threads: int) -> Recipe:
        """The recipe with corrections of its biases, which recipes made from now on have too."""
        edit = Editor(Model.load(self.lossless))
        static = recipe.taking(STATIC)
        units = [unit for unit in Units(edit) if unit.root in static]
        found = bias_corrections(
            edit, units, recipe.tensors, feeds, recipe.weights, threads=threads
        )
        # Decisions keep them in 32 bits: what is judged and what is replayed are to be the same.
        self._corrections = {root: each.astype(np.float32) for root, each in found.items()}
        return replace(recipe, corrections=self._corrections)

    def forget_corrections(self) -> None:
        """Correct no further recipe."""
        self._corrections = {}

    def chosen(self, recipe: Recipe) -> list[Unit]:
        """The units that a recipe makes static."""
        static = recipe.taking(STATIC)
        return [unit for unit in self.units if unit.root in static]

    def milliseconds(self, root: str) -> tuple[float | None, float | None]:
        """What a unit was measured to cost in floats and on integers."""
        if self._floats is None or self._integers is None or root not in self._floats.units:
            return None, None
        return self._floats.units[root], self._integers.units[root]

    def _static(self, units: Sequence[Unit]) -> Recipe:
        assert self._ranges is not None
        options = {unit.root: STATIC for unit in units}
        corrections = {r: c for r, c in self._corrections.items() if r in options}
        return Recipe(options, affines(units, self._ranges), corrections, Options(self.bits))


def names_of(units: Iterable[Unit]) -> list[str]:
    """Values that units read or give, each once."""
    return list(dict.fromkeys(v.name for u in units for v in (*u.inputs, *u.outputs)))
