"""Where two models come apart: values inside both, compared by exposing them as outputs.

A name that both graphs have means the same in both, so its values can be compared. Bodies of If,
Loop and Scan are out of reach: what is computed there cannot be an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from graphopt.errors import RuntimeFailure
from graphopt.exposed import write_exposed
from graphopt.importer import dependencies
from graphopt.ir import Model, Node, Value
from graphopt.judge import Flat, OutputState, flatten, is_float, judge
from graphopt.runtime import Level, Session

Run = dict[str, Flat]
"""Outputs by name, of one feed."""

_EXPOSED: Final = 64  # values compared at a time: all of them stay in memory


@dataclass(frozen=True)
class Divergence:
    """A value that differs between two graphs while all it is computed from agrees."""

    value: str
    error: float  # relative to how much the value varies
    allowed: float


class Pair:
    """A reference and a candidate on feeds, each with how it was drawn."""

    def __init__(
        self,
        reference: Model,
        candidate: Model,
        feeds: Sequence[tuple[str, Mapping[str, Any]]],
        allowed: float,
        folder: Path,
        custom_ops: Sequence[Path],
    ) -> None:
        """`allowed` is the relative error that is none yet; `folder` takes temporary files."""
        self._reference = reference
        self._candidate = candidate
        self._feeds = feeds
        self._allowed = allowed
        self._folder = folder
        self._custom_ops = custom_ops
        self._checked: set[str] = set()

    def first_divergence(self) -> Divergence | None:
        """A value that differs while none differs of those that it is computed from.

        Found by samples: of all that the latest differing value depends on, some are exposed; the
        earliest of them that differs is the next to start from, and all that an equal one depends
        on is out.
        """
        values = self._candidate.graph.values
        start = [v for v in self._candidate.graph.outputs if v.producer is not None]
        innocent: set[Node] = set()
        found: Divergence | None = None
        while True:
            sample = _spread(self._names(_upstream(start, innocent)), _EXPOSED)
            last = not sample
            if last and found is not None:
                # squares agree where signs are wrong: look once at all that lies right before
                sample = self._names(_upstream(start, set()))[-_EXPOSED:]
            if not sample:
                return found
            self._checked.update(sample)
            errors = self._errors(sample)
            equal = [values[name] for name, error in errors.items() if error <= self._allowed]
            innocent.update(_upstream(equal, set()))
            first = next((name for name in sample if errors.get(name, 0.0) > self._allowed), None)
            if first is not None:
                found = Divergence(first, errors[first], self._allowed)
                start = [values[first]]
            elif last:
                return found

    def _names(self, nodes: Sequence[Node]) -> list[str]:
        """Values that the nodes compute and the reference computes too, those checked left out."""
        names = (value.name for node in nodes for value in node.outputs if value is not None)
        ours = self._reference.graph.values
        return [
            name
            for name in names
            if name not in self._checked and name in ours and ours[name].producer is not None
        ]

    def _errors(self, names: Sequence[str]) -> dict[str, float]:
        """Relative errors of values inside, optimisations off, of those that tell something.

        Equal integers do not (a shape says nothing about the elements), nor does what is constant
        or all noise, nor a value of a type that cannot be an output.
        """
        runs: dict[str, list[Run]] = {}
        plan: list[tuple[Model, dict[str, Level]]] = [
            (self._reference, {"original off": "off", "original default": "default"}),
            (self._candidate, {"candidate off": "off"}),
        ]
        try:
            for model, ways in plan:
                path = write_exposed(model, self._folder / "exposed.onnx", names)
                for who, way in ways.items():
                    with Session(path, optimizations=way, custom_ops=self._custom_ops) as session:
                        runs[who] = [run(session, feed, names) for _, feed in self._feeds]
        except RuntimeFailure:
            if len(names) == 1:
                return {}
            half = len(names) // 2  # some type cannot be an output: find the others
            return self._errors(names[:half]) | self._errors(names[half:])
        errors = {}
        for name in names:
            state = OutputState(name, "", True, [kind for kind, _ in self._feeds])
            state.runs = {who: [one[name] for one in each] for who, each in runs.items()}
            judged = [
                judge(state, index, signal, self._allowed, ("off",))
                for index, signal in enumerate(state.signals())
            ]
            wrong = [max(one.error_off, self._allowed * one.used) for one in judged if one.problem]
            telling = is_float(runs["original off"][0][name]) and any(j.informative for j in judged)
            if wrong or telling:
                errors[name] = max(wrong, default=0.0)
        return errors


def run(session: Session, feed: Mapping[str, Any], names: Sequence[str]) -> Run:
    """Run once; the named outputs as lists of arrays."""
    return {name: flatten(value) for name, value in session.run(feed, names).items()}


def _upstream(start: Sequence[Value], innocent: set[Node]) -> list[Node]:
    """What the values are computed by, in graph order; the innocent and theirs left out."""
    pending = [value.producer for value in start if value.producer is not None]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen and node not in innocent:
            seen.add(node)
            pending.extend(dependencies(node))
    return sorted(seen, key=lambda node: node.position)


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spread, the last always among them."""
    if len(names) <= most:
        return list(names)
    return [names[len(names) * (number + 1) // most - 1] for number in range(most)]
