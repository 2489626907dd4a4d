"""Whether a lossy candidate is good enough: by a metric, or by agreement with the original.

Without labels nothing can be said of scores, but how far a candidate agrees with its original can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from graphopt.errors import RuntimeFailure
from graphopt.ir import Model, Value
from graphopt.metric import Metric, Score, difference, load_metric
from graphopt.operators import PASSES_SCORES, SCORES
from graphopt.quality import Quality, compare
from graphopt.runtime import Session
from graphopt.search import Verdict

Feeds = Callable[[int | None], Iterable[Mapping[str, Any]]]

_MOST_FEEDS: Final = 32
_MOST_BYTES: Final = 256 << 20  # of feeds and the original's outputs, which are kept


@dataclass(frozen=True)
class Budget:
    """What may be lost: of the metric, or of agreement; or the signal to noise that must be left.

    `min_sqnr` in dB takes the place of agreement where it is given; a metric counts as well.
    """

    max_drop: float = 0.01
    metric: str | None = None
    min_sqnr: float | None = None


@dataclass(frozen=True)
class Judged(Verdict):
    """A verdict with the numbers behind it: scores by the metric, or agreement, where 1 is best."""

    before: float = 1.0
    after: float = 0.0
    quality: Quality | None = None


class Judge:
    """Compares candidates with the original, which is loaded and scored once."""

    def __init__(
        self, original: Path, feeds: Feeds, budget: Budget, custom_ops: Sequence[Path] = ()
    ) -> None:
        self._original = original
        self._feeds = feeds
        self._budget = budget
        self._custom_ops = custom_ops
        self._metric: Metric | None = load_metric(budget.metric) if budget.metric else None
        self._session: Session | None = None
        self._score: Score | None = None
        self._known: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        self.classes = unlike_classes(Model.load(original))
        self.qualities: dict[Path, Quality] = {}

    def __enter__(self) -> Self:
        self._session = Session(self._original, custom_ops=self._custom_ops)
        if self._metric is not None:
            self._score = self._metric(self._session.run)
        else:
            self._known = list(self._remembered(self._session))
        return self

    def _remembered(
        self, session: Session
    ) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Feeds with what the original gives for them, as many as memory is set aside for."""
        room = _MOST_BYTES
        for feed in self._feeds(_MOST_FEEDS):
            outputs = session.run(feed)
            yield feed, outputs
            room -= sum(np.asarray(v).nbytes for part in (feed, outputs) for v in part.values())
            if room < 0:
                return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        self._session.close()

    def __call__(self, candidate: Path) -> Verdict:
        """The verdict on a file. One that onnxruntime refuses, or that fails, is not good."""
        assert self._session is not None
        try:
            with Session(candidate, custom_ops=self._custom_ops) as session:
                if self._metric is not None:
                    return self._by_metric(session)
                quality = self._compared(session)
        except RuntimeFailure as failure:
            return Verdict(False, 1.0, f"it does not run: {failure}")
        self.qualities[candidate] = quality
        return self._by_agreement(quality)

    def noise(self, candidate: Path, most: int) -> float:
        """How far a candidate is from the original on at most so many feeds: `Quality.noise`."""
        with Session(candidate, custom_ops=self._custom_ops) as session:
            return self._compared(session, most).noise

    def _compared(self, session: Session, most: int | None = None) -> Quality:
        assert self._session is not None
        if not self._known:
            self._known = list(self._remembered(self._session))
        outputs = {id(feed): known for feed, known in self._known}
        feeds = [feed for feed, _ in self._known[:most]]
        return compare(lambda feed: outputs[id(feed)], session.run, feeds, classes=self.classes)

    def _by_metric(self, session: Session) -> Verdict:
        assert self._metric is not None
        assert self._score is not None
        found = self._metric(session.run)
        drop = -difference(self._score, found).value
        text = f"{self._budget.metric} {found.value:.4f}, {self._score.value:.4f} before"
        good = drop <= self._budget.max_drop
        quality = None
        if self._budget.min_sqnr is not None:
            quality = self._compared(session)
            good = good and self._has_signal(quality)
            text += _sqnr(quality)
        return Judged(good, drop, text, self._score.value, found.value, quality)

    def _by_agreement(self, quality: Quality) -> Verdict:
        text = f"agreement {quality.agreement:.4f}{_sqnr(quality)} on {quality.feeds} feeds"
        if self._budget.min_sqnr is not None:
            good = self._has_signal(quality)
        else:
            good = quality.drop <= self._budget.max_drop
        return Judged(good, quality.drop, text, 1.0, quality.agreement, quality)

    def _has_signal(self, quality: Quality) -> bool:
        least = self._budget.min_sqnr
        enough = least is None or quality.sqnr_db is None or quality.sqnr_db >= least
        return enough and quality.agreement > 0


def _sqnr(quality: Quality) -> str:
    return "" if quality.sqnr_db is None else f", SQNR {quality.sqnr_db:.1f} dB"


def unlike_classes(model: Model) -> dict[str, None]:
    """Outputs whose largest number means nothing, by what computes them: embeddings, boxes."""
    return {value.name: None for value in model.graph.outputs if not _gives_scores(value)}


def _gives_scores(value: Value) -> bool:
    node = value.producer
    while node is not None and not node.domain and node.op in PASSES_SCORES:
        source = next((v for v in node.inputs if v is not None and v.producer is not None), None)
        node = source.producer if source is not None else None
    return node is None or node.op in SCORES
