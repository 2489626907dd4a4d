"""Models on which random search once found a fault, and a few seconds of the search itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest

from benchmarks import fuzz
from graphopt.passes.pipelines import LEVELS
from tests.fuzzing.checks import Subject

CORPUS = sorted((Path(__file__).parent / "data" / "fuzz").glob("*.txt"))
SECONDS = 20
FIRST_SEED = 10**6


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_once_failed(path: Path) -> None:
    """At both levels, and through the passes that the first line names, if they are no level."""
    comment, _, text = path.read_text().partition("\n")
    subject = Subject(onnx.parser.parse_model(text))
    way = comment.removeprefix("# ").partition(":")[0]
    for level in (1, 2):
        assert subject.problem(LEVELS[level]) == ""
    if not way.startswith("level "):
        assert subject.problem(way, settles=False) == ""


@pytest.mark.slow
def test_a_few_seconds_of_new_models() -> None:
    found = list(fuzz.outcomes(itertools.count(FIRST_SEED), 1, SECONDS))
    assert [fuzz.told(failure) for _, failures in found for failure in failures] == []
    assert sum(verdict == "checked" for verdict, _ in found) > 0.9 * len(found)
