"""`graphopt.optimize`: the whole job as one function."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import onnx

from graphopt import exporter
from graphopt import report as records
from graphopt.errors import OutputError, RefusedError, UnprovenError, UsageError, ValidationError
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.manager import Pass, PassRun, run_pipeline
from graphopt.output import ExternalPolicy, Target, output_errors
from graphopt.passes.pipelines import around_sparse, fixed_shapes, pipeline, requested
from graphopt.prover import Candidate, Progress, Prover, staging
from graphopt.report import Report, ValidationRecord

if TYPE_CHECKING:
    from graphopt.blame import Fault
    from graphopt.compress import Mode
    from graphopt.lossy import Kept, Lossy
    from graphopt.wanted import Wanted

MAX_DROP: Final = 0.01  # of a score or of agreement, unless more is allowed


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
    shapes: Mapping[str, Sequence[int]] | None = None,
    opset: int | None = None,
    validate: bool = True,
    unproven: bool = False,
    data: str | None = None,
    custom_ops: Sequence[str | Path] = (),
    keep_overridable: bool = False,
    external: ExternalPolicy = "auto",
    seed: int = 0,
    sparsity: float | str | None = None,
    nm: str | None = None,
    block: str | None = None,
    threshold: float | None = None,
    channels: float | str | None = None,
    importance: str | None = None,
    recover: str | None = None,
    low_rank: float | str | None = None,
    low_rank_method: str | None = None,
    codebook: str | int | None = None,
    int8: Mode | None = None,
    max_drop: float = MAX_DROP,
    metric: str | None = None,
    min_sqnr: float | None = None,
    decisions: str | Path | None = None,
    replay: str | Path | None = None,
    force: bool = False,
    threads: int = 0,
    verify_each: bool | None = None,
    progress: Progress | None = None,
) -> Result:
    """Optimise a model and prove that it still computes the same.

    `source` is a path or a ModelProto, which is left untouched. With `output` the proved model is
    written there; `Result.save` and `Result.proto` give it as well. `level` and `passes` choose
    what runs, `data` feeds the proof (see `graphopt.data`), `custom_ops` are libraries for
    operators of foreign domains. `verify_each` verifies the graph after every pass.

    `shapes` fixes sizes of inputs by name, -1 leaving one as it is; the proof then holds for these
    shapes. `opset` is the version of the standard operators that the result is to use.

    Where the result differs, the change at fault is found, denied and reported as a warning, with
    a reproducer beside the output (in a temporary folder without one), and the rest is proved.

    What follows goes on from the proved model and loses something: at most `max_drop` of a `metric`
    (`file.py:function`), or of the agreement with the original; `min_sqnr` (dB) takes the place of
    agreement. `data` calibrates it, models run with `threads` (0: all cores).

    `channels` takes out channels, attention heads and hidden units that are worth this share of the
    MACs ("auto": what the budget allows); it is kept where it is faster than that model on this
    machine. `sparsity` sets this share of the weights to zero, `nm` ("2:4") so many of each group,
    `threshold` those below it, `block` ("4x1") whole blocks; it is kept where the file is smaller,
    and makes nothing faster. `importance` says by what weights ("obs", "wanda", "lamp",
    "magnitude") or channels ("obs", "activation", "l1", "l2", "apoz") are chosen, `recover` how the
    rest is fitted again ("lsq", "moments", "none").

    `low_rank` goes before these: it splits layers into products of smaller ones until this share of
    the MACs is left ("auto": what the budget allows), only those that are measured to be faster for
    it; it is kept where the model is faster. `low_rank_method` says into what: "svd", "channel",
    "spatial", "tucker", "cp", or the best of the first four ("auto").

    `int8` follows, for the target "ort-cpu": it is kept where it is faster. `codebook` comes last:
    weights as tables of 256 numbers (8) or 16 (4), or what the budget allows ("auto"), and indices;
    it is kept where the file is smaller, and makes nothing faster.

    `decisions` is a file to record all this in, `replay` one to repeat it from, to the same bytes.
    `force` keeps the fastest good candidate though it does not pay, or the least bad one where none
    is good.

    Raises UsageError (bad file, level, pass, data, shape, opset, metric, decisions),
    ValidationError where the result differs all the same, UnprovenError where nothing shows that
    it does not, unless `unproven` is set, and RefusedError where nothing lossy is worth keeping.
    The three last carry the report as `error.report`.
    """
    if target not in ("portable", "ort-cpu"):
        raise UsageError(f"target {target!r}: there are 'portable' and 'ort-cpu'")
    source = Path(source) if isinstance(source, str) else source
    tell: Progress = progress or (lambda what, share: None)
    lossy: dict[str, Any] = {"sparsity": sparsity, "nm": nm, "block": block, "threshold": threshold}
    lossy |= {"channels": channels, "importance": importance, "recover": recover}
    lossy |= {"low_rank": low_rank, "low_rank_method": low_rank_method, "codebook": codebook}
    lossy |= {"int8": int8, "metric": metric, "min_sqnr": min_sqnr, "replay": replay}
    lossy |= {"decisions": decisions, "force": force or None, "threads": threads or None}
    wanted = _wanted(lossy, max_drop, target, data, (source, output))
    asked = pipeline(level, passes, keep_overridable=keep_overridable, shapes=shapes, opset=opset)
    settings = {"level": level, "passes": passes, "opset": opset}
    settings |= {"keep_overridable": keep_overridable, "shapes": _text(shapes)}
    held = fixed_shapes(asked)
    libraries = [Path(library) for library in custom_ops]
    step = None
    if wanted is not None:
        from graphopt.lossy import Lossy

        step = Lossy(wanted, source, held, data, libraries, seed, settings, tell)
        opset = step.opset(opset)
    steps = pipeline(level, passes, keep_overridable=keep_overridable, shapes=shapes, opset=opset)
    job = _Job(source, level, steps, tell, verify_each, is_level=passes is None and level > 0)
    prover = None
    if validate:
        _check_opset(opset)
        prover = Prover(source, job.load, job.requested, held, data, libraries, seed, tell)
    with (
        staging(Path(output) if output is not None else None) as (place, staged),
        step or contextlib.nullcontext(),
    ):
        return job.run(place, staged, external, prover, step, accept_unproven=unproven)


def _wanted(
    given: Mapping[str, Any],
    max_drop: float,
    target: str,
    data: str | None,
    models: Sequence[str | Path | onnx.ModelProto | None],
) -> Wanted | None:
    """What is asked of lossy steps, None where that is nothing. Raises UsageError."""
    if all(option is None for option in given.values()) and max_drop == MAX_DROP:
        return None
    from graphopt.judging import Budget
    from graphopt.wanted import LowRankWanted, PruneWanted, Wanted

    paths = {"decisions": given["decisions"], "replay": given["replay"]}
    pruning = {name: given[name] for name in PruneWanted.__dataclass_fields__}
    wanted = Wanted(
        given["int8"],
        Budget(max_drop, given["metric"], given["min_sqnr"]),
        force=bool(given["force"]),
        threads=given["threads"] or 0,
        prune=PruneWanted(**pruning),
        low_rank=LowRankWanted(share=given["low_rank"], method=given["low_rank_method"]),
        codebook=given["codebook"],
        **{name: None if path is None else Path(path) for name, path in paths.items()},
    )
    wanted.check(target, data, [Path(m) for m in models if isinstance(m, str | Path)])
    return wanted


def _text(shapes: Mapping[str, Sequence[int]] | None) -> str | None:
    if not shapes:
        return None
    return ", ".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())


def _check_opset(opset: int | None) -> None:
    """Refuse at once what could never be proved."""
    from graphopt.runtime import limits

    if opset is not None and limits().opset < opset <= onnx.defs.onnx_opset_version():
        raise UsageError(
            f"opset {opset}: onnxruntime runs models up to opset {limits().opset}, so "
            "nothing could be proved; without validation it can be written"
        )


@dataclass
class _Job:
    """One model on its way through the passes; `requested` are those that must not fail."""

    source: Path | onnx.ModelProto
    level: int
    steps: Sequence[Pass]
    tell: Progress
    verify_each: bool | None
    is_level: bool  # that runs, not passes that the user named
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.requested = requested(self.steps)
        self.others = self.steps[len(self.requested) :]

    def load(self) -> Model:
        """The source, with what was requested of it."""
        model = Model.load(self.source)
        self._prepare(model)
        return model

    def _prepare(self, model: Model) -> list[PassRun]:
        """Do what the user asked for by name. Raises UsageError where that fails."""
        runs = self._run(model, self.requested) if self.requested else []
        for run in runs:
            if run.error:
                raise UsageError(f"{run.text} failed: {run.error}")
        return runs

    def _run(self, model: Model, steps: Sequence[Pass]) -> list[PassRun]:
        tell = self.tell
        return run_pipeline(
            model, steps, lambda name: tell(name, None), verify_each=self.verify_each
        )

    def run(
        self,
        place: Target | None,
        staged: Path,
        external: ExternalPolicy,
        prover: Prover | None,
        step: Lossy | None = None,
        *,
        accept_unproven: bool,
    ) -> Result:
        """Rewrite the model, prove it, and put it in its place. Raises RefusedError."""
        self.tell("reading", None)
        model = Model.load(self.source)
        before = records.stats(model), model.opsets
        if place is not None:
            _spare_weights(model, self.source, place.path)
        if self.is_level:
            self.others = around_sparse(model, self.others, dense=step is not None)
        read = _source_info(self.source, model)  # now: it may be about to be replaced
        prepared = self._prepare(model)
        candidate = Candidate(model, self._run(model, self.others), staged, place, external)
        proof = ValidationRecord(verdict="skipped", reason="validation was switched off")
        faults: list[Fault] = []
        if prover is not None:
            proof, faults = prover.prove(candidate, self.others)
        elif place is not None:
            candidate.write(self.tell)
        accepted = ("proved", "skipped", *(["unproven"] if accept_unproven else []))
        lossy: Kept | None = None
        if step is not None and proof.verdict in accepted:
            lossy = step.run(candidate, read.bytes)
        is_kept = proof.verdict in accepted and (lossy is None or lossy.any)
        written = None
        if place is not None and is_kept:
            written = records.file_info(place.path, place.commit(candidate.files))
        if step is not None and is_kept:
            step.commit()
        candidate.runs[:0] = prepared
        report = self._report(candidate, read, written, before, proof, faults)
        if step is not None:
            report = _with_lossy(report, step, lossy, is_kept=is_kept)
        if not is_kept:
            raise _refusal(report, lossy)
        return Result(candidate.model, report)

    def _report(
        self,
        candidate: Candidate,
        read: records.FileInfo,
        written: records.FileInfo | None,
        before: tuple[records.GraphStats, dict[str, int]],
        proof: ValidationRecord,
        faults: Sequence[Fault],
    ) -> Report:
        return Report(
            graphopt=records.version(),
            host=records.host(),
            source=read,
            target=written,
            level=self.level,
            pipeline=", ".join(run.text for run in candidate.runs),
            opsets=candidate.model.opsets,
            opsets_before=before[1],
            before=before[0],
            after=records.stats(candidate.model),
            passes=[records.pass_record(run) for run in candidate.runs],
            validation=proof,
            blame=[records.blame_record(fault) for fault in faults],
            fingerprint=fingerprint(candidate.model),
            warnings=_warnings(candidate.runs, faults),
            seconds=time.perf_counter() - self.started,
        )


def _warnings(runs: Sequence[PassRun], faults: Sequence[Fault]) -> list[str]:
    failed = [f"pass {r.text} failed and was undone: {r.error}" for r in runs if r.error]
    return [*failed, *(fault.message for fault in faults)]


def _with_lossy(report: Report, step: Lossy, lossy: Kept | None, *, is_kept: bool) -> Report:
    """The report with what lossy steps came to; of several one may come to nothing."""
    warnings = [*report.warnings, *step.remarks.warnings]
    more: dict[str, Any] = {"warnings": warnings}
    if lossy is not None:
        more |= lossy.records
        warnings += lossy.refusals if is_kept else []
    return report.model_copy(update=more)


def _spare_weights(model: Model, source: Path | onnx.ModelProto, target: Path) -> None:
    """Refuse a target whose file of weights would replace the one that another model reads."""
    beside = target.with_name(target.name + ".data")
    in_place = isinstance(source, Path) and source.resolve() == target.resolve()
    if not in_place and any(file.resolve() == beside.resolve() for file in model.store.files()):
        raise OutputError(
            f"{target}: cannot be written: its weights would replace {beside.name}, which "
            f"{model.label} reads; choose another name"
        )


def _source_info(source: Path | onnx.ModelProto, model: Model) -> records.FileInfo:
    if isinstance(source, Path):
        return records.file_info(source, [source, *model.store.files()])
    return records.FileInfo(path="", bytes=source.ByteSize())


def _refusal(report: Report, lossy: Kept | None) -> RefusedError:
    if lossy is not None:
        refused = RefusedError("nothing written: " + "; ".join(lossy.refusals))
        refused.report = report
        return refused
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
