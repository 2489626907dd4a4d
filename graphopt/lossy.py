"""Lossy steps of `optimize`: what follows once the best lossless model is proved and on disk.

Layers are split first, then channels and weights go, then comes int8 on what is left, then tables
of weights: measured, splits of whole layers keep more than splits of what channels left
(`benchmarks/low_rank.py order`). All against one budget and the same original, and all in one
decisions file, which repeats them elsewhere to the same bytes.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.account import Remarks, Sizes
from graphopt.codebook import Codebook
from graphopt.decisions import WEIGHTS, Decisions, load_decisions, sha256
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.fingerprint import fingerprint
from graphopt.int8 import Int8
from graphopt.int8_report import Int8Record
from graphopt.ir import Model
from graphopt.low_rank import LowRank
from graphopt.low_rank_report import LowRankRecord
from graphopt.manager import run_pipeline
from graphopt.output import Target, output_errors
from graphopt.passes.canonicalize.fix_shapes import FixShapes
from graphopt.passes.prune.sparse import Sparsify, has_sparse
from graphopt.prover import Candidate, Progress
from graphopt.prune import Prune
from graphopt.recorded import Setting, blank_decisions, check_lossless, replay_notes
from graphopt.report import file_info
from graphopt.runtime import Session
from graphopt.step_report import StepRecord
from graphopt.wanted import Wanted

Array = NDArray[Any]
_DAMAGE: Final = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile)


class Step(Protocol):
    """One lossy step. It is asked to search, or given what a file decided; then it is applied."""

    is_wanted: bool

    @property
    def name(self) -> str:
        """As the report calls it."""
        ...

    @property
    def options(self) -> Mapping[str, Setting]:
        """What the user asked for, for the decisions file."""
        ...

    @property
    def arrays(self) -> Mapping[str, Array]:
        """What the decisions need beside them."""
        ...

    def read(self, decisions: Decisions, arrays: Mapping[str, Array], path: Path) -> None:
        """Take what a file decided."""

    def search(
        self, original: Path, base: Path, folder: Path, sizes: Sizes, tell: Progress
    ) -> StepRecord:
        """Look for the best candidate for the file `base`, judged against the original."""
        ...

    def applied(self, base: Path) -> Model:
        """The model with what was decided, as it is where that is nothing."""
        ...

    def replayed(self, decisions: Decisions, base: Path, sizes: Sizes) -> StepRecord | None:
        """The account of decisions that were read; None where this step has none."""
        ...

    def decided(self, decisions: Decisions) -> Decisions:
        """The decisions with those of this step."""
        ...


@dataclass(frozen=True)
class Kept:
    """What became of the steps that were asked for, by name, in order."""

    records: Mapping[str, StepRecord]

    @property
    def any(self) -> bool:
        """True where there is a lossy model to be written."""
        return any(record.kept for record in self.records.values())

    @property
    def refusals(self) -> list[str]:
        """Why steps that were asked for came to nothing, and what can be done, one line each."""
        found = [(name, refusal(each)) for name, each in self.records.items() if not each.kept]
        is_alone = len(self.records) == 1
        return [line if is_alone else f"{name.replace('_', ' ')}: {line}" for name, line in found]


class Lossy:
    """All lossy steps. As a context manager it holds the place of the decisions file.

    `shapes` are those that the passes fix; `settings` what the lossless passes were told, for the
    decisions file. Warnings and notes gather in `remarks`. Raises UsageError for decisions that
    cannot be replayed on the source.
    """

    def __init__(
        self,
        wanted: Wanted,
        source: Path | onnx.ModelProto,
        shapes: Mapping[str, Sequence[int]],
        data: str | None,
        custom_ops: Sequence[Path],
        seed: int,
        settings: Mapping[str, Setting],
        tell: Progress,
    ) -> None:
        self.remarks = Remarks()
        self._wanted = wanted
        self._source = source
        self._shapes = shapes
        self._settings = settings
        self._tell = tell
        self._place: Target | None = None
        self._staged: list[Path] = []
        self._replay: Decisions | None = None
        self._sha256 = ""
        if wanted.replay is not None or wanted.decisions is not None:
            self._sha256 = _sha256(source)
        if wanted.replay is not None:
            self._replay = load_decisions(wanted.replay, self._sha256)
        common: dict[str, Any] = {
            "data": data,
            "budget": wanted.budget,
            "threads": wanted.threads,
            "seed": seed,
            "custom_ops": tuple(custom_ops),
            "force": wanted.force,
            # All of them: they are judged on the feeds that no layer was fitted on.
            "holds_out": wanted.fits(data),
        }
        self._data, self._seed, self._custom_ops = data, seed, tuple(custom_ops)
        self._common = common
        self._prune = Prune(wanted.prune, common, self.remarks)
        self._low_rank = LowRank(wanted.low_rank, common, self.remarks)
        self._int8 = Int8(wanted.mode, common, self.remarks)
        self._codebook = Codebook(wanted.bits, common, self.remarks)
        if self._replay is not None and wanted.replay is not None:
            arrays = _arrays(self._replay, wanted.replay)
            for step in self._steps:
                _read(step, self._replay, arrays, wanted.replay)

    @property
    def _steps(self) -> tuple[Step, ...]:
        """In the order in which they are done."""
        return self._low_rank, self._prune, self._int8, self._codebook

    def __enter__(self) -> Self:
        if self._wanted.decisions is not None:
            self._place = Target(self._wanted.decisions)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._place is not None:
            self._place.__exit__(kind, error, trace)

    def commit(self) -> None:
        """Put the decisions in their place, once the model is in its own."""
        if self._place is not None and self._staged:
            self._place.commit(self._staged)

    def opset(self, given: int | None) -> int | None:
        """The opset to convert to: what is `given`, else one that int8 needs, else None."""
        if not self._int8.is_wanted:
            return given
        return self._int8.opset(Model.load(self._source).opsets.get(""), given)

    def run(self, candidate: Candidate, original_bytes: int) -> Kept:
        """Make the candidate, which is the lossless model, the lossy one, if that is to be kept.

        Raises UsageError for data, a metric or decisions that do not fit, RuntimeFailure where
        onnxruntime fails.
        """
        if not candidate.files:
            candidate.write(self._tell)
        mark = fingerprint(candidate.model)
        work = candidate.staged.parent / "lossy"  # it goes with its folder, whatever happens
        lossless, files = _moved(candidate, work / "lossless")
        sizes = Sizes(original_bytes, file_info(lossless, files).bytes)
        if self._replay is not None:
            return self._replayed(candidate, lossless, mark, sizes)
        records, base = self._searched(self._original(work), lossless, work, sizes)
        kept = Kept(records)
        if kept.any:
            self._finish(candidate, base)
            self._record(mark)
            kept = self._told(kept, candidate, self._wanted.decisions)
        return kept

    def _searched(
        self, original: Path, lossless: Path, work: Path, sizes: Sizes
    ) -> tuple[dict[str, StepRecord], Path]:
        """What each step found on what the steps before it left, and the file in the end."""
        records: dict[str, StepRecord] = {}
        base = lossless
        for step in self._steps:
            if not step.is_wanted:
                continue
            clock = _Clock(self._tell, step.name.replace("_", " "))
            folder = _made(work / step.name)
            is_split = bool(self._low_rank.alternatives) and not self._prune.is_wanted
            if step is self._int8 and is_split:
                base, found = self._with_int8(original, lossless, folder, sizes, clock)
                name = self._low_rank.name
                spent = {"seconds": records[name].seconds}  # by its own search
                records |= {**found, name: found[name].model_copy(update=spent)}
            else:
                records[step.name] = step.search(original, base, folder, sizes, clock)
                base = _file(step, base, folder)
            seconds = {"seconds": clock.stop()}
            records[step.name] = records[step.name].model_copy(update=seconds)
        return records, base

    def _with_int8(
        self, original: Path, base: Path, folder: Path, sizes: Sizes, clock: Progress
    ) -> tuple[Path, dict[str, StepRecord]]:
        """Int8 on each of the models that low rank has to offer and on that before it.

        What is fastest of all is kept; both steps share what may be lost, so that the fastest
        split model need not be the one that int8 goes with.
        """
        best: tuple[float, Path, Int8, Any, LowRankRecord, Int8Record] | None = None
        for number, trial in enumerate((*self._low_rank.alternatives, None)):
            place = _made(folder / str(number))
            split = self._low_rank.choose(trial, sizes)
            file = _file(self._low_rank, base, place)
            int8 = Int8(self._wanted.mode, self._common, Remarks())
            record = int8.search(original, file, place, sizes, clock)
            shown: StepRecord = record if record.kept else split
            speed = shown.to_original.ratio if shown.kept and shown.to_original else 0.0
            if best is None or speed > best[0]:
                best = speed, _file(int8, file, place), int8, trial, split, record
        assert best is not None
        _, target, self._int8, trial, split, record = best
        self._low_rank.choose(trial, sizes)
        if trial is None:
            better = f"int8 alone is faster: {_speed(record)} of the original's speed"
            split = split.model_copy(update={"reason": better})
        self.remarks.warnings += self._int8.remarks.warnings
        self.remarks.notes += self._int8.remarks.notes
        return target, {self._low_rank.name: split, self._int8.name: record}

    def _finish(self, candidate: Candidate, base: Path) -> None:
        """Make the candidate what was decided."""
        candidate.model = Model.load(base)
        # What came in sparse was made dense for the steps: the file would grow by all its zeros.
        is_sparse = self._int8.recipe is None and has_sparse(Model.load(self._source))
        if self._prune.has_zeros or is_sparse:
            run_pipeline(candidate.model, [Sparsify()])
        candidate.write(self._tell)

    def _told(self, kept: Kept, candidate: Candidate, decisions: Path | None) -> Kept:
        """The records with what is known only once the model is written."""
        size = file_info(candidate.staged, candidate.files).bytes
        more = {"bytes": size, "decisions": None if decisions is None else str(decisions)}
        records = {
            name: record.model_copy(update=more) if record.kept else record
            for name, record in kept.records.items()
        }
        int8 = records.get(self._int8.name)
        if int8 is not None and int8.kept:
            records[self._int8.name] = int8.model_copy(update={"notes": self.remarks.notes})
        elif self._replay is not None and records:
            name, last = list(records.items())[-1]
            notes = [*last.notes, *self.remarks.notes]
            records[name] = last.model_copy(update={"notes": notes})
        return Kept(records)

    def _replayed(self, candidate: Candidate, lossless: Path, mark: str, sizes: Sizes) -> Kept:
        decisions, path = self._replay, self._wanted.replay
        assert decisions is not None
        assert path is not None
        self._tell("replaying", None)
        check_lossless(decisions, mark, path)
        warnings, notes = replay_notes(decisions, path)
        self.remarks.warnings += warnings
        self.remarks.notes += notes
        base, records = lossless, dict[str, StepRecord]()
        for step in self._steps:
            if (record := step.replayed(decisions, base, sizes)) is not None:
                records[step.name] = record
                base = _file(step, base, _made(lossless.parent.parent / step.name))
        self._finish(candidate, base)
        try:
            Session(candidate.staged, custom_ops=self._custom_ops).close()
        except RuntimeFailure as failure:
            raise UsageError(f"decisions {path}: cannot be replayed: {failure}") from failure
        return self._told(Kept(records), candidate, path)

    def _record(self, mark: str) -> None:
        """Stage the decisions file, and the weights beside it."""
        if self._place is None:
            return
        budget, wanted = self._wanted.budget, self._wanted
        options: dict[str, Setting] = dict(self._settings)
        for step in self._steps:
            options |= step.options
        options |= {
            "max_drop": budget.max_drop,
            "metric": budget.metric,
            "min_sqnr": budget.min_sqnr,
            "data": self._data,
            "seed": self._seed,
            "threads": wanted.threads,
            "force": wanted.force,
        }
        decisions = blank_decisions(self._sha256, mark, options)
        arrays = {
            f"{s.name}/{name}": array for s in self._steps for name, array in s.arrays.items()
        }
        beside = self._place.staged.with_name(self._place.staged.name + WEIGHTS)
        with output_errors(self._place.path):
            if arrays:
                with beside.open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **arrays)
                decisions = decisions.model_copy(update={"weights": sha256([beside])})
            for step in self._steps:
                decisions = step.decided(decisions)
            self._place.staged.write_text(decisions.to_json(), encoding="utf-8")
        self._staged = [*([beside] if arrays else []), self._place.staged]

    def _original(self, work: Path) -> Path:
        """The source as a file, at the shapes that are fixed."""
        if isinstance(self._source, Path) and not self._shapes:
            return self._source
        model = Model.load(self._source)
        if self._shapes:
            run_pipeline(model, [FixShapes.of(self._shapes)])
        path = work / "original.onnx"
        exporter.save(model, path)
        return path


def refusal(record: StepRecord) -> str:
    """Why nothing is written, and what can be done about it, in one line."""
    tried = record.trials
    hint = ""
    if isinstance(record, LowRankRecord) and record.to_lossless and record.to_lossless.low > 1:
        return record.reason  # it pays by itself, and gave way: forcing it changes nothing
    if record.candidate and any(each.good for each in tried):
        hint = "; --force writes the fastest good one all the same"
    elif tried:
        by_noise = record.min_sqnr is not None and record.metric is None
        more = "a lower --min-sqnr" if by_noise else "--max-drop"
        hint = f"; {more} lets more be lost, --force writes the best of them all the same"
    return f"{record.reason}{hint}"


class _Clock:
    """Passes on what is going on, and adds up the seconds of each stage."""

    def __init__(self, tell: Progress, step: str) -> None:
        self._tell = tell
        self._step = step
        self._seconds: dict[str, float] = {}
        self._stage = ""
        self._since = time.perf_counter()

    def __call__(self, what: str, share: float | None) -> None:
        stage = "trying" if what.startswith("trying ") else what.partition(",")[0]
        if stage != self._stage:
            self._add()
            self._stage = stage
        self._tell(f"{self._step}: {what}", share)

    def stop(self) -> dict[str, float]:
        """Seconds by stage."""
        self._add()
        return self._seconds

    def _add(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


def _file(step: Step, base: Path, folder: Path) -> Path:
    """What a step makes of a file; the file itself where that is nothing."""
    model = step.applied(base)
    if not model.graph.edited:
        return base
    target = folder / f"{step.name}.onnx"  # not `base` itself, which is read meanwhile
    exporter.save(model, target)
    return target


def _speed(record: StepRecord) -> str:
    return f"{record.to_original.ratio:.2f}x" if record.to_original is not None else "more"


def _arrays(decisions: Decisions, path: Path) -> dict[str, Array]:
    """The weights beside decisions. Raises UsageError for others than were written with them."""
    if not decisions.weights:
        return {}
    beside = path.with_name(path.name + WEIGHTS)
    try:
        if sha256([beside]) != decisions.weights:
            raise ValueError("it is not the file that was written with them")
        with np.load(beside, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def _read(step: Step, decisions: Decisions, arrays: Mapping[str, Array], path: Path) -> None:
    """Let a step take what is its own."""
    prefix = f"{step.name}/"
    own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    try:
        step.read(decisions, own, path)
    except ValueError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UsageError:
    said = error.strerror if isinstance(error, OSError) else str(error)
    return UsageError(f"decisions {path}: the weights {path.name}{WEIGHTS}: {said}")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _moved(candidate: Candidate, folder: Path) -> tuple[Path, list[Path]]:
    """The model as it was written, out of the way of the next one; all of its files."""
    folder.mkdir(parents=True)
    files = [file.replace(folder / file.name) for file in candidate.files]
    return folder / candidate.staged.name, files


def _sha256(source: Path | onnx.ModelProto) -> str:
    if isinstance(source, Path):
        return sha256([source, *Model.load(source).store.files()])
    return hashlib.sha256(source.SerializeToString(deterministic=True)).hexdigest()
