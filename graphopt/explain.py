"""Why rules fired or did not: what `graphopt explain` computes.

The model goes through the passes of a level, nothing is written or run. Rules tell where they
fired and where what they require did not hold; where a pattern fits only in part, a matcher that
takes notes finds the way that goes furthest and what stood against it first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import Field

from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model, Node, Value
from graphopt.manager import Pass
from graphopt.match import Context, Matcher, stated
from graphopt.passes.pipelines import pipeline
from graphopt.passes.rules import all_rules, family_of, plugins
from graphopt.record import Record
from graphopt.rules import Const, Literal, Operand, Output, PatternNode, Rule, Variable

_log = logging.getLogger(__name__)
SCHEMA_VERSION: Final = 1
LEVEL: Final = 2
_CLOSEST: Final = 5  # nodes where a rule almost fits


class Firing(Record):
    """A rule fired: the value it stands on, the graph text before and after."""

    root: str
    before: str
    after: str


class Rejection(Record):
    """The pattern fitted, and what the rule requires did not hold."""

    node: str
    reason: str


class Miss(Record):
    """The pattern fitted in part; `fits` are the nodes that did, from the root on."""

    node: str
    fits: list[str]
    wanted: str
    found: str


class RuleRecord(Record):
    """One rule on one model."""

    name: str
    family: str
    equation: str
    applies: bool = Field(description="false where the rule is written for other opsets")
    opsets: str
    fired: list[Firing]
    rejected: list[Rejection]
    misses: list[Miss] = Field(description="where it almost fits, the closest first")


class Explanation(Record):
    """All rules, or those that were asked for."""

    schema_version: int = SCHEMA_VERSION
    path: str
    opset: int
    level: int = LEVEL
    node: str = Field(default="", description="the node asked for, as messages call it")
    gone: str = Field(default="", description="what happened to that node, if it is not there")
    rules: list[RuleRecord]
    warnings: list[str] = Field(description="packages whose rules could not be loaded")


def explain(path: Path, rule: str | None = None, node: str | None = None) -> Explanation:
    """What rules do to the model at `path`: all, or `rule`; everywhere, or at `node`.

    A node is meant by its name or by the name of what it computes. Raises UsageError for a rule
    or a node that does not exist, ModelError where the file is no model.
    """
    rules = all_rules()
    if rule is not None and rule not in rules:
        raise UsageError(f"--rule: there is no rule {rule!r}; 'graphopt passes' lists them")
    model = Model.load(path)
    asked = _named(model, node)
    edit = _rewritten(model, pipeline(LEVEL, None))
    places, gone = None, ""
    if node is not None:
        left = _named(model, node)
        if not asked and not left:
            raise UsageError(f"--node: no node is called {node!r}, or computes it")
        places = left
        gone = "" if left else _fate(node, edit)
    chosen = [rules[rule]] if rule is not None else list(rules.values())
    return Explanation(
        path=str(path),
        opset=model.opsets.get("", 1),
        node="" if node is None else next((n.label for n in (places or ())), node),
        gone=gone,
        rules=[_record(each, edit, places, one=rule is not None) for each in chosen],
        warnings=list(plugins().failures),
    )


def _named(model: Model, name: str | None) -> list[Node]:
    return [
        node
        for node in model.nodes()
        if node.name == name or any(v is not None and v.name == name for v in node.outputs)
    ]


def _rewritten(model: Model, steps: Sequence[Pass]) -> Editor:
    """The model after the passes; one that fails is undone, as in `optimize`."""
    edit = Editor(model)
    for step in steps:
        edit.settle()
        mark = edit.mark()
        try:
            step.run(model, edit)
        except UsageError:
            raise
        except Exception:  # what rules do is worth telling even where another pass fails
            _log.exception("pass %s failed and was undone", step.name)
            edit.undo_to(mark)
    edit.settle()
    return edit


def _fate(name: str, edit: Editor) -> str:
    """Which rewrite took the node, told by the last one that has it in its text."""
    for change in reversed(edit.changes):
        if f"{name} = " in change.before or change.root == name:
            return f"{change.rule} rewrote it, at {change.root!r}"
    return "it was removed: nothing needs it"


def _record(rule: Rule, edit: Editor, places: list[Node] | None, *, one: bool) -> RuleRecord:
    """`places` limits it to some nodes; misses are looked for only where few are asked for."""
    context = Context(edit.model, edit.types)
    names = None if places is None else {v.name for n in places for v in n.outputs if v is not None}
    labels = None if places is None else {n.label for n in places}
    fired = [c for c in edit.changes if c.rule == rule.name and (names is None or c.root in names)]
    done = {change.root for change in fired}
    rejected = dict.fromkeys(
        (node, reason)
        for name, node, reason in edit.rejections
        if name == rule.name and (labels is None or node in labels)
    )
    applies = rule.applies_to(context.opset)
    misses: list[Miss] = []
    if applies and (one or places is not None):
        told = {node for node, _ in rejected}
        candidates = [n for n in places or edit.model.nodes() if n.label not in told]
        misses = _misses(rule, candidates, context)
    newest = f" to {rule.max_opset}" if rule.max_opset is not None else ""
    return RuleRecord(
        name=rule.name,
        family=family_of(rule),
        equation=rule.equation,
        applies=applies,
        opsets=f"{rule.min_opset}{newest or ' on'}",
        fired=[Firing(root=c.root, before=c.before, after=c.after) for c in fired],
        rejected=[
            Rejection(node=node, reason=reason)
            for node, reason in rejected
            if not any(node.endswith(f" {root!r}") for root in done)
        ],
        misses=misses,
    )


def _misses(rule: Rule, nodes: Iterable[Node], context: Context) -> list[Miss]:
    """The closest, those of which most nodes fit first."""
    found: list[tuple[tuple[int, int], Miss]] = []
    for node in nodes:
        notes: list[_Note] = []
        for root in rule.roots:
            if root.op == node.op and not node.domain:
                tracer = _Tracer(context)
                for _ in tracer.node(root, node):
                    tracer.uses(node)
                notes += [tracer.note] if tracer.note is not None else []
        if notes:
            best = max(notes, key=lambda note: note.score)
            miss = Miss(
                node=node.label,
                fits=list(best.fits),
                wanted=" or ".join(dict.fromkeys(best.wanted)),
                found=best.found,
            )
            found.append((best.score, miss))
    found.sort(key=lambda entry: entry[0], reverse=True)
    deep = [entry for entry in found if entry[0][0] > 1]  # that a root is there says little
    return [miss for _, miss in (deep or found)[:_CLOSEST]]


@dataclass
class _Note:
    """How far a way went: nodes and parameters that fitted, then what did not."""

    score: tuple[int, int]
    fits: tuple[str, ...]
    wanted: list[str]
    found: str


class _Tracer(Matcher):
    """The matcher, taking a note of every failure; the one deepest in the pattern is kept."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.note: _Note | None = None

    def miss(self, wanted: str, found: str, *, complete: bool = False) -> None:
        nodes, variables = self.binding.nodes, self.binding.variables
        score = (len(nodes) + complete, len(variables))
        best = self.note
        if best is None or score > best.score:
            self.note = _Note(score, tuple(n.label for n in nodes.values()), [wanted], found)
        elif score == best.score and found == best.found:
            best.wanted.append(wanted)

    def uses(self, root: Node) -> None:
        """Everything fits: note a value inside that others need."""
        matched = set(self.binding.nodes.values())
        for node in matched - {root}:
            for value in filter(None, node.outputs):
                other = next((n for n in value.consumers if n not in matched), None)
                if value.is_output or value in value.graph.pinned:
                    what = f"{value.name!r}, an output of the graph"
                elif other is not None:
                    what = f"{value.name!r}, which {other.label} reads as well"
                else:
                    continue
                self.miss("a value inside that nothing else needs", what, complete=True)

    def operand(self, pattern: Operand, value: Value | None) -> Iterator[None]:
        if isinstance(pattern, Literal):
            if value is None or not self.equals(value, pattern.value):
                self.miss(f"the constant {pattern.value:.9g}", self.described(value))
        elif isinstance(pattern, Output) and (value is None or value.producer is None):
            self.miss(pattern.node.op, self.described(value))
        yield from super().operand(pattern, value)

    def accepts(self, pattern: Variable, value: Value | None) -> bool:
        bound = self.binding.variables
        if pattern.name in bound:
            known = bound[pattern.name]
            if known is not value and not isinstance(known, tuple):
                self.miss(f"{pattern.name} again: {self.described(known)}", self.described(value))
        elif value is None and pattern.default is None:
            self.miss(f"an input for {pattern.name}", "none")
        elif pattern.kind is Const and value is not None and self.context.constant(value) is None:
            self.miss(f"a constant for {pattern.name}", self.described(value))
        return super().accepts(pattern, value)

    def node(self, pattern: PatternNode, node: Node) -> Iterator[None]:
        bound = self.binding.nodes
        if pattern.index in bound:
            if bound[pattern.index] is not node:
                self.miss(f"{bound[pattern.index].label} again", node.label)
        elif pattern.op != node.op or node.domain:
            self.miss(pattern.op, node.label)
        elif bound and node.graph is not next(iter(bound.values())).graph:
            self.miss("a node of the same graph", node.label)
        elif not self.has_outputs(pattern, node):
            self.miss(f"{pattern.op} with {pattern.outputs} outputs", _outputs(node))
        else:
            for name, wanted in pattern.attributes.items():
                if not self.agrees(node, name, wanted):
                    self.miss(f"{pattern.op} with {name} = {wanted}", self.stated(node, name))
        yield from super().node(pattern, node)

    def operands(
        self, patterns: Sequence[Operand], values: Sequence[Value | None]
    ) -> Iterator[None]:
        if values and not patterns:
            self.miss("no further input", self.described(values[0]))
        elif patterns and not values and not _may_lack(patterns[0]):
            self.miss("a further input", "none")
        yield from super().operands(patterns, values)

    def stated(self, node: Node, name: str) -> str:
        try:
            return f"{node.label} with {name} = {stated(node, name, self.context)}"
        except LookupError as error:
            return str(error)

    def described(self, value: Value | None) -> str:
        """A value as messages call it: what it is, and what a small constant holds."""
        if value is None:
            return "nothing"
        weight = self.context.constant(value)
        if weight is not None and weight.size == 1 and not weight.is_sparse:
            return f"the constant {weight.values.reshape(-1)[0]} ({value.name!r})"
        if weight is not None:
            return f"the constant {value.name!r} [{','.join(map(str, weight.shape))}]"
        if value.producer is not None:
            return value.producer.label
        return f"the input {value.name!r}"


def _may_lack(pattern: Operand) -> bool:
    return isinstance(pattern, Variable) and (
        pattern.default is not None or pattern.kind.__name__ == "Vars"
    )


def _outputs(node: Node) -> str:
    read = [v.name for v in node.outputs if v is not None and (v.consumers or v.is_output)]
    return f"{node.label}, of which {', '.join(map(repr, read)) or 'nothing'} is read"
