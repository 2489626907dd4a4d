"""Lossy steps of `optimize`: what follows once the best lossless model is proved and on disk.

Pruning first, then int8 on what it left; both against one budget and the same original, and both
in one decisions file, which repeats them elsewhere to the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import onnx

from graphopt import exporter
from graphopt.account import Remarks, Sizes
from graphopt.decisions import Decisions, load_decisions, sha256
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.fingerprint import fingerprint
from graphopt.int8 import Int8
from graphopt.int8_report import Int8Record
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.output import Target, output_errors
from graphopt.passes.canonicalize.fix_shapes import FixShapes
from graphopt.passes.prune.sparse import Sparsify
from graphopt.prover import Candidate, Progress
from graphopt.prune import Prune
from graphopt.prune_report import PruneRecord
from graphopt.recorded import Setting, blank_decisions, check_lossless, replay_notes
from graphopt.report import file_info
from graphopt.runtime import Session
from graphopt.wanted import Wanted

WEIGHTS: Final = ".npz"  # behind the name of the decisions: weights that pruning fitted


@dataclass(frozen=True)
class Kept:
    """What became of the steps that were asked for; None for those that were not."""

    prune: PruneRecord | None
    int8: Int8Record | None

    @property
    def any(self) -> bool:
        """True where there is a lossy model to be written."""
        return any(each is not None and each.kept for each in (self.prune, self.int8))

    @property
    def refusals(self) -> list[str]:
        """Why steps that were asked for came to nothing, and what can be done, one line each."""
        steps = (("prune", self.prune), ("int8", self.int8))
        asked = [(name, each) for name, each in steps if each is not None]
        lines = [(name, refusal(each)) for name, each in asked if not each.kept]
        return [f"{name}: {line}" if len(asked) > 1 else line for name, line in lines]


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
            # Int8 too: it is judged on the feeds that no layer was fitted on.
            "holds_out": wanted.prune.is_wanted and wanted.prune.recovery(data) != "none",
        }
        self._data, self._seed, self._custom_ops = data, seed, tuple(custom_ops)
        self._prune = Prune(wanted.prune, common, self.remarks)
        self._int8 = Int8(wanted.mode, common, self.remarks)
        if self._replay is not None and wanted.replay is not None:
            self._prune.read(self._replay, wanted.replay)
            self._int8.read(self._replay, wanted.replay)

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
        original = self._original(work)
        prune, base = None, lossless
        if self._prune.is_wanted:
            clock = _Clock(self._tell, "prune")
            folder = _made(work / "pruned")
            prune = self._prune.search(original, lossless, folder, sizes, clock)
            base = self._prune.base(lossless, folder)
            prune = prune.model_copy(update={"seconds": clock.stop()})
        int8 = None
        if self._int8.is_wanted:
            clock = _Clock(self._tell, "int8")
            folder = _made(work / "candidates")
            int8 = self._int8.search(original, base, folder, sizes, clock)
            int8 = int8.model_copy(update={"seconds": clock.stop()})
        kept = Kept(prune, int8)
        if kept.any:
            self._apply(candidate, base)
            self._record(mark)
            kept = self._told(kept, candidate, self._wanted.decisions)
        return kept

    def _apply(self, candidate: Candidate, base: Path) -> None:
        """Make the candidate what was decided."""
        candidate.model = self._int8.applied(base)
        if self._prune.has_zeros:
            run_pipeline(candidate.model, [Sparsify()])
        candidate.write(self._tell)

    def _told(self, kept: Kept, candidate: Candidate, decisions: Path | None) -> Kept:
        """The records with what is known only once the model is written."""
        size = file_info(candidate.staged, candidate.files).bytes
        more = {"bytes": size, "decisions": None if decisions is None else str(decisions)}
        prune, int8 = kept.prune, kept.int8
        if prune is not None and prune.kept:
            prune = prune.model_copy(update=more)
        if int8 is not None and int8.kept:
            int8 = int8.model_copy(update={**more, "notes": self.remarks.notes})
        return Kept(prune, int8)

    def _replayed(self, candidate: Candidate, lossless: Path, mark: str, sizes: Sizes) -> Kept:
        decisions, path = self._replay, self._wanted.replay
        assert decisions is not None
        assert path is not None
        self._tell("replaying", None)
        check_lossless(decisions, mark, path)
        warnings, notes = replay_notes(decisions, path)
        self.remarks.warnings += warnings
        self.remarks.notes += notes
        base = self._prune.base(lossless, _made(lossless.parent.parent / "pruned"))
        self._apply(candidate, base)
        try:
            Session(candidate.staged, custom_ops=self._custom_ops).close()
        except RuntimeFailure as failure:
            raise UsageError(f"decisions {path}: cannot be replayed: {failure}") from failure
        prune, int8 = self._prune.replayed(decisions, sizes), None
        if self._int8.recipe is not None:
            int8 = self._int8.replayed(decisions, base, sizes)
        return self._told(Kept(prune, int8), candidate, path)

    def _record(self, mark: str) -> None:
        """Stage the decisions file, and the weights beside it."""
        if self._place is None:
            return
        budget, wanted = self._wanted.budget, self._wanted
        options: dict[str, Setting] = {
            **self._settings,
            "int8": wanted.mode,
            **self._prune.options,
            "max_drop": budget.max_drop,
            "metric": budget.metric,
            "min_sqnr": budget.min_sqnr,
            "data": self._data,
            "seed": self._seed,
            "threads": wanted.threads,
            "force": wanted.force,
        }
        decisions = blank_decisions(self._sha256, mark, options)
        with output_errors(self._place.path):
            beside = self._place.staged.with_name(self._place.staged.name + WEIGHTS)
            decisions, arrays = self._prune.decided(decisions, beside)
            decisions = self._int8.decided(decisions)
            self._place.staged.write_text(decisions.to_json(), encoding="utf-8")
        self._staged = [*arrays, self._place.staged]

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


def refusal(record: PruneRecord | Int8Record) -> str:
    """Why nothing is written, and what can be done about it, in one line."""
    hint = ""
    if record.candidate and not _is_bad(record):
        hint = "; --force writes the fastest good one all the same"
    elif record.candidates:
        hint = "; --max-drop lets more be lost, --force writes the best of them all the same"
    return f"{record.reason}{hint}"


def _is_bad(record: PruneRecord | Int8Record) -> bool:
    """True where even the best candidate loses too much."""
    return not any(each.good for each in record.candidates)


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
