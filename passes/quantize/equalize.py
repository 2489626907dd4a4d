"""Ranges of channels made alike before they share a scale: exact in floats, cheaper to round.

Both rewrites divide channels where they are given and multiply them where they are read. What is
rescaled gets new names, for a name never changes its meaning: ranges of these values have to be
observed anew, which is one sweep over the rewritten model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Value
from graphopt.kernels.equalization import smooth_scales
from graphopt.passes.quantize.channels import Channels, Slot, channels_of, readings_of
from graphopt.passes.quantize.units import Unit
from graphopt.statistics import Observer, Statistics

EQUALIZE: Final = "equalize-channels"
SMOOTH: Final = "smooth-activations"
ALPHAS: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_GAIN: Final = 0.9  # of the expected error: what is nearly as good is left alone
_QUIET: Final = 1e-3  # of the largest: channels that say less are not made louder than that
# A channel goes beyond the largest of n values that were seen with a probability of 1 / (n + 1).
_ENOUGH: Final = 512
_FAR: Final = 4.0
_STEPS: Final = (255.0, 127.0)  # of activations over their range, of weights up to their largest
_NORMALISATION: Final = "LayerNormalization"

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Rescaled:
    """One set of channels after the change.

    `values` maps the names that went to those that came; the new value is the old one divided by
    `factors` [C] along its channels. `error` is the expected error as a share of that before.
    """

    root: str
    values: Mapping[str, str]
    factors: NDArray[np.float32]
    error: float


@dataclass(frozen=True, eq=False)
class _Reading:
    """One reader of C channels in G groups: `weights` [G, M, C / G] are the largest magnitudes.

    `energy` [C] sums the squares of a channel's weights; `peak` and `power` [C] are the largest
    magnitude and the mean square of the channel; `taps` weights meet it for each result.
    """

    weights: Array
    energy: Array
    peak: Array
    power: Array
    taps: int

    def error(self, factors: Array) -> float:
        """Noise of rounding u8 activations by tensor and s8 weights by row, relative to signal.

        Each rounding adds step^2 / 12; terms of both at once are left out.
        """
        shape = (len(self.weights), 1, -1)
        step = (self.peak / factors).max() / _STEPS[0]
        activations = np.square(step) * (np.square(factors) * self.energy).sum()
        steps = (self.weights * factors.reshape(shape)).max(axis=2) / _STEPS[1]
        inputs = self.taps * (self.power / np.square(factors)).reshape(len(steps), -1).sum(axis=1)
        rounded = (np.square(steps).sum(axis=1) * inputs).sum()
        signal = (self.energy * self.power).sum()
        return float((activations + rounded) / (12 * signal)) if signal > 0 else 0.0


def observed(edit: Editor) -> set[Observer]:
    """What `equalize` and `smooth` have to know of the model."""
    wanted = set()
    for channels in (*channels_of(edit), *_shared_normalisations(edit)):
        for value, _ in channels.readers:
            axis = channels.axes[value]
            wanted |= {Observer(value.name, kind, axis) for kind in ("maximum", "moments")}
    return wanted


def equalize(
    edit: Editor, units: Collection[Unit], statistics: Statistics, alpha: float | None = None
) -> list[Rescaled]:
    """Equalize channels between weights: convolutions, depthwise too, Gemm and MatMul.

    Cross-layer equalization (Nagel et al., arXiv:1906.04721) with the activations' largest
    magnitudes in the place of the first layer's weights, which scales by channel make
    indifferent. The factors are max|x|^alpha / max|w|^(1 - alpha), of `ALPHAS` and 1 those that
    promise least error over all readers. A set is left alone where nothing of `units` reads it,
    calibration (`observed`) saw nothing of it or too few values of each channel, or a tenth of its
    error would not be saved.
    """
    found = []
    # From the end: what a depthwise convolution gives then counts as its readers take it.
    for channels in reversed(channels_of(edit)):
        if any(slot.node.op != _NORMALISATION for slot in channels.givers):
            tried = (alpha,) if alpha is not None else (*ALPHAS, 1.0)
            found.append(_rescale(edit, EQUALIZE, channels, units, statistics, tried))
    return [rescaled for rescaled in reversed(found) if rescaled is not None]


def smooth(
    edit: Editor, units: Collection[Unit], statistics: Statistics, alpha: float | None = None
) -> list[Rescaled]:
    """Move outliers of what LayerNormalization gives into the weights of its products.

    SmoothQuant (Xiao et al., arXiv:2211.10438), with the alpha of `ALPHAS` that promises least
    error, each LayerNormalization its own. Where others read its result too, as a residual sum
    does behind attention, the products read one of their own.
    """
    tried = (alpha,) if alpha is not None else ALPHAS
    found = [
        _rescale(edit, SMOOTH, channels, units, statistics, tried)
        for channels in channels_of(edit)
        if all(slot.node.op == _NORMALISATION for slot in channels.givers)
    ]
    found += [
        _rescale(edit, SMOOTH, channels, units, statistics, tried, is_shared=True)
        for channels in _shared_normalisations(edit)
    ]
    return [rescaled for rescaled in found if rescaled is not None]


def _shared_normalisations(edit: Editor) -> list[Channels]:
    """What LayerNormalization gives to products and to others that take no factor."""
    clean = {value for channels in channels_of(edit) for value in channels.axes}
    found = []
    for node in edit.model.graph.nodes:
        (value, *others) = node.outputs
        if node.op != _NORMALISATION or value is None or others or value in clean:
            continue
        channels = readings_of(edit, value)
        if channels is not None:
            found.append(channels)
    return found


def _rescale(
    edit: Editor,
    rule: str,
    channels: Channels,
    units: Collection[Unit],
    statistics: Statistics,
    alphas: Sequence[float],
    *,
    is_shared: bool = False,
) -> Rescaled | None:
    """Do the best for one set of channels; None where that is nothing."""
    root = channels.root
    reading = {unit.node for unit in units if unit.weights is not None}
    if not any(slot.node in reading for _, slot in channels.readers):
        return None
    readings = _readings(edit, channels, statistics)
    best = None if readings is None else _best(readings, channels.size, alphas)
    if best is None or not edit.allows(rule, root):
        return None
    factors, error = best
    nodes = dict.fromkeys(slot.node for slot in channels.slots)
    before = "\n".join(node.text() for node in nodes)
    if is_shared:
        channels = _with_its_own(edit, channels, rule)
    for slot in channels.givers:
        _scale(edit, slot, 1.0 / factors)
    for _, slot in channels.readers:
        _scale(edit, slot, factors)
    values = {root: channels.root} if is_shared else _renamed(edit, channels)
    nodes = dict.fromkeys(slot.node for slot in channels.slots)
    edit.record(rule, root, before, "\n".join(node.text() for node in nodes))
    return Rescaled(root, values, factors, error)


def _readings(edit: Editor, channels: Channels, statistics: Statistics) -> list[_Reading] | None:
    """What is known of all readers; None where calibration saw nothing of one, or enough of none.

    Of few values, behind a global pool, the largest are supposed to be `_FAR` deviations away.
    """
    found, counts = [], []
    for value, slot in channels.readers:
        axis = channels.axes[value]
        try:
            peak = statistics.maximum(value.name, axis)
            moments = statistics.moments(value.name, axis)
        except LookupError:
            return None
        counts.append(moments.count)
        if moments.count < _ENOUGH:
            peak = np.maximum(peak, np.abs(moments.mean) + _FAR * np.sqrt(moments.variance))
        by_channel = slot.by_channel(_numbers(edit, slot.value))
        found.append(
            _Reading(
                np.abs(by_channel).max(axis=3),
                np.square(by_channel).sum(axis=(1, 3)).reshape(-1),
                np.maximum(peak, _QUIET * peak.max()),
                np.square(moments.mean) + moments.variance,
                by_channel.shape[3],
            )
        )
    return found if max(counts) >= _ENOUGH else None


def _best(
    readings: Sequence[_Reading], size: int, alphas: Sequence[float]
) -> tuple[NDArray[np.float32], float] | None:
    """The factors with the least expected error and its share of that without; None for no gain."""
    before = sum(reading.error(np.ones(size)) for reading in readings)
    peak = np.max([r.peak / (r.peak.max() or 1.0) for r in readings], axis=0)
    rows = [r.weights.max(axis=1).reshape(-1) for r in readings]
    weights = np.max([row / (row.max() or 1.0) for row in rows], axis=0)
    weights = np.maximum(weights, _QUIET * weights.max())
    tried = []
    for alpha in alphas:
        factors = smooth_scales(peak, weights, alpha).astype(np.float64)
        factors /= np.exp(np.log(factors).mean())  # a common factor changes nothing
        tried.append((sum(reading.error(factors) for reading in readings), alpha, factors))
    error, _, factors = min(tried, key=lambda each: each[:2])
    if not before or error > _GAIN * before:
        return None
    return factors.astype(np.float32), error / before


def _with_its_own(edit: Editor, channels: Channels, rule: str) -> Channels:
    """Another LayerNormalization of the same input for the readers that take a factor."""
    ((value, axis),) = channels.axes.items()
    node = value.producer
    assert node is not None
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.name = edit.unique(f"{node.name or value.name}/smoothed")
    proto.input[:] = [source.name if source is not None else "" for source in node.inputs]
    proto.output[:] = [edit.unique(f"{value.name}/smoothed")]
    known = {source.name: source for source in node.inputs if source is not None}
    copy = edit.add_node(node.graph, proto, known, {}, node.position, rule)
    (made,) = (result for result in copy.outputs if result is not None)
    for _, slot in channels.readers:
        edit.set_input(slot.node, 0, made)
    givers = [Slot(copy, slot.slot, slot.axis) for slot in channels.givers]
    readers = [(made, slot) for _, slot in channels.readers]
    return Channels({made: axis}, givers, readers, channels.size)


def _scale(edit: Editor, slot: Slot, factors: Array) -> None:
    """Let the node read the constant with each channel multiplied."""
    value = slot.value
    array = slot.scaled(_numbers(edit, value), np.asarray(factors, np.float64))
    name = edit.unique(f"{value.name}/equalized")
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    edit.set_input(slot.node, slot.slot, edit.add_constant(value.graph, name, tensor, -1.0))
    unread = not (value.consumers or value.is_output or value in value.graph.pinned)
    if unread and value.producer is None and not value.is_input:
        edit.remove_value(value)


def _renamed(edit: Editor, channels: Channels) -> dict[str, str]:
    """Other names for values that now mean something else."""
    names = {}
    for value in channels.axes:
        known = edit.types[value]
        made = edit.add_value(value.graph, edit.unique(f"{value.name}/equalized"))
        edit.move_output(value, made)
        edit.replace_uses(value, made)
        names[value.name] = made.name
        edit.remove_value(value)
        if known is not None:
            edit.prove(made, known)
    return names


def _numbers(edit: Editor, value: Value) -> Array:
    weight = constant_of(value, edit.model.store)
    assert weight is not None
    return np.asarray(weight.values, np.float64)
