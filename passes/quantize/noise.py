"""Where quantization noise comes in: value by value, in one sweep of both models."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.exposed import Exposure, write_exposed
from graphopt.ir import Model
from graphopt.passes.quantize.units import Unit
from graphopt.runtime import Feed
from graphopt.statistics import BUDGET


@dataclass(frozen=True)
class Noise:
    """Noise over signal of values: mean squared difference over variance, by name."""

    ratios: Mapping[str, float]

    def sqnr_db(self, name: str) -> float | None:
        """In dB; infinite where nothing differs, None for a value that is not in both models."""
        if name not in self.ratios:
            return None
        ratio = self.ratios[name]
        return math.inf if ratio == 0 else -10 * math.log10(ratio)

    def injected(self, unit: Unit) -> float:
        """What a unit adds: the noise of its result beyond that of the noisiest of its inputs."""
        given = max((self.ratios.get(value.name, 0.0) for value in unit.inputs), default=0.0)
        found = max((self.ratios.get(value.name, 0.0) for value in unit.outputs), default=0.0)
        return found - given

    def ranking(self, units: Sequence[Unit]) -> list[str]:
        """Roots of the units, the one that adds most first."""
        return [unit.root for unit in sorted(units, key=lambda unit: -self.injected(unit))]


def measure(
    original: Path, candidate: Path, names: Iterable[str], feeds: Iterable[Feed], threads: int = 0
) -> Noise:
    """Compare values of the same name in two models, feed by feed.

    What a candidate calls by a name stands for what the original calls so; values that only one of
    them has, or that cannot be observed, are left out. Memory is that of one feed's values.
    """
    first, second = Model.load(original), Model.load(candidate)
    shared = [n for n in names if n in first.graph.values and n in second.graph.values]
    signal = dict.fromkeys(shared, 0.0)
    noise = dict.fromkeys(shared, 0.0)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        written = [
            write_exposed(model, Path(folder) / f"{side}.onnx", external="always")
            for side, model in enumerate((first, second))
        ]
        with (
            Exposure(first, written[0], shared, budget=BUDGET, threads=threads) as a,
            Exposure(second, written[1], shared, budget=BUDGET, threads=threads) as b,
        ):
            for feed in feeds:
                expected = dict(a.values(feed))
                for name, found in b.values(feed):
                    if name in expected and np.shape(found) == expected[name].shape:
                        x = expected[name].astype(np.float64)
                        signal[name] += float(x.var()) * x.size
                        noise[name] += float(np.square(x - found).sum())
    return Noise({n: noise[n] / signal[n] for n in shared if signal[n] > 0})
