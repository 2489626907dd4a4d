"""The search for weights as tables: 4 bits where that does little harm, 8 bits elsewhere.

What is kept has to be smaller than the model before and good enough. It is not timed: the runtime
folds it to the same operators on the same floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.kernels.codebook import nearest
from graphopt.passes.quantize.codebook import (
    LEAST,
    Bits,
    CodebookRecipe,
    coded_weights,
    no_bits,
    table_of,
    weight_of,
)
from graphopt.report import model_bytes
from graphopt.search import Trial
from graphopt.selection import Asked, Selection, Tell, least_bad

AUTO: Final = "auto"
BitsAsked = Literal["auto", 4, 8]
_MEASURED: Final = 32  # weights whose harm is measured, the largest; others are given up before
_FEEDS: Final = 4  # on which it is


@dataclass(frozen=True, kw_only=True)
class CodebookRequest(Asked):
    """What the user asked for of tables: indices of 4 bits, of 8, or the smallest good mixture."""

    bits: BitsAsked = AUTO
    least: int = LEAST


@dataclass(frozen=True)
class Coding:
    """A weight as a table; `sqnr_db` is None where nothing is lost."""

    table: NDArray[np.float32]
    bytes: int
    sqnr_db: float | None


@dataclass(frozen=True)
class CodebookOutcome:
    """What was found: `kept` is None where nothing is, for the `reason`.

    `sizes` are bytes of the base model's weights by name, `codings` are by name and bits,
    `refusals` say why other weights stay.
    """

    kept: Trial[CodebookRecipe] | None
    reason: str
    trials: list[Trial[CodebookRecipe]]
    sizes: Mapping[str, int]
    codings: Mapping[tuple[str, int], Coding]
    refusals: Mapping[str, str]
    notes: list[str]


class CodebookSearch:
    """The search for one model, `base`. `folder` is for the files of candidates."""

    def __init__(
        self, original: Path, base: Path, request: CodebookRequest, folder: Path, tell: Tell
    ) -> None:
        self._base = base
        self._request = request
        self._folder = folder
        self._tell = tell
        self._selection: Selection[CodebookRecipe] = Selection(
            original, base, request, tell, self._write
        )
        self._model = Model.load(base)
        self._sizes = {
            value.name: value.weight.nbytes
            for value in coded_weights(self._model)
            if value.weight is not None
        }
        self._codings: dict[tuple[str, int], Coding] = {}
        self._refusals: dict[str, str] = {}
        self._notes: list[str] = []

    def run(self) -> CodebookOutcome:
        """Search. Raises UsageError where the data does not fit."""
        asked = self._request.bits
        barred = no_bits(self._model, 4)
        if asked == AUTO and barred is None and self._request.data is None:
            barred = "one feed that is proposed tells too little of what they do: --data"
        if asked == AUTO and barred is not None:
            self._notes.append(f"4 bits were not tried: {barred}")
        few = self._coded(4) if asked in (AUTO, 4) and barred is None else {}
        many = self._coded(8) if asked in (AUTO, 8) else {}
        if few or many:
            with self._selection.judge:
                self._try_all(few, many)
        trials = self._selection.trials
        good = self._selection.good
        best = min(good, key=lambda trial: model_bytes(trial.file), default=None)
        reason = self._reason(best, barred if asked == 4 else None)
        kept = None if reason else best
        return CodebookOutcome(
            kept, reason, trials, self._sizes, self._codings, self._refusals, self._notes
        )

    def _try_all(self, few: Mapping[str, Bits], many: Mapping[str, Bits]) -> None:
        """4 bits; else 8; then, as 8 will do or not, 4 or 8 where they do least harm."""
        first = self._selection.try_out("4 bits", CodebookRecipe({**many, **few})) if few else None
        if first is not None and first.verdict.good:
            return
        second = self._selection.try_out("8 bits", CodebookRecipe(many)) if many else None
        mixed = second is None or second.verdict.good
        start = first if mixed else second
        if start is None or start.verdict.good:
            return

        def without(recipe: CodebookRecipe, given_up: frozenset[str]) -> CodebookRecipe:
            kept = {name: bits for name, bits in recipe.bits.items() if name not in given_up}
            more = {name: many[name] for name in recipe.bits if name in given_up and name in many}
            return CodebookRecipe({**kept, **more} if start is first else kept)

        # The last one stays: without any it is the model before, or the one of 8 bits.
        self._selection.repair(start, self._ranking(start.recipe)[:-1], without)

    def _ranking(self, recipe: CodebookRecipe) -> list[str]:
        """Weights in the order in which they are given up: most harm for the bytes they save.

        Harm is the noise of the outputs with this weight alone as a table. Small weights, whose
        harm is not measured, come first: they save little.
        """
        saved = {n: self._sizes[n] - self._codings[n, b].bytes for n, b in recipe.bits.items()}
        by_size = sorted(saved, key=lambda name: -saved[name])
        judge, measured = self._selection.judge, by_size[:_MEASURED]
        before = judge.noise(self._base, _FEEDS)
        harm: dict[str, float] = {}
        target = self._folder / "alone.onnx"
        for number, name in enumerate(measured):
            self._tell("measuring harm", number / len(measured))
            exporter.save(self._applied(CodebookRecipe({name: recipe.bits[name]})), target)
            harm[name] = max(judge.noise(target, _FEEDS) - before, 0.0) / saved[name]
        unmeasured = by_size[_MEASURED:][::-1]
        return unmeasured + sorted(measured, key=lambda name: -harm[name])

    def _coded(self, bits: Bits) -> dict[str, Bits]:
        """Weights that can have such indices, each with these bits; learns their tables."""
        edit = Editor(self._model)
        found: dict[str, Bits] = {}
        values = list(coded_weights(self._model))
        for number, value in enumerate(values):
            self._tell("dividing weights", number / len(values))
            array = weight_of(value, edit, bits, least=self._request.least)
            if isinstance(array, str):
                self._refusals.setdefault(value.name, array)
                continue
            found[value.name] = bits
            table = table_of(array, bits)
            size = (array.size * bits + 7) // 8 + table.nbytes
            lost = _sqnr_db(array, table[nearest(array, table)])
            self._codings[value.name, bits] = Coding(table, size, lost)
        return found

    def _applied(self, recipe: CodebookRecipe) -> Model:
        tables = {key: coding.table for key, coding in self._codings.items()}
        return recipe.apply(self._base, tables)

    def _write(self, recipe: CodebookRecipe, number: int) -> Path:
        target = self._folder / f"coded-{number}.onnx"
        exporter.save(self._applied(recipe), target)
        return target

    def _reason(self, best: Trial[CodebookRecipe] | None, barred: str | None) -> str:
        """Why nothing is kept, "" where something is."""
        trials = self._selection.trials
        if not trials and barred is not None:
            return f"{barred}; --opset 21 gives it that"
        if not trials:
            found = Counter(self._refusals.values()).most_common(1)
            said = f", most of them since {found[0][0]}" if found else ""
            return f"no weight of a layer can be a table{said}"
        if best is None:
            least = least_bad(trials) or trials[0]
            return f"no candidate is good enough; the best of them, {least.name}: " + (
                least.verdict.text
            )
        if model_bytes(best.file) >= model_bytes(self._base):
            return "it is not smaller than the model before"
        return ""


def _sqnr_db(array: NDArray[Any], kept: NDArray[Any]) -> float | None:
    noise = float(np.square(np.subtract(array, kept, dtype=np.float64)).sum())
    if not noise:
        return None
    return float(10 * np.log10(np.square(array, dtype=np.float64).sum() / noise))
