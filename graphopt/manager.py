"""Passes, the pipelines they form, and what running one does.

A pipeline is text that round-trips: `canonicalize, fuse{rules=fuse-gelu}, remove-dead`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

from graphopt import collector, verify
from graphopt.edit import Change, Denial, Editor
from graphopt.errors import UsageError
from graphopt.fingerprint import fingerprint
from graphopt.ir import Model
from graphopt.verify import Interface

_log = logging.getLogger(__name__)
_PASS: Final = re.compile(r"\s*([a-z0-9-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


class Pass(Protocol):
    """A frozen dataclass: its fields are its options, `run` does its work through the editor.

    Where it starts, nodes stand in topological order and `edit.types` holds whatever follows from
    the graph as it is. It asks `edit.allows` before each change that it records; where it does
    not, a change that must not be made costs it all of its changes.
    """

    name: ClassVar[str]

    def run(self, model: Model, edit: Editor) -> None:
        """Rewrite the model; an exception undoes the whole pass."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassRun:
    """What one pass of a pipeline did. `error` is set where it failed and was undone.

    `fired` counts changes by rule; `rejected` counts, by rule, the nodes where its pattern fitted
    and what it requires did not hold.
    """

    text: str
    seconds: float
    changes: tuple[Change, ...]
    error: str = ""
    fired: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)


def run_pipeline(
    model: Model,
    passes: Sequence[Pass],
    progress: Callable[[str], None] | None = None,
    *,
    denied: Collection[Denial] = (),
    fuel: int | None = None,
    verify_each: bool | None = None,
) -> list[PassRun]:
    """Run the passes in order. A pass that raises is undone and reported; the rest goes on.

    The result is verified in full (`graphopt.verify`); a pass that broke the model is undone and
    reported like one that raised. With `verify_each` every pass is verified as it ends, which
    GRAPHOPT_VERIFY_EACH=1 in the environment asks for as well. `denied` and `fuel` are the
    editor's: changes that must not be made, and how many may be.
    """
    if verify_each is None:
        verify_each = os.environ.get("GRAPHOPT_VERIFY_EACH", "0") != "0"
    tell = progress or (lambda name: None)
    edit = Editor(model, denied, fuel)
    interface = Interface.of(model)
    with collector.paused():
        if not verify_each:
            runs = _run_all(passes, edit, tell)
            if not verify.problems(model, interface, edit.narrowed):
                return runs
            edit.undo_to((0, 0))  # some pass broke the model: once more, and each looked at
        return _run_all(passes, edit, tell, _Guard(edit, interface))


def _run_all(
    passes: Sequence[Pass],
    edit: Editor,
    tell: Callable[[str], None],
    guard: _Guard | None = None,
) -> list[PassRun]:
    """A pass that found nothing to do finds nothing until the graph changes: it is not repeated."""
    runs: list[PassRun] = []
    idle: dict[str, int] = {}  # pass -> how many edits there were when it found nothing to do
    for step in passes:
        text, edits = to_text(step), edit.mark()[0]
        if idle.get(text) == edits:
            runs.append(PassRun(text, 0.0, ()))
            continue
        run = _run_pass(step, edit, tell, guard)
        runs.append(run)
        if edit.mark()[0] == edits and not run.error:
            idle[text] = edits
    return runs


class _Guard:
    """Finds what a pass broke: what was wrong with the model before is not its fault."""

    def __init__(self, edit: Editor, interface: Interface) -> None:
        self._edit = edit
        self._model = edit.model
        self._interface = interface
        self._known = frozenset(verify.problems(self._model, interface))
        self._fingerprint = fingerprint(self._model)

    def problem(self) -> str:
        """The first new problem, "" if there is none."""
        found = verify.problems(self._model, self._interface, self._edit.narrowed)
        return next((problem for problem in found if problem not in self._known), "")

    def accept(self) -> None:
        """What undone passes have to come back to from here on."""
        self._fingerprint = fingerprint(self._model)

    def check_undone(self) -> None:
        """An undone pass must leave no trace."""
        assert fingerprint(self._model) == self._fingerprint, "the journal is incomplete"


def _run_pass(
    step: Pass, edit: Editor, tell: Callable[[str], None], guard: _Guard | None = None
) -> PassRun:
    tell(step.name)
    edit.settle()
    mark, rejections = edit.mark(), len(edit.rejections)
    error, seconds = "", None
    started = time.perf_counter()
    try:
        if not edit.is_spent:
            step.run(edit.model, edit)
            seconds = time.perf_counter() - started
            if edit.mark()[0] > mark[0] and edit.mark()[1] == mark[1]:
                edit.record(step.name, "", "", "edits without an account")
        if (change := edit.overstepped(mark)) is not None:
            error = f"its change {change.rule} at {change.root!r} is denied"
        elif guard is not None and (problem := guard.problem()):
            error = f"the model is broken after it: {problem}"
    except UsageError:
        edit.undo_to(mark)
        raise  # the user can correct it: better now than a result without the pass
    except Exception as failure:  # a plugin's fault must not cost the user the other passes
        _log.exception("pass %s failed and was undone", step.name)
        error = f"{type(failure).__name__}: {failure}"
    overspent = edit.is_overspent
    if error:
        edit.undo_to(mark)
    if overspent:
        edit.stop()  # what later passes would do now is not what they do after this one
    if guard is not None:
        guard.check_undone() if error else guard.accept()
    changes = tuple(edit.changes[mark[1] :])
    return PassRun(
        to_text(step),
        seconds or time.perf_counter() - started,
        changes,
        error,
        Counter(change.rule for change in changes),
        Counter(rule for rule, _ in {entry[:2] for entry in edit.rejections[rejections:]}),
    )


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
