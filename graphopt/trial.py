"""Feeds on which a candidate was seen to fail, for judging other candidates by little work.

`graphopt.validate` proves; a trial finds out. It draws the feeds that validation draws, keeps the
few on which the first candidate fails, and judges others on these alone, by the same arithmetic
(`graphopt.judge`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from graphopt import nudge, oracle, proposals, ties
from graphopt.data import given_feeds
from graphopt.divergence import Divergence, Pair, Run, run
from graphopt.errors import RuntimeFailure
from graphopt.exposed import write_exposed
from graphopt.fixed import FixedSession, Shapes
from graphopt.ir import Model
from graphopt.judge import TOLERANCES, Norms, OutputState, judge
from graphopt.runtime import Level, Session

_WAYS: Final[tuple[Level, Level]] = ("off", "default")
_MORE_WAYS: Final[tuple[Level, Level]] = ("basic", "extended")
_BATCH: Final = 6  # feeds drawn at a time until the candidate fails on one
_MOST_FEEDS: Final = 72
_KEPT: Final = 3  # feeds on which it fails
# What right rewrites do to the last digits far from the fault is small beside what the fault does.
_OF_THE_FAULT: Final = 0.01


@dataclass(frozen=True)
class Outcome:
    """How a candidate did; `share` is that of the allowed error which it used, above 1 it failed.

    `error` is relative to how much the output varies, infinite where the candidate did not run.
    """

    share: float = 0.0
    error: float = 0.0
    problem: str = ""  # "" where it passed
    runs: Mapping[str, Sequence[Run]] = field(default_factory=dict, repr=False)  # by way


class Trial:
    """An original with its feeds; used as a context, it frees its sessions in the end."""

    def __init__(
        self,
        original: Path,
        folder: Path,
        *,
        data: str | None = None,
        custom_ops: Sequence[Path] = (),
        seed: int = 0,
        shapes: Shapes | None = None,
    ) -> None:
        """`folder` takes temporary files. Raises what loading and feeding the original raises."""
        self._model = Model.load(original)
        self._folder = folder
        self._custom_ops = custom_ops
        self._shapes = shapes or {}
        self._tolerance = TOLERANCES[oracle.narrowest_float(self._model)]
        self._stack = ExitStack()
        path = self._written(self._model, "original")
        self._sessions = {way: self._stack.enter_context(self._session(path, way)) for way in _WAYS}
        session = self._sessions["off"]
        self._outputs = {port.name: port.type for port in session.outputs}
        self._depends = {n: oracle.depends_on_values(self._model, n) for n in self._outputs}
        self._source: Iterator[tuple[str, Mapping[str, Any]]]
        if data is not None:
            self._source = (("given", feed) for feed in given_feeds(data, session, _MOST_FEEDS))
        else:
            drawn = proposals.propose(self._model, session, seed=seed)
            self._source = itertools.islice(drawn, _MOST_FEEDS)
        self._kinds: list[str] = []
        self._feeds: list[Mapping[str, Any]] = []
        self._runs: dict[str, list[Run]] = {way: [] for way in _WAYS}
        self._signals: dict[str, list[Norms]] = {}
        self._kept: list[int] = []  # the feeds on which candidates are judged

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def find(self, candidate: Model) -> Outcome:
        """Draw feeds until the candidate fails, and keep the first few on which it does.

        To be called once: after it the original's sessions, which may be large, are closed.
        """
        with self._stack:
            return self._find(candidate)

    def _find(self, candidate: Model) -> Outcome:
        path = self._written(candidate, "candidate")
        runs: dict[str, list[Run]] = {way: [] for way in _WAYS}
        while batch := list(itertools.islice(self._source, _BATCH)):
            self._kinds += [kind for kind, _ in batch]
            self._feeds += [feed for _, feed in batch]
            fresh = range(len(self._feeds) - len(batch), len(self._feeds))
            for way, session in self._sessions.items():
                self._runs[way] += self._run(session, fresh)
            self._signals = {
                name: self._state(name, self._runs).signals() for name in self._outputs
            }
            try:
                for way in _WAYS:
                    with self._session(path, way) as session:
                        runs[way] += self._run(session, fresh)
            except RuntimeFailure as failure:
                self._kept = list(range(min(_KEPT, len(self._feeds))))
                return Outcome(math.inf, math.inf, str(failure))
            self._kept = self._failing(runs)
            if self._kept and math.isfinite(self._judged(runs).share):
                self._measure_noise()
                self._kept = self._failing(runs)
            if self._kept:
                outcome = self._judged(runs)
                self._kept = self._kept[:_KEPT]
                return outcome
        return Outcome()

    def _failing(self, runs: Mapping[str, Sequence[Run]]) -> list[int]:
        return [at for at in range(len(self._feeds)) if self._judged(runs, [at]).problem]

    def _measure_noise(self) -> None:
        """More draws of the original's noise, as `graphopt.validate` takes before it condemns."""
        path = self._folder / "original.onnx"
        for way in _MORE_WAYS:
            with self._session(path, way) as session:
                done = len(self._runs.setdefault(way, []))
                self._runs[way] += self._run(session, range(done, len(self._feeds)))
        done = len(self._runs.setdefault("nudged", []))
        for at in range(done, len(self._feeds)):
            feed = nudge.nudged(self._feeds[at], at)
            self._runs["nudged"].append(run(self._sessions["off"], feed, list(self._outputs)))
        for draw in range(nudge.DRAWS):
            self._run_nudged(path, draw)

    def _run_nudged(self, path: Path, draw: int) -> None:
        runs = self._runs.setdefault(f"nudged weights {draw}", [])
        copy = path.with_name(f"nudged{draw}.onnx")
        if not copy.exists():
            nudge.write_nudged(path, copy, draw)
        with self._session(copy, "off") as session:
            runs += self._run(session, range(len(runs), len(self._feeds)))

    def outcome(self, candidate: Model) -> Outcome:
        """Judge another candidate on the feeds that were kept."""
        path = self._written(candidate, "candidate")
        runs: dict[str, list[Run]] = {}
        try:
            for way in _WAYS:
                # at the places of the other feeds: no values at all
                runs[way] = [{name: [] for name in self._outputs} for _ in self._feeds]
                with self._session(path, way) as session:
                    for at, found in zip(self._kept, self._run(session, self._kept), strict=True):
                        runs[way][at] = found
        except RuntimeFailure as failure:
            return Outcome(math.inf, math.inf, str(failure))
        return self._judged(runs)

    def step(self, before: Outcome, after: Outcome) -> Outcome:
        """Judge what lies between two candidates, as if the first were the original."""
        if not (before.runs and after.runs):
            return after
        return self._judged(after.runs, reference=before.runs)

    def divergence(self, candidate: Model, outcome: Outcome) -> Divergence | None:
        """Where a candidate leaves the original, as far as values inside tell.

        What is small beside the candidate's error is taken for rounding of right rewrites.
        """
        allowed = self._tolerance
        if math.isfinite(outcome.error):
            allowed = max(allowed, _OF_THE_FAULT * outcome.error)
        return self._divergence(self._model, candidate, allowed)

    def divergence_between(self, before: Model, after: Model) -> Divergence | None:
        """Where one candidate leaves another."""
        return self._divergence(before, after, self._tolerance)

    def _divergence(self, reference: Model, candidate: Model, allowed: float) -> Divergence | None:
        feeds = [(self._kinds[at], self._feeds[at]) for at in self._kept]
        pair = Pair(reference, candidate, feeds, allowed, self._folder, self._custom_ops)
        return pair.first_divergence() if feeds else None

    # -- runs ----------------------------------------------------------------------------------

    def _written(self, model: Model, name: str) -> Path:
        return write_exposed(model, self._folder / f"{name}.onnx")

    def _session(self, path: Path, way: Level) -> Session:
        return FixedSession(path, self._shapes, optimizations=way, custom_ops=self._custom_ops)

    def _run(self, session: Session, indices: Sequence[int]) -> list[Run]:
        return [run(session, self._feeds[at], list(self._outputs)) for at in indices]

    def _state(self, name: str, original: Mapping[str, Sequence[Run]]) -> OutputState:
        state = OutputState(name, self._outputs[name], self._depends[name], self._kinds)
        for way, runs in original.items():
            state.runs[f"original {way}"] = [one[name] for one in runs]
        return state

    def _judged(
        self,
        runs: Mapping[str, Sequence[Run]],
        indices: Sequence[int] | None = None,
        reference: Mapping[str, Sequence[Run]] | None = None,
    ) -> Outcome:
        """The worst of all outputs on these feeds, by default those that were kept."""
        settle = ties.Settler(self._model, self._feeds, self._custom_ops, self._tolerance)
        share = error = 0.0
        problem = ""
        for name in self._outputs:
            state = self._state(name, reference or self._runs)
            for way in _WAYS:
                state.runs[f"candidate {way}"] = [one[name] for one in runs[way]]
            for at in self._kept if indices is None else indices:
                found = judge(state, at, self._signals[name][at], self._tolerance, _WAYS)
                if found.problem and settle.is_tie(state, at):
                    continue
                share = max(share, found.used)
                error = max(error, found.error_off, found.error_default)
                if found.problem:
                    problem = problem or f"output {name!r}: {found.problem}"
        return Outcome(share, error, problem, runs)
