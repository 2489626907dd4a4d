"""Passes, the pipelines they form, and what running one does.

A pipeline is text that round-trips: `remove-identity, freeze-parameters{keep=x}, remove-dead`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

from graphopt.edit import Change, Editor
from graphopt.errors import UsageError
from graphopt.ir import Model

_log = logging.getLogger(__name__)
_PASS: Final = re.compile(r"\s*([a-z0-9-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


class Pass(Protocol):
    """A frozen dataclass: its fields are its options, `run` does its work through the editor."""

    name: ClassVar[str]

    def run(self, model: Model, edit: Editor) -> None:
        """Rewrite the model; an exception undoes the whole pass."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassRun:
    """What one pass of a pipeline did. `error` is set where it failed and was undone."""

    text: str
    seconds: float
    changes: tuple[Change, ...]
    error: str = ""


def run_pipeline(
    model: Model, passes: Sequence[Pass], progress: Callable[[str], None] | None = None
) -> list[PassRun]:
    """Run the passes in order. A pass that raises is undone and reported; the rest goes on."""
    edit = Editor(model)
    runs = []
    for step in passes:
        if progress is not None:
            progress(step.name)
        mark = edit.mark()
        error = ""
        started = time.perf_counter()
        try:
            step.run(model, edit)
        except UsageError:
            edit.undo_to(mark)
            raise  # the user can correct it: better now than a result without the pass
        except Exception as failure:  # a plugin's fault must not cost the user the other passes
            _log.exception("pass %s failed and was undone", step.name)
            error = f"{type(failure).__name__}: {failure}"
            edit.undo_to(mark)
        seconds = time.perf_counter() - started
        runs.append(PassRun(to_text(step), seconds, tuple(edit.changes[mark[1] :]), error))
    return runs


def to_text(step: Pass) -> str:
    """The pass as it stands in a pipeline, options that differ from their default included."""
    options = [
        f"{field.name}={_option_text(getattr(step, field.name))}"
        for field in dataclasses.fields(step)  # type: ignore[arg-type]
        if getattr(step, field.name) != field.default
    ]
    return f"{step.name}{{{', '.join(options)}}}" if options else step.name


def parse_pipeline(text: str, registry: Mapping[str, type[Pass]]) -> list[Pass]:
    """The passes that the text names. Raises UsageError for an unknown pass, option or syntax."""
    passes: list[Pass] = []
    at = 0
    while at < len(text.rstrip()):
        match = _PASS.match(text, at)
        if match is None:
            raise UsageError(
                f"passes: cannot read {text[at:].strip()!r}; write 'name, name{{option=value}}'"
            )
        passes.append(_make(match[1], match[2] or "", registry))
        at = match.end()
    return passes


def _make(name: str, options: str, registry: Mapping[str, type[Pass]]) -> Pass:
    if name not in registry:
        raise UsageError(f"passes: there is no pass {name!r}; there are: {', '.join(registry)}")
    kind = registry[name]
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, separator, value = (part.strip() for part in option.partition("="))
        if not separator or key not in known:
            stated = ", ".join(known) or "none"
            raise UsageError(f"passes: {name} has no option {option!r}; its options: {stated}")
        values[key] = _option_value(name, key, value, known[key].default)
    return kind(**values)


def _option_value(name: str, key: str, text: str, default: object) -> object:
    """The text as a value of the type that the option's default has."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UsageError(f"passes: {name}: {key} is true or false, not {text!r}")
        return text == "true"
    for kind in (int, float):
        if isinstance(default, kind):
            try:
                return kind(text)
            except ValueError:
                raise UsageError(f"passes: {name}: {key} is a number, not {text!r}") from None
    return text


def _option_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
