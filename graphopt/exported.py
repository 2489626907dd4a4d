"""A file that an exporter has just written, optimised in place, and the policy where that fails."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, get_args

from graphopt.api import Result, optimize
from graphopt.errors import OutputError, RefusedError, UsageError
from graphopt.ir import Model
from graphopt.output import ExternalPolicy
from graphopt.passes.pipelines import pipeline
from graphopt.prover import Progress
from graphopt.report import Report

if TYPE_CHECKING:
    from graphopt.compress import Mode

OnError = Literal["keep", "raise"]


class Options(TypedDict, total=False):
    """What is passed on to `graphopt.optimize`, which explains it."""

    level: int
    passes: str | None
    target: Literal["portable", "ort-cpu"]
    shapes: Mapping[str, Sequence[int]] | None
    opset: int | None
    validate: bool
    unproven: bool
    data: str | None
    custom_ops: Sequence[str | Path]
    keep_overridable: bool
    external: ExternalPolicy
    seed: int
    sparsity: float | str | None
    nm: str | None
    block: str | None
    threshold: float | None
    channels: float | str | None
    importance: str | None
    recover: str | None
    low_rank: float | str | None
    low_rank_method: str | None
    codebook: str | int | None
    int8: Mode | None
    max_drop: float
    metric: str | None
    min_sqnr: float | None
    decisions: str | Path | None
    replay: str | Path | None
    force: bool
    threads: int
    verify_each: bool | None
    progress: Progress | None


class ExportWarning(UserWarning):
    """An export was kept as the exporter made it; the message says why, in one line."""


@dataclass(frozen=True)
class Outcome:
    """What became of one export: optimised, or left as it was for the reason in `error`."""

    name: str  # the path, or what stands for it where there is none
    # None where the work ended before there was anything to report; too long to be shown
    report: Report | None = field(repr=False)
    error: Exception | None = None

    @property
    def optimised(self) -> bool:
        """Whether the export was replaced."""
        return self.error is None


def optimize_export(
    path: str | Path, *, on_error: OnError = "keep", **options: Unpack[Options]
) -> Outcome:
    """Optimise a file that any exporter has just written, in place.

    Where the result is refused or cannot be made, the file stays as it is: "keep" then issues an
    ExportWarning, "raise" raises the error. Weights beside the file stay beside it, and `path`
    with ".data" appended is removed where the result has no more use for it. The options are those
    of `graphopt.optimize`.

    Raises UsageError for an unknown level, pass or policy, TypeError for an unknown option; with
    on_error="raise" whatever `graphopt.optimize` raises.
    """
    check("optimize_export", on_error, options)
    place = Path(path)
    return attempt(str(place), lambda: replace(place, options, owned=False).report, on_error)


def check(function: str, on_error: str, options: Options) -> None:
    """Refuse at once what would otherwise be refused, or only warned about, at every export."""
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    if on_error not in get_args(OnError):
        raise UsageError(f"on_error {on_error!r}: there are 'keep' and 'raise'")
    pipeline(options.get("level", 2), options.get("passes"))


def attempt(
    name: str,
    work: Callable[[], Report],
    on_error: OnError,
    note: Callable[[Outcome], object] = lambda outcome: None,
) -> Outcome:
    """Do the work and `note` the outcome, before an error is raised too.

    Errors of every kind are subject to the policy: with "keep", a script that exports must not
    fail because of what was to come after the export.
    """
    try:
        outcome = Outcome(name, work())
    except Exception as error:
        report = error.report if isinstance(error, RefusedError) else None
        outcome = Outcome(name, report, error)
        note(outcome)
        if on_error == "raise":
            raise
        warn(f"{name} is kept as it was exported: {one_line(error)}")
        return outcome
    note(outcome)
    return outcome


def warn(message: str) -> None:
    """Issue an ExportWarning that points at the line that called graphopt."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("graphopt."):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"graphopt: {message}", ExportWarning, stacklevel=level)


def one_line(error: Exception) -> str:
    """The error as a warning shows it; those that speak to users need no class name."""
    reason = " ".join(str(error).split())
    if isinstance(error, RefusedError | UsageError):
        return reason
    return f"{type(error).__name__}: {reason}"


def replace(path: Path, options: Options, *, owned: bool) -> Result:
    """Optimise a file in place; of the files it read, those now without use are removed.

    `owned` says that all of these came from this export. Else only the one named after the model
    is known to be its own: another model in the folder may share the rest.

    Raises what `graphopt.optimize` does, and OutputError for a link to another folder.
    """
    before = _external_files(path)
    if before:
        _refuse_link(path)
        options = Options(external="always") | options  # folded weights as well: where they were
    result = optimize(path, path, **options)
    beside = path.with_name(path.name + ".data")
    replaced = before if owned else before & {beside}
    for file in replaced - _external_files(path) if replaced else ():
        try:
            file.unlink(missing_ok=True)
        except OSError as error:  # the model is in place and right all the same
            warn(f"{file} is no longer used and cannot be removed: {error.strerror}")
    return result


def _external_files(path: Path) -> set[Path]:
    """The files that the model at `path` reads its external data from."""
    return set(Model.load(path).store.files())


def _refuse_link(path: Path) -> None:
    """Refuse a link into another folder: onnxruntime would not find the weights from here."""
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise OutputError(
            f"{path}: is a symbolic link into another folder, where its external data would be "
            "written; export to the file itself"
        )
