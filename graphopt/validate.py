"""Original against candidate: the proof without which nothing is written.

Both models run on the same feeds, with onnxruntime's optimisations off, which proves the rewrite,
and at the default level, which shows what users get. The original's own spread between the two is
the noise floor that the candidate's error is judged against (`graphopt.judge`).
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from graphopt import exporter, fixed, nudge, oracle, output, proposals, ties
from graphopt.data import given_feeds
from graphopt.errors import DataError, RuntimeFailure, UnprovenError
from graphopt.fixed import FixedSession, Shapes
from graphopt.ir import Model
from graphopt.judge import TOLERANCES, Judgement, OutputState, flatten, judge, noise_of
from graphopt.report import FeedRecord, OutputRecord, ValidationRecord, Verdict
from graphopt.runtime import Level, Port, Session, limits

Progress = Callable[[str, float | None], None]

_WAYS: Final[tuple[Level, Level]] = ("off", "default")
_MORE_LEVELS: Final[tuple[Level, Level]] = ("basic", "extended")
_MOST_FEEDS: Final = 24
_FEWEST_FEEDS: Final = 6
# Two feeds tell how much an output of many elements varies. One number may well be almost the same
# in both, and dividing by that would call rounding an error: such outputs get more feeds alike.
_FEW_ELEMENTS: Final = 8
_ALIKE: Final = 3
_SECONDS: Final = 30.0  # aimed at for all runs together; slow models get fewer feeds
_ROUNDS: Final = 3  # of feeds, until none that says nothing is unreplaced or that seems hopeless


def validate_files(
    original: Path,
    candidate: Path,
    *,
    data: str | None = None,
    custom_ops: Sequence[Path] = (),
    seed: int = 0,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> ValidationRecord:
    """Compare two model files.

    `data` names the feeds (see `graphopt.data`); without it they are proposed, and accepted only
    if the original runs on them. `shapes` fixes shapes of inputs by name, for a candidate that
    takes no others; a size below 1 is as the original has it. Raises UsageError for files and data
    that cannot be used; what the comparison finds, inability included, is the record's verdict.
    """
    started = time.perf_counter()
    held = shapes or {}
    comparison = _Comparison(original, candidate, data, custom_ops, seed, held, progress)
    try:
        record = comparison.run()
    except UnprovenError as error:
        record = ValidationRecord(verdict="unproven", reason=str(error))
    return record.model_copy(update={"seconds": time.perf_counter() - started})


@dataclass
class _Comparison:
    original: Path
    candidate: Path
    data: str | None
    custom_ops: Sequence[Path]
    seed: int
    shapes: Shapes
    progress: Progress | None
    feeds: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> ValidationRecord:
        model = Model.load(self.original)
        if reason := oracle.obstacle(model, bool(self.custom_ops)):
            raise UnprovenError(reason)
        self.notes += filter(None, [fixed.note(self.shapes)])
        with ExitStack() as stack:
            original = self._readable(model, stack)
            candidate = self._readable(Model.load(self.candidate), stack)
            with self._session(original, "off", "the original") as session:
                ports = session.outputs
                inputs = session.inputs
                states = [
                    OutputState(p.name, p.type, oracle.depends_on_values(model, p.name))
                    for p in ports
                ]
                feeds = self._proposals(model, session)
                self._draw(feeds, self._wanted(session, feeds))
                self._execute(session, states, "original off")
            if problem := self._interface(candidate, inputs, ports):
                return ValidationRecord(verdict="failed", reason=problem)
            self._all(original, states, "original", ("default",))
            self._more(original, model, states)
            try:
                self._all(candidate, states, "candidate", _WAYS)
            except RuntimeFailure as failure:
                reason = f"the candidate does not run where the original does: {failure}"
                return ValidationRecord(verdict="failed", reason=reason)
            record = self._verdict(model, states)
            if any(o.verdict == "failed" and math.isfinite(o.used) for o in record.outputs):
                self._measure_noise(original, states)
                record = self._verdict(model, states)
            return record

    def _measure_noise(self, original: Path, states: list[OutputState]) -> None:
        """More draws of the original's noise, before a candidate that exceeds one is condemned.

        One spread is one draw, and it is zero where onnxruntime happens to find nothing to fuse.
        The further levels fuse differently; and feeds and weights that lie one unit in the last
        place away are the same to anybody, so that what they change is noise too.
        """
        self._all(original, states, "original", _MORE_LEVELS)
        feeds = [nudge.nudged(feed, index) for index, feed in enumerate(self.feeds)]
        with self._session(original, "off", "the original") as session:
            self._execute(session, states, "original nudged", feeds)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            for draw in range(nudge.DRAWS):
                nudge.write_nudged(original, copy := Path(folder, f"{draw}.onnx"), draw)
                with self._session(copy, "off", "the original") as session:
                    self._execute(session, states, f"original nudged weights {draw}")

    def _readable(self, model: Model, stack: ExitStack) -> Path:
        """The model's file, or a copy of a lower IR version where onnxruntime reads no higher."""
        if model.proto.ir_version <= limits().ir:
            return Path(model.label)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-")))
        proto = exporter.to_hollow(model)
        proto.ir_version = limits().ir
        note = f"compared on copies with IR version {limits().ir}, the newest onnxruntime reads"
        if note not in self.notes:
            self.notes.append(note)
        return output.write(proto, model.store, folder / "model.onnx")[0]

    def _session(self, path: Path, level: Level, what: str) -> Session:
        try:
            return FixedSession(path, self.shapes, optimizations=level, custom_ops=self.custom_ops)
        except RuntimeFailure as failure:
            if what != "the original":
                raise
            raise UnprovenError(f"onnxruntime does not load {what}: {failure}") from None

    def _tell(self, what: str, share: float | None) -> None:
        if self.progress is not None:
            self.progress(what, share)

    # -- feeds -----------------------------------------------------------------------------------

    def _proposals(self, model: Model, session: Session) -> Iterator[tuple[str, dict[str, Any]]]:
        self._tell("finding feeds", None)
        if self.data is not None:
            return (("given", feed) for feed in given_feeds(self.data, session, _MOST_FEEDS))
        return proposals.propose(model, session, seed=self.seed)

    def _wanted(self, session: Session, feeds: Iterator[tuple[str, dict[str, Any]]]) -> int:
        """Feeds that fit the time, from how long the first takes."""
        self._draw(feeds, 1)
        if not session.inputs:
            return 0
        started = time.perf_counter()
        results = session.run(self.feeds[0])
        seconds = time.perf_counter() - started
        smallest = min((array.size for v in results.values() for array in flatten(v)), default=0)
        fitting = int(_SECONDS / 4 / max(seconds, 1e-6))
        most = _MOST_FEEDS
        if smallest < _FEW_ELEMENTS:  # in a third of the time, where that is enough for more
            most = max(most, min(_ALIKE * most, fitting // 3))
        return min(most, max(_FEWEST_FEEDS, fitting)) - 1

    def _draw(self, feeds: Iterator[tuple[str, dict[str, Any]]], count: int) -> None:
        for kind, feed in itertools.islice(feeds, count):
            self.kinds.append(kind)
            self.feeds.append(feed)

    def _more(self, original: Path, model: Model, states: list[OutputState]) -> None:
        """Replace feeds that prove nothing about an output by others, of kinds that do if any."""
        wanted = len(self.feeds)
        for round_number in range(1, _ROUNDS):
            proving = [_proving_feeds(state) for state in states]
            missing = wanted - min(map(len, proving), default=wanted)
            if self.data is not None or missing <= 0:
                return
            # for the output that lacks most: what is drawn like a feed that told something
            telling = {self.kinds[index] for index in min(proving, key=len)}
            with self._session(original, "off", "the original") as session:
                if not session.inputs:
                    return
                feeds = proposals.propose(model, session, seed=self.seed + round_number)
                some = itertools.islice(feeds, _MOST_FEEDS * missing)
                self._draw((f for f in some if not telling or f[0] in telling), missing)
                self._execute(session, states, "original off")
            self._all(original, states, "original", ("default",))

    # -- runs ------------------------------------------------------------------------------------

    def _all(
        self, path: Path, states: list[OutputState], who: str, levels: Sequence[Level]
    ) -> None:
        for level in levels:
            with self._session(path, level, f"the {who}") as session:
                self._execute(session, states, f"{who} {level}")

    def _execute(
        self,
        session: Session,
        states: list[OutputState],
        way: str,
        feeds: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Run the feeds that have not run this way yet, or others in their place."""
        names = [state.name for state in states]
        done = len(states[0].runs.get(way, ())) if states else 0
        for index in range(done, len(self.feeds)):
            self._tell(f"running {way}", index / len(self.feeds))
            try:
                results = session.run((feeds or self.feeds)[index], names)
            except RuntimeFailure as failure:
                if way == "original off" and self.data is not None:
                    raise DataError(
                        f"data {self.data}: the model rejects feed {index + 1}: {failure}"
                    ) from None
                if way == "original default":
                    raise UnprovenError(
                        f"the original runs only with onnxruntime's optimisations off: {failure}"
                    ) from None
                raise
            for state in states:
                state.runs.setdefault(way, []).append(flatten(results[state.name]))
                if way == "original off":
                    state.groups.append(self.kinds[index])

    def _interface(self, candidate: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
        """What differs between the two interfaces; "" where nothing does."""
        try:
            with Session(candidate, optimizations="off", custom_ops=self.custom_ops) as session:
                found = (session.inputs, session.outputs)
        except RuntimeFailure as failure:
            return f"onnxruntime does not load the candidate: {failure}"
        for what, before, after in (
            ("inputs", inputs, found[0]),
            ("outputs", outputs, found[1]),
        ):
            if [(p.name, p.type) for p in before] != [(p.name, p.type) for p in after]:
                listed = [", ".join(f"{p.name} {p.type}" for p in side) for side in (before, after)]
                return f"the {what} differ: {listed[0]} became {listed[1]}"
        return ""

    # -- judgement -------------------------------------------------------------------------------

    def _verdict(self, model: Model, states: list[OutputState]) -> ValidationRecord:
        tolerance = TOLERANCES[oracle.narrowest_float(model)]
        records = []
        for state in states:
            settle = ties.Settler(model, self.feeds, self.custom_ops, tolerance)
            records.append(_judge_output(state, tolerance, self.kinds, settle))
        failed = next((r for r in records if r.verdict == "failed"), None)
        unproven = [r.name for r in records if r.verdict == "unproven"]
        verdict: Verdict = "failed" if failed else "unproven" if unproven else "proved"
        reason = ""
        if failed:
            reason = f"output {failed.name!r}: {failed.reason}"
        elif unproven:
            reason = (
                f"none of {len(self.feeds)} feeds says anything about "
                f"{', '.join(map(repr, unproven[:4]))} (constant, empty, not finite, or noise "
                "over 1 % of the signal); give --data"
            )
        return ValidationRecord(
            verdict=verdict,
            reason=reason,
            tolerance=tolerance,
            feeds=[_feed_record(k, f) for k, f in zip(self.kinds, self.feeds, strict=True)],
            outputs=records,
            notes=self.notes,
        )


def _judge_output(
    state: OutputState, tolerance: float, kinds: Sequence[str], settle: ties.Settler
) -> OutputRecord:
    judgements: list[Judgement] = []
    problem = ""
    for index, signal in enumerate(state.signals()):
        found = judge(state, index, signal, tolerance, _WAYS)
        if found.problem and settle.is_tie(state, index):
            found = Judgement(True, found.signal, found.noise)
        judgements.append(found)
        if found.problem and not problem:
            problem = f"{found.problem} on feed {index + 1} ({kinds[index]})"
            if found.used < float("inf"):
                problem += f", {found.used:.1f} times what is allowed (noise {found.noise:.2g})"
    telling = [j for j in judgements if j.informative]
    rms = max((j.error_rms for j in telling), default=0.0)
    verdict: Verdict = "failed" if problem else "proved" if telling else "unproven"
    return OutputRecord(
        name=state.name,
        type=state.type,
        feeds=len(telling),
        signal=max((j.signal for j in judgements), default=0.0),
        noise=max((j.noise for j in telling), default=0.0),
        error_off=max((j.error_off for j in telling), default=0.0),
        error_default=max((j.error_default for j in telling), default=0.0),
        used=max((j.used for j in telling), default=0.0),
        sqnr_db=oracle.decibels(rms),
        verdict=verdict,
        reason=problem,
    )


def _proving_feeds(state: OutputState) -> list[int]:
    """Indices of the feeds that can prove something about the output."""
    signals = enumerate(state.signals())
    return [index for index, signal in signals if noise_of(state, index, signal)[1]]


def _feed_record(kind: str, feed: Mapping[str, Any]) -> FeedRecord:
    shapes = {name: list(value.shape) for name, value in feed.items() if hasattr(value, "shape")}
    return FeedRecord(kind=kind, shapes=shapes)
