"""Single weights set to zero: which, by how much they matter, and the rest fitted again.

Zeros make the file smaller once it is sparse, and nothing faster: onnxruntime has no kernel that
skips them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.errors import UsageError
from graphopt.ir import Model, Value
from graphopt.kernels import masks, saliency
from graphopt.passes.fitting import LayerFit, Score, Settings, fit, mask_layer
from graphopt.passes.linear import linear_layers
from graphopt.passes.prune import branches as branching
from graphopt.runtime import Feed

Array = NDArray[Any]
Importance = Literal["magnitude", "lamp", "wanda", "obs"]
IMPORTANCES: Final[tuple[Importance, ...]] = ("magnitude", "lamp", "wanda", "obs")
Scope = Literal["global", "layer"]
RULE: Final = "prune-weights"
_SCORES: Final[Mapping[str, Score]] = {"wanda": saliency.wanda, "obs": saliency.obs}
# Weights beside those of linear layers: slots of operators that multiply what they read by them.
_OTHERS: Final[Mapping[str, tuple[int, ...]]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "GRU": (1, 2),
    "Gemm": (0, 1),
    "LSTM": (1, 2),
    "MatMul": (0, 1),
    "RNN": (1, 2),
}
_PATTERN: Final = re.compile(r"(\d+):(\d+)|(\d+)x(\d+)")

Feeds = Callable[[], Iterable[Feed]]


@dataclass(frozen=True)
class Pattern:
    """Where zeros lie: anywhere, n of every m input channels left ("2:4"), or in blocks ("4x1").

    Blocks are of so many outputs by so many input channels.
    """

    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Read "2:4" or "16x1". Raises UsageError for anything else."""
        found = _PATTERN.fullmatch(text)
        n, m, rows, columns = (int(part or 0) for part in found.groups()) if found else (0,) * 4
        if not found or (m and not 0 < n < m) or (not m and min(rows, columns) < 1):
            raise UsageError(f"pattern {text!r}: write N:M, as 2:4, or a block, as 4x1")
        return cls(n, m) if m else cls(rows=rows, columns=columns)


@dataclass(frozen=True)
class Sparsity:
    """What is to be zero: a share of all weights, or those below a threshold, or a pattern.

    With the scope "global" weights of all layers compete, by LAMP unless their importance is plain
    magnitude; with "layer" each layer loses the share.
    """

    share: float | None = None
    threshold: float | None = None
    pattern: Pattern = field(default_factory=Pattern)
    importance: Importance = "lamp"
    scope: Scope = "global"

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCES:
            raise UsageError(f"importance {self.importance!r}: there are {', '.join(IMPORTANCES)}")
        if self.share is not None and not 0 <= self.share < 1:
            raise UsageError(f"sparsity {self.share}: it is 0 or more, and below 1")
        if self.threshold is not None and not self.threshold >= 0:
            raise UsageError(f"threshold {self.threshold}: it is 0 or more")
        if (self.share, self.threshold, self.pattern.m or None) == (None, None, None):
            raise UsageError("what is to be pruned? a share, a threshold or N:M")

    @property
    def needs_data(self) -> bool:
        """True where the scores depend on what layers read."""
        return self.importance in _SCORES


@dataclass
class Pruned:
    """What was done: layers in order, and how many weights of all that could go are left."""

    layers: list[LayerFit]
    kept: int
    total: int
    feeds: int = 0


def prune_weights(
    dense: Model,
    edit: Editor,
    how: Sparsity,
    feeds: Feeds | None,
    settings: Settings,
    progress: Callable[[float], None] | None = None,
) -> Pruned:
    """Set weights of the model to zero, and fit the others where there are feeds.

    `edit` is of a copy of `dense`. Taken are all float32 weights of convolutions and products, and
    of recurrent operators, which are only masked. Where weights are fitted, those that go are
    chosen in several rounds of fitting, each of which halves what is left: one weight may take the
    place of another. Layers in the branch that an If takes on all feeds are fitted as well. Raises
    UsageError where scores need feeds and there are none.
    """
    if feeds is None and how.needs_data:
        raise UsageError(f"importance {how.importance}: it needs feeds: --data")
    branches = branching.taken(dense, feeds, settings) if feeds is not None else {}
    if not branches:
        return _pruned(dense, edit, _Candidates(edit), how, feeds, settings, progress)
    flat = Editor(branching.flattened(edit.model, branches))
    settings = replace(settings, adds_biases=False)
    candidates = _Candidates(flat, edit)
    dense = branching.flattened(dense, branches)
    found = _pruned(dense, flat, candidates, how, feeds, settings, progress)
    candidates.hand_back()
    return found


def _pruned(
    dense: Model,
    edit: Editor,
    candidates: _Candidates,
    how: Sparsity,
    feeds: Feeds | None,
    settings: Settings,
    progress: Callable[[float], None] | None,
) -> Pruned:
    rounds = _rounds(how) if feeds is not None and settings.recovery == "lsq" else [how]
    score = _SCORES.get(how.importance)
    scores: dict[str, Array] = {}
    if feeds is not None and score is not None:
        plain = replace(settings, recovery="none")
        first = fit(dense, edit, {}, feeds, plain, only=candidates.only, score=score)
        scores = first.scores
    layers: list[LayerFit] = []
    seen = 0
    for number, each in enumerate(rounds):
        chosen = candidates.masks(each, scores)
        candidates.mask_others(chosen)
        if feeds is None:
            candidates.mask(chosen)
            continue

        def share(done: float, number: int = number) -> None:
            if progress is not None:
                progress((number + done) / len(rounds))

        options: dict[str, Any] = {"only": candidates.only, "score": score, "progress": share}
        found = fit(dense, edit, chosen, feeds, settings, **options)
        layers, scores, seen = found.layers, found.scores, found.feeds
        candidates.refresh()
    kept = sum(int(np.count_nonzero(mask)) for mask in chosen.values())
    total = sum(mask.size for mask in chosen.values())
    edit.record(RULE, next(iter(chosen), ""), f"{total} weights", f"{kept} weights")
    return Pruned(layers, kept, total, seen)


def _rounds(how: Sparsity) -> list[Sparsity]:
    """Shares on the way to the last: each step takes one part of what is left, at most half."""
    if how.share is None or how.pattern.m:
        return [how]
    steps = max(1, math.ceil(-math.log2(1 - how.share) - 1e-9))
    shares = [1 - (1 - how.share) ** (number / steps) for number in range(1, steps)]
    return [replace(how, share=share) for share in [*shares, how.share]]


class _Candidates:
    """All weights that can go, as matrices by name: of layers by root, others by their own.

    Where `edit` is of a copy that shows layers in branches, `whole` is of the model itself.
    """

    def __init__(self, edit: Editor, whole: Editor | None = None) -> None:
        self._edit = edit
        self._whole = whole or edit
        self.refresh()

    def refresh(self) -> None:
        """Look at the weights as they are now."""
        there = self._whole.model.graph.values
        layers = {layer.root: layer for layer in linear_layers(self._edit)}
        if self._whole is not self._edit:  # weights in a branch's own initializers stay
            layers = {root: each for root, each in layers.items() if each.weights.name in there}
        self.layers = layers
        known = {there[layer.weights.name] for layer in layers.values()}
        initializers = self._whole.model.graph.initializers
        self.others = {v.name: v for v in initializers if _can_go(v, known)}

    @property
    def only(self) -> set[str] | None:
        """The layers that may be fitted; None for all of them."""
        return None if self._whole is self._edit else set(self.layers)

    def hand_back(self) -> None:
        """Give the model itself the weights and biases of the copy's layers."""
        there = self._whole.model.graph.values
        for layer in self.layers.values():
            bias = None if layer.bias is None else layer.bias.value
            for value in (layer.weights, bias):
                own = None if value is None else there.get(value.name)
                if value is not None and value.weight is not None and own is not None:
                    array = np.ascontiguousarray(value.weight.values)
                    self._whole.set_weight(own, onnx.numpy_helper.from_array(array, own.name))

    def masks(self, how: Sparsity, scores: Mapping[str, Array]) -> dict[str, Array]:
        """True where a weight stays, by name, [M, K]."""
        found = {name: self._scores(name, how, scores) for name in (*self.layers, *self.others)}
        if not found:
            return {}
        if how.threshold is not None:
            return {name: self._magnitudes(name) >= how.threshold for name in found}
        if how.pattern.m:
            return {name: self._n_of_m(name, each, how.pattern) for name, each in found.items()}
        assert how.share is not None
        rows, columns = how.pattern.rows, how.pattern.columns
        if rows * columns > 1:
            return self._blocks(found, how)
        values = list(found.values())
        if how.scope == "layer":
            kept = [masks.largest([each], how.share)[0] for each in values]
        else:
            kept = masks.largest(values, how.share)
        return dict(zip(found, kept, strict=True))

    def _blocks(self, found: Mapping[str, Array], how: Sparsity) -> dict[str, Array]:
        """Whole blocks of weights that meet neighbouring outputs and input channels."""
        assert how.share is not None
        rows, columns = how.pattern.rows, how.pattern.columns
        wide = {name: self._by_channel(name, each) for name, each in found.items()}
        means = [masks.block_means(each, rows, columns) for each in wide.values()]
        if how.scope == "layer":
            kept = [masks.largest([each], how.share)[0] for each in means]
        else:
            kept = masks.largest(means, how.share)
        return {
            name: self._from_channels(name, masks.spread_blocks(keep, each.shape, rows, columns))
            for (name, each), keep in zip(wide.items(), kept, strict=True)
        }

    def _n_of_m(self, name: str, scores: Array, pattern: Pattern) -> Array:
        wide = self._by_channel(name, scores)
        taps = self.layers[name].taps if name in self.layers else 1
        by_tap = wide.reshape(len(wide), taps, -1)
        keep = masks.n_of_m(by_tap, pattern.n, pattern.m)
        return self._from_channels(name, keep.reshape(wide.shape))

    def _by_channel(self, name: str, matrix: Array) -> Array:
        """[M, K] with input channels as neighbours, tap after tap."""
        taps = self.layers[name].taps if name in self.layers else 1
        return np.ascontiguousarray(
            matrix.reshape(len(matrix), -1, taps).transpose(0, 2, 1)
        ).reshape(matrix.shape)

    def _from_channels(self, name: str, matrix: Array) -> Array:
        taps = self.layers[name].taps if name in self.layers else 1
        return np.ascontiguousarray(
            matrix.reshape(len(matrix), taps, -1).transpose(0, 2, 1)
        ).reshape(matrix.shape)

    def _scores(self, name: str, how: Sparsity, scores: Mapping[str, Array]) -> Array:
        found = scores[name] if name in scores else self._magnitudes(name)
        is_plain = how.importance == "magnitude" or how.scope == "layer" or how.threshold
        return found if is_plain or how.pattern.m else saliency.lamp(found)

    def _magnitudes(self, name: str) -> Array:
        """Magnitudes [M, K]."""
        if name in self.layers:
            return saliency.magnitude(self.layers[name].matrix())
        weight = self.others[name].weight
        assert weight is not None
        return saliency.magnitude(weight.values.reshape(-1, weight.shape[-1]))

    def mask(self, chosen: Mapping[str, Array]) -> None:
        """Set weights of layers to zero."""
        for name, layer in self.layers.items():
            mask_layer(self._edit, layer, chosen[name])

    def mask_others(self, chosen: Mapping[str, Array]) -> None:
        """Set weights that belong to no layer to zero."""
        for name, value in self.others.items():
            weight = value.weight
            assert weight is not None
            kept = np.where(chosen[name].reshape(weight.shape), weight.values, np.float32(0))
            seen = self._edit.model.graph.values.get(name)
            for edit, each in ((self._whole, value), (self._edit, seen)):
                if each is not None and each.weight is not None:
                    edit.set_weight(each, onnx.numpy_helper.from_array(kept, name))


def _can_go(value: Value, known: Collection[Value]) -> bool:
    """True for float32 weights that only operators with weights read, in their slots."""
    weight = value.constant
    if weight is None or value in known or value.is_output or weight.is_sparse:
        return False
    if weight.data_type != onnx.TensorProto.FLOAT or len(weight.shape) < 2 or not weight.size:
        return False
    for node in value.consumers:
        slots = {slot for slot, read in enumerate(node.inputs) if read is value}
        if node.domain or not slots <= set(_OTHERS.get(node.op, ())):
            return False
    return bool(value.consumers)
