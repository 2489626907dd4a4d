"""The one hierarchy of errors, and the exit code of the command for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from graphopt.report import Report


class GraphoptError(Exception):
    """Base of everything graphopt raises on purpose; `str(error)` is one line for the user."""

    exit_code: ClassVar[int] = 1


class UsageError(GraphoptError):
    """A mistake that the user can correct: a missing file, wrong feeds, unknown pass (exit 2)."""

    exit_code: ClassVar[int] = 2


class ModelError(UsageError):
    """The input is not an ONNX model that can be read: not ONNX, truncated, cyclic (exit 2)."""


class DataError(UsageError):
    """Feeds do not fit the model: wrong name, shape, dtype or file format (exit 2)."""


class OutputError(UsageError):
    """The output cannot be written: unwritable folder, full disk (exit 2)."""


class RefusedError(GraphoptError):
    """The result was not written; `report` (a graphopt.report.Report) says what was found."""

    report: Report | None = None


class RuntimeFailure(GraphoptError):
    """onnxruntime could not load or run a model."""


class ValidationError(RefusedError):
    """The candidate differs from the original by more than the original's own noise (exit 1)."""


class UnprovenError(RefusedError):
    """Nothing shows that the candidate equals the original: no feed is informative (exit 1)."""
