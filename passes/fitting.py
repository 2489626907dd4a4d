"""Layers of a pruned network fitted one after another to what the dense network gives.

The rows that a layer reads come from the network as it is pruned so far, its targets from the dense
one: each layer makes up for what was lost before it as well as for its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.constants import constant_of
from graphopt.edit import Editor
from graphopt.ir import Model, Value
from graphopt.kernels import refit
from graphopt.kernels.moments import Regression
from graphopt.kernels.refit import Fit
from graphopt.passes.linear import Layer, linear_layers
from graphopt.relay import MEMORY, Relay, paired
from graphopt.runtime import Feed
from graphopt.statistics import Statistics

Array = NDArray[Any]
Recovery = Literal["lsq", "moments", "none"]
RECOVERIES: Final[tuple[Recovery, ...]] = ("lsq", "moments", "none")
RIDGE: Final = 1e-2  # of the mean square of what a layer reads
_ROWS: Final = 16384  # of a layer's inputs that are enough for any, and for each feature
_ROWS_PER_FEATURE: Final = 20
_BATCH: Final = 4096  # rows that are multiplied at a time
_LEAST_SIGNAL: Final = 1e-30  # a variance: an output that varies less is constant

Narrow = Callable[[Array, Array | None], Array]
"""Weights [M, K] of less freedom near given ones, by the Gram matrix [K, K] of what is read."""

Score = Callable[[Array, Array], Array]
"""Scores [M, K] from weights [M, K] and the Gram matrix [K, K] of what they read."""


@dataclass(frozen=True)
class Settings:
    """How to fit, and what the models run with. `memory` is for values between layers, in bytes.

    Without `adds_biases` layers that have none are fitted without one.
    """

    recovery: Recovery = "lsq"
    ridge: float = RIDGE
    threads: int = 0
    custom_ops: tuple[Path, ...] = ()
    adds_biases: bool = True
    memory: int = MEMORY

    @property
    def relay(self) -> dict[str, Any]:
        """What a `Relay` has to be told."""
        return {"threads": self.threads, "custom_ops": self.custom_ops, "memory": self.memory}


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer.

    Errors are mean squares of what it gives, relative to the variance of what the dense layer
    gives, in the network as it is pruned before it: with the dense weights that stay, and with
    those that were fitted. `ridge` is what was added to the mean squares of what it reads.
    """

    root: str
    operator: str
    kept: int
    total: int
    error_before: float
    error_after: float
    ridge: float


@dataclass
class Fitted:
    """All layers in order, with scores of their new weights where those were asked for."""

    layers: list[LayerFit] = field(default_factory=list)
    scores: dict[str, Array] = field(default_factory=dict)
    feeds: int = 0


def fit(
    dense: Model,
    edit: Editor,
    masks: Mapping[str, Array],
    feeds: Callable[[], Iterable[Feed]],
    settings: Settings,
    *,
    only: Collection[str] | None = None,
    score: Score | None = None,
    narrow: Mapping[str, Narrow] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Fitted:
    """Mask the weights of layers, by root, and fit these and all others in their order.

    With `only` others than those stay as they are. Layers named in `narrow` get weights of the form
    that it gives: of those that were fitted, weighed by what they read, less what a bias makes up.

    `edit` is the pruned model: of the graph of `dense`, which gives the targets; the ridge pulls
    towards the weights that it has now. Layers whose weights or bias are not theirs alone are
    masked only. Runs both models once on all feeds, in memory that does not grow with their number.
    """
    original = Editor(dense)
    targets = {layer.root: layer for layer in linear_layers(original) if layer.is_free}
    layers = linear_layers(edit)
    for layer in layers:
        if not layer.is_free and layer.root in masks:
            mask_layer(edit, layer, masks[layer.root])
    layers = [layer for layer in layers if layer.root in targets and layer.is_free]
    if only is not None:
        layers = [layer for layer in layers if layer.root in only]
    found = Fitted()
    ends = [targets[layer.root].result for layer in layers]
    with (
        Relay(dense, feeds(), ends, **settings.relay) as whole,
        Relay(edit.model, feeds(), [layer.source for layer in layers], **settings.relay) as pruned,
    ):
        found.feeds = pruned.feeds
        for number, layer in enumerate(layers):
            if progress is not None:
                progress(number / len(layers))
            target = targets[layer.root]
            seen = _observed(layer, target, pruned, whole)
            mask = masks.get(layer.root, np.ones(layer.shape, np.bool_))
            hold = (narrow or {}).get(layer.root)
            task = _Task(layer, target, mask, _bias(original, target), seen, hold)
            fits = task.fitted(settings)
            found.layers.append(task.account(fits, settings))
            _store(edit, layer, fits, _constant(original, target))
            if score is not None and seen:
                found.scores[layer.root] = task.scored(fits, score)
    return found


def mask_layer(edit: Editor, layer: Layer, mask: Array) -> None:
    """Set the weights of a layer to zero where the mask [M, K] is False."""
    _set(edit, layer.weights, layer.stored(np.where(mask, layer.matrix(), np.float32(0))))


def grams(
    model: Model,
    roots: Collection[str],
    feeds: Callable[[], Iterable[Feed]],
    settings: Settings,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Array]:
    """Gram matrices [K, K] of what linear layers of one group read, by root."""
    found = each_moments(model, roots, feeds, settings, progress)
    return {root: matrix[:-1, :-1] for root, matrix in found}


def each_moments(
    model: Model,
    roots: Collection[str],
    feeds: Callable[[], Iterable[Feed]],
    settings: Settings,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[str, Array]]:
    """Gram matrices [K + 1, K + 1], a column of ones behind what layers read, one at a time.

    Of layers of one group, with their roots, in order of computation.
    """
    layers = [each for each in linear_layers(Editor(model)) if each.root in roots]
    with Relay(model, feeds(), [each.source for each in layers], **settings.relay) as relay:
        for number, layer in enumerate(layers):
            if progress is not None:
                progress(number / len(layers))
            values = relay.values(layer.source)
            seen = _regressed(layer, ((x, None) for x in values), relay.feeds)
            if seen:
                yield layer.root, seen[0].matrix


def _observed(layer: Layer, target: Layer, pruned: Relay, whole: Relay) -> list[Regression]:
    """The regressions of one layer on the dense one's results."""
    return _regressed(layer, paired(pruned, layer.source, whole, target.result), pruned.feeds)


def _regressed(
    layer: Layer, pairs: Iterable[tuple[Array, Array | None]], feeds: int
) -> list[Regression]:
    """Regressions of what a layer reads on its targets; on zeros where there are none.

    Neighbouring rows tell the same, so that some are enough; small feeds are put together.
    """
    observer = layer.observer("regression")
    seen = Statistics([observer])
    most = max(_ROWS, _ROWS_PER_FEATURE * layer.shape[1])
    every = 0
    for x, y, count in _together(layer, pairs):
        rows = y.size // y.shape[layer.channel_axis]
        every = every or max(1, rows * feeds // count // most)
        seen.regress(observer, x, y, every)
    return seen.regressions(observer) if observer in seen else []


def _together(
    layer: Layer, pairs: Iterable[tuple[Array, Array | None]]
) -> Iterator[tuple[Array, Array, int]]:
    """Neighbouring feeds as one, up to some thousand rows; and how many they are."""
    xs: list[Array] = []
    ys: list[Array] = []
    for x, y in pairs:
        if y is None:
            y = np.zeros(_shape_of_one(layer, x.shape), np.float32)
        if layer.patches is None:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if not x.size or not y.size:
            continue
        rows = sum(each.size // each.shape[layer.channel_axis] for each in ys)
        if xs and (rows >= _BATCH or xs[0].shape[1:] != x.shape[1:]):
            yield np.concatenate(xs), np.concatenate(ys), len(xs)
            xs, ys = [], []
        xs.append(x)
        ys.append(y)
    if xs:
        yield np.concatenate(xs), np.concatenate(ys), len(xs)


def _shape_of_one(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What a layer with one output would give."""
    if layer.patches is None:
        return (*shape[:-1], 1)
    return (shape[0], 1, *layer.patches.out(shape))


@dataclass(frozen=True)
class _Task:
    """One layer to be fitted: `bias` [M] is what the dense one adds by itself.

    `seen` holds one regression for each group of a convolution; none where nothing was read. What
    `narrow` says is of the whole layer: of one group.
    """

    layer: Layer
    target: Layer
    mask: Array
    bias: Array
    seen: Sequence[Regression]
    narrow: Narrow | None = None

    def fitted(self, settings: Settings) -> list[Fit]:
        """New weights and biases of each group."""
        recovery, ridge, place = settings.recovery, settings.ridge, self.layer.bias
        has_bias = place is not None and (settings.adds_biases or place.value is not None)
        start = np.asarray(self.layer.matrix(), np.float64)
        fits = []
        for number, part in enumerate(self.layer.parts()):
            plain = Fit(np.where(self.mask[part], start[part], 0), self.bias[part])
            seen = self.seen[number] if self.seen else None
            if recovery == "none" or seen is None or not seen.count:
                fits.append(plain)
            elif recovery == "moments":
                plain = plain if has_bias else plain._replace(bias=None)
                fits.append(refit.match_moments(seen.matrix, seen.cross, seen.energy, plain))
            else:
                mask, first = self.mask[part], start[part]
                matrix, cross = seen.matrix, seen.cross
                fits.append(
                    refit.masked_least_squares(
                        matrix, cross, mask, first, ridge=ridge, has_bias=has_bias
                    )
                )
        if self.narrow is not None:
            return [self._narrowed(fits[0], self.narrow, has_bias)]
        return fits

    def _narrowed(self, fit: Fit, narrow: Narrow, has_bias: bool) -> Fit:
        """Weights of less freedom near those of a fit; the bias makes up for the mean that goes."""
        if not self.seen or not self.seen[0].count:
            return Fit(narrow(fit.weights, None), fit.bias)
        matrix, count = self.seen[0].matrix, self.seen[0].count
        gram = matrix[:-1, :-1]
        if fit.bias is None or not has_bias:
            return Fit(narrow(fit.weights, gram), fit.bias)
        mean = matrix[-1, :-1] / count
        weights = narrow(fit.weights, gram - count * np.outer(mean, mean))
        return Fit(weights, fit.bias + (fit.weights - weights) @ mean)

    def account(self, fits: Sequence[Fit], settings: Settings) -> LayerFit:
        """The errors before and after."""
        whole = np.asarray(self.target.matrix(), np.float64)
        before = after = signal = added = 0.0
        for part, seen, fit in zip(self.layer.parts(), self.seen, fits, strict=False):
            plain = Fit(np.where(self.mask[part], whole[part], 0), self.bias[part])
            sums, count = (seen.matrix, seen.cross, seen.energy), max(1, seen.count)
            before += float(refit.squared_error(*sums, plain).sum()) / count
            after += float(refit.squared_error(*sums, fit).sum()) / count
            signal += float(seen.variance.sum())
            added += float(np.mean(np.diag(seen.matrix)[:-1])) / count / len(fits)
        return LayerFit(
            self.layer.root,
            self.layer.node.op,
            int(np.count_nonzero(self.mask)),
            self.mask.size,
            before / max(signal, _LEAST_SIGNAL),
            after / max(signal, _LEAST_SIGNAL),
            settings.ridge * added if settings.recovery == "lsq" else 0.0,
        )

    def scored(self, fits: Sequence[Fit], score: Score) -> Array:
        """Scores of the new weights, [M, K]."""
        parts = zip(fits, self.seen, strict=True)
        return np.concatenate([score(fit.weights, seen.matrix[:-1, :-1]) for fit, seen in parts])


def _bias(edit: Editor, layer: Layer) -> Array:
    """What the layer itself adds: float64 [M], zeros where its bias is apart or missing."""
    if layer.bias is None or layer.bias.is_apart:
        return np.zeros(layer.shape[0])
    return np.broadcast_to(_constant(edit, layer), layer.shape[:1])


def _constant(edit: Editor, layer: Layer) -> Array:
    """The layer's bias as it is stored, float64; a zero where there is none."""
    value = None if layer.bias is None else layer.bias.value
    weight = constant_of(value, edit.model.store)
    return np.zeros(1) if weight is None else np.asarray(weight.values, np.float64)


def _store(edit: Editor, layer: Layer, fits: Sequence[Fit], dense_bias: Array) -> None:
    """Put new numbers in the place of a layer's; the bias that is apart grows by the new one."""
    weights = np.concatenate([fit.weights for fit in fits])
    _set(edit, layer.weights, layer.stored(weights.astype(np.float32)))
    if layer.bias is None or any(fit.bias is None for fit in fits):
        return
    bias = np.concatenate([fit.bias for fit in fits if fit.bias is not None])
    if layer.bias.is_apart:
        bias = bias + dense_bias
    if layer.bias.value is not None:
        _set(edit, layer.bias.value, bias.astype(np.float32))
    elif bias.any():
        add_bias(edit, layer, bias.astype(np.float32))


def _set(edit: Editor, value: Value, array: Array) -> None:
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), value.name)
    edit.set_weight(value, tensor)


def add_bias(edit: Editor, layer: Layer, bias: Array) -> None:
    """Give a convolution or Gemm without a bias one, float32 [M]."""
    name = edit.unique(f"{layer.root}/bias")
    tensor = onnx.numpy_helper.from_array(bias, name)
    value = edit.add_constant(layer.node.graph, name, tensor, -1.0)
    if len(layer.node.inputs) > 2:
        edit.set_input(layer.node, 2, value)
    else:
        edit.append_input(layer.node, value)
