"""Int8 in `optimize`: what follows once the best lossless model is proved and lies on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import onnx

from graphopt import exporter
from graphopt.account import Remarks, Sizes, account, replayed_account
from graphopt.compress import Compression, Outcome, Request
from graphopt.decisions import Decisions, load_decisions, sha256
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.fingerprint import fingerprint
from graphopt.int8_report import Int8Record
from graphopt.int8_wanted import Wanted
from graphopt.ir import Model
from graphopt.judging import Judged
from graphopt.manager import run_pipeline
from graphopt.output import Target, output_errors
from graphopt.passes.canonicalize.fix_shapes import FixShapes
from graphopt.passes.quantize.recipe import Recipe
from graphopt.prover import Candidate, Progress
from graphopt.recorded import (
    Setting,
    check_lossless,
    decisions_of,
    recipe_of,
    replay_notes,
    replayed,
    rounded,
)
from graphopt.report import file_info
from graphopt.runtime import Session
from graphopt.search import Trial
from graphopt.targets import OPSETS

NEEDED_OPSET: Final = 17  # what older models are raised to: the most widely read
_RANGE: Final = f"{OPSETS[0]} to {OPSETS[-1]}"


class Int8:
    """The step itself. As a context manager it holds the place of the decisions file.

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
        self._request = Request(
            mode=wanted.mode or "auto",
            data=data,
            budget=wanted.budget,
            threads=wanted.threads,
            seed=seed,
            custom_ops=tuple(custom_ops),
            force=wanted.force,
        )
        self._place: Target | None = None
        self._decisions: Decisions | None = None
        self._recipe = Recipe({})
        self._sha256 = ""
        if wanted.replay is not None or wanted.decisions is not None:
            self._sha256 = _sha256(source)
        if wanted.replay is not None:
            self._decisions = load_decisions(wanted.replay, self._sha256)
            self._recipe = recipe_of(self._decisions, wanted.replay)

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
        if self._place is not None:
            self._place.commit([self._place.staged])

    def opset(self, given: int | None) -> int | None:
        """The opset to convert to: what is `given`, else one that int8 needs, else None."""
        own = Model.load(self._source).opsets.get("")
        if given is None and own is not None and own < OPSETS[0]:
            self.remarks.notes.append(f"opset {own} became {NEEDED_OPSET}: int8 needs {_RANGE}")
            return NEEDED_OPSET
        stated = own if given is None else given
        if stated is not None and stated not in OPSETS:
            said = f"opset {stated}: static int8 needs {_RANGE}"
            if self._wanted.mode == "static":
                raise UsageError(f"{said}; --opset {NEEDED_OPSET} gives it that")
            self.remarks.notes.append(said)
        return given

    def run(self, candidate: Candidate, original_bytes: int) -> Int8Record:
        """Make the candidate, which is the lossless model, the int8 one, if that is to be kept.

        Raises UsageError for data, a metric or decisions that do not fit, RuntimeFailure where
        onnxruntime fails.
        """
        if not candidate.files:
            candidate.write(self._tell)
        mark = fingerprint(candidate.model)
        work = candidate.staged.parent / "int8"  # it goes with its folder, whatever happens
        lossless, files = _moved(candidate, work / "lossless")
        sizes = Sizes(original_bytes, file_info(lossless, files).bytes)
        clock = _Clock(self._tell)
        if self._decisions is not None:
            record = self._replayed(self._decisions, candidate, lossless, mark, sizes)
        else:
            record = self._searched(candidate, lossless, mark, sizes, work, clock)
        path = self._wanted.replay or (self._wanted.decisions if record.kept else None)
        more: dict[str, Any] = {
            "notes": self.remarks.notes,
            "seconds": clock.stop(),
            "decisions": None if path is None else str(path),
        }
        if record.kept:
            more["bytes"] = file_info(candidate.staged, candidate.files).bytes
        return record.model_copy(update=more)

    def _searched(
        self,
        candidate: Candidate,
        lossless: Path,
        mark: str,
        sizes: Sizes,
        work: Path,
        clock: _Clock,
    ) -> Int8Record:
        folder = work / "candidates"
        folder.mkdir()
        original = self._original(work)
        request = self._request
        outcome = Compression(original, lossless, request, folder, clock).run()
        if request.data is None and request.mode == "auto":
            self.remarks.notes.append("without --data nothing was calibrated: no static int8")
        trial = self._kept(outcome)
        if trial is not None:
            recipe = rounded(trial.recipe)
            candidate.model = recipe.apply(lossless)
            candidate.write(clock)
            self._record(outcome, dataclasses.replace(trial, recipe=recipe), mark)
        return account(outcome, request, trial, sizes)

    def _kept(self, outcome: Outcome) -> Trial[Recipe] | None:
        """What is kept. With `force` the fastest good one, or, where none is, the least bad."""
        if outcome.kept is not None:
            if outcome.reason:
                self.remarks.warnings.append(f"forced: {outcome.reason}")
            return outcome.kept
        running = [trial for trial in outcome.trials if isinstance(trial.verdict, Judged)]
        if not (self._request.force and running):
            return None
        self.remarks.warnings.append(f"forced: {outcome.reason}")
        return min(running, key=lambda trial: trial.verdict.drop)

    def _record(self, outcome: Outcome, trial: Trial[Recipe], mark: str) -> None:
        """Stage the decisions file."""
        if self._place is None:
            return
        request = self._request
        options: dict[str, Setting] = {
            **self._settings,
            "int8": request.mode,
            "max_drop": request.budget.max_drop,
            "metric": request.budget.metric,
            "min_sqnr": request.budget.min_sqnr,
            "data": request.data,
            "seed": request.seed,
            "threads": request.threads,
            "force": request.force,
        }
        decisions = decisions_of(
            outcome, trial, source_sha256=self._sha256, fingerprint=mark, options=options
        )
        with output_errors(self._place.path):
            self._place.staged.write_text(decisions.to_json(), encoding="utf-8")

    def _replayed(
        self,
        decisions: Decisions,
        candidate: Candidate,
        lossless: Path,
        mark: str,
        sizes: Sizes,
    ) -> Int8Record:
        assert self._wanted.replay is not None
        path = self._wanted.replay
        self._tell("replaying", None)
        check_lossless(decisions, mark, path)
        warnings, notes = replay_notes(decisions, path)
        self.remarks.warnings += warnings
        self.remarks.notes += notes
        candidate.model = replayed(self._recipe, lossless, path)
        candidate.write(self._tell)
        try:
            Session(candidate.staged, custom_ops=self._request.custom_ops).close()
        except RuntimeFailure as failure:
            raise UsageError(f"decisions {path}: cannot be replayed: {failure}") from failure
        return replayed_account(decisions, Model.load(lossless), sizes)

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


def refusal(record: Int8Record) -> str:
    """Why nothing is written, and what can be done about it, in one line."""
    hint = ""
    if record.candidate:
        hint = "; --force writes the fastest good one all the same"
    elif record.candidates:
        hint = "; --max-drop lets more be lost, --force writes the best of them all the same"
    return f"nothing written: {record.reason}{hint}"


class _Clock:
    """Passes on what is going on, and adds up the seconds of each stage."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell
        self._seconds: dict[str, float] = {}
        self._stage = ""
        self._since = time.perf_counter()

    def __call__(self, what: str, share: float | None) -> None:
        stage = "trying" if what.startswith("trying ") else what.partition(",")[0]
        if stage != self._stage:
            self._add()
            self._stage = stage
        self._tell(f"int8: {what}", share)

    def stop(self) -> dict[str, float]:
        """Seconds by stage."""
        self._add()
        return self._seconds

    def _add(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


def _moved(candidate: Candidate, folder: Path) -> tuple[Path, list[Path]]:
    """The model as it was written, out of the way of the next one; all of its files."""
    folder.mkdir(parents=True)
    files = [file.replace(folder / file.name) for file in candidate.files]
    return folder / candidate.staged.name, files


def _sha256(source: Path | onnx.ModelProto) -> str:
    if isinstance(source, Path):
        return sha256([source, *Model.load(source).store.files()])
    return hashlib.sha256(source.SerializeToString(deterministic=True)).hexdigest()
