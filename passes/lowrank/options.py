"""What can be chosen for each layer: forms and ranks, with what they cost and what they lose."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.passes.linear import Layer, linear_layers
from graphopt.passes.lowrank.forms import FORMS, METHODS, Extent, Method
from graphopt.passes.lowrank.split import by_weights
from graphopt.passes.work import size_of

Array = NDArray[Any]
RATIOS: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
AUTOMATIC: Final[tuple[Method, ...]] = ("svd", "channel", "spatial", "tucker")
_SMALLEST: Final = 256  # weights: fewer are not worth a node
_LIKED: Final = 64  # channels: onnxruntime's convolutions do four blocks of 16 at a time
_WIDEST: Final = 0.95  # of the layer's own work: more is not worth a node either


@dataclass(frozen=True)
class Option:
    """One way to compute a layer; without a method as it is.

    `error` is the share that is lost of the variance of what the layer gives, `cost` what choices
    are made by: MACs, or milliseconds.
    """

    method: Method | None
    rank: int
    macs: int
    size: int
    error: float
    cost: float

    @property
    def text(self) -> str:
        """Method and rank."""
        return "dense" if self.method is None else f"{self.method} {self.rank}"


@dataclass(frozen=True, eq=False)
class Splittable:
    """Layers that read the same weights, mostly one; they are split alike.

    `macs` are of all of them, `extents` of each.
    """

    layers: tuple[Layer, ...]
    extents: tuple[Extent, ...]

    @property
    def root(self) -> str:
        """The name of what the first layer gives."""
        return self.layers[0].root

    @property
    def first(self) -> Layer:
        """The layer that stands for all."""
        return self.layers[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates as the layers are."""
        return sum(e.rows * self.first.weight.size for e in self.extents)

    @property
    def dense(self) -> Option:
        """The choice to leave them."""
        return Option(None, 0, self.macs, self.first.weight.size, 0.0, float(self.macs))

    @property
    def is_centred(self) -> bool:
        """True where a bias makes up for the mean of what is lost.

        Layers without one cannot, and those whose weights others read are not fitted.
        """
        return len(self.layers) == 1 and self.first.is_free and self.first.bias is not None

    def ranks(self, method: Method) -> dict[int, int]:
        """Ranks worth a try in a form, with the MACs that they leave; about one for each ratio.

        And all that runtimes like best: they work on that many channels at a time.
        """
        form, found = FORMS[method], dict[int, int]()
        for rank in form.ranks(self.first):
            macs = sum(form.macs(self.first, extent, rank) for extent in self.extents)
            if macs < _WIDEST * self.macs:
                found[rank] = macs
        nearest = {
            min(found, key=lambda rank: abs(found[rank] / self.macs - ratio))
            for ratio in RATIOS
            if found
        }
        liked = {rank for rank in found if rank % _LIKED == 0}
        return {rank: found[rank] for rank in sorted(nearest | liked)}

    def options(
        self, methods: Collection[Method], gram: Array | None, weights: Array | None = None
    ) -> Iterator[Option]:
        """All that can be chosen but to leave it, `cost` in MACs.

        `gram` [K, K] is of the rows that the layers read, less their mean; without, all directions
        count alike. `weights` [M, K] are the layers' own unless given.
        """
        layer = self.first
        kernel = () if layer.patches is None else layer.patches.kernel
        matrix = np.asarray(layer.matrix() if weights is None else weights, np.float64)
        shaped = matrix.reshape(layer.shape[0], -1, *kernel)
        for method in methods:
            form = FORMS[method]
            if not form.fits(layer):
                continue
            ranks = self.ranks(method)
            for rank, error in form.errors(shaped, gram, list(ranks)).items():
                macs = ranks[rank]
                yield Option(method, rank, macs, form.size(layer, rank), error, float(macs))


def splittable(edit: Editor, shapes: Mapping[str, tuple[int, ...]]) -> list[Splittable]:
    """The layers of the main graph that can be split, in order of computation.

    `shapes` are those of values by name as a run showed them; a layer of which neither they nor
    inference know anything is taken to be applied once.
    """
    return [
        Splittable(layers, tuple(_extent(edit, layer, shapes) for layer in layers))
        for layers in by_weights(linear_layers(edit))
        if _is_worth_it(layers[0])
    ]


def _is_worth_it(layer: Layer) -> bool:
    can_take = any(FORMS[method].fits(layer) for method in METHODS)
    return can_take and layer.weight.size >= _SMALLEST and min(layer.shape) > 1


def pooled(group: Splittable, known: Mapping[str, Array]) -> Array | None:
    """The Gram matrix [K, K] of all that a group reads, centred where `is_centred`.

    None where nothing was seen. `known` are moments [K + 1, K + 1] by root.
    """
    seen: Sequence[Array] = [known[x.root] for x in group.layers if x.root in known]
    if not seen:
        return None
    return sum_centred(seen, has_bias=group.is_centred)


def sum_centred(seen: Sequence[Array], *, has_bias: bool) -> Array:
    """The sum of moments [K + 1, K + 1] without the last row and column, less each mean's part."""
    gram = np.sum([matrix[:-1, :-1] for matrix in seen], axis=0)
    for matrix in seen if has_bias else ():
        if count := matrix[-1, -1]:
            gram = gram - np.outer(matrix[-1, :-1], matrix[-1, :-1]) / count
    return np.asarray(gram)


def _extent(edit: Editor, layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Extent:
    known = edit.types[layer.source]
    shape = size_of(layer.source.name, known.shape if known is not None else None, shapes)
    if layer.patches is None:
        rows = 1
        for size in (shape or ())[:-1]:
            rows *= size
        return Extent(rows)
    axes = len(layer.patches.kernel)
    if shape is None or layer.patches.misfit(shape):
        return Extent(1, (1,) * axes, (1,) * axes)
    return Extent(shape[0], shape[2:], tuple(layer.patches.out(shape)))
