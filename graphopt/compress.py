"""Int8 that pays: candidates are made, judged on data, timed, and the best is kept, or none is."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from graphopt.census import census
from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model
from graphopt.passes.quantize import noise
from graphopt.passes.quantize.blocks import Block, blocks
from graphopt.passes.quantize.candidates import CONVERSIONS, Candidates, names_of
from graphopt.passes.quantize.noise import Noise
from graphopt.passes.quantize.recipe import (
    DYNAMIC,
    HALF,
    STATIC,
    TABLE,
    WEIGHTS,
    Recipe,
    half_regions,
    table_regions,
)
from graphopt.search import Trial, Winner
from graphopt.selection import Asked, Selection, Tell, lost
from graphopt.statistics import Statistics, sweep
from graphopt.targets import has_vnni

Mode = Literal["auto", "static", "dynamic", "weights"]
MODES: Final[tuple[Mode, ...]] = ("auto", "static", "dynamic", "weights")
_NOISE_FEEDS: Final = 8  # feeds on which noise is followed through the model
_WORTH: Final = 1.03  # what a candidate must be faster by to be worth repairing
_LEAST_GAIN: Final = 1e-3  # ms; below, a block gains nothing that could be measured
_PATIENCE: Final = 12.0  # seconds for what blocks do alone, where it serves a repair


@dataclass(frozen=True, kw_only=True)
class Request(Asked):
    """What the user asked for of int8."""

    mode: Mode = "auto"


@dataclass(frozen=True)
class Sensitivity:
    """What a block of units does when it alone is on integers.

    `noise` is that of the model's outputs (`Quality.noise`), `gain_ms` what the block saves by the
    profiles, `sqnr_db` that of its result when everything is on integers.
    """

    root: str
    operators: str
    noise: float
    gain_ms: float
    roots: frozenset[str]
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What was found: the recipe that is kept, None where nothing is, and the account of it."""

    recipe: Recipe | None
    reason: str
    trials: list[Trial[Recipe]]
    winner: Winner[Recipe]
    candidates: Candidates
    noise: Noise | None
    feeds: int

    @property
    def kept(self) -> Trial[Recipe] | None:
        """The candidate that is kept."""
        return self.winner.trial if self.recipe is not None else None


class Compression:
    """The search for one model. `folder` is for the files of candidates."""

    def __init__(
        self, original: Path, lossless: Path, request: Request, folder: Path, tell: Tell
    ) -> None:
        self._lossless = lossless
        self._request = request
        self._folder = folder
        self._tell = tell
        self._feeds = 0
        self._candidates = Candidates(lossless, 8 if has_vnni() else 7)
        self._selection: Selection[Recipe] = Selection(
            original, lossless, request, tell, self._write
        )

    def run(self) -> Outcome:
        """Search. Raises UsageError where the data does not fit, or there is none to calibrate."""
        mode = self._request.mode
        if self._request.data is None and mode == "static":
            raise UsageError("static int8 has to be calibrated: --data with some inputs")
        with self._selection.judge:
            if mode in ("auto", "static") and self._request.data is not None:
                self._repair(self._static())
            if mode in ("auto", "dynamic"):
                self._dynamic()
            if mode == "weights":
                self._weights()
            return self._best()

    def _write(self, recipe: Recipe, number: int) -> Path:
        target = self._folder / f"candidate-{number}.onnx"
        recipe.write(self._lossless, target)
        return target

    # -- candidates --------------------------------------------------------------------------------

    def _static(self) -> list[Trial[Recipe]]:
        """All units that can be static, and the cheapest divisions; good or not."""
        candidates = self._candidates
        everything = self._profiled()
        if everything is None:
            return []
        tried, seen = [everything], [everything.recipe.options]
        for factor in CONVERSIONS:
            recipe = candidates.cut(factor)
            if candidates.computes(recipe) and recipe.options not in seen:
                seen.append(recipe.options)
                name = f"cheapest division, conversions x {factor:g}"
                tried.append(self._selection.try_out(name, recipe))
        if len(tried) > 1:
            # Costs as they are within a division: layouts around a unit are others than before.
            candidates.refine(
                tried[1].file, tried[1].recipe, self._selection.proposed(), self._request.threads
            )
            recipe = candidates.cut()
            if candidates.computes(recipe) and recipe.options not in seen:
                tried.append(self._selection.try_out("cheapest division, costs within it", recipe))
        return tried

    def _profiled(self) -> Trial[Recipe] | None:
        """Everything static, by which costs are known from then on; None if nothing can be."""
        candidates, threads = self._candidates, self._request.threads
        candidates.calibrate(self._calibrated())
        if not candidates.can_be_static:
            return None
        everything = self._selection.try_out("all on integers", candidates.everything())
        self._tell("profiling", None)
        candidates.profile(everything.file, self._selection.proposed(), threads)
        return everything

    def _repaired(self, trial: Trial[Recipe]) -> None:
        """Try what is left of a candidate once it is good enough."""
        trial = self._corrected(trial)
        if trial.verdict.good:
            return
        found = self._sensitivities(trial, _PATIENCE)
        worst = sorted(found, key=lambda each: -each.noise / max(each.gain_ms, _LEAST_GAIN))
        of = {each.root: each.roots for each in found}

        chosen = trial.recipe.taking(STATIC)

        def without(recipe: Recipe, given_up: frozenset[str]) -> Recipe:
            return self._candidates.only(chosen.difference(*(of[root] for root in given_up)))

        self._selection.repair(trial, [each.root for each in worst], without)

    def _corrected(self, trial: Trial[Recipe]) -> Trial[Recipe]:
        """The candidate with its biases corrected, where that brings it closer to the original."""
        self._tell("correcting biases", None)
        feeds = itertools.islice(self._selection.feeds(), _NOISE_FEEDS)
        recipe = self._candidates.corrected(trial.recipe, feeds, self._request.threads)
        if not recipe.corrections:
            return trial
        corrected = self._selection.try_out(f"{trial.name}, biases corrected", recipe)
        if corrected.verdict.drop < trial.verdict.drop:
            return corrected
        self._candidates.forget_corrections()
        return trial

    def _sensitivities(self, trial: Trial[Recipe], patience: float) -> list[Sensitivity]:
        """What each block of a choice does to the outputs when it alone is on integers.

        Those that add most noise inside the model come first; what is left when the `patience`
        (seconds) is over is taken to do nothing.
        """
        injected = self._followed(trial)
        parts = blocks(self._candidates.chosen(trial.recipe))
        parts.sort(key=lambda block: -max(injected.injected(unit) for unit in block.units))
        started, found = time.monotonic(), []
        for number, block in enumerate(parts):
            self._tell("following blocks", number / len(parts))
            late = time.monotonic() - started > patience
            noise_alone = 0.0 if late else self._alone(trial.recipe, block)
            costs = [self._candidates.milliseconds(root) for root in block.roots]
            gain = sum(a - b for a, b in costs if a is not None and b is not None)
            sqnr = injected.sqnr_db(block.root)
            found.append(
                Sensitivity(block.root, block.operators, noise_alone, gain, block.roots, sqnr)
            )
        return found

    def _alone(self, recipe: Recipe, block: Block) -> float:
        """The noise of the outputs with one block on integers."""
        target = self._folder / "alone.onnx"
        recipe.without(frozenset(recipe.options) - block.roots).write(self._lossless, target)
        return self._selection.judge.noise(target, _NOISE_FEEDS)

    def sensitivity(self) -> list[Sensitivity]:
        """Of every block that can be static. Raises UsageError where there is no data."""
        if self._request.data is None:
            raise UsageError("sensitivity has to be measured on data: --data with some inputs")
        with self._selection.judge:
            everything = self._profiled()
            if everything is None:
                return []
            found = self._sensitivities(everything, math.inf)
            order = {unit.root: number for number, unit in enumerate(self._candidates.units)}
            return sorted(found, key=lambda each: order[each.root])

    def _calibrated(self) -> Statistics:
        def count(done: int) -> None:
            self._feeds = done
            self._tell(f"calibrating, {done} feeds", None)

        return sweep(
            self._lossless,
            self._selection.feeds(),
            self._candidates.observers,
            threads=self._request.threads,
            custom_ops=self._request.custom_ops,
            progress=count,
        )

    def _followed(self, trial: Trial[Recipe]) -> Noise:
        self._tell("following noise", None)
        feeds = itertools.islice(self._selection.feeds(), _NOISE_FEEDS)
        names = names_of(self._candidates.units)
        return noise.measure(self._lossless, trial.file, names, feeds, self._request.threads)

    def _repair(self, tried: list[Trial[Recipe]]) -> None:
        """Make good what would be faster than all that is good already.

        Following what each block does takes longer than all else: it is done for one candidate.
        """
        self._selection.race(tried)
        good = [trial for trial in tried if trial.verdict.good]
        best = max((self._selection.speed(trial) for trial in good), default=1.0)
        bad = [t for t in tried if not t.verdict.good and self._selection.speed(t) > _WORTH * best]
        if bad:
            self._tell("looking for what it must give up", None)
            self._repaired(max(bad, key=self._selection.speed))

    def _dynamic(self) -> None:
        """Dynamic products alone, and beside the static units of the fastest that is good."""
        candidates = self._candidates
        if not candidates.products:
            return
        good = [trial for trial in self._selection.trials if trial.verdict.good]
        self._selection.try_out("dynamic", candidates.dynamic())
        if good:
            self._selection.race(good)
            fast = max(good, key=self._selection.speed)
            mixed = candidates.with_dynamic(fast.recipe)
            if mixed.options != fast.recipe.options:
                self._selection.try_out(f"{fast.name}, and dynamic", mixed)

    def _weights(self) -> None:
        """Weights of 8 and 4 bits where products are, of 16 and in tables elsewhere."""
        for bits in WEIGHTS:
            recipe = self._candidates.weights_only(bits)
            file = self._write(recipe, len(self._selection.trials))
            name = f"weights of {bits} bits"
            self._selection.try_out(name, self._stored(recipe, file))

    def _stored(self, recipe: Recipe, file: Path) -> Recipe:
        """The recipe of a file, with what is floating-point in it stored in fewer bits."""
        edit = Editor(Model.load(file))
        more = dict.fromkeys(set(self._candidates.tables) & set(table_regions(edit)), TABLE)
        more |= dict.fromkeys(half_regions(edit), HALF)
        return replace(recipe, options={**dict(sorted(more.items())), **recipe.options})

    def _smaller(self, winner: Winner[Recipe]) -> Winner[Recipe]:
        """The winner in fewer bytes, where that is as good and not slower."""
        trial = winner.trial
        assert trial is not None
        recipe = self._stored(trial.recipe, trial.file)
        if recipe.options == trial.recipe.options:
            return winner
        stored = self._selection.try_out(f"{trial.name}, stored in fewer bits", recipe)
        if not stored.verdict.good:
            return winner
        self._selection.as_fast(stored, trial)  # they are timed together now
        again = self._selection.fastest([trial, stored])
        ratio, before = (again.against_lossless[t.name] for t in (stored, trial))
        return replace(again, trial=stored if ratio.high >= before.median else trial)

    # -- the choice --------------------------------------------------------------------------------

    def _best(self) -> Outcome:
        winner = self._selection.fastest(self._selection.good)
        if winner.trial is not None:
            winner = self._fused(winner)
        if winner.pays and self._request.mode != "weights":
            winner = self._smaller(winner)
        reason = self._reason(winner)
        recipe = winner.trial.recipe if winner.trial is not None else None
        if reason and not self._request.force:
            recipe = None
        found = None
        if winner.trial is not None and winner.trial.recipe.taking(STATIC):
            found = self._followed(winner.trial)
        return Outcome(
            recipe, reason, self._selection.trials, winner, self._candidates, found, self._feeds
        )

    def _fused(self, winner: Winner[Recipe]) -> Winner[Recipe]:
        """The fastest of which every region runs on integer kernels; others lose those that do not.

        Where onnxruntime does not fuse, it dequantizes weights on every run.
        """
        out: set[str] = set()
        while winner.trial is not None and (lost := self._unfused(winner.trial)):
            trial = winner.trial
            out.add(trial.name)
            less = f"{trial.name}, less {len(lost)} that do not fuse"
            rest = trial.recipe.without(lost)
            is_int8 = self._candidates.computes(rest) or rest.taking(DYNAMIC)
            if is_int8 and not self._selection.is_timed(less):
                self._selection.try_out(less, rest)
            winner = self._selection.fastest(
                [each for each in self._selection.good if each.name not in out]
            )
        return winner

    def _unfused(self, trial: Trial[Recipe]) -> frozenset[str]:
        """Static products and convolutions that onnxruntime computes in floats all the same.

        A bias may be added in floats behind an integer product, which is why the operator itself
        is looked for.
        """
        chosen = self._candidates.chosen(trial.recipe)
        roots = {u.node.outputs[0].name: u.root for u in chosen if u.weights and u.node.outputs[0]}
        found = census(trial.file, sorted(roots), custom_ops=self._request.custom_ops)
        return frozenset(roots[name] for name in found.unfused)

    def _reason(self, winner: Winner[Recipe]) -> str:
        """Why nothing is kept, "" where something is."""
        trials = self._selection.trials
        if not trials:
            return "there is nothing in it that can run on integers"
        if winner.trial is None:
            best = min(trials, key=lost)
            return f"no candidate is good enough; the best of them: {best.verdict.text}"
        ratio = winner.against_lossless[winner.trial.name]
        if self._request.mode == "weights" and not ratio.significantly_slower:
            return ""  # asked for bytes
        if not winner.pays:
            return (
                f"int8 is not faster than the best lossless model here: {ratio.median:.2f}x "
                f"({ratio.low:.2f} to {ratio.high:.2f})"
            )
        return ""


def counts(recipe: Recipe) -> Mapping[str, int]:
    """How many regions take each option."""
    options = (STATIC, DYNAMIC, *WEIGHTS.values(), TABLE, HALF)
    return {option: len(recipe.taking(option)) for option in options if recipe.taking(option)}
