"""Quality against a plain reference that sees all data at once, and the choices it counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from graphopt.choices import Choices, Tally
from graphopt.errors import RuntimeFailure, UsageError
from graphopt.quality import OutputQuality, Quality, agreement, compare
from graphopt.runtime import Session
from tests import graphs

RNG = np.random.default_rng


def run(outputs: list[dict[str, Any]]) -> Any:
    """A model that gives prepared outputs, by the number it is fed."""
    return lambda feed: outputs[feed["at"]]


def compared(original: list[Any], candidate: list[Any], **options: Any) -> OutputQuality:
    feeds = [{"at": at} for at in range(len(original))]
    pairs = [[{"y": y} for y in side] for side in (original, candidate)]
    (found,) = compare(run(pairs[0]), run(pairs[1]), feeds, **options).outputs
    return found


def softmax(x: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


# --------------------------------------------------------------------------- real numbers


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_sums_are_those_of_all_data_at_once(offset: float) -> None:
    rng = RNG(0)
    x = [rng.normal(size=(n, 5, 7)) * 3 + offset + n for n in (1, 4, 2, 9)]
    y = [a + rng.normal(size=a.shape) * 0.1 for a in x]
    found = compared(x, y)
    a, b = (np.concatenate([v.ravel() for v in side]) for side in (x, y))
    assert (found.kind, found.n, found.feeds) == ("real", a.size, 4)
    assert found.signal == pytest.approx(a.var(), rel=1e-9)
    assert found.noise == pytest.approx(((a - b) ** 2).mean(), rel=1e-9)
    assert found.sqnr_db == pytest.approx(10 * np.log10(a.var() / ((a - b) ** 2).mean()), rel=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
    total = a.var() + b.var() + (a.mean() - b.mean()) ** 2  # Lin's concordance
    assert found.agreement == pytest.approx(1 - ((a - b) ** 2).mean() / total, rel=1e-6)


def test_the_error_of_decibels_is_that_of_repeated_experiments() -> None:
    """Feeds whose noise differs, drawn anew many times: the spread of the dB is what is stated."""
    rng = RNG(1)
    found, stated = [], []
    for _ in range(400):
        x = [rng.normal(size=200) for _ in range(30)]
        y = [a + rng.normal(size=200) * 0.1 * np.exp(rng.normal() * 0.4) for a in x]
        one = compared(x, y)
        found.append(one.sqnr_db)
        stated.append(one.sqnr_standard_error)
    spread = np.std([f for f in found if f is not None])
    assert np.mean([s for s in stated if s is not None]) == pytest.approx(spread, rel=0.15)


def test_equal_outputs() -> None:
    x = [RNG(0).normal(size=(2, 3, 4))] * 2
    found = compared(x, x)
    assert (found.sqnr_db, found.noise, found.agreement) == (math.inf, 0, 1)
    assert found.sqnr_standard_error is None
    assert found.correlation == pytest.approx(1)


def test_a_constant_output_has_its_magnitude_for_signal() -> None:
    x = [np.full(6, 2.0)] * 2
    near, far = [np.full(6, 2.02)] * 2, [np.full(6, 9.0)] * 2
    assert compared(x, near).signal == 4.0
    assert compared(x, near).sqnr_db == pytest.approx(40)
    assert compared(x, near).correlation is None
    assert compared(x, far).agreement == 0
    zero = [np.zeros(6)] * 2
    assert compared(zero, near).sqnr_db == -math.inf
    assert compared(zero, near).agreement == 0
    assert compared(zero, zero).agreement == 1


def test_noise_as_large_as_the_signal_agrees_in_nothing() -> None:
    x = [RNG(0).normal(size=(3, 3, 30))]
    assert compared(x, [-a for a in x]).agreement == 0
    assert compared(x, [-a for a in x]).correlation == pytest.approx(-1)


def test_nan_and_infinity() -> None:
    x = np.array([[1.0, np.nan, np.inf, 3.0]])
    same = compared([x], [x.copy()])
    assert (same.broken, same.noise, same.agreement) == (0, 0, 1)
    y = np.array([[1.0, 2.0, -np.inf, np.nan]])
    other = compared([x], [y])
    assert (other.broken, other.agreement, other.noise) == (3, 0, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_all_float_types(dtype: Any) -> None:
    x, y = np.array([[[1, 2, 3, 4]]], dtype), np.array([[[1, 2, 3, 5]]], dtype)
    assert compared([x], [y]).noise == pytest.approx(0.25)


def test_complex_numbers() -> None:
    x = np.array([[[1 + 1j, 2]]])
    assert compared([x], [x + 1j]).noise == pytest.approx(0.5)


# -------------------------------------------------------------------------------- choices


def test_probabilities_choose_along_their_axis() -> None:
    rng = RNG(2)
    scores = rng.normal(size=(6, 4, 9)) * 3
    other = scores.copy()
    other[0, 0] = -other[0, 0]
    for axis, rows in ((-1, 24), (1, 54)):
        found = compared([softmax(scores, axis)], [softmax(other, axis)])
        a, b = (softmax(s, axis).argmax(axis) for s in (scores, other))
        assert (found.kind, found.choice is not None) == ("classes", True)
        assert found.choice is not None
        assert found.choice.n + found.choice.excluded == rows
        assert found.choice.share == pytest.approx((a == b).mean(), abs=2 / rows)
        rows_of = np.moveaxis(softmax(scores, axis), axis, -1).reshape(rows, -1)
        chosen = np.moveaxis(softmax(other, axis), axis, -1).reshape(rows, -1).argmax(-1)
        lost = [row.max() - row[at] for row, at in zip(rows_of, chosen, strict=True)]
        assert found.agreement == pytest.approx(1 - np.mean(lost))
        assert found.agreement < 1
    logarithms = compared([np.log(softmax(scores))], [np.log(softmax(other))])
    assert logarithms.kind == "classes"


def test_scores_of_a_matrix_are_classes_and_embeddings_are_not() -> None:
    x = RNG(3).normal(size=(50, 10))
    assert compared([x], [x]).kind == "classes"
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert compared([unit], [unit]).kind == "real"
    assert compared([x[:, :2]], [x[:, :2]]).kind == "real"
    assert compared([x], [x], classes={"y": None}).kind == "real"
    cube = RNG(3).normal(size=(2, 3, 4, 5))
    assert compared([cube], [cube]).kind == "real"
    stated = compared([cube], [cube], classes={"y": 1})
    assert stated.choice is not None
    assert (stated.kind, stated.choice.n + stated.choice.excluded) == ("classes", 40)


def test_what_holds_for_some_feeds_only_does_not_hold() -> None:
    rows = softmax(RNG(4).normal(size=(3, 2, 5)))
    assert compared([rows, rows], [rows, rows]).kind == "classes"
    assert compared([rows, rows * 3], [rows, rows * 3]).kind == "real"
    assert compared([rows, rows / 2], [rows, rows / 2]).kind == "binary"


def test_near_ties_of_the_original_are_excluded() -> None:
    x = np.array([[5.0, 5.001, 0.0], [1.0, 2.0, 0.0], [3.0, 1.0, 0.0]])
    y = np.array([[5.001, 5.0, 0.0], [2.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    found = compared([x], [y]).choice
    assert found is not None
    assert (found.share, found.n, found.excluded) == (0.5, 2, 1)
    wide = compared([x], [y], margins={"y": 1.5}).choice
    assert wide is not None
    assert (wide.share, wide.n, wide.excluded) == (1.0, 1, 2)
    # all excluded: nothing is left but how far the numbers are apart
    none = compared([x], [y], margins={"y": 9.0})
    total = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    assert (none.choice, none.agreement) == (None, pytest.approx(1 - none.noise / total))


def test_sides_of_one_half() -> None:
    x = np.array([[0.1, 0.9, 0.5002, 0.6, 0.2, 1.0]])
    y = np.array([[0.2, 0.8, 0.4, 0.4, 0.1, 0.7]])
    found = compared([x], [y])
    assert found.kind == "binary"
    assert found.choice is not None
    assert (found.choice.share, found.choice.n, found.choice.excluded) == (0.8, 5, 1)


def test_integers_booleans_and_texts_are_equal_or_not() -> None:
    for x, y, share in (
        (np.arange(4), np.array([0, 1, 2, 9]), 0.75),
        (np.array([True, False]), np.array([True, True]), 0.5),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), 0.5),
    ):
        found = compared([x], [y])
        assert (found.kind, found.sqnr_db) == ("integers", None)
        assert found.choice is not None
        assert found.agreement == found.choice.share == share


def test_sequences_are_compared_part_by_part() -> None:
    x = [np.arange(3), np.arange(2)]
    assert compared([x], [[np.arange(3), np.array([0, 5])]]).agreement == 0.8
    assert compared([x], [x[:1]]).mismatched == 1


def test_other_shapes_agree_in_nothing() -> None:
    x = [np.arange(5), np.arange(3)]
    found = compared(x, [np.arange(5), np.arange(4)])
    assert (found.mismatched, found.agreement) == (1, 0.5)
    assert compared(x, [np.arange(4), np.arange(4)]).agreement == 0


def test_empty_outputs_say_nothing() -> None:
    x = [np.zeros((0, 4))]
    found = compared(x, x)
    assert (found.kind, found.agreement, found.sqnr_db) == ("empty", 1, None)
    assert compared([None], [None]).kind == "empty"


def test_clusters_widen_the_error_and_one_is_not_certain() -> None:
    """Ten feeds of 100 rows: all rows of a feed right, or all wrong."""
    together, apart = Tally(), Tally()
    for at in range(10):
        together.add(100 * (at % 2), 100)
        apart.add(50, 100)
    assert together.share == apart.share == 0.5
    assert apart.standard_error == pytest.approx(math.sqrt(0.25 / 1000), rel=0.01)
    assert together.standard_error == pytest.approx(math.sqrt(0.25 / 9), rel=0.01)
    certain = Tally()
    certain.add(200, 200)
    assert 1 / 500 < certain.standard_error < 1 / 100


def test_rows_of_one_feed_count_as_many_feeds() -> None:
    choices, one = Choices(), Choices()
    x = RNG(0).normal(size=(20, 5))
    y = x + RNG(1).normal(size=(20, 5))
    one.add(x, y)
    for at in range(20):
        choices.add(x[at : at + 1], y[at : at + 1])
    assert one.result is not None
    assert choices.result is not None
    assert one.result[1].share == choices.result[1].share
    assert one.result[1].n == choices.result[1].n


# ------------------------------------------------------------------------------- the whole


def test_the_worst_output_decides() -> None:
    x = {"a": np.arange(4), "b": np.array([[0.1, 0.9]])}
    y = {"a": np.array([0, 1, 2, 9]), "b": np.array([[0.1, 0.1]])}
    found = compare(run([x]), run([y]), [{"at": 0}])
    assert [o.name for o in found.outputs] == ["a", "b"]
    # of two choices one differs, of which the original was 0.9 to 0.1 sure
    assert found.agreement == agreement(found) == pytest.approx(0.6)
    assert found.drop == pytest.approx(0.4)
    assert found.sqnr_db == found.outputs[1].sqnr_db
    assert Quality((), 1).agreement == 1


def test_feeds_are_streamed_and_must_be_there() -> None:
    alive = 0

    class Counted(dict[str, Any]):
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            assert alive <= 2
            super().__init__(y=np.zeros(3))

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def feeds() -> Iterator[dict[str, Any]]:
        for _ in range(5):
            yield {}

    assert compare(lambda _: Counted(), lambda _: {"y": np.zeros(3)}, feeds()).feeds == 5
    with pytest.raises(UsageError, match="no feeds"):
        compare(run([]), run([]), [])
    with pytest.raises(UsageError, match="does not compute the output 'y'"):
        compare(run([{"y": np.zeros(1)}]), run([{}]), [{"at": 0}])


def test_sessions_run_as_they_are() -> None:
    (file,) = [file for file in graphs.DIGITS if file.stem == "mlp"]
    images = np.load(file.with_name("calibration.npz"))["image"]
    feeds = [{"image": images[at : at + 50]} for at in range(0, 200, 50)]
    with Session(file, optimizations="off") as original, Session(file) as candidate:
        found = compare(original.run, candidate.run, feeds)
        (logits,) = found.outputs
        assert logits.kind == "classes"
        assert logits.choice is not None
        assert logits.choice.n + logits.choice.excluded == 200
        assert found.agreement == 1
        with pytest.raises(RuntimeFailure):
            compare(original.run, candidate.run, [{"image": images[0]}])


def test_channels_that_have_nothing_in_common_count_alike() -> None:
    """Boxes of hundreds beside scores below one: over all elements the scores would be nothing."""
    rng = RNG(8)
    boxes = rng.uniform(0, 600, (6, 4, 50))
    scores = rng.uniform(0, 1, (6, 4, 50))
    x = np.concatenate([boxes, scores], 1)
    lost = np.concatenate([boxes, np.zeros_like(scores)], 1)
    found = compared(list(x[:, None]), list(lost[:, None]))
    assert found.sqnr_db is not None
    assert found.sqnr_db > 50
    assert found.agreement == pytest.approx(0.5, abs=0.01)


def test_gain_and_offset_are_no_agreement() -> None:
    x = RNG(9).normal(size=(4, 100))
    assert compared([x[:, :2]], [x[:, :2] + 3.0]).agreement < 0.5
    assert compared([x[:, :2]], [x[:, :2] * 3.0]).agreement < 0.7
