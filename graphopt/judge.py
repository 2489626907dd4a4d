"""When two runs of a model agree: error against the original's own noise, output by output.

Errors are relative to how much the output varies from feed to feed. A network whose output hardly
reacts to its input would hide any fault behind its own offset if errors were relative to the
output's magnitude. Each is measured in the maximum norm, which sees one wrong element, and in the
root mean square, whose noise floor is low enough to see a small fault that is everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Flat = list[NDArray[Any]]

NOISE_FACTOR: Final = 4.0  # a candidate may stray this many times as far as the original does
INFORMATIVE_BELOW: Final = 0.01  # of the signal; above, the feed says nothing about the output

# What rounding alone does to one result of the type, relative; 1e-5 is what fp32 kernels that
# add in different orders differ by.
TOLERANCES: Final[dict[str, float]] = {
    "float64": 1e-5,
    "float32": 1e-5,
    "float16": 2e-3,
    "bfloat16": 1.6e-2,
    "float8": 0.25,
}


@dataclass(frozen=True, slots=True)
class Norms:
    """A difference, or a variation, in both norms."""

    largest: float
    rms: float

    def over(self, signal: Norms) -> Norms:
        """Relative to a signal; zero over zero is zero."""
        return Norms(_ratio(self.largest, signal.largest), _ratio(self.rms, signal.rms))


@dataclass
class OutputState:
    """All runs of one output: by feed, the original off and default, then the candidate's."""

    name: str
    type: str
    depends_on_values: bool
    groups: list[str] = field(default_factory=list)  # how each feed was drawn
    runs: dict[str, list[Flat]] = field(default_factory=dict)

    def signals(self) -> list[Norms]:
        """How much the output varies among feeds drawn alike, for every feed.

        A feed that stands alone varies within itself; an output that no input reaches has its
        own magnitude for a signal.
        """
        reference = self.runs["original off"]
        signals: list[Norms] = []
        for index, run in enumerate(reference):
            if not self.depends_on_values:
                signals.append(_magnitude(run))
                continue
            alike = [
                other
                for at, other in enumerate(reference)
                if self.groups[at] == self.groups[index] and _same_form(other, run)
            ]
            signals.append(_variation(alike))
        return signals


@dataclass(frozen=True, slots=True)
class Judgement:
    """One output on one feed. `used` is the share of the allowed error; above 1 it failed."""

    informative: bool
    signal: float
    noise: float
    error_off: float = 0.0
    error_default: float = 0.0
    error_rms: float = 0.0  # relative, off
    used: float = 0.0
    problem: str = ""


def flatten(value: Any) -> Flat:
    """An output as a list of arrays: sequences and maps by element, an empty optional as none."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [array for key in sorted(value) for array in (np.asarray(key), *flatten(value[key]))]
    if isinstance(value, list | tuple):
        return [array for element in value for array in flatten(element)]
    return [np.asarray(value)]


def is_float(run: Flat) -> bool:
    """True where any part is a real or complex number, ml_dtypes included."""
    return any(_is_float_array(array) for array in run)


def noise_of(state: OutputState, index: int, signal: Norms) -> tuple[Norms, bool]:
    """The original's own spread on a feed, and whether the feed can prove anything.

    The spread is the largest between its run with optimisations off and its run at any other level.
    """
    off = state.runs["original off"][index]
    default = state.runs["original default"][index]
    if not off or all(array.size == 0 for array in off):
        return Norms(0.0, 0.0), False
    if not is_float(off):
        others = state.runs["original off"]
        varied = not state.depends_on_values or any(not _equal(off, run) for run in others)
        return Norms(0.0, 0.0), varied and _equal(off, default)
    floats = [array for array in off if _is_float_array(array)]
    if not _same_form(off, default) or not any(np.isfinite(_wide(a)).any() for a in floats):
        return Norms(math.inf, math.inf), False
    runs = (r[index] for w, r in state.runs.items() if w.startswith("original ") and r[index:])
    spreads = [difference(off, run) for run in runs if _same_form(off, run)]
    noise = largest(spreads).over(signal)
    varied = signal.largest > 0 or not state.depends_on_values
    return noise, varied and noise.largest <= INFORMATIVE_BELOW


def noise_floor(state: OutputState, index: int, signal: Norms) -> Norms:
    """The largest noise among the feeds drawn like this one that can prove anything.

    The spread of one feed is a single draw, which is now and then a tenth of its neighbours' by
    luck; a rounding of the same size as theirs is no fault. Nor is it less than what storing the
    output rounds away, which is much of the signal where that is small beside a constant offset.
    """
    run = state.runs["original off"][index]
    alike = (
        noise_of(state, at, signal)
        for at in range(len(state.runs["original default"]))
        if state.groups[at] == state.groups[index]
        and _same_form(state.runs["original off"][at], run)
    )
    stored = _rounding(run).over(signal)
    return largest([stored, *(noise for noise, informative in alike if informative)])


def _rounding(run: Flat) -> Norms:
    """Half a unit in the last place of what an output holds."""
    halves = []
    for array in run:
        if _is_float_array(array) and array.dtype.kind != "c":
            magnitude = np.abs(_wide(array))
            half = float(ml_dtypes.finfo(array.dtype).eps) / 2  # type: ignore[no-untyped-call]
            halves.append(np.where(np.isfinite(magnitude), magnitude, 0) * half)
    return difference(halves, [np.zeros_like(half) for half in halves])


def largest(norms: Sequence[Norms]) -> Norms:
    """The largest of several, each norm by itself."""
    return Norms(max(n.largest for n in norms), max(n.rms for n in norms))


def judge(
    state: OutputState, index: int, signal: Norms, tolerance: float, ways: Sequence[str]
) -> Judgement:
    """The candidate on one feed, run in each of the `ways`."""
    noise, informative = noise_of(state, index, signal)
    reference = state.runs["original off"][index]
    if not informative:
        used, problem = _disproof(state, index, tolerance, ways)
        return Judgement(False, signal.largest, noise.largest, used=used, problem=problem)
    floor = noise_floor(state, index, signal)
    allowed = Norms(
        max(tolerance, NOISE_FACTOR * floor.largest), max(tolerance, NOISE_FACTOR * floor.rms)
    )
    errors = {}
    used = 0.0
    problem = ""
    for way in ways:
        run = state.runs[f"candidate {way}"][index]
        error, fault = _compare(reference, run, signal)
        errors[way] = error
        share = max(_ratio(error.largest, allowed.largest), _ratio(error.rms, allowed.rms))
        if fault or share > 1:
            problem = problem or fault or f"error {error.largest:.2g} (rms {error.rms:.2g})"
        used = max(used, share)
    off, default = errors.get("off", Norms(0, 0)), errors.get("default", Norms(0, 0))
    return Judgement(
        True, signal.largest, noise.largest, off.largest, default.largest, off.rms, used, problem
    )


def _disproof(
    state: OutputState, index: int, tolerance: float, ways: Sequence[str]
) -> tuple[float, str]:
    """How the candidate provably differs on a feed that cannot prove it right, and the share used.

    Two models that agree on a constant or an empty output may differ elsewhere; two that do not
    agree on it differ. Values are relative to the output's own magnitude, and compared only where
    the original repeats them within the tolerance, on all feeds drawn like this one; zeros have no
    magnitude to compare with.
    """
    reference = state.runs["original off"][index]
    scale = _magnitude(reference)
    noise = _unsteadiness(state, index).over(scale).largest
    for way in ways if noise <= tolerance else ():
        run = state.runs[f"candidate {way}"][index]
        if _same_form(reference, run) and is_float(reference) and scale.largest == 0:
            continue
        error, fault = _compare(reference, run, scale)
        share = error.largest / max(tolerance, NOISE_FACTOR * noise)
        if fault or share > 1:
            return share, fault or f"error {error.largest:.2g} of what is constant"
    return 0.0, ""


def _unsteadiness(state: OutputState, index: int) -> Norms:
    """The largest spread of the original at any level, on the feeds drawn like this one."""
    reference = state.runs["original off"]
    return largest(
        [
            difference(off, runs[at]) if _same_form(off, runs[at]) else Norms(math.inf, math.inf)
            for way, runs in state.runs.items()
            if way.startswith("original ")
            for at, off in enumerate(reference)
            if runs[at:]
            and state.groups[at] == state.groups[index]
            and _same_form(off, reference[index])
        ]
    )


def _compare(reference: Flat, run: Flat, signal: Norms) -> tuple[Norms, str]:
    infinite = Norms(math.inf, math.inf)
    if not _same_form(reference, run):
        return infinite, f"shape {_shapes(run)} instead of {_shapes(reference)}"
    if not is_float(reference):
        if _equal(reference, run):
            return Norms(0.0, 0.0), ""
        wrong = sum(int(np.sum(a != b)) for a, b in zip(reference, run, strict=True))
        return infinite, f"{wrong} of {sum(a.size for a in reference)} integers differ"
    error = difference(reference, run).over(signal)
    return error, "" if math.isfinite(error.largest) else "NaN or infinity where there was none"


def difference(reference: Flat, run: Flat) -> Norms:
    """Absolute difference; infinite where NaN or infinities do not stand in the same places."""
    largest = total = 0.0
    count = 0
    for a, b in zip(reference, run, strict=True):
        if not _is_float_array(a):
            if not np.array_equal(a, b):
                return Norms(math.inf, math.inf)
            continue
        left, right = _wide(a), _wide(b)
        finite = np.isfinite(left)
        if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
            return Norms(math.inf, math.inf)
        gap = np.abs(left[finite] - right[finite])
        if not np.isfinite(gap).all():
            return Norms(math.inf, math.inf)
        largest = max(largest, float(gap.max(initial=0.0)))
        total += float(np.square(gap).sum())
        count += gap.size
    return Norms(largest, math.sqrt(total / count) if count else 0.0)


def _variation(alike: Sequence[Flat]) -> Norms:
    largest = total = 0.0
    count = 0
    for position in range(len(alike[0])):
        arrays = [_wide(run[position]) for run in alike if _is_float_array(run[position])]
        if not arrays or not arrays[0].size:
            continue
        stack = np.stack(arrays)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = stack.mean(axis=0) if len(arrays) > 1 else stack.mean()
            gap = np.abs(stack - mean)
        gap = gap[np.isfinite(gap)]
        # the mean of n runs lies nearer to each of them than the true one
        correction = len(arrays) / max(len(arrays) - 1, 1)
        largest = max(largest, float(gap.max(initial=0.0)))
        total += float(np.square(gap).sum()) * correction
        count += gap.size
    return Norms(largest, math.sqrt(total / count) if count else 0.0)


def _magnitude(run: Flat) -> Norms:
    zeros = [np.zeros_like(array) if _is_float_array(array) else array for array in run]
    finite = [np.where(np.isfinite(_wide(a)), a, 0) if _is_float_array(a) else a for a in run]
    return difference(finite, zeros)


def _ratio(value: float, base: float) -> float:
    if value == 0:
        return 0.0
    return value / base if base else math.inf


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _is_float_array(array: NDArray[Any]) -> bool:
    # ml_dtypes registers bfloat16 and the like with kind "V" or "f", its integers with others
    return array.dtype.kind in "fc" or "float" in array.dtype.name


def _same_form(a: Flat, b: Flat) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
    )


def _equal(a: Flat, b: Flat) -> bool:
    return _same_form(a, b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _shapes(run: Flat) -> str:
    return ", ".join("x".join(map(str, array.shape)) or "scalar" for array in run) or "nothing"
