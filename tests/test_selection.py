"""Feeds to learn from and feeds to judge by: apart where something is fitted, else the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.judging import Budget
from graphopt.search import Trial
from graphopt.selection import Asked, Selection
from tests.prune_runs import DIGITS, decide

CNN = DIGITS / "cnn.onnx"


def numbered(folder: Path, count: int) -> str:
    """Feeds that say which they are."""
    np.savez(
        folder / "feeds.npz",
        image=np.arange(count, dtype=np.float32).repeat(64).reshape(-1, 1, 8, 8),
    )
    return str(folder / "feeds.npz")


def selection(**asked: Any) -> Selection[None]:
    return Selection(CNN, CNN, Asked(**asked), lambda *_: None, lambda recipe, number: CNN)


def numbers(feeds: Any) -> list[int]:
    return [int(feed["image"].flat[0]) for feed in feeds]


def test_every_fourth_feed_is_for_judging_alone(tmp_path: Path) -> None:
    found = selection(data=numbered(tmp_path, 10), holds_out=True)
    assert found.holds_out
    assert numbers(found.feeds()) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert numbers(found._judged()) == [3, 7]
    assert numbers(found._judged(1)) == [3]


@pytest.mark.parametrize(
    "asked",
    [
        {"holds_out": False},
        {"holds_out": True, "budget": Budget(metric=f"{DIGITS / 'score.py'}:accuracy")},
    ],
)
def test_where_nothing_is_fitted_or_a_metric_judges_all_count(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    found = selection(data=numbered(tmp_path, 8), **asked)
    assert not found.holds_out
    assert numbers(found.feeds()) == numbers(found._judged()) == list(range(8))


def test_too_few_feeds_are_not_divided(tmp_path: Path) -> None:
    found = selection(data=numbered(tmp_path, 3), holds_out=True)
    assert not found.holds_out
    assert numbers(found.feeds()) == numbers(found._judged()) == [0, 1, 2]
    enough = selection(data=numbered(tmp_path, 4), holds_out=True)
    assert (numbers(enough.feeds()), numbers(enough._judged())) == ([0, 1, 2], [3])


def test_what_is_fitted_is_compared_on_other_feeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide(monkeypatch, 1.0)
    with np.load(DIGITS / "calibration.npz") as data:
        np.savez(tmp_path / "data.npz", image=data["image"][:48])
    options: dict[str, Any] = {"data": str(tmp_path / "data.npz"), "force": True}
    out = tmp_path / "out.onnx"
    found = graphopt.optimize(CNN, out, sparsity=0.95, **options).report.prune
    assert found is not None
    assert (found.held_out, found.feeds) == (True, 36)
    assert "on 12 feeds" in found.found
    plain = graphopt.optimize(CNN, out, sparsity=0.5, recover="none", importance="lamp", **options)
    assert plain.report.prune is not None
    assert not plain.report.prune.held_out
    assert "on 32 feeds" in plain.report.prune.found


def test_the_least_bad_is_one_that_runs() -> None:
    from graphopt.judging import Judged
    from graphopt.search import Verdict
    from graphopt.selection import least_bad

    def trial(name: str, verdict: Verdict) -> Trial[None]:
        return Trial(name, None, CNN, verdict)

    broken = trial("broken", Verdict(False, 0.0, "it does not run"))
    bad, worse = (trial(str(d), Judged(False, d, "")) for d in (0.2, 0.3))
    assert least_bad([broken, worse, bad]) is bad
    assert least_bad([broken]) is None
