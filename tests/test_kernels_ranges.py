"""Calibration ranges: exact counting, and choices against brute force and the textbook."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from graphopt.kernels import histogram as module
from graphopt.kernels.affine import asymmetric, fake, symmetric
from graphopt.kernels.ranges import (
    Histogram,
    MovingAverage,
    entropy,
    expand_levels,
    expected_error,
    min_max,
    mse,
    percentile,
)

Array = NDArray[Any]
float32 = st.floats(width=32)  # NaN, infinities and subnormals among them
batches = st.lists(arrays(np.float32, st.integers(0, 20), elements=float32), max_size=5)


def counted(*parts: Array, bins: int = 8192) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.add(part)
    return histogram


def state(histogram: Histogram) -> dict[str, Any]:
    values = {name: getattr(histogram, name) for name in Histogram.__slots__}
    return values | {"counts": histogram.counts.tolist()}


def dumb_counts(x: Array, exponent: int) -> dict[int, int]:
    """Exact integer arithmetic on every value by itself."""
    found: dict[int, int] = {}
    for value in x.ravel().astype(np.float64):
        if math.isfinite(value) and value != 0:
            top, bottom = float(value).as_integer_ratio()
            above, below = (2**exponent, 1) if exponent > 0 else (1, 2**-exponent)
            k = (top * below) // (bottom * above)
            found[k] = found.get(k, 0) + 1
    return found


def samples(name: str, n: int = 200_000) -> Array:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(n)
    made: dict[str, Callable[[], Array]] = {
        "normal": lambda: normal,
        "relu": lambda: np.maximum(normal, 0),
        "relu6": lambda: np.clip(normal * 4, 0, 6),
        "silu": lambda: normal / (1 + np.exp(-normal)),
        "negative": lambda: -np.abs(normal),
        "laplace": lambda: rng.laplace(size=n),
        "heavy": lambda: rng.standard_t(3, n),
        "outlier": lambda: np.append(normal, [60.0, -25.0]),
        "offset": lambda: normal + 7,
        "constant": lambda: np.full(n, 0.7),
    }
    return made[name]().astype(np.float32)


NAMES = ["normal", "relu", "relu6", "silu", "negative", "laplace", "heavy"]
NAMES += ["outlier", "offset", "constant"]


# ------------------------------------------------------------------------------- counting


@given(batches, st.sampled_from([2, 3, 16, 8192]), st.randoms())
def test_batches_in_any_order_and_merged_are_one(
    parts: list[Array], bins: int, random: Any
) -> None:
    whole = counted(np.concatenate([np.zeros(0, np.float32), *parts]), bins=bins)
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert state(counted(*shuffled, bins=bins)) == state(whole)
    left, right = counted(*parts[:2], bins=bins), counted(*parts[2:], bins=bins)
    untouched = state(right)
    left.merge(right)
    assert state(left) == state(whole)
    assert state(right) == untouched


@given(arrays(np.float32, st.integers(0, 60), elements=float32), st.sampled_from([2, 5, 64]))
def test_counts_are_those_of_a_plain_loop(x: Array, bins: int) -> None:
    histogram = counted(x, bins=bins)
    finite = x[np.isfinite(x)]
    assert histogram.nonfinite == x.size - finite.size
    assert histogram.count == finite.size
    assert histogram.zeros == int((finite == 0).sum())
    if finite.size:
        assert (histogram.minimum, histogram.maximum) == (finite.min(), finite.max())
    assert len(histogram.counts) <= bins
    if histogram.exponent is None:
        assert not finite.any()
        return
    exact = dumb_counts(x, histogram.exponent)
    places = enumerate(histogram.counts.tolist(), histogram.first)
    assert {k: count for k, count in places if count} == exact
    # At half the width there would have been too many bins.
    low, high = min(0.0, histogram.minimum), max(0.0, histogram.maximum)
    width = 2.0 ** (histogram.exponent - 1)
    assert math.floor(high / width) - math.floor(low / width) + 1 > bins


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_])
def test_other_types_and_layouts(dtype: Any) -> None:
    x = (np.random.default_rng(0).standard_normal((4, 6, 5)) * 9).astype(dtype)
    flat = counted(x.astype(np.float64).ravel())
    assert state(counted(x.transpose(2, 0, 1))) == state(flat)
    assert state(counted(x[:, ::2], x[:, 1::2])) == state(flat)
    assert flat.count == 120


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = samples("heavy", 10_001)
    whole = state(counted(x))
    monkeypatch.setattr(module, "CHUNK", 100)
    assert state(counted(x)) == whole


def test_memory_is_bounded_whatever_the_data() -> None:
    histogram = Histogram(256)
    for power in range(-140, 120):
        histogram.add(np.float32([2.0**power, -(3.0**-30), 0.0, np.nan]))
        assert len(histogram.counts) <= 256
    assert histogram.count == 3 * 260
    assert histogram.counts.sum() == 2 * 260
    assert histogram.edges[0] == -(np.float32(3.0) ** -30).astype(np.float32)
    assert histogram.edges[-1] == 2.0**119


def test_edges_hold_what_was_counted() -> None:
    x = samples("silu")
    histogram = counted(x)
    assert 4096 < len(histogram.counts) <= 8192
    edges = histogram.edges
    assert (edges[0], edges[-1]) == (x.min(), x.max())
    np.testing.assert_array_equal(np.histogram(x[x != 0], edges)[0], histogram.counts)


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="8 and 16 bins"):
        Histogram(8).merge(Histogram(16))
    with pytest.raises(ValueError, match="1 bins"):
        Histogram(1)
    with pytest.raises(ValueError, match="symmetric map"):
        mse(Histogram(), levels=(0, 127), symmetric=True)


CHOICES = [min_max, percentile, entropy, mse, lambda h: mse(h, np.int8, symmetric=True)]


@pytest.mark.parametrize("choose", CHOICES)
def test_choices_where_nothing_is_to_be_chosen(choose: Any) -> None:
    assert choose(Histogram()) == (0.0, 0.0)
    assert choose(counted(np.float32([np.nan, np.inf]))) == (0.0, 0.0)
    assert choose(counted(np.zeros(9, np.float32))) == (0.0, 0.0)
    low, high = choose(counted(np.full(9, 3.0, np.float32)))
    assert high == 3.0
    assert low in (0.0, 3.0, -3.0)
    assert type(low) is type(high) is float


# --------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("percent", [100.0, 99.99, 99.0, 50.0])
def test_percentiles_are_those_of_the_values_to_a_bin(name: str, percent: float) -> None:
    x = samples(name)
    histogram = counted(x)
    tail = (100.0 - percent) / 2
    found = percentile(histogram, percent)
    width = 2.0 ** (histogram.exponent or 0)
    for share, end in zip((tail, 100.0 - tail), found, strict=True):
        # Between two neighbours of a sparse tail every definition has its own value.
        lower, upper = (np.percentile(x, share, method=m) for m in ("lower", "higher"))
        at = np.sort(x)
        below = at[max(0, np.searchsorted(at, lower) - 1)]
        above = at[min(len(at) - 1, np.searchsorted(at, upper, "right"))]
        assert below - width <= end <= above + width
    if percent == 100.0:
        assert found == min_max(histogram)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
@pytest.mark.parametrize("symmetric_", [False, True])
def test_the_expected_error_is_the_error(name: str, share: float, symmetric_: bool) -> None:
    x = samples(name)
    low, high = (share * end for end in (min(x.min(), 0), max(x.max(), 0)))
    affine = symmetric(max(-low, high)) if symmetric_ else asymmetric(low, high)
    error = np.square(fake(x, affine).astype(np.float64) - x).mean()
    histogram = counted(x)
    # A constant is known to its bin only: up to the bin's width from a level, evenly spread.
    known = 4.0 ** (histogram.exponent or 0) / 3 if name == "constant" else 0.0
    np.testing.assert_allclose(expected_error(histogram, affine), error, rtol=0.02, atol=known)


def test_the_expected_error_of_even_values_by_hand() -> None:
    # Over [0, 1), with levels at 0, 1/4, 1/2 and 3/4: six times a half step, the integral of
    # t**2 from 0 to 1/8, and at the end a whole one, from 0 to 1/4, that is clipped.
    x = ((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)
    affine = asymmetric(0.0, 0.75, levels=(0, 3))
    assert affine.scale == 0.25
    exact = (6 * 0.125**3 + 0.25**3) / 3
    assert expected_error(counted(x), affine) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "levels"), [(np.uint8, None), (np.uint8, (0, 127)), (np.int8, None)]
)
def test_mse_is_as_good_as_a_search_of_all_ranges(name: str, dtype: Any, levels: Any) -> None:
    histogram = counted(samples(name, 20_000), bins=1024)
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)

    def error(low: float, high: float) -> float:
        return expected_error(histogram, asymmetric(low, high, dtype, levels))

    found = mse(histogram, dtype, levels)
    assert low <= found[0] <= 0 <= found[1] <= high
    assert error(*found) <= error(low, high)
    shares = np.linspace(0.02, 1.0, 50)
    lows = [low * share for share in shares] if low < 0 else [0.0]
    highs = [high * share for share in shares] if high > 0 else [0.0]
    assert error(*found) <= 1.02 * min(error(a, b) for a in lows for b in highs)


@pytest.mark.parametrize("name", NAMES)
def test_mse_of_symmetric_ranges(name: str) -> None:
    histogram = counted(samples(name))
    low, high = mse(histogram, np.int8, symmetric=True)
    assert low == -high
    bound = max(-histogram.minimum, histogram.maximum)
    assert high <= bound
    best = min(expected_error(histogram, symmetric(bound * s)) for s in np.linspace(0.01, 1.0, 100))
    assert expected_error(histogram, symmetric(high)) <= best * 1.01


@given(arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_mse_is_never_worse_than_the_extremes(x: Array) -> None:
    histogram = counted(x)
    found, whole = mse(histogram), min_max(histogram)
    assert expected_error(histogram, asymmetric(*found)) <= expected_error(
        histogram, asymmetric(*whole)
    )


def test_mse_clips_what_an_outlier_would_cost() -> None:
    low, high = mse(counted(samples("outlier")), levels=(0, 15))
    assert -6 < low < -2
    assert 2 < high < 30


def test_mse_of_a_normal_distribution_is_the_closed_form() -> None:
    def lost(bound: float) -> float:
        beyond = 0.5 * math.erfc(bound / math.sqrt(2))
        density = math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)
        clipped = 2 * ((1 + bound * bound) * beyond - bound * density)
        return (bound / 127) ** 2 / 12 * (1 - 2 * beyond) + clipped

    best = min((2 + i / 1000 for i in range(4000)), key=lost)
    histogram = counted(samples("normal", 4_000_000))
    found = mse(histogram, np.int8, symmetric=True)
    assert found[1] == pytest.approx(best, rel=0.02)
    assert expected_error(histogram, symmetric(found[1])) == pytest.approx(lost(best), rel=0.01)


def test_an_end_that_relu_made_stays() -> None:
    for name in ("relu", "relu6"):
        low, high = mse(counted(samples(name)))
        assert low == 0.0
        assert asymmetric(low, high).zero_point == 0
    assert mse(counted(samples("relu6"))) == (0.0, 6.0)


def test_quantized_distribution_of_the_textbook() -> None:
    # Migacz, "8-bit inference with TensorRT", GTC 2017: 8 bins to 2 levels.
    counts = np.array([1, 0, 2, 3, 5, 3, 1, 7])
    assert expand_levels(counts, 2).tolist() == [2, 0, 2, 2, 4, 4, 4, 4]
    # The last level takes what does not divide, and bins may be used by outliers alone.
    assert expand_levels(np.array([4, 2, 6, 0, 3]), 2).tolist() == [3, 3, 4.5, 0, 4.5]
    used = np.array([True, True, True, False, True])
    assert expand_levels(np.array([4, 2, 6, 0, 0]), 2, used).tolist() == [3, 3, 3, 0, 3]


def dumb_entropy(counts: list[int], levels: int) -> int:
    """The number of bins kept, by loops, as the slides have it."""
    best, least = len(counts), math.inf
    for size in range(min(levels, len(counts)), len(counts) + 1):
        p = [float(c) for c in counts[:size]]
        p[-1] += sum(counts[size:])
        q = [0.0] * size
        merged = max(1, size // levels)
        for level in range(levels):
            end = size if level == levels - 1 else min(size, (level + 1) * merged)
            bins = range(level * merged, end)
            used = [i for i in bins if p[i] > 0]
            for i in used:
                q[i] = sum(counts[j] for j in bins) / len(used)
        if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            continue
        ratio = sum(q) / sum(p)
        kl = sum(a / sum(p) * math.log(a / b * ratio) for a, b in zip(p, q, strict=True) if a)
        if kl < least - 1e-12:
            best, least = size, kl
    return best


@pytest.mark.parametrize("name", ["relu", "laplace", "heavy", "outlier"])
@pytest.mark.parametrize("levels", [8, 31])
def test_entropy_is_that_of_plain_loops(name: str, levels: int) -> None:
    x = samples(name, 3000)
    histogram = counted(x, bins=128)
    width = 2.0 ** (histogram.exponent or 0)
    folded = [0] * 200
    for k, count in enumerate(histogram.counts.tolist(), histogram.first):
        folded[-k - 1 if k < 0 else k] += count
    while not folded[-1] and len(folded) > max(
        -histogram.first, len(histogram.counts) + histogram.first
    ):
        folded.pop()
    threshold = dumb_entropy(folded, levels) * width
    low, high = entropy(histogram, levels)
    assert high == min(threshold, histogram.maximum)
    assert low == max(-threshold, histogram.minimum)


def test_entropy_cuts_tails_that_mse_keeps() -> None:
    # The trap: one value in a thousand is large and matters; entropy gives it up.
    rng = np.random.default_rng(0)
    x = np.append(rng.laplace(size=100_000), rng.uniform(80, 100, 100)).astype(np.float32)
    histogram = counted(x)
    cut, kept = (expected_error(histogram, symmetric(f(histogram)[1])) for f in (entropy, mse))
    assert entropy(histogram)[1] < 0.75 * mse(histogram, np.int8, symmetric=True)[1]
    assert cut > 10 * kept


def test_moving_average() -> None:
    average = MovingAverage(0.25)
    assert average.range == (0.0, 0.0)
    average.add(np.float32([[-2.0, 4.0], [np.nan, np.inf]]))
    assert average.range == (-2.0, 4.0)
    average.add(np.float32([np.nan]))
    average.add(np.float32([]))
    average.add(np.float32([0.0, 8.0]))
    assert average.range == (-2.0 + 0.25 * 2.0, 4.0 + 0.25 * 4.0)
    average.add(np.float32([0.0, 1.0]))
    assert average.range == (-1.5 * 0.75, 5.0 * 0.75 + 0.25)
