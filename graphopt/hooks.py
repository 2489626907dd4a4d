"""Optimised where it is exported: `torch.onnx.export` within a block, or a file just written.

    with graphopt.hooks.torch_export() as hook:
        torch.onnx.export(module, args, "model.onnx")
    hook.reports[0].validation.verdict  # "proved"

torch is imported when a block is entered, and by nothing else here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, Unpack

import onnx

from graphopt.api import Result, optimize
from graphopt.errors import ModelError, UsageError
from graphopt.exported import (
    ExportWarning,
    OnError,
    Options,
    Outcome,
    attempt,
    check,
    one_line,
    optimize_export,
    replace,
    warn,
)
from graphopt.report import Report

__all__ = ["ExportWarning", "Outcome", "TorchExportHook", "optimize_export", "torch_export"]

_Export = Callable[..., Any]


class TorchExportHook:
    """What a block of `torch_export` did; one outcome for each export, in order."""

    def __init__(self, on_error: OnError, options: Options) -> None:
        self.outcomes: list[Outcome] = []
        self._on_error = on_error
        self._options = options

    @property
    def reports(self) -> list[Report]:
        """The reports there are, those of refused results included (see their verdicts)."""
        return [outcome.report for outcome in self.outcomes if outcome.report is not None]

    def _export(self, genuine: _Export, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what the caller asked of the exporter, then optimise what came of it."""
        target = kwargs["f"] if "f" in kwargs else args[2] if len(args) > 2 else None
        options = self._options
        if kwargs.get("keep_initializers_as_inputs"):  # asked for: not to be frozen by default
            options = Options(keep_overridable=True) | options
        if hasattr(target, "write"):
            return self._export_to_stream(genuine, args, kwargs, target, options)
        returned = genuine(*args, **kwargs)
        program = _program(returned)
        if isinstance(target, str | os.PathLike):
            path = Path(target)
            self._attempt(str(path), lambda: self._optimize_file(path, program, options))
        elif program is not None:
            self._attempt("the program", lambda: _optimize_program(program, options))
        return returned

    def _export_to_stream(
        self,
        genuine: _Export,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stream: Any,
        options: Options,
    ) -> Any:
        """The exporter writes to memory: the stream gets one model, and need not be seekable."""
        raw = io.BytesIO()
        if "f" in kwargs:
            returned = genuine(*args, **{**kwargs, "f": raw})
        else:
            returned = genuine(*args[:2], raw, *args[3:], **kwargs)
        content = raw.getvalue()

        def work() -> Report:
            nonlocal content
            result = optimize(onnx.load_model_from_string(content), **options)
            optimised = result.proto().SerializeToString()
            _renew(_program(returned), result)
            content = optimised
            return result.report

        try:
            self._attempt("the stream", work)
        finally:
            stream.write(content)
            if hasattr(stream, "flush"):
                stream.flush()
        return returned

    def _optimize_file(self, path: Path, program: Any, options: Options) -> Report:
        result = replace(path, options, owned=True)
        try:
            _renew(program, result, path)
        except Exception as error:  # the file is done: it must not be reported as kept
            if self._on_error == "raise":
                raise
            warn(f"{path} is optimised, but the program returned is not: {one_line(error)}")
        return result.report

    def _attempt(self, name: str, work: Callable[[], Report]) -> None:
        attempt(name, work, self._on_error, self.outcomes.append)


@contextlib.contextmanager
def torch_export(
    *, on_error: OnError = "keep", **options: Unpack[Options]
) -> Iterator[TorchExportHook]:
    """Within the block, whatever `torch.onnx.export` makes is optimised and proved.

    Files are replaced in place, streams get the optimised model, and the ONNXProgram that the
    dynamo exporter returns holds it. Where the result is refused or cannot be made, the export
    stays as the exporter made it: "keep" then issues an ExportWarning, "raise" raises the error
    (any of `graphopt.optimize`). What the exporter itself raises passes through.

    The block covers its own thread (and asyncio task) only; of nested blocks the innermost one
    does the work. The options are those of `graphopt.optimize`.

    Raises UsageError for an unknown level, pass or policy, and where torch cannot be imported;
    TypeError for an unknown option.
    """
    check("torch_export", on_error, options)
    hook = TorchExportHook(on_error, options)
    _PATCH.acquire()
    token = _ACTIVE.set(hook)
    try:
        yield hook
    finally:
        _ACTIVE.reset(token)
        _PATCH.release()


def _program(returned: Any) -> Any:
    """The ONNXProgram of the dynamo exporter, None where the other exporter returned nothing."""
    # Asked of the class: the property of the object would serialise the whole model.
    return returned if hasattr(type(returned), "model_proto") else None


def _optimize_program(program: Any, options: Options) -> Report:
    result = optimize(program.model_proto, **options)
    _renew(program, result)
    return result.report


def _renew(program: Any, result: Result, path: Path | None = None) -> None:
    """Make the ONNXProgram, where there is one, hold the optimised model.

    Raises ModelError over 2 GB where there is no file to read it from.
    """
    if program is None:
        return
    onnx_ir = importlib.import_module("onnx_ir")
    try:
        model = onnx_ir.from_proto(result.proto())
    except ModelError:
        if path is None:
            raise
        model = onnx_ir.load(path)  # its weights stay in the file
    program.model = model
    program.release()  # a session that was opened runs the old model


class _Patch:
    """The replacement of `torch.onnx.export`, there while any thread is in a block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._module: Any = None
        self._genuine: _Export | None = None
        self._replacement: _Export | None = None

    def acquire(self) -> None:
        """Replace it if it is not yet. Raises UsageError where torch cannot be imported."""
        try:
            module: Any = importlib.import_module("torch.onnx")
        except ImportError as error:
            raise UsageError(
                f"torch_export needs PyTorch, but importing it failed: {error}"
            ) from None
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._module, self._genuine = module, module.export
                self._replacement = module.export = _dispatching(module.export)

    def release(self) -> None:
        """Restore it at the end of the last block, unless somebody else has replaced it since."""
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                if self._module.export is self._replacement:
                    self._module.export = self._genuine
                self._module = self._genuine = self._replacement = None


def _dispatching(genuine: _Export) -> _Export:
    """`torch.onnx.export` as the block's own hook does it; outside of blocks, as it was."""

    @functools.wraps(genuine)
    def export(*args: Any, **kwargs: Any) -> Any:
        hook = _ACTIVE.get()
        if hook is None:
            return genuine(*args, **kwargs)
        token = _ACTIVE.set(None)  # an exporter that calls another one exports one model
        try:
            return hook._export(genuine, args, kwargs)
        finally:
            _ACTIVE.reset(token)

    return export


_ACTIVE: Final[ContextVar[TorchExportHook | None]] = ContextVar("torch_export", default=None)
_PATCH: Final = _Patch()
