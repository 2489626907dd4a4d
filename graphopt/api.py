"""`graphopt.optimize`: the whole job as one function."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import onnx

from graphopt import exporter
from graphopt import report as records
from graphopt.errors import OutputError, RefusedError, UnprovenError, UsageError, ValidationError
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.manager import Pass, PassRun, run_pipeline
from graphopt.output import ExternalPolicy, Target, output_errors
from graphopt.passes.pipelines import pipeline
from graphopt.report import Report, ValidationRecord

if TYPE_CHECKING:
    from graphopt.blame import Blame, Fault

_MOST_RESCUES: Final = 4  # a further fault may show only on feeds that the last did not fail on

Progress = Callable[[str, float | None], None]
"""Told what is going on and the share of it that is done (None: unknown)."""


@dataclass(frozen=True)
class Result:
    """An optimised model with the account of how it came about."""

    model: Model
    report: Report

    def proto(self) -> onnx.ModelProto:
        """The model in memory. Raises ModelError over 2 GB, where only `save` works."""
        return exporter.to_proto(self.model)

    def save(self, path: str | Path, *, external: ExternalPolicy = "auto") -> list[Path]:
        """Write the model; returns the files. The path has its new content whole or not at all."""
        with Target(Path(path)) as target, output_errors(Path(path)):
            files = exporter.save(self.model, target.staged, external)
            return target.commit(files)


def optimize(
    source: str | Path | onnx.ModelProto,
    output: str | Path | None = None,
    *,
    level: int = 2,
    passes: str | None = None,
    target: Literal["portable", "ort-cpu"] = "portable",
    validate: bool = True,
    unproven: bool = False,
    data: str | None = None,
    custom_ops: Sequence[str | Path] = (),
    keep_overridable: bool = False,
    external: ExternalPolicy = "auto",
    seed: int = 0,
    verify_each: bool | None = None,
    progress: Progress | None = None,
) -> Result:
    """Optimise a model and prove that it still computes the same.

    `source` is a path or a ModelProto, which is left untouched. With `output` the proved model is
    written there; `Result.save` and `Result.proto` give it as well. `level` and `passes` choose
    what runs, `data` feeds the proof (see `graphopt.data`), `custom_ops` are libraries for
    operators of foreign domains. `verify_each` verifies the graph after every pass.

    Where the result differs, the change at fault is found, denied and reported as a warning, with
    a reproducer beside the output (in a temporary folder without one), and the rest is proved.

    Raises UsageError (bad file, level, pass, data), ValidationError where the result differs all
    the same, and UnprovenError where nothing shows that it does not, unless `unproven` is set. The
    two last carry the report as `error.report`.
    """
    started = time.perf_counter()
    if target not in ("portable", "ort-cpu"):
        raise UsageError(f"target {target!r}: there are 'portable' and 'ort-cpu'")
    steps = pipeline(level, passes, keep_overridable=keep_overridable)
    path = Path(source) if isinstance(source, str) else source
    tell: Progress = progress or (lambda what, share: None)
    with _staging(Path(output) if output is not None else None) as (place, staged):
        tell("reading", None)
        model = Model.load(path)
        before = records.stats(model)
        if place is not None:
            _spare_weights(model, path, place.path)
        read = _source_info(path, model)  # now: it may be about to be replaced
        runs = run_pipeline(model, steps, lambda name: tell(name, None), verify_each=verify_each)
        candidate = _Candidate(model, runs, staged, place.path if place else staged, external)
        proof = ValidationRecord(verdict="skipped", reason="validation was switched off")
        faults: list[Fault] = []
        if validate:
            prover = _Prover(path, data, custom_ops, seed, tell)
            proof, faults = prover.prove(candidate, steps, place)
        elif place is not None:
            candidate.write(tell)
        accepted = proof.verdict in ("proved", "skipped") or (
            proof.verdict == "unproven" and unproven
        )
        written = None
        if place is not None and accepted:
            written = records.file_info(place.path, place.commit(candidate.files))
        report = Report(
            graphopt=records.version(),
            host=records.host(),
            source=read,
            target=written,
            level=level,
            pipeline=", ".join(run.text for run in candidate.runs),
            opsets=candidate.model.opsets,
            before=before,
            after=records.stats(candidate.model),
            passes=[records.pass_record(run) for run in candidate.runs],
            validation=proof,
            blame=[records.blame_record(fault) for fault in faults],
            fingerprint=fingerprint(candidate.model),
            warnings=_warnings(candidate.runs, faults),
            seconds=time.perf_counter() - started,
        )
    if not accepted:
        raise _refusal(report)
    return Result(candidate.model, report)


def _warnings(runs: Sequence[PassRun], faults: Sequence[Fault]) -> list[str]:
    failed = [f"pass {r.text} failed and was undone: {r.error}" for r in runs if r.error]
    return [*failed, *(fault.message for fault in faults)]


@contextlib.contextmanager
def _staging(output: Path | None) -> Iterator[tuple[Target | None, Path]]:
    """Where the candidate lies while it is examined: beside its target, else in a temp folder."""
    if output is not None:
        with Target(output) as target:
            yield target, target.staged
    else:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            yield None, Path(folder) / "candidate.onnx"


def _spare_weights(model: Model, source: Path | onnx.ModelProto, target: Path) -> None:
    """Refuse a target whose file of weights would replace the one that another model reads."""
    beside = target.with_name(target.name + ".data")
    in_place = isinstance(source, Path) and source.resolve() == target.resolve()
    if not in_place and any(file.resolve() == beside.resolve() for file in model.store.files()):
        raise OutputError(
            f"{target}: cannot be written: its weights would replace {beside.name}, which "
            f"{model.label} reads; choose another name"
        )


@dataclass
class _Candidate:
    """What may become the result, as it lies in memory and on disk."""

    model: Model
    runs: list[PassRun]
    staged: Path
    shown: Path  # what messages call it: the target, not where it waits
    external: ExternalPolicy
    files: list[Path] = field(default_factory=list)

    def write(self, tell: Progress) -> None:
        tell("writing", None)
        with output_errors(self.shown):
            self.files = exporter.save(self.model, self.staged, self.external)


@dataclass(frozen=True)
class _Prover:
    """Compares candidates with the source, and takes out of them what breaks them."""

    source: Path | onnx.ModelProto
    data: str | None
    custom_ops: Sequence[str | Path]
    seed: int
    tell: Progress

    def prove(
        self, candidate: _Candidate, steps: Sequence[Pass], place: Target | None
    ) -> tuple[ValidationRecord, list[Fault]]:
        """The verdict on the candidate, which has lost the faults that were found."""
        with contextlib.ExitStack() as stack:
            original = self._file(stack)
            candidate.write(self.tell)
            proof = self._compare(original, candidate.staged)
            if proof.verdict != "failed" or not any(run.changes for run in candidate.runs):
                return proof, []
            blame = self._blame(original, steps, place)
            for _ in range(_MOST_RESCUES):
                rescued = blame.rescue(candidate.model, candidate.runs)
                if rescued is None:
                    break
                candidate.model, candidate.runs = rescued
                candidate.write(self.tell)
                proof = self._compare(original, candidate.staged)
                if proof.verdict != "failed":
                    break
            return proof, blame.faults

    def _file(self, stack: contextlib.ExitStack) -> Path:
        if isinstance(self.source, Path):
            return self.source
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-"))
        original = Path(folder) / "original.onnx"
        exporter.save(Model.load(self.source), original)
        return original

    def _compare(self, original: Path, candidate: Path) -> ValidationRecord:
        from graphopt.validate import validate_files

        return validate_files(
            original,
            candidate,
            data=self.data,
            custom_ops=[Path(library) for library in self.custom_ops],
            seed=self.seed,
            progress=self.tell,
        )

    def _blame(self, original: Path, steps: Sequence[Pass], place: Target | None) -> Blame:
        from graphopt.blame import Blame

        return Blame(
            original,
            lambda: Model.load(self.source),
            steps,
            lambda: _blame_folder(place),
            data=self.data,
            custom_ops=[Path(library) for library in self.custom_ops],
            seed=self.seed,
            tell=lambda what: self.tell(what, None),
        )


def _blame_folder(place: Target | None) -> Path:
    """Where reproducers go: beside the output, else into a temporary folder that stays."""
    if place is None:
        return Path(tempfile.mkdtemp(prefix="graphopt-blame-"))
    return place.path.with_name(f"{place.path.name}.blame")


def _source_info(source: Path | onnx.ModelProto, model: Model) -> records.FileInfo:
    if isinstance(source, Path):
        return records.file_info(source, [source, *model.store.files()])
    return records.FileInfo(path="", bytes=source.ByteSize())


def _refusal(report: Report) -> RefusedError:
    proof = report.validation
    kind: type[RefusedError] = ValidationError if proof.verdict == "failed" else UnprovenError
    hint = "" if proof.verdict == "failed" else "; --unproven writes it all the same"
    if report.blame:
        count = len(report.blame)
        found = "1 fault was denied" if count == 1 else f"{count} faults were denied"
        hint += f"; {found}, which was not enough: {report.blame[0].message}"
    error = kind(f"nothing written: {proof.verdict}: {proof.reason}{hint}")
    error.report = report
    return error
