"""Weights as tables and indices: the division of numbers, the rewrite, and the step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from graphopt.kernels.codebook import EXACT, codebook

Array = NDArray[Any]
RNG = np.random.default_rng(0)

# -- numbers ---------------------------------------------------------------------------------------


def least_error(x: Array, entries: int, weights: Array) -> float:
    """Of all divisions of the sorted numbers into ranges."""
    order = np.argsort(x)
    x, weights = x[order].astype(np.float64), weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), entries - 1):
        total = 0.0
        for first, end in itertools.pairwise((0, *cuts, len(x))):
            mass, part = weights[first:end], x[first:end]
            if mass.any():
                total += float((mass * (part - np.average(part, weights=mass)) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_few_numbers_are_divided_as_well_as_can_be(weighted: bool, offset: float) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        entries = int(rng.integers(2, 6))
        x = (rng.standard_normal(rng.integers(entries + 1, 12)) + offset).astype(np.float32)
        weights = rng.random(len(x)) * (rng.random(len(x)) > 0.2) if weighted else np.ones(len(x))
        weights[0] = 1.0
        found = codebook(x, entries, importance=weights if weighted else None)
        assert len(found.table) <= entries
        assert found.error <= least_error(x, entries, weights) * (1 + 1e-3) + 1e-9
        lost = weights * (x.astype(np.float64) - found.values) ** 2
        assert found.error == pytest.approx(float(lost.sum()))


@pytest.mark.parametrize("entries", [16, 256])
@pytest.mark.parametrize("outliers", [0, 3])
def test_many_numbers_are_divided_nearly_as_well_as_few(entries: int, outliers: int) -> None:
    """Lloyd's iterations from anywhere lose more; from quantiles some 5 dB at 256 entries."""
    x = RNG.standard_t(5, 40_000).astype(np.float32)
    x[:outliers] = [90.0, -70.0, 95.0][:outliers]
    found = codebook(x, entries)
    assert len(found.table) == entries
    line = np.sort(x).astype(np.float64)
    for start in (
        np.quantile(line, (np.arange(entries) + 0.5) / entries),
        np.linspace(line[0], line[-1], entries),
        RNG.choice(line, entries, replace=False),
    ):
        centres = np.sort(start)
        for _ in range(200):
            groups = np.searchsorted((centres[:-1] + centres[1:]) / 2, line)
            counts = np.bincount(groups, minlength=entries)
            sums = np.bincount(groups, line, entries)
            centres = np.where(counts > 0, sums / np.maximum(counts, 1), centres)
        groups = np.searchsorted((centres[:-1] + centres[1:]) / 2, line)
        assert found.error <= ((line - centres[groups]) ** 2).sum() * 1.0001


def test_no_entry_can_be_moved_for_the_better() -> None:
    x = RNG.standard_normal(EXACT * 20).astype(np.float32)
    found = codebook(x, 16)
    assert (np.abs(x[:, None] - found.table).min(axis=1) == np.abs(x - found.values)).all()
    for entry, value in enumerate(found.table):
        assert value == pytest.approx(float(x[found.indices == entry].mean()), abs=1e-6)


def test_what_matters_is_kept_closer() -> None:
    x = RNG.standard_normal((64, 50)).astype(np.float32)
    importance = np.where(x > 1, 100.0, 1.0)
    plain, told = codebook(x, 16), codebook(x, 16, importance=importance)
    assert told.indices.shape == x.shape
    there = x > 1
    assert ((told.values - x)[there] ** 2).sum() < 0.5 * ((plain.values - x)[there] ** 2).sum()
    assert told.error < (importance * (plain.values - x) ** 2).sum()
    rows = np.arange(64.0)[:, None]  # it broadcasts, and may be none at all
    assert codebook(x, 16, importance=rows).error < (rows * (plain.values - x) ** 2).sum()
    nothing = codebook(x, 16, importance=np.zeros(1))
    assert np.array_equal(nothing.values, plain.values)


def test_few_distinct_numbers_lose_nothing() -> None:
    for count in (1, 2, 15, 16):
        numbers = RNG.standard_normal(count).astype(np.float32) * 1e-20
        x = RNG.choice(numbers, (7, 11))
        found = codebook(x, 16, importance=RNG.random((7, 11)))
        assert found.error == 0
        assert np.array_equal(found.values, x)
        assert len(found.table) == len(np.unique(x))
    assert np.array_equal(codebook(np.array([-0.0, 1.0, 0.0]), 2).values, [0.0, 1.0, 0.0])
    assert codebook(np.zeros((0, 3)), 16).indices.shape == (0, 3)


def test_numbers_that_do_not_matter_go_to_the_nearest() -> None:
    x = np.array([0.0, 1.0, 2.0, 9.0], np.float32)
    found = codebook(x, 2, importance=np.array([1.0, 0.0, 1.0, 0.0]))
    assert found.error == 0
    assert found.values.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_zeros_stay_zeros_where_that_is_asked() -> None:
    x = RNG.standard_normal(9000).astype(np.float32) + np.float32(0.05)
    x[::2] = 0
    assert 0 in codebook(x, 16, keep_zero=True).table
    found = codebook(x, 16, keep_zero=True)
    assert (found.values[::2] == 0).all()
    assert len(found.table) == 16


def test_the_same_numbers_give_the_same_table() -> None:
    x = RNG.standard_normal((300, 40)).astype(np.float32)
    one, two = codebook(x, 256), codebook(np.asfortranarray(x), 256)
    assert one.table.tobytes() == two.table.tobytes()
    assert np.array_equal(one.indices, two.indices)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="2 to 256 entries, not 257"):
        codebook(np.zeros(3), 257)
    with pytest.raises(ValueError, match="not finite"):
        codebook(np.array([1.0, np.nan]), 16)
    with pytest.raises(ValueError, match="importance is 0 or more"):
        codebook(np.ones(2), 16, importance=np.array([1.0, -1.0]))
