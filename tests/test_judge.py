"""When two runs agree: norms, signals, noise, and what is no proof."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphopt.judge import (
    INFORMATIVE_BELOW,
    NOISE_FACTOR,
    TOLERANCES,
    Judgement,
    Norms,
    OutputState,
    difference,
    flatten,
    is_float,
    judge,
    noise_of,
)

Array = NDArray[Any]
WAYS = ("off", "default")
RNG = np.random.default_rng(0)


def state(
    off: Sequence[Any],
    default: Sequence[Any] | None = None,
    candidate: Sequence[Any] | None = None,
    candidate_default: Sequence[Any] | None = None,
    groups: Sequence[str] | None = None,
    depends: bool = True,
) -> OutputState:
    """Runs by feed; what is left out repeats the original with optimisations off."""
    candidate = off if candidate is None else candidate
    runs = {
        "original off": off,
        "original default": off if default is None else default,
        "candidate off": candidate,
        "candidate default": candidate if candidate_default is None else candidate_default,
    }
    flat = {way: [flatten(run) for run in of] for way, of in runs.items()}
    return OutputState("y", "tensor(float)", depends, list(groups or ["g"] * len(off)), flat)


def judged(made: OutputState, index: int = 0, tolerance: float = 1e-5) -> Judgement:
    return judge(made, index, made.signals()[index], tolerance, WAYS)


def f32(*values: float) -> Array:
    return np.asarray(values, np.float32)


# -------------------------------------------------------------------------------------- constants


def test_the_law_in_numbers() -> None:
    assert NOISE_FACTOR == 4
    assert INFORMATIVE_BELOW == 0.01
    assert TOLERANCES == {
        "float64": 1e-5,
        "float32": 1e-5,
        "float16": 2e-3,
        "bfloat16": 1.6e-2,
        "float8": 0.25,
    }


# ------------------------------------------------------------------------------------------ norms


def test_difference_in_both_norms() -> None:
    found = difference([f32(1, 2), f32(3, 4)], [f32(1, 2), f32(3, 7)])
    assert found == Norms(3.0, 1.5)
    assert difference([], []) == Norms(0.0, 0.0)
    assert difference([f32()], [f32()]) == Norms(0.0, 0.0)


def test_difference_of_complex_numbers_is_their_distance() -> None:
    found = difference([np.array([1 + 1j])], [np.array([4 + 5j])])
    assert found == Norms(5.0, 5.0)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_must_stand_in_the_same_places(odd: float) -> None:
    assert difference([f32(1, odd)], [f32(1.5, odd)]) == Norms(0.5, 0.5)
    for other in (f32(odd, 1), f32(1, 1), f32(odd, odd), f32(1, -odd if odd == odd else np.inf)):
        assert difference([f32(1, odd)], [other]) == Norms(math.inf, math.inf)


def test_integers_between_floats_are_equal_or_infinitely_far() -> None:
    left = [np.array([1, 2]), f32(1)]
    assert difference(left, [np.array([1, 2]), f32(2)]) == Norms(1.0, 1.0)
    assert difference(left, [np.array([1, 3]), f32(1)]) == Norms(math.inf, math.inf)


def test_relative_norms() -> None:
    assert Norms(2.0, 1.0).over(Norms(4.0, 0.5)) == Norms(0.5, 2.0)
    assert Norms(0.0, 0.0).over(Norms(0.0, 0.0)) == Norms(0.0, 0.0)
    assert Norms(1.0, 0.0).over(Norms(0.0, 0.0)) == Norms(math.inf, 0.0)


def test_small_types_are_compared_in_double() -> None:
    big = np.array([60000.0], np.float16)
    assert difference([big], [-big]).largest == 120000.0
    low = np.array([1.0], ml_dtypes.bfloat16)
    assert difference([low], [np.array([1.5], ml_dtypes.bfloat16)]) == Norms(0.5, 0.5)


# ------------------------------------------------------------------------------------- flattening


def test_flattening() -> None:
    assert flatten(None) == []
    assert [a.tolist() for a in flatten([f32(1), [f32(2), None]])] == [[1.0], [2.0]]
    flat = flatten({"b": 2.0, "a": f32(1)})
    assert [a.tolist() for a in flat] == ["a", [1.0], "b", 2.0]
    assert flatten(np.float32(3))[0].shape == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f32(1), True),
        (np.array([1j]), True),
        (np.array([1], ml_dtypes.bfloat16), True),
        (np.array([1], ml_dtypes.float8_e4m3fn), True),
        (np.array([1], ml_dtypes.int4), False),
        (np.array([1]), False),
        (np.array([True]), False),
        (np.array(["a"], object), False),
        ([np.array([1]), f32(1)], True),
    ],
)
def test_what_is_a_float(value: Any, expected: bool) -> None:
    assert is_float(flatten(value)) is expected


# ---------------------------------------------------------------------------------------- signals


def test_signal_is_the_variation_over_feeds() -> None:
    """Two runs, 1 apart from their mean; the mean of two is nearer to both by a factor of 2."""
    found = state([f32(101, 5), f32(103, 5)]).signals()
    assert found == [Norms(1.0, pytest.approx(1.0))] * 2
    assert found[0].rms == pytest.approx(math.sqrt((1 + 1) * 2 / 4))


def test_signal_of_many_feeds_estimates_their_deviation() -> None:
    runs = [RNG.normal(100, 3, size=1000) for _ in range(4)]
    assert state(runs).signals()[0].rms == pytest.approx(3, rel=0.05)


def test_signals_are_of_feeds_drawn_alike() -> None:
    found = state([f32(0), f32(2), f32(0), f32(20)], groups=["a", "a", "b", "b"]).signals()
    assert [signal.largest for signal in found] == [1.0, 1.0, 10.0, 10.0]


def test_signals_are_of_runs_of_one_shape() -> None:
    found = state([f32(0), f32(2), f32(0, 4)]).signals()
    assert [signal.largest for signal in found] == [1.0, 1.0, 2.0]


def test_a_feed_that_stands_alone_varies_within_itself() -> None:
    (found,) = state([f32(101, 103)]).signals()
    assert found == Norms(1.0, 1.0)
    assert state([f32(7)]).signals() == [Norms(0.0, 0.0)]


def test_an_output_that_no_input_reaches_has_its_magnitude() -> None:
    found = state([f32(3, -4, np.nan)] * 2, depends=False).signals()
    assert found == [Norms(4.0, pytest.approx(math.sqrt(25 / 3)))] * 2


def test_elements_that_are_not_finite_are_no_signal() -> None:
    found = state([f32(1, np.inf, np.nan), f32(3, np.inf, 2)]).signals()
    assert found[0].largest == 1.0


def test_signal_sees_floats_between_integers() -> None:
    runs = [[np.array([1]), f32(1)], [np.array([9]), f32(3)]]
    assert state(runs).signals()[0].largest == 1.0


# ------------------------------------------------------------------------- noise and information


def test_noise_is_the_originals_spread_relative_to_the_signal() -> None:
    made = state([f32(0, 0), f32(200, 0)], [f32(0.5, 0), f32(200, 0)])
    noise, informative = noise_of(made, 0, made.signals()[0])
    assert informative
    assert noise.largest == pytest.approx(0.5 / 100)
    assert noise.rms == pytest.approx(math.sqrt(0.125) / made.signals()[0].rms)


@pytest.mark.parametrize(("spread", "informative"), [(1.0, True), (1.001, False)])
def test_noise_over_one_percent_of_the_signal_says_nothing(
    spread: float, informative: bool
) -> None:
    made = state([np.array([0.0]), np.array([200.0])], [np.array([spread]), np.array([200.0])])
    assert noise_of(made, 0, made.signals()[0])[1] is informative


@pytest.mark.parametrize(
    "runs",
    [
        [f32(5, 5)] * 3,  # constant
        [f32()] * 2,  # empty
        [None, None],  # an optional left empty
        [f32(np.nan, np.inf)] * 2,  # nothing finite
        [np.array([3])] * 2,  # a constant integer
        [np.array(["a"], object)] * 2,
        [np.array([True])],
    ],
)
def test_what_never_varies_proves_nothing(runs: list[Any]) -> None:
    for found in (judged(state(runs)), judged(state(runs), len(runs) - 1)):
        assert not found.informative
        assert found.problem == ""


@pytest.mark.parametrize("empty", [None, np.zeros(0, int), f32(), [f32(), f32()]])
def test_an_empty_feed_says_nothing_beside_fuller_ones(empty: Any) -> None:
    full = np.array([3]) if isinstance(empty, np.ndarray) and empty.dtype.kind == "i" else f32(1, 2)
    made = state([empty, full, full + 1])
    assert not judged(made, 0).informative
    assert judged(made, 1).informative


def test_what_no_input_reaches_need_not_vary() -> None:
    for runs in ([f32(5, 5)], [np.array([3])], [np.array(["a"], object)]):
        assert judged(state(runs, depends=False)).informative
    assert not judged(state([f32()], depends=False)).informative


def test_integers_inform_where_they_vary_and_repeat() -> None:
    assert judged(state([np.array([1]), np.array([2])])).informative
    unsteady = state([np.array([1]), np.array([2])], [np.array([9]), np.array([2])])
    assert not judged(unsteady, 0).informative
    assert judged(unsteady, 1).informative


def test_an_original_that_changes_its_form_says_nothing() -> None:
    made = state([f32(1), f32(2)], [f32(1, 1), f32(2)], [f32(9, 9, 9), f32(2)])
    found = judged(made, 0)
    assert (found.informative, found.noise, found.problem) == (False, math.inf, "")


# -------------------------------------------------------------------------------------- judgement

SIGNAL = [np.array([-1.0, 0.0]), np.array([1.0, 0.0])]  # varies by 1, exactly


def shifted(by: float, noise: float = 0.0) -> OutputState:
    """An original with this noise and a candidate this far off, in one element of feed 0."""
    moved = [np.array([-1.0 + by, 0.0]), SIGNAL[1]]
    return state(SIGNAL, [np.array([-1.0 + noise, 0.0]), SIGNAL[1]], moved, SIGNAL)


def test_within_the_tolerance_of_the_type() -> None:
    assert judged(shifted(0.99e-5)).problem == ""
    found = judged(shifted(1.01e-5))
    assert found.problem == "error 1e-05 (rms 7.1e-06)"
    assert found.used == pytest.approx(1.01)
    assert judged(shifted(1.9e-3), tolerance=2e-3).problem == ""
    assert judged(shifted(2.1e-3), tolerance=2e-3).problem


def test_what_storing_the_output_rounds_away_is_no_fault() -> None:
    """The last place of 1000 is 6e-5: as much as this output varies, times 6e-4."""
    off = [f32(1000.0), f32(1000.1)]
    one_place = [np.nextafter(run, np.float32(np.inf)) for run in off]
    four_places = [run + 4 * (np.nextafter(run, np.float32(np.inf)) - run) for run in off]
    assert not judged(state(off, candidate=one_place)).problem
    assert judged(state(off, candidate=four_places)).problem


def test_exactly_what_is_allowed_is_allowed() -> None:
    found = judged(shifted(2**-10), tolerance=2**-10)
    assert (found.used, found.problem) == (1.0, "")
    constant = [np.array([1.0])] * 2
    assert judged(state(constant, None, [np.array([1 + 2**-10])] * 2), 0, 2**-10).problem == ""


def test_one_way_of_running_may_be_judged_alone() -> None:
    wrong = state(SIGNAL, None, [SIGNAL[0] + 1, SIGNAL[1]], SIGNAL)
    found = judge(wrong, 0, wrong.signals()[0], 1e-5, ["default"])
    assert (found.error_off, found.error_rms, found.error_default, found.problem) == (0, 0, 0, "")
    found = judge(wrong, 0, wrong.signals()[0], 1e-5, ["off"])
    assert (found.error_off, found.error_default) == (1, 0)


def test_within_four_times_the_noise() -> None:
    assert judged(shifted(3.99e-3, noise=1e-3)).problem == ""
    found = judged(shifted(4.01e-3, noise=1e-3))
    assert found.problem
    assert found.used == pytest.approx(4.01 / 4)
    assert (found.noise, found.error_off) == (pytest.approx(1e-3), pytest.approx(4.01e-3))


def test_tolerance_and_noise_do_not_add_up() -> None:
    assert judged(shifted(1.01e-5, noise=2e-6)).problem
    assert judged(shifted(1.01e-5, noise=2.6e-6)).problem == ""


def test_small_faults_everywhere_are_seen_by_the_root_mean_square() -> None:
    """One noisy element allows large errors; a shift of all others is far above their noise."""
    base = [RNG.normal(size=10_000) for _ in range(4)]
    noisy = [run.copy() for run in base]
    for run in noisy:
        run[0] += 5e-3
    moved = [run + 1e-3 for run in base]
    found = judged(state(base, noisy, moved))
    assert found.error_off < 4 * found.noise
    assert found.used > 1
    assert found.problem


def test_one_wrong_element_is_seen_by_the_maximum() -> None:
    base = [RNG.normal(size=100_000) for _ in range(4)]
    moved = [run.copy() for run in base]
    moved[0][7] += 1e-3
    found = judged(state(base, None, moved))
    assert found.error_rms < 1e-5 < found.error_off
    assert found.problem


def test_both_ways_of_running_are_judged() -> None:
    wrong = [SIGNAL[0] + 1, SIGNAL[1]]
    only_off = judged(state(SIGNAL, None, wrong, SIGNAL))
    only_default = judged(state(SIGNAL, None, SIGNAL, wrong))
    assert only_off.problem
    assert only_default.problem
    assert (only_off.error_off, only_off.error_default) == (1.0, 0.0)
    assert (only_default.error_off, only_default.error_default) == (0.0, 1.0)
    assert only_default.error_rms == 0
    assert judged(state(SIGNAL)) == Judgement(True, 1.0, 0.0)


def test_wrong_shapes_types_and_counts() -> None:
    ints = [np.array([1, 2]), np.array([3, 4])]
    pairs: list[tuple[list[Any], list[Any], str]] = [
        (SIGNAL, [np.zeros((2, 1)), SIGNAL[1]], "shape 2x1 instead of 2"),
        (SIGNAL, [np.float64(0), SIGNAL[1]], "shape scalar instead of 2"),
        (SIGNAL, [None, SIGNAL[1]], "shape nothing instead of 2"),
        (SIGNAL, [[SIGNAL[0]] * 2, SIGNAL[1]], "shape 2, 2 instead of 2"),
        (SIGNAL, [SIGNAL[0].astype("f4"), SIGNAL[1]], "shape 2 instead of 2"),
        (ints, [np.array([1, 3]), ints[1]], "1 of 2 integers differ"),
        (ints, [np.array([9, 9]), ints[1]], "2 of 2 integers differ"),
        (SIGNAL, [np.array([np.nan, 0]), SIGNAL[1]], "NaN or infinity where there was none"),
        (SIGNAL, [np.array([-1, np.inf]), SIGNAL[1]], "NaN or infinity where there was none"),
    ]
    for original, candidate, problem in pairs:
        found = judged(state(original, None, candidate))
        assert found.informative
        assert (found.problem, found.used) == (problem, math.inf)


def test_strings_and_booleans_are_equal_or_wrong() -> None:
    texts = [np.array(["a", "b"], object), np.array(["c", "d"], object)]
    assert judged(state(texts)).problem == ""
    assert judged(state(texts, None, texts[::-1])).problem == "2 of 2 integers differ"
    truths = [np.array([True, False]), np.array([True, True])]
    assert judged(state(truths, None, truths[::-1])).problem == "1 of 2 integers differ"


def test_sequences_and_maps() -> None:
    runs = [[f32(1), f32(2, 3)], [f32(4), f32(5, 6)]]
    assert judged(state(runs)).problem == ""
    wrong = [[f32(1), f32(2, 3.1)], runs[1]]
    assert judged(state(runs, None, wrong)).problem
    maps = [[{"a": 0.1, "b": 0.9}], [{"a": 0.7, "b": 0.3}]]
    assert judged(state(maps)) == Judgement(True, pytest.approx(0.3), 0.0)
    renamed = [[{"a": 0.1, "c": 0.9}], maps[1]]
    assert judged(state(maps, None, renamed)).problem


def test_noise_of_a_mask_is_told_apart_from_noise_of_values() -> None:
    with_nan = [f32(-1, np.nan), f32(1, np.nan)]
    assert judged(state(with_nan)) == Judgement(True, 1.0, 0.0)
    assert judged(state(with_nan, None, [f32(-1, 0), with_nan[1]])).problem


# ----------------------------------------------- what cannot prove agreement can still disprove it


def test_constants_that_differ_are_wrong() -> None:
    constant = [np.array([5.0, 5.0])] * 2
    found = judged(state(constant, None, [np.array([5.0, 6.0])] * 2))
    assert not found.informative
    assert found.problem == "error 0.2 of what is constant"
    assert found.used == pytest.approx(0.2 / 1e-5)
    assert judged(state(constant, None, [np.array([5.0, 5.0001])] * 2)).problem
    assert judged(state(constant, None, [np.array([5.0, 5.00004])] * 2)).problem == ""
    assert judged(state(constant, None, None, [np.array([5.0, 6.0])] * 2)).problem


def test_constants_are_judged_against_their_noise_too() -> None:
    """Twice 2e-6 of noise: 4 times that is below the tolerance of 1e-5, 4 times 9e-6 is above."""
    base = [np.array([1.0])] * 2
    for noise, error, fails in ((2e-6, 1.1e-5, True), (9e-6, 3.5e-5, False), (9e-6, 3.7e-5, True)):
        made = state(base, [base[0] + noise] * 2, [base[0] + error] * 2, base)
        assert bool(judged(made).problem) is fails


def test_noise_of_just_the_tolerance_is_judged() -> None:
    base, default = [np.array([1.0])] * 2, [np.array([1 + 2**-10])] * 2
    assert judged(state(base, default, [np.array([7.0])] * 2), tolerance=2**-10).problem


def test_what_the_original_does_not_repeat_disproves_nothing() -> None:
    base, default = [np.array([1.0])] * 2, [np.array([1.0 + 2e-5])] * 2
    assert judged(state(base, default, [np.array([7.0])] * 2)).problem == ""


def test_any_level_and_any_feed_alike_may_show_that_the_original_is_unsteady() -> None:
    """A sigmoid far below zero steps between a few tiny values: luck alone repeats them."""
    base = [np.array([1e-7])] * 2
    wrong = state(base, None, [np.array([2e-7])] * 2)
    assert judged(wrong).problem
    wrong.runs["original basic"] = [[base[0] + 3e-8], [base[1]]]
    assert judged(wrong, 0).problem == ""
    assert judged(wrong, 1).problem == ""
    wrong.groups = ["a", "b"]
    assert judged(wrong, 1).problem
    wrong.runs["original basic"] = [[base[0]], [np.zeros(2)]]
    assert judged(wrong, 0).problem
    assert judged(wrong, 1).problem == ""


def test_zeros_have_no_magnitude_but_a_shape() -> None:
    zeros = [np.zeros(3)] * 2
    assert judged(state(zeros, None, [np.full(3, 1e-9)] * 2)).problem == ""
    assert judged(state(zeros, None, [np.zeros(4)] * 2)).problem == "shape 4 instead of 3"


def test_constant_integers_empty_and_missing_outputs_that_differ_are_wrong() -> None:
    threes = [np.array([3])] * 2
    assert judged(state(threes, None, [np.array([4])] * 2)).problem == "1 of 1 integers differ"
    assert judged(state([f32()] * 2, None, [f32(1)] * 2)).problem == "shape 1 instead of 0"
    assert judged(state([None] * 2, None, [f32(1)] * 2)).problem == "shape 1 instead of nothing"
    unsteady = state(threes, [np.array([5])] * 2, [np.array([4])] * 2)
    assert judged(unsteady).problem == ""


# ------------------------------------------------------------------------------------- properties

numbers = st.floats(-100, 100, allow_nan=False, width=32)
vectors = st.lists(numbers, min_size=3, max_size=3).map(lambda v: np.asarray(v, np.float64))
scales = st.integers(-60, 60).map(lambda power: 2.0**power)


@given(st.lists(st.tuples(vectors, vectors, vectors), min_size=2, max_size=4), scales)
def test_scaling_every_run_changes_nothing(
    runs: list[tuple[Array, Array, Array]], by: float
) -> None:
    """Powers of two scale without rounding: the judgement is the same to the last bit."""
    off, noise, error = zip(*runs, strict=True)
    default = [a + 1e-4 * b for a, b in zip(off, noise, strict=True)]
    candidate = [a + 1e-4 * b for a, b in zip(off, error, strict=True)]
    plain = state(off, default, candidate)
    scaled = state(*([run * by for run in way] for way in (off, default, candidate)))
    for index in range(len(runs)):
        a, b = judged(plain, index), judged(scaled, index)
        assert (a.informative, a.noise, a.error_off, a.error_rms, a.used) == (
            b.informative,
            b.noise,
            b.error_off,
            b.error_rms,
            b.used,
        )
        assert bool(a.problem) == bool(b.problem)
        assert b.signal == a.signal * by


@given(st.lists(vectors, min_size=2, max_size=4), vectors, st.floats(0, 1), st.floats(1, 10))
def test_larger_errors_use_more(
    runs: list[Array], direction: Array, size: float, more: float
) -> None:
    def moved(by: float) -> Judgement:
        return judged(state(runs, None, [run + by * direction for run in runs]))

    less, larger = moved(size), moved(size * more)
    assert less.error_off <= larger.error_off * (1 + 1e-9)
    assert less.used <= larger.used * (1 + 1e-9)
    assert not (less.problem and not larger.problem)


@given(st.lists(vectors, min_size=2, max_size=4), vectors, st.floats(0, 0.1), st.floats(0, 0.1))
def test_noisier_originals_allow_no_less_until_they_say_nothing(
    runs: list[Array], direction: Array, noise: float, error: float
) -> None:
    def noisy(by: float) -> Judgement:
        default = [run + by * direction for run in runs]
        return judged(state(runs, default, [run + error for run in runs]))

    quiet, loud = noisy(noise), noisy(2 * noise)
    if quiet.informative and loud.informative:
        assert loud.used <= quiet.used * (1 + 1e-9)
    assert not (loud.informative and not quiet.informative)


@given(st.lists(vectors, min_size=1, max_size=4))
def test_a_model_agrees_with_itself(runs: list[Array]) -> None:
    for index in range(len(runs)):
        found = judged(state(runs), index)
        assert (found.problem, found.used, found.noise) == ("", 0.0, 0.0)
