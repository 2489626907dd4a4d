"""Who broke the model: the change at fault is found, denied and shown; the rest is kept.

A change is to blame if the model just before it passes and the model just after it fails. To try
that, the pipeline runs again with the fuel for so many changes; it is deterministic, so nothing is
replayed. Where to look first is read from the graph: the first value that differs while all it is
computed from agrees carries the stamp of the rule that made it. Where that says nothing (a rewired
input, a fault inside a body), bisecting finds the change.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from graphopt import exporter
from graphopt.divergence import Divergence
from graphopt.edit import Change, Denial
from graphopt.errors import GraphoptError, UsageError
from graphopt.ir import Model
from graphopt.manager import Pass, PassRun, run_pipeline, to_text
from graphopt.trial import Outcome, Trial

_log = logging.getLogger(__name__)
_FAULTS_OF_A_RULE: Final = 3  # then all of the rule is denied
_MOST_FAULTS: Final = 24  # then the model is given up

Scope = Literal["change", "rule", "pass"]
Load = Callable[[], Model]


@dataclass(frozen=True)
class Fault:
    """Something that was found to break the model, and was denied for it.

    `kind` is "accumulated" where no change is to blame but all of the rule's together are; `scope`
    says whether the one change, the whole rule or the whole pass was denied.
    """

    kind: Literal["blamed", "accumulated"]
    scope: Scope
    rule: str
    root: str
    step: str  # the pass as text
    diverging: str  # the first value that differs; "" where that could not be seen
    error: float  # relative to how much that value varies
    allowed: float
    problem: str  # what the model did as a whole
    reproducer: str  # a folder; "" where there is none

    @property
    def message(self) -> str:
        """One line: what is wrong where, what was expected, what was done, how to see it."""
        where = f"rule {self.rule} (pass {self.step})"
        if self.kind == "accumulated":
            said = f"errors accumulated; {where} loses most and is denied"
        elif self.scope == "pass":
            said = f"pass {self.step} is wrong and denied (last change: {self.rule})"
        elif self.scope == "rule":
            said = f"{where} is wrong at {self.root!r} and, after {_FAULTS_OF_A_RULE} faults, "
            said += "denied everywhere"
        else:
            said = f"{where} is wrong at {self.root!r} and denied there"
        if self.diverging and math.isinf(self.error):
            what = f"{self.diverging!r} has another shape, other integers, or NaN in other places"
        elif self.diverging:
            what = f"{self.diverging!r} strays by {self.error:.2g} of its variation, "
            what += f"{self.allowed:.2g} is allowed"
        else:
            what = self.problem
        return f"{said}: {what}" + (f"; see {self.reproducer}" if self.reproducer else "")


@dataclass(frozen=True)
class _Probe:
    """How the model does after its first changes; `made` counts them.

    There are fewer than were allowed where a pass is undone that makes changes without asking.
    """

    made: int
    outcome: Outcome


class _Search:
    """Tries how far the pipeline can go before the model fails."""

    def __init__(
        self, load: Load, steps: Sequence[Pass], denied: set[Denial], trial: Trial
    ) -> None:
        self._load = load
        self._steps = steps
        self._denied = frozenset(denied)
        self._trial = trial
        self._probes: dict[int, _Probe] = {}

    def model(self, fuel: int) -> tuple[Model, list[PassRun]]:
        """The model after its first `fuel` changes."""
        model = self._load()
        return model, run_pipeline(model, self._steps, denied=self._denied, fuel=fuel)

    def probe(self, fuel: int) -> _Probe:
        if fuel not in self._probes:
            model, runs = self.model(fuel)
            made = sum(len(run.changes) for run in runs)
            self._probes[fuel] = _Probe(made, self._trial.outcome(model))
        return self._probes[fuel]

    def culprit(self, proved: int, failing: int, guesses: Sequence[int]) -> int | None:
        """Number, from 1, of a change before which the model passes and after which it fails.

        It is known to pass after `proved` changes, if those are any, and to fail after `failing`.
        None where it fails without any.
        """
        low, high = proved, failing
        for guess in guesses:
            if not low < guess <= high or high - low == 1:
                continue
            if self._fails(guess - 1):
                high = guess - 1
            elif self._fails(guess):
                low, high = guess - 1, guess
            else:
                low = guess
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fails(middle) else (middle, high)
        return None if high == 0 or (low == 0 and self._fails(0)) else high

    def _fails(self, fuel: int) -> bool:
        return bool(self.probe(fuel).outcome.problem)


class Blame:
    """The search for all that breaks one model: `faults` are found, `denied` is what they cost."""

    def __init__(
        self,
        original: Path,
        load: Load,
        steps: Sequence[Pass],
        place: Callable[[], Path],
        *,
        data: str | None = None,
        custom_ops: Sequence[Path] = (),
        seed: int = 0,
        shapes: Mapping[str, Sequence[int]] | None = None,
        tell: Callable[[str], None] = lambda what: None,
    ) -> None:
        """`steps` run on what `load` gives; `place` is where reproducers go.

        That is the original, or what was asked to be made of it; `shapes` fixes its inputs.
        """
        self.faults: list[Fault] = []
        self.denied: set[Denial] = set()
        self._original = original
        self._load = load
        self._steps = list(steps)
        self._place = place
        self._data = data
        self._custom_ops = list(custom_ops)
        self._seed = seed
        self._shapes = shapes
        self._tell = tell
        self._proved = 0  # so many first changes are known to pass

    def rescue(self, model: Model, runs: Sequence[PassRun]) -> tuple[Model, list[PassRun]] | None:
        """A model without the faults that this one has, with how it came about; None if none."""
        self._tell("looking for the fault")
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            try:
                with Trial(
                    self._original,
                    Path(folder),
                    data=self._data,
                    custom_ops=self._custom_ops,
                    seed=self._seed,
                    shapes=self._shapes,
                ) as trial:
                    return self._rescue(model, list(runs), trial)
            except GraphoptError as error:  # the verdict stands, only its cause stays unknown
                _log.warning("the fault was not found: %s", error)
                return None

    def _rescue(
        self, model: Model, runs: list[PassRun], trial: Trial
    ) -> tuple[Model, list[PassRun]] | None:
        self._proved = 0
        outcome = trial.find(model)
        if not outcome.problem:
            return None
        while outcome.problem:
            if len(self.faults) >= _MOST_FAULTS or not self._convict(model, runs, outcome, trial):
                return None
            self._tell(f"without {self.faults[-1].rule}")
            model = self._load()
            runs = run_pipeline(model, self._steps, denied=self.denied)
            outcome = trial.outcome(model)
        return model, runs

    def _convict(
        self, model: Model, runs: Sequence[PassRun], outcome: Outcome, trial: Trial
    ) -> bool:
        """Find a fault and deny it; False where no change is at fault."""
        changes = [change for run in runs for change in run.changes]
        steps = [step for step, run in zip(self._steps, runs, strict=True) if not run.error]
        search = _Search(self._load, steps, self.denied, trial)
        seen = trial.divergence(model, outcome)
        guesses = _accused(model, changes, self._proved, seen)
        number = search.culprit(self._proved, len(changes), guesses)
        if number is None:
            return False
        before, after = search.probe(number - 1), search.probe(number)
        if not trial.step(before.outcome, after.outcome).problem:
            fault = self._lossiest(runs, outcome, trial)
        else:
            step = _step_of(number, runs, self._steps)
            fault = self._fault(changes[number - 1], step, number, search, trial)
        if fault is None:
            return False
        self.faults.append(fault)
        self.denied.add((fault.rule, None if fault.scope == "rule" else fault.root))
        undone = (i for i, c in enumerate(changes) if _is_denied(c, self.denied))
        self._proved = min(before.made, next(undone, len(changes)))
        return True

    def _fault(
        self, change: Change, step: Pass, number: int, search: _Search, trial: Trial
    ) -> Fault:
        before, outcome = search.model(number - 1)[0], search.probe(number).outcome
        seen = trial.divergence_between(before, search.model(number)[0]) if outcome.runs else None
        earlier = [fault for fault in self.faults if fault.rule == change.rule]
        scope: Scope = "rule" if len(earlier) + 1 >= _FAULTS_OF_A_RULE else "change"
        if search.probe(number - 1).made < number - 1:
            scope = "pass"
        reproducer = earlier[0].reproducer if earlier else self._reproducer(change, step, before)
        return Fault(
            "blamed",
            scope,
            change.rule,
            change.root,
            to_text(step),
            seen.value if seen else "",
            seen.error if seen else outcome.error,
            seen.allowed if seen else 0.0,
            outcome.problem,
            reproducer,
        )

    def _lossiest(self, runs: Sequence[PassRun], outcome: Outcome, trial: Trial) -> Fault | None:
        """The rule without which the model passes at least loss, or else comes nearest to it."""
        fired = sum((Counter(run.fired) for run in runs), Counter[str]())
        choices: list[tuple[tuple[bool, float], str]] = []
        for rule, times in fired.items():
            model = self._load()
            run_pipeline(model, self._steps, denied={*self.denied, (rule, None)})
            without = trial.outcome(model)
            if without.share < outcome.share:
                rank = (True, without.share) if without.problem else (False, float(times))
                choices.append((rank, rule))
        if not choices:
            return None
        rule = min(choices)[1]
        step = next(run.text for run in runs if rule in run.fired)
        folder = self._saved(rule, self._load(), ", ".join(run.text for run in runs))
        return Fault(
            "accumulated", "rule", rule, "", step, "", outcome.error, 0.0, outcome.problem, folder
        )

    # -- reproducers -----------------------------------------------------------------------------

    def _reproducer(self, change: Change, step: Pass, before: Model) -> str:
        """A folder with the model just before the change, or the original, and one command."""
        narrow: Any = step
        if any(option.name == "rules" for option in dataclasses.fields(narrow)):
            narrow = dataclasses.replace(narrow, rules=change.rule)
        folder = self._saved(change.rule, before, to_text(narrow))
        if folder and not _does(change, narrow, Path(folder) / "before.onnx"):
            folder = self._saved(change.rule, self._load(), ", ".join(map(to_text, self._steps)))
        return folder

    def _saved(self, rule: str, model: Model, passes: str) -> str:
        """The reproducer's folder; "" where it cannot be written, which costs nothing else."""
        words = ["graphopt", "optimize", "before.onnx", "after.onnx", "--passes", passes]
        words += ["--data", self._data] if self._data is not None else []
        words += [word for library in self._custom_ops for word in ("--custom-ops", str(library))]
        words += ["--seed", str(self._seed)] if self._seed else []
        try:
            folder = self._place() / re.sub(r"[^\w.-]+", "-", rule)
            folder.mkdir(parents=True, exist_ok=True)
            exporter.save(model, folder / "before.onnx")
            (folder / "pipeline.txt").write_text(shlex.join(words) + "\n", "utf-8")
        except OSError as error:
            _log.warning("no reproducer: %s", error)
            return ""
        return str(folder)


def _accused(
    model: Model, changes: Sequence[Change], proved: int, seen: Divergence | None
) -> list[int]:
    """Numbers of changes to look at: the one that computes the diverging value, by the stamp of
    its node, and the first of its rule, which is the one if the rule is wrong everywhere.
    """
    node = model.graph.values[seen.value].producer if seen is not None else None
    if node is None or not node.rule:
        return []
    made = {value.name for value in node.outputs if value is not None}
    alike = [n for n, c in enumerate(changes, 1) if c.rule == node.rule and n > proved]
    stamped = [n for n in alike if changes[n - 1].root in made]
    return [*stamped[-1:], *alike[:1]]


def _is_denied(change: Change, denied: Collection[Denial]) -> bool:
    return (change.rule, change.root) in denied or (change.rule, None) in denied


def _step_of(number: int, runs: Sequence[PassRun], steps: Sequence[Pass]) -> Pass:
    """The pass that made the change of this number, from 1."""
    for step, run in zip(steps, runs, strict=True):
        number -= len(run.changes)
        if number <= 0:
            return step
    raise AssertionError("there are fewer changes")


def _does(change: Change, step: Pass, path: Path) -> bool:
    """True where the pass makes the change in the model on disk."""
    try:
        (run,) = run_pipeline(Model.load(path), [step])
    except UsageError:  # the rule is not registered by that name
        return False
    return any((c.rule, c.root) == (change.rule, change.root) for c in run.changes)
