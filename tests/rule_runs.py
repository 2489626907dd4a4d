"""Many drafts in one model: rewritten together, run together, judged one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.errors import GraphoptError
from graphopt.ir import Model
from graphopt.judge import TOLERANCES
from graphopt.rewrite import apply_rules
from graphopt.rules import Rule
from graphopt.runtime import Session
from tests import rule_attributes
from tests.rule_contexts import Case

MOST_CASES: Final = 60  # in one model: a session costs more than a case, but not than many
_TOLERANCES: Final = {**TOLERANCES, "float64": 1e-9, "float16": 1e-2, "int64": 0.0}

Arrays = dict[str, NDArray[Any]]


@dataclass
class Batch:
    """Cases of one opset side by side, with what the original computes.

    Without a reference only what fires is looked at: the runtime has no kernel for them.
    """

    cases: list[Case]
    proto: onnx.ModelProto
    feed: Arrays
    reference: dict[str, Any] | None = None


@dataclass(frozen=True)
class Failure:
    """What a rule did wrong, on which case."""

    case: str
    problem: str


def batches(cases: Sequence[Case]) -> tuple[list[Batch], list[tuple[Case, str]]]:
    """The cases by opset, each batch run once; and those that the runtime refuses, with why."""
    by_opset: dict[int, list[Case]] = {}
    for case in cases:
        by_opset.setdefault(case.draft.choice.opset, []).append(case)
    made: list[Batch] = []
    refused: list[tuple[Case, str]] = []
    for group in by_opset.values():
        for at in range(0, len(group), MOST_CASES):
            _split(group[at : at + MOST_CASES], made, refused)
    return made, refused


def _split(cases: list[Case], made: list[Batch], refused: list[tuple[Case, str]]) -> None:
    """Halve a batch that does not run until what does not is alone."""
    batch = merge(cases)
    try:
        batch.reference = _run(batch.proto, batch.feed)
    except GraphoptError as error:
        if len(cases) == 1:
            refused.append((cases[0], str(error)))
            if cases[0].fires is False:
                made.append(batch)
            return
        middle = len(cases) // 2
        _split(cases[:middle], made, refused)
        _split(cases[middle:], made, refused)
        return
    made.append(batch)


def merge(cases: Sequence[Case]) -> Batch:
    """One model of all, the names of each with a prefix."""
    whole = onnx.GraphProto(name="cases")
    feed: Arrays = {}
    for number, case in enumerate(cases):
        prefix = f"c{number}/"
        part = case.draft.graph(prefix)
        for name in ("node", "input", "output", "initializer"):
            getattr(whole, name).extend(getattr(part, name))
        feed |= {prefix + name: array for name, array in case.draft.inputs.items()}
    imports = [helper.make_opsetid("", cases[0].draft.choice.opset)]
    proto = helper.make_model(whole, opset_imports=imports)
    proto.ir_version = 10
    return Batch(list(cases), proto, feed)


def check(rule: Rule, batch: Batch) -> list[Failure]:
    """Everything that is wrong with the rule on these cases."""
    try:
        return check_at_once(rule, batch)
    except Exception as error:  # of a broken rule, engine or model: all are failures to report
        if len(batch.cases) == 1:
            return [Failure(batch.cases[0].label, f"{type(error).__name__}: {error}")]
    parts = [Batch([case], *_alone(case)) for case in batch.cases]
    found = []
    for part in parts:
        if batch.reference is not None:
            part.reference = _run(part.proto, part.feed)
        found += check(rule, part)
    return found or [Failure("all together", "fails, though each case alone does not")]


def _alone(case: Case) -> tuple[onnx.ModelProto, Arrays]:
    single = merge([case])
    return single.proto, single.feed


def check_at_once(rule: Rule, batch: Batch) -> list[Failure]:
    """As `check`, but whatever the rule raises is raised."""
    model = Model.load(batch.proto)
    before = exporter.to_proto(model)
    edit = Editor(model)
    mark = edit.mark()
    apply_rules([rule], edit)
    fired = {change.root: change for change in edit.changes}
    result = exporter.to_proto(model)
    failures = _firings(batch, set(fired))
    rule_attributes.check(result)
    if list(result.graph.input) != list(before.graph.input):
        failures.append(Failure("all", "the inputs changed"))
    if list(result.graph.output) != list(before.graph.output):
        failures.append(Failure("all", "the outputs changed"))
    computed = {value.name for graph in model.graphs() for value in graph.values.values()}
    for root, change in fired.items():
        if root not in computed and f"{root} := " not in change.after:
            failures.append(Failure(root, "the root's name is gone"))
    count = len(edit.changes)
    apply_rules([rule], edit)
    again = Editor(Model.load(result))
    apply_rules([rule], again)
    more = [*edit.changes[count:], *again.changes]
    failures += [Failure(change.root, "fires again on its own result") for change in more]
    edit.undo_to(mark)
    if exporter.to_proto(model) != before:
        failures.append(Failure("all", "undo does not bring the model back"))
    if batch.reference is not None:
        failures += _values(batch, batch.reference, _run(result, batch.feed))
    return failures


def _firings(batch: Batch, fired: set[str]) -> list[Failure]:
    failures = []
    for number, case in enumerate(batch.cases):
        did = f"c{number}/{case.draft.roots[0]}" in fired
        if case.fires is not None and did != case.fires:
            text = "fires" if did else "does not fire"
            failures.append(Failure(case.label, text))
    return failures


def _values(batch: Batch, reference: dict[str, Any], results: dict[str, Any]) -> list[Failure]:
    failures = []
    for number, case in enumerate(batch.cases):
        for name in case.draft.outputs:
            key = f"c{number}/{name}"
            problem = differs(reference[key], results[key], case.draft.choice.storage)
            if problem:
                failures.append(Failure(case.label, f"{name}: {problem}"))
    return failures


def differs(wanted: NDArray[Any], found: NDArray[Any], storage: str) -> str:
    """How the arrays differ; "" where they agree as far as the storage type lets them."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    if wanted.dtype.kind != "f":
        wrong = int(np.sum(wanted != found))
        return f"{wrong} of {wanted.size} values differ" if wrong else ""
    finite = np.isfinite(wanted)
    if not np.array_equal(wanted[~finite], found[~finite], equal_nan=True):
        return "NaN or infinity in other places"
    one, other = wanted[finite].astype(np.float64), found[finite].astype(np.float64)
    if not one.size:
        return ""
    variation = np.abs(one - one.mean()).max()
    scale = variation if variation > 1e-6 * np.abs(one).max() else np.abs(one).max()
    gap = np.abs(one - other).max()
    if not gap <= _TOLERANCES[storage] * scale:
        return f"error {gap / scale if scale else np.inf:.2g} of the signal"
    return ""


def _run(proto: onnx.ModelProto, feed: Arrays) -> dict[str, Any]:
    session = Session(proto.SerializeToString(), optimizations="off", threads=1)
    try:
        return session.run(feed)
    finally:
        session.close()
