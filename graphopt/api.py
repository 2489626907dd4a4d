"""`graphopt.optimize`: the whole job as one function."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from graphopt import exporter
from graphopt import report as records
from graphopt.errors import RefusedError, UnprovenError, UsageError, ValidationError
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.output import ExternalPolicy, Target, output_errors
from graphopt.passes.pipelines import pipeline
from graphopt.report import Report, ValidationRecord

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
    progress: Progress | None = None,
) -> Result:
    """Optimise a model and prove that it still computes the same.

    `source` is a path or a ModelProto, which is left untouched. With `output` the proved model is
    written there; `Result.save` and `Result.proto` give it as well. `level` and `passes` choose
    what runs, `data` feeds the proof (see `graphopt.data`), `custom_ops` are libraries for
    operators of foreign domains.

    Raises UsageError (bad file, level, pass, data), ValidationError where the result differs, and
    UnprovenError where nothing shows that it does not, unless `unproven` is set. The two last
    carry the report as `error.report`.
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
        read = _source_info(path, model)  # now: it may be about to be replaced
        runs = run_pipeline(model, steps, lambda name: tell(name, None))
        tell("writing", None)
        with output_errors(staged):
            files = exporter.save(model, staged, external) if validate or place else []
        if validate:
            proof = _prove(path, staged, data, custom_ops, seed, tell)
        else:
            proof = ValidationRecord(verdict="skipped", reason="validation was switched off")
        accepted = proof.verdict in ("proved", "skipped") or (
            proof.verdict == "unproven" and unproven
        )
        written = None
        if place is not None and accepted:
            written = records.file_info(place.path, place.commit(files))
        result = Report(
            graphopt=records.version(),
            host=records.host(),
            source=read,
            target=written,
            level=level,
            pipeline=", ".join(run.text for run in runs),
            opsets=model.opsets,
            before=before,
            after=records.stats(model),
            passes=[records.pass_record(run) for run in runs],
            validation=proof,
            warnings=[f"pass {r.text} failed and was undone: {r.error}" for r in runs if r.error],
            seconds=time.perf_counter() - started,
        )
    if not accepted:
        raise _refusal(result)
    return Result(model, result)


@contextlib.contextmanager
def _staging(output: Path | None) -> Iterator[tuple[Target | None, Path]]:
    """Where the candidate lies while it is examined: beside its target, else in a temp folder."""
    if output is not None:
        with Target(output) as target:
            yield target, target.staged
    else:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            yield None, Path(folder) / "candidate.onnx"


def _prove(
    source: Path | onnx.ModelProto,
    candidate: Path,
    data: str | None,
    custom_ops: Sequence[str | Path],
    seed: int,
    tell: Progress,
) -> ValidationRecord:
    from graphopt.validate import validate_files

    libraries = [Path(library) for library in custom_ops]
    if isinstance(source, Path):
        return validate_files(
            source, candidate, data=data, custom_ops=libraries, seed=seed, progress=tell
        )
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        original = Path(folder) / "original.onnx"
        exporter.save(Model.load(source), original)
        return validate_files(
            original, candidate, data=data, custom_ops=libraries, seed=seed, progress=tell
        )


def _source_info(source: Path | onnx.ModelProto, model: Model) -> records.FileInfo:
    if isinstance(source, Path):
        return records.file_info(source, [source, *model.store.files()])
    return records.FileInfo(path="", bytes=source.ByteSize())


def _refusal(report: Report) -> RefusedError:
    proof = report.validation
    kind: type[RefusedError] = ValidationError if proof.verdict == "failed" else UnprovenError
    hint = "" if proof.verdict == "failed" else "; --unproven writes it all the same"
    error = kind(f"nothing written: {proof.verdict}: {proof.reason}{hint}")
    error.report = report
    return error
