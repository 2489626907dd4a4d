"""Metrics of the user's: what they may return, and one clear line for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import RuntimeFailure, UsageError
from graphopt.metric import Score, difference, load_metric
from graphopt.runtime import Session
from tests import graphs

CODE = """
import numpy as np

def total(run):
    return float(run({"x": 3})["y"])

def vector(run):
    return [run({"x": at})["y"] for at in range(4)]

def both(run):
    raise AssertionError("not called")

both.per_sample = lambda run: np.arange(3.0)

def wrong_per_sample(run):
    return 1.0

wrong_per_sample.per_sample = lambda run: 1.0
broken = lambda run: {}["missing"]
lines = lambda run: (_ for _ in ()).throw(ValueError("first\\n  second"))
nothing = lambda run: None
text = lambda run: "good"
nan = lambda run: float("nan")
infinite = lambda run: [1.0, float("inf")]
matrix = lambda run: np.zeros((2, 2))
empty = lambda run: []
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(CODE)
    return path


def double(feed: Any) -> dict[str, Any]:
    return {"y": 2 * feed["x"]}


def test_numbers_and_vectors(file: Path) -> None:
    total = load_metric(f"{file}:total")(double)
    assert (total.value, total.samples, total.standard_error) == (6.0, None, None)
    vector = load_metric(f"{file}:vector")(double)
    assert vector.value == 3.0
    assert vector.samples is not None
    assert vector.samples.tolist() == [0, 2, 4, 6]
    assert vector.standard_error == pytest.approx(np.std([0, 2, 4, 6], ddof=1) / 2)
    assert load_metric(f"{file}:both")(double).value == 1.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "KeyError: 'missing'"),
        ("lines", "ValueError: first second"),
        ("nothing", "it returns NoneType, not a number"),
        ("text", "it returns str, not a number"),
        ("nan", "it returns nan, not a number"),
        ("infinite", "it returns inf, not a number"),
        ("matrix", "it returns an array of [2, 2], not a number"),
        ("empty", "it returns an array of [0], not a number"),
        ("wrong_per_sample", "it returns an array of [], not one score per sample"),
    ],
)
def test_what_a_metric_must_not_return(file: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_metric(f"{file}:{name}")(double)
    assert str(caught.value) == f"metric {file}:{name}: {said}"


def test_what_cannot_be_loaded(file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("import nonexistent_module_of_mine\n")
    for spec, said in (
        (f"{file}", "write it as file.py:function"),
        (":f", "write it as file.py:function"),
        (f"{file}:", "write it as file.py:function"),
        (f"{tmp_path}/none.py:f", "no such file"),
        (f"{tmp_path}/bad.py:f", "SyntaxError"),
        (f"{tmp_path}/fails.py:f", "ModuleNotFoundError"),
        ("nonexistent_module_of_mine:f", "ModuleNotFoundError"),
        (f"{file}:other", "there is no other in"),
        (f"{file}:number", "number is no function"),
    ):
        with pytest.raises(UsageError, match=r"^metric ") as caught:
            load_metric(spec)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_the_metrics_error(file: Path) -> None:
    def fails(feed: Any) -> dict[str, Any]:
        raise RuntimeFailure("input 'x' is missing")

    with pytest.raises(UsageError, match=r"metric .*: input 'x' is missing"):
        load_metric(f"{file}:total")(fails)


def test_the_accuracy_of_digits() -> None:
    (model,) = [file for file in graphs.DIGITS if file.stem == "mlp"]
    metric = load_metric(f"{model.with_name('score.py')}:accuracy")
    with Session(model) as session:
        assert metric(session.run).value == pytest.approx(0.9926, abs=1e-4)


# ----------------------------------------------------------------------------- differences


def test_the_interval_is_of_pairs() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=400) * 5
    paired = rng.normal(size=400) * 0.1 - 0.02
    found = difference(Score(a.mean(), a), Score((a + paired).mean(), a + paired))
    assert found.value == pytest.approx(paired.mean())
    assert found.n == 400
    reach = 1.96 * paired.std(ddof=1) / 20
    assert found.low == pytest.approx(paired.mean() - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(paired.mean() + reach, abs=0.1 * reach)
    again = difference(Score(a.mean(), a), Score((a + paired).mean(), a + paired))
    assert found == again


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for at in range(200):
        pair = rng.exponential(size=60) - 1
        found = difference(Score(0, np.zeros(60)), Score(pair.mean(), pair), seed=at)
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 0 <= found.high
    assert missed <= 20  # 5 % of 200, and percentiles are a little short


def test_without_samples_there_is_no_interval() -> None:
    for a, b in (
        (Score(1.0), Score(3.0)),
        (Score(1.0, np.ones(2)), Score(3.0)),
        (Score(1.0, np.ones(2)), Score(3.0, np.ones(3))),
    ):
        found = difference(a, b)
        assert (found.value, found.low, found.high, found.n) == (2.0, None, None, None)
